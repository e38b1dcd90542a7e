//! `cargo xtask gpu-test`: the integration tests that need a GPU. They live in the package `liquidgemm-gpu-tests`, which says
//! "skipped: no GPU" by itself and ignores every test where there is none.

use crate::steps::cargo;

/// Run the GPU integration tests; where there is no GPU, say so
#[derive(clap::Args)]
pub struct Arguments {
    /// What to pass on to the tests, such as a part of a test's name
    #[arg(last = true)]
    rest: Vec<String>,
}

/// Builds and runs the tests with optimization, because they compare with the CPU backend.
pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let mut command = cargo(["test", "--release", "--package", "liquidgemm-gpu-tests", "--"]);
    command.args(&arguments.rest);
    let status = command.status()?;
    anyhow::ensure!(status.success(), "the GPU tests failed");
    Ok(())
}
