//! How long a plan will take, so that the planner can choose: a model of few terms, fitted to measured plans.
//!
//! A launch is as slow as its slower side, memory or the busiest persistent block; on top come a constant and, where tiles are
//! shared along K, the handing over of partial sums. The constants were fitted to 14,000 timed plans of 314 problems on an H100 SXM: the
//! linear layers of LLaMA-2 and LLaMA-3 and their shards, at powers of two and between, and eight other matrices; by least squares, and from
//! there so that the choices lose least. `docs/performance-log.md` says how much. They need not be
//! exact: a wrong choice costs time, never a bit of the result.
//!
//! The constants are an H100 SXM's. On another GPU what memory does scales with its memory's speed, and steps and tiles with the clock;
//! latencies and the power limit stay. No other GPU has been measured.

use liquidgemm_format::tile::TileShape;

use super::layout::{Column, Grid, Layout};
use crate::DeviceFigures;

/// What one tile shape costs on an H100 SXM.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct ShapeCost {
    /// Microseconds for 128 along K.
    step: f64,
    /// Microseconds for what a tile needs besides its steps: scales, epilogue, refilling the pipeline.
    tile: f64,
}

/// Shapes of a family differ only in their tokens and in how many blocks share a tile's K.
#[derive(Clone, Copy)]
struct Family {
    strips: u32,
    /// Consumers of a strip.
    halves: u32,
    /// Whether a cluster's blocks share a tile's K.
    shares_k: bool,
    /// Whether the consumers fill the ring themselves.
    fills_itself: bool,
}

/// A shape whose cost was fitted.
struct Anchor {
    family: Family,
    tokens: u32,
    cost: ShapeCost,
}

const fn anchor(family: Family, tokens: u32, step: f64, tile: f64) -> Anchor {
    Anchor { family, tokens, cost: ShapeCost { step, tile } }
}

const fn family(strips: u32, halves: u32) -> Family {
    Family { strips, halves, shares_k: false, fills_itself: false }
}

const NARROW: Family = family(1, 2);
const MIDDLE: Family = family(2, 1);
const BROAD: Family = family(3, 1);
const WIDE: Family = Family { fills_itself: true, ..BROAD };
const NARROW_SPLIT: Family = Family { shares_k: true, ..NARROW };
const MIDDLE_SPLIT: Family = Family { shares_k: true, ..MIDDLE };
const BROAD_SPLIT: Family = Family { shares_k: true, ..BROAD };

/// The fitted shapes, those of a family by their tokens. The costs of the others lie on straight lines between them.
const ANCHORS: [Anchor; 31] = [
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
    anchor(WIDE, 144, 0.5577, 3.157),
    anchor(WIDE, 176, 0.6233, 2.260),
    anchor(WIDE, 208, 0.6948, 2.666),
    anchor(WIDE, 256, 0.8565, 3.423),
    anchor(NARROW_SPLIT, 16, 0.1354, 0.483),
    anchor(NARROW_SPLIT, 32, 0.1441, 0.753),
    anchor(NARROW_SPLIT, 64, 0.1625, 0.754),
    anchor(NARROW_SPLIT, 96, 0.1730, 1.115),
    anchor(NARROW_SPLIT, 128, 0.2190, 1.505),
    anchor(MIDDLE_SPLIT, 96, 0.2692, 1.717),
    anchor(MIDDLE_SPLIT, 128, 0.3182, 1.604),
    anchor(BROAD_SPLIT, 128, 0.4500, 2.900),
];

impl Family {
    const fn of(shape: TileShape) -> Self {
        Self {
            strips: shape.strips,
            halves: shape.halves,
            shares_k: shape.split > 1,
            fills_itself: !shape.has_producers(),
        }
    }

    const fn is(self, other: Self) -> bool {
        self.strips == other.strips
            && self.halves == other.halves
            && self.shares_k == other.shares_k
            && self.fills_itself == other.fills_itself
    }
}

/// The cost of a shape: that of its family's anchor of as many tokens, or on the line between the two next to it. Only ever evaluated by the
/// compiler, which refuses a list of tile shapes in which one lies beyond its family's anchors.
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
        step: below.cost.step + (above.cost.step - below.cost.step) * share,
        tile: below.cost.tile
            + (above.cost.tile - below.cost.tile) * share
            + SPLIT_BLOCK * shape.split.saturating_sub(2) as f64,
    }
}

/// Microseconds of every launch.
const LAUNCH: f64 = 1.718;
/// Megabytes that memory delivers in a microsecond: no more than its peak.
const MEMORY: f64 = 3.292;
/// Microseconds for a tile's partial sums: a flag raised, seen and answered.
const HANDOVER: f64 = 0.663;
/// Microseconds for each part of a tile beyond [`FREE_PARTS`]: its owner adds them up one after the other.
const FURTHER_PART: f64 = 0.0706;
/// Parts of a tile that take no longer than the flag and their sums.
const FREE_PARTS: f64 = 4.0;
/// Microseconds for a megabyte of partial sums, written and read.
const PARTIAL_SUMS: f64 = 0.1039;
/// How much longer a step takes in a cluster of two, which waits for two blocks at every stage.
const CLUSTER_STEP: f64 = 1.1796;
/// How much longer a step of the stream takes where workers begin and end inside tiles, of blocks on their own and of
/// clusters: they are no longer at the same place at the same time, and share less of what the L2 cache holds.
const STAGGERED_STEP: [f64; 2] = [0.0612, 0.0297];
/// How much longer still where the GPU's power is at its limit: what is fetched once more costs power.
const HOT_STAGGERED_STEP: f64 = 0.2521;
/// How much longer a step takes in a block on its own once the GPU's power is at its limit: a cluster reads the activations
/// once for two.
const HOT_STEP: f64 = 0.1181;
/// Microseconds of multiplying after which half of that is felt.
const HEATING: f64 = 160.7;
/// How much shorter a step is for each multiprocessor, as a share of all, that takes no part: it leaves the others its part
/// of the L2 cache and of the power.
const IDLE_STEP: f64 = 0.3186;
/// The same for tiles of consumer-loaded kernels, which the tensor cores limit.
const IDLE_CONSUMER_LOADED_STEP: f64 = 0.1055;
/// Microseconds for each token of a tile at which a launch of another kernel begins: its instructions are no longer where the launch before
/// left them, and what handles a tile's tokens is unrolled.
pub(super) const SWITCH: f64 = 0.00430;
/// Microseconds for a second launch behind the first.
pub(super) const SECOND_LAUNCH: f64 = 0.2873;
/// Microseconds for each block beyond two that share a tile's K.
const SPLIT_BLOCK: f64 = 0.2241;
/// SMs that are enough to draw all that memory delivers, as a share of all ...
const SATURATING: f64 = 124.0 / 132.0;
/// ... and how much longer memory takes for each one less.
const UNSATURATED: f64 = 0.6169;
/// How much longer memory takes where blocks share a tile's K.
const SPLIT_MEMORY: f64 = 1.060;
/// Megabytes that the next launch's blocks load ahead on each SM that this one leaves to them.
const LOADED_AHEAD: f64 = 0.2144;
/// How sharply the slower of compute and memory hides the other.
const SHARPNESS: i32 = 5;

/// More than what rounding does to an estimate, as a share of it.
pub(super) const ROUNDING: f64 = 1e-9;

/// What the layouts of a grid take at the least: microseconds that the busiest worker computes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bound {
    /// With whole tiles.
    whole: f64,
    /// With tiles that workers share.
    shared: f64,
    /// What handing over their partial sums takes at the least.
    handover: f64,
}

impl Bound {
    /// Microseconds of the fastest layout, about.
    pub(super) fn least(&self) -> f64 {
        self.whole.min(self.shared + self.handover)
    }

    /// Whether all layouts certainly take longer than `room`'s limit.
    pub(super) fn exceeds(&self, room: &Room) -> bool {
        let shared = if self.handover > 0.0 { room.beside_handover } else { room.alone };
        self.whole > room.alone && self.shared > shared
    }
}

/// How long a busiest worker may compute so that a launch isn't certainly longer than a limit.
#[derive(Clone, Copy, Debug)]
pub(super) struct Room {
    /// In a launch that hands over no sums.
    pub(super) alone: f64,
    /// In one that does.
    beside_handover: f64,
}

impl Room {
    /// Where memory takes `memory` at the least.
    pub(super) fn new(memory: f64, limit: f64) -> Self {
        let most = |limit: f64| {
            let limit = (limit - LAUNCH) * (1.0 + ROUNDING);
            if limit < memory {
                return -1.0;
            }
            (limit.powi(SHARPNESS) - memory.powi(SHARPNESS)).powf(1.0 / f64::from(SHARPNESS))
                * (1.0 + ROUNDING)
        };
        Self { alone: most(limit), beside_handover: most(limit - HANDOVER) }
    }
}

/// The model of one GPU.
#[derive(Clone, Copy, Debug)]
pub(super) struct Model {
    /// SMs.
    pub(super) multiprocessors: f64,
    /// The part of the GPU that one of them is.
    multiprocessor_share: f64,
    /// Memory's speed as a multiple of an H100 SXM's.
    pub(super) memory_speed: f64,
    /// How much longer than on an H100 SXM a number of cycles takes.
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

    /// Microseconds that memory takes for a launch in tiles, of a problem of `[m, n, k]`.
    pub(super) fn memory(&self, problem: [usize; 3]) -> f64 {
        moved_megabytes(problem) / (MEMORY * self.memory_speed)
    }

    /// An estimate of a launch's time in microseconds, where memory takes `memory` of them and other launches of the same plan
    /// `elsewhere`.
    pub(super) fn estimate(&self, layout: &Layout, memory: f64, elsewhere: f64) -> f64 {
        let (compute, handover) = self.compute_and_handover(layout, elsewhere);
        launch_estimate(compute, self.drawn(layout, memory)) + handover
    }

    /// Microseconds that memory takes with this layout, where it takes at least `memory`.
    pub(super) fn drawn(&self, layout: &Layout, memory: f64) -> f64 {
        let Layout { grid, workers, .. } = layout;
        let blocks = (f64::from(*workers) * f64::from(grid.cluster)).min(self.multiprocessors);
        let missing = (SATURATING - blocks * self.multiprocessor_share).max(0.0);
        let ahead = LOADED_AHEAD * (self.multiprocessors - blocks) / (MEMORY * self.memory_speed);
        let split = if grid.facts.shape.split > 1 { SPLIT_MEMORY } else { 1.0 };
        memory.max(memory * (1.0 + UNSATURATED * missing) - ahead) * split
    }

    /// As [`estimate`](Self::estimate) of a plan's only launch, unless it is certainly longer than `limit`.
    pub(super) fn estimate_below(&self, layout: &Layout, memory: f64, limit: f64) -> Option<f64> {
        let (compute, handover) = self.compute_and_handover(layout, 0.0);
        let memory = self.drawn(layout, memory);
        (!is_longer(compute, memory, limit - handover)).then(|| launch_estimate(compute, memory) + handover)
    }

    /// What any layout of a grid takes at the least where `most` clusters run at a time.
    ///
    /// Whole tiles go out as evenly as can be. Tiles that are shared keep all workers busy all the time; with fewer workers each step takes
    /// less, but by less than there is more to do for each.
    pub(super) fn bound(&self, grid: &Grid, most: u32) -> Bound {
        let k_steps = f64::from(grid.k_steps * grid.facts.spans);
        let tile = grid.facts.cost.tile * self.cycle;
        let even = grid.even_workers(most);
        let waves = f64::from(grid.tiles.div_ceil(even));
        let whole = self.heated(grid, waves * (k_steps * self.step(grid, even) + tile), 0.0);
        if !grid.facts.can_stream {
            return Bound { whole, shared: f64::INFINITY, handover: 0.0 };
        }
        let workers = most.min(grid.most_workers);
        let steps = k_steps * f64::from(grid.tiles) / f64::from(workers);
        let tiles = f64::from(grid.tiles.div_ceil(workers));
        let shared = self.heated(grid, steps * self.step(grid, workers) + tiles * tile, 0.0);
        let handover = if grid.tiles.is_multiple_of(workers) { 0.0 } else { HANDOVER };
        Bound { whole, shared, handover }
    }

    /// Microseconds that each tile of a column is computed at the least, on a part of the GPU's SMs that its work would fill.
    pub(super) fn least_tile_compute(&self, column: &Column) -> f64 {
        let cost = column.facts.cost;
        let steps = f64::from(column.k_steps * column.facts.spans);
        let blocks = f64::from(column.cluster) * self.multiprocessor_share;
        (steps * cost.step + cost.tile) * self.cycle * blocks
    }

    /// Microseconds of a step of 128 along K, where the GPU isn't hot and all workers begin and end with tiles.
    fn step(&self, grid: &Grid, workers: u32) -> f64 {
        let blocks = f64::from(workers) * f64::from(grid.cluster);
        let idle = (1.0 - blocks * self.multiprocessor_share).max(0.0);
        let cluster = if grid.shares_activations() { CLUSTER_STEP } else { 1.0 };
        let idle_step = if grid.facts.has_producers { IDLE_STEP } else { IDLE_CONSUMER_LOADED_STEP };
        grid.facts.cost.step * self.cycle * cluster * (1.0 - idle_step * idle)
    }

    /// What multiplying takes where the power limit is felt.
    fn heated(&self, grid: &Grid, compute: f64, elsewhere: f64) -> f64 {
        let heat = if grid.shares_activations() { 0.0 } else { HOT_STEP * hotness(compute + elsewhere) };
        compute * (1.0 + heat)
    }

    /// What multiplying takes at the least where the power limit is felt, if it takes `compute` on a GPU that isn't hot and other launches
    /// take `elsewhere`: a cluster, which doesn't feel it, takes longer anyway.
    pub(super) fn least_heated(&self, compute: f64, elsewhere: f64) -> f64 {
        const { assert!(CLUSTER_STEP > 1.0 + HOT_STEP) };
        compute * (1.0 + HOT_STEP * hotness(compute + elsewhere))
    }

    /// Microseconds that the busiest worker of a layout computes, and microseconds for handing over partial sums.
    pub(super) fn compute_and_handover(&self, layout: &Layout, elsewhere: f64) -> (f64, f64) {
        let Layout { grid, workers, streamed_tiles, .. } = layout;
        let (facts, workers, streamed_tiles) = (grid.facts, *workers, *streamed_tiles);
        let k_steps = f64::from(grid.k_steps * facts.spans);
        let tile = facts.cost.tile * self.cycle;
        let step = self.step(grid, workers);

        // The busiest worker: its part of the stream, which may begin and end inside a tile, and whole tiles.
        let whole = f64::from((grid.tiles - streamed_tiles).div_ceil(workers));
        let whole_compute = whole * (k_steps * step + tile);
        if streamed_tiles == 0 {
            return (self.heated(grid, whole_compute, elsewhere), 0.0);
        }
        let stream_steps = f64::from(streamed_tiles) * k_steps / f64::from(workers);
        let splits = !streamed_tiles.is_multiple_of(workers);
        let even = splits && workers.is_multiple_of(streamed_tiles);
        let stream_tiles =
            f64::from(streamed_tiles.div_ceil(workers)) + if splits && !even { 1.0 } else { 0.0 };
        let stream_compute = stream_steps * step;
        let compute = whole_compute + stream_compute + stream_tiles * tile;
        let staggered = if splits && !even {
            STAGGERED_STEP[usize::from(grid.cluster > 1)]
                + HOT_STAGGERED_STEP * hotness(compute + elsewhere).powi(2)
        } else {
            0.0
        };
        let compute = self.heated(grid, compute + stream_compute * staggered, elsewhere);

        let handover = if splits {
            let parts = (f64::from(workers) / f64::from(streamed_tiles)).max(1.0);
            let sums = megabytes(facts.partial_bytes * f64::from(workers) * f64::from(grid.cluster));
            let further = (parts.ceil() - FREE_PARTS).max(0.0);
            HANDOVER + FURTHER_PART * further + PARTIAL_SUMS * sums * parts
        } else {
            0.0
        };
        (compute, handover)
    }
}

/// The estimate of a launch that hands over no sums.
pub(super) fn launch_estimate(compute: f64, memory: f64) -> f64 {
    slower_of(compute, memory) + LAUNCH
}

/// At most that, without a root.
pub(super) fn least_launch_estimate(compute: f64, memory: f64) -> f64 {
    compute.max(memory) + LAUNCH
}

/// Whether such a launch is certainly longer than `limit`: found without a root, and not where rounding could decide.
fn is_longer(compute: f64, memory: f64, limit: f64) -> bool {
    let limit = (limit - LAUNCH) * (1.0 + ROUNDING);
    limit < 0.0 || compute.powi(SHARPNESS) + memory.powi(SHARPNESS) > limit.powi(SHARPNESS)
}

pub(super) fn megabytes(bytes: f64) -> f64 {
    bytes / 1e6
}

/// Megabytes of the packed weights, the activations and the 16-bit output of a problem of `[m, n, k]`.
pub(super) fn moved_megabytes(problem: [usize; 3]) -> f64 {
    let [m, n, k] = problem.map(|extent| extent as f64);
    megabytes(n * k * 17.0 / 32.0 + m * k + 2.0 * m * n)
}

/// How much of the power limit is felt in a launch that multiplies for so many microseconds, from 0 to 1.
fn hotness(compute: f64) -> f64 {
    compute / (compute + HEATING)
}

/// A little more than the longer of two times that overlap.
pub(super) fn slower_of(compute: f64, memory: f64) -> f64 {
    (compute.powi(SHARPNESS) + memory.powi(SHARPNESS)).powf(1.0 / SHARPNESS as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Plan;

    #[test]
    fn anchors_cost_what_was_fitted_and_others_lie_between() {
        let cost = |strips, tokens, halves, split| match TileShape::find(strips, tokens, halves, split) {
            Some(shape) => shape_cost(shape),
            None => panic!("no such shape"),
        };
        let anchor = |family: Family, tokens| {
            let found = ANCHORS.iter().find(|anchor| anchor.family.is(family) && anchor.tokens == tokens);
            found.map(|anchor| anchor.cost)
        };
        assert_eq!(Some(cost(3, 128, 1, 1)), anchor(BROAD, 128));
        let (Some(below), Some(above)) = (anchor(WIDE, 144), anchor(WIDE, 176)) else { panic!("no anchors") };
        let between = cost(3, 160, 1, 1);
        assert!((between.step - (below.step + above.step) / 2.0).abs() < 1e-9, "{between:?}");
        let [two, four] = [2, 4].map(|split| cost(1, 32, 2, split));
        assert_eq!((two.step, two.tile + 2.0 * SPLIT_BLOCK), (four.step, four.tile));
    }

    #[test]
    fn more_tokens_are_never_estimated_to_be_faster() {
        for (n, k) in [(4096, 4096), (12_288, 4096), (57_344, 8192)] {
            let figures = DeviceFigures::H100_SXM;
            let plan = |m| Plan::new(m, n, k, &figures).unwrap();
            for m in (0..13).map(|power| 1usize << power) {
                let (fewer, more) = (plan(m), plan(2 * m));
                // The constants of the kernel for few tokens were fitted apart from those of the tiles.
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
