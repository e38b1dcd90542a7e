//! The skinny kernels, for up to 32 tokens: the channels of each thread block, and the shared-memory layout.
//!
//! `host/src/plan/skinny.rs` plans their launches. The kernels are in `kernels-gpu/src/skinny`.
//!
//! Channels come in **m16 tiles** of 16. The m16 tile is one warp's part of a brick.
//! A thread block owns a run of m16 tiles and computes them over the whole K,
//! so it never hands sums to another thread block.
//! It makes as many **passes** over K as its m16 tiles need.
//! Within a pass, the K-tiles go round robin to the warps of the thread block.
//!
//! Each warp has two rings of its own, one for weights and one for activations.
//! At the end of a pass the warps add up their sums in the memory of the activation rings.

use crate::brick::{BRICK_CHANNELS, CODE_BYTES, PAIR_BYTES};
use crate::tile::K_TILE;

/// Output channels per m16 tile, which are the rows of one MMA.
pub const M16_CHANNELS: u32 = 16;
/// M16 tiles per strip.
pub const STRIP_M16_TILES: u32 = BRICK_CHANNELS as u32 / M16_CHANNELS;
/// Bytes of an m16 tile's codes in a brick.
pub const M16_CODE_BYTES: u32 = CODE_BYTES as u32 / STRIP_M16_TILES;
/// Bytes of an m16 tile's pairs in a brick.
pub const M16_PAIR_BYTES: u32 = PAIR_BYTES as u32 / STRIP_M16_TILES;
/// Warps per thread block. They share K.
pub const WARPS: u32 = 8;
/// Threads per thread block.
pub const THREADS: u32 = WARPS * 32;
/// Tokens per MMA.
pub const GROUP_TOKENS: u32 = 8;
/// Bytes from one token to the next in 16 channels × 8 tokens of sums.
/// Four words of padding between the rows avoid bank conflicts,
/// both in access by accumulator fragments and in access by rows.
pub const SUMS_TOKEN_BYTES: u32 = (M16_CHANNELS + 4) * 4;
/// Bytes of 16 channels × 8 tokens of sums.
pub const SUMS_BYTES: u32 = GROUP_TOKENS * SUMS_TOKEN_BYTES;
/// Shared memory of an SM.
const MULTIPROCESSOR_SHARED_BYTES: u32 = 233_472;
/// Shared memory that the system takes for each resident thread block.
const SYSTEM_SHARED_BYTES: u32 = 1024;
/// The most dynamic shared memory of a thread block that lets the thread blocks of two launches share an SM.
/// The later launch fills its rings while the earlier one ends.
pub const MAX_BLOCK_SHARED_BYTES: u32 = MULTIPROCESSOR_SHARED_BYTES / 2 - SYSTEM_SHARED_BYTES;

/// The parameters that a skinny kernel was compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SkinnyShape {
    /// The most m16 tiles per pass.
    pub m16_tiles: u32,
    /// Tokens of the whole batch, a multiple of 8.
    pub tokens: u32,
    /// Bricks along K in a stage of weights: the two of a K-tile, or one.
    pub stage_bricks: u32,
    /// Stages of a warp's activation ring.
    pub activation_stages: u32,
}

const fn shape(m16_tiles: u32, tokens: u32, stage_bricks: u32, activation_stages: u32) -> SkinnyShape {
    SkinnyShape { m16_tiles, tokens, stage_bricks, activation_stages }
}

/// Calls the macro `$callback` with every shape that has a kernel, ordered by tokens, then by channels.
///
/// This is the only list of shapes.
/// The kernels' entry points, the embedded PTX
/// and [`SKINNY_SHAPES`](crate::skinny::SKINNY_SHAPES) follow from it.
///
/// Each line is `entry: m16_tiles, tokens, bricks along K in a stage, stages of activations;`.
///
/// A stage with a whole K-tile needs fewer barriers and gives more work between them.
/// With many m16 tiles, such stages would be so large that the ring had too few of them.
#[macro_export]
macro_rules! skinny_shapes {
    ($callback:ident) => {
        $callback! {
            skinny_32x8: 2, 8, 2, 3;
            skinny_64x8: 4, 8, 1, 3;
            skinny_96x8: 6, 8, 1, 2;
            skinny_32x16: 2, 16, 2, 2;
            skinny_64x16: 4, 16, 1, 2;
            skinny_96x16: 6, 16, 1, 2;
            skinny_32x32: 2, 32, 1, 2;
        }
    };
}

macro_rules! shapes {
    ($($entry:ident: $m16_tiles:literal, $tokens:literal, $stage_bricks:literal, $stages:literal;)*) => {
        /// Every shape that has a kernel, ordered by tokens, then by channels.
        pub const SKINNY_SHAPES: [SkinnyShape; [$($tokens),*].len()] = [$(shape($m16_tiles, $tokens, $stage_bricks, $stages)),*];

        /// The names of the kernels' entry points, in the order of [`SKINNY_SHAPES`].
        pub const SKINNY_ENTRIES: [&str; SKINNY_SHAPES.len()] = [$(stringify!($entry)),*];
    };
}
skinny_shapes!(shapes);

impl SkinnyShape {
    /// Returns the shape with this many m16 tiles and tokens, if it has a kernel.
    #[must_use]
    pub const fn find(m16_tiles: u32, tokens: u32) -> Option<Self> {
        let mut index = 0;
        while index < SKINNY_SHAPES.len() {
            let shape = SKINNY_SHAPES[index];
            if shape.m16_tiles == m16_tiles && shape.tokens == tokens {
                return Some(shape);
            }
            index += 1;
        }
        None
    }

    /// Returns the output channels of a pass.
    #[must_use]
    pub const fn channels(self) -> u32 {
        self.m16_tiles * M16_CHANNELS
    }

    /// Returns the bytes of a stage of activations: one swizzled row per token.
    #[must_use]
    pub const fn activation_stage_bytes(self) -> u32 {
        self.tokens * K_TILE
    }

    /// Returns the bytes of a warp's activation ring.
    #[must_use]
    pub const fn activation_ring_bytes(self) -> u32 {
        self.activation_stages * self.activation_stage_bytes()
    }

    /// Returns the m16 tiles whose sums a warp stores in its activation ring at a time.
    #[must_use]
    pub const fn sum_m16_tiles(self) -> u32 {
        let fit = self.activation_ring_bytes() / (self.tokens / GROUP_TOKENS * SUMS_BYTES);
        if fit < self.m16_tiles { fit } else { self.m16_tiles }
    }

    /// Returns the offset of the pairs within a stage of weights, behind the codes.
    /// The pairs lie m16 tile by m16 tile. Those of a second brick follow those of the first.
    #[must_use]
    pub const fn pairs_offset(self) -> u32 {
        self.stage_bricks * self.m16_tiles * M16_CODE_BYTES
    }

    /// Returns the bytes of a stage of weights.
    #[must_use]
    pub const fn weight_stage_bytes(self) -> u32 {
        self.pairs_offset() + self.stage_bricks * self.m16_tiles * M16_PAIR_BYTES
    }

    /// Returns the stages of a warp's weight ring, which are as many as fit.
    #[must_use]
    pub const fn weight_stages(self) -> u32 {
        let others = self.weights_offset() + self.barriers_bytes() + self.channels() * 8 + self.tokens * 4;
        (MAX_BLOCK_SHARED_BYTES - others) / WARPS / self.weight_stage_bytes()
    }

    /// Returns the offset of the warps' weight rings. The activation rings lie at offset 0.
    #[must_use]
    pub const fn weights_offset(self) -> u32 {
        WARPS * self.activation_ring_bytes()
    }

    /// Returns the bytes of a warp's weight ring.
    #[must_use]
    pub const fn weight_ring_bytes(self) -> u32 {
        self.weight_stages() * self.weight_stage_bytes()
    }

    /// Returns the offset of the scales and biases of a pass's channels: two f32 per channel.
    #[must_use]
    pub const fn channels_offset(self) -> u32 {
        self.weights_offset() + WARPS * self.weight_ring_bytes()
    }

    /// Returns the offset of the token scales: one f32 per token.
    #[must_use]
    pub const fn token_scales_offset(self) -> u32 {
        self.channels_offset() + self.channels() * 8
    }

    /// Returns the offset of the barriers: 8 bytes for each activation stage of each warp.
    #[must_use]
    pub const fn barriers_offset(self) -> u32 {
        self.token_scales_offset() + self.tokens * 4
    }

    const fn barriers_bytes(self) -> u32 {
        WARPS * self.activation_stages * 8
    }

    /// Returns the dynamic shared memory of a thread block.
    #[must_use]
    pub const fn shared_bytes(self) -> u32 {
        self.barriers_offset() + self.barriers_bytes()
    }
}

/// The assignment of m16 tiles to thread blocks: runs whose lengths differ by at most one.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TileRuns {
    /// M16 tiles that every thread block has; 0 if there are more thread blocks than m16 tiles.
    pub each: u32,
    /// Number of thread blocks, the first ones, that have one m16 tile more.
    pub larger: u32,
    /// M16 tiles per pass. The last pass of a thread block may have fewer.
    pub pass: u32,
}

impl TileRuns {
    /// Deals `m16_tiles` to `blocks` thread blocks, in as few passes as possible.
    /// A pass has at most `most` m16 tiles. None of the three may be 0.
    #[must_use]
    pub const fn new(m16_tiles: u32, blocks: u32, most: u32) -> Self {
        let largest = m16_tiles.div_ceil(blocks);
        let passes = largest.div_ceil(most);
        Self { each: m16_tiles / blocks, larger: m16_tiles % blocks, pass: largest.div_ceil(passes) }
    }

    /// Returns a thread block's first m16 tile and one past its last.
    #[inline(always)]
    #[must_use]
    pub const fn of_block(self, block: u32) -> (u32, u32) {
        let before = if block < self.larger { block } else { self.larger };
        let begin = block * self.each + before;
        (begin, begin + self.each + (block < self.larger) as u32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::brick::BRICK_K;
    use crate::tile::K_TILE_BRICKS;
    use proptest::prelude::*;

    #[test]
    fn thread_blocks_of_two_launches_fit_on_an_sm() {
        for shape in SKINNY_SHAPES {
            assert!(
                shape.shared_bytes() <= MAX_BLOCK_SHARED_BYTES,
                "{shape:?} takes {}",
                shape.shared_bytes()
            );
        }
    }

    #[test]
    fn rings_are_aligned_deep_enough_and_hold_the_sums() {
        for shape in SKINNY_SHAPES {
            assert!(shape.weight_stages() >= 2 && shape.activation_stages >= 2, "{shape:?}");
            assert_eq!(
                shape.activation_stage_bytes() % 1024,
                0,
                "128-byte swizzle repeats every 1,024 bytes"
            );
            assert_eq!(K_TILE_BRICKS % shape.stage_bricks, 0, "{shape:?}");
            assert_eq!((shape.weight_stage_bytes() % 16, shape.channels_offset() % 16), (0, 0));
            assert_eq!(shape.barriers_offset() % 8, 0);
            assert!(shape.sum_m16_tiles() >= 1, "{shape:?}");
            assert!(shape.channels() <= THREADS && shape.tokens <= THREADS, "{shape:?}");
            assert!(2 * shape.stage_bricks * shape.m16_tiles <= 32, "a warp copies a stage's pairs at once");
        }
    }

    #[test]
    fn an_m16_tile_is_one_warps_part_of_a_brick() {
        use crate::brick::{code_position, pair_offset};
        for channel in 0..BRICK_CHANNELS {
            let m16_tile = channel as u32 / M16_CHANNELS;
            for k in 0..BRICK_K {
                assert_eq!(code_position(channel, k).0 as u32 / M16_CODE_BYTES, m16_tile);
            }
            assert_eq!(pair_offset(channel) as u32 / M16_PAIR_BYTES, m16_tile);
        }
    }

    proptest! {
        #[test]
        fn every_m16_tile_has_one_thread_block_and_runs_are_even(
            m16_tiles in 1..100_000u32, blocks in 1..200u32, most in 1..8u32,
        ) {
            let runs = TileRuns::new(m16_tiles, blocks, most);
            let mut next = 0;
            for block in 0..blocks {
                let (begin, end) = runs.of_block(block);
                prop_assert_eq!(begin, next);
                prop_assert!(end - begin >= m16_tiles / blocks && end - begin <= m16_tiles.div_ceil(blocks));
                prop_assert!((end - begin).div_ceil(runs.pass) <= m16_tiles.div_ceil(blocks).div_ceil(most));
                next = end;
            }
            prop_assert_eq!(next, m16_tiles);
            prop_assert!(runs.pass >= 1 && runs.pass <= most);
        }
    }
}
