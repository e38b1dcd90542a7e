//! Command-line interface: arguments, exit codes and what the subcommands share.
//!
//! Exit codes: 0 for success, 1 for a failure at work (one line on stderr) or a result that is not bit-exact,
//! 2 for arguments that make no sense. Results go to stdout, progress and errors to stderr.

#[cfg(feature = "bench")]
mod bench;
mod check;
mod demo;
mod info;
mod problem;
mod progress;
mod timing;

use std::io::Write;
use std::process::ExitCode;

use clap::{Parser, Subcommand, ValueEnum};
use liquidgemm::{Backend, Error};

/// W4A8 matrix products for NVIDIA Hopper: 4-bit weights, 8-bit activations, exact integer accumulation.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    #[cfg(feature = "bench")]
    Bench(bench::Arguments),
    Demo(demo::Arguments),
    Info(info::Arguments),
}

/// Where to compute.
#[derive(Clone, Copy, ValueEnum)]
enum BackendChoice {
    /// The GPU if one can be used, otherwise the CPU
    Auto,
    /// The CPU
    Cpu,
    /// The GPU; an error where none can be used
    Gpu,
}

/// The options that say where to compute.
#[derive(Clone, Copy, clap::Args)]
struct Place {
    /// Where to compute
    #[arg(long, value_enum, default_value = "auto")]
    backend: BackendChoice,

    /// The number of the GPU, 0 for the first [default: LIQUIDGEMM_DEVICE, or the first that can be used]
    #[arg(long, value_name = "NUMBER")]
    device: Option<u32>,
}

impl Place {
    fn open(self) -> Result<Backend, Error> {
        match (self.backend, self.device) {
            (BackendChoice::Cpu, _) => Ok(Backend::cpu()),
            (_, Some(device)) => Backend::with_device(device),
            (BackendChoice::Gpu, None) => Backend::gpu(),
            (BackendChoice::Auto, None) => Ok(Backend::auto()),
        }
    }
}

/// What a subcommand has to say, and whether it is good news.
struct Report {
    text: String,
    success: bool,
}

/// Runs the command that the process was started with.
pub fn run() -> ExitCode {
    let outcome = match Arguments::parse().command {
        #[cfg(feature = "bench")]
        Command::Bench(arguments) => bench::run(&arguments),
        Command::Demo(arguments) => demo::run(&arguments),
        Command::Info(arguments) => info::run(&arguments),
    };
    match outcome {
        Ok(report) => {
            let mut stdout = std::io::stdout();
            let written = stdout.write_all(report.text.as_bytes()).and_then(|()| stdout.flush());
            match written {
                // A reader that has gone has read enough (`liquidgemm demo | head -1`).
                Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
                    eprintln!("error: cannot write the result: {error}");
                    ExitCode::FAILURE
                }
                _ if report.success => ExitCode::SUCCESS,
                _ => ExitCode::FAILURE,
            }
        }
        Err(error) => {
            eprintln!("error: {}", format!("{error:#}").replace('\n', "; "));
            ExitCode::FAILURE
        }
    }
}
