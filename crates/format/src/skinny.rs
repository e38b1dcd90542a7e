//! The kernel for few tokens: which channels each thread block computes, and how a block's shared memory is laid out.
//!
//! Channels come in **units** of 16, a warp's share of a brick. A block owns a run of units and computes them over the
//! whole K, so that no sums are ever handed to another block; it takes as many **passes** over K as its units need. Within
//! a pass the steps of two bricks along K go round robin to the block's warps. Each warp has rings of its own, one for weights
//! and one for activations, and in the end the warps' sums meet in the memory of the activations' rings.

use crate::brick::{BRICK_CHANNELS, BRICK_K, CODE_BYTES, PAIR_BYTES};

/// Output channels of a unit, the rows of one MMA.
pub const UNIT_CHANNELS: u32 = 16;
/// Units of a strip.
pub const STRIP_UNITS: u32 = BRICK_CHANNELS as u32 / UNIT_CHANNELS;
/// Bytes of a unit's codes in a brick.
pub const UNIT_CODE_BYTES: u32 = CODE_BYTES as u32 / STRIP_UNITS;
/// Bytes of a unit's pairs in a brick.
pub const UNIT_PAIR_BYTES: u32 = PAIR_BYTES as u32 / STRIP_UNITS;
/// Bricks along K in a step.
pub const STEP_BRICKS: u32 = 2;
/// Elements along K in a step: the 128 bytes that the activations' swizzle spans.
pub const STEP_K: u32 = STEP_BRICKS * BRICK_K as u32;
/// Warps of a block, which share K.
pub const WARPS: u32 = 8;
/// Threads of a block.
pub const THREADS: u32 = WARPS * 32;
/// Tokens of one MMA.
pub const GROUP_TOKENS: u32 = 8;
/// Bytes from one token to the next in a block of 16 channels × 8 tokens of sums: with four words between the rows,
/// neither the MMA's fragments nor the rows themselves meet bank conflicts.
pub const SUMS_TOKEN_BYTES: u32 = (UNIT_CHANNELS + 4) * 4;
/// Bytes of a block of 16 channels × 8 tokens of sums.
pub const SUMS_BYTES: u32 = GROUP_TOKENS * SUMS_TOKEN_BYTES;
/// Shared memory of a multiprocessor.
const MULTIPROCESSOR_SHARED_BYTES: u32 = 233_472;
/// What the system takes of it for each resident block.
const SYSTEM_SHARED_BYTES: u32 = 1024;
/// Dynamic shared memory that a block may have if the blocks of two launches are to share a multiprocessor: the later one
/// fills its rings while the earlier one ends.
pub const MAX_BLOCK_SHARED_BYTES: u32 = MULTIPROCESSOR_SHARED_BYTES / 2 - SYSTEM_SHARED_BYTES;

/// What a kernel for few tokens was compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SkinnyShape {
    /// The most units of a pass.
    pub units: u32,
    /// Tokens, a multiple of 8: the whole batch.
    pub tokens: u32,
    /// Bricks along K in a stage of weights: all of a step's, or one.
    pub stage_bricks: u32,
    /// Stages of a warp's ring of activations.
    pub activation_stages: u32,
}

const fn shape(units: u32, tokens: u32, stage_bricks: u32, activation_stages: u32) -> SkinnyShape {
    SkinnyShape { units, tokens, stage_bricks, activation_stages }
}

/// Every shape that has a kernel, by tokens and then by units.
///
/// With a whole step to a stage there are fewer barriers and more to do between them; where a step's weights are many, that
/// would leave too few stages.
pub const SKINNY_SHAPES: [SkinnyShape; 7] = [
    shape(2, 8, 2, 3),
    shape(4, 8, 1, 3),
    shape(6, 8, 1, 2),
    shape(2, 16, 2, 2),
    shape(4, 16, 1, 2),
    shape(6, 16, 1, 2),
    shape(2, 32, 1, 2),
];

impl SkinnyShape {
    /// The shape with so many units and tokens, if it has a kernel.
    #[must_use]
    pub const fn find(units: u32, tokens: u32) -> Option<Self> {
        let mut index = 0;
        while index < SKINNY_SHAPES.len() {
            let shape = SKINNY_SHAPES[index];
            if shape.units == units && shape.tokens == tokens {
                return Some(shape);
            }
            index += 1;
        }
        None
    }

    /// Output channels of a pass.
    #[must_use]
    pub const fn channels(self) -> u32 {
        self.units * UNIT_CHANNELS
    }

    /// Bytes of a stage of activations: a row for each token, swizzled.
    #[must_use]
    pub const fn activation_stage_bytes(self) -> u32 {
        self.tokens * STEP_K
    }

    /// Bytes of a warp's ring of activations.
    #[must_use]
    pub const fn activation_ring_bytes(self) -> u32 {
        self.activation_stages * self.activation_stage_bytes()
    }

    /// Units whose sums a warp puts in its ring of activations at a time.
    #[must_use]
    pub const fn sum_units(self) -> u32 {
        let fit = self.activation_ring_bytes() / (self.tokens / GROUP_TOKENS * SUMS_BYTES);
        if fit < self.units { fit } else { self.units }
    }

    /// Offset of the pairs in a stage of weights, behind the codes; unit by unit, a second brick's behind the first's.
    #[must_use]
    pub const fn pairs_offset(self) -> u32 {
        self.stage_bricks * self.units * UNIT_CODE_BYTES
    }

    /// Bytes of a stage of weights.
    #[must_use]
    pub const fn weight_stage_bytes(self) -> u32 {
        self.pairs_offset() + self.stage_bricks * self.units * UNIT_PAIR_BYTES
    }

    /// Stages of a warp's ring of weights: as many as fit.
    #[must_use]
    pub const fn weight_stages(self) -> u32 {
        let others = self.weights_offset() + self.barriers_bytes() + self.channels() * 8 + self.tokens * 4;
        (MAX_BLOCK_SHARED_BYTES - others) / WARPS / self.weight_stage_bytes()
    }

    /// Offset of the warps' rings of weights. Those of activations lie at 0.
    #[must_use]
    pub const fn weights_offset(self) -> u32 {
        WARPS * self.activation_ring_bytes()
    }

    /// Bytes of a warp's ring of weights.
    #[must_use]
    pub const fn weight_ring_bytes(self) -> u32 {
        self.weight_stages() * self.weight_stage_bytes()
    }

    /// Offset of scale and bias of the pass's channels, two f32 each.
    #[must_use]
    pub const fn channels_offset(self) -> u32 {
        self.weights_offset() + WARPS * self.weight_ring_bytes()
    }

    /// Offset of the tokens' scales, f32 each.
    #[must_use]
    pub const fn token_scales_offset(self) -> u32 {
        self.channels_offset() + self.channels() * 8
    }

    /// Offset of the barriers, 8 bytes for each warp and stage of activations.
    #[must_use]
    pub const fn barriers_offset(self) -> u32 {
        self.token_scales_offset() + self.tokens * 4
    }

    const fn barriers_bytes(self) -> u32 {
        WARPS * self.activation_stages * 8
    }

    /// Dynamic shared memory of a block.
    #[must_use]
    pub const fn shared_bytes(self) -> u32 {
        self.barriers_offset() + self.barriers_bytes()
    }
}

/// How units are dealt out to thread blocks: runs that differ by one unit at most.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnitShares {
    /// Units of every block; 0 where there are more blocks than units.
    pub each: u32,
    /// Blocks, the first ones, that have one more.
    pub larger: u32,
    /// Units of a pass; the last pass of a block may have fewer.
    pub pass: u32,
}

impl UnitShares {
    /// Deals `units` to `blocks`, in as few passes of at most `most` units as will do. None of the three is 0.
    #[must_use]
    pub const fn new(units: u32, blocks: u32, most: u32) -> Self {
        let largest = units.div_ceil(blocks);
        let passes = largest.div_ceil(most);
        Self { each: units / blocks, larger: units % blocks, pass: largest.div_ceil(passes) }
    }

    /// The first unit of a block, and the one behind its last.
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
    use proptest::prelude::*;

    #[test]
    fn the_blocks_of_two_launches_share_a_multiprocessor() {
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
            assert_eq!(STEP_BRICKS % shape.stage_bricks, 0, "{shape:?}");
            assert_eq!((shape.weight_stage_bytes() % 16, shape.channels_offset() % 16), (0, 0));
            assert_eq!(shape.barriers_offset() % 8, 0);
            assert!(shape.sum_units() >= 1, "{shape:?}");
            assert!(shape.channels() <= THREADS && shape.tokens <= THREADS, "{shape:?}");
            assert!(2 * shape.stage_bricks * shape.units <= 32, "a warp copies a stage's pairs at once");
        }
    }

    #[test]
    fn a_unit_is_what_one_warp_holds_of_a_brick() {
        use crate::brick::{code_position, pair_offset};
        for channel in 0..BRICK_CHANNELS {
            let unit = channel as u32 / UNIT_CHANNELS;
            for k in 0..BRICK_K {
                assert_eq!(code_position(channel, k).0 as u32 / UNIT_CODE_BYTES, unit);
            }
            assert_eq!(pair_offset(channel) as u32 / UNIT_PAIR_BYTES, unit);
        }
    }

    proptest! {
        #[test]
        fn every_unit_has_one_block_and_shares_are_even(
            units in 1..100_000u32, blocks in 1..200u32, most in 1..8u32,
        ) {
            let shares = UnitShares::new(units, blocks, most);
            let mut next = 0;
            for block in 0..blocks {
                let (begin, end) = shares.of_block(block);
                prop_assert_eq!(begin, next);
                prop_assert!(end - begin >= units / blocks && end - begin <= units.div_ceil(blocks));
                prop_assert!((end - begin).div_ceil(shares.pass) <= units.div_ceil(blocks).div_ceil(most));
                next = end;
            }
            prop_assert_eq!(next, units);
            prop_assert!(shares.pass >= 1 && shares.pass <= most);
        }
    }
}
