//! Packed weights: the brick stream of `liquidgemm_format` with its channel scales, and every way into and out
//! of it that does not quantize.
//!
//! A [`PackedWeights`] always holds the format's invariant, `15·s + a ≤ 255`, for every pair: nothing that
//! breaks it can be constructed, so the backends need not check again.

use std::fmt;
use std::str::FromStr;

use liquidgemm_format::brick::{self, BRICK_BYTES, BRICK_CHANNELS, BRICK_K, MAX_K};
use liquidgemm_format::dequant::{dequantize, is_valid_pair};
use rayon::prelude::*;

use crate::Error;
use crate::error::{check_dimension, check_finite, check_k, check_length, checked_elements};

/// The pair of padded channels: with code 0 it stands for the weight 0.
pub(crate) const PADDING_PAIR: (u8, u8) = (1, 128);

/// How many consecutive weights of a channel share one `(s, a)` pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Group {
    /// This many along K: a positive multiple of 64. The last group of a channel may be shorter.
    K(usize),
    /// The whole channel.
    Channel,
}

impl Group {
    /// Blocks of 64 along K that a group covers in weights with `k` elements a channel, or the error that this
    /// is no possible group.
    pub(crate) fn blocks(self, k: usize) -> Result<usize, Error> {
        match self {
            Group::K(group) if group == 0 || !group.is_multiple_of(BRICK_K) => {
                Err(Error::InvalidGroup { group })
            }
            Group::K(group) => Ok((group / BRICK_K).min(brick::k_blocks(k))),
            Group::Channel => Ok(brick::k_blocks(k)),
        }
    }

    /// Groups of a channel with `k` elements.
    ///
    /// # Errors
    /// A group that is not a positive multiple of 64; `k = 0`.
    pub fn count(self, k: usize) -> Result<usize, Error> {
        check_dimension("k", k)?;
        Ok(brick::k_blocks(k).div_ceil(self.blocks(k)?))
    }
}

impl Default for Group {
    /// 64, the finest that the format has.
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

    /// Reads what [`Display`](fmt::Display) writes: a positive multiple of 64, or `channel`.
    fn from_str(text: &str) -> Result<Self, Error> {
        if text == "channel" {
            return Ok(Group::Channel);
        }
        let group = text.parse().map_err(|_| Error::UnknownGroup { text: text.to_owned() })?;
        Group::K(group).blocks(MAX_K).map(|_| Group::K(group))
    }
}

/// What [`PackedWeights::unpack`] gives back and [`PackedWeights::pack`] takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnpackedCodes {
    /// Codes 0 … 15, row-major `[n, k]`.
    pub codes: Vec<u8>,
    /// `(s, a)`, row-major `[n, groups]`, where `groups` is [`Group::count`] of `k`.
    pub pairs: Vec<(u8, u8)>,
}

/// 4-bit weights `[n, k]` in the packed brick layout.
///
/// The weight of (channel, k) is `channel_scales[channel] · level1(channel, k)`, where `level1` is the i8 that
/// the kernels multiply with: `(q · s + a) XOR 0x80`.
#[derive(Clone, PartialEq)]
pub struct PackedWeights {
    n: usize,
    k: usize,
    group: Group,
    /// `strips(n) · k_blocks(k)` bricks.
    bricks: Vec<u8>,
    /// One a channel, padded with zeros to whole strips.
    channel_scales: Vec<f32>,
}

impl PackedWeights {
    /// Takes a brick stream and its channel scales as they were stored.
    ///
    /// `bricks` holds `⌈n/64⌉ · ⌈k/64⌉` bricks of 2,176 bytes, k-fastest; `channel_scales` is `[n]`.
    ///
    /// # Errors
    /// Zero `n` or `k`, K above 131,072, an impossible group, lengths that do not fit, a scale that is not
    /// finite, a pair that breaks `s ≥ 1` or `15·s + a ≤ 255`, pairs that differ inside a group.
    pub fn from_parts(
        bricks: Vec<u8>,
        channel_scales: Vec<f32>,
        n: usize,
        k: usize,
        group: Group,
    ) -> Result<Self, Error> {
        let bytes = Self::check_shape(n, k)?;
        let group_blocks = group.blocks(k)?;
        check_length("bricks", "⌈n/64⌉ · ⌈k/64⌉ bricks of 2176 bytes", bytes, bricks.len())?;
        check_length("channel scales", "[n]", n, channel_scales.len())?;
        check_finite("channel scale", &channel_scales)?;
        let weights = Self::assemble(bricks, channel_scales, n, k, group);
        weights.check_pairs(group_blocks)?;
        Ok(weights)
    }

    /// Packs codes and pairs that any quantizer made (GPTQ, an error-minimising search, …).
    ///
    /// `codes` is row-major `[n, k]` with values 0 … 15, `pairs` row-major `[n, groups]` of `(s, a)` with
    /// `groups` = [`group.count(k)`](Group::count), `channel_scales` `[n]`. The weight of a code is
    /// `channel_scale · (q · s + a − 128)`.
    ///
    /// # Errors
    /// As [`from_parts`](Self::from_parts); also a code above 15.
    pub fn pack(
        codes: &[u8],
        pairs: &[(u8, u8)],
        channel_scales: Vec<f32>,
        n: usize,
        k: usize,
        group: Group,
    ) -> Result<Self, Error> {
        let bytes = Self::check_shape(n, k)?;
        let group_blocks = group.blocks(k)?;
        let groups = brick::k_blocks(k).div_ceil(group_blocks);
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

        let mut bricks = vec![0; bytes];
        for_each_strip(&mut bricks, n, k, |channels, strip| {
            for (row, channel) in channels.enumerate() {
                let pairs = &pairs[channel * groups..][..groups];
                write_channel(strip, row, &codes[channel * k..][..k], |block| pairs[block / group_blocks]);
            }
        });
        Ok(Self::assemble(bricks, channel_scales, n, k, group))
    }

    /// Puts together parts that are known to be valid.
    pub(crate) fn assemble(
        bricks: Vec<u8>,
        mut channel_scales: Vec<f32>,
        n: usize,
        k: usize,
        group: Group,
    ) -> Self {
        channel_scales.resize(brick::strips(n) * BRICK_CHANNELS, 0.0);
        Self { n, k, group, bricks, channel_scales }
    }

    /// Bytes of the brick stream for `[n, k]`, if such weights can exist.
    pub(crate) fn check_shape(n: usize, k: usize) -> Result<usize, Error> {
        check_dimension("n", n)?;
        check_k(k)?;
        brick::stream_bytes(n, k).filter(|&bytes| bytes <= isize::MAX as usize).ok_or(Error::TooLarge {
            what: "weight matrix",
            rows: n,
            columns: k,
        })
    }

    /// Every stored pair, also of padding, must be valid and repeat inside its group.
    fn check_pairs(&self, group_blocks: usize) -> Result<(), Error> {
        let strip_bytes = self.k_blocks() * BRICK_BYTES;
        let failure =
            self.bricks.par_chunks_exact(strip_bytes).enumerate().find_map_first(|(strip, bricks)| {
                for (k_block, brick) in bricks.chunks_exact(BRICK_BYTES).enumerate() {
                    let first = &bricks[k_block / group_blocks * group_blocks * BRICK_BYTES..][..BRICK_BYTES];
                    for row in 0..BRICK_CHANNELS {
                        let channel = strip * BRICK_CHANNELS + row;
                        let (s, a) = pair_of(brick, row);
                        if !is_valid_pair(s, a) {
                            return Some(Error::InvariantBroken { channel, k_block, s, a });
                        }
                        if (s, a) != pair_of(first, row) {
                            return Some(Error::PairsDiffer { channel, k_block, group: self.group });
                        }
                    }
                }
                None
            });
        failure.map_or(Ok(()), Err)
    }

    /// Output channels.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Elements a channel.
    pub fn k(&self) -> usize {
        self.k
    }

    /// How many weights share a pair.
    pub fn group(&self) -> Group {
        self.group
    }

    /// Strips of 64 channels.
    pub fn strips(&self) -> usize {
        brick::strips(self.n)
    }

    /// Bricks in a strip.
    pub fn k_blocks(&self) -> usize {
        brick::k_blocks(self.k)
    }

    /// The whole brick stream, [`strips`](Self::strips) · [`k_blocks`](Self::k_blocks) bricks of 2,176 bytes.
    pub fn bricks(&self) -> &[u8] {
        &self.bricks
    }

    /// One brick.
    ///
    /// # Panics
    /// If `strip` or `k_block` is out of range.
    pub fn brick(&self, strip: usize, k_block: usize) -> &[u8] {
        assert!(strip < self.strips() && k_block < self.k_blocks(), "no brick ({strip}, {k_block})");
        &self.bricks[brick::brick_offset(strip, k_block, self.k_blocks())..][..BRICK_BYTES]
    }

    /// One scale a channel, `[n]`.
    pub fn channel_scales(&self) -> &[f32] {
        &self.channel_scales[..self.n]
    }

    /// The scales with zeros behind them for the padded channels, `[64 · strips]`.
    pub fn padded_channel_scales(&self) -> &[f32] {
        &self.channel_scales
    }

    /// Bytes that these weights take: bricks and `n` channel scales.
    pub fn bytes(&self) -> usize {
        self.bricks.len() + self.n * size_of::<f32>()
    }

    /// The 4-bit code of (`channel`, `k`).
    ///
    /// # Panics
    /// If the position is out of range.
    pub fn code(&self, channel: usize, k: usize) -> u8 {
        assert!(channel < self.n && k < self.k, "({channel}, {k}) is outside [{}, {}]", self.n, self.k);
        let brick = self.brick(channel / BRICK_CHANNELS, k / BRICK_K);
        code_of(brick, channel % BRICK_CHANNELS, k % BRICK_K)
    }

    /// The pair `(s, a)` of `channel` in block `k_block` of 64 along K.
    ///
    /// # Panics
    /// If the position is out of range.
    pub fn pair(&self, channel: usize, k_block: usize) -> (u8, u8) {
        assert!(channel < self.n, "channel {channel} is not below {}", self.n);
        pair_of(self.brick(channel / BRICK_CHANNELS, k_block), channel % BRICK_CHANNELS)
    }

    /// The int8 weight of (`channel`, `k`) that the product is computed with.
    ///
    /// # Panics
    /// If the position is out of range.
    pub fn level1(&self, channel: usize, k: usize) -> i8 {
        let (s, a) = self.pair(channel, k / BRICK_K);
        dequantize(self.code(channel, k), s, a)
    }

    /// What the weights stand for, `channel_scale · level1`, as f32, row-major `[n, k]`.
    pub fn dequantize(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.n * self.k];
        values.par_chunks_exact_mut(self.k).enumerate().for_each(|(channel, row)| {
            let scale = self.channel_scales[channel];
            for (k, value) in row.iter_mut().enumerate() {
                *value = self.level1(channel, k) as f32 * scale;
            }
        });
        values
    }

    /// Codes and pairs in plain row-major order; [`pack`](Self::pack) backwards.
    pub fn unpack(&self) -> UnpackedCodes {
        let mut codes = vec![0; self.n * self.k];
        codes.par_chunks_exact_mut(self.k).enumerate().for_each(|(channel, row)| {
            for (k, code) in row.iter_mut().enumerate() {
                *code = self.code(channel, k);
            }
        });
        let group_blocks = self.group.blocks(self.k).expect("checked at construction");
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

/// Code of a channel and k inside one brick.
fn code_of(brick: &[u8], row: usize, k: usize) -> u8 {
    let (byte, high) = brick::code_position(row, k);
    if high { brick[byte] >> 4 } else { brick[byte] & 15 }
}

/// Pair of a channel inside one brick.
fn pair_of(brick: &[u8], row: usize) -> (u8, u8) {
    let offset = brick::scale_offset(row);
    (brick[offset], brick[offset + 1])
}

/// The code whose weight is nearest to 0 under a valid pair: what the padding behind K holds.
fn padding_code((s, a): (u8, u8)) -> u8 {
    let above_zero = 128u32.saturating_sub(a as u32);
    ((above_zero + s as u32 / 2) / s as u32).min(15) as u8
}

/// Calls `fill(real channels, strip's bytes)` for every strip of a zeroed stream, in parallel, after giving
/// the padded channels of the last strip their pair.
pub(crate) fn for_each_strip(
    bricks: &mut [u8],
    n: usize,
    k: usize,
    fill: impl Fn(std::ops::Range<usize>, &mut [u8]) + Sync,
) {
    bricks.par_chunks_exact_mut(brick::k_blocks(k) * BRICK_BYTES).enumerate().for_each(|(strip, bytes)| {
        let first = strip * BRICK_CHANNELS;
        let real = BRICK_CHANNELS.min(n - first);
        for brick in bytes.chunks_exact_mut(BRICK_BYTES) {
            for row in real..BRICK_CHANNELS {
                write_pair(brick, row, PADDING_PAIR);
            }
        }
        fill(first..first + real, bytes);
    });
}

/// Writes one channel, row `row` of a zeroed strip: its `k` codes, the padding behind them, and the pair of
/// every block of 64.
pub(crate) fn write_channel(strip: &mut [u8], row: usize, codes: &[u8], pair: impl Fn(usize) -> (u8, u8)) {
    for (block, (brick, codes)) in strip.chunks_exact_mut(BRICK_BYTES).zip(codes.chunks(BRICK_K)).enumerate()
    {
        let pair = pair(block);
        write_pair(brick, row, pair);
        let padding = if codes.len() < BRICK_K { padding_code(pair) } else { 0 };
        for k in 0..BRICK_K {
            let code = codes.get(k).copied().unwrap_or(padding);
            let (byte, high) = brick::code_position(row, k);
            brick[byte] |= if high { code << 4 } else { code };
        }
    }
}

fn write_pair(brick: &mut [u8], row: usize, (s, a): (u8, u8)) {
    let offset = brick::scale_offset(row);
    brick[offset] = s;
    brick[offset + 1] = a;
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
