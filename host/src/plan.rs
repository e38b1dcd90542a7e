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
    cut: Cut,
    schedule: Schedule,
}

/// What there is to choose about a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// The token tile and the depth of its ring.
    pub shape: TileShape,
    /// Thread blocks that share each activation tile: a power of two, at most
    /// [`TileShape::max_cluster`](liquidgemm_format::tile::TileShape::max_cluster).
    pub cluster: u32,
    /// Clusters that share the work.
    pub workers: u32,
    /// Waves of whole tiles that are given up for sharing out their tiles step by step, besides the last, partial
    /// wave. More of them even the load out; fewer leave fewer partial sums to add.
    pub streamed_waves: u32,
}

/// The fewest K steps that are worth a thread block of their own.
const MIN_STEPS: u32 = 4;
/// Channels walked together, so that a wave of 132 blocks covers a near-square piece of the output.
const GROUP_CHANNELS: u32 = 2048;

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
        Self::with_cut(m, n, k, Cut { shape, cluster: 1, workers: multiprocessors, streamed_waves: 0 })
    }

    /// The plan with everything chosen by the caller. Values beyond what the shape or the problem can use are
    /// brought down to it.
    ///
    /// # Errors
    /// As [`Plan::new`].
    pub fn with_cut(m: usize, n: usize, k: usize, mut cut: Cut) -> Result<Self, Error> {
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
        cut.cluster = 1 << cut.cluster.clamp(1, cut.shape.max_cluster().max(1)).ilog2();
        let cluster_channels = TILE_CHANNELS * cut.cluster;
        let channel_tiles = n.div_ceil(cluster_channels as usize) as u32;
        let token_tiles = m.div_ceil(cut.shape.tokens as usize) as u32;
        let k_steps = brick::k_blocks(k).div_ceil(STAGE_BRICKS as usize) as u32;
        let tiles = channel_tiles as u64 * token_tiles as u64;
        if tiles * k_steps as u64 > u32::MAX as u64 {
            let limit = u32::MAX as usize / k_steps as usize;
            return Err(
                GpuError::OutOfRange { what: "the number of tiles", value: tiles as usize, limit }.into()
            );
        }
        let tiles = tiles as u32;
        cut.workers = cut.workers.clamp(1, (tiles * k_steps).div_ceil(MIN_STEPS));
        // Whole tiles as long as they fill every worker; the rest is shared out step by step.
        let last_wave = tiles % cut.workers;
        let streamed_tiles = match last_wave {
            0 => 0,
            partial => cut.streamed_waves.saturating_mul(cut.workers).saturating_add(partial).min(tiles),
        };
        let channel_group = (GROUP_CHANNELS / cluster_channels).clamp(1, channel_tiles);
        let schedule =
            Schedule::new([channel_tiles, token_tiles, k_steps], cut.workers, streamed_tiles, channel_group);
        Ok(Self { m, n, k, cut, schedule })
    }

    /// `[m, n, k]` of the problem.
    pub fn problem(&self) -> [usize; 3] {
        [self.m, self.n, self.k]
    }

    /// What was chosen.
    pub fn cut(&self) -> Cut {
        self.cut
    }

    /// The token tile and the depth of its ring.
    pub fn shape(&self) -> TileShape {
        self.cut.shape
    }

    /// Thread blocks of a cluster.
    pub fn cluster(&self) -> u32 {
        self.cut.cluster
    }

    /// Thread blocks of the launch.
    pub fn blocks(&self) -> u32 {
        self.cut.workers * self.cut.cluster
    }

    /// Who computes what.
    pub fn schedule(&self) -> &Schedule {
        &self.schedule
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Schedule { channel_tiles, token_tiles, k_steps, workers, streamed_tiles, .. } = self.schedule;
        let Cut { shape, cluster, .. } = self.cut;
        write!(
            f,
            "tile {} channels x {} tokens in {cluster} blocks; {channel_tiles} x {token_tiles} tiles of {k_steps} \
             steps on {workers} workers, {streamed_tiles} tiles shared along K",
            TILE_CHANNELS * cluster,
            shape.tokens,
        )
    }
}
