//! Finds the compiler for device code.
//!
//! `core` is compiled along with the kernels, which needs the library source of exactly the same compiler.
//! This file looks in three places, and first where it costs the user least: rustup's toolchain,
//! Debian's installed packages, and Debian's packages unpacked below the target directory (`debian.rs`).

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::debian;
use crate::error::{Error, output_of};

/// A compiler, its library source and the cargo that drives it.
#[derive(Clone, Debug)]
pub struct Toolchain {
    /// The compiler.
    pub rustc: PathBuf,
    /// The cargo that runs it. Never rustup's proxy, which would follow the device crate's toolchain file.
    pub cargo: PathBuf,
    /// Directories with the compiler's shared libraries that the system's loader does not search.
    pub library_dirs: Vec<PathBuf>,
    /// The compiler's output for `--version`.
    pub version: String,
    /// The place where it was found, for messages.
    pub origin: &'static str,
}

impl Toolchain {
    /// Finds the toolchain that `crate_dir`'s `rust-toolchain.toml` pins.
    ///
    /// Fetches Debian's packages into `target_dir` if no installed toolchain is usable.
    ///
    /// # Errors
    /// [`Error::NoToolchain`] with the reason for each place,
    /// or an error if the toolchain file is not usable.
    pub fn find(crate_dir: &Path, target_dir: &Path) -> Result<Self, Error> {
        let channel = pinned_channel(crate_dir)?;
        let mut tried = Vec::new();
        match rustup_toolchain(&channel).and_then(|root| {
            let cargo = root.join("bin/cargo");
            let cargo = if cargo.is_file() { cargo } else { host_cargo(crate_dir) };
            Self::at(&root, &channel, cargo, Vec::new(), "rustup's toolchain")
        }) {
            Ok(toolchain) => return Ok(toolchain),
            Err(reason) => tried.push(format!("rustup: {reason}")),
        }
        let cargo = host_cargo(crate_dir);
        match Self::at(Path::new("/usr"), &channel, cargo.clone(), Vec::new(), "Debian's packages") {
            Ok(toolchain) => return Ok(toolchain),
            Err(reason) => tried.push(format!("installed packages: {reason}")),
        }
        match debian::unpacked(&channel, target_dir).map_err(|error| error.to_string()).and_then(|root| {
            let libraries = debian::library_dirs(&root);
            Self::at(&root.join("usr"), &channel, cargo, libraries, "Debian's packages, unpacked")
        }) {
            Ok(toolchain) => return Ok(toolchain),
            Err(reason) => tried.push(format!("Debian's packages, unpacked: {reason}")),
        }
        Err(Error::NoToolchain { channel, tried })
    }

    /// Returns the toolchain below `root`, or the reason why it is not usable.
    fn at(
        root: &Path,
        channel: &str,
        cargo: PathBuf,
        library_dirs: Vec<PathBuf>,
        origin: &'static str,
    ) -> Result<Self, String> {
        let rustc = root.join("bin/rustc");
        if !rustc.is_file() {
            return Err(format!("no {}", rustc.display()));
        }
        let mut toolchain = Self { rustc, cargo, library_dirs, version: String::new(), origin };
        let mut command = Command::new(&toolchain.rustc);
        toolchain.set_library_path(&mut command);
        let version = output_of(command.arg("--version")).map_err(|error| error.to_string())?;
        toolchain.version = version.trim().to_owned();
        if toolchain.version.split(' ').nth(1) != Some(channel) {
            return Err(format!("{} is {}, not {channel}", toolchain.rustc.display(), toolchain.version));
        }
        let library = root.join("lib/rustlib/src/rust/library");
        if !library.join("core/src/lib.rs").is_file() {
            return Err(format!("{} lacks its library source, {}", toolchain.version, library.display()));
        }
        Ok(toolchain)
    }

    /// Sets a command's library search path so that the compiler finds its shared libraries.
    pub(crate) fn set_library_path(&self, command: &mut Command) {
        if self.library_dirs.is_empty() {
            return;
        }
        let inherited = env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
        let directories = self.library_dirs.iter().cloned().chain(env::split_paths(&inherited));
        let directories = directories.filter(|directory| !directory.as_os_str().is_empty());
        if let Ok(joined) = env::join_paths(directories) {
            command.env("LD_LIBRARY_PATH", joined);
        }
    }
}

/// Returns the version that a crate's toolchain file pins.
///
/// # Errors
/// [`Error::File`] if there is no readable file, and [`Error::NoPinnedChannel`] if it pins no version.
pub fn pinned_channel(crate_dir: &Path) -> Result<String, Error> {
    let path = crate_dir.join("rust-toolchain.toml");
    let text = fs::read_to_string(&path).map_err(Error::file("read", &path))?;
    channel_in(&text).ok_or(Error::NoPinnedChannel { path })
}

/// Returns the `channel` in a toolchain file's text.
fn channel_in(text: &str) -> Option<String> {
    text.lines().find_map(|line| {
        let (key, value) = line.split_once('=')?;
        let value = value.split('#').next().unwrap_or_default().trim();
        let value = value.strip_prefix('"')?.strip_suffix('"')?;
        (key.trim() == "channel" && !value.is_empty()).then(|| value.to_owned())
    })
}

/// Returns the directory of rustup's toolchain `channel` if it is installed. Never downloads anything.
fn rustup_toolchain(channel: &str) -> Result<PathBuf, String> {
    let mut command = Command::new("rustup");
    command.args(["toolchain", "list", "-v"]).env("RUSTUP_AUTO_INSTALL", "0").env_remove("RUSTUP_TOOLCHAIN");
    let list = output_of(&mut command).map_err(|error| error.to_string())?;
    listed_path(&list, channel).ok_or_else(|| format!("toolchain {channel} is not installed"))
}

/// Finds a toolchain's path in the output of `rustup toolchain list -v`:
/// a name, notes in parentheses, and a path.
fn listed_path(list: &str, channel: &str) -> Option<PathBuf> {
    list.lines().find_map(|line| {
        let (name, mut rest) = line.split_once(char::is_whitespace)?;
        if name != channel && !name.strip_prefix(channel).is_some_and(|host| host.starts_with('-')) {
            return None;
        }
        rest = rest.trim();
        while rest.starts_with('(') {
            rest = rest.split_once(')')?.1.trim_start();
        }
        (!rest.is_empty()).then(|| PathBuf::from(rest))
    })
}

/// Returns the cargo of the host's toolchain.
fn host_cargo(crate_dir: &Path) -> PathBuf {
    // cargo sets this variable for the programs that it runs. It names the real program, not rustup's proxy.
    if let Some(cargo) = env::var_os("CARGO") {
        return cargo.into();
    }
    // Ask beside the device crate: inside it, rustup would follow the device crate's toolchain file.
    let mut command = Command::new("rustup");
    command.args(["which", "cargo"]).env("RUSTUP_AUTO_INSTALL", "0");
    if let Some(parent) = crate_dir.parent().filter(|parent| parent.is_dir()) {
        command.current_dir(parent);
    }
    match output_of(&mut command) {
        Ok(path) => PathBuf::from(path.trim()),
        Err(_) => PathBuf::from("cargo"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pinned_channel_is_read_with_comments_around_it() {
        let text = "# why = \"x\"\n[toolchain]\nchannel = \"1.96.0\" # exactly\nprofile = \"minimal\"\n";
        assert_eq!(channel_in(text).as_deref(), Some("1.96.0"));
        assert_eq!(channel_in("[toolchain]\nprofile = \"minimal\"\n"), None);
    }

    #[test]
    fn a_listed_toolchain_is_found_behind_any_notes_and_its_path_may_hold_spaces() {
        let list = "stable-x86_64-unknown-linux-gnu (active, default) /home/a b/.rustup/toolchains/stable\n\
                    1.96.0-x86_64-unknown-linux-gnu (active) (default)\t/home/a b/.rustup/toolchains/1.96.0\n";
        assert_eq!(listed_path(list, "1.96.0"), Some("/home/a b/.rustup/toolchains/1.96.0".into()));
        assert_eq!(listed_path(list, "stable"), Some("/home/a b/.rustup/toolchains/stable".into()));
    }

    #[test]
    fn a_longer_version_is_another_toolchain() {
        assert_eq!(listed_path("1.96.01-x86_64-unknown-linux-gnu /somewhere\n", "1.96.0"), None);
        assert_eq!(listed_path("no installed toolchains\n", "1.96.0"), None);
    }
}
