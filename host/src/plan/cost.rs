//! How long a plan will take, so that the planner can choose: a model of few terms, fitted to measured plans.
//!
//! A launch is as slow as its slower side, memory or the busiest worker; on top come a constant and, where tiles are
//! shared along K, the handing over of partial sums. The constants were fitted to the plans of ten linear layers
//! of LLaMA-2 and LLaMA-3 at 16 to 1,024 tokens, and of some of them at 8, 32, 2,048 and 4,096, on an H100 SXM: by least
//! squares, and from there so that the choices lose least; the lines of tiles of 128 tokens whose K two blocks share, and what streams cost
//! at the power limit, were set by hand; the lines of the smaller such tiles by sweeps of ten more matrices at 12 to 64 tokens, that of 192 × 256 and what
//! two launches cost by two of the first ten at 128 to 4,096, and what many parts of a tile cost by one of eight small matrices. `docs/performance-log.md` says how much. They need not be
//! exact: a wrong choice costs time, never a bit of the result.

use liquidgemm_format::tile::TileShape;

use super::Tiled;

/// What one tile shape costs.
#[derive(Clone, Copy)]
struct ShapeCost {
    channels: u32,
    tokens: u32,
    /// Blocks that share a tile's K.
    split: u32,
    /// Microseconds for 128 along K.
    step: f64,
    /// Microseconds for what a tile needs besides its steps: scales, epilogue, refilling the pipeline.
    tile: f64,
}

const fn cost(channels: u32, tokens: u32, step: f64, tile: f64) -> ShapeCost {
    ShapeCost { channels, tokens, split: 1, step, tile }
}

const fn split_cost(channels: u32, tokens: u32, step: f64, tile: f64) -> ShapeCost {
    ShapeCost { split: 2, ..cost(channels, tokens, step, tile) }
}

const SHAPE_COSTS: [ShapeCost; 31] = [
    cost(64, 16, 0.112, 0.66),
    cost(64, 32, 0.128, 0.63),
    cost(64, 64, 0.137, 0.79),
    cost(64, 96, 0.163, 1.00),
    cost(64, 128, 0.211, 1.04),
    cost(128, 8, 0.176, 0.58),
    cost(128, 16, 0.203, 0.26),
    cost(128, 32, 0.201, 0.59),
    cost(128, 64, 0.229, 0.87),
    cost(128, 96, 0.273, 0.89),
    cost(128, 128, 0.318, 0.95),
    cost(128, 160, 0.384, 1.06),
    cost(128, 192, 0.454, 1.54),
    cost(128, 256, 0.584, 2.27),
    cost(192, 16, 0.268, 0.52),
    cost(192, 32, 0.305, 0.78),
    cost(192, 64, 0.354, 0.92),
    cost(192, 96, 0.404, 1.04),
    cost(192, 128, 0.464, 1.34),
    cost(192, 144, 0.542, 3.20),
    cost(192, 176, 0.620, 2.60),
    cost(192, 208, 0.696, 2.91),
    cost(192, 256, 0.844, 3.86),
    split_cost(64, 16, 0.115, 0.90),
    split_cost(64, 32, 0.141, 1.03),
    split_cost(64, 64, 0.139, 1.49),
    split_cost(64, 96, 0.167, 1.52),
    split_cost(64, 128, 0.205, 1.72),
    split_cost(128, 96, 0.278, 1.56),
    split_cost(128, 128, 0.324, 1.48),
    split_cost(192, 128, 0.465, 2.22),
];

/// Microseconds of every launch.
const LAUNCH: f64 = 1.754;
/// Megabytes that memory delivers in a microsecond: no more than its peak.
const MEMORY: f64 = 3.244;
/// Multiprocessors of an H100.
pub(super) const MULTIPROCESSORS: f64 = 132.0;
/// Microseconds for a tile's partial sums: a flag raised, seen and answered.
const HANDOVER: f64 = 0.700;
/// Microseconds for each part of a tile beyond [`FREE_PARTS`]: its owner adds them up one after the other.
const FURTHER_PART: f64 = 0.123;
/// Parts of a tile that take no longer than the flag and their sums.
const FREE_PARTS: f64 = 4.0;
/// Microseconds for a megabyte of partial sums, written and read.
const PARTIAL_SUMS: f64 = 0.0975;
/// How much longer a step takes in a cluster of two, which waits for two blocks at every stage.
const CLUSTER_STEP: f64 = 1.053;
/// How much longer a step of the stream takes where workers begin and end inside tiles, of blocks on their own and of
/// clusters: they are no longer at the same place at the same time, and share less of what the L2 cache holds.
const STAGGERED_STEP: [f64; 2] = [0.055, 0.030];
/// How much longer still where the GPU's power is at its limit: what is fetched once more costs power.
const HOT_STAGGERED_STEP: f64 = 0.288;
/// How much longer a step takes in a block on its own once the GPU's power is at its limit: a cluster reads the activations
/// once for two.
const HOT_STEP: f64 = 0.1462;
/// Microseconds of multiplying after which half of that is felt.
const HEATING: f64 = 160.7;
/// How much shorter a step is for each multiprocessor, as a share of all, that takes no part: it leaves the others its part
/// of the L2 cache and of the power.
const IDLE_STEP: f64 = 0.366;
/// Microseconds for each token of a tile at which a launch of another kernel begins: its instructions are no longer where the launch before
/// left them, and what handles a tile's tokens is unrolled.
pub(super) const SWITCH: f64 = 0.0054;
/// Microseconds for each block beyond two that share a tile's K.
const SPLIT_PART: f64 = 0.121;
/// How sharply the slower of compute and memory hides the other.
const SHARPNESS: i32 = 5;

impl Tiled {
    /// An estimate of the launch's time in microseconds, for a problem of `[m, n, k]`, where other launches of the same plan take
    /// `elsewhere` microseconds.
    pub(super) fn estimate_us(&self, problem: [usize; 3], elsewhere: f64) -> f64 {
        let (shape, schedule) = (self.shape(), self.schedule());
        let mut costs = shape_cost(shape);
        costs.tile += SPLIT_PART * f64::from(shape.split.saturating_sub(2));
        let (workers, k_steps) = (schedule.workers as f64, (schedule.k_steps * shape.spans()) as f64);
        let streamed = schedule.streamed_tiles as f64;

        // The busiest worker: its part of the stream, which may begin and end inside a tile, and whole tiles.
        let whole = (schedule.whole_tiles() as f64 / workers).ceil();
        let stream_steps = streamed * k_steps / workers;
        let splits = schedule.streamed_tiles > 0 && !schedule.streamed_tiles.is_multiple_of(schedule.workers);
        let even = splits && schedule.workers.is_multiple_of(schedule.streamed_tiles);
        let stream_tiles = (stream_steps / k_steps).ceil() + if splits && !even { 1.0 } else { 0.0 };
        let idle = (1.0 - workers * self.cluster() as f64 / MULTIPROCESSORS).max(0.0);
        let shares_activations = self.cluster() > shape.split;
        let cluster = if shares_activations { CLUSTER_STEP } else { 1.0 };
        let step = costs.step * cluster * (1.0 - IDLE_STEP * idle);
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

        let from_memory = moved_megabytes(problem) / MEMORY;
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
    let family = || SHAPE_COSTS.iter().filter(|cost| (cost.channels, cost.split > 1) == (shape.channels(), shape.split > 1));
    let below = family().filter(|cost| cost.tokens <= shape.tokens).last();
    let above = family().find(|cost| cost.tokens >= shape.tokens);
    let (below, above) = match (below, above) {
        (Some(below), Some(above)) => (below, above),
        (Some(one), None) | (None, Some(one)) => (one, one),
        (None, None) => (&SHAPE_COSTS[0], &SHAPE_COSTS[0]),
    };
    if below.tokens == above.tokens {
        return ShapeCost { step: below.step * (shape.tokens as f64 / below.tokens as f64).max(1.0), ..*below };
    }
    let t = f64::from(shape.tokens - below.tokens) / f64::from(above.tokens - below.tokens);
    let mix = |a: f64, b: f64| a + (b - a) * t;
    ShapeCost { tokens: shape.tokens, step: mix(below.step, above.step), tile: mix(below.tile, above.tile), ..*below }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Plan;
    use liquidgemm_format::tile::TILE_SHAPES;

    #[test]
    fn every_tile_shape_has_its_cost() {
        for shape in TILE_SHAPES {
            assert_eq!(shape_cost(shape).channels, shape.channels());
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
