//! What host and device agree on in the ablation: kernels that do without one of the library's ideas each, to be
//! measured beside it.

use crate::tile::{MAX_SHARED_BYTES, SPAN_K, TileShape, WARPGROUP};

/// Tokens of the tiles that the ablation has kernels for, each of 128 channels with one consumer a strip.
pub const TOKENS: [u32; 3] = [16, 64, 128];

/// The tile of this many tokens, if the ablation has kernels for it.
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

/// What QServe's dequantization subtracts from `q · s`, modulo 256, where LiquidQuant adds `a` and flips the top bit.
#[must_use]
pub const fn subtrahend(a: u8) -> u8 {
    128u8.wrapping_sub(a)
}

/// Writes the [`subtrahend`] into each pair's second byte.
pub fn to_subtrahends(pairs: &mut [u8]) {
    for pair in pairs.chunks_exact_mut(2) {
        pair[1] = subtrahend(pair[1]);
    }
}

/// The block of the explicit pipeline, in which weights go through shared memory from warpgroups that dequantize to
/// warpgroups that multiply: its tile with a ring of its own depth, and buffers of int8 weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExplicitShape {
    /// The tile and the ring.
    pub tile: TileShape,
    /// Buffers, each for a span's weights.
    pub buffers: u32,
}

impl ExplicitShape {
    /// The block for a tile: as deep a ring as fits beside the buffers.
    #[must_use]
    pub const fn of(tile: TileShape) -> Self {
        let flat = Self { tile: TileShape { stages: 0, ..tile }, buffers: 3 };
        // The buffers begin on 1,024 bytes.
        let room = MAX_SHARED_BYTES - flat.shared_bytes() - 1024;
        let stages = room / tile.stage_bytes();
        Self { tile: TileShape { stages, ..tile }, ..flat }
    }

    /// Warpgroups that dequantize; as many multiply, one of each a strip.
    #[must_use]
    pub const fn dequantizers(self) -> u32 {
        self.tile.strips
    }

    /// Threads of a block.
    #[must_use]
    pub const fn threads(self) -> u32 {
        self.tile.threads() + self.dequantizers() * WARPGROUP
    }

    /// Bytes of one strip's int8 weights in a buffer: a row of 128 bytes a channel.
    #[must_use]
    pub const fn strip_bytes(self) -> u32 {
        self.tile.channels() / self.tile.strips * SPAN_K
    }

    /// Offset of the buffers in shared memory.
    #[must_use]
    pub const fn buffers_offset(self) -> u32 {
        // The swizzle repeats every 1,024 bytes.
        self.tile.shared_bytes().next_multiple_of(1024)
    }

    /// Offset of the buffers' barriers: for each buffer and strip a full and an empty one, 8 bytes each.
    #[must_use]
    pub const fn barriers_offset(self) -> u32 {
        self.buffers_offset() + self.buffers * self.tile.strips * self.strip_bytes()
    }

    /// Dynamic shared memory of a thread block.
    #[must_use]
    pub const fn shared_bytes(self) -> u32 {
        self.barriers_offset() + self.buffers * self.tile.strips * 2 * 8
    }
}

/// Where in a strip's buffer a thread of the warpgroup that dequantizes lets `stmatrix` put its row: the 16 bytes of one
/// channel that belong to the stage's first k32 MMA. Those of MMA `i` lie at this place XOR `i` ×
/// [`EXPLICIT_MMA_BYTES`].
///
/// The four matrices of an MMA's operand are channels g and g + 8 of the lower 16 of its k, then of the upper 16. A row's
/// eight pieces of 16 bytes are permuted by the channel's low bits, the 128-byte swizzle.
#[inline(always)]
#[must_use]
pub const fn explicit_row(thread: u32) -> u32 {
    let (warp, matrix, row) = (thread / 32, thread / 8 % 4, thread % 8);
    (warp * 16 + matrix % 2 * 8 + row) * SPAN_K + ((matrix / 2) ^ row) * 16
}

/// Bytes of a channel's weights for one k32 MMA.
pub const EXPLICIT_MMA_BYTES: u32 = 32;

/// Registers of a thread where the explicit pipeline moves them: of the producer, of the warpgroups that dequantize, of
/// those that multiply.
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
        // As `stmatrix` writes: lane 4·r + c holds bytes 4·c.. of each matrix's row r, whose place lane 8·i + r gives.
        let mut buffer = [None; 64 * SPAN_K as usize];
        for (mma, thread) in
            (0..4usize).flat_map(|mma| (0..WARPGROUP as usize).map(move |thread| (mma, thread)))
        {
            for (matrix, byte) in (0..4usize).flat_map(|matrix| (0..4usize).map(move |byte| (matrix, byte))) {
                // The operand is [word 0 low, word 1 low, word 0 high, word 1 high] of the thread's codes for the MMA.
                let word = mma % 2 * 2 + matrix % 2;
                let (channel, k) = code_at(thread * 16 + word * 4 + byte, matrix / 2 == 1);
                let lane = 8 * matrix + thread % 32 / 4;
                let row = explicit_row((thread / 32 * 32 + lane) as u32) ^ (mma as u32 * EXPLICIT_MMA_BYTES);
                let place = row as usize + thread % 4 * 4 + byte;
                assert!(buffer[place].replace((channel, mma / 2 * BRICK_K + k)).is_none());
            }
        }
        for (place, weight) in buffer.into_iter().enumerate() {
            let (channel, within) = (place / SPAN_K as usize, place % SPAN_K as usize);
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
            // The registers that a block starts with are those that it can move.
            let start = 65_536 / shape.threads() / 8 * 8 * shape.threads() / WARPGROUP;
            let [producer, dequantizer, multiplier] = EXPLICIT_REGISTERS;
            if shape.tile.moves_registers() {
                assert!(producer + shape.dequantizers() * (dequantizer + multiplier) <= start);
            }
        }
        assert_eq!(tile(256), None);
    }
}
