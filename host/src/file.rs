//! Packed weights on disk: a `.safetensors` file with three tensors and six lines of metadata.
//!
//! | tensor | type | shape |
//! |---|---|---|
//! | `codes` | U8 | `[⌈n/64⌉, ⌈k/64⌉, 2048]` |
//! | `pairs` | U8 | `[⌈n/64⌉, groups, 128]` |
//! | `channel_scales` | F32 | `[n]` |
//!
//! The metadata are `format` (`liquidgemm`), `format_version` (`2`), `n`, `k`, `group` (a number or `channel`)
//! and `checksum`: XXH3-64, in 16 lower-case hexadecimal digits, of the five other values, each with a line
//! break behind it, then the tensors in the order above. A damaged code is still a valid code, so only the
//! checksum can tell.
//!
//! Version 1 had `bricks`, U8 `[⌈n/64⌉, ⌈k/64⌉, 2176]`, in the place of codes and pairs: each brick's 2,048 bytes of codes with its 128 bytes
//! of pairs behind them, which repeat within a group. Its checksum covers the bricks, then the scales. Such files are still read.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

use liquidgemm_format::brick::{self, BRICK_BYTES, CODE_BYTES, PAIR_BYTES};
use safetensors::tensor::{Dtype, TensorView};
use safetensors::{SafeTensors, serialize_to_file};
use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::Value;
use xxhash_rust::xxh3::Xxh3;

use crate::packed::PackedSizes;
use crate::{Error, FileError, Group, PackedWeights};

const FORMAT: &str = "liquidgemm";
const VERSION: &str = "2";
/// The version whose bricks hold their pairs.
const VERSION_1: &str = "1";
/// Bytes of the header's length, with which a safetensors file begins.
const HEADER_LENGTH_BYTES: usize = 8;
/// The longest header that is read: ours have some 500 bytes.
const MOST_HEADER_BYTES: u64 = 64 * 1024;

impl PackedWeights {
    /// Writes a `.safetensors` file, the same bytes for the same weights. The file appears under its name whole or not at all: it is written
    /// beside it under another name, flushed to the disk, then renamed. A file that was there is replaced, and the new one is as accessible;
    /// where a symbolic link leads to it, the link stays.
    ///
    /// # Errors
    /// [`Error::File`] if there is something else than a file, or the system refuses any of this; nothing is left behind then.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<(), Error> {
        let path = path.as_ref();
        self.write(path).map_err(|problem| Error::File { path: path.to_owned(), problem })
    }

    /// Reads a file that [`save`](Self::save) wrote, and checks all of it: form, version, types and shapes, the checksum, finite scales,
    /// and the invariant of every pair.
    ///
    /// # Errors
    /// [`Error::File`] with what was wrong.
    pub fn load(path: impl AsRef<Path>) -> Result<Self, Error> {
        let path = path.as_ref();
        Self::read(path).map_err(|problem| Error::File { path: path.to_owned(), problem })
    }

    /// Like [`load`](Self::load), from the bytes of such a file.
    ///
    /// # Errors
    /// What was wrong with them.
    pub fn from_file_bytes(bytes: &[u8]) -> Result<Self, FileError> {
        check_header(bytes)?;
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(FileError::Safetensors)?;
        let empty = HashMap::new();
        let metadata = Metadata(header.metadata().as_ref().unwrap_or(&empty));

        let format = metadata.get("format");
        if format != Some(FORMAT) {
            return Err(FileError::WrongFormat { found: format.map(str::to_owned), expected: FORMAT });
        }
        let version = metadata.get("format_version");
        let version = version.filter(|version| [VERSION, VERSION_1].contains(version)).ok_or_else(|| {
            FileError::WrongVersion { found: version.map(str::to_owned), expected: VERSION }
        })?;
        let n = metadata.parse("n", "a number of channels")?;
        let k = metadata.parse("k", "a number of elements a channel")?;
        let group: Group = metadata.parse("group", "a positive multiple of 64, or \"channel\"")?;
        let sizes = PackedSizes::new(n, k, group).map_err(invalid)?;
        let found: String = metadata.parse("checksum", "16 hexadecimal digits")?;

        let file = SafeTensors::deserialize(bytes).map_err(FileError::Safetensors)?;
        let known: &[&str] = if version == VERSION_1 {
            &["bricks", "channel_scales"]
        } else {
            &["codes", "pairs", "channel_scales"]
        };
        if let Some(name) = file.names().into_iter().find(|name| !known.contains(name)) {
            return Err(FileError::UnknownTensor { name: name.to_owned() });
        }
        let scales = tensor(&file, "channel_scales", Dtype::F32, &[n])?;
        let check = |tensors: &[&[u8]]| {
            let computed = checksum(version, n, k, group, tensors);
            if found == computed {
                Ok(())
            } else {
                Err(FileError::ChecksumMismatch { found: found.clone(), computed })
            }
        };
        let (strips, k_blocks) = (brick::strips(n), brick::k_blocks(k));
        let (codes, pairs) = if version == VERSION_1 {
            let bricks = tensor(&file, "bricks", Dtype::U8, &[strips, k_blocks, BRICK_BYTES])?;
            check(&[bricks, scales])?;
            split_bricks(bricks, k_blocks, group, sizes)?
        } else {
            let codes = tensor(&file, "codes", Dtype::U8, &[strips, k_blocks, CODE_BYTES])?;
            let pairs = tensor(&file, "pairs", Dtype::U8, &[strips, sizes.groups, PAIR_BYTES])?;
            check(&[codes, pairs, scales])?;
            (copied(codes)?, copied(pairs)?)
        };
        let (scales, _) = scales.as_chunks::<4>();
        let mut channel_scales = reserved(strips * brick::BRICK_CHANNELS)?;
        channel_scales.extend(scales.iter().map(|&bytes| f32::from_le_bytes(bytes)));
        Self::from_parts(codes, pairs, channel_scales, n, k, group).map_err(invalid)
    }

    fn read(path: &Path) -> Result<Self, FileError> {
        // Asked before opening, which waits where nobody writes to a FIFO.
        let metadata =
            regular_file(path)?.ok_or_else(|| system("open the file")(io::ErrorKind::NotFound.into()))?;
        let mut file = File::open(path).map_err(system("open the file"))?;
        // Another kind of file may be large, and need not be read to see that.
        let mut bytes = Vec::new();
        (&mut file).take(HEADER_LENGTH_BYTES as u64).read_to_end(&mut bytes).map_err(system("read"))?;
        check_header_length(&bytes)?;
        let length = usize::try_from(metadata.len()).unwrap_or(usize::MAX);
        bytes.try_reserve_exact(length).map_err(|_| FileError::OutOfMemory { bytes: length })?;
        file.take(metadata.len()).read_to_end(&mut bytes).map_err(system("read"))?;
        Self::from_file_bytes(&bytes)
    }

    fn write(&self, path: &Path) -> Result<(), FileError> {
        let scales: Vec<u8> = self.channel_scales().iter().flat_map(|scale| scale.to_le_bytes()).collect();
        let metadata = HashMap::from(
            [
                ("format", FORMAT.to_owned()),
                ("format_version", VERSION.to_owned()),
                ("n", self.n().to_string()),
                ("k", self.k().to_string()),
                ("group", self.group().to_string()),
                (
                    "checksum",
                    checksum(
                        VERSION,
                        self.n(),
                        self.k(),
                        self.group(),
                        &[self.codes(), self.pairs(), &scales],
                    ),
                ),
            ]
            .map(|(key, value)| (key.to_owned(), value)),
        );
        let view = |dtype, shape: &[usize], data| {
            TensorView::new(dtype, shape.to_vec(), data).map_err(FileError::Safetensors)
        };
        let tensors = [
            ("codes", view(Dtype::U8, &[self.strips(), self.k_blocks(), CODE_BYTES], self.codes())?),
            ("pairs", view(Dtype::U8, &[self.strips(), self.groups(), PAIR_BYTES], self.pairs())?),
            ("channel_scales", view(Dtype::F32, &[self.n()], &scales)?),
        ];

        let path = &followed(path)?;
        let replaced = regular_file(path)?;
        let directory = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let mut builder = tempfile::Builder::new();
        builder.prefix(".liquidgemm-");
        // Temporary files are their owner's alone by default; a model is as readable as any new file.
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let mut temporary =
            builder.tempfile_in(directory).map_err(system("create a temporary file beside it"))?;
        serialize_to_file(tensors, Some(metadata), temporary.path()).map_err(|error| match error {
            safetensors::SafeTensorError::IoError(error) => system("write")(error),
            other => FileError::Safetensors(other),
        })?;
        sort_header(temporary.as_file_mut())?;
        if let Some(replaced) = replaced {
            let action = "give the new file the permissions of the old one";
            temporary.as_file().set_permissions(replaced.permissions()).map_err(system(action))?;
        }
        temporary.as_file().sync_all().map_err(system("flush to the disk"))?;
        temporary.persist(path).map_err(|error| system("rename into place")(error.error))?;
        // The new name itself lies in the directory. Not every system lets a directory be opened.
        #[cfg(unix)]
        File::open(directory)
            .and_then(|directory| directory.sync_all())
            .map_err(system("flush the directory"))?;
        Ok(())
    }
}

/// The metadata of a file, which may say anything.
struct Metadata<'a>(&'a HashMap<String, String>);

impl<'a> Metadata<'a> {
    fn get(&self, key: &str) -> Option<&'a str> {
        self.0.get(key).map(String::as_str)
    }

    /// A value written as the program writes it: no sign or zero in front of a number.
    fn parse<T: std::str::FromStr + fmt::Display>(
        &self,
        key: &'static str,
        expected: &'static str,
    ) -> Result<T, FileError> {
        let found = self.get(key);
        let parsed = found.and_then(|text| text.parse().ok().filter(|value: &T| value.to_string() == text));
        parsed.ok_or_else(|| FileError::BadMetadata { key, found: found.map(str::to_owned), expected })
    }
}

/// The bytes of a tensor that must have this type and shape.
fn tensor<'a>(
    file: &SafeTensors<'a>,
    name: &'static str,
    dtype: Dtype,
    shape: &[usize],
) -> Result<&'a [u8], FileError> {
    let found = file.tensor(name).map_err(FileError::Safetensors)?;
    if found.dtype() != dtype || found.shape() != shape {
        return Err(FileError::WrongTensor {
            name,
            found: format!("{:?} {:?}", found.dtype(), found.shape()),
            expected: format!("{dtype:?} {shape:?}"),
        });
    }
    Ok(found.data())
}

/// The codes and the pairs of version 1's bricks.
fn split_bricks(
    bricks: &[u8],
    k_blocks: usize,
    group: Group,
    sizes: PackedSizes,
) -> Result<(Vec<u8>, Vec<u8>), FileError> {
    let (mut codes, mut pairs) = (reserved(sizes.codes)?, reserved(sizes.pairs)?);
    for (index, brick) in bricks.chunks_exact(BRICK_BYTES).enumerate() {
        let (strip, k_block) = (index / k_blocks, index % k_blocks);
        let (brick_codes, brick_pairs) = brick.split_at(CODE_BYTES);
        codes.extend_from_slice(brick_codes);
        if k_block % sizes.group_blocks == 0 {
            pairs.extend_from_slice(brick_pairs);
            continue;
        }
        let of_group = &pairs[pairs.len() - PAIR_BYTES..];
        let differs = |&row: &usize| {
            let pair = brick::pair_offset(row)..brick::pair_offset(row) + 2;
            brick_pairs[pair.clone()] != of_group[pair]
        };
        if let Some(row) = (0..brick::BRICK_CHANNELS).find(differs) {
            let channel = strip * brick::BRICK_CHANNELS + row;
            return Err(invalid(Error::PairsDiffer { channel, k_block, group }));
        }
    }
    Ok((codes, pairs))
}

/// An empty vector with room, or the error that there is none.
fn reserved<T>(count: usize) -> Result<Vec<T>, FileError> {
    let mut vector = Vec::new();
    let bytes = count.saturating_mul(size_of::<T>());
    vector.try_reserve_exact(count).map_err(|_| FileError::OutOfMemory { bytes })?;
    Ok(vector)
}

fn copied(bytes: &[u8]) -> Result<Vec<u8>, FileError> {
    let mut copy = reserved(bytes.len())?;
    copy.extend_from_slice(bytes);
    Ok(copy)
}

/// The length that a file begins with must be that of a header of ours.
fn check_header_length(bytes: &[u8]) -> Result<(), FileError> {
    let length = bytes.first_chunk().map_or(0, |&length| u64::from_le_bytes(length));
    if length > MOST_HEADER_BYTES {
        return Err(FileError::HeaderTooLong { bytes: length, limit: MOST_HEADER_BYTES });
    }
    Ok(())
}

/// Refuses headers that are too long for a file of ours, and those that say something twice.
fn check_header(bytes: &[u8]) -> Result<(), FileError> {
    check_header_length(bytes)?;
    let Some((&length, rest)) = bytes.split_first_chunk() else { return Ok(()) };
    // What else may be wrong with it, the crate that reads it says.
    let Some(header) = rest.get(..u64::from_le_bytes(length) as usize) else { return Ok(()) };
    match serde_json::from_slice::<UniqueKeys>(header) {
        Err(error) if error.is_data() => Err(FileError::BadHeader { reason: error.to_string() }),
        _ => Ok(()),
    }
}

/// JSON whose objects have no key twice. Of two the last would be taken.
struct UniqueKeys;

impl<'de> Deserialize<'de> for UniqueKeys {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Self)
    }
}

impl<'de> Visitor<'de> for UniqueKeys {
    type Value = Self;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self, A::Error> {
        let mut keys = HashSet::new();
        while let Some(key) = map.next_key::<String>()? {
            map.next_value::<Self>()?;
            if let Some(key) = keys.replace(key) {
                return Err(A::Error::custom(format!("key {key:?} appears twice")));
            }
        }
        Ok(Self)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self, A::Error> {
        while seq.next_element::<Self>()?.is_some() {}
        Ok(Self)
    }

    fn visit_str<E>(self, _: &str) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_bool<E>(self, _: bool) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_unit<E>(self) -> Result<Self, E> {
        Ok(self)
    }
}

/// Sorts the header of a safetensors file, whose metadata the crate writes in any order: the same weights are to give the same bytes.
fn sort_header(file: &mut File) -> Result<(), FileError> {
    let mut length = [0; HEADER_LENGTH_BYTES];
    file.seek(SeekFrom::Start(0)).map_err(system("read back"))?;
    file.read_exact(&mut length).map_err(system("read back"))?;
    let mut header = vec![0; u64::from_le_bytes(length) as usize];
    file.read_exact(&mut header).map_err(system("read back"))?;
    let bad = |error: serde_json::Error| FileError::BadHeader { reason: error.to_string() };
    let sorted: BTreeMap<String, BTreeMap<String, Value>> = serde_json::from_slice(&header).map_err(bad)?;
    let mut text = serde_json::to_vec(&sorted).map_err(bad)?;
    // The same text in another order, and the spaces that were behind it.
    text.resize(header.len(), b' ');
    file.seek(SeekFrom::Start(HEADER_LENGTH_BYTES as u64)).map_err(system("write"))?;
    file.write_all(&text).map_err(system("write"))
}

/// What is known of the file at a path, links followed; `None` if there is nothing.
fn regular_file(path: &Path) -> Result<Option<fs::Metadata>, FileError> {
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

/// Where a path leads to over symbolic links, also if nothing is there yet.
fn followed(path: &Path) -> Result<PathBuf, FileError> {
    /// As many as Linux follows.
    const MOST_LINKS: usize = 40;
    let mut path = path.to_owned();
    for _ in 0..MOST_LINKS {
        let Ok(target) = fs::read_link(&path) else { return Ok(path) };
        path = path.parent().unwrap_or(Path::new("")).join(target);
    }
    Err(FileError::TooManyLinks { limit: MOST_LINKS })
}

/// See the top of this file.
fn checksum(version: &str, n: usize, k: usize, group: Group, tensors: &[&[u8]]) -> String {
    let mut hash = Xxh3::new();
    hash.update(format!("{FORMAT}\n{version}\n{n}\n{k}\n{group}\n").as_bytes());
    for tensor in tensors {
        hash.update(tensor);
    }
    format!("{:016x}", hash.digest())
}

fn system(action: &'static str) -> impl Fn(io::Error) -> FileError {
    move |error| FileError::Io { action, error }
}

fn invalid(error: Error) -> FileError {
    FileError::Invalid(Box::new(error))
}
