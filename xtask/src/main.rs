//! Automation behind `cargo xtask`: one file a subcommand, none of which hooks into a build. Everything runs from the
//! workspace's root, wherever it was called.

mod bench;
mod cuda_tools;
mod gpu_test;
mod ptx;
mod sass;
mod steps;
mod test;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Build, check and test automation of LiquidGEMM
#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Bench(bench::Arguments),
    Ptx(ptx::Arguments),
    /// Run everything that CI runs
    Test,
    GpuTest(gpu_test::Arguments),
}

fn main() -> ExitCode {
    let outcome =
        std::env::set_current_dir(root()).map_err(anyhow::Error::from).and_then(
            |()| match Arguments::parse().command {
                Command::Bench(arguments) => bench::run(&arguments),
                Command::Ptx(arguments) => ptx::run(&arguments),
                Command::Test => test::run(),
                Command::GpuTest(arguments) => gpu_test::run(&arguments),
            },
        );
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The workspace's root.
fn root() -> PathBuf {
    // Asked of the cargo that runs this program: two checkouts that share a target directory share the binary too, and
    // what it was compiled with may name the other one.
    let xtask = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    Path::new(&xtask).parent().expect("xtask lies in the workspace").to_owned()
}
