//! Packed weights on disk: a `.safetensors` file with three tensors and six metadata entries.
//!
//! | tensor | type | shape |
//! |---|---|---|
//! | `codes` | U8 | `[⌈n/64⌉, ⌈k/64⌉, 2048]` |
//! | `pairs` | U8 | `[⌈n/64⌉, groups, 128]` |
//! | `channel_scales` | F32 | `[n]` |
//!
//! The metadata are `format` (`liquidgemm`), `format_version` (`2`), `n`, `k`,
//! `group` (a number or `channel`) and `checksum`.
//! The checksum is XXH3-64 in 16 lower-case hexadecimal digits.
//! It covers the other five values, each followed by a line break, and then the tensors in the order above.
//! It is the only way to detect a damaged code, because every 4-bit value is a valid code.
//!
//! Version 1 had the tensor `bricks`, U8 `[⌈n/64⌉, ⌈k/64⌉, 2176]`, in place of `codes` and `pairs`.
//! It held 2,048 bytes of codes and then 128 bytes of pairs per brick; pairs repeated within a group.
//! Its checksum covers the bricks, then the scales. Version 1 can still be read.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use liquidgemm_format::brick::{self, BRICK_BYTES, CODE_BYTES, PAIR_BYTES};
use safetensors::SafeTensors;
use safetensors::tensor::{self, Dtype, TensorInfo};
use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::Value;
use xxhash_rust::xxh3::Xxh3;

use crate::new_file::{NewFile, regular_file, system};
use crate::packed::PackedSizes;
use crate::{Error, FileError, Group, PackedWeights};

const FORMAT: &str = "liquidgemm";
const VERSION: &str = "2";
/// The version that stores pairs in the bricks.
const VERSION_1: &str = "1";
/// Bytes of the header's length, the first field of a safetensors file.
const HEADER_LENGTH_BYTES: usize = 8;
/// The longest header that is read. Headers of this format have about 500 bytes.
const MOST_HEADER_BYTES: u64 = 64 * 1024;

impl PackedWeights {
    /// Writes a `.safetensors` file. The same weights give the same bytes.
    ///
    /// The file appears under its name complete or not at all:
    /// it is written under another name in the same folder, flushed to the disk, and renamed.
    /// An existing file is replaced, and the new one takes over its permissions.
    /// A symbolic link is followed and stays in place.
    ///
    /// # Errors
    /// [`Error::File`] with the reason:
    /// - [`FileError::EmptyPath`], [`FileError::NotAFile`] or [`FileError::TooManyLinks`] for a bad path.
    /// - [`FileError::Io`] if the operating system refuses an operation.
    ///
    /// No temporary file remains after an error.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<(), Error> {
        let path = path.as_ref();
        let problem = |problem| Error::File { path: path.to_owned(), problem };
        let scales: Vec<u8> = self.channel_scales().iter().flat_map(|scale| scale.to_le_bytes()).collect();
        let (header, tensors) = self.contents(&scales).map_err(problem)?;
        let mut file = NewFile::create(path)?;
        file.write(&header)?;
        for tensor in tensors {
            file.write(tensor)?;
        }
        file.finish()
    }

    /// Reads a file that [`save`](Self::save) wrote.
    ///
    /// It checks everything: structure, version, types and shapes, the checksum,
    /// that scales are finite, and the invariant of every pair.
    ///
    /// # Errors
    /// [`Error::File`] with the first problem found. [`FileError`] lists the possible ones.
    pub fn load(path: impl AsRef<Path>) -> Result<Self, Error> {
        let path = path.as_ref();
        Self::read(path).map_err(|problem| Error::File { path: path.to_owned(), problem })
    }

    /// Like [`load`](Self::load), from the bytes of such a file.
    ///
    /// # Errors
    /// The first problem found.
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
        // Check the type before opening: opening a FIFO blocks until another process writes to it.
        let metadata =
            regular_file(path)?.ok_or_else(|| system("open the file")(io::ErrorKind::NotFound.into()))?;
        let mut file = File::open(path).map_err(system("open the file"))?;
        // Read the header's length first, because other safetensors files may be large.
        let mut bytes = Vec::new();
        (&mut file).take(HEADER_LENGTH_BYTES as u64).read_to_end(&mut bytes).map_err(system("read"))?;
        check_header_length(&bytes)?;
        let length = usize::try_from(metadata.len()).unwrap_or(usize::MAX);
        bytes.try_reserve_exact(length).map_err(|_| FileError::OutOfMemory { bytes: length })?;
        file.take(metadata.len()).read_to_end(&mut bytes).map_err(system("read"))?;
        Self::from_file_bytes(&bytes)
    }

    /// Returns the header, and the tensors that follow it.
    fn contents<'a>(&'a self, scales: &'a [u8]) -> Result<(Vec<u8>, [&'a [u8]; 3]), FileError> {
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
                        &[self.codes(), self.pairs(), scales],
                    ),
                ),
            ]
            .map(|(key, value)| (key.to_owned(), value)),
        );
        // The order that the safetensors crate uses: by alignment of the type, then by name.
        let tensors: [(&str, Dtype, Vec<usize>, &[u8]); 3] = [
            ("channel_scales", Dtype::F32, vec![self.n()], scales),
            ("codes", Dtype::U8, vec![self.strips(), self.k_blocks(), CODE_BYTES], self.codes()),
            ("pairs", Dtype::U8, vec![self.strips(), self.groups(), PAIR_BYTES], self.pairs()),
        ];
        let mut end = 0;
        let infos = tensors.iter().map(|(name, dtype, shape, data)| {
            let begin = end;
            end += data.len();
            (
                (*name).to_owned(),
                TensorInfo { dtype: *dtype, shape: shape.clone(), data_offsets: (begin, end) },
            )
        });
        let header = header(metadata, infos.collect())?;

        Ok((header, tensors.map(|tensor| tensor.3)))
    }
}

/// The metadata of a file, unchecked.
struct Metadata<'a>(&'a HashMap<String, String>);

impl<'a> Metadata<'a> {
    fn get(&self, key: &str) -> Option<&'a str> {
        self.0.get(key).map(String::as_str)
    }

    /// Parses a value. Only the form that `save` writes is valid: no sign and no leading zero.
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

/// Returns the bytes of a tensor, which must have this type and shape.
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

/// Splits the bricks of version 1 into codes and pairs.
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
            return Err(invalid(Error::PairsDiffer { channel, k_block, group: group.to_string() }));
        }
    }
    Ok((codes, pairs))
}

/// Returns an empty vector with capacity for `count` elements, or an error if memory runs out.
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

/// Refuses a file whose header is longer than any of this format.
fn check_header_length(bytes: &[u8]) -> Result<(), FileError> {
    let length = bytes.first_chunk().map_or(0, |&length| u64::from_le_bytes(length));
    if length > MOST_HEADER_BYTES {
        return Err(FileError::HeaderTooLong { bytes: length, limit: MOST_HEADER_BYTES });
    }
    Ok(())
}

/// Refuses headers that are too long or contain a key twice.
fn check_header(bytes: &[u8]) -> Result<(), FileError> {
    check_header_length(bytes)?;
    let Some((&length, rest)) = bytes.split_first_chunk() else { return Ok(()) };
    // The safetensors crate reports all other errors in the header.
    let Some(header) = rest.get(..u64::from_le_bytes(length) as usize) else { return Ok(()) };
    match serde_json::from_slice::<UniqueKeys>(header) {
        Err(error) if error.is_data() => Err(FileError::BadHeader { reason: error.to_string() }),
        _ => Ok(()),
    }
}

/// JSON in which no object has a key twice. Other parsers would silently take the last value.
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

/// Returns a safetensors header with its length in front. Keys are sorted, so equal weights give equal bytes.
fn header(
    metadata: HashMap<String, String>,
    tensors: Vec<(String, TensorInfo)>,
) -> Result<Vec<u8>, FileError> {
    let metadata = tensor::Metadata::new(Some(metadata), tensors).map_err(FileError::Safetensors)?;
    let bad = |error: serde_json::Error| FileError::BadHeader { reason: error.to_string() };
    let unsorted = serde_json::to_value(&metadata).map_err(bad)?;
    let sorted: BTreeMap<String, BTreeMap<String, Value>> = serde_json::from_value(unsorted).map_err(bad)?;
    let mut text = serde_json::to_vec(&sorted).map_err(bad)?;
    // Tensors begin at a multiple of 8 bytes.
    text.resize(text.len().next_multiple_of(HEADER_LENGTH_BYTES), b' ');
    let mut header = (text.len() as u64).to_le_bytes().to_vec();
    header.extend(text);
    Ok(header)
}

/// Computes the checksum that the top of this file defines.
fn checksum(version: &str, n: usize, k: usize, group: Group, tensors: &[&[u8]]) -> String {
    let mut hash = Xxh3::new();
    hash.update(format!("{FORMAT}\n{version}\n{n}\n{k}\n{group}\n").as_bytes());
    for tensor in tensors {
        hash.update(tensor);
    }
    format!("{:016x}", hash.digest())
}

fn invalid(error: Error) -> FileError {
    FileError::Invalid(Box::new(error))
}
