//! A warp's ring of activations, which TMA fills.
//!
//! `liquidgemm_format::skinny` lays out the stages; a stage holds one K-tile of all tokens.

use cuda_std::TensorMap;
use liquidgemm_format::arguments::SkinnyArguments;
use liquidgemm_format::ring::RingCursor;
use liquidgemm_format::skinny::{SkinnyShape, WARPS};
use liquidgemm_format::tile::K_TILE;

use super::Place;
use crate::ptx::{mbarrier, tma};

/// A warp's ring of activations.
pub(super) struct ActivationRing<const GROUPS: usize, const STAGES: u32> {
    map: *const TensorMap,
    /// Tokens that each stage loads: all m. Stale rows behind them reach no result.
    tokens: u32,
    pub(super) shape: SkinnyShape,
    place: Place,
    k_tiles: u32,
    /// The K-tile to load next. It goes to the stage `fill`.
    k_tile: u32,
    fill: RingCursor<STAGES>,
    /// The stage to multiply next.
    pub(super) full: RingCursor<STAGES>,
}

impl<const GROUPS: usize, const STAGES: u32> ActivationRing<GROUPS, STAGES> {
    /// Returns an empty ring. [`begin_pass`](Self::begin_pass) starts its first loads.
    #[inline(always)]
    pub(super) fn new(
        map: *const TensorMap,
        arguments: &SkinnyArguments,
        shape: SkinnyShape,
        place: Place,
        k_tiles: u32,
    ) -> Self {
        let start = RingCursor::start();
        Self { map, tokens: arguments.m, shape, place, k_tiles, k_tile: k_tiles, fill: start, full: start }
    }

    /// Starts the loads of a pass's first K-tiles, for all stages but one.
    ///
    /// # Safety
    /// The ring is empty, and TMA may write to its memory.
    #[inline(always)]
    pub(super) unsafe fn begin_pass(&mut self) {
        self.k_tile = self.place.warp;
        for _ in 0..STAGES - 1 {
            // SAFETY: the caller guarantees that the ring is empty.
            unsafe { self.fill() };
        }
    }

    /// Starts the load of the pass's next K-tile, if there is one.
    ///
    /// # Safety
    /// No lane still reads the stage that is overwritten.
    #[inline(always)]
    pub(super) unsafe fn fill(&mut self) {
        if self.k_tile < self.k_tiles {
            let stage = self.fill.stage();
            let barrier = self.place.barrier(self.shape, stage);
            let to = self.place.activations(self.shape) + stage * self.shape.activation_stage_bytes();
            // SAFETY: the stage has room for the box; the whole warp executes this.
            unsafe {
                mbarrier::arrive_expect(barrier, self.tokens * K_TILE);
                tma::load_2d(to, self.map, self.k_tile * K_TILE, 0, barrier);
            }
            self.fill = self.fill.next();
            self.k_tile += WARPS;
        }
    }
}
