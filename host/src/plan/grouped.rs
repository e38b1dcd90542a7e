//! Plans for grouped GEMMs: which tile, and how many clusters.
//!
//! The schedule itself is made on the device from the experts' counts, which the host never learns.
//! `liquidgemm_format::grouped` has its arithmetic.

use std::fmt;

use liquidgemm_format::brick;
use liquidgemm_format::grouped::{GROUPED_SHAPES, GroupedSchedule, MAX_EXPERTS, RowLayout, token_tiles};
use liquidgemm_format::tile::{MAX_CLUSTER, MAX_WGMMA_TOKENS, TileShape};

use crate::check::{check_dimension, check_k};
use crate::error::PlanError;
use crate::{DeviceFigures, Error};

/// Channels whose tiles are visited together, for all rows of an expert, as in plans of one matrix.
const GROUP_CHANNELS: u32 = 2048;

/// The channels of all tiles but the smallest.
const WIDE_CHANNELS: usize = 128;

/// The least K for tiles of 64 channels.
const LEAST_K_OF_64_CHANNELS: usize = 2048;

/// What a tile costs besides its products, in rows: loads, dequantization of the first K-tile, the epilogue.
const ROWS_PER_TILE: f64 = 70.0;
/// The least that a tile costs, in rows: dequantization takes as long for few rows as for many.
const LEAST_ROWS_PER_TILE: f64 = 110.0;
/// The least that a tile of two wgmma instructions costs, in rows.
const LEAST_ROWS_PER_DOUBLE_TILE: f64 = 355.0;
/// The rows that the wgmma instructions of large tiles go up by.
const WGMMA_ROW_STEP: u32 = 16;

/// The dimensions of a grouped GEMM, and the layout of its rows.
///
/// Any values can be stored; [`GroupedPlan::new`] and the GEMM calls check them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GroupedProblem {
    /// Number of experts.
    pub experts: usize,
    /// Output channels of each expert.
    pub n: usize,
    /// Input channels of each expert.
    pub k: usize,
    /// Rows of the activations and of the output, of all experts together.
    pub rows: usize,
    /// The rows that each expert has a place for, if the experts' rows do not follow one another (masked).
    /// `rows` is then `experts · capacity`.
    pub capacity: Option<usize>,
}

impl GroupedProblem {
    /// Returns the problem of `rows` rows that are sorted by expert.
    #[must_use]
    pub const fn contiguous(experts: usize, [rows, n, k]: [usize; 3]) -> Self {
        Self { experts, n, k, rows, capacity: None }
    }

    /// Returns the problem with a place of `capacity` rows for each expert.
    #[must_use]
    pub const fn masked(experts: usize, [capacity, n, k]: [usize; 3]) -> Self {
        Self { experts, n, k, rows: experts.saturating_mul(capacity), capacity: Some(capacity) }
    }

    /// Returns the most rows that one expert can have.
    fn most_rows(self) -> usize {
        self.capacity.unwrap_or(self.rows)
    }

    fn layout(self) -> RowLayout {
        match self.capacity {
            Some(capacity) => RowLayout::masked(self.experts as u32, capacity as u32),
            None => RowLayout::contiguous(self.experts as u32, self.rows as u32),
        }
    }
}

impl fmt::Display for GroupedProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { experts, n, k, rows, .. } = self;
        write!(f, "{experts} experts, rows = {rows}, n = {n}, k = {k}")?;
        self.capacity.map_or(Ok(()), |capacity| write!(f, ", capacity = {capacity}"))
    }
}

/// The way in which the GPU computes a grouped GEMM.
///
/// It decides speed only. The result has the same bits with every plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupedPlan {
    problem: GroupedProblem,
    shape: TileShape,
    cluster_size: u32,
    schedule: GroupedSchedule,
}

impl GroupedPlan {
    /// Makes the plan for a problem on a GPU with these figures.
    ///
    /// The tile has room for the rows of most experts if the `expected_rows` rows go to the experts at random.
    /// For contiguous rows these are usually all rows.
    /// If no tile has, it is the tile that costs the least for experts of random sizes.
    ///
    /// # Errors
    /// - [`Error::EmptyDimension`] if `experts`, `n` or `k` is 0, [`Error::KTooLarge`] if `k` exceeds 131,072.
    /// - [`PlanError::OutOfRange`] if there are more than 512 experts, if `n` or the rows exceed 2³¹ − 1,
    ///   or if there can be too many tiles to count.
    pub fn new(
        problem: GroupedProblem,
        expected_rows: usize,
        figures: &DeviceFigures,
    ) -> Result<Self, Error> {
        let shape = fitting_shape(problem, expected_rows, figures);
        let cluster_size = fitting_cluster(problem, shape);
        Self::with_config(problem, shape, cluster_size, figures.resident_clusters(cluster_size))
    }

    /// Makes the plan with a shape of [`GROUPED_SHAPES`], clusters of 1 or 2 thread blocks, and that many clusters.
    ///
    /// `cluster_size` and `clusters` are limited to what is possible.
    ///
    /// # Errors
    /// As [`GroupedPlan::new`], and [`PlanError::UnknownTile`] if the shape has no grouped kernel.
    pub fn with_config(
        problem: GroupedProblem,
        shape: TileShape,
        cluster_size: u32,
        clusters: u32,
    ) -> Result<Self, Error> {
        check_problem(problem)?;
        if !GROUPED_SHAPES.contains(&shape) {
            return Err(PlanError::UnknownTile { shape }.into());
        }
        let cluster_size = cluster_size.clamp(1, MAX_CLUSTER);
        let channels = shape.channels() * cluster_size;
        let channel_tiles = (problem.n as u32).div_ceil(channels);
        let k_iterations = (brick::k_blocks(problem.k) as u32).div_ceil(shape.stage_bricks());
        // The kernels add up the tiles of all experts in 32 bits, whatever the counts are.
        let all_token_tiles =
            problem.experts as u64 * u64::from(token_tiles(problem.most_rows() as u32, shape.tokens));
        let tiles = all_token_tiles * u64::from(channel_tiles);
        if tiles > i32::MAX as u64 {
            let value = usize::try_from(tiles).unwrap_or(usize::MAX);
            let (what, limit) = ("the number of tiles", i32::MAX as usize);
            return Err(PlanError::OutOfRange { what, value, limit }.into());
        }
        let schedule = GroupedSchedule::new(
            problem.layout(),
            [channel_tiles, k_iterations],
            clusters.clamp(1, u16::MAX.into()),
            (GROUP_CHANNELS / channels).max(1),
        );
        Ok(Self { problem, shape, cluster_size, schedule })
    }

    /// Returns the problem that the plan is for.
    #[must_use]
    pub fn problem(&self) -> GroupedProblem {
        self.problem
    }

    /// Returns the tile's shape. An expert's rows are divided evenly among as few such tiles as have room for them.
    #[must_use]
    pub fn shape(&self) -> TileShape {
        self.shape
    }

    /// Returns the thread blocks of a cluster: 1, or 2 that lie side by side along the channels.
    #[must_use]
    pub fn cluster_size(&self) -> u32 {
        self.cluster_size
    }

    /// Returns the thread blocks of the launch.
    #[must_use]
    pub fn blocks(&self) -> u32 {
        self.schedule.clusters * self.cluster_size
    }

    /// Returns what the kernel needs to make the schedule from the counts.
    #[must_use]
    pub fn schedule(&self) -> &GroupedSchedule {
        &self.schedule
    }
}

impl fmt::Display for GroupedPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "grouped tiles of {} x {}, {} clusters of {}",
            self.shape.channels(),
            self.shape.tokens,
            self.schedule.clusters,
            self.cluster_size
        )
    }
}

/// Fails unless the kernels can address the problem.
fn check_problem(problem: GroupedProblem) -> Result<(), Error> {
    let GroupedProblem { experts, n, k, rows, .. } = problem;
    check_dimension("experts", experts)?;
    check_dimension("n", n)?;
    check_k(k)?;
    let within = |what, value, limit| {
        if value > limit { Err(PlanError::OutOfRange { what, value, limit }) } else { Ok(()) }
    };
    within("the number of experts", experts, MAX_EXPERTS as usize)?;
    within("n", n, i32::MAX as usize)?;
    within("the number of rows", rows, i32::MAX as usize)?;
    Ok(())
}

/// Returns the mean rows of an expert, and their likely deviation.
///
/// With random routing, the standard deviation is about the root of the mean.
fn mean_and_deviation(problem: GroupedProblem, expected_rows: usize) -> (f64, f64) {
    let mean = expected_rows as f64 / problem.experts.max(1) as f64;
    (mean, if problem.experts > 1 { mean.sqrt() } else { 0.0 })
}

/// Returns the smallest shape with room for the rows of most experts.
/// If there is none, returns the shape that computes experts of random sizes in the least time.
///
/// Of 100 experts about one has 2.5 deviations more rows than the mean.
/// `liquidgemm bench --moe --every-plan` measures every shape.
fn fitting_shape(problem: GroupedProblem, expected_rows: usize, figures: &DeviceFigures) -> TileShape {
    let (mean, deviation) = mean_and_deviation(problem, expected_rows);
    let likely = mean + 2.5 * deviation;
    let fits = |shape: &&TileShape| {
        if shape.strips > 1 {
            return likely <= f64::from(shape.tokens);
        }
        // Tiles of 64 channels are for few rows, where tiles of 128 would leave SMs without work.
        // With a short K, each tile costs more than the bytes that it waits for, so there should be few.
        let active = problem.experts.min(expected_rows);
        let wide = active.saturating_mul(problem.n.div_ceil(WIDE_CHANNELS));
        likely <= f64::from(shape.tokens / 2 + 1)
            && wide < figures.multiprocessors as usize
            && problem.k >= LEAST_K_OF_64_CHANNELS
    };
    let largest = GROUPED_SHAPES[GROUPED_SHAPES.len() - 1];
    let fitting = *GROUPED_SHAPES.iter().find(fits).unwrap_or(&largest);
    if fitting != largest {
        return fitting;
    }
    let cost = |shape: &TileShape| {
        // Eight sizes that are equally likely.
        let deviations = [-1.53, -0.89, -0.49, -0.16, 0.16, 0.49, 0.89, 1.53];
        let costs = deviations.map(|by: f64| cost_of_rows(by.mul_add(deviation, mean), shape.tokens));
        costs.iter().sum::<f64>()
    };
    let large = GROUPED_SHAPES.iter().filter(|shape| shape.moves_registers());
    large.copied().min_by(|a, b| cost(a).total_cmp(&cost(b))).unwrap_or(largest)
}

/// Returns what an expert of `rows` rows costs in tiles of up to `tokens` tokens, in rows.
fn cost_of_rows(rows: f64, tokens: u32) -> f64 {
    let rows = rows.clamp(1.0, f64::from(i32::MAX)) as u32;
    let tiles = f64::from(token_tiles(rows, tokens));
    let products = f64::from(rows.next_multiple_of(WGMMA_ROW_STEP));
    let least = if tokens > MAX_WGMMA_TOKENS { LEAST_ROWS_PER_DOUBLE_TILE } else { LEAST_ROWS_PER_TILE };
    (tiles * ROWS_PER_TILE + products).max(tiles * least)
}

/// Returns the thread blocks of a cluster, for tiles of this shape.
///
/// Two that share their activations, if each has as many tiles as the other.
fn fitting_cluster(problem: GroupedProblem, shape: TileShape) -> u32 {
    let has_pairs = problem.n.div_ceil(shape.channels() as usize).is_multiple_of(2);
    if has_pairs { 2 } else { 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(experts: usize, rows_n_k: [usize; 3]) -> GroupedPlan {
        let problem = GroupedProblem::contiguous(experts, rows_n_k);
        GroupedPlan::new(problem, rows_n_k[0], &DeviceFigures::H100_SXM).unwrap()
    }

    #[test]
    fn tiles_have_room_for_the_rows_of_most_experts() {
        let tokens = |experts, rows| plan(experts, [rows, 4096, 7168]).shape().tokens;
        assert_eq!([1, 3, 8, 64, 1024].map(|rows| tokens(256, rows)), [32, 32, 64, 64, 64]);
        assert_eq!([4096, 8192, 16_384, 32_768].map(|rows| tokens(256, rows)), [64, 64, 96, 160]);
        assert_eq!([49_152, 65_536, 1 << 20].map(|rows| tokens(256, rows)), [256, 320, 320]);
        assert_eq!([16, 64, 100, 160, 1000].map(|rows| tokens(1, rows)), [32, 64, 160, 160, 256]);
        assert_eq!(plan(128, [8, 2048, 768]).shape().tokens, 64, "with a short K, fewer tiles");
    }

    #[test]
    fn a_launch_fills_the_gpu_and_clusters_are_limited_to_pairs() {
        let problem = GroupedProblem::contiguous(8, [16_384, 4096, 4096]);
        assert_eq!((plan(8, [16_384, 4096, 4096]).blocks(), plan(8, [1, 1, 1]).blocks()), (132, 132));
        let with = |cluster_size, clusters| {
            let plan = GroupedPlan::with_config(problem, GROUPED_SHAPES[0], cluster_size, clusters).unwrap();
            (plan.cluster_size(), plan.blocks(), plan.schedule().channel_tiles)
        };
        assert_eq!(
            [with(0, 0), with(1, 5), with(2, 5), with(9, 66)],
            [(1, 1, 64), (1, 5, 64), (2, 10, 32), (2, 132, 32)]
        );
    }

    #[test]
    fn what_the_kernels_cannot_count_is_refused() {
        let new = |problem: GroupedProblem| GroupedPlan::new(problem, 1, &DeviceFigures::H100_SXM);
        assert!(new(GroupedProblem::contiguous(512, [1, 1, 1])).is_ok());
        for experts in [0, 513] {
            assert!(new(GroupedProblem::contiguous(experts, [1, 1, 1])).is_err());
        }
        for [rows, n, k] in [[1 << 31, 1, 1], [1, 1 << 31, 1], [1, 0, 1], [1, 1, 0], [1, 1, 131_073]] {
            assert!(new(GroupedProblem::contiguous(2, [rows, n, k])).is_err());
        }
        assert!(new(GroupedProblem::masked(512, [1 << 23, 1, 1])).is_err());
        assert!(new(GroupedProblem::contiguous(512, [1 << 30, 1 << 20, 1])).is_err(), "too many tiles");
    }
}
