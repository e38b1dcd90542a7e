//! Fetches Debian's packages of the compiler and unpacks them without root.
//!
//! Debian builds recent compilers for its browsers (`rustc-web`) and ships them with their library source.
//! The packages work from any directory, so a machine with apt needs neither rustup nor root.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::{Error, output_of};

/// The packages that have the compiler's version. `MINOR` stands for its first two numbers.
const COMPILER_PACKAGES: [&str; 4] =
    ["rustc-web", "libstd-rust-web-MINOR", "libstd-rust-web-dev", "rust-web-src"];

/// Dependencies of these packages that a machine that builds Rust may lack.
///
/// Each entry has the start of a shared library's name and the package that contains it.
const LIBRARY_PACKAGES: [(&str, &str); 16] = [
    ("libLLVM.so.22", "libllvm22"),
    ("libLLVM.so.21", "libllvm21"),
    ("libz3.so.4", "libz3-4"),
    ("libedit.so.2", "libedit2"),
    ("libxml2.so.2", "libxml2"),
    ("libffi.so.8", "libffi8"),
    ("libbsd.so.0", "libbsd0"),
    ("libmd.so.0", "libmd0"),
    ("libicuuc.so.72", "libicu72"),
    ("libicudata.so.72", "libicu72"),
    ("liblzma.so.5", "liblzma5"),
    ("libtinfo.so.6", "libtinfo6"),
    ("libzstd.so.1", "libzstd1"),
    ("libz.so.1", "zlib1g"),
    ("libstdc++.so.6", "libstdc++6"),
    ("libgcc_s.so.1", "libgcc-s1"),
];

/// Returns the directory below `target_dir` with the unpacked compiler `channel`,
/// and fetches it if it is missing.
pub(crate) fn unpacked(channel: &str, target_dir: &Path) -> Result<PathBuf, Error> {
    let parent = target_dir.join("device-toolchain");
    let root = parent.join(format!("debian-{channel}"));
    if root.is_dir() {
        return Ok(root);
    }
    fs::create_dir_all(&parent).map_err(Error::file("create", &parent))?;

    // Unpack to a temporary directory and rename it when complete,
    // so that an interrupted run leaves no partial toolchain.
    let scratch = tempfile::Builder::new().prefix("unpacking-").tempdir_in(&parent);
    let scratch = scratch.map_err(Error::file("create a directory in", &parent))?;
    let content = scratch.path().join("content");
    fs::create_dir(&content).map_err(Error::file("create", &content))?;

    let system = Apt { options: Vec::new(), scratch: scratch.path() };
    if let Err(error) = system.unpack_compiler(channel, &content) {
        eprintln!("The system's package lists are not usable ({error}); fetching fresh ones");
        Apt::with_private_lists(scratch.path())?.unpack_compiler(channel, &content)?;
    }

    match fs::rename(&content, &root) {
        // Another build has finished first.
        Err(_) if root.is_dir() => Ok(root),
        Err(source) => Err(Error::File { action: "move the toolchain to", path: root, source }),
        Ok(()) => Ok(root),
    }
}

/// Returns the directories with an unpacked toolchain's shared libraries.
pub(crate) fn library_dirs(root: &Path) -> Vec<PathBuf> {
    let multiarch = format!("{}-linux-gnu", std::env::consts::ARCH);
    ["usr/lib", "lib"].map(|directory| root.join(directory).join(&multiarch)).to_vec()
}

/// apt with the system's package lists or with private ones.
struct Apt<'a> {
    options: Vec<String>,
    scratch: &'a Path,
}

impl<'a> Apt<'a> {
    /// Fetches private package lists into `scratch`. Needs no root.
    fn with_private_lists(scratch: &'a Path) -> Result<Self, Error> {
        let (lists, cache) = (scratch.join("lists"), scratch.join("cache"));
        for directory in [lists.join("partial"), cache.join("archives/partial")] {
            fs::create_dir_all(&directory).map_err(Error::file("create", &directory))?;
        }
        let options = vec![
            format!("-oDir::State::Lists={}", lists.display()),
            format!("-oDir::Cache={}", cache.display()),
        ];
        let apt = Self { options, scratch };
        output_of(apt.command("apt-get").arg("update"))?;
        Ok(apt)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        // Run as the current user: apt's sandbox user may not write to our directories.
        command.args(["-q", "-oAPT::Sandbox::User=root"]).args(&self.options).env("LC_ALL", "C");
        command
    }

    /// Fetches and unpacks the compiler, its library source, and the shared libraries that are missing.
    fn unpack_compiler(&self, channel: &str, content: &Path) -> Result<(), Error> {
        let table = output_of(self.command("apt-cache").args(["madison", COMPILER_PACKAGES[0]]))?;
        let version = version_in(&table, channel)
            .ok_or_else(|| Error::Packages(format!("apt has no {} {channel}", COMPILER_PACKAGES[0])))?;
        let minor = channel.rsplit_once('.').map_or(channel, |(minor, _)| minor);

        let count = COMPILER_PACKAGES.len();
        for (index, package) in COMPILER_PACKAGES.iter().enumerate() {
            let package = format!("{}={version}", package.replace("MINOR", minor));
            self.unpack_package(&package, &format!("{} of {count}", index + 1), content)?;
        }
        // A missing library hides its own dependencies, so look again after each package.
        let mut fetched = BTreeSet::new();
        while let Some(library) = missing_libraries(content)?.pop_first() {
            let package = LIBRARY_PACKAGES.iter().find(|(start, _)| library.starts_with(start));
            let Some((_, package)) = package else {
                return Err(Error::Packages(format!(
                    "the compiler needs {library}, and no known package contains it"
                )));
            };
            if !fetched.insert(*package) {
                return Err(Error::Packages(format!("{package} does not contain {library}")));
            }
            self.unpack_package(package, &format!("for {library}"), content)?;
        }
        Ok(())
    }

    /// Fetches one package and unpacks it. apt checks the package against its signed lists.
    fn unpack_package(&self, package: &str, note: &str, content: &Path) -> Result<(), Error> {
        let uris = output_of(self.command("apt-get").args(["download", "--print-uris", package]))?;
        let megabytes = bytes_in(&uris).unwrap_or(0) as f64 / 1e6;
        eprintln!("Fetching {package}, {megabytes:.1} MB ({note})");
        let archives = tempfile::tempdir_in(self.scratch);
        let archives = archives.map_err(Error::file("create a directory in", self.scratch))?;
        output_of(self.command("apt-get").args(["download", package]).current_dir(archives.path()))?;
        let entries = fs::read_dir(archives.path()).map_err(Error::file("list", archives.path()))?;
        for entry in entries {
            let archive = entry.map_err(Error::file("list", archives.path()))?.path();
            output_of(Command::new("dpkg").arg("-x").arg(&archive).arg(content))?;
        }
        Ok(())
    }
}

/// Returns the shared libraries that the unpacked compiler needs and the loader does not find.
fn missing_libraries(content: &Path) -> Result<BTreeSet<String>, Error> {
    let directories = library_dirs(content);
    let mut command = Command::new("ldd");
    command.arg(content.join("usr/bin/rustc")).env("LC_ALL", "C");
    if let Ok(path) = std::env::join_paths(&directories) {
        command.env("LD_LIBRARY_PATH", path);
    }
    Ok(not_found_in(&output_of(&mut command)?))
}

/// Returns the names that ldd could not resolve.
fn not_found_in(ldd: &str) -> BTreeSet<String> {
    let names = ldd.lines().filter_map(|line| line.trim().strip_suffix("=> not found"));
    names.map(|name| name.trim().to_owned()).collect()
}

/// Returns the newest version of compiler `channel` in the output of `apt-cache madison`,
/// which lists the newest first.
fn version_in(table: &str, channel: &str) -> Option<String> {
    table.lines().find_map(|line| {
        let version = line.split('|').nth(1)?.trim();
        let rest = version.strip_prefix(channel)?;
        (rest.is_empty() || rest.starts_with(['+', '-', '~'])).then(|| version.to_owned())
    })
}

/// Returns the size in the output of `apt-get download --print-uris`:
/// an address, a file name, the size, and a checksum.
fn bytes_in(uris: &str) -> Option<u64> {
    uris.lines().last()?.split_whitespace().nth(2)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_of_exactly_the_channel_is_chosen() {
        let table = " rustc-web | 1.97.0+dfsg1-1 | http://deb.debian.org bookworm/main amd64 Packages\n \
                     rustc-web | 1.96.0+dfsg1-1~deb12u2 | http://deb.debian.org bookworm/main amd64 Packages\n";
        assert_eq!(version_in(table, "1.96.0").as_deref(), Some("1.96.0+dfsg1-1~deb12u2"));
        assert_eq!(version_in(table, "1.9"), None);
        assert_eq!(version_in("", "1.96.0"), None);
    }

    #[test]
    fn only_unresolved_libraries_count_as_missing() {
        let ldd = "\tlinux-vdso.so.1 (0x00007f00)\n\tlibz3.so.4 => not found\n\
                   \tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f01)\n\tlibedit.so.2 => not found\n";
        assert_eq!(not_found_in(ldd).into_iter().collect::<Vec<_>>(), ["libedit.so.2", "libz3.so.4"]);
    }

    #[test]
    fn the_size_is_the_third_column() {
        let uris = "'http://deb.debian.org/z.deb' z_4.8_amd64.deb 7216172 SHA256:6221ca\n";
        assert_eq!(bytes_in(uris), Some(7_216_172));
    }
}
