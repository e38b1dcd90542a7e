//! Plans for few tokens. Each thread block has channels of its own and computes them over the whole K.
//! The kernels' shapes are in `liquidgemm_format::skinny`; `skinny_cost.rs` estimates the time.

use std::fmt;

use liquidgemm_format::schedule::MAX_CLUSTERS;
use liquidgemm_format::skinny::{M16_CHANNELS, SKINNY_SHAPES, SkinnyShape, TileRuns};

use super::{Algorithm, Plan, check_problem};
use crate::error::PlanError;
use crate::{Error, Problem};

/// A skinny launch: the kernel's shape, and the channels of each thread block.
///
/// Channels are dealt out in m16 tiles of 16 channels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Skinny {
    shape: SkinnyShape,
    blocks: u32,
    runs: TileRuns,
}

impl Skinny {
    /// Returns the shape that the kernel was compiled for.
    #[must_use]
    pub fn shape(&self) -> SkinnyShape {
        self.shape
    }

    /// Returns the number of thread blocks in the launch.
    #[must_use]
    pub fn blocks(&self) -> u32 {
        self.blocks
    }

    /// Returns the number of thread blocks that have channels.
    #[must_use]
    pub fn busy_blocks(&self) -> u32 {
        if self.runs.each > 0 { self.blocks } else { self.runs.larger }
    }

    /// Returns the m16 tiles (16 channels) of each thread block.
    #[must_use]
    pub fn runs(&self) -> TileRuns {
        self.runs
    }

    /// Returns the number of passes over K of the thread blocks with the most m16 tiles.
    #[must_use]
    pub fn passes(&self) -> u32 {
        self.most_m16_tiles().div_ceil(self.runs.pass)
    }

    /// Returns the most m16 tiles that a thread block has.
    #[must_use]
    pub fn most_m16_tiles(&self) -> u32 {
        self.runs.each + u32::from(self.runs.larger > 0)
    }
}

impl Plan {
    /// Makes the plan that computes all tokens in one tile, on `blocks` thread blocks.
    ///
    /// Thread blocks beyond the number of m16 tiles (16 channels) have no work.
    /// Still, launches with a thread block on every SM follow one another sooner.
    /// `blocks` is limited to 65,535, or to the number of m16 tiles if that is larger.
    ///
    /// # Errors
    /// - [`Error::EmptyDimension`] if a dimension is 0, [`Error::KTooLarge`] if `k` exceeds 131,072.
    /// - [`PlanError::OutOfRange`] if `m` exceeds the shape's tokens, or `n` exceeds 2³¹ − 1.
    /// - [`PlanError::UnknownSkinnyShape`] if the shape has no kernel.
    pub fn skinny(problem: Problem, shape: SkinnyShape, blocks: u32) -> Result<Self, Error> {
        check_problem(problem)?;
        let Problem { m, n, .. } = problem;
        if !SKINNY_SHAPES.contains(&shape) {
            return Err(PlanError::UnknownSkinnyShape { shape }.into());
        }
        let limit = shape.tokens as usize;
        if m > limit {
            return Err(PlanError::OutOfRange { what: "m", value: m, limit }.into());
        }
        let m16_tiles = n.div_ceil(M16_CHANNELS as usize) as u32;
        let blocks = blocks.clamp(1, m16_tiles.max(MAX_CLUSTERS));
        let runs = TileRuns::new(m16_tiles, blocks, shape.m16_tiles);
        Ok(Self { problem, algorithm: Algorithm::Skinny(Skinny { shape, blocks, runs }) })
    }

    /// Returns the skinny plans that are worth considering.
    ///
    /// They are one for each kernel with the fewest tokens that hold the batch.
    pub(super) fn skinny_candidates(
        problem: Problem,
        multiprocessors: u32,
    ) -> impl Iterator<Item = Result<Self, Error>> {
        let least = SKINNY_SHAPES
            .iter()
            .map(|shape| shape.tokens)
            .filter(|&tokens| problem.m <= tokens as usize)
            .min();
        SKINNY_SHAPES
            .into_iter()
            .filter(move |shape| Some(shape.tokens) == least)
            .map(move |shape| Self::skinny(problem, shape, multiprocessors))
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
            self.most_m16_tiles() * M16_CHANNELS,
            self.passes(),
            self.runs.pass * M16_CHANNELS,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_channels_leave_blocks_idle_but_every_sm_has_one() {
        for (n, busy) in [(1, 1), (1280, 80), (2112, 132), (2113, 132), (57_344, 132)] {
            let plan = Plan::skinny(Problem::new(1, n, 8192), SKINNY_SHAPES[0], 132).unwrap();
            let Algorithm::Skinny(skinny) = plan.algorithm() else { panic!("{plan}") };
            assert_eq!((skinny.blocks(), skinny.busy_blocks()), (132, busy), "{plan}");
        }
    }

    #[test]
    fn a_number_of_blocks_beyond_any_gpu_is_reduced() {
        for (blocks, launched) in [(0, 1), (u32::MAX, MAX_CLUSTERS)] {
            let plan = Plan::skinny(Problem::new(1, 1280, 8192), SKINNY_SHAPES[0], blocks).unwrap();
            assert_eq!(plan.blocks(), launched, "{plan}");
        }
    }

    #[test]
    fn more_tokens_than_the_kernel_has_and_shapes_without_a_kernel_are_refused() {
        for shape in SKINNY_SHAPES {
            let tokens = shape.tokens as usize;
            assert!(Plan::skinny(Problem::new(tokens, 100, 100), shape, 132).is_ok());
            match Plan::skinny(Problem::new(tokens + 1, 100, 100), shape, 132) {
                Err(Error::Plan(PlanError::OutOfRange { what: "m", limit, .. })) => assert_eq!(limit, tokens),
                other => panic!("{other:?}"),
            }
            let unknown = SkinnyShape { m16_tiles: 100, ..shape };
            assert!(matches!(
                Plan::skinny(Problem::new(1, 100, 100), unknown, 132),
                Err(Error::Plan(PlanError::UnknownSkinnyShape { .. }))
            ));
        }
        assert!(matches!(
            Plan::skinny(Problem::new(1, 1, liquidgemm_format::brick::MAX_K + 1), SKINNY_SHAPES[0], 132),
            Err(Error::KTooLarge { .. })
        ));
    }
}
