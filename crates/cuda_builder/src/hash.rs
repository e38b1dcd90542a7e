//! The hash of everything that a PTX is built from.
//!
//! It covers the crates' sources and manifests, the pinned compiler, and this builder's own files and flags.
//! It does not depend on the system's path separators or line endings.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::compile;
use crate::error::Error;

/// The files of this crate that determine the PTX.
const BUILDER: [(&str, &str); 2] = [
    ("cuda_builder/compile.rs", include_str!("compile.rs")),
    ("cuda_builder/finish.rs", include_str!("finish.rs")),
];

/// The sources of a device crate, by names that do not depend on the checkout's location.
pub(crate) struct Sources {
    files: BTreeMap<String, PathBuf>,
}

impl Sources {
    /// Finds the sources of the device crate and of the crates in the same repository that it depends on.
    pub(crate) fn find(crate_dir: &Path, dependencies: &[PathBuf]) -> Result<Self, Error> {
        let mut sources = Self { files: BTreeMap::new() };
        sources.add_crate(crate_dir, &["Cargo.toml", "Cargo.lock", "rust-toolchain.toml"])?;
        for dependency in dependencies {
            sources.add_crate(dependency, &["Cargo.toml"])?;
        }
        Ok(sources)
    }

    fn add_crate(&mut self, directory: &Path, manifests: &[&str]) -> Result<(), Error> {
        let directory = directory.canonicalize().map_err(Error::file("find", directory))?;
        let name = directory.file_name().unwrap_or_default().to_string_lossy().into_owned();
        for manifest in manifests {
            self.files.insert(format!("{name}/{manifest}"), directory.join(manifest));
        }
        self.add_directory(&format!("{name}/src"), &directory.join("src"))
    }

    fn add_directory(&mut self, name: &str, directory: &Path) -> Result<(), Error> {
        for entry in fs::read_dir(directory).map_err(Error::file("list", directory))? {
            let path = entry.map_err(Error::file("list", directory))?.path();
            let file_name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let name = format!("{name}/{file_name}");
            if file_name.starts_with('.') {
                // Skip hidden files, such as editors' swap files.
                continue;
            } else if path.is_dir() {
                self.add_directory(&name, &path)?;
            } else {
                self.files.insert(name, path);
            }
        }
        Ok(())
    }

    /// Returns whether a file is one of the sources.
    pub(crate) fn contain(&self, path: &Path) -> bool {
        let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        self.files.values().any(|file| *file == path)
    }

    /// Returns the SHA-256 of all sources as they are now and of the builder's files and flags,
    /// in hexadecimal.
    pub(crate) fn hash(&self, target: &str) -> Result<String, Error> {
        let mut contents = BTreeMap::new();
        for (name, path) in &self.files {
            contents.insert(name.as_str(), fs::read(path).map_err(Error::file("read", path))?);
        }
        for (name, text) in BUILDER {
            contents.insert(name, text.into());
        }
        contents.insert("flags", compile::flags(target).join("\n").into_bytes());
        Ok(digest(&contents))
    }
}

/// Returns the hash of named contents.
///
/// It includes the lengths of names and contents, so that different sets of files cannot look alike.
fn digest(contents: &BTreeMap<&str, Vec<u8>>) -> String {
    let mut hasher = Sha256::new();
    for (name, bytes) in contents {
        let unix: Vec<u8> =
            bytes.split(|&byte| byte == b'\n').map(without_return).collect::<Vec<_>>().join(&b'\n');
        hasher.update(format!("{} {name} {}\n", name.len(), unix.len()));
        hasher.update(unix);
    }
    hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Returns a line without the carriage return of a Windows checkout.
fn without_return(line: &[u8]) -> &[u8] {
    line.strip_suffix(b"\r").unwrap_or(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns a directory that contains a crate `device` with the given files.
    fn crate_with(files: &[(&str, &str)]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = directory.path().join("device").join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        directory
    }

    const MANIFESTS: [(&str, &str); 3] =
        [("Cargo.toml", "[package]\n"), ("Cargo.lock", "\n"), ("rust-toolchain.toml", "\n")];

    fn hash_with(files: &[(&str, &str)]) -> String {
        let directory = crate_with(&[&MANIFESTS, files].concat());
        Sources::find(&directory.path().join("device"), &[]).unwrap().hash("sm_90a").unwrap()
    }

    #[test]
    fn the_hash_does_not_depend_on_location_or_line_endings() {
        let unix = hash_with(&[("src/lib.rs", "fn a() {}\nfn b() {}\n"), ("src/ptx/mod.rs", "")]);
        let windows = hash_with(&[("src/lib.rs", "fn a() {}\r\nfn b() {}\r\n"), ("src/ptx/mod.rs", "")]);
        assert_eq!(unix, windows);
        assert_eq!(unix.len(), 64);
    }

    #[test]
    fn every_change_changes_the_hash() {
        let original = hash_with(&[("src/lib.rs", "a"), ("src/b.rs", "b")]);
        assert_ne!(original, hash_with(&[("src/lib.rs", "a"), ("src/b.rs", "c")]), "content");
        assert_ne!(original, hash_with(&[("src/lib.rs", "a"), ("src/c.rs", "b")]), "name");
        assert_ne!(original, hash_with(&[("src/lib.rs", "ab"), ("src/b.rs", "")]), "boundary");
        assert_ne!(original, hash_with(&[("src/lib.rs", "a")]), "removal");
    }

    #[test]
    fn hidden_files_and_files_outside_the_sources_do_not_count() {
        let files = [("src/lib.rs", "a"), ("src/.lib.rs.swp", "x"), ("README.md", "x"), ("target/x", "x")];
        assert_eq!(hash_with(&files), hash_with(&files[..1]));
    }

    #[test]
    fn a_missing_manifest_is_an_error_that_names_it() {
        let directory = crate_with(&[("Cargo.toml", ""), ("src/lib.rs", "")]);
        let sources = Sources::find(&directory.path().join("device"), &[]).unwrap();
        let message = sources.hash("sm_90a").unwrap_err().to_string();
        assert!(message.contains("Cargo.lock"), "{message}");
    }
}
