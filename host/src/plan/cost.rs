//! Estimates how long a tiled plan takes, by a model of few terms that was fitted to measured plans.
//!
//! A launch takes as long as the slower of memory and the busiest persistent thread block, plus a constant.
//! Stream-K adds the exchange of partial sums.
//!
//! The constants were fitted to 14,000 timed plans of 314 problems on an H100 SXM.
//! The problems are the linear layers of LLaMA-2 and LLaMA-3 and their shards,
//! with M at powers of two and between them, and eight other matrices.
//! A least-squares fit came first; from there the loss of the planner's choices was minimized.
//! `docs/performance-log.md` states that loss.
//! The estimates need not be exact: a wrong choice costs time but never changes a bit of the result.
//!
//! On another GPU, memory terms scale with its memory speed.
//! Terms per K-tile and per tile scale with its clock.
//! Latencies and the power limit stay those of an H100 SXM. No other GPU has been measured.

use liquidgemm_format::tile::TileShape;

use super::layout::{Column, Grid, Layout};
use crate::{DeviceFigures, Problem};

/// The cost of one tile shape on an H100 SXM.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct ShapeCost {
    /// Microseconds per K-tile.
    k_tile: f64,
    /// Microseconds per tile besides its K-tiles: scales, epilogue, refilling the pipeline.
    tile: f64,
}

/// The common properties of a family of shapes.
///
/// Shapes of a family differ only in tokens and in the number of thread blocks that share a tile's K.
#[derive(Clone, Copy)]
struct Family {
    strips: u32,
    /// Consumer warpgroups per strip.
    warpgroup_split: u32,
    /// Whether the thread blocks of a cluster share a tile's K (cluster split-K).
    shares_k: bool,
    /// Whether the consumers fill the ring (consumer-loaded kernel).
    fills_itself: bool,
}

/// A shape whose cost was fitted.
struct Anchor {
    family: Family,
    tokens: u32,
    cost: ShapeCost,
}

const fn anchor(family: Family, tokens: u32, k_tile: f64, tile: f64) -> Anchor {
    Anchor { family, tokens, cost: ShapeCost { k_tile, tile } }
}

const fn family(strips: u32, warpgroup_split: u32) -> Family {
    Family { strips, warpgroup_split, shares_k: false, fills_itself: false }
}

const NARROW: Family = family(1, 2);
const MIDDLE: Family = family(2, 1);
const BROAD: Family = family(3, 1);
const CONSUMER_LOADED: Family = Family { fills_itself: true, ..BROAD };
const NARROW_SPLIT: Family = Family { shares_k: true, ..NARROW };
const MIDDLE_SPLIT: Family = Family { shares_k: true, ..MIDDLE };
const BROAD_SPLIT: Family = Family { shares_k: true, ..BROAD };

/// The fitted shapes, those of a family in the order of their tokens. Costs of other shapes are interpolated.
const ANCHORS: [Anchor; 32] = [
    anchor(NARROW, 16, 0.1238, 0.712),
    anchor(NARROW, 32, 0.1196, 0.666),
    anchor(NARROW, 64, 0.1372, 0.770),
    anchor(NARROW, 96, 0.1688, 1.036),
    anchor(NARROW, 128, 0.2092, 1.083),
    anchor(MIDDLE, 8, 0.1826, 0.609),
    anchor(MIDDLE, 16, 0.2018, 0.550),
    anchor(MIDDLE, 32, 0.2260, 0.606),
    anchor(MIDDLE, 64, 0.2299, 0.847),
    anchor(MIDDLE, 96, 0.2720, 1.010),
    anchor(MIDDLE, 128, 0.3153, 0.970),
    anchor(MIDDLE, 160, 0.3796, 1.090),
    anchor(MIDDLE, 192, 0.4567, 1.417),
    anchor(MIDDLE, 256, 0.5814, 1.938),
    anchor(BROAD, 16, 0.3061, 0.470),
    anchor(BROAD, 32, 0.3122, 0.779),
    anchor(BROAD, 64, 0.3612, 0.942),
    anchor(BROAD, 96, 0.4017, 1.174),
    anchor(BROAD, 128, 0.4612, 1.248),
    anchor(CONSUMER_LOADED, 144, 0.5577, 3.157),
    anchor(CONSUMER_LOADED, 176, 0.6233, 2.260),
    anchor(CONSUMER_LOADED, 208, 0.6948, 2.666),
    anchor(CONSUMER_LOADED, 256, 0.8565, 3.423),
    anchor(NARROW_SPLIT, 16, 0.1354, 0.483),
    anchor(NARROW_SPLIT, 32, 0.1441, 0.753),
    anchor(NARROW_SPLIT, 64, 0.1625, 0.754),
    anchor(NARROW_SPLIT, 96, 0.1730, 1.115),
    anchor(NARROW_SPLIT, 128, 0.2190, 1.505),
    anchor(MIDDLE_SPLIT, 96, 0.2692, 1.717),
    anchor(MIDDLE_SPLIT, 128, 0.3182, 1.604),
    anchor(MIDDLE_SPLIT, 176, 0.4220, 2.100),
    anchor(BROAD_SPLIT, 128, 0.4500, 2.900),
];

impl Family {
    const fn of(shape: TileShape) -> Self {
        Self {
            strips: shape.strips,
            warpgroup_split: shape.warpgroup_split,
            shares_k: shape.cluster_split > 1,
            fills_itself: !shape.has_producers(),
        }
    }

    const fn is(self, other: Self) -> bool {
        self.strips == other.strips
            && self.warpgroup_split == other.warpgroup_split
            && self.shares_k == other.shares_k
            && self.fills_itself == other.fills_itself
    }
}

/// Returns a shape's cost, interpolated linearly between the two nearest anchors of its family.
///
/// It is only evaluated at compile time. A shape beyond its family's anchors is a compile error.
pub(super) const fn shape_cost(shape: TileShape) -> ShapeCost {
    let family = Family::of(shape);
    let [mut below, mut above]: [Option<&Anchor>; 2] = [None; 2];
    let mut index = 0;
    while index < ANCHORS.len() {
        let anchor = &ANCHORS[index];
        if anchor.family.is(family) {
            if anchor.tokens <= shape.tokens {
                below = Some(anchor);
            }
            if anchor.tokens >= shape.tokens && above.is_none() {
                above = Some(anchor);
            }
        }
        index += 1;
    }
    let (Some(below), Some(above)) = (below, above) else {
        panic!("a tile shape lies beyond the anchors of its family");
    };
    let share = if above.tokens == below.tokens {
        0.0
    } else {
        (shape.tokens - below.tokens) as f64 / (above.tokens - below.tokens) as f64
    };
    ShapeCost {
        k_tile: below.cost.k_tile + (above.cost.k_tile - below.cost.k_tile) * share,
        tile: below.cost.tile
            + (above.cost.tile - below.cost.tile) * share
            + SPLIT_BLOCK * shape.cluster_split.saturating_sub(2) as f64,
    }
}

/// Microseconds per launch.
const LAUNCH: f64 = 1.718;
/// Memory bandwidth in megabytes per microsecond, at most its peak.
const MEMORY: f64 = 3.292;
/// Microseconds to exchange a tile's partial sums: a flag is raised, seen and answered.
const HANDOVER: f64 = 0.663;
/// Microseconds per part of a tile beyond [`FREE_PARTS`].
/// The tile's owner adds parts one after another.
const FURTHER_PART: f64 = 0.0706;
/// Parts of a tile that need no time beyond [`HANDOVER`] and [`PARTIAL_SUMS`].
const FREE_PARTS: f64 = 4.0;
/// Microseconds per megabyte of partial sums, written and read.
const PARTIAL_SUMS: f64 = 0.1039;
/// Factor on the time of a K-tile in a cluster of two, because each stage waits for two thread blocks.
const CLUSTER_K_TILE: f64 = 1.1796;
/// Relative increase of a K-tile's time in stream-K tiles if their parts begin and end inside tiles.
/// The first value is for single thread blocks, the second for clusters of several.
/// Their main loops then do not advance together, so they share less data in the L2 cache.
const STAGGERED_K_TILE: [f64; 2] = [0.0612, 0.0297];
/// Further relative increase at the GPU's power limit, because refetching data costs power.
const HOT_STAGGERED_K_TILE: f64 = 0.2521;
/// Relative increase of a K-tile's time at the GPU's power limit, for thread blocks without a cluster.
/// A cluster reads the activations once for two thread blocks.
const HOT_K_TILE: f64 = 0.1181;
/// Microseconds of compute after which the power limit has half of its full effect.
const HEATING: f64 = 160.7;
/// Relative decrease of a K-tile's time, times the fraction of idle SMs.
/// An idle SM leaves its part of the L2 cache and of the power to the others.
const IDLE_K_TILE: f64 = 0.3186;
/// The same for consumer-loaded kernels, which the tensor cores limit.
const IDLE_CONSUMER_LOADED_K_TILE: f64 = 0.1055;
/// Microseconds per token of the tile, for a launch whose predecessor ran another kernel.
/// The instruction cache must be refilled, and code that handles a tile's tokens is unrolled.
pub(super) const SWITCH: f64 = 0.00430;
/// Microseconds for a second launch after the first.
pub(super) const SECOND_LAUNCH: f64 = 0.2873;
/// Microseconds per tile for each thread block beyond two that shares its K.
const SPLIT_BLOCK: f64 = 0.2241;
/// Fraction of the SMs that saturates memory bandwidth.
const SATURATING: f64 = 124.0 / 132.0;
/// Relative increase of memory's time, times the fraction of SMs that are missing to [`SATURATING`].
const UNSATURATED: f64 = 0.6169;
/// Factor on memory's time under cluster split-K.
const SPLIT_MEMORY: f64 = 1.060;
/// Megabytes that the next launch prefetches on each SM that this launch leaves idle.
const LOADED_AHEAD: f64 = 0.2144;
/// Exponent of the norm that combines compute and memory time.
/// The larger it is, the better the slower one hides the other.
const SHARPNESS: i32 = 5;

/// Upper bound of an estimate's relative rounding error.
pub(super) const ROUNDING: f64 = 1e-9;

/// Lower bounds for the layouts of a grid: microseconds of compute of the busiest cluster.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bound {
    /// With whole tiles.
    whole: f64,
    /// With stream-K.
    shared: f64,
    /// The least time to exchange partial sums under stream-K.
    handover: f64,
}

impl Bound {
    /// Returns about the microseconds of the fastest layout.
    pub(super) fn least(&self) -> f64 {
        self.whole.min(self.shared + self.handover)
    }

    /// Returns whether all layouts certainly exceed the limit that `room` was made for.
    pub(super) fn exceeds(&self, room: &Room) -> bool {
        let shared = if self.handover > 0.0 { room.beside_handover } else { room.alone };
        self.whole > room.alone && self.shared > shared
    }
}

/// The most compute time of the busiest cluster with which a launch does not certainly exceed a limit.
#[derive(Clone, Copy, Debug)]
pub(super) struct Room {
    /// In a launch without an exchange of partial sums.
    pub(super) alone: f64,
    /// In a launch with one.
    beside_handover: f64,
}

impl Room {
    /// Computes the compute times for a limit, if memory takes at least `memory` microseconds.
    pub(super) fn new(memory: f64, limit: f64) -> Self {
        let most = |limit: f64| {
            let limit = (limit - LAUNCH) * (1.0 + ROUNDING);
            if limit < memory {
                return -1.0;
            }
            // An f32 root is fast. The second factor compensates for its rounding.
            let power = (limit.powi(SHARPNESS) - memory.powi(SHARPNESS)) as f32;
            f64::from(power.powf(1.0 / SHARPNESS as f32)) * (1.0 + 8.0 * f64::from(f32::EPSILON))
        };
        Self { alone: most(limit), beside_handover: most(limit - HANDOVER) }
    }
}

/// The cost model of one GPU.
#[derive(Clone, Copy, Debug)]
pub(super) struct Model {
    /// SMs.
    pub(super) multiprocessors: f64,
    /// The fraction of the GPU that one SM is.
    multiprocessor_share: f64,
    /// Memory speed as a multiple of an H100 SXM's.
    pub(super) memory_speed: f64,
    /// Duration of a cycle as a multiple of an H100 SXM's.
    pub(super) cycle: f64,
}

impl Model {
    pub(super) fn new(figures: &DeviceFigures) -> Self {
        let multiprocessors = f64::from(figures.multiprocessors.max(1));
        Self {
            multiprocessors,
            multiprocessor_share: multiprocessors.recip(),
            memory_speed: figures.memory_speed(),
            cycle: figures.cycle(),
        }
    }

    /// Returns memory's microseconds for a tiled launch that computes `problem`.
    pub(super) fn memory(&self, problem: Problem) -> f64 {
        moved_megabytes(problem) / (MEMORY * self.memory_speed)
    }

    /// Estimates a launch's time in microseconds.
    ///
    /// Memory takes `memory` microseconds of it, and the other launches of the same plan take `elsewhere`.
    pub(super) fn estimate(&self, layout: &Layout, memory: f64, elsewhere: f64) -> f64 {
        let (compute, handover) = self.compute_and_handover(layout, elsewhere);
        launch_estimate(compute, self.drawn(layout, memory)) + handover
    }

    /// Returns memory's microseconds with this layout, if it takes at least `memory`.
    pub(super) fn drawn(&self, layout: &Layout, memory: f64) -> f64 {
        let Layout { grid, clusters, .. } = layout;
        let blocks = (f64::from(*clusters) * f64::from(grid.cluster)).min(self.multiprocessors);
        let missing = (SATURATING - blocks * self.multiprocessor_share).max(0.0);
        let ahead = LOADED_AHEAD * (self.multiprocessors - blocks) / (MEMORY * self.memory_speed);
        let cluster_split = if grid.facts.shape.cluster_split > 1 { SPLIT_MEMORY } else { 1.0 };
        memory.max(memory * (1.0 + UNSATURATED * missing) - ahead) * cluster_split
    }

    /// Like [`estimate`](Self::estimate) for a plan with one launch.
    ///
    /// Returns `None` if the estimate certainly exceeds `limit`.
    pub(super) fn estimate_below(&self, layout: &Layout, memory: f64, limit: f64) -> Option<f64> {
        let (compute, handover) = self.compute_and_handover(layout, 0.0);
        let memory = self.drawn(layout, memory);
        (!is_longer(compute, memory, limit - handover)).then(|| launch_estimate(compute, memory) + handover)
    }

    /// Returns lower bounds for all layouts of a grid, if `most` clusters run at a time.
    ///
    /// Whole tiles are dealt out as evenly as possible.
    /// Stream-K keeps all clusters busy all the time. With fewer clusters a K-tile would take less time,
    /// but by less than the work of each cluster grows.
    #[inline]
    pub(super) fn bound(&self, grid: &Grid, most: u32) -> Bound {
        let k_tiles = f64::from(grid.k_iterations * grid.facts.k_tiles);
        let tile = grid.facts.cost.tile * self.cycle;
        let even = grid.even_clusters(most);
        let waves = f64::from(grid.tiles.div_ceil(even));
        let whole = self.heated(grid, waves * (k_tiles * self.k_tile(grid, even) + tile), 0.0);
        if !grid.facts.can_stream_k {
            return Bound { whole, shared: f64::INFINITY, handover: 0.0 };
        }
        let clusters = most.min(grid.most_clusters);
        let k_tiles = k_tiles * f64::from(grid.tiles) / f64::from(clusters);
        let tiles = f64::from(grid.tiles.div_ceil(clusters));
        let shared = self.heated(grid, k_tiles * self.k_tile(grid, clusters) + tiles * tile, 0.0);
        let handover = if grid.tiles.is_multiple_of(clusters) { 0.0 } else { HANDOVER };
        Bound { whole, shared, handover }
    }

    /// Returns a lower bound of a tile's compute time, in microseconds of the whole GPU.
    ///
    /// That is the time on the SMs of the tile's cluster, times their fraction of all SMs.
    pub(super) fn least_tile_compute(&self, column: &Column) -> f64 {
        let cost = column.facts.cost;
        let k_tiles = f64::from(column.k_iterations * column.facts.k_tiles);
        let blocks = f64::from(column.cluster) * self.multiprocessor_share;
        (k_tiles * cost.k_tile + cost.tile) * self.cycle * blocks
    }

    /// Returns the microseconds of a K-tile.
    ///
    /// The power limit and the effects of clusters that begin or end inside tiles are not included.
    fn k_tile(&self, grid: &Grid, clusters: u32) -> f64 {
        let blocks = f64::from(clusters) * f64::from(grid.cluster);
        let idle = (1.0 - blocks * self.multiprocessor_share).max(0.0);
        let cluster = if grid.shares_activations() { CLUSTER_K_TILE } else { 1.0 };
        let idle_k_tile = if grid.facts.has_producers { IDLE_K_TILE } else { IDLE_CONSUMER_LOADED_K_TILE };
        grid.facts.cost.k_tile * self.cycle * cluster * (1.0 - idle_k_tile * idle)
    }

    /// Returns a launch's compute time with the effect of the power limit.
    fn heated(&self, grid: &Grid, compute: f64, elsewhere: f64) -> f64 {
        let heat = if grid.shares_activations() { 0.0 } else { HOT_K_TILE * hotness(compute + elsewhere) };
        compute * (1.0 + heat)
    }

    /// Returns a lower bound of a launch's compute time with the effect of the power limit.
    ///
    /// `compute` is its time without that effect, and other launches take `elsewhere`.
    /// Launches with clusters do not feel the limit, but take longer for another reason ([`CLUSTER_K_TILE`]).
    pub(super) fn least_heated(&self, compute: f64, elsewhere: f64) -> f64 {
        const { assert!(CLUSTER_K_TILE > 1.0 + HOT_K_TILE) };
        compute * (1.0 + HOT_K_TILE * hotness(compute + elsewhere))
    }

    /// Returns two times in microseconds: compute of the busiest cluster, and exchange of partial sums.
    pub(super) fn compute_and_handover(&self, layout: &Layout, elsewhere: f64) -> (f64, f64) {
        let Layout { grid, clusters, stream_k_tiles, .. } = layout;
        let (facts, clusters, stream_k_tiles) = (grid.facts, *clusters, *stream_k_tiles);
        let k_tiles = f64::from(grid.k_iterations * facts.k_tiles);
        let tile = facts.cost.tile * self.cycle;
        let k_tile = self.k_tile(grid, clusters);

        // The busiest cluster has whole tiles and a part of the stream-K tiles.
        // That part may begin and end inside a tile.
        let whole = f64::from((grid.tiles - stream_k_tiles).div_ceil(clusters));
        let whole_compute = whole * (k_tiles * k_tile + tile);
        if stream_k_tiles == 0 {
            return (self.heated(grid, whole_compute, elsewhere), 0.0);
        }
        let shared_k_tiles = f64::from(stream_k_tiles) * k_tiles / f64::from(clusters);
        let splits = !stream_k_tiles.is_multiple_of(clusters);
        let even = splits && clusters.is_multiple_of(stream_k_tiles);
        let stream_tiles =
            f64::from(stream_k_tiles.div_ceil(clusters)) + if splits && !even { 1.0 } else { 0.0 };
        let stream_compute = shared_k_tiles * k_tile;
        let compute = whole_compute + stream_compute + stream_tiles * tile;
        let staggered = if splits && !even {
            STAGGERED_K_TILE[usize::from(grid.cluster > 1)]
                + HOT_STAGGERED_K_TILE * hotness(compute + elsewhere).powi(2)
        } else {
            0.0
        };
        let compute = self.heated(grid, compute + stream_compute * staggered, elsewhere);

        let handover = if splits {
            let parts = (f64::from(clusters) / f64::from(stream_k_tiles)).max(1.0);
            let sums = megabytes(facts.partial_bytes * f64::from(clusters) * f64::from(grid.cluster));
            let further = (parts.ceil() - FREE_PARTS).max(0.0);
            HANDOVER + FURTHER_PART * further + PARTIAL_SUMS * sums * parts
        } else {
            0.0
        };
        (compute, handover)
    }
}

/// Estimates a launch without an exchange of partial sums.
pub(super) fn launch_estimate(compute: f64, memory: f64) -> f64 {
    slower_of(compute, memory) + LAUNCH
}

/// Returns a lower bound of [`launch_estimate`], without a root.
pub(super) fn least_launch_estimate(compute: f64, memory: f64) -> f64 {
    compute.max(memory) + LAUNCH
}

/// Returns whether [`launch_estimate`] certainly exceeds `limit`.
///
/// It needs no root, and says no if rounding could decide.
fn is_longer(compute: f64, memory: f64, limit: f64) -> bool {
    let limit = (limit - LAUNCH) * (1.0 + ROUNDING);
    limit < 0.0 || compute.powi(SHARPNESS) + memory.powi(SHARPNESS) > limit.powi(SHARPNESS)
}

pub(super) fn megabytes(bytes: f64) -> f64 {
    bytes / 1e6
}

/// Returns the megabytes of a problem's packed weights, activations and 16-bit output.
pub(super) fn moved_megabytes(problem: Problem) -> f64 {
    let [m, n, k] = [problem.m, problem.n, problem.k].map(|extent| extent as f64);
    megabytes(n * k * 17.0 / 32.0 + m * k + 2.0 * m * n)
}

/// Returns the effect of the power limit, from 0 to 1, in a launch with `compute` microseconds of compute.
fn hotness(compute: f64) -> f64 {
    compute / (compute + HEATING)
}

/// Returns a little more than the longer of two times that overlap.
pub(super) fn slower_of(compute: f64, memory: f64) -> f64 {
    (compute.powi(SHARPNESS) + memory.powi(SHARPNESS)).powf(1.0 / SHARPNESS as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Plan;

    #[test]
    fn anchors_keep_their_fitted_cost_and_other_shapes_are_interpolated() {
        let cost = |strips, tokens, warpgroup_split, cluster_split| match TileShape::find(
            strips,
            tokens,
            warpgroup_split,
            cluster_split,
        ) {
            Some(shape) => shape_cost(shape),
            None => panic!("no such shape"),
        };
        let anchor = |family: Family, tokens| {
            let found = ANCHORS.iter().find(|anchor| anchor.family.is(family) && anchor.tokens == tokens);
            found.map(|anchor| anchor.cost)
        };
        assert_eq!(Some(cost(3, 128, 1, 1)), anchor(BROAD, 128));
        let (Some(below), Some(above)) = (anchor(CONSUMER_LOADED, 144), anchor(CONSUMER_LOADED, 176)) else {
            panic!("no anchors")
        };
        let between = cost(3, 160, 1, 1);
        assert!((between.k_tile - (below.k_tile + above.k_tile) / 2.0).abs() < 1e-9, "{between:?}");
        let [two, four] = [2, 4].map(|cluster_split| cost(1, 32, 2, cluster_split));
        assert_eq!((two.k_tile, two.tile + 2.0 * SPLIT_BLOCK), (four.k_tile, four.tile));
    }

    #[test]
    fn more_tokens_are_never_estimated_to_be_faster() {
        for (n, k) in [(4096, 4096), (12_288, 4096), (57_344, 8192)] {
            let figures = DeviceFigures::H100_SXM;
            let plan = |m| Plan::new(Problem { m, n, k }, &figures).unwrap();
            for m in (0..13).map(|power| 1usize << power) {
                let (fewer, more) = (plan(m), plan(2 * m));
                // The constants of the skinny kernels were fitted separately from those of the tiles.
                let same_kind = fewer.tiled().is_some() == more.tiled().is_some();
                let least = if same_kind { 0.999 } else { 0.9 };
                assert!(
                    more.estimate_us(&figures) > least * fewer.estimate_us(&figures),
                    "{m} tokens of {n} x {k}: {} and {}",
                    fewer.estimate_us(&figures),
                    more.estimate_us(&figures)
                );
            }
        }
    }
}
