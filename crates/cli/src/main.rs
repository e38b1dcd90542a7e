//! The command `liquidgemm`: arguments, exit codes and what the subcommands share. Each subcommand is a file.
//! The computations are in the library `liquidgemm`, the measurements in `liquidgemm-bench`, whole models in `liquidgemm-checkpoint`.
//!
//! Exit codes: 0 for success; 1 for a failure (one line on stderr) or a result that is not bit-exact;
//! 2 for invalid arguments.
//! Results go to stdout, progress and errors to stderr.

#[cfg(feature = "bench")]
mod bench;
#[cfg(feature = "eval")]
mod calibrate;
mod check;
mod compare;
mod completions;
mod demo;
#[cfg(feature = "estimate")]
mod estimate;
#[cfg(feature = "eval")]
mod eval;
mod info;
mod inspect;
mod layer;
mod models;
mod progress;
mod quantize;
mod timing;
mod units;
mod verify;

use std::io::Write;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand, ValueEnum};
use liquidgemm::{Backend, Error};

/// W4A8 matrix multiplication for NVIDIA Hopper: 4-bit weights, 8-bit activations, exact integer accumulation
#[derive(Parser)]
#[command(name = "liquidgemm", version, after_help = models::EXIT_CODES)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    #[cfg(feature = "bench")]
    Bench(bench::Arguments),
    Compare(compare::Arguments),
    Completions(completions::CompletionArguments),
    Demo(demo::Arguments),
    #[cfg(feature = "estimate")]
    Estimate(estimate::Arguments),
    #[cfg(feature = "eval")]
    Calibrate(calibrate::Arguments),
    #[cfg(feature = "eval")]
    Eval(Box<eval::Arguments>),
    Info(info::Arguments),
    Inspect(inspect::Arguments),
    Man(completions::ManArguments),
    Quantize(quantize::Arguments),
    Verify(verify::Arguments),
}

/// The choice of a backend.
#[derive(Clone, Copy, ValueEnum)]
enum BackendChoice {
    /// The GPU if a usable one is found, otherwise the CPU
    Auto,
    /// The CPU
    Cpu,
    /// The GPU; an error if no usable one is found
    Gpu,
}

/// The options that choose the backend and the GPU.
#[derive(Clone, Copy, clap::Args)]
struct Place {
    /// Backend that computes the product
    #[arg(long, value_enum, default_value = "auto")]
    backend: BackendChoice,

    /// Index of the GPU, 0 for the first [default: LIQUIDGEMM_DEVICE, or the first usable GPU]
    #[arg(long, value_name = "NUMBER")]
    device: Option<u32>,
}

impl Place {
    /// Opens the chosen backend. With a GPU index, `auto` is an error if that GPU can't be used.
    fn open(self) -> Result<Backend, Error> {
        match (self.backend, self.device) {
            (BackendChoice::Cpu, _) => Ok(Backend::cpu()),
            (_, Some(device)) => Backend::with_device(device),
            (BackendChoice::Gpu, None) => Backend::gpu(),
            (BackendChoice::Auto, None) => Ok(Backend::auto()),
        }
    }
}

/// The output of a subcommand, and whether it succeeded.
struct Report {
    text: String,
    success: bool,
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse().command {
        #[cfg(feature = "bench")]
        Command::Bench(arguments) => bench::run(&arguments),
        Command::Compare(arguments) => compare::run(&arguments),
        Command::Completions(arguments) => completions::completions(&arguments, Arguments::command()),
        Command::Demo(arguments) => demo::run(&arguments),
        #[cfg(feature = "estimate")]
        Command::Estimate(arguments) => estimate::run(&arguments),
        #[cfg(feature = "eval")]
        Command::Calibrate(arguments) => calibrate::run(&arguments),
        #[cfg(feature = "eval")]
        Command::Eval(arguments) => eval::run(&arguments),
        Command::Info(arguments) => info::run(&arguments),
        Command::Inspect(arguments) => inspect::run(&arguments),
        Command::Man(arguments) => completions::man(&arguments, Arguments::command()),
        Command::Quantize(arguments) => quantize::run(&arguments),
        Command::Verify(arguments) => verify::run(&arguments),
    };
    match outcome {
        Ok(report) => {
            let mut stdout = std::io::stdout();
            let written = stdout.write_all(report.text.as_bytes()).and_then(|()| stdout.flush());
            match written {
                // A closed pipe is no failure: the reader has read enough, as in `liquidgemm demo | head -1`.
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
