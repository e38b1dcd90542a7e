//! `cargo deny`: checks licences, duplicate crates and the sources of crates, as `deny.toml` configures.
//!
//! Installs a pinned version of it below `target` if it is missing.

use std::path::{Path, PathBuf};

use anyhow::Context;

use crate::steps::{cargo, check};

/// The version of cargo-deny.
const VERSION: &str = "0.20.2";
/// The folder below which it is installed, kept between runs.
const ROOT: &str = "target/tools";

/// Builds `cargo deny` unless it is installed.
///
/// Uses one job, because it runs beside a build that keeps another core busy.
///
/// # Errors
/// Returns one if cargo cannot build it.
pub fn install() -> anyhow::Result<()> {
    let root = root();
    if binary(&root).is_file() {
        return Ok(());
    }
    let mut install =
        cargo(["install", "cargo-deny", "--version", VERSION, "--locked", "--debug", "--quiet"]);
    install.args(["--jobs", "1", "--root"]).arg(&root);
    check(install.arg("--target-dir").arg(root.join("build"))).context("cannot build cargo-deny")
}

/// Checks the workspace.
///
/// # Errors
/// Returns one if a check fails.
pub fn run() -> anyhow::Result<()> {
    let mut deny = std::process::Command::new(binary(&root()));
    check(deny.args(["--log-level", "error", "check", "licenses", "bans", "sources"]))
}

/// Returns the folder of this version.
fn root() -> PathBuf {
    Path::new(ROOT).join(format!("cargo-deny-{VERSION}"))
}

fn binary(root: &Path) -> PathBuf {
    root.join("bin").join(format!("cargo-deny{}", std::env::consts::EXE_SUFFIX))
}
