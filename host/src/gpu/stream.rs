//! Converts packed weights to the order of device memory and back.
//! `liquidgemm_format::stream` defines that order.

use liquidgemm_format::brick::{self, CODE_BYTES, PAIR_BYTES};
use liquidgemm_format::stream::WeightStream;
use liquidgemm_format::tile::{K_TILE_BRICKS, STRIP_K_TILE_CODE_BYTES};
use rayon::prelude::*;

use crate::check::check_length;
use crate::gpu::DeviceWeights;
use crate::{Error, Group, PackedWeights};

/// The positions of the parts of packed weights `[n, k]` in device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct StreamLayout {
    stream: WeightStream,
    strips: usize,
    k_blocks: usize,
    /// Blocks of 64 along K in a group.
    group_blocks: usize,
}

/// A contiguous piece of a strip, with its byte offset in the stream and among the strip's codes or pairs.
enum Piece {
    Codes { stream: usize, packed: usize, bytes: usize },
    Pairs { stream: usize, packed: usize },
}

impl StreamLayout {
    pub(crate) fn new(n: usize, k: usize, group: Group) -> Result<Self, Error> {
        let (k_blocks, group_blocks) = (brick::k_blocks(k), group.blocks(k)?);
        let stream = WeightStream::new(k_blocks as u32, group_blocks as u32);
        Ok(Self { stream, strips: brick::strips(n), k_blocks, group_blocks })
    }

    pub(crate) fn stream(self) -> WeightStream {
        self.stream
    }

    /// Returns the bytes of all weights.
    pub(crate) fn bytes(self) -> usize {
        self.strips * self.stream.strip_bytes as usize
    }

    fn groups(self) -> usize {
        self.k_blocks.div_ceil(self.group_blocks)
    }

    /// Calls `visit` for each piece of a strip.
    fn for_each_piece(self, mut visit: impl FnMut(Piece)) {
        let WeightStream { k_tile_bytes, channel_pairs, second_pairs, .. } = self.stream;
        if channel_pairs > 0 {
            visit(Piece::Pairs { stream: 0, packed: 0 });
        }
        for (k_tile, block) in (0..self.k_blocks).step_by(K_TILE_BRICKS as usize).enumerate() {
            let place = channel_pairs as usize + k_tile * k_tile_bytes as usize;
            let bricks = (self.k_blocks - block).min(K_TILE_BRICKS as usize);
            visit(Piece::Codes { stream: place, packed: block * CODE_BYTES, bytes: bricks * CODE_BYTES });
            let first = place + STRIP_K_TILE_CODE_BYTES as usize;
            let pairs =
                [(channel_pairs == 0, first, block), (second_pairs > 0, first + PAIR_BYTES, block + 1)];
            for (exists, stream, block) in pairs {
                if exists && block < self.k_blocks {
                    visit(Piece::Pairs { stream, packed: block / self.group_blocks * PAIR_BYTES });
                }
            }
        }
    }

    /// Merges packed codes `[strips, k_blocks, 2048]` and pairs `[strips, groups, 128]` into device order.
    pub(crate) fn merge(self, codes: &[u8], pairs: &[u8]) -> Vec<u8> {
        let mut merged = vec![0; self.bytes()];
        let codes = codes.par_chunks_exact(self.k_blocks * CODE_BYTES);
        let pairs = pairs.par_chunks_exact(self.groups() * PAIR_BYTES);
        let strips = merged.par_chunks_exact_mut(self.stream.strip_bytes as usize);
        strips.zip(codes).zip(pairs).for_each(|((strip, codes), pairs)| {
            self.for_each_piece(|piece| match piece {
                Piece::Codes { stream, packed, bytes } => {
                    strip[stream..][..bytes].copy_from_slice(&codes[packed..][..bytes]);
                }
                Piece::Pairs { stream, packed } => {
                    strip[stream..][..PAIR_BYTES].copy_from_slice(&pairs[packed..][..PAIR_BYTES]);
                }
            });
        });
        merged
    }

    /// Splits the result of [`merge`](Self::merge) into codes and pairs.
    pub(crate) fn split(self, merged: &[u8]) -> (Vec<u8>, Vec<u8>) {
        let mut codes = vec![0; self.strips * self.k_blocks * CODE_BYTES];
        let mut pairs = vec![0; self.strips * self.groups() * PAIR_BYTES];
        let to_codes = codes.par_chunks_exact_mut(self.k_blocks * CODE_BYTES);
        let to_pairs = pairs.par_chunks_exact_mut(self.groups() * PAIR_BYTES);
        let strips = merged.par_chunks_exact(self.stream.strip_bytes as usize);
        strips.zip(to_codes).zip(to_pairs).for_each(|((strip, codes), pairs)| {
            self.for_each_piece(|piece| match piece {
                Piece::Codes { stream, packed, bytes } => {
                    codes[packed..][..bytes].copy_from_slice(&strip[stream..][..bytes]);
                }
                Piece::Pairs { stream, packed } => {
                    pairs[packed..][..PAIR_BYTES].copy_from_slice(&strip[stream..][..PAIR_BYTES]);
                }
            });
        });
        (codes, pairs)
    }
}

impl PackedWeights {
    /// Returns the weights as they lie in device memory that the caller owns:
    /// the strips, zeros up to a multiple of 256 bytes, and the channel scales.
    ///
    /// [`Gpu::weights_in`](crate::gpu::Gpu::weights_in) takes such memory.
    ///
    /// # Errors
    /// [`Error::TooLarge`] if the weights exceed the address space.
    pub fn device_bytes(&self) -> Result<Vec<u8>, Error> {
        let layout = StreamLayout::new(self.n(), self.k(), self.group())?;
        let bytes = DeviceWeights::bytes_for(self.n(), self.k(), self.group())?;
        let mut merged = layout.merge(self.codes(), self.pairs());
        let scales: &[u8] = bytemuck::cast_slice(self.channel_scales());
        merged.resize(bytes - scales.len(), 0);
        merged.extend_from_slice(scales);
        Ok(merged)
    }

    /// Takes weights `[n, k]` back from the bytes that [`device_bytes`](Self::device_bytes) returned.
    ///
    /// # Errors
    /// - [`Error::ShapeMismatch`] for another number of bytes.
    /// - As [`from_parts`](Self::from_parts) for bytes that are no such weights.
    pub fn from_device_bytes(bytes: &[u8], [n, k]: [usize; 2], group: Group) -> Result<Self, Error> {
        let needed = DeviceWeights::bytes_for(n, k, group)?;
        check_length("device bytes", "DeviceWeights::bytes_for", needed, bytes.len())?;
        let layout = StreamLayout::new(n, k, group)?;
        let (codes, pairs) = layout.split(&bytes[..layout.bytes()]);
        let scales = bytes[needed - n * size_of::<f32>()..].as_chunks::<4>().0;
        let scales = scales.iter().map(|&scale| f32::from_ne_bytes(scale)).collect();
        Self::from_parts(codes, pairs, scales, n, k, group)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_and_pairs_come_back_for_every_group_and_tail() {
        for k in [1, 64, 65, 128, 200, 449, 640] {
            let groups = [64, 128, 192, 256, 320].map(Group::K).into_iter().chain([Group::Channel]);
            for (n, group) in
                [1, 64, 65, 200].into_iter().flat_map(|n| groups.clone().map(move |group| (n, group)))
            {
                let layout = StreamLayout::new(n, k, group).unwrap();
                let bytes =
                    |count: usize, of: usize| (0..count).map(|at| (at * of % 251) as u8).collect::<Vec<_>>();
                let codes = bytes(n.div_ceil(64) * k.div_ceil(64) * 2048, 7);
                let pairs = bytes(n.div_ceil(64) * group.count(k).unwrap() * 128, 13);
                let merged = layout.merge(&codes, &pairs);
                assert_eq!(merged.len(), layout.bytes());
                assert_eq!(layout.split(&merged), (codes, pairs), "{n} x {k}, group {group}");
            }
        }
    }

    #[test]
    fn weights_come_back_from_their_device_bytes_and_others_are_refused() {
        for (n, k, group) in [(1, 1, Group::K(64)), (70, 200, Group::K(128)), (65, 130, Group::Channel)] {
            let values: Vec<f32> = (0..n * k).map(|i| (i as f32 * 0.37).sin()).collect();
            let weights = PackedWeights::quantize(&values, n, k, group).unwrap();
            let mut bytes = weights.device_bytes().unwrap();
            assert_eq!(PackedWeights::from_device_bytes(&bytes, [n, k], group).unwrap(), weights);
            let short = PackedWeights::from_device_bytes(&bytes[1..], [n, k], group).unwrap_err();
            assert!(matches!(short, Error::ShapeMismatch { .. }), "{short}");
            bytes.fill(0);
            let zeros = PackedWeights::from_device_bytes(&bytes, [n, k], group).unwrap_err();
            assert!(matches!(zeros, Error::InvariantBroken { .. }), "{zeros}");
        }
    }

    #[test]
    fn a_k_tile_is_the_codes_of_two_bricks_and_then_their_pairs() {
        let codes: Vec<u8> = (0..3 * 2048).map(|at| (at / 2048) as u8).collect();
        let pairs: Vec<u8> = (0..3 * 128).map(|at| 10 + (at / 128) as u8).collect();
        let merged = |group, pairs: &[u8]| StreamLayout::new(64, 192, group).unwrap().merge(&codes, pairs);
        let runs = |bytes: &[u8]| -> Vec<(u8, usize)> {
            bytes.chunk_by(|a, b| a == b).map(|run| (run[0], run.len())).collect()
        };
        assert_eq!(
            runs(&merged(Group::K(64), &pairs)),
            [(0, 2048), (1, 2048), (10, 128), (11, 128), (2, 2048), (0, 2048), (12, 128), (0, 128)]
        );
        assert_eq!(
            runs(&merged(Group::K(128), &pairs[..256])),
            [(0, 2048), (1, 2048), (10, 128), (2, 2048), (0, 2048), (11, 128)]
        );
        assert_eq!(
            runs(&merged(Group::Channel, &pairs[..128])),
            [(10, 128), (0, 2048), (1, 2048), (2, 2048), (0, 2048)]
        );
    }
}
