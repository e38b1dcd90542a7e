//! The definitions that host and device share in the ablation.
//! Each of its kernels does without one of the library's ideas and is measured beside the library's kernel.
//!
//! The kernels are in `kernels-gpu/src/ablation`, the measurements in `crates/bench/src/ablation`.

use crate::tile::{K_TILE, MAX_SHARED_BYTES, TileShape, WARPGROUP};

/// Tokens of the tiles that the ablation has kernels for. Each has 128 channels and one consumer per strip.
pub const TOKENS: [u32; 3] = [16, 64, 128];

/// Returns the tile with this many tokens, if the ablation has kernels for it.
#[must_use]
pub const fn tile(tokens: u32) -> Option<TileShape> {
    let mut index = 0;
    while index < TOKENS.len() {
        if TOKENS[index] == tokens {
            return TileShape::find(2, tokens, 1, 1);
        }
        index += 1;
    }
    None
}

/// Returns the value that QServe's dequantization subtracts from `q · s`, modulo 256.
/// LiquidQuant instead adds `a` and flips the top bit.
#[must_use]
pub const fn subtrahend(a: u8) -> u8 {
    128u8.wrapping_sub(a)
}

/// Replaces the second byte of each pair by its [`subtrahend`].
pub fn to_subtrahends(pairs: &mut [u8]) {
    for pair in pairs.chunks_exact_mut(2) {
        pair[1] = subtrahend(pair[1]);
    }
}

/// The thread block of the explicit pipeline.
///
/// Some of its warpgroups dequantize weights into shared memory, and others multiply from there.
/// It has its tile with a ring of its own depth, and buffers of int8 weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExplicitShape {
    /// The tile and the ring.
    pub tile: TileShape,
    /// Number of buffers. Each holds the weights of one K-tile.
    pub buffers: u32,
}

impl ExplicitShape {
    /// Returns the thread block for a tile. Its ring is as deep as fits beside the buffers.
    #[must_use]
    pub const fn of(tile: TileShape) -> Self {
        let flat = Self { tile: TileShape { stages: 0, ..tile }, buffers: 3 };
        // The buffers start at a multiple of 1,024 bytes.
        let room = MAX_SHARED_BYTES - flat.shared_bytes() - 1024;
        let stages = room / tile.stage_bytes();
        Self { tile: TileShape { stages, ..tile }, ..flat }
    }

    /// Returns the number of warpgroups that dequantize, one per strip. As many warpgroups multiply.
    #[must_use]
    pub const fn dequantizers(self) -> u32 {
        self.tile.strips
    }

    /// Returns the threads of a thread block.
    #[must_use]
    pub const fn threads(self) -> u32 {
        self.tile.threads() + self.dequantizers() * WARPGROUP
    }

    /// Returns the bytes of one strip's int8 weights in a buffer: a row of 128 bytes per channel.
    #[must_use]
    pub const fn strip_bytes(self) -> u32 {
        self.tile.channels() / self.tile.strips * K_TILE
    }

    /// Returns the offset of the buffers in shared memory.
    #[must_use]
    pub const fn buffers_offset(self) -> u32 {
        // The swizzle repeats every 1,024 bytes.
        self.tile.shared_bytes().next_multiple_of(1024)
    }

    /// Returns the offset of the buffers' barriers.
    /// Each buffer has a full and an empty barrier for each strip, 8 bytes each.
    #[must_use]
    pub const fn barriers_offset(self) -> u32 {
        self.buffers_offset() + self.buffers * self.tile.strips * self.strip_bytes()
    }

    /// Returns the dynamic shared memory of a thread block.
    #[must_use]
    pub const fn shared_bytes(self) -> u32 {
        self.barriers_offset() + self.buffers * self.tile.strips * 2 * 8
    }
}

/// Returns the offset in a strip's buffer of the row whose address a dequantizing thread gives to `stmatrix`.
///
/// The row is 16 bytes of one channel, for the first k32 MMA of the K-tile.
/// The row for MMA `i` lies at this offset XOR `i` × [`EXPLICIT_MMA_BYTES`].
///
/// An MMA's operand consists of four matrices:
/// channels g and g + 8 of its lower 16 k, then the same channels of its upper 16 k.
/// The low bits of the channel permute the eight 16-byte pieces of a row (128-byte swizzle).
#[inline(always)]
#[must_use]
pub const fn explicit_row(thread: u32) -> u32 {
    let (warp, matrix, row) = (thread / 32, thread / 8 % 4, thread % 8);
    (warp * 16 + matrix % 2 * 8 + row) * K_TILE + ((matrix / 2) ^ row) * 16
}

/// Bytes of a channel's weights for one k32 MMA.
pub const EXPLICIT_MMA_BYTES: u32 = 32;

/// Registers per thread if the explicit pipeline moves registers:
/// of the producer, of the dequantizing warpgroups and of the multiplying warpgroups.
pub const EXPLICIT_REGISTERS: [u32; 3] = [24, 56, 168];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::brick::{BRICK_K, PAIR_BYTES, code_at};
    use crate::dequant::{dequantize, is_valid_pair};

    #[test]
    fn subtracting_gives_the_same_weights_for_every_valid_code_and_pair() {
        for (s, a) in (0..=255u8).flat_map(|s| (0..=255u8).map(move |a| (s, a))) {
            for q in (0..16u8).filter(|_| is_valid_pair(s, a)) {
                assert_eq!((q * s).wrapping_sub(subtrahend(a)) as i8, dequantize(q, s, a));
            }
        }
    }

    #[test]
    fn only_the_second_byte_of_each_pair_changes() {
        let mut pairs: Vec<u8> = (0..2 * PAIR_BYTES).map(|at| (at % 251) as u8).collect();
        let before = pairs.clone();
        to_subtrahends(&mut pairs);
        for (at, (&now, &then)) in pairs.iter().zip(&before).enumerate() {
            assert_eq!(now, if at % 2 == 1 { subtrahend(then) } else { then }, "byte {at}");
        }
    }

    #[test]
    fn dequantized_weights_lie_swizzled_by_channel_and_k() {
        // `stmatrix`: lane 4·r + c holds bytes 4·c.. of row r of each matrix.
        // Lane 8·i + r holds the address of row r of matrix i.
        let mut buffer = [None; 64 * K_TILE as usize];
        for (mma, thread) in
            (0..4usize).flat_map(|mma| (0..WARPGROUP as usize).map(move |thread| (mma, thread)))
        {
            for (matrix, byte) in (0..4usize).flat_map(|matrix| (0..4usize).map(move |byte| (matrix, byte))) {
                // The operand is the thread's codes for the MMA:
                // [word 0 low, word 1 low, word 0 high, word 1 high].
                let word = mma % 2 * 2 + matrix % 2;
                let (channel, k) = code_at(thread * 16 + word * 4 + byte, matrix / 2 == 1);
                let lane = 8 * matrix + thread % 32 / 4;
                let row = explicit_row((thread / 32 * 32 + lane) as u32) ^ (mma as u32 * EXPLICIT_MMA_BYTES);
                let place = row as usize + thread % 4 * 4 + byte;
                assert!(buffer[place].replace((channel, mma / 2 * BRICK_K + k)).is_none());
            }
        }
        for (place, weight) in buffer.into_iter().enumerate() {
            let (channel, within) = (place / K_TILE as usize, place % K_TILE as usize);
            let piece = (within / 16) ^ (channel % 8);
            assert_eq!(weight, Some((channel, piece * 16 + within % 16)));
        }
    }

    #[test]
    fn explicit_blocks_fit_shared_memory_and_the_register_file() {
        for tokens in TOKENS {
            let shape = ExplicitShape::of(tile(tokens).unwrap());
            assert!(shape.shared_bytes() <= MAX_SHARED_BYTES, "{shape:?} takes {}", shape.shared_bytes());
            assert!(shape.tile.stages >= 4 && shape.threads() <= 1024, "{shape:?}");
            assert_eq!(shape.barriers_offset() % 8, 0);
            // A thread block can only move the registers that it starts with.
            let start = 65_536 / shape.threads() / 8 * 8 * shape.threads() / WARPGROUP;
            let [producer, dequantizer, multiplier] = EXPLICIT_REGISTERS;
            if shape.tile.moves_registers() {
                assert!(producer + shape.dequantizers() * (dequantizer + multiplier) <= start);
            }
        }
        assert_eq!(tile(256), None);
    }
}
