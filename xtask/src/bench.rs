//! `cargo xtask bench`: builds the command-line tool with optimization and runs `liquidgemm bench`.
//!
//! Without a GPU it prints one line and succeeds, because that is no error in the sources.

use std::process::{Command, Stdio};

use crate::steps::{cargo, check};

/// Build and run `liquidgemm bench` with the given arguments (`--quick`, `--help`, …)
#[derive(clap::Args)]
#[command(disable_help_flag = true)]
pub struct Arguments {
    /// Arguments for `liquidgemm bench`
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGUMENTS")]
    rest: Vec<String>,
}

/// Builds the tool, looks for a GPU if one is needed, and runs the bench.
///
/// # Errors
/// Returns one if the build or the bench fails.
pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    check(&mut liquidgemm("build"))?;
    if needs_gpu(&arguments.rest) {
        let mut info = liquidgemm("run");
        info.args(["--", "info", "--backend", "gpu"]).stdout(Stdio::null()).stderr(Stdio::null());
        if !info.status()?.success() {
            println!("skipped: no GPU");
            return Ok(());
        }
    }
    check(liquidgemm("run").args(["--", "bench"]).args(&arguments.rest))
}

/// Returns the cargo command that builds or runs the tool.
fn liquidgemm(verb: &str) -> Command {
    cargo([verb, "--release", "--quiet", "--package", "liquidgemm-cli"])
}

/// Returns whether the bench would measure something.
fn needs_gpu(arguments: &[String]) -> bool {
    let without = |argument: &String| {
        ["--help", "-h", "--from"].contains(&argument.as_str()) || argument.starts_with("--from=")
    };
    !arguments.iter().any(without)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn help_and_earlier_results_need_no_gpu() {
        let needs = |line: &str| needs_gpu(&line.split(' ').map(str::to_owned).collect::<Vec<_>>());
        assert!(needs("--quick --json from.json"));
        assert!(!needs("--help") && !needs("--from=a.json --plots b") && !needs("--from a.json"));
    }
}
