//! `cargo xtask gpu-test`: runs the integration tests that need a GPU, the package `liquidgemm-gpu-tests`.
//!
//! Without a GPU, the package itself prints "skipped: no GPU" and ignores every test.

use crate::steps::cargo;

/// Run the GPU integration tests; without a GPU, report that they are skipped
#[derive(clap::Args)]
pub struct Arguments {
    /// Arguments for the tests, such as a part of a test's name
    #[arg(last = true)]
    rest: Vec<String>,
}

/// Builds and runs the tests with optimization, because they compute their expected results on the CPU.
///
/// # Errors
/// Returns one if a test fails.
pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let mut command = cargo(["test", "--release", "--package", "liquidgemm-gpu-tests", "--"]);
    command.args(&arguments.rest);
    let status = command.status()?;
    anyhow::ensure!(status.success(), "the GPU tests failed");
    Ok(())
}
