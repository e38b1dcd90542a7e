//! How a problem is computed on the GPU: by which kernel, in which tiles, on how many thread blocks.
//!
//! A plan only decides speed: whatever it says, the result has the same bits.

mod cost;
mod divided;
mod skinny;
mod skinny_cost;

use std::fmt;
use std::ops::Range;

use liquidgemm_format::brick;
use liquidgemm_format::schedule::{MAX_WORKERS, Schedule};
use liquidgemm_format::tile::{TILE_SHAPES, TileShape};

use crate::Error;
use crate::gpu::GpuError;

pub use divided::Divided;
pub use skinny::Skinny;

/// How one problem is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    m: usize,
    n: usize,
    k: usize,
    method: Method,
}

/// The ways to compute a problem.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// In tiles of channels × tokens, whose K may be shared.
    Tiled(Tiled),
    /// In tiles of two kinds, by two launches.
    Divided(Divided),
    /// All tokens at once, each thread block with channels of its own.
    Skinny(Skinny),
}

/// A problem cut into tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tiled {
    cut: Cut,
    schedule: Schedule,
}

/// What there is to choose about tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// The token tile and the depth of its ring.
    pub shape: TileShape,
    /// Thread blocks of a cluster, which share each activation tile: a power of two, at most
    /// [`TileShape::max_cluster`](liquidgemm_format::tile::TileShape::max_cluster). Where the shape says that blocks share a tile's K, a
    /// cluster is those blocks, whatever is asked for.
    pub cluster: u32,
    /// Clusters that share the work.
    pub workers: u32,
    /// Waves whose tiles are shared out step by step, counted from the last, which may be a partial one. 0 leaves every
    /// tile whole: some workers then have less to do, but there are no partial sums to add. Tiles whose K is shared by a cluster's
    /// blocks are never shared further, and those of 192 channels × 256 tokens not at all.
    pub streamed_waves: u32,
}

/// The least of K that is worth a thread block of its own.
const MIN_K: u32 = 512;
/// Percent of the persistent blocks that must have a tile in a wave, on the average, for a tile of a consumer-loaded kernel to be worth
/// considering: what is left over can't be shared out.
const LEAST_OCCUPANCY: u64 = 75;
/// Channels walked together, so that a wave of 132 blocks covers a near-square piece of the output.
const GROUP_CHANNELS: u32 = 2048;

impl Plan {
    /// The plan for `Y[m, n] = X[m, k] · W[n, k]ᵀ` on a GPU with `multiprocessors`: of all
    /// [`candidates`](Self::candidates), the one with the lowest [estimate](Self::estimate_us).
    ///
    /// Planning takes 10 µs for few tokens and up to half a millisecond for many: what is called again and again keeps its plan.
    ///
    /// # Errors
    /// If a dimension is 0 or too large.
    pub fn new(m: usize, n: usize, k: usize, multiprocessors: u32) -> Result<Self, Error> {
        let candidates = Self::candidates(m, n, k, multiprocessors)?;
        let estimate = |plan: &Self| plan.estimate_us();
        match candidates.into_iter().min_by(|a, b| estimate(a).total_cmp(&estimate(b))) {
            Some(plan) => Ok(plan),
            None => Self::with_tile(m, n, k, TILE_SHAPES[0], multiprocessors),
        }
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
        Self::with_cut(
            m,
            n,
            k,
            Cut { shape, cluster: 1, workers: multiprocessors / shape.split.max(1), streamed_waves: 1 },
        )
    }

    /// The plan with everything chosen by the caller. Values beyond what the shape or the problem can use are
    /// brought down to it.
    ///
    /// # Errors
    /// As [`Plan::new`].
    pub fn with_cut(m: usize, n: usize, k: usize, cut: Cut) -> Result<Self, Error> {
        Ok(Self { m, n, k, method: Method::Tiled(Tiled::new(m, n, k, cut)?) })
    }

    /// Every plan that is worth considering for a problem.
    ///
    /// # Errors
    /// As [`Plan::new`].
    pub fn candidates(m: usize, n: usize, k: usize, multiprocessors: u32) -> Result<Vec<Self>, Error> {
        let mut plans = Self::whole_candidates(m, n, k, multiprocessors)?;
        plans.extend(Self::divided_candidates(m, n, k, multiprocessors));
        Ok(plans)
    }

    /// Those of one launch.
    fn whole_candidates(m: usize, n: usize, k: usize, multiprocessors: u32) -> Result<Vec<Self>, Error> {
        check_problem(m, n, k)?;
        let mut plans = Self::skinny_candidates(m, n, k, multiprocessors)?;
        let mut too_many = None;
        for shape in TILE_SHAPES {
            if is_half_empty(shape, m) {
                continue;
            }
            for cluster in clusters(shape, multiprocessors) {
                let most = resident_clusters(multiprocessors, cluster);
                let mut consider = |workers: u32, streamed_waves: u32| -> Result<u32, Error> {
                    let tiled = Tiled::new(m, n, k, Cut { shape, cluster, workers, streamed_waves })?;
                    let tiles = tiled.schedule.tiles();
                    let plan = Self { m, n, k, method: Method::Tiled(tiled) };
                    let places = tiles.div_ceil(most) as u64 * most as u64;
                    if !shape.has_producers() && tiles as u64 * 100 < places * LEAST_OCCUPANCY {
                        return Ok(tiles);
                    }
                    if !plans.iter().any(|other| other.launches_like(&plan)) {
                        plans.push(plan);
                    }
                    Ok(tiles)
                };
                let tiles = match consider(most, 1) {
                    Ok(tiles) => tiles,
                    // Too many tiles of this shape; a larger one may do.
                    Err(error @ Error::Gpu(GpuError::OutOfRange { .. })) => {
                        too_many.get_or_insert(error);
                        continue;
                    }
                    Err(error) => return Err(error),
                };
                // Whole tiles, as even as can be.
                consider(tiles.div_ceil(tiles.div_ceil(most)), 0)?;
                if !shape.can_stream() {
                    continue;
                }
                if tiles < most {
                    // Every tile in the same number of equal parts.
                    consider(tiles * (most / tiles), 1)?;
                } else {
                    consider(most, 2)?;
                }
            }
        }
        match too_many {
            Some(error) if plans.is_empty() => Err(error),
            _ => Ok(plans),
        }
    }

    /// Whether both come to the same launch.
    pub(crate) fn launches_like(&self, other: &Self) -> bool {
        match (self.method, other.method) {
            (Method::Tiled(a), Method::Tiled(b)) => {
                (a.shape(), a.cluster(), a.schedule) == (b.shape(), b.cluster(), b.schedule)
            }
            (a, b) => a == b,
        }
    }

    /// An estimate of the time on an H100, in microseconds. It ranks the plans of one problem; the bench
    /// measures.
    #[must_use]
    pub fn estimate_us(&self) -> f64 {
        match self.method {
            Method::Tiled(tiled) => tiled.estimate_us(self.problem(), 0.0),
            Method::Divided(divided) => divided.estimate_us(self.problem()),
            Method::Skinny(skinny) => skinny.estimate_us(self.problem()),
        }
    }

    /// `[m, n, k]` of the problem.
    pub fn problem(&self) -> [usize; 3] {
        [self.m, self.n, self.k]
    }

    /// How the problem is computed.
    pub fn method(&self) -> &Method {
        &self.method
    }

    /// The cut into tiles, if that is how the problem is solved.
    pub fn tiled(&self) -> Option<&Tiled> {
        match &self.method {
            Method::Tiled(tiled) => Some(tiled),
            Method::Divided(_) | Method::Skinny(_) => None,
        }
    }

    /// The launches in tiles in their order, one or two: which channels, in which tiles. A skinny plan has none.
    pub fn tiled_launches(&self) -> impl Iterator<Item = (Range<usize>, Tiled)> + use<> {
        let launches = match self.method {
            Method::Tiled(tiled) => [Some((0..self.n, tiled)), None],
            Method::Divided(divided) => divided.parts(self.n).map(Some),
            Method::Skinny(_) => [None, None],
        };
        launches.into_iter().flatten()
    }

    /// Thread blocks of the launch, or of the larger of two.
    pub fn blocks(&self) -> u32 {
        match self.method {
            Method::Tiled(_) | Method::Divided(_) => {
                self.tiled_launches().map(|(_, tiled)| tiled.blocks()).fold(0, u32::max)
            }
            Method::Skinny(skinny) => skinny.blocks(),
        }
    }
}

impl Tiled {
    /// Cuts a problem, and brings the cut's values down to what it can use.
    fn new(m: usize, n: usize, k: usize, mut cut: Cut) -> Result<Self, Error> {
        check_problem(m, n, k)?;
        let TileShape { strips, tokens, halves, split, .. } = cut.shape;
        let Some(shape) = TileShape::find(strips, tokens, halves, split) else {
            return Err(GpuError::UnknownTile { shape: cut.shape }.into());
        };
        cut.shape = shape;
        cut.cluster = match shape.split {
            1 => 1 << cut.cluster.clamp(1, shape.max_cluster()).ilog2(),
            split => split,
        };
        if !shape.can_stream() {
            cut.streamed_waves = 0;
        }
        let cluster_channels = shape.channels() * cut.cluster / shape.split;
        let channel_tiles = n.div_ceil(cluster_channels as usize) as u32;
        let token_tiles = m.div_ceil(cut.shape.tokens as usize) as u32;
        let k_steps = brick::k_blocks(k).div_ceil((cut.shape.stage_bricks() * shape.split) as usize) as u32;
        let tiles = channel_tiles as u64 * token_tiles as u64;
        if tiles * k_steps as u64 > u32::MAX as u64 {
            let limit = u32::MAX as usize / k_steps as usize;
            return Err(
                GpuError::OutOfRange { what: "the number of tiles", value: tiles as usize, limit }.into()
            );
        }
        let tiles = tiles as u32;
        let most_workers = (tiles * k_steps).div_ceil(MIN_K / cut.shape.stage_k()).min(MAX_WORKERS);
        cut.workers = cut.workers.clamp(1, most_workers);
        let last_wave = match tiles % cut.workers {
            0 => cut.workers,
            partial => partial,
        };
        let streamed_tiles = match cut.streamed_waves {
            0 => 0,
            waves => cut.workers.saturating_mul(waves - 1).saturating_add(last_wave).min(tiles),
        };
        let channel_group = (GROUP_CHANNELS / cluster_channels).clamp(1, channel_tiles);
        let schedule =
            Schedule::new([channel_tiles, token_tiles, k_steps], cut.workers, streamed_tiles, channel_group);
        Ok(Self { cut, schedule })
    }

    /// What was chosen.
    #[must_use]
    pub fn cut(&self) -> Cut {
        self.cut
    }

    /// The token tile and the depth of its ring.
    #[must_use]
    pub fn shape(&self) -> TileShape {
        self.cut.shape
    }

    /// Thread blocks of a cluster.
    #[must_use]
    pub fn cluster(&self) -> u32 {
        self.cut.cluster
    }

    /// Thread blocks of the launch.
    #[must_use]
    pub fn blocks(&self) -> u32 {
        self.cut.workers * self.cut.cluster
    }

    /// Output channels that a cluster computes at a time.
    #[must_use]
    pub fn cluster_channels(&self) -> u32 {
        self.shape().channels() * self.cluster() / self.shape().split
    }

    /// Who computes what.
    #[must_use]
    pub fn schedule(&self) -> &Schedule {
        &self.schedule
    }
}

/// Whether a tile would be half empty: that wastes what the next smaller one doesn't. Only the smallest two are alike.
fn is_half_empty(shape: TileShape, m: usize) -> bool {
    shape.tokens > 16 && m <= shape.tokens as usize / 2
}

/// Clusters of so many blocks, one block an SM, that the GPU runs at a time. A cluster lies within one of the GPU's processing
/// clusters (GPC), whose number of SMs it may not divide: an H100 with 132 SMs has room for 66 clusters of two blocks, but for 30 of four
/// (`cuOccupancyMaxActiveClusters`). Other GPUs are taken to leave as many empty.
fn resident_clusters(multiprocessors: u32, cluster: u32) -> u32 {
    match cluster {
        0..=2 => multiprocessors / cluster.max(1),
        _ => multiprocessors * 30 / 132 * 4 / cluster,
    }
    .max(1)
}

/// Thread blocks that a cluster may have: one or two, as many as share a tile's K if blocks do.
fn clusters(shape: TileShape, multiprocessors: u32) -> impl Iterator<Item = u32> {
    let fits =
        move |cluster: &u32| (shape.split..=shape.max_cluster().min(multiprocessors)).contains(cluster);
    [1, 2, 4, 8].into_iter().filter(fits)
}

/// Fails if a dimension is 0 or larger than the kernels can count.
fn check_problem(m: usize, n: usize, k: usize) -> Result<(), Error> {
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
    Ok(())
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.method {
            Method::Tiled(tiled) => tiled.fmt(f),
            Method::Divided(divided) => divided.fmt(f),
            Method::Skinny(skinny) => skinny.fmt(f),
        }
    }
}

impl fmt::Display for Tiled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Schedule { channel_tiles, token_tiles, k_steps, workers, streamed_tiles, .. } = self.schedule;
        let Cut { shape, cluster, .. } = self.cut;
        let sharing = if shape.split > 1 { " that share K" } else { "" };
        write!(
            f,
            "tile {} channels x {} tokens in {cluster} blocks{sharing}; {channel_tiles} x {token_tiles} tiles of \
             {k_steps} steps on {workers} workers, {streamed_tiles} tiles shared along K",
            self.cluster_channels(),
            shape.tokens,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn candidates_hold_the_planners_choice_and_no_launch_twice() {
        for (m, n, k) in [(1, 4096, 4096), (100, 4096, 4096), (5000, 300, 64), (256, 57_344, 8192)] {
            let plans = Plan::candidates(m, n, k, 132).unwrap();
            assert!(plans.contains(&Plan::new(m, n, k, 132).unwrap()));
            for (index, plan) in plans.iter().enumerate() {
                assert!(!plans[..index].iter().any(|other| other.launches_like(plan)), "{plan}");
                assert!(plan.blocks() <= 132, "{plan}");
            }
        }
    }

    #[test]
    fn the_widest_tile_is_considered_where_it_fills_its_waves_and_stays_whole() {
        let Some(widest) = TileShape::find(3, 256, 1, 1) else { panic!("no tile of 192 x 256") };
        let considered = |m, n, k| {
            let plans = Plan::candidates(m, n, k, 132).unwrap();
            plans.iter().filter_map(Plan::tiled).any(|tiled| tiled.shape() == widest)
        };
        // 920 tiles in 7 waves of 132, and 86 in one.
        assert!(considered(2048, 22_016, 4096));
        assert!(!considered(512, 8192, 8192));
        let cut = Cut { shape: widest, cluster: 1, workers: 132, streamed_waves: 2 };
        let plan = Plan::with_cut(512, 10_240, 8192, cut).unwrap();
        assert_eq!(plan.tiled().map(|tiled| tiled.schedule().streamed_tiles), Some(0));
    }
}
