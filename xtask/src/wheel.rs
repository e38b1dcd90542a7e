//! `cargo xtask wheel`: builds the Python wheel in `target/wheel`, and tests it in a fresh virtual environment.
//!
//! The C library is linked by Zig's C compiler, which has the symbols of every glibc version, for the glibc of
//! `manylinux_2_28`. The Rust code is compiled as usual. Zig, hatchling and their kin come from PyPI at pinned versions.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};

use crate::steps::{cargo, check};

/// The folder of the wheel and of the tools.
const FOLDER: &str = "target/wheel";
/// The oldest glibc that the wheel runs with.
const GLIBC: (u32, u32) = (2, 28);
/// What builds and checks the wheel.
const TOOLS: [&str; 4] = ["build==1.6.1", "cargo-zigbuild==0.24.1", "hatchling==1.33.0", "twine==7.0.0"];
/// The C compiler that links the library.
const ZIG: &str = "ziglang==0.17.1";
/// What the tests need.
const TESTS: [&str; 2] = ["numpy", "pytest"];

/// Build the Python wheel in target/wheel
#[derive(clap::Args)]
pub struct Arguments {
    /// Build with the profile of the tests, which `cargo test` has compiled already
    #[arg(long)]
    pub dev: bool,
    /// Install the wheel into a fresh virtual environment and test it, on the CPU
    #[arg(long)]
    pub test: bool,
}

/// Builds the wheel.
///
/// # Errors
/// Returns one if a step fails, or if the library needs a newer glibc.
pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let folder = std::env::current_dir()?.join(FOLDER);
    let tools = environment(&folder.join("tools"), &[&TOOLS[..], &[ZIG]].concat())?;
    let library = library(&folder, &tools, arguments.dev)?;
    let newest = newest_glibc(&library)?;
    ensure!(
        newest <= GLIBC,
        "the library needs glibc {}.{}; the limit is {}.{}",
        newest.0,
        newest.1,
        GLIBC.0,
        GLIBC.1
    );
    let wheel = wheel(&folder, &tools, &library)?;
    check(Command::new(tools.join("twine")).args(["check", "--strict"]).arg(&wheel))?;
    println!("{} (glibc {}.{})", wheel.display(), newest.0, newest.1);
    if arguments.test { test(&folder, &wheel) } else { Ok(()) }
}

/// Makes a virtual environment with these packages unless it is there, and returns the folder of its programs.
fn environment(folder: &Path, packages: &[&str]) -> anyhow::Result<PathBuf> {
    let programs = folder.join("bin");
    let wanted = packages.join("\n");
    let stamp = folder.join("packages.txt");
    if fs::read_to_string(&stamp).is_ok_and(|installed| installed == wanted) {
        return Ok(programs);
    }
    check(Command::new("python3").args(["-m", "venv", "--clear"]).arg(folder))
        .context("cannot make a virtual environment (Debian: apt install python3-venv)")?;
    let mut install = Command::new(programs.join("pip"));
    install.args(["install", "--quiet", "--disable-pip-version-check"]).args(packages);
    check(&mut install)?;
    fs::write(stamp, wanted)?;
    Ok(programs)
}

/// Builds the shared library, linked for an old glibc, and returns its path.
fn library(folder: &Path, tools: &Path, dev: bool) -> anyhow::Result<PathBuf> {
    let linker = folder.join("cc");
    let target = format!("{}-linux-gnu.{}.{}", std::env::consts::ARCH, GLIBC.0, GLIBC.1);
    let zigbuild = tools.join("cargo-zigbuild");
    fs::write(
        &linker,
        format!("#!/bin/sh\nexec '{}' zig cc -- -g -target {target} \"$@\"\n", zigbuild.display()),
    )?;
    make_executable(&linker)?;
    let mut build = cargo(["rustc", "--package", "liquidgemm-c", "--lib", "--crate-type", "cdylib"]);
    build.arg("--profile").arg(if dev { "dev" } else { "release" });
    // Only the last crate is compiled anew; the others are those of other builds with this profile.
    build.arg("--").arg("-C").arg(format!("linker={}", linker.display()));
    build.args(["-C", "linker-features=-lld", "-C", "strip=debuginfo"]);
    // Zig's programs find one another through the path.
    let path = std::env::var_os("PATH").unwrap_or_default();
    let path = std::env::join_paths(std::iter::once(tools.to_owned()).chain(std::env::split_paths(&path)))?;
    check(build.env("PATH", path))?;
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| "target".into(), PathBuf::from);
    let built = target.join(if dev { "debug" } else { "release" }).join("libliquidgemm_c.so");
    let library = folder.join("libliquidgemm_c.so");
    fs::copy(&built, &library).with_context(|| format!("cannot copy {}", built.display()))?;
    Ok(library)
}

#[cfg(unix)]
fn make_executable(path: &Path) -> anyhow::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    Ok(fs::set_permissions(path, fs::Permissions::from_mode(0o755))?)
}

#[cfg(not(unix))]
fn make_executable(_: &Path) -> anyhow::Result<()> {
    anyhow::bail!("the wheel is for Linux; build it there")
}

/// Returns the newest glibc version whose symbols a library needs.
fn newest_glibc(library: &Path) -> anyhow::Result<(u32, u32)> {
    let output = Command::new("objdump").arg("-T").arg(library).output().context("cannot run objdump")?;
    ensure!(output.status.success(), "objdump cannot read {}", library.display());
    newest_of(&String::from_utf8_lossy(&output.stdout)).context("the library needs no glibc symbol")
}

/// Returns the newest version in a list of symbols.
fn newest_of(symbols: &str) -> Option<(u32, u32)> {
    let versions = symbols.split("GLIBC_").skip(1).filter_map(|text| {
        let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let mut numbers = text[..end].split('.').map(|number| number.parse().ok());
        Some((numbers.next()??, numbers.next()??))
    });
    versions.max()
}

/// Builds the wheel, and returns its path.
fn wheel(folder: &Path, tools: &Path, library: &Path) -> anyhow::Result<PathBuf> {
    let wheels = folder.join("dist");
    let _ = fs::remove_dir_all(&wheels);
    let mut build = Command::new(tools.join("python"));
    build.args(["-m", "build", "--wheel", "--no-isolation", "--outdir"]).arg(&wheels).arg("python");
    build.env("LIQUIDGEMM_BUILT_LIBRARY", library);
    build.env("LIQUIDGEMM_PLATFORM", format!("manylinux_{}_{}_{}", GLIBC.0, GLIBC.1, std::env::consts::ARCH));
    check(&mut build)?;
    let mut found =
        fs::read_dir(&wheels)?.map(|entry| Ok(entry?.path())).collect::<anyhow::Result<Vec<_>>>()?;
    ensure!(found.len() == 1, "{} has {} files instead of one wheel", wheels.display(), found.len());
    let wheel = found.remove(0);
    let expected = format!("liquidgemm-{}-py3-none-", env!("CARGO_PKG_VERSION"));
    let name = wheel.file_name().unwrap_or_default().to_string_lossy();
    ensure!(
        name.starts_with(&expected),
        "{name} does not begin with {expected}; python/liquidgemm/_version.py must have the workspace's version"
    );
    Ok(wheel)
}

/// Installs the wheel into a fresh virtual environment, and runs the package's tests there.
fn test(folder: &Path, wheel: &Path) -> anyhow::Result<()> {
    let fresh = folder.join("fresh");
    let _ = fs::remove_dir_all(&fresh);
    let programs = environment(&fresh, &[&TESTS[..], &[&wheel.to_string_lossy()]].concat())?;
    let mut pytest = Command::new(programs.join("python"));
    // From another folder, so that the installed package is imported, and not its sources.
    pytest
        .args(["-m", "pytest", "--quiet", "-p", "no:cacheprovider"])
        .arg(std::env::current_dir()?.join("python/tests"));
    check(pytest.current_dir(&fresh))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_version_is_by_number_and_not_by_text() {
        let symbols = " memcpy GLIBC_2.14\n dlsym (GLIBC_2.2.5)\n stat GLIBC_2.9\n weak GLIBC_PRIVATE\n";
        assert_eq!(newest_of(symbols), Some((2, 14)));
        assert_eq!(newest_of("nothing"), None);
    }
}
