//! The automation behind `cargo xtask`, with one file for each subcommand.
//!
//! Everything runs in the workspace's root, wherever it was called. No build depends on it.

mod accuracy;
mod bench;
mod cuda_tools;
mod deny;
mod gpu_test;
mod header;
mod ptx;
mod pypi;
mod sass;
mod steps;
mod test;
mod walkthrough;
mod wheel;

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
    /// Measure the accuracy of real models, and write docs/accuracy.md and .json
    Accuracy,
    Bench(bench::Arguments),
    /// Fetch the models of `accuracy`
    Models,
    Ptx(ptx::Arguments),
    /// Run everything that CI runs
    Test,
    GpuTest(gpu_test::Arguments),
    /// Write the C header from its sources
    Header,
    /// Run every command on two whole models, and write docs/walkthrough.md
    Walkthrough,
    Wheel(wheel::Arguments),
}

fn main() -> ExitCode {
    let outcome =
        std::env::set_current_dir(root()).map_err(anyhow::Error::from).and_then(
            |()| match Arguments::parse().command {
                Command::Accuracy => accuracy::run(),
                Command::Bench(arguments) => bench::run(&arguments),
                Command::Models => accuracy::models(),
                Command::Ptx(arguments) => ptx::run(&arguments),
                Command::Test => test::run(),
                Command::GpuTest(arguments) => gpu_test::run(&arguments),
                Command::Header => header::run(),
                Command::Walkthrough => walkthrough::run(),
                Command::Wheel(arguments) => wheel::run(&arguments),
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

/// Returns the workspace's root.
fn root() -> PathBuf {
    // Ask the cargo that runs this program.
    // Two checkouts with one target directory share the binary,
    // so the path from compile time may name the other one.
    let xtask = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    Path::new(&xtask).parent().expect("xtask lies in the workspace").to_owned()
}
