//! How long a plan will take, so that the planner can choose: a model of few terms, fitted to measured plans.
//!
//! A launch is as slow as its slower side, memory or the busiest persistent block; on top come a constant and, where tiles are
//! shared along K, the handing over of partial sums. The constants were fitted to 14,000 timed plans of 314 problems on an H100 SXM: the
//! linear layers of LLaMA-2 and LLaMA-3 and their shards, at powers of two and between, and eight other matrices; by least squares, and from
//! there so that the choices lose least. `docs/performance-log.md` says how much. They need not be
//! exact: a wrong choice costs time, never a bit of the result.

use liquidgemm_format::tile::{TILE_SHAPES, TileShape};

use super::Tiled;

/// What one tile shape costs.
#[derive(Clone, Copy, Debug, PartialEq)]
struct ShapeCost {
    /// Microseconds for 128 along K.
    step: f64,
    /// Microseconds for what a tile needs besides its steps: scales, epilogue, refilling the pipeline.
    tile: f64,
}

/// Shapes that differ in their tokens only: channels, whether blocks share a tile's K, whether consumers load for themselves.
type Family = (u32, bool, bool);

const SINGLE_64: Family = (64, false, false);
const SINGLE_128: Family = (128, false, false);
const SINGLE_192: Family = (192, false, false);
const CONSUMER_LOADED: Family = (192, false, true);
const SPLIT_64: Family = (64, true, false);
const SPLIT_128: Family = (128, true, false);
const SPLIT_192: Family = (192, true, false);

/// A shape of a family whose cost was fitted.
struct Anchor {
    family: Family,
    tokens: u32,
    cost: ShapeCost,
}

const fn anchor(family: Family, tokens: u32, step: f64, tile: f64) -> Anchor {
    Anchor { family, tokens, cost: ShapeCost { step, tile } }
}

/// By family and then by tokens. The cost is linear in the tokens between two of them; beyond the first and the last it is theirs.
const ANCHORS: [Anchor; 31] = [
    anchor(SINGLE_64, 16, 0.1238, 0.712),
    anchor(SINGLE_64, 32, 0.1196, 0.666),
    anchor(SINGLE_64, 64, 0.1372, 0.770),
    anchor(SINGLE_64, 96, 0.1688, 1.036),
    anchor(SINGLE_64, 128, 0.2092, 1.083),
    anchor(SINGLE_128, 8, 0.1826, 0.609),
    anchor(SINGLE_128, 16, 0.2018, 0.550),
    anchor(SINGLE_128, 32, 0.2260, 0.606),
    anchor(SINGLE_128, 64, 0.2299, 0.847),
    anchor(SINGLE_128, 96, 0.2720, 1.010),
    anchor(SINGLE_128, 128, 0.3153, 0.970),
    anchor(SINGLE_128, 160, 0.3796, 1.090),
    anchor(SINGLE_128, 192, 0.4567, 1.417),
    anchor(SINGLE_128, 256, 0.5814, 1.938),
    anchor(SINGLE_192, 16, 0.3061, 0.470),
    anchor(SINGLE_192, 32, 0.3122, 0.779),
    anchor(SINGLE_192, 64, 0.3612, 0.942),
    anchor(SINGLE_192, 96, 0.4017, 1.174),
    anchor(SINGLE_192, 128, 0.4612, 1.248),
    anchor(CONSUMER_LOADED, 144, 0.5577, 3.157),
    anchor(CONSUMER_LOADED, 176, 0.6233, 2.260),
    anchor(CONSUMER_LOADED, 208, 0.6948, 2.666),
    anchor(CONSUMER_LOADED, 256, 0.8565, 3.423),
    anchor(SPLIT_64, 16, 0.1354, 0.483),
    anchor(SPLIT_64, 32, 0.1441, 0.753),
    anchor(SPLIT_64, 64, 0.1625, 0.754),
    anchor(SPLIT_64, 96, 0.1730, 1.115),
    anchor(SPLIT_64, 128, 0.2190, 1.505),
    anchor(SPLIT_128, 96, 0.2692, 1.717),
    anchor(SPLIT_128, 128, 0.3182, 1.604),
    anchor(SPLIT_192, 128, 0.4500, 2.900),
];

/// The costs of all [`TILE_SHAPES`], in their order.
static SHAPE_COSTS: [ShapeCost; TILE_SHAPES.len()] = {
    let mut costs = [ANCHORS[0].cost; TILE_SHAPES.len()];
    let mut index = 0;
    while index < costs.len() {
        costs[index] = fitted_cost(TILE_SHAPES[index]);
        index += 1;
    }
    costs
};

/// The cost of a shape by its family's anchors.
const fn fitted_cost(shape: TileShape) -> ShapeCost {
    let (channels, is_split, loads) = (shape.channels(), shape.split > 1, !shape.has_producers());
    let mut below: Option<&Anchor> = None;
    let mut above: Option<&Anchor> = None;
    let mut index = 0;
    while index < ANCHORS.len() {
        let anchor = &ANCHORS[index];
        let (other_channels, other_split, other_loads) = anchor.family;
        if other_channels == channels && other_split == is_split && other_loads == loads {
            if anchor.tokens <= shape.tokens {
                below = Some(anchor);
            }
            if anchor.tokens >= shape.tokens && above.is_none() {
                above = Some(anchor);
            }
        }
        index += 1;
    }
    let cost = match (below, above) {
        (Some(below), Some(above)) if below.tokens < above.tokens => {
            let share = (shape.tokens - below.tokens) as f64 / (above.tokens - below.tokens) as f64;
            ShapeCost {
                step: below.cost.step + (above.cost.step - below.cost.step) * share,
                tile: below.cost.tile + (above.cost.tile - below.cost.tile) * share,
            }
        }
        (Some(anchor), _) | (_, Some(anchor)) => anchor.cost,
        (None, None) => panic!("a tile shape whose family has no anchor"),
    };
    let further_blocks = shape.split.saturating_sub(2);
    ShapeCost { tile: cost.tile + SPLIT_BLOCK * further_blocks as f64, ..cost }
}

/// Microseconds of every launch.
const LAUNCH: f64 = 1.718;
/// Megabytes that memory delivers in a microsecond: no more than its peak.
const MEMORY: f64 = 3.292;
/// Multiprocessors of an H100.
pub(super) const MULTIPROCESSORS: f64 = 132.0;
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
/// Microseconds for each token of a tile at which a launch of another kernel begins: its instructions are no longer where the launch before
/// left them, and what handles a tile's tokens is unrolled.
pub(super) const SWITCH: f64 = 0.00430;
/// The same for tiles of consumer-loaded kernels, which the tensor cores limit.
const IDLE_CONSUMER_LOADED_STEP: f64 = 0.1055;
/// Microseconds for a second launch behind the first.
pub(super) const SECOND_LAUNCH: f64 = 0.2873;
/// Microseconds for each block beyond two that share a tile's K.
const SPLIT_BLOCK: f64 = 0.2241;
/// SMs that are enough to draw all that memory delivers ...
const SATURATING: f64 = 124.0;
/// ... and how much longer memory takes for each one less, as a share of all.
const UNSATURATED: f64 = 0.6169;
/// How much longer memory takes where blocks share a tile's K.
const SPLIT_MEMORY: f64 = 1.060;
/// Megabytes that the next launch's blocks load ahead on each SM that this one leaves to them.
const LOADED_AHEAD: f64 = 0.2144;
/// How sharply the slower of compute and memory hides the other.
const SHARPNESS: i32 = 5;

impl Tiled {
    /// An estimate of the launch's time in microseconds, for a problem of `[m, n, k]`, where other launches of the same plan take
    /// `elsewhere` microseconds.
    pub(super) fn estimate_us(&self, problem: [usize; 3], elsewhere: f64) -> f64 {
        let (shape, schedule) = (self.shape(), self.schedule());
        let costs = shape_cost(shape);
        let (workers, k_steps) = (schedule.workers as f64, (schedule.k_steps * shape.spans()) as f64);
        let streamed = schedule.streamed_tiles as f64;

        // The busiest worker: its part of the stream, which may begin and end inside a tile, and whole tiles.
        let whole = (schedule.whole_tiles() as f64 / workers).ceil();
        let stream_steps = streamed * k_steps / workers;
        let splits = schedule.streamed_tiles > 0 && !schedule.streamed_tiles.is_multiple_of(schedule.workers);
        let even = splits && schedule.workers.is_multiple_of(schedule.streamed_tiles);
        let stream_tiles = (stream_steps / k_steps).ceil() + if splits && !even { 1.0 } else { 0.0 };
        let blocks = (workers * self.cluster() as f64).min(MULTIPROCESSORS);
        let idle = 1.0 - blocks / MULTIPROCESSORS;
        let idle_step = if shape.has_producers() { IDLE_STEP } else { IDLE_CONSUMER_LOADED_STEP };
        let shares_activations = self.cluster() > shape.split;
        let cluster = if shares_activations { CLUSTER_STEP } else { 1.0 };
        let step = costs.step * cluster * (1.0 - idle_step * idle);
        let compute = |stream_step: f64| {
            whole * k_steps * step + stream_steps * stream_step + (whole + stream_tiles) * costs.tile
        };
        let staggered = if splits && !even {
            STAGGERED_STEP[usize::from(self.cluster() > 1)]
                + HOT_STAGGERED_STEP * hotness(compute(step) + elsewhere).powi(2)
        } else {
            0.0
        };
        let compute = compute(step * (1.0 + staggered));
        let heat = if shares_activations { 0.0 } else { HOT_STEP * hotness(compute + elsewhere) };
        let compute = compute * (1.0 + heat);

        let all = moved_megabytes(problem) / MEMORY;
        let drawn = all * (1.0 + UNSATURATED * (SATURATING - blocks).max(0.0) / MULTIPROCESSORS);
        let from_memory = all.max(drawn - LOADED_AHEAD * (MULTIPROCESSORS - blocks) / MEMORY)
            * if shape.split > 1 { SPLIT_MEMORY } else { 1.0 };
        let handover = if splits {
            let parts = (workers / streamed).max(1.0);
            let sums = megabytes(shape.partial_bytes() as f64 * workers * self.cluster() as f64);
            let further = (parts.ceil() - FREE_PARTS).max(0.0);
            HANDOVER + FURTHER_PART * further + PARTIAL_SUMS * sums * parts
        } else {
            0.0
        };
        slower_of(compute, from_memory) + LAUNCH + handover
    }
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

fn shape_cost(shape: TileShape) -> ShapeCost {
    // A plan's shape is always one of the list.
    let index = TILE_SHAPES.iter().position(|&other| other == shape).unwrap_or(0);
    SHAPE_COSTS[index]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Plan;

    #[test]
    fn anchors_cost_what_was_fitted_and_shapes_between_them_a_value_between() {
        let step = |strips, tokens| shape_cost(TileShape::find(strips, tokens, 1, 1).unwrap()).step;
        for anchor in ANCHORS.iter().filter(|anchor| anchor.family == SINGLE_128) {
            assert_eq!(step(2, anchor.tokens), anchor.cost.step, "{} tokens", anchor.tokens);
        }
        assert!(step(2, 192) < step(2, 208) && step(2, 208) < step(2, 256));
        assert!(step(3, 128) < step(3, 144), "tiles of consumer-loaded kernels are a family of their own");
    }

    #[test]
    fn more_channels_and_tokens_take_longer() {
        for shape in TILE_SHAPES {
            for other in TILE_SHAPES.into_iter().filter(|other| other.split == shape.split) {
                if shape.channels() < other.channels() && shape.tokens == other.tokens {
                    assert!(shape_cost(shape).step < shape_cost(other).step, "{shape:?} and {other:?}");
                }
            }
        }
    }

    #[test]
    fn more_tokens_are_never_estimated_to_be_faster() {
        for (n, k) in [(4096, 4096), (12_288, 4096), (57_344, 8192)] {
            let plan = |m| Plan::new(m, n, k, 132).unwrap();
            for m in (0..13).map(|power| 1usize << power) {
                let (fewer, more) = (plan(m), plan(2 * m));
                // The constants of the kernel for few tokens were fitted apart from those of the tiles.
                let same_kind = fewer.tiled().is_some() == more.tiled().is_some();
                let least = if same_kind { 0.999 } else { 0.9 };
                assert!(
                    more.estimate_us() > least * fewer.estimate_us(),
                    "{m} tokens of {n} x {k}: {} and {}",
                    fewer.estimate_us(),
                    more.estimate_us()
                );
            }
        }
    }
}
