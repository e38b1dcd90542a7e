//! `cargo xtask test`: everything that CI runs, in order, on a machine without a GPU.

use crate::ptx;
use crate::steps::{Steps, cargo, check};

/// Runs every step and lists them with their times.
pub fn run() -> anyhow::Result<()> {
    let mut steps = Steps::default();
    steps.run("format", || {
        check(&mut cargo(["fmt", "--all", "--check"]))?;
        // Formatted by the host's rustfmt, because the device's toolchain need not have one.
        check(&mut cargo(["fmt", "--manifest-path", "kernels-gpu/Cargo.toml", "--check"]))
    });
    steps.run("clippy", || {
        check(&mut cargo(["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]))?;
        // The library as others use it, without the command and its dependencies.
        check(&mut cargo([
            "clippy",
            "--package",
            "liquidgemm",
            "--lib",
            "--no-default-features",
            "--",
            "-D",
            "warnings",
        ]))
    });
    steps.run("documentation", || {
        // All but `cuda_std`, most of which exists on the device only.
        let mut doc = cargo(["doc", "--workspace", "--exclude", "cuda_std", "--no-deps", "--quiet"]);
        check(doc.env("RUSTDOCFLAGS", "-D warnings"))
    });
    steps.run("kernels", ptx::build_and_check);
    steps.run("tests", || {
        let mut tests = cargo(["test", "--workspace", "--no-fail-fast"]);
        // The fuzz targets' inputs are the same each time, and as many.
        tests.env("BOLERO_RANDOM_SEED", "1").env("BOLERO_RANDOM_ITERATIONS", "2000");
        check(tests.env("BOLERO_RANDOM_TEST_TIME_MS", "600000"))
    });
    // CPU kernels that this machine lacks the instructions for have not been tested: it says which.
    steps.run("machine", || check(&mut cargo(["run", "--quiet", "--package", "liquidgemm", "--", "info"])));
    steps.finish()
}
