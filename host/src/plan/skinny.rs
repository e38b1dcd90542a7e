//! Plans for few tokens: each thread block has channels of its own and computes them over the whole K.

use std::fmt;

use liquidgemm_format::schedule::MAX_WORKERS;
use liquidgemm_format::skinny::{SKINNY_SHAPES, SkinnyShape, UNIT_CHANNELS, UnitShares};

use super::{Method, Plan, check_problem};
use crate::Error;
use crate::gpu::GpuError;

/// How a problem of few tokens is computed: which kernel, and which channels each thread block has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Skinny {
    shape: SkinnyShape,
    blocks: u32,
    shares: UnitShares,
}

impl Skinny {
    /// What the kernel was compiled for.
    #[must_use]
    pub fn shape(&self) -> SkinnyShape {
        self.shape
    }

    /// Thread blocks of the launch.
    #[must_use]
    pub fn blocks(&self) -> u32 {
        self.blocks
    }

    /// Thread blocks that have channels.
    #[must_use]
    pub fn busy_blocks(&self) -> u32 {
        if self.shares.each > 0 { self.blocks } else { self.shares.larger }
    }

    /// Which units of 16 channels each block has.
    #[must_use]
    pub fn shares(&self) -> UnitShares {
        self.shares
    }

    /// Passes over K of the blocks with the most units.
    #[must_use]
    pub fn passes(&self) -> u32 {
        self.most_units().div_ceil(self.shares.pass)
    }

    /// The most units that a block has.
    #[must_use]
    pub fn most_units(&self) -> u32 {
        self.shares.each + u32::from(self.shares.larger > 0)
    }
}

impl Plan {
    /// The plan that computes all tokens in one tile, on so many thread blocks. Those beyond the units of 16 channels have nothing to
    /// do, but launches that have a block on every multiprocessor follow one another sooner. A number that no GPU has room for is brought
    /// down.
    ///
    /// # Errors
    /// If a dimension is 0 or too large, there are more tokens than `shape` has, or no kernel has that shape.
    pub fn skinny(m: usize, n: usize, k: usize, shape: SkinnyShape, blocks: u32) -> Result<Self, Error> {
        check_problem(m, n, k)?;
        if !SKINNY_SHAPES.contains(&shape) {
            return Err(GpuError::UnknownSkinnyShape { shape }.into());
        }
        let limit = shape.tokens as usize;
        if m > limit {
            return Err(GpuError::OutOfRange { what: "m", value: m, limit }.into());
        }
        let units = n.div_ceil(UNIT_CHANNELS as usize) as u32;
        let blocks = blocks.clamp(1, units.max(MAX_WORKERS));
        let shares = UnitShares::new(units, blocks, shape.units);
        Ok(Self { m, n, k, method: Method::Skinny(Skinny { shape, blocks, shares }) })
    }

    /// The skinny plans that are worth considering: one for each kernel of the least tokens that hold the batch.
    pub(super) fn skinny_candidates(
        [m, n, k]: [usize; 3],
        multiprocessors: u32,
    ) -> impl Iterator<Item = Result<Self, Error>> {
        let least =
            SKINNY_SHAPES.iter().map(|shape| shape.tokens).filter(|&tokens| m <= tokens as usize).min();
        SKINNY_SHAPES
            .into_iter()
            .filter(move |shape| Some(shape.tokens) == least)
            .map(move |shape| Self::skinny(m, n, k, shape, multiprocessors))
    }
}

impl fmt::Display for Skinny {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "skinny {} channels x {} tokens; {} blocks, up to {} channels each in {} passes of {}",
            self.shape.channels(),
            self.shape.tokens,
            self.blocks,
            self.most_units() * UNIT_CHANNELS,
            self.passes(),
            self.shares.pass * UNIT_CHANNELS,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_channels_leave_blocks_idle_on_as_many_multiprocessors() {
        for (n, busy) in [(1, 1), (1280, 80), (2112, 132), (2113, 132), (57_344, 132)] {
            let plan = Plan::skinny(1, n, 8192, SKINNY_SHAPES[0], 132).unwrap();
            let Method::Skinny(skinny) = plan.method() else { panic!("{plan}") };
            assert_eq!((skinny.blocks(), skinny.busy_blocks()), (132, busy), "{plan}");
        }
    }

    #[test]
    fn a_number_of_blocks_that_no_gpu_has_room_for_is_brought_down() {
        for (blocks, launched) in [(0, 1), (u32::MAX, MAX_WORKERS)] {
            let plan = Plan::skinny(1, 1280, 8192, SKINNY_SHAPES[0], blocks).unwrap();
            assert_eq!(plan.blocks(), launched, "{plan}");
        }
    }

    #[test]
    fn more_tokens_than_the_kernel_has_and_shapes_without_a_kernel_are_refused() {
        for shape in SKINNY_SHAPES {
            let tokens = shape.tokens as usize;
            assert!(Plan::skinny(tokens, 100, 100, shape, 132).is_ok());
            match Plan::skinny(tokens + 1, 100, 100, shape, 132) {
                Err(Error::Gpu(GpuError::OutOfRange { what: "m", limit, .. })) => assert_eq!(limit, tokens),
                other => panic!("{other:?}"),
            }
            let unknown = SkinnyShape { units: 100, ..shape };
            assert!(matches!(
                Plan::skinny(1, 100, 100, unknown, 132),
                Err(Error::Gpu(GpuError::UnknownSkinnyShape { .. }))
            ));
        }
        assert!(matches!(
            Plan::skinny(1, 1, liquidgemm_format::brick::MAX_K + 1, SKINNY_SHAPES[0], 132),
            Err(Error::KTooLarge { .. })
        ));
    }
}
