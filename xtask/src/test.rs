//! `cargo xtask test`: runs every check of CI in order. It needs no GPU.
//!
//! `steps.rs` runs and times the steps; `ptx.rs` and `deny.rs` hold the longer ones.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use anyhow::{Context, bail, ensure};

use crate::steps::{Steps, cargo, check};
use crate::{deny, ptx, wheel};

/// The packages that are checked without their default features, and with which features instead.
const REDUCED: [(&str, &str); 5] = [
    ("liquidgemm", ""),
    ("liquidgemm", "files"),
    ("liquidgemm", "gptq"),
    ("liquidgemm", "gpu"),
    ("liquidgemm-cli", ""),
];

/// Runs all steps and lists them with their times.
///
/// # Errors
/// Returns one if any step fails.
pub fn run() -> anyhow::Result<()> {
    let mut steps = Steps::default();
    steps.run("format", || {
        check(&mut cargo(["fmt", "--all", "--check"]))?;
        // Use the host's rustfmt, because the device's toolchain may lack one.
        let apart = ["kernels-gpu/Cargo.toml", "integrations/candle/Cargo.toml"];
        apart
            .iter()
            .try_for_each(|manifest| check(&mut cargo(["fmt", "--manifest-path", manifest, "--check"])))
    });
    steps.run("clippy", || {
        check(&mut cargo(["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]))?;
        REDUCED.iter().try_for_each(|(package, features)| {
            let without = ["clippy", "--package", package, "--all-targets", "--no-default-features"];
            check(cargo(without).args(["--features", features, "--", "-D", "warnings"]))
        })
    });
    steps.run("documentation", || {
        // Leave out `cuda_std`, because most of it exists on the device only.
        let mut doc = cargo(["doc", "--workspace", "--exclude", "cuda_std", "--no-deps", "--quiet"]);
        check(doc.env("RUSTDOCFLAGS", "-D warnings"))
    });
    // Build cargo-deny and the tests meanwhile: the kernels' compiler keeps only one core busy, for minutes.
    let deny = thread::spawn(deny::install);
    let other_cores = thread::available_parallelism().map_or(1, |cores| (cores.get() - 1).max(1)).to_string();
    let build = thread::spawn(move || check(tests().args(["--no-run", "--quiet", "--jobs", &other_cores])));
    steps.run("kernels", ptx::build_and_check);
    steps.run("dependencies", || {
        deny.join().unwrap_or_else(|_| bail!("building cargo-deny panicked"))?;
        deny::run()
    });
    steps.run("tests", || {
        build.join().unwrap_or_else(|_| bail!("building the tests panicked"))?;
        let mut tests = tests();
        // Make the fuzz targets run the same 2,000 inputs each time.
        tests.env("BOLERO_RANDOM_SEED", "1").env("BOLERO_RANDOM_ITERATIONS", "2000");
        check(tests.env("BOLERO_RANDOM_TEST_TIME_MS", "600000"))
    });
    // The step before has built these, with the features of the whole workspace.
    steps.run("examples", || {
        let examples = examples(Path::new("host/examples"))?;
        ensure!(!examples.is_empty(), "host/examples has no example");
        examples.iter().try_for_each(|example| check(&mut Command::new(built(&["examples", example]))))
    });
    steps.run("wheel", || wheel::run(&wheel::Arguments { dev: true, test: true }));
    // List the CPU kernels that were not tested because this machine lacks their instructions.
    steps.run("machine", || check(Command::new(built(&["liquidgemm"])).arg("info")));
    steps.finish()
}

/// Returns the command that runs all tests of the workspace.
fn tests() -> Command {
    cargo(["test", "--workspace", "--no-fail-fast"])
}

/// Returns the names of a directory's examples, sorted.
fn examples(directory: &Path) -> anyhow::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(directory).with_context(|| format!("cannot list {}", directory.display()))? {
        names.extend(entry?.path().file_stem().map(|stem| stem.to_string_lossy().into_owned()));
    }
    names.sort();
    Ok(names)
}

/// Returns the path of a program that `cargo test` has built in the debug profile.
fn built(parts: &[&str]) -> PathBuf {
    let mut path = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| "target".into(), PathBuf::from);
    path.push("debug");
    path.extend(parts);
    path.set_extension(std::env::consts::EXE_EXTENSION);
    path
}
