//! The kernel's tile shapes and how each lays out shared memory, so that the host asks for what the device
//! carves up.
//!
//! A thread block computes 128 channels × `tokens` of the output: two consumer warpgroups, a 64-channel strip
//! each. A pipeline stage holds 128 of K: the activation tile, then each strip's bricks. The blocks of a cluster
//! lie side by side along the channels and share the activation tile: each loads its part of it for all.

use crate::brick::{BRICK_BYTES, BRICK_CHANNELS, BRICK_K};

/// Consumer warpgroups in a thread block.
pub const CONSUMERS: u32 = 2;
/// Threads of a warpgroup.
pub const WARPGROUP: u32 = 128;
/// Output channels of a thread block's tile.
pub const TILE_CHANNELS: u32 = CONSUMERS * BRICK_CHANNELS as u32;
/// Bricks along K in one stage.
pub const STAGE_BRICKS: u32 = 2;
/// K extent of a stage; in int8 also the bytes of an activation row, one 128-byte swizzle span.
pub const STAGE_K: u32 = STAGE_BRICKS * BRICK_K as u32;
/// Bytes of one strip's bricks in a stage.
pub const STRIP_STAGE_BYTES: u32 = STAGE_BRICKS * BRICK_BYTES as u32;
/// Shared memory that a thread block may ask for on compute capability 9.0.
pub const MAX_SHARED_BYTES: u32 = 232_448;
/// Shared memory of a multiprocessor, of which each resident block also takes 1 KiB for the system.
const MULTIPROCESSOR_SHARED_BYTES: u32 = 233_472;
/// The most thread blocks of a cluster.
pub const MAX_CLUSTER: u32 = 4;

/// A token tile and the depth of its ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TileShape {
    /// Tokens of the tile: the n of the wgmma instruction.
    pub tokens: u32,
    /// Stages of the ring.
    pub stages: u32,
}

/// Every tile shape that has a kernel, from the smallest.
///
/// Up to 32 tokens two blocks fit on a multiprocessor, so that the next launch can fill its ring while the last
/// one drains.
pub const TILE_SHAPES: [TileShape; 6] = [
    TileShape { tokens: 8, stages: 11 },
    TileShape { tokens: 16, stages: 10 },
    TileShape { tokens: 32, stages: 8 },
    TileShape { tokens: 64, stages: 12 },
    TileShape { tokens: 128, stages: 8 },
    TileShape { tokens: 256, stages: 5 },
];

impl TileShape {
    /// The shape with this many tokens.
    #[must_use]
    pub const fn with_tokens(tokens: u32) -> Option<Self> {
        let mut index = 0;
        while index < TILE_SHAPES.len() {
            if TILE_SHAPES[index].tokens == tokens {
                return Some(TILE_SHAPES[index]);
            }
            index += 1;
        }
        None
    }

    /// Whether the producer is a whole warpgroup that gives registers to the consumers, as large accumulators
    /// need it, or just its two warps.
    #[must_use]
    pub const fn moves_registers(self) -> bool {
        self.tokens >= 128
    }

    /// Threads of a block.
    #[must_use]
    pub const fn threads(self) -> u32 {
        CONSUMERS * WARPGROUP + if self.moves_registers() { WARPGROUP } else { 64 }
    }

    /// Blocks that fit on a multiprocessor.
    #[must_use]
    pub const fn blocks_per_multiprocessor(self) -> u32 {
        MULTIPROCESSOR_SHARED_BYTES / (self.shared_bytes() + 1024)
    }

    /// The largest cluster: every block must load whole groups of eight tokens, which the swizzle permutes.
    #[must_use]
    pub const fn max_cluster(self) -> u32 {
        if self.tokens / 8 < MAX_CLUSTER { self.tokens / 8 } else { MAX_CLUSTER }
    }

    /// Bytes of a stage's activation tile.
    #[must_use]
    pub const fn activation_bytes(self) -> u32 {
        self.tokens * STAGE_K
    }

    /// Offset of the weight stages in shared memory; the activation stages lie at 0.
    #[must_use]
    pub const fn weights_offset(self) -> u32 {
        self.stages * self.activation_bytes()
    }

    /// Tokens that a consumer transposes at a time in the epilogue.
    #[must_use]
    pub const fn epilogue_tokens(self) -> u32 {
        if self.tokens < 64 { self.tokens } else { 64 }
    }

    /// Bytes of one consumer's transposition buffer: 64 channels of 2 bytes a token.
    #[must_use]
    pub const fn epilogue_bytes(self) -> u32 {
        self.epilogue_tokens() * 128
    }

    /// Offset of the consumers' transposition buffers.
    #[must_use]
    pub const fn epilogue_offset(self) -> u32 {
        // Kept on 128 bytes, the span that the transposition's swizzle permutes.
        (self.weights_offset() + self.stages * CONSUMERS * STRIP_STAGE_BYTES).next_multiple_of(128)
    }

    /// Offset of the consumers' token scales, `tokens` f32 each.
    #[must_use]
    pub const fn token_scales_offset(self) -> u32 {
        self.epilogue_offset() + CONSUMERS * self.epilogue_bytes()
    }

    /// Offset of the consumers' channel scales and biases, two f32 a channel.
    #[must_use]
    pub const fn channels_offset(self) -> u32 {
        self.token_scales_offset() + CONSUMERS * self.tokens * 4
    }

    /// Offset of the full barriers, 8 bytes each; the empty barriers follow.
    #[must_use]
    pub const fn barriers_offset(self) -> u32 {
        self.channels_offset() + TILE_CHANNELS * 8
    }

    /// Dynamic shared memory of a thread block.
    #[must_use]
    pub const fn shared_bytes(self) -> u32 {
        self.barriers_offset() + 2 * self.stages * 8
    }

    /// Bytes of the int32 partial sums that a block hands to a tile's owner.
    #[must_use]
    pub const fn partial_bytes(self) -> u32 {
        TILE_CHANNELS * self.tokens * 4
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shape_fits_shared_memory_and_keeps_its_alignments() {
        for shape in TILE_SHAPES {
            assert!(shape.shared_bytes() <= MAX_SHARED_BYTES, "{shape:?} takes {}", shape.shared_bytes());
            assert_eq!(shape.activation_bytes() % 1024, 0, "128-byte swizzle repeats every 1,024 bytes");
            assert_eq!(shape.weights_offset() % 16, 0, "bulk copies land on 16 bytes");
            assert_eq!(shape.barriers_offset() % 8, 0);
        }
    }

    #[test]
    fn two_small_blocks_share_a_multiprocessor_and_keep_its_memory_busy() {
        for shape in TILE_SHAPES.iter().filter(|shape| shape.tokens <= 32) {
            assert_eq!(shape.blocks_per_multiprocessor(), 2, "{shape:?} takes {}", shape.shared_bytes());
            assert!(2 * shape.stages * CONSUMERS * STRIP_STAGE_BYTES >= 96 * 1024);
        }
    }

    #[test]
    fn the_tile_of_a_cluster_divides_into_whole_swizzle_atoms() {
        for shape in TILE_SHAPES {
            assert_eq!(shape.tokens / shape.max_cluster() % 8, 0);
        }
    }
}
