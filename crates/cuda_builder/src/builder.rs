//! The builder: takes a device crate's directory and writes one PTX file for each kernel.
//!
//! The steps are in `toolchain.rs`, `compile.rs`, `finish.rs` and `hash.rs`.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::compile::compile;
use crate::error::Error;
use crate::finish::{Kernel, finish};
use crate::hash::Sources;
use crate::toolchain::Toolchain;

/// The start of the header line with the sources' hash in a PTX file.
pub const SOURCES_KEY: &str = "// sources: ";

/// A compute architecture.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum NvvmArch {
    /// Hopper, without the features that no other architecture has.
    Compute90,
    /// Hopper with wgmma and `setmaxnreg`.
    #[default]
    Compute90a,
}

impl NvvmArch {
    /// Returns PTX's name of the architecture.
    pub fn target(self) -> &'static str {
        match self {
            Self::Compute90 => "sm_90",
            Self::Compute90a => "sm_90a",
        }
    }
}

/// One kernel as PTX.
#[derive(Clone, Debug)]
pub struct PtxFile {
    /// The kernel's name, by which it is launched.
    pub entry: String,
    /// The PTX with its header.
    pub text: String,
    /// The file's path, if the builder was told to write it.
    pub path: Option<PathBuf>,
}

/// Builds a device crate to PTX.
#[derive(Clone, Debug)]
pub struct CudaBuilder {
    crate_dir: PathBuf,
    dependencies: Vec<PathBuf>,
    arch: NvvmArch,
    target_dir: Option<PathBuf>,
    /// Prefixes of kernel names, and the folder for kernels with such names. The first match counts.
    copies: Vec<(Vec<String>, PathBuf)>,
    deny_warnings: bool,
}

impl CudaBuilder {
    /// Returns a builder for the device crate in `crate_dir`, which must have a `rust-toolchain.toml`.
    pub fn new(crate_dir: impl Into<PathBuf>) -> Self {
        Self {
            crate_dir: crate_dir.into(),
            dependencies: Vec::new(),
            arch: NvvmArch::default(),
            target_dir: None,
            copies: Vec::new(),
            deny_warnings: false,
        }
    }

    /// Names a crate of the same repository that the device crate depends on.
    /// Its sources are part of the hash.
    pub fn path_dependency(mut self, crate_dir: impl Into<PathBuf>) -> Self {
        self.dependencies.push(crate_dir.into());
        self
    }

    /// Sets the architecture. The default is [`NvvmArch::Compute90a`].
    pub fn arch(mut self, arch: NvvmArch) -> Self {
        self.arch = arch;
        self
    }

    /// Sets the directory for build products and a fetched toolchain. The default is the crate's `target`.
    pub fn target_dir(mut self, directory: impl Into<PathBuf>) -> Self {
        self.target_dir = Some(directory.into());
        self
    }

    /// Writes each kernel to `directory` as `ENTRY.ptx`, and removes other `.ptx` files there.
    ///
    /// Leaves out kernels that an earlier call of this or [`copy_matching_to`](Self::copy_matching_to) takes.
    pub fn copy_to(self, directory: impl Into<PathBuf>) -> Self {
        self.copy_matching_to(&[""], directory)
    }

    /// Writes the kernels whose names start with one of the prefixes, as [`copy_to`](Self::copy_to) does.
    pub fn copy_matching_to(mut self, prefixes: &[&str], directory: impl Into<PathBuf>) -> Self {
        let prefixes = prefixes.iter().map(|prefix| (*prefix).to_owned()).collect();
        self.copies.push((prefixes, directory.into()));
        self
    }

    /// Turns compiler warnings about the device code into an error.
    pub fn deny_warnings(mut self, deny: bool) -> Self {
        self.deny_warnings = deny;
        self
    }

    /// Returns the hash of the sources as they are now.
    /// The header of a PTX that is built from them holds the same.
    ///
    /// # Errors
    /// [`Error::File`] if a source cannot be read.
    pub fn sources_hash(&self) -> Result<String, Error> {
        Sources::find(&self.crate_dir, &self.dependencies)?.hash(self.arch.target())
    }

    /// Builds the kernels and returns them, sorted by name.
    ///
    /// # Errors
    /// [`Error`] says which step failed.
    pub fn build(&self) -> Result<Vec<PtxFile>, Error> {
        let crate_dir = self.crate_dir.canonicalize().map_err(Error::file("find", &self.crate_dir))?;
        let target_dir = self.target_dir.clone().unwrap_or_else(|| crate_dir.join("target"));
        let target_dir = std::path::absolute(&target_dir).map_err(Error::file("find", &target_dir))?;
        let toolchain = Toolchain::find(&crate_dir, &target_dir)?;

        let hash = self.sources_hash()?;
        let assembly = compile(&toolchain, &crate_dir, self.arch.target(), &target_dir.join("device"))?;
        let sources = Sources::find(&crate_dir, &self.dependencies)?;
        if sources.hash(self.arch.target())? != hash {
            return Err(Error::SourcesChanged);
        }
        if let Some(path) = assembly.sources.into_iter().find(|path| !sources.contain(path)) {
            return Err(Error::UnhashedSource { path });
        }
        if self.deny_warnings && assembly.warnings > 0 {
            return Err(Error::Warnings { crate_dir, count: assembly.warnings });
        }

        let header = header(&toolchain.version, self.arch, &hash);
        let kernels = finish(&assembly.text, self.arch.target())?.into_iter();
        let mut files: Vec<PtxFile> = kernels
            .map(|Kernel { entry, text }| PtxFile { entry, text: format!("{header}{text}"), path: None })
            .collect();
        self.write(&mut files)?;
        Ok(files)
    }

    /// Writes each kernel to the first folder that takes its name.
    fn write(&self, files: &mut [PtxFile]) -> Result<(), Error> {
        let place = |entry: &str| {
            let takes =
                |(prefixes, _): &(Vec<String>, _)| prefixes.iter().any(|prefix| entry.starts_with(prefix));
            self.copies.iter().position(takes)
        };
        for (index, (_, directory)) in self.copies.iter().enumerate() {
            write_all(files.iter_mut().filter(|file| place(&file.entry) == Some(index)), directory)?;
        }
        Ok(())
    }
}

/// Returns the header of a PTX file: compiler, target, and hash of the sources.
fn header(compiler: &str, arch: NvvmArch, hash: &str) -> String {
    format!("// compiler: {compiler}\n// target: {}\n{SOURCES_KEY}{hash}\n\n", arch.target())
}

/// Makes these kernels the only `.ptx` files in `directory`.
///
/// Leaves files with the right contents untouched, so that crates that embed them are not rebuilt.
fn write_all<'a>(files: impl IntoIterator<Item = &'a mut PtxFile>, directory: &Path) -> Result<(), Error> {
    fs::create_dir_all(directory).map_err(Error::file("create", directory))?;
    let mut current = BTreeSet::new();
    for file in files {
        let path = directory.join(format!("{}.ptx", file.entry));
        if fs::read_to_string(&path).ok().as_deref() != Some(&file.text) {
            write_atomically(&path, directory, &file.text)?;
        }
        current.insert(path.clone());
        file.path = Some(path);
    }
    for entry in fs::read_dir(directory).map_err(Error::file("list", directory))? {
        let path = entry.map_err(Error::file("list", directory))?.path();
        if path.extension().is_some_and(|extension| extension == "ptx") && !current.contains(&path) {
            fs::remove_file(&path).map_err(Error::file("remove", &path))?;
        }
    }
    Ok(())
}

/// Writes a file atomically: a reader sees the old text or the new one, never a part.
fn write_atomically(path: &Path, directory: &Path, text: &str) -> Result<(), Error> {
    let mut options = tempfile::Builder::new();
    #[cfg(unix)]
    {
        // Temporary files are private by default. The umask still applies.
        use std::os::unix::fs::PermissionsExt;
        options.permissions(fs::Permissions::from_mode(0o666));
    }
    let mut temporary = options.tempfile_in(directory).map_err(Error::file("create a file in", directory))?;
    temporary.write_all(text.as_bytes()).map_err(Error::file("write", path))?;
    temporary.persist(path).map_err(|error| error.error).map_err(Error::file("write", path))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kernel(entry: &str, text: &str) -> PtxFile {
        PtxFile { entry: entry.to_owned(), text: text.to_owned(), path: None }
    }

    #[test]
    fn the_header_states_compiler_target_and_sources() {
        let header = header("rustc 1.96.0 (abc)", NvvmArch::Compute90a, "0123");
        assert_eq!(header, "// compiler: rustc 1.96.0 (abc)\n// target: sm_90a\n// sources: 0123\n\n");
    }

    #[test]
    fn the_directory_holds_exactly_the_kernels_and_other_kinds_of_files() {
        let directory = tempfile::tempdir().unwrap();
        for name in ["stale.ptx", "README.md"] {
            fs::write(directory.path().join(name), "x").unwrap();
        }
        write_all(&mut [kernel("a", "A"), kernel("b", "B")], directory.path()).unwrap();
        let mut names: Vec<_> =
            fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["README.md", "a.ptx", "b.ptx"]);
        assert_eq!(fs::read_to_string(directory.path().join("a.ptx")).unwrap(), "A");
    }

    #[test]
    fn a_kernel_goes_to_the_first_directory_that_takes_its_name() {
        let root = tempfile::tempdir().unwrap();
        let [probes, others] = ["probes", "others"].map(|name| root.path().join(name));
        let builder =
            CudaBuilder::new("crate").copy_matching_to(&["probe_", "test_"], &probes).copy_to(&others);
        let mut files = [kernel("gemm", "G"), kernel("probe_stream", "P"), kernel("test_x", "T")];
        builder.write(&mut files).unwrap();
        let paths = files.map(|file| file.path.unwrap());
        assert_eq!(
            paths,
            [others.join("gemm.ptx"), probes.join("probe_stream.ptx"), probes.join("test_x.ptx")]
        );
        assert_eq!(fs::read_dir(&others).unwrap().count(), 1);
    }

    #[test]
    fn an_unchanged_kernel_keeps_its_file() {
        let directory = tempfile::tempdir().unwrap();
        let mut files = [kernel("a", "A")];
        write_all(&mut files, directory.path()).unwrap();
        let path = files[0].path.clone().unwrap();
        let written = fs::metadata(&path).unwrap().modified().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(20));
        write_all(&mut files, directory.path()).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().modified().unwrap(), written);
    }

    #[test]
    fn a_source_hash_of_a_crate_that_is_not_there_names_the_crate() {
        let message = CudaBuilder::new("no/such/crate").sources_hash().unwrap_err().to_string();
        assert!(message.contains("no/such/crate"), "{message}");
    }
}
