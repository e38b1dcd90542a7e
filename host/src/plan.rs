//! How a problem is cut for the GPU: which token tile, how many thread blocks, which tiles share their K.
//!
//! A plan only decides speed: whatever it says, the result has the same bits.

use std::fmt;

use liquidgemm_format::brick;
use liquidgemm_format::schedule::Schedule;
use liquidgemm_format::tile::{STAGE_BRICKS, TILE_CHANNELS, TILE_SHAPES, TileShape};

use crate::Error;
use crate::gpu::GpuError;

/// The cut of one problem.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    m: usize,
    n: usize,
    k: usize,
    shape: TileShape,
    schedule: Schedule,
}

/// The fewest K steps that are worth a thread block of their own.
const MIN_STEPS: u32 = 4;
/// Channel tiles walked together, so that a wave of 132 blocks covers a near-square piece of the output.
const CHANNEL_GROUP: u32 = 16;

impl Plan {
    /// The plan for `Y[m, n] = X[m, k] · W[n, k]ᵀ` on a GPU with `multiprocessors`.
    ///
    /// # Errors
    /// If a dimension is 0 or too large.
    pub fn new(m: usize, n: usize, k: usize, multiprocessors: u32) -> Result<Self, Error> {
        let shape = TILE_SHAPES.iter().copied().find(|shape| shape.tokens as usize >= m);
        Self::with_tile(m, n, k, shape.unwrap_or(TILE_SHAPES[TILE_SHAPES.len() - 1]), multiprocessors)
    }

    /// The plan with a given token tile.
    ///
    /// # Errors
    /// As [`Plan::new`].
    pub fn with_tile(
        m: usize,
        n: usize,
        k: usize,
        shape: TileShape,
        multiprocessors: u32,
    ) -> Result<Self, Error> {
        for (dimension, value) in [("m", m), ("n", n), ("k", k)] {
            if value == 0 {
                return Err(Error::EmptyDimension { dimension });
            }
        }
        if k > brick::MAX_K {
            return Err(Error::KTooLarge { k });
        }
        for (what, value) in [("m", m), ("n", n)] {
            let limit = i32::MAX as usize;
            if value > limit {
                return Err(GpuError::OutOfRange { what, value, limit }.into());
            }
        }
        let channel_tiles = n.div_ceil(TILE_CHANNELS as usize) as u32;
        let token_tiles = m.div_ceil(shape.tokens as usize) as u32;
        let k_steps = brick::k_blocks(k).div_ceil(STAGE_BRICKS as usize) as u32;
        let tiles = channel_tiles as u64 * token_tiles as u64;
        if tiles * k_steps as u64 > u32::MAX as u64 {
            let limit = u32::MAX as usize / k_steps as usize;
            return Err(
                GpuError::OutOfRange { what: "the number of tiles", value: tiles as usize, limit }.into()
            );
        }
        let tiles = tiles as u32;
        let multiprocessors = multiprocessors.max(1);
        let workers = multiprocessors.min((tiles * k_steps).div_ceil(MIN_STEPS));
        // Whole tiles as long as they fill every block; the rest is shared out step by step.
        let streamed_tiles = tiles % workers;
        let schedule = Schedule {
            channel_tiles,
            token_tiles,
            k_steps,
            workers,
            streamed_tiles,
            channel_group: CHANNEL_GROUP.min(channel_tiles),
        };
        Ok(Self { m, n, k, shape, schedule })
    }

    /// `[m, n, k]` of the problem.
    pub fn problem(&self) -> [usize; 3] {
        [self.m, self.n, self.k]
    }

    /// The token tile and the depth of its ring.
    pub fn shape(&self) -> TileShape {
        self.shape
    }

    /// Who computes what.
    pub fn schedule(&self) -> &Schedule {
        &self.schedule
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Schedule { channel_tiles, token_tiles, k_steps, workers, streamed_tiles, .. } = self.schedule;
        write!(
            f,
            "tile {TILE_CHANNELS} channels x {} tokens, {} stages; {channel_tiles} x {token_tiles} tiles of {k_steps} \
             steps on {workers} blocks, {streamed_tiles} tiles shared along K",
            self.shape.tokens, self.shape.stages
        )
    }
}
