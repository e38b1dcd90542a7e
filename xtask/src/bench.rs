//! `cargo xtask bench`: builds the command with optimization and runs `liquidgemm bench` with it. Where there is no GPU
//! it says so in one line, because that is no failure of the sources.

use std::process::{Command, Stdio};

use crate::steps::{cargo, check};

/// Build and run `liquidgemm bench`; what follows goes to it (`--quick`, `--help`, …)
#[derive(clap::Args)]
#[command(disable_help_flag = true)]
pub struct Arguments {
    /// What to pass on to the bench
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGUMENTS")]
    rest: Vec<String>,
}

/// Builds, looks for a GPU, and runs.
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

/// Builds or runs the command.
fn liquidgemm(verb: &str) -> Command {
    cargo([verb, "--release", "--quiet", "--package", "liquidgemm", "--bin", "liquidgemm"])
}

/// Whether the bench would measure something.
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
