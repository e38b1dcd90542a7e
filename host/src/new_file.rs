//! Files that appear under their name complete or not at all.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use crate::{Error, FileError};

/// What the names of unfinished files begin with.
const PREFIX: &str = ".liquidgemm-";

/// A file that is written under another name in the same folder, and renamed when it is complete.
///
/// An existing file is replaced, and the new one takes over its permissions.
/// A symbolic link is followed and stays in place. The unfinished file is deleted when this value is dropped.
#[derive(Debug)]
pub struct NewFile {
    /// The path as it was given, for errors.
    path: PathBuf,
    /// The path behind all links.
    target: PathBuf,
    replaced: Option<fs::Permissions>,
    temporary: NamedTempFile,
}

impl NewFile {
    /// Starts a file that will be at `path`. Its folder must exist.
    ///
    /// # Errors
    /// [`Error::File`] with the reason:
    /// - [`FileError::EmptyPath`], [`FileError::NotAFile`] or [`FileError::TooManyLinks`] for a bad path.
    /// - [`FileError::Io`] if the operating system refuses an operation.
    pub fn create(path: impl AsRef<Path>) -> Result<Self, Error> {
        Self::create_with_prefix(path, PREFIX)
    }

    /// Like [`create`](Self::create), with a name that begins with `prefix` until the file is complete.
    ///
    /// # Errors
    /// As [`create`](Self::create).
    pub fn create_with_prefix(path: impl AsRef<Path>, prefix: &str) -> Result<Self, Error> {
        let path = path.as_ref();
        Self::start(path, prefix).map_err(|problem| Error::File { path: path.to_owned(), problem })
    }

    fn start(path: &Path, prefix: &str) -> Result<Self, FileError> {
        let target = followed(path)?;
        let replaced = regular_file(&target)?.map(|metadata| metadata.permissions());
        let mut builder = tempfile::Builder::new();
        builder.prefix(prefix);
        // By default only the owner can access a temporary file. This one gets the permissions of a new file.
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let temporary =
            builder.tempfile_in(folder(&target)).map_err(system("create a temporary file beside it"))?;
        Ok(Self { path: path.to_owned(), target, replaced, temporary })
    }

    /// Writes a whole file.
    ///
    /// # Errors
    /// As [`create`](Self::create) and [`finish`](Self::finish).
    pub fn with_contents(path: impl AsRef<Path>, contents: &[u8]) -> Result<(), Error> {
        let mut file = Self::create(path)?;
        file.write(contents)?;
        file.finish()
    }

    /// Writes bytes at the position of [`file`](Self::file).
    ///
    /// # Errors
    /// [`Error::File`] if the operating system refuses it.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let written = self.temporary.as_file_mut().write_all(bytes).map_err(system("write"));
        written.map_err(|problem| Error::File { path: self.path.clone(), problem })
    }

    /// Returns the unfinished file.
    pub fn file(&mut self) -> &mut File {
        self.temporary.as_file_mut()
    }

    /// Returns the path of the unfinished file.
    pub fn unfinished_path(&self) -> &Path {
        self.temporary.path()
    }

    /// Flushes the file to the disk and gives it its name.
    ///
    /// # Errors
    /// [`Error::File`] if the operating system refuses an operation. What was at the path is then as it was.
    pub fn finish(self) -> Result<(), Error> {
        let path = self.path.clone();
        self.rename().map_err(|problem| Error::File { path, problem })
    }

    fn rename(self) -> Result<(), FileError> {
        if let Some(permissions) = self.replaced {
            let action = "give the new file the permissions of the old one";
            self.temporary.as_file().set_permissions(permissions).map_err(system(action))?;
        }
        self.temporary.as_file().sync_all().map_err(system("flush to the disk"))?;
        self.temporary.persist(&self.target).map_err(|error| system("rename into place")(error.error))?;
        // The rename is an entry of the folder, so flush that too. Not every system can open a folder.
        #[cfg(unix)]
        File::open(folder(&self.target))
            .and_then(|folder| folder.sync_all())
            .map_err(system("flush the directory"))?;
        Ok(())
    }
}

/// Returns the folder that a file is in.
fn folder(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Returns the metadata of the file at `path`, following links, or `None` if nothing is there.
pub(crate) fn regular_file(path: &Path) -> Result<Option<fs::Metadata>, FileError> {
    if path.as_os_str().is_empty() {
        return Err(FileError::EmptyPath);
    }
    match fs::metadata(path) {
        Ok(metadata) if metadata.is_file() => Ok(Some(metadata)),
        Ok(metadata) => Err(FileError::NotAFile {
            found: if metadata.is_dir() { "a directory" } else { "a device, FIFO or socket" },
        }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(system("look at the path")(error)),
    }
}

/// Follows symbolic links, also to a target that does not exist yet.
fn followed(path: &Path) -> Result<PathBuf, FileError> {
    /// The limit of Linux.
    const MOST_LINKS: usize = 40;
    let mut path = path.to_owned();
    for _ in 0..MOST_LINKS {
        let Ok(target) = fs::read_link(&path) else { return Ok(path) };
        path = path.parent().unwrap_or(Path::new("")).join(target);
    }
    Err(FileError::TooManyLinks { limit: MOST_LINKS })
}

pub(crate) fn system(action: &'static str) -> impl Fn(io::Error) -> FileError {
    move |error| FileError::Io { action, error }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_has_its_old_contents_until_the_new_ones_are_complete() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        fs::write(&path, "old").unwrap();
        let mut file = NewFile::create(&path).unwrap();
        file.write(b"ne").unwrap();
        drop(file);
        assert_eq!(fs::read(&path).unwrap(), b"old");
        NewFile::with_contents(&path, b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "an unfinished file was left behind");
    }

    #[test]
    fn folders_and_missing_folders_are_refused_with_the_path() {
        let folder = tempfile::tempdir().unwrap();
        for path in [folder.path().to_owned(), folder.path().join("missing/file")] {
            let error = NewFile::create(&path).unwrap_err();
            assert!(error.to_string().contains(&path.display().to_string()), "{error}");
        }
    }
}
