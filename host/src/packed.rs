//! Packed weights: codes and pairs in the layout of `liquidgemm_format::brick`, with their channel scales.
//! This file has every conversion to and from that layout, except quantization.
//!
//! Every pair of a [`PackedWeights`] satisfies the format's invariant, `15·s + a ≤ 255`.
//! All constructors check it, so the backends need no checks.

use std::fmt;
use std::str::FromStr;

use liquidgemm_format::brick::{self, BRICK_CHANNELS, BRICK_K, CODE_BYTES, MAX_K, PAIR_BYTES};
use liquidgemm_format::dequant::{dequantize, is_valid_pair};
use rayon::prelude::*;

use crate::Error;
use crate::check::{check_dimension, check_finite, check_k, check_length, checked_elements};

/// The pair of padded channels. With code 0 it represents the weight 0.
pub(crate) const PADDING_PAIR: (u8, u8) = (1, 128);

/// The number of consecutive weights of a channel that share one `(s, a)` pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Group {
    /// This many weights along K: a positive multiple of 64. The last group of a channel may be shorter.
    K(usize),
    /// All weights of the channel.
    Channel,
}

impl Group {
    /// Returns the number of blocks of 64 along K that a group covers, in channels of `k` elements.
    /// Fails if the group size is invalid.
    pub(crate) fn blocks(self, k: usize) -> Result<usize, Error> {
        match self {
            Group::K(group) if group == 0 || !group.is_multiple_of(BRICK_K) => {
                Err(Error::InvalidGroup { group })
            }
            Group::K(group) => Ok((group / BRICK_K).min(brick::k_blocks(k))),
            Group::Channel => Ok(brick::k_blocks(k)),
        }
    }

    /// Returns the number of groups in a channel of `k` elements.
    ///
    /// # Errors
    /// - [`Error::EmptyDimension`] if `k` is 0.
    /// - [`Error::InvalidGroup`] if the group is not a positive multiple of 64.
    pub fn count(self, k: usize) -> Result<usize, Error> {
        check_dimension("k", k)?;
        Ok(brick::k_blocks(k).div_ceil(self.blocks(k)?))
    }
}

impl Default for Group {
    /// Returns groups of 64, the smallest of the format.
    fn default() -> Self {
        Group::K(BRICK_K)
    }
}

impl fmt::Display for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Group::K(group) => f.pad(&group.to_string()),
            Group::Channel => f.pad("channel"),
        }
    }
}

impl FromStr for Group {
    type Err = Error;

    /// Parses the text that [`Display`](fmt::Display) writes: a positive multiple of 64, or `channel`.
    ///
    /// # Errors
    /// [`Error::UnknownGroup`] for other text, [`Error::InvalidGroup`] for another number.
    fn from_str(text: &str) -> Result<Self, Error> {
        if text == "channel" {
            return Ok(Group::Channel);
        }
        let group = text.parse().map_err(|_| Error::UnknownGroup { text: text.to_owned() })?;
        Group::K(group).blocks(MAX_K).map(|_| Group::K(group))
    }
}

/// Codes and pairs in row-major order.
///
/// [`PackedWeights::unpack`] returns them, and [`PackedWeights::pack`] takes them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnpackedCodes {
    /// 4-bit codes, one per byte: 0 to 15, row-major `[n, k]`.
    pub codes: Vec<u8>,
    /// `(s, a)`, row-major `[n, groups]`, with `groups` = [`Group::count`] of `k`.
    pub pairs: Vec<(u8, u8)>,
}

/// The codes of one brick, 64 channels × 64 along K, and the pairs of its group.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Brick<'a> {
    pub(crate) codes: &'a [u8; CODE_BYTES],
    pub(crate) pairs: &'a [u8; PAIR_BYTES],
}

/// The sizes of packed weights. The constructor has checked the dimensions and the group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PackedSizes {
    /// Blocks of 64 along K in a group.
    pub(crate) group_blocks: usize,
    /// Groups in a channel.
    pub(crate) groups: usize,
    /// Bytes of all codes.
    pub(crate) codes: usize,
    /// Bytes of all pairs.
    pub(crate) pairs: usize,
}

impl PackedSizes {
    /// Computes the sizes of `[n, k]` weights. Fails if such weights cannot exist.
    pub(crate) fn new(n: usize, k: usize, group: Group) -> Result<Self, Error> {
        check_dimension("n", n)?;
        check_k(k)?;
        let group_blocks = group.blocks(k)?;
        let groups = brick::k_blocks(k).div_ceil(group_blocks);
        let sizes = brick::codes_bytes(n, k).zip(brick::pairs_bytes(n, groups));
        match sizes.filter(|&(codes, _)| codes <= isize::MAX as usize) {
            Some((codes, pairs)) => Ok(Self { group_blocks, groups, codes, pairs }),
            None => Err(Error::TooLarge { what: "weight matrix", rows: n, columns: k }),
        }
    }
}

/// 4-bit weights `[n, k]` in the packed layout of `liquidgemm_format::brick`.
///
/// The weight of (`channel`, `k`) is `channel_scales[channel] · int8_weight(channel, k)`.
/// The kernels multiply with the int8 weight `(q · s + a) XOR 0x80`,
/// where `q` is the 4-bit code and `(s, a)` the pair of its group.
#[derive(Clone, PartialEq)]
pub struct PackedWeights {
    n: usize,
    k: usize,
    group: Group,
    /// `[strips, k_blocks, 2048]`.
    codes: Vec<u8>,
    /// `[strips, groups, 128]`.
    pairs: Vec<u8>,
    /// f32 `[64 · strips]`: one per channel, with zeros for the padding.
    channel_scales: Vec<f32>,
}

impl PackedWeights {
    /// Assembles weights from parts that are already in the packed layout.
    ///
    /// - `codes`: `[⌈n/64⌉, ⌈k/64⌉, 2048]` bytes, the bricks of each strip one after another along K.
    /// - `pairs`: `[⌈n/64⌉, groups, 128]` bytes, with `groups` = [`group.count(k)`](Group::count).
    /// - `channel_scales`: `[n]`.
    ///
    /// # Errors
    /// - [`Error::EmptyDimension`] if `n` or `k` is 0, [`Error::KTooLarge`] if `k` exceeds 131,072.
    /// - [`Error::InvalidGroup`] if the group is not a positive multiple of 64.
    /// - [`Error::ShapeMismatch`] if a vector has the wrong length.
    /// - [`Error::TooLarge`] if the weights exceed the address space.
    /// - [`Error::NonFiniteParameter`] if a channel scale is not finite.
    /// - [`Error::InvariantBroken`] if a pair, also of padded channels, violates `s ≥ 1` or `15·s + a ≤ 255`.
    pub fn from_parts(
        codes: Vec<u8>,
        pairs: Vec<u8>,
        mut channel_scales: Vec<f32>,
        n: usize,
        k: usize,
        group: Group,
    ) -> Result<Self, Error> {
        let sizes = PackedSizes::new(n, k, group)?;
        check_length("packed codes", "⌈n/64⌉ · ⌈k/64⌉ · 2048 bytes", sizes.codes, codes.len())?;
        check_length("packed pairs", "⌈n/64⌉ · groups · 128 bytes", sizes.pairs, pairs.len())?;
        check_length("channel scales", "[n]", n, channel_scales.len())?;
        check_finite("channel scale", &channel_scales)?;
        check_pairs(&pairs, sizes)?;
        channel_scales.resize(brick::strips(n) * BRICK_CHANNELS, 0.0);
        Ok(Self { n, k, group, codes, pairs, channel_scales })
    }

    /// Packs codes and pairs that another program chose, such as a search for the smallest error.
    /// [`from_int4`](Self::from_int4) takes codes with floating-point scales of groups.
    ///
    /// - `codes`: row-major `[n, k]`, values 0 to 15.
    /// - `pairs`: row-major `[n, groups]` of `(s, a)`, with `groups` = [`group.count(k)`](Group::count).
    /// - `channel_scales`: `[n]`.
    ///
    /// A code `q` represents the weight `channel_scale · (q · s + a − 128)`.
    ///
    /// # Errors
    /// As [`from_parts`](Self::from_parts), and [`Error::CodeOutOfRange`] for a code above 15.
    pub fn pack(
        codes: &[u8],
        pairs: &[(u8, u8)],
        channel_scales: Vec<f32>,
        n: usize,
        k: usize,
        group: Group,
    ) -> Result<Self, Error> {
        let PackedSizes { group_blocks, groups, .. } = PackedSizes::new(n, k, group)?;
        check_length("codes", "[n, k]", checked_elements("code matrix", n, k)?, codes.len())?;
        check_length("pairs", "[n, groups]", checked_elements("pair matrix", n, groups)?, pairs.len())?;
        check_length("channel scales", "[n]", n, channel_scales.len())?;
        check_finite("channel scale", &channel_scales)?;
        if let Some(index) = codes.par_iter().position_first(|&code| code > 15) {
            return Err(Error::CodeOutOfRange { channel: index / k, k: index % k, code: codes[index] });
        }
        if let Some(index) = pairs.par_iter().position_first(|&(s, a)| !is_valid_pair(s, a)) {
            let ((s, a), k_block) = (pairs[index], index % groups * group_blocks);
            return Err(Error::InvariantBroken { channel: index / groups, k_block, s, a });
        }

        let mut packer = Packer::new(n, k, group)?;
        packer.for_each_strip(|channels, mut strip| {
            for (row, channel) in channels.enumerate() {
                let pairs = &pairs[channel * groups..][..groups];
                strip.write_channel(row, channel_scales[channel], &codes[channel * k..][..k], pairs);
            }
        });
        Ok(packer.finish())
    }

    /// Returns the number of output channels.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Returns the number of elements per channel.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Returns the group: how many weights share a pair.
    pub fn group(&self) -> Group {
        self.group
    }

    /// Returns the number of strips of 64 channels, `⌈n/64⌉`.
    pub fn strips(&self) -> usize {
        brick::strips(self.n)
    }

    /// Returns the number of bricks in a strip, `⌈k/64⌉`.
    pub fn k_blocks(&self) -> usize {
        brick::k_blocks(self.k)
    }

    /// Returns the number of groups in a channel.
    pub fn groups(&self) -> usize {
        self.k_blocks().div_ceil(self.group_blocks())
    }

    /// Returns the blocks of 64 along K in a group.
    pub(crate) fn group_blocks(&self) -> usize {
        self.group.blocks(self.k).expect("checked at construction")
    }

    /// Returns the packed codes, `[`[`strips`](Self::strips)`, `[`k_blocks`](Self::k_blocks)`, 2048]`.
    pub fn codes(&self) -> &[u8] {
        &self.codes
    }

    /// Returns the packed pairs, `[`[`strips`](Self::strips)`, `[`groups`](Self::groups)`, 128]`.
    pub fn pairs(&self) -> &[u8] {
        &self.pairs
    }

    /// Returns one brick.
    ///
    /// # Panics
    /// If `strip` or `k_block` is out of range.
    pub(crate) fn brick(&self, strip: usize, k_block: usize) -> Brick<'_> {
        assert!(strip < self.strips() && k_block < self.k_blocks(), "no brick ({strip}, {k_block})");
        let group = strip * self.groups() + k_block / self.group_blocks();
        Brick {
            codes: &self.codes.as_chunks().0[strip * self.k_blocks() + k_block],
            pairs: &self.pairs.as_chunks().0[group],
        }
    }

    /// Returns the scales, one per channel: `[n]`.
    pub fn channel_scales(&self) -> &[f32] {
        &self.channel_scales[..self.n]
    }

    /// Returns the scales padded with zeros to whole strips: `[64 · strips]`.
    pub fn padded_channel_scales(&self) -> &[f32] {
        &self.channel_scales
    }

    /// Returns the bytes of codes, pairs and the `n` channel scales.
    pub fn bytes(&self) -> usize {
        self.codes.len() + self.pairs.len() + self.n * size_of::<f32>()
    }

    /// Returns the 4-bit code of (`channel`, `k`).
    ///
    /// # Panics
    /// If the position is out of range.
    pub fn code(&self, channel: usize, k: usize) -> u8 {
        assert!(channel < self.n && k < self.k, "({channel}, {k}) is outside [{}, {}]", self.n, self.k);
        let brick = self.brick(channel / BRICK_CHANNELS, k / BRICK_K);
        brick.code(channel % BRICK_CHANNELS, k % BRICK_K)
    }

    /// Returns the pair `(s, a)` of `channel` for block `k_block` of 64 along K.
    ///
    /// # Panics
    /// If the position is out of range.
    pub fn pair(&self, channel: usize, k_block: usize) -> (u8, u8) {
        assert!(channel < self.n, "channel {channel} is not below {}", self.n);
        pair_at(self.brick(channel / BRICK_CHANNELS, k_block).pairs, channel % BRICK_CHANNELS)
    }

    /// Returns the int8 weight of (`channel`, `k`), which the kernels multiply with.
    ///
    /// # Panics
    /// If the position is out of range.
    pub fn int8_weight(&self, channel: usize, k: usize) -> i8 {
        let (s, a) = self.pair(channel, k / BRICK_K);
        dequantize(self.code(channel, k), s, a)
    }

    /// Returns the represented weights, `channel_scale · int8_weight`, as f32, row-major `[n, k]`.
    pub fn dequantize(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.n * self.k];
        values.par_chunks_exact_mut(self.k).enumerate().for_each(|(channel, row)| {
            let scale = self.channel_scales[channel];
            for (k, value) in row.iter_mut().enumerate() {
                *value = self.int8_weight(channel, k) as f32 * scale;
            }
        });
        values
    }

    /// Returns codes and pairs in row-major order. This is the inverse of [`pack`](Self::pack).
    pub fn unpack(&self) -> UnpackedCodes {
        let mut codes = vec![0; self.n * self.k];
        codes.par_chunks_exact_mut(self.k).enumerate().for_each(|(channel, row)| {
            for (k, code) in row.iter_mut().enumerate() {
                *code = self.code(channel, k);
            }
        });
        let group_blocks = self.group_blocks();
        let pairs = (0..self.n)
            .flat_map(|channel| {
                (0..self.k_blocks()).step_by(group_blocks).map(move |k_block| self.pair(channel, k_block))
            })
            .collect();
        UnpackedCodes { codes, pairs }
    }
}

impl fmt::Debug for PackedWeights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PackedWeights")
            .field("n", &self.n)
            .field("k", &self.k)
            .field("group", &self.group)
            .finish_non_exhaustive()
    }
}

impl Brick<'_> {
    /// Returns the code of channel `row` at `k`, both within the brick.
    fn code(&self, row: usize, k: usize) -> u8 {
        let (byte, high) = brick::code_position(row, k);
        if high { self.codes[byte] >> 4 } else { self.codes[byte] & 15 }
    }
}

/// Returns the pair of channel `row` of a strip.
fn pair_at(pairs: &[u8; PAIR_BYTES], row: usize) -> (u8, u8) {
    let offset = brick::pair_offset(row);
    (pairs[offset], pairs[offset + 1])
}

/// Checks every stored pair, also of padded channels.
fn check_pairs(pairs: &[u8], sizes: PackedSizes) -> Result<(), Error> {
    let failure = pairs.as_chunks().0.par_iter().enumerate().find_map_first(|(index, pairs)| {
        let (strip, group) = (index / sizes.groups, index % sizes.groups);
        (0..BRICK_CHANNELS).find_map(|row| {
            let (s, a) = pair_at(pairs, row);
            (!is_valid_pair(s, a)).then_some(Error::InvariantBroken {
                channel: strip * BRICK_CHANNELS + row,
                k_block: group * sizes.group_blocks,
                s,
                a,
            })
        })
    });
    failure.map_or(Ok(()), Err)
}

/// Returns the code whose weight is nearest to 0 under a valid pair. It pads channels beyond K.
fn padding_code((s, a): (u8, u8)) -> u8 {
    let above_zero = 128u32.saturating_sub(a as u32);
    ((above_zero + s as u32 / 2) / s as u32).min(15) as u8
}

/// Weights that are being packed.
pub(crate) struct Packer {
    n: usize,
    k: usize,
    group: Group,
    sizes: PackedSizes,
    codes: Vec<u8>,
    pairs: Vec<u8>,
    /// f32 `[64 · strips]`, zeros where nothing is written yet.
    channel_scales: Vec<f32>,
}

/// One strip of a [`Packer`].
pub(crate) struct PackerStrip<'a> {
    group_blocks: usize,
    /// `[k_blocks, 2048]`, zeros where nothing is written yet.
    codes: &'a mut [[u8; CODE_BYTES]],
    /// `[groups, 128]`.
    pairs: &'a mut [[u8; PAIR_BYTES]],
    /// `[64]`.
    channel_scales: &'a mut [f32],
}

impl Packer {
    /// Allocates `[n, k]` weights.
    pub(crate) fn new(n: usize, k: usize, group: Group) -> Result<Self, Error> {
        let sizes = PackedSizes::new(n, k, group)?;
        let (codes, pairs) = (vec![0; sizes.codes], vec![0; sizes.pairs]);
        let channel_scales = vec![0.0; brick::strips(n) * BRICK_CHANNELS];
        Ok(Self { n, k, group, sizes, codes, pairs, channel_scales })
    }

    /// Calls `fill(channels, strip)` for every strip, in parallel.
    ///
    /// `channels` are the real ones. The padded channels of the last strip have their pair already.
    pub(crate) fn for_each_strip(&mut self, fill: impl Fn(std::ops::Range<usize>, PackerStrip<'_>) + Sync) {
        let (n, k_blocks, sizes) = (self.n, brick::k_blocks(self.k), self.sizes);
        let codes = self.codes.as_chunks_mut().0.par_chunks_mut(k_blocks);
        let pairs = self.pairs.as_chunks_mut().0.par_chunks_mut(sizes.groups);
        let channel_scales = self.channel_scales.par_chunks_mut(BRICK_CHANNELS);
        codes.zip(pairs).zip(channel_scales).enumerate().for_each(
            |(strip, ((codes, pairs), channel_scales))| {
                let first = strip * BRICK_CHANNELS;
                let real = BRICK_CHANNELS.min(n - first);
                for pairs in &mut *pairs {
                    for row in real..BRICK_CHANNELS {
                        write_pair(pairs, row, PADDING_PAIR);
                    }
                }
                let group_blocks = sizes.group_blocks;
                fill(first..first + real, PackerStrip { group_blocks, codes, pairs, channel_scales });
            },
        );
    }

    /// Returns the weights. All real channels must have been written.
    pub(crate) fn finish(self) -> PackedWeights {
        let Self { n, k, group, codes, pairs, channel_scales, .. } = self;
        PackedWeights { n, k, group, codes, pairs, channel_scales }
    }
}

impl PackerStrip<'_> {
    /// Writes channel `row` of the strip: its scale, its `k` codes, their padding, and the pair of every group.
    pub(crate) fn write_channel(&mut self, row: usize, scale: f32, codes: &[u8], pairs: &[(u8, u8)]) {
        self.channel_scales[row] = scale;
        for (to, &pair) in self.pairs.iter_mut().zip(pairs) {
            write_pair(to, row, pair);
        }
        for (block, (brick, codes)) in self.codes.iter_mut().zip(codes.chunks(BRICK_K)).enumerate() {
            let padding =
                if codes.len() < BRICK_K { padding_code(pairs[block / self.group_blocks]) } else { 0 };
            for k in 0..BRICK_K {
                let code = codes.get(k).copied().unwrap_or(padding);
                let (byte, high) = brick::code_position(row, k);
                brick[byte] |= if high { code << 4 } else { code };
            }
        }
    }
}

fn write_pair(pairs: &mut [u8; PAIR_BYTES], row: usize, (s, a): (u8, u8)) {
    let offset = brick::pair_offset(row);
    pairs[offset] = s;
    pairs[offset + 1] = a;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn padding_behind_k_takes_the_code_nearest_to_zero_for_every_valid_pair() {
        for s in 1..=17u8 {
            for a in 0..=255u8 {
                if !is_valid_pair(s, a) {
                    continue;
                }
                let magnitude = |q| (dequantize(q, s, a) as i32).abs();
                let best = (0..16).map(magnitude).min().unwrap();
                assert_eq!(magnitude(padding_code((s, a))), best, "s = {s}, a = {a}");
            }
        }
    }
}
