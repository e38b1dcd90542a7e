//! Files read with care: regular files only, bounded sizes, positioned reads, and no links out of a folder.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::error::{Problem, Result, io_error};

/// The longest JSON file that is read. The index of a model with 100,000 tensors has about 10 MB.
const MOST_JSON_BYTES: u64 = 256 << 20;

/// A regular file that is open for positioned reads from any thread.
#[derive(Debug)]
pub(crate) struct ReadFile {
    path: PathBuf,
    file: File,
    length: u64,
}

impl ReadFile {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        // Check the type before opening: opening a FIFO blocks until another process writes to it.
        let metadata = fs::metadata(path).map_err(io_error(path, "open the file"))?;
        if !metadata.is_file() {
            let found = if metadata.is_dir() { "a folder" } else { "a device, FIFO or socket" };
            return Err(Problem::NotAFile { found }.at(path));
        }
        let file = File::open(path).map_err(io_error(path, "open the file"))?;
        let length = file.metadata().map_err(io_error(path, "open the file"))?.len();
        Ok(Self { path: path.to_owned(), file, length })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn length(&self) -> u64 {
        self.length
    }

    /// Fills `buffer` with the bytes from `offset` on.
    pub(crate) fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        read_exact_at(&self.file, offset, buffer).map_err(io_error(&self.path, "read"))
    }

    /// Reads `length` bytes from `offset` on into memory of their own.
    pub(crate) fn read_vec(&self, offset: u64, length: u64) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let reserved = usize::try_from(length).ok().and_then(|length| bytes.try_reserve_exact(length).ok());
        if reserved.is_none() {
            return Err(io_error(&self.path, "reserve memory for a tensor")(
                io::ErrorKind::OutOfMemory.into(),
            ));
        }
        bytes.resize(length as usize, 0);
        self.read_at(offset, &mut bytes)?;
        Ok(bytes)
    }

    /// Returns what identifies this state of the file: its length and the time of its last change.
    pub(crate) fn fingerprint(&self) -> String {
        let modified = self.file.metadata().and_then(|metadata| metadata.modified()).ok();
        let name = self.path.file_name().unwrap_or_default().to_string_lossy();
        format!("{name} {} {modified:?}", self.length)
    }

    /// Returns a reader of the file from its beginning.
    pub(crate) fn reader(&self) -> Sequential<'_> {
        Sequential { file: self, position: 0 }
    }
}

#[cfg(unix)]
fn read_exact_at(file: &File, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, buffer, offset)
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut offset: u64, mut buffer: &mut [u8]) -> io::Result<()> {
    while !buffer.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, buffer, offset)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => {
                buffer = &mut buffer[count..];
                offset += count as u64;
            }
        }
    }
    Ok(())
}

/// Reads a file from its beginning, through positioned reads.
pub(crate) struct Sequential<'a> {
    file: &'a ReadFile,
    position: u64,
}

impl Read for Sequential<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.file.length.saturating_sub(self.position);
        let count = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
        read_exact_at(&self.file.file, self.position, &mut buffer[..count])?;
        self.position += count as u64;
        Ok(count)
    }
}

/// Reads a file of JSON whose top level is an object.
pub(crate) fn read_json(path: &Path) -> Result<Map<String, Value>> {
    let file = ReadFile::open(path)?;
    if file.length() > MOST_JSON_BYTES {
        let (bytes, limit) = (file.length(), MOST_JSON_BYTES);
        return Err(Problem::TooLong { what: "a JSON file", bytes, limit }.at(path));
    }
    let mut bytes = vec![0; file.length() as usize];
    file.read_at(0, &mut bytes)?;
    parse_json(&bytes).map_err(|problem| problem.at(path))
}

/// Parses JSON whose top level is an object.
pub(crate) fn parse_json(bytes: &[u8]) -> Result<Map<String, Value>, Problem> {
    serde_json::from_slice(bytes)
        .map_err(|error| Problem::Json { reason: format!("not a JSON object: {error}") })
}

/// A folder whose files must not lead out of it.
///
/// The cache of the Hugging Face hub is the one exception: its folders `snapshots/REVISION` consist of links
/// into `blobs` beside `snapshots`.
#[derive(Debug)]
pub(crate) struct Folder {
    path: PathBuf,
    /// The folders that files may lie in, without links.
    allowed: Vec<PathBuf>,
}

impl Folder {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let real = fs::canonicalize(path).map_err(io_error(path, "open the folder"))?;
        let mut allowed = vec![real.clone()];
        if let Some(snapshots) = real.parent().filter(|parent| parent.ends_with("snapshots")) {
            allowed.extend(snapshots.parent().map(|repository| repository.join("blobs")));
        }
        Ok(Self { path: path.to_owned(), allowed })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the path of a file in the folder. Fails if the file is missing or a link leads outside.
    pub(crate) fn file(&self, relative: &Path) -> Result<PathBuf> {
        let path = self.path.join(relative);
        let real = fs::canonicalize(&path).map_err(io_error(&path, "open the file"))?;
        if !self.allowed.iter().any(|folder| real.starts_with(folder)) {
            return Err(Problem::LeadsOutside { target: real }.at(&path));
        }
        Ok(path)
    }

    /// Returns whether something with this name is in the folder.
    pub(crate) fn has(&self, name: &str) -> bool {
        fs::symlink_metadata(self.path.join(name)).is_ok()
    }

    /// Returns the names in a folder below this one, sorted.
    pub(crate) fn names(&self, relative: &Path) -> Result<Vec<String>> {
        let path = self.path.join(relative);
        let entries = fs::read_dir(&path).map_err(io_error(&path, "list the folder"))?;
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.map_err(io_error(&path, "list the folder"))?;
            names.push(entry.file_name().into_string().map_err(|name| {
                Problem::UnsafeName { name: name.to_string_lossy().into_owned() }.at(&path)
            })?);
        }
        names.sort();
        Ok(names)
    }
}

/// Returns whether a name is one plain component of a path: no separator, no `..`, no drive.
pub(crate) fn is_plain_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    let first = components.next();
    matches!(first, Some(std::path::Component::Normal(component)) if component == name)
        && components.next().is_none()
        && !name.contains(['/', '\\', ':', '\0'])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_single_components_are_plain_names() {
        for name in ["a", "model-00001-of-00002.safetensors", "..a", "a..b"] {
            assert!(is_plain_name(name), "{name}");
        }
        for name in ["", ".", "..", "/a", "a/", "a/b", "../a", "a/..", "a\\b", "C:a", "a\0"] {
            assert!(!is_plain_name(name), "{name:?}");
        }
    }
}
