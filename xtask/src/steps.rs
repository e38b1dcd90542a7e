//! Runs the steps of a longer check, prints each with its time, and lists all at the end.
//!
//! Later steps run even if an earlier one fails, so one run shows everything that is wrong.

use std::ffi::OsStr;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};

/// The steps that have run: name, time, and success.
#[derive(Default)]
pub struct Steps(Vec<(&'static str, Duration, bool)>);

impl Steps {
    /// Runs one step and records its time and outcome.
    pub fn run(&mut self, name: &'static str, step: impl FnOnce() -> anyhow::Result<()>) {
        println!("==> {name}");
        let start = Instant::now();
        let outcome = step();
        let time = start.elapsed();
        match &outcome {
            Ok(()) => println!("==> {name}: ok, {:.1} s\n", time.as_secs_f64()),
            Err(error) => println!("==> {name}: FAILED, {:.1} s: {error:#}\n", time.as_secs_f64()),
        }
        self.0.push((name, time, outcome.is_ok()));
    }

    /// Lists the steps with their times.
    ///
    /// # Errors
    /// Returns one that names the failed steps, if any.
    pub fn finish(self) -> anyhow::Result<()> {
        for (name, time, ok) in &self.0 {
            println!("{:>8.1} s  {:<6}  {name}", time.as_secs_f64(), if *ok { "ok" } else { "FAILED" });
        }
        let failed: Vec<_> = self.0.iter().filter(|(_, _, ok)| !ok).map(|(name, ..)| *name).collect();
        let total: Duration = self.0.iter().map(|(_, time, _)| time).sum();
        if !failed.is_empty() {
            bail!("{} of {} steps failed: {}", failed.len(), self.0.len(), failed.join(", "));
        }
        println!("all {} steps passed in {:.1} s", self.0.len(), total.as_secs_f64());
        Ok(())
    }
}

/// Returns a command for the cargo that runs this program, with these arguments.
pub fn cargo<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(arguments);
    command
}

/// Runs a command to its end.
///
/// # Errors
/// Returns one if the command cannot start or fails.
pub fn check(command: &mut Command) -> anyhow::Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let status = command.status().with_context(|| format!("cannot run {program}"))?;
    ensure!(status.success(), "{status}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn later_steps_run_after_a_failure_and_the_whole_fails() {
        let mut ran = Vec::new();
        let mut steps = Steps::default();
        steps.run("first", || bail!("wrong"));
        steps.run("second", || {
            ran.push("second");
            Ok(())
        });
        let error = steps.finish().unwrap_err().to_string();
        assert_eq!(error, "1 of 2 steps failed: first");
        assert_eq!(ran, ["second"]);
    }

    #[test]
    fn exit_status_decides() {
        assert!(check(cargo(["--version"]).stdout(std::process::Stdio::null())).is_ok());
        assert!(check(cargo(["no-such-subcommand"]).stderr(std::process::Stdio::null())).is_err());
        assert!(check(&mut Command::new("no-such-program-at-all")).is_err());
    }
}
