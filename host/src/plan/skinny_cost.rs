//! How long a skinny plan will take, in the same microseconds as the estimates of tiled plans.
//!
//! A launch is as slow as the slower of memory and arithmetic; on top come a constant, every block's reading of all
//! activations, and each further pass over K. The constants were fitted together with those of the tiled plans, on an H100 SXM
//! (`docs/performance-log.md`).
//! They need not be exact: a wrong choice costs time, never a bit of the result.

use liquidgemm_format::brick;

use super::Skinny;
use super::cost::{Model, megabytes, moved_megabytes, slower_of};

/// Microseconds of every launch.
const LAUNCH: f64 = 1.408;
/// Megabytes that memory delivers in a microsecond.
const MEMORY: f64 = 3.075;
/// Megabytes of activations that the L2 cache delivers to all blocks in a microsecond, besides the weights.
const ACTIVATIONS: f64 = 30.86;
/// Microseconds for a brick's share of one unit in a block, of all units that the kernel computes in a pass, for 8, 16 and
/// 32 tokens.
const UNIT: [f64; 3] = [0.01188, 0.01362, 0.01435];
/// Microseconds for every pass after the first: the warps' sums meet, and the activations are asked for anew.
const PASS: f64 = 0.2664;

impl Skinny {
    /// An estimate of the launch's time in microseconds, for a problem of `[m, n, k]`.
    pub(super) fn estimate_us(&self, problem: [usize; 3], model: &Model) -> f64 {
        let bricks = brick::k_blocks(problem[2]) as f64;
        let [m, _, k] = problem.map(|extent| extent as f64);
        let (blocks, passes) = (self.busy_blocks() as f64, self.passes() as f64);

        let busy_share = (blocks / model.multiprocessors).min(1.0);
        let from_memory = moved_megabytes(problem) / (MEMORY * model.memory_speed) / busy_share;
        let unit = match self.shape().tokens {
            0..=8 => UNIT[0],
            9..=16 => UNIT[1],
            _ => UNIT[2],
        };
        let compute = passes * self.shape().units as f64 * bricks * unit * model.cycle;
        let activations = megabytes(blocks * m * k * passes) / ACTIVATIONS * model.cycle;
        slower_of(compute, from_memory) + LAUNCH + activations + (passes - 1.0) * PASS * model.cycle
    }
}
