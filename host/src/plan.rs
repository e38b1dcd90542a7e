//! Plans: by which kernel, in which tiles, and on how many thread blocks the GPU computes a problem.
//!
//! A plan decides speed only. The result has the same bits with every plan.
//! `search.rs` finds the fastest plan by the cost model in `cost.rs`.

mod cost;
mod grouped;
mod layout;
mod search;
mod shapes;
mod skinny;
mod skinny_cost;
mod two_launches;

use std::fmt;
use std::ops::Range;

use liquidgemm_format::brick;
use liquidgemm_format::schedule::Schedule;
use liquidgemm_format::tile::{TILE_SHAPES, TileShape};

use crate::error::PlanError;
use crate::{DeviceFigures, Error, Problem};
use cost::Model;
use layout::{Grid, Layout, sizes};
use shapes::SHAPES;

pub use grouped::{GroupedPlan, GroupedProblem};
pub use skinny::Skinny;
pub use two_launches::TwoLaunches;

/// The way in which the GPU computes one problem.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    problem: Problem,
    algorithm: Algorithm,
}

/// The algorithms that can compute a problem.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Algorithm {
    /// One launch, in tiles of channels × tokens. K may be shared by thread blocks.
    Tiled(Tiled),
    /// Two launches, each in tiles, for two ranges of channels.
    TwoLaunches(TwoLaunches),
    /// One launch for up to 32 tokens. Each thread block computes all tokens of its own channels.
    Skinny(Skinny),
}

/// A problem divided into tiles, and their schedule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tiled {
    /// The index of the shape in [`SHAPES`].
    place: usize,
    config: TileConfig,
    schedule: Schedule,
}

/// The choices for a tiled launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TileConfig {
    /// The tile's shape, one of [`TILE_SHAPES`]. `stages` is ignored, because each shape has one kernel.
    pub shape: TileShape,
    /// Thread blocks per cluster. They lie side by side along the channels and share each activation tile.
    ///
    /// The value is rounded down to a power of two and limited to
    /// [`TileShape::max_cluster`](liquidgemm_format::tile::TileShape::max_cluster).
    /// With cluster split-K, the cluster has the shape's `cluster_split` thread blocks, whatever the value.
    pub cluster_size: u32,
    /// Persistent clusters of the launch. They take turns at the tiles.
    pub clusters: u32,
    /// Waves whose tiles the clusters share along K (stream-K), counted from the last wave.
    ///
    /// The last wave may be partial. 0 leaves every tile whole:
    /// some clusters may then have less work, but there are no partial sums to add.
    /// Shapes with cluster split-K ignore the value.
    /// Consumer-loaded shapes do so too; they are 192 channels × 144 to 256 tokens.
    pub stream_k_waves: u32,
}

impl Plan {
    /// Makes the plan for `Y[m, n] = X[m, k] · W[n, k]ᵀ` on a GPU with these figures.
    ///
    /// It is the one of all [`candidates`](Self::candidates) with the lowest [estimate](Self::estimate_us).
    ///
    /// # Errors
    /// - [`Error::EmptyDimension`] if a dimension is 0, [`Error::KTooLarge`] if `k` exceeds 131,072.
    /// - [`PlanError::OutOfRange`] if `m` or `n` exceeds 2³¹ − 1, or if there are too many tiles to count.
    pub fn new(problem: Problem, figures: &DeviceFigures) -> Result<Self, Error> {
        match search::fastest(problem, figures)? {
            Some(plan) => Ok(plan),
            None => Self::with_tile(problem, TILE_SHAPES[0], figures),
        }
    }

    /// Makes the plan with this tile shape on as many clusters as the GPU can run at a time, with stream-K.
    ///
    /// # Errors
    /// As [`Plan::new`], and [`PlanError::UnknownTile`] if the shape has no kernel.
    pub fn with_tile(problem: Problem, shape: TileShape, figures: &DeviceFigures) -> Result<Self, Error> {
        Self::with_config(
            problem,
            TileConfig {
                shape,
                cluster_size: 1,
                clusters: figures.resident_clusters(shape.cluster_split),
                stream_k_waves: 1,
            },
        )
    }

    /// Makes the plan with these choices.
    ///
    /// Values beyond the limits of the shape or the problem are reduced to them.
    ///
    /// # Errors
    /// As [`Plan::with_tile`].
    pub fn with_config(problem: Problem, config: TileConfig) -> Result<Self, Error> {
        Ok(Self { problem, algorithm: Algorithm::Tiled(Tiled::new(problem, config)?) })
    }

    /// Returns every plan that is worth considering for a problem.
    ///
    /// # Errors
    /// As [`Plan::new`].
    pub fn candidates(problem: Problem, figures: &DeviceFigures) -> Result<Vec<Self>, Error> {
        let mut plans = Self::whole_candidates(problem, figures)?;
        plans.extend(Self::two_launch_candidates(problem, figures));
        Ok(plans)
    }

    /// Returns the candidates with one launch.
    fn whole_candidates(problem: Problem, figures: &DeviceFigures) -> Result<Vec<Self>, Error> {
        check_problem(problem)?;
        let mut plans: Vec<Self> =
            Self::skinny_candidates(problem, figures.multiprocessors).collect::<Result<_, _>>()?;
        let mut too_many = None;
        for facts in SHAPES.iter().filter(|facts| !facts.is_half_empty(problem.m)) {
            for (cluster, most) in sizes(facts, figures) {
                let grid = match Grid::new(problem, facts, cluster) {
                    Ok(grid) => grid,
                    // There are too many tiles of this shape. A larger one may fit.
                    Err(error) => {
                        too_many.get_or_insert(error);
                        continue;
                    }
                };
                for layout in grid.layouts(most) {
                    let plan = Self { problem, algorithm: Algorithm::Tiled(layout.tiled()) };
                    if !plans.iter().any(|other| other.launches_like(&plan)) {
                        plans.push(plan);
                    }
                }
            }
        }
        match too_many {
            Some(error) if plans.is_empty() => Err(error.into()),
            _ => Ok(plans),
        }
    }

    /// Returns whether both plans have the same launches.
    pub fn launches_like(&self, other: &Self) -> bool {
        match (self.algorithm, other.algorithm) {
            (Algorithm::Tiled(a), Algorithm::Tiled(b)) => {
                (a.shape(), a.cluster_size(), a.schedule) == (b.shape(), b.cluster_size(), b.schedule)
            }
            (a, b) => a == b,
        }
    }

    /// Estimates the time on a GPU with these figures, in microseconds.
    ///
    /// The estimate ranks the plans of one problem. It does not replace a measurement.
    #[must_use]
    pub fn estimate_us(&self, figures: &DeviceFigures) -> f64 {
        self.estimate_with(&Model::new(figures))
    }

    fn estimate_with(&self, model: &Model) -> f64 {
        let problem = self.problem();
        match self.algorithm {
            Algorithm::Tiled(tiled) => model.estimate(&Layout::of(&tiled), model.memory(problem), 0.0),
            Algorithm::TwoLaunches(two_launches) => two_launches.estimate_us(problem, model),
            Algorithm::Skinny(skinny) => skinny.estimate_us(problem, model),
        }
    }

    /// Returns the problem.
    pub fn problem(&self) -> Problem {
        self.problem
    }

    /// Returns the algorithm.
    pub fn algorithm(&self) -> &Algorithm {
        &self.algorithm
    }

    /// Returns the tiling of a plan with one tiled launch, or `None` for other algorithms.
    pub fn tiled(&self) -> Option<&Tiled> {
        match &self.algorithm {
            Algorithm::Tiled(tiled) => Some(tiled),
            Algorithm::TwoLaunches(_) | Algorithm::Skinny(_) => None,
        }
    }

    /// Returns the channels and the tiling of each tiled launch, in launch order.
    ///
    /// There are one or two. A skinny plan has none.
    pub fn tiled_launches(&self) -> impl Iterator<Item = (Range<usize>, Tiled)> + use<> {
        let launches = match self.algorithm {
            Algorithm::Tiled(tiled) => [Some((0..self.problem.n, tiled)), None],
            Algorithm::TwoLaunches(two_launches) => two_launches.parts(self.problem.n).map(Some),
            Algorithm::Skinny(_) => [None, None],
        };
        launches.into_iter().flatten()
    }

    /// Returns the number of thread blocks of the launch, or of the larger one of two.
    pub fn blocks(&self) -> u32 {
        match self.algorithm {
            Algorithm::Tiled(_) | Algorithm::TwoLaunches(_) => {
                self.tiled_launches().map(|(_, tiled)| tiled.blocks()).fold(0, u32::max)
            }
            Algorithm::Skinny(skinny) => skinny.blocks(),
        }
    }
}

impl Tiled {
    /// Divides a problem into tiles, and reduces the choices to what it can use.
    fn new(problem: Problem, config: TileConfig) -> Result<Self, Error> {
        check_problem(problem)?;
        let Some(facts) = shapes::find(config.shape) else {
            return Err(PlanError::UnknownTile { shape: config.shape }.into());
        };
        let cluster = match facts.shape.cluster_split {
            1 => 1 << config.cluster_size.clamp(1, facts.max_cluster).ilog2(),
            cluster_split => cluster_split,
        };
        Ok(Grid::new(problem, facts, cluster)?.layout(config.clusters, config.stream_k_waves).tiled())
    }

    /// Returns the choices, after their reduction to what the shape and the problem can use.
    #[must_use]
    pub fn config(&self) -> TileConfig {
        self.config
    }

    /// Returns the tile's shape.
    #[must_use]
    pub fn shape(&self) -> TileShape {
        self.config.shape
    }

    /// Returns the number of thread blocks in a cluster.
    #[must_use]
    pub fn cluster_size(&self) -> u32 {
        self.config.cluster_size
    }

    /// Returns the number of thread blocks in the launch.
    #[must_use]
    pub fn blocks(&self) -> u32 {
        self.config.clusters * self.config.cluster_size
    }

    /// Returns the number of output channels in a cluster's tile.
    #[must_use]
    pub fn cluster_channels(&self) -> u32 {
        self.shape().channels() * self.cluster_size() / self.shape().cluster_split
    }

    /// Returns the schedule: which cluster computes which part of which tile.
    #[must_use]
    pub fn schedule(&self) -> &Schedule {
        &self.schedule
    }
}

/// Fails if a dimension is 0 or larger than the kernels can count.
fn check_problem(problem: Problem) -> Result<(), Error> {
    let Problem { m, n, k } = problem;
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
            return Err(PlanError::OutOfRange { what, value, limit }.into());
        }
    }
    Ok(())
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.algorithm {
            Algorithm::Tiled(tiled) => tiled.fmt(f),
            Algorithm::TwoLaunches(two_launches) => two_launches.fmt(f),
            Algorithm::Skinny(skinny) => skinny.fmt(f),
        }
    }
}

impl fmt::Display for Tiled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Schedule { channel_tiles, token_tiles, k_iterations, clusters, stream_k_tiles, .. } =
            self.schedule;
        let TileConfig { shape, cluster_size, .. } = self.config;
        let sharing = if shape.cluster_split > 1 { " that share K" } else { "" };
        write!(
            f,
            "tile {} channels x {} tokens in {cluster_size} blocks{sharing}; {channel_tiles} x {token_tiles} tiles of \
             {k_iterations} k-iterations on {clusters} clusters, {stream_k_tiles} tiles shared along K",
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
            let plans = Plan::candidates(Problem { m, n, k }, &DeviceFigures::H100_SXM).unwrap();
            assert!(plans.contains(&Plan::new(Problem { m, n, k }, &DeviceFigures::H100_SXM).unwrap()));
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
            let plans = Plan::candidates(Problem { m, n, k }, &DeviceFigures::H100_SXM).unwrap();
            plans.iter().filter_map(Plan::tiled).any(|tiled| tiled.shape() == widest)
        };
        // 920 tiles nearly fill 7 waves of 132. 86 tiles leave a third of one wave empty.
        assert!(considered(2048, 22_016, 4096));
        assert!(!considered(512, 8192, 8192));
        let config = TileConfig { shape: widest, cluster_size: 1, clusters: 132, stream_k_waves: 2 };
        let plan = Plan::with_config(Problem::new(512, 10_240, 8192), config).unwrap();
        assert_eq!(plan.tiled().map(|tiled| tiled.schedule().stream_k_tiles), Some(0));
    }
}
