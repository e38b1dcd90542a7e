//! The `liquidgemm` command. It only reads the arguments and turns the outcome into text and an exit code; what
//! the subcommands do is in `cli/`, and everything they compute is in the library.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::run()
}
