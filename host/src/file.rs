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

use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::path::Path;

use liquidgemm_format::brick::{self, CODE_BYTES, PAIR_BYTES};
use memmap2::Mmap;
use safetensors::tensor::{Dtype, TensorView};
use safetensors::{SafeTensors, serialize_to_file};
use xxhash_rust::xxh3::Xxh3;

use crate::packed::PackedSizes;
use crate::{Error, FileError, Group, PackedWeights};

const FORMAT: &str = "liquidgemm";
const VERSION: &str = "2";
/// The version whose bricks hold their pairs.
const VERSION_1: &str = "1";
/// Bytes of such a brick.
const BRICK_1_BYTES: usize = CODE_BYTES + PAIR_BYTES;

impl PackedWeights {
    /// Writes a `.safetensors` file. The file appears under its name whole or not at all: it is written beside
    /// it under another name, flushed to the disk, then renamed, replacing a file that was there.
    ///
    /// # Errors
    /// [`Error::File`] if the system refuses any of this; nothing is left behind then.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<(), Error> {
        let path = path.as_ref();
        self.write(path).map_err(|problem| Error::File { path: path.to_owned(), problem })
    }

    /// Reads a file that [`save`](Self::save) wrote, through a memory map, and checks all of it: form, version,
    /// types and shapes, the checksum, finite scales, and the invariant of every pair.
    ///
    /// Nobody may change the file meanwhile; a process that truncates a mapped file can end its reader.
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
            let bricks = tensor(&file, "bricks", Dtype::U8, &[strips, k_blocks, BRICK_1_BYTES])?;
            check(&[bricks, scales])?;
            split_bricks(bricks, k_blocks, group, sizes).map_err(invalid)?
        } else {
            let codes = tensor(&file, "codes", Dtype::U8, &[strips, k_blocks, CODE_BYTES])?;
            let pairs = tensor(&file, "pairs", Dtype::U8, &[strips, sizes.groups, PAIR_BYTES])?;
            check(&[codes, pairs, scales])?;
            (codes.to_vec(), pairs.to_vec())
        };
        let (scales, _) = scales.as_chunks::<4>();
        let scales = scales.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect();
        Self::from_parts(codes, pairs, scales, n, k, group).map_err(invalid)
    }

    fn read(path: &Path) -> Result<Self, FileError> {
        let file = File::open(path).map_err(io("open the file"))?;
        // SAFETY: the map is read-only, private to this function and gone when it returns; as documented at
        // `load`, nobody may change the file during the call.
        let bytes = unsafe { Mmap::map(&file) }.map_err(io("map the file into memory"))?;
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
            builder.tempfile_in(directory).map_err(io("create a temporary file beside it"))?;
        serialize_to_file(tensors, Some(metadata), temporary.path()).map_err(|error| match error {
            safetensors::SafeTensorError::IoError(error) => io("write")(error),
            other => FileError::Safetensors(other),
        })?;
        temporary.flush().map_err(io("write"))?;
        temporary.as_file().sync_all().map_err(io("flush to the disk"))?;
        temporary.persist(path).map_err(|error| io("rename into place")(error.error))?;
        // The new name itself lies in the directory. Not every system lets a directory be opened.
        #[cfg(unix)]
        File::open(directory)
            .and_then(|directory| directory.sync_all())
            .map_err(io("flush the directory"))?;
        Ok(())
    }
}

/// The metadata of a file, which may say anything.
struct Metadata<'a>(&'a HashMap<String, String>);

impl<'a> Metadata<'a> {
    fn get(&self, key: &str) -> Option<&'a str> {
        self.0.get(key).map(String::as_str)
    }

    fn parse<T: std::str::FromStr>(&self, key: &'static str, expected: &'static str) -> Result<T, FileError> {
        let found = self.get(key);
        found.and_then(|text| text.parse().ok()).ok_or_else(|| FileError::BadMetadata {
            key,
            found: found.map(str::to_owned),
            expected,
        })
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
) -> Result<(Vec<u8>, Vec<u8>), Error> {
    let (mut codes, mut pairs) = (Vec::with_capacity(sizes.codes), Vec::with_capacity(sizes.pairs));
    for (index, brick) in bricks.chunks_exact(BRICK_1_BYTES).enumerate() {
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
            return Err(Error::PairsDiffer { channel: strip * brick::BRICK_CHANNELS + row, k_block, group });
        }
    }
    Ok((codes, pairs))
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

fn io(action: &'static str) -> impl Fn(std::io::Error) -> FileError {
    move |error| FileError::Io { action, error }
}

fn invalid(error: Error) -> FileError {
    FileError::Invalid(Box::new(error))
}
