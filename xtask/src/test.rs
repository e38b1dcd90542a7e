//! `cargo xtask test`: runs every check of CI in order. It needs no GPU.
//!
//! `steps.rs` runs and times the steps; `ptx.rs` and `deny.rs` hold the longer ones.

use std::thread;

use anyhow::bail;

use crate::steps::{Steps, cargo, check};
use crate::{deny, ptx};

/// Runs all steps and lists them with their times.
///
/// # Errors
/// Returns one if any step fails.
pub fn run() -> anyhow::Result<()> {
    let mut steps = Steps::default();
    steps.run("format", || {
        check(&mut cargo(["fmt", "--all", "--check"]))?;
        // Use the host's rustfmt, because the device's toolchain may lack one.
        check(&mut cargo(["fmt", "--manifest-path", "kernels-gpu/Cargo.toml", "--check"]))
    });
    steps.run("clippy", || {
        check(&mut cargo(["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]))?;
        // Check the library without the GPU backend and the command-line tool without the bench, too.
        for package in ["liquidgemm", "liquidgemm-cli"] {
            let without = ["clippy", "--package", package, "--all-targets", "--no-default-features"];
            check(cargo(without).args(["--", "-D", "warnings"]))?;
        }
        Ok(())
    });
    steps.run("documentation", || {
        // Leave out `cuda_std`, because most of it exists on the device only.
        let mut doc = cargo(["doc", "--workspace", "--exclude", "cuda_std", "--no-deps", "--quiet"]);
        check(doc.env("RUSTDOCFLAGS", "-D warnings"))
    });
    // Build cargo-deny meanwhile: the kernels' compiler keeps only one core busy, for minutes.
    let deny = thread::spawn(deny::install);
    steps.run("kernels", ptx::build_and_check);
    steps.run("dependencies", || {
        deny.join().unwrap_or_else(|_| bail!("building cargo-deny panicked"))?;
        deny::run()
    });
    steps.run("tests", || {
        let mut tests = cargo(["test", "--workspace", "--no-fail-fast"]);
        // Make the fuzz targets run the same 2,000 inputs each time.
        tests.env("BOLERO_RANDOM_SEED", "1").env("BOLERO_RANDOM_ITERATIONS", "2000");
        check(tests.env("BOLERO_RANDOM_TEST_TIME_MS", "600000"))
    });
    steps.run("examples", || {
        for example in ["01_quantize", "02_backend", "03_stream"] {
            check(&mut cargo(["run", "--quiet", "--package", "liquidgemm", "--example", example]))?;
        }
        Ok(())
    });
    // List the CPU kernels that were not tested because this machine lacks their instructions.
    steps.run("machine", || {
        check(&mut cargo(["run", "--quiet", "--package", "liquidgemm-cli", "--", "info"]))
    });
    steps.finish()
}
