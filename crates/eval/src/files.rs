//! Files that appear whole or not at all.

use std::io;
use std::path::Path;

use crate::Error;

/// Lets `write` fill a temporary file beside `path`, and renames it into place.
///
/// # Errors
/// [`Error::Io`]; an existing file is then as it was.
pub(crate) fn write_with(path: &Path, write: impl FnOnce(&Path) -> io::Result<()>) -> Result<(), Error> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let attempt = || {
        let mut builder = tempfile::Builder::new();
        builder.prefix(".liquidgemm-");
        // By default only the owner can read a temporary file.
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let temporary = builder.tempfile_in(folder)?;
        write(temporary.path())?;
        temporary.as_file().sync_all()?;
        temporary.persist(path)?;
        io::Result::Ok(())
    };
    attempt().map_err(Error::write(path))
}

/// Writes bytes to `path`.
///
/// # Errors
/// If the file cannot be written. Then no file, or the old one, has the name.
pub fn write(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    write_with(path, |temporary| std::fs::write(temporary, bytes))
}
