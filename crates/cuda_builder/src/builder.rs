//! The builder itself: from a crate's directory to one PTX file for each of its kernels.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::compile::compile;
use crate::error::Error;
use crate::finish::{Kernel, finish};
use crate::hash::Sources;
use crate::toolchain::Toolchain;

/// What precedes the sources' hash on the header line of a PTX file.
pub const SOURCES_KEY: &str = "// sources: ";

/// A compute architecture.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum NvvmArch {
    /// Hopper, without what only Hopper has.
    Compute90,
    /// Hopper with wgmma and `setmaxnreg`.
    #[default]
    Compute90a,
}

impl NvvmArch {
    /// PTX's name for it.
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
    /// The name by which the kernel is launched.
    pub entry: String,
    /// The PTX, header included.
    pub text: String,
    /// Where it was written, if the builder was told to.
    pub path: Option<PathBuf>,
}

/// Builds a device crate to PTX.
#[derive(Clone, Debug)]
pub struct CudaBuilder {
    crate_dir: PathBuf,
    dependencies: Vec<PathBuf>,
    arch: NvvmArch,
    target_dir: Option<PathBuf>,
    copy_to: Option<PathBuf>,
    deny_warnings: bool,
}

impl CudaBuilder {
    /// A builder for the device crate in `crate_dir`, which holds a `rust-toolchain.toml`.
    pub fn new(crate_dir: impl Into<PathBuf>) -> Self {
        Self {
            crate_dir: crate_dir.into(),
            dependencies: Vec::new(),
            arch: NvvmArch::default(),
            target_dir: None,
            copy_to: None,
            deny_warnings: false,
        }
    }

    /// Names a crate of the same repository that the device crate depends on; its sources count in the hash.
    pub fn path_dependency(mut self, crate_dir: impl Into<PathBuf>) -> Self {
        self.dependencies.push(crate_dir.into());
        self
    }

    /// Sets the architecture; [`NvvmArch::Compute90a`] if never called.
    pub fn arch(mut self, arch: NvvmArch) -> Self {
        self.arch = arch;
        self
    }

    /// Sets the directory for build products and a fetched toolchain; the crate's `target` if never called.
    pub fn target_dir(mut self, directory: impl Into<PathBuf>) -> Self {
        self.target_dir = Some(directory.into());
        self
    }

    /// Writes the kernels to `directory`, each as `ENTRY.ptx`, and removes other `.ptx` files there.
    pub fn copy_to(mut self, directory: impl Into<PathBuf>) -> Self {
        self.copy_to = Some(directory.into());
        self
    }

    /// Makes compiler warnings about the device code an error.
    pub fn deny_warnings(mut self, deny: bool) -> Self {
        self.deny_warnings = deny;
        self
    }

    /// The hash of the sources as they are now: what the header of a PTX that was built from them says.
    pub fn sources_hash(&self) -> Result<String, Error> {
        Sources::find(&self.crate_dir, &self.dependencies)?.hash(self.arch.target())
    }

    /// Builds and returns the kernels, sorted by name.
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
        if let Some(directory) = &self.copy_to {
            write_all(&mut files, directory)?;
        }
        Ok(files)
    }
}

/// The lines that say what a PTX file is.
fn header(compiler: &str, arch: NvvmArch, hash: &str) -> String {
    format!("// compiler: {compiler}\n// target: {}\n{SOURCES_KEY}{hash}\n\n", arch.target())
}

/// Makes `directory` hold exactly these kernels. Files that are right already stay untouched, so that nothing
/// that embeds them is rebuilt.
fn write_all(files: &mut [PtxFile], directory: &Path) -> Result<(), Error> {
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

/// Writes a file so that a reader sees the old text or the new one, never a part.
fn write_atomically(path: &Path, directory: &Path, text: &str) -> Result<(), Error> {
    let mut options = tempfile::Builder::new();
    #[cfg(unix)]
    {
        // A temporary file is private unless told otherwise; the umask still applies.
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
