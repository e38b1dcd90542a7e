//! The packed checkpoint's format: names, shapes, metadata and checksums. Reader and writer share this file.
//!
//! A quantized module `P` has these tensors in place of `P.weight`:
//!
//! | tensor | type | shape | |
//! |---|---|---|---|
//! | `P.weight_codes` | U8 | `[⌈n/64⌉, ⌈k/64⌉, 2048]` | bricks of 4-bit codes |
//! | `P.weight_pairs` | U8 | `[⌈n/64⌉, groups, 128]` | `(s, a)` of each group |
//! | `P.weight_scales` | F32 | `[n]` | channel scales |
//! | `P.smoothing` | F32 | `[k]` | optional: activations are divided by it |
//! | `P.input_permutation` | I32 | `[k]` | optional: packed column `j` multiplies activation `input_permutation[j]` |
//!
//! The configuration says of smoothing vectors that are folded into other tensors which modules and which tensor they belong to
//! (`smoothing.folded`), and of a rotated model the channels of a block (`rotation.block`).
//!
//! A shard's metadata hold the entry `liquidgemm`, a JSON text with the version, n, k, group and checksum of every
//! matrix, and the checksum of every other tensor.
//!
//! Checksums are XXH3-64 in 16 lower-case hexadecimal digits. A kept tensor's covers its bytes. A matrix's covers
//! the texts `liquidgemm`, the version, n, k and the group, and then the checksums of its tensors in the order of
//! the table, each text followed by a line break.

use std::collections::BTreeMap;

use liquidgemm::Group;
use liquidgemm_format::brick::{self, CODE_BYTES, PAIR_BYTES};
use safetensors::tensor::Dtype;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::Xxh3;

/// The key of `quant_method` in config.json and of the entry in a shard's metadata.
pub(crate) const METHOD: &str = "liquidgemm";
/// The version of this format.
pub(crate) const VERSION: u32 = 1;
/// The key of the configuration in config.json.
pub(crate) const CONFIG_KEY: &str = "quantization_config";
/// The key of what that configuration says of smoothing.
pub(crate) const SMOOTHING_KEY: &str = "smoothing";
/// The key of what it says of rotation.
pub(crate) const ROTATION_KEY: &str = "rotation";
/// The file of the smoothing vectors that are folded into other tensors: safetensors, a vector for each entry of the configuration,
/// under the name of its first module. Only comparing with the original needs it, so its name is not that of weights.
pub(crate) const FOLDED_FILE: &str = "liquidgemm_folded_smoothing";

/// The tensors of a packed module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    Codes,
    Pairs,
    Scales,
    Smoothing,
    InputPermutation,
}

impl Part {
    /// In the order of the checksum.
    pub(crate) const ALL: [Part; 5] =
        [Part::Codes, Part::Pairs, Part::Scales, Part::Smoothing, Part::InputPermutation];

    pub(crate) fn suffix(self) -> &'static str {
        match self {
            Part::Codes => ".weight_codes",
            Part::Pairs => ".weight_pairs",
            Part::Scales => ".weight_scales",
            Part::Smoothing => ".smoothing",
            Part::InputPermutation => ".input_permutation",
        }
    }

    pub(crate) fn name(self, module: &str) -> String {
        format!("{module}{}", self.suffix())
    }

    pub(crate) fn dtype(self) -> Dtype {
        match self {
            Part::Codes | Part::Pairs => Dtype::U8,
            Part::Scales | Part::Smoothing => Dtype::F32,
            Part::InputPermutation => Dtype::I32,
        }
    }

    pub(crate) fn is_optional(self) -> bool {
        matches!(self, Part::Smoothing | Part::InputPermutation)
    }
}

/// The entry `liquidgemm` in a shard's metadata.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ShardMetadata {
    pub(crate) version: u32,
    /// By module.
    pub(crate) matrices: BTreeMap<String, MatrixMetadata>,
    /// Checksums of kept tensors, by name.
    pub(crate) tensors: BTreeMap<String, String>,
}

/// What a shard's metadata say of one matrix.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct MatrixMetadata {
    pub(crate) n: usize,
    pub(crate) k: usize,
    /// A multiple of 64, or `channel`.
    pub(crate) group: String,
    pub(crate) checksum: String,
}

/// The sizes of a packed matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Matrix {
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) group: Group,
}

impl Matrix {
    pub(crate) fn strips(self) -> usize {
        brick::strips(self.n)
    }

    pub(crate) fn k_blocks(self) -> usize {
        brick::k_blocks(self.k)
    }

    /// Groups in a channel.
    ///
    /// # Panics
    /// If k is 0 or the group is not valid, which [`check`](Self::check) finds.
    pub(crate) fn groups(self) -> usize {
        self.group.count(self.k).expect("checked before")
    }

    /// Fails if the library can't have such weights.
    pub(crate) fn check(self) -> Result<(), liquidgemm::Error> {
        if self.n == 0 {
            return Err(liquidgemm::Error::EmptyDimension { dimension: "n" });
        }
        if self.k > brick::MAX_K {
            return Err(liquidgemm::Error::KTooLarge { k: self.k });
        }
        let groups = self.group.count(self.k)?;
        let sizes = brick::codes_bytes(self.n, self.k).zip(brick::pairs_bytes(self.n, groups));
        if sizes
            .is_none_or(|(codes, pairs)| codes.checked_add(pairs).is_none_or(|sum| sum > isize::MAX as usize))
        {
            return Err(liquidgemm::Error::TooLarge { what: "weight matrix", rows: self.n, columns: self.k });
        }
        Ok(())
    }

    /// Returns the shape of a tensor of the matrix.
    pub(crate) fn shape(self, part: Part) -> Vec<usize> {
        match part {
            Part::Codes => vec![self.strips(), self.k_blocks(), CODE_BYTES],
            Part::Pairs => vec![self.strips(), self.groups(), PAIR_BYTES],
            Part::Scales => vec![self.n],
            Part::Smoothing | Part::InputPermutation => vec![self.k],
        }
    }

    /// Returns the bytes of codes, pairs and scales.
    pub(crate) fn bytes(self) -> u64 {
        let blocks = self.k_blocks() * CODE_BYTES + self.groups() * PAIR_BYTES;
        self.strips() as u64 * blocks as u64 + 4 * self.n as u64
    }

    /// Computes the checksum from those of the matrix's tensors, in the order of [`Part::ALL`].
    pub(crate) fn checksum(self, version: u32, parts: impl IntoIterator<Item = String>) -> String {
        let mut hash = Xxh3::new();
        let Self { n, k, group } = self;
        hash.update(format!("{METHOD}\n{version}\n{n}\n{k}\n{group}\n").as_bytes());
        for part in parts {
            hash.update(part.as_bytes());
            hash.update(b"\n");
        }
        digits(&hash)
    }
}

/// Returns a checksum's text.
pub(crate) fn digits(hash: &Xxh3) -> String {
    format!("{:016x}", hash.digest())
}
