//! Estimates how long a skinny plan takes, in microseconds that compare with those of tiled plans.
//!
//! A launch takes as long as the slower of memory and arithmetic, plus three terms:
//! a constant, the activations that every thread block reads, and each further pass over K.
//! The constants were fitted together with those of the tiled plans, on an H100 SXM
//! (`docs/performance-log.md`).
//! They need not be exact: a wrong choice costs time but never changes a bit of the result.

use liquidgemm_format::brick;

use super::Skinny;
use super::cost::{Model, megabytes, moved_megabytes, slower_of};
use crate::Problem;

/// Microseconds per launch.
const LAUNCH: f64 = 1.408;
/// Memory bandwidth in megabytes per microsecond.
const MEMORY: f64 = 3.075;
/// Megabytes of activations per microsecond from the L2 cache to all thread blocks, besides the weights.
const ACTIVATIONS: f64 = 30.86;
/// Microseconds per m16 tile and 64 of K, for 8, 16 and 32 tokens.
/// They hold for a thread block that computes all m16 tiles of a pass together.
const M16_TILE: [f64; 3] = [0.01188, 0.01362, 0.01435];
/// Microseconds per pass after the first: the warps add their sums and request the activations again.
const PASS: f64 = 0.2664;

impl Skinny {
    /// Estimates the launch's time in microseconds.
    pub(super) fn estimate_us(&self, problem: Problem, model: &Model) -> f64 {
        let bricks = brick::k_blocks(problem.k) as f64;
        let [m, k] = [problem.m, problem.k].map(|extent| extent as f64);
        let (blocks, passes) = (self.busy_blocks() as f64, self.passes() as f64);

        let busy_share = (blocks / model.multiprocessors).min(1.0);
        let from_memory = moved_megabytes(problem) / (MEMORY * model.memory_speed) / busy_share;
        let m16_tile = match self.shape().tokens {
            0..=8 => M16_TILE[0],
            9..=16 => M16_TILE[1],
            _ => M16_TILE[2],
        };
        let compute = passes * self.shape().m16_tiles as f64 * bricks * m16_tile * model.cycle;
        let activations = megabytes(blocks * m * k * passes) / ACTIVATIONS * model.cycle;
        slower_of(compute, from_memory) + LAUNCH + activations + (passes - 1.0) * PASS * model.cycle
    }
}
