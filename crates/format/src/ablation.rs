//! What host and device agree on in the ablation: kernels that do without one of the library's ideas each, to be
//! measured beside it.

use crate::brick::{BRICK_BYTES, CODE_BYTES};
use crate::tile::{MAX_SHARED_BYTES, STAGE_K, TileShape, WARPGROUP};

/// Tokens of the tiles that the ablation has kernels for, each of 128 channels with one consumer a strip.
pub const TOKENS: [u32; 3] = [16, 64, 128];

/// The tile of this many tokens, if the ablation has kernels for it.
#[must_use]
pub const fn tile(tokens: u32) -> Option<TileShape> {
    let mut index = 0;
    while index < TOKENS.len() {
        if TOKENS[index] == tokens {
            return TileShape::find(2, tokens, 1);
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

/// Writes the [`subtrahend`] into each pair's second byte, in whole bricks.
pub fn to_subtrahends(bricks: &mut [u8]) {
    for brick in bricks.chunks_exact_mut(BRICK_BYTES) {
        for pair in brick[CODE_BYTES..].chunks_exact_mut(2) {
            pair[1] = subtrahend(pair[1]);
        }
    }
}

/// The block of the explicit pipeline, in which weights go through shared memory from warpgroups that dequantize to
/// warpgroups that multiply: its tile with a ring of its own depth, and buffers of int8 weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExplicitShape {
    /// The tile and the ring.
    pub tile: TileShape,
    /// Buffers, each for a stage's weights.
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
        self.tile.channels() / self.tile.strips * STAGE_K
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

/// Registers of a thread where the explicit pipeline moves them: of the producer, of the warpgroups that dequantize, of
/// those that multiply.
pub const EXPLICIT_REGISTERS: [u32; 3] = [24, 56, 168];

#[cfg(test)]
mod tests {
    use super::*;
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
        let mut bricks: Vec<u8> = (0..2 * BRICK_BYTES).map(|at| (at % 251) as u8).collect();
        let before = bricks.clone();
        to_subtrahends(&mut bricks);
        for (at, (&now, &then)) in bricks.iter().zip(&before).enumerate() {
            let in_brick = at % BRICK_BYTES;
            let is_second = in_brick >= CODE_BYTES && in_brick % 2 == 1;
            assert_eq!(now, if is_second { subtrahend(then) } else { then }, "byte {at}");
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
