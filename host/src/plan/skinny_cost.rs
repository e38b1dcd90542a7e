//! How long a skinny plan will take, in the same microseconds as the estimates of tiled plans.

use super::Skinny;

/// Microseconds of every launch.
const LAUNCH: f64 = 2.0;
/// Megabytes that memory delivers in a microsecond.
const MEMORY: f64 = 2.95;

impl Skinny {
    /// An estimate of the launch's time in microseconds, for a problem of `[m, n, k]` on so many multiprocessors.
    pub(super) fn estimate_us(&self, problem: [usize; 3], multiprocessors: u32) -> f64 {
        let [m, n, k] = problem.map(|extent| extent as f64);
        let busy = (self.blocks() as f64 / multiprocessors as f64).min(1.0);
        (n * k * 17.0 / 32.0 + m * k + 2.0 * m * n) / 1e6 / MEMORY / busy + LAUNCH
    }
}
