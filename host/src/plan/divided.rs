//! Plans of two launches, one behind the other: some channels in whole waves of one tile, the others in tiles that fit what is left.

use std::fmt;
use std::ops::Range;

use liquidgemm_format::brick::BRICK_CHANNELS;
use liquidgemm_format::tile::{TILE_SHAPES, TileShape};

use super::cost::{SECOND_LAUNCH, SWITCH};
use super::{Cut, Method, Plan, Tiled, check_problem, clusters, is_half_empty};
use crate::Error;
use crate::gpu::GpuError;

/// The least tokens and channels of the tiles that fill whole waves: with smaller ones what is left over is little, or memory is the limit.
const LEAST_EXTENT: u32 = 128;

/// A problem whose channels two launches share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Divided {
    /// Channels of the first part.
    boundary: usize,
    parts: [Tiled; 2],
}

impl Divided {
    /// The parts of a problem with `n` channels, in the order of their launches: which channels, in which tiles.
    #[must_use]
    pub fn parts(&self, n: usize) -> [(Range<usize>, Tiled); 2] {
        [(0..self.boundary, self.parts[0]), (self.boundary..n, self.parts[1])]
    }

    /// An estimate of both launches' time in microseconds, for a problem of `[m, n, k]`.
    pub(super) fn estimate_us(&self, [m, n, k]: [usize; 3]) -> f64 {
        let problems = [[m, self.boundary, k], [m, n - self.boundary, k]];
        // Each finds the GPU as hot as both make it, and the other's instructions.
        let alone = |index: usize| self.parts[index].estimate_us(problems[index], 0.0);
        let part = |index: usize| {
            let tiled = self.parts[index];
            tiled.estimate_us(problems[index], alone(1 - index)) + SWITCH * f64::from(tiled.shape().tokens)
        };
        part(0) + part(1) + SECOND_LAUNCH
    }
}

impl Plan {
    /// The plan that computes the first `boundary` channels by a launch of the first cut, and the others by one of the second behind it.
    ///
    /// # Errors
    /// As [`Plan::with_cut`], and if the boundary isn't between two strips of 64 channels.
    pub fn divided(m: usize, n: usize, k: usize, boundary: usize, cuts: [Cut; 2]) -> Result<Self, Error> {
        check_problem(m, n, k)?;
        if boundary == 0 || boundary >= n || !boundary.is_multiple_of(BRICK_CHANNELS) {
            return Err(GpuError::NoSuchBoundary { boundary, n }.into());
        }
        let parts = [Tiled::new(m, boundary, k, cuts[0])?, Tiled::new(m, n - boundary, k, cuts[1])?];
        Ok(Self { m, n, k, method: Method::Divided(Divided { boundary, parts }) })
    }

    /// The divided plans that are worth considering: for each large tile that leaves a wave partly empty, the waves that are full, or one
    /// less, and the rest as is estimated to be the fastest.
    pub(super) fn divided_candidates(m: usize, n: usize, k: usize, multiprocessors: u32) -> Vec<Self> {
        let mut plans: Vec<Self> = Vec::new();
        let mut rests: Vec<(usize, Option<Tiled>)> = Vec::new();
        let large = |shape: &TileShape| {
            shape.tokens.min(shape.channels()) >= LEAST_EXTENT
                && shape.split == 1
                && !is_half_empty(*shape, m)
        };
        for shape in TILE_SHAPES.into_iter().filter(large) {
            for cluster in clusters(shape, multiprocessors) {
                let most = (multiprocessors / cluster).max(1) as usize;
                let channels = (shape.channels() * cluster) as usize;
                let token_tiles = m.div_ceil(shape.tokens as usize);
                let full_waves = n.div_ceil(channels) * token_tiles / most;
                for waves in [full_waves, full_waves.saturating_sub(1)] {
                    let channel_tiles = waves.saturating_mul(most) / token_tiles;
                    let boundary = channel_tiles.saturating_mul(channels);
                    if waves == 0 || boundary == 0 || boundary >= n {
                        continue;
                    }
                    let tiles = channel_tiles * token_tiles;
                    let workers = tiles.div_ceil(waves) as u32;
                    let cut = Cut { shape, cluster, workers, streamed_waves: 0 };
                    // Too many tiles of this shape; a larger one may do.
                    let Ok(first) = Tiled::new(m, boundary, k, cut) else { continue };
                    let second = match rests.iter().find(|(other, _)| *other == boundary) {
                        Some(&(_, rest)) => rest,
                        None => {
                            let rest = Self::fastest_tiled(m, n - boundary, k, multiprocessors);
                            rests.push((boundary, rest));
                            rest
                        }
                    };
                    let divided = |second| Divided { boundary, parts: [first, second] };
                    let plan = |second| Self { m, n, k, method: Method::Divided(divided(second)) };
                    plans.extend(second.map(plan));
                }
            }
        }
        plans
    }

    /// The tiles of one launch that are estimated to be the fastest, if any can be counted.
    fn fastest_tiled(m: usize, n: usize, k: usize, multiprocessors: u32) -> Option<Tiled> {
        let plans = Self::whole_candidates(m, n, k, multiprocessors).ok()?;
        let timed = plans.iter().filter_map(|plan| Some((plan.estimate_us(), *plan.tiled()?)));
        timed.min_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, tiled)| tiled)
    }
}

impl fmt::Display for Divided {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [first, second] = &self.parts;
        write!(f, "{} channels: {first}; then the others: {second}", self.boundary)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_boundary_that_is_not_between_two_strips_is_refused() {
        let cuts = [Cut { shape: TILE_SHAPES[0], cluster: 1, workers: 4, streamed_waves: 0 }; 2];
        assert!(Plan::divided(5, 200, 64, 128, cuts).is_ok());
        for boundary in [0, 1, 127, 200, 256, usize::MAX] {
            match Plan::divided(5, 200, 64, boundary, cuts) {
                Err(Error::Gpu(error @ GpuError::NoSuchBoundary { .. })) => {
                    assert!(error.to_string().contains(&boundary.to_string()), "{error}");
                }
                other => panic!("{boundary}: {other:?}"),
            }
        }
    }

    #[test]
    fn a_problem_is_divided_where_that_saves_most_of_a_wave() {
        // 320 tiles of 128 × 128, or 160 of 128 × 256: 2.4 and 1.2 waves of 132.
        let plan = Plan::new(512, 10_240, 8192, 132).unwrap();
        let Method::Divided(divided) = plan.method() else { panic!("{plan}") };
        let [(first, whole_waves), (second, _)] = divided.parts(10_240);
        assert_eq!((first.start, first.end, second.end), (0, second.start, 10_240));
        let schedule = whole_waves.schedule();
        assert_eq!((schedule.tiles() % schedule.workers, schedule.streamed_tiles), (0, 0), "{plan}");
        // 256 tiles of 128 × 256: two even waves.
        assert!(Plan::new(1024, 8192, 8192, 132).unwrap().tiled().is_some());
    }

    #[test]
    fn both_launches_together_take_longer_than_either() {
        for plan in Plan::divided_candidates(512, 28_672, 4096, 132) {
            let Method::Divided(divided) = plan.method() else { panic!("{plan}") };
            for (channels, tiled) in divided.parts(28_672) {
                assert!(plan.estimate_us() > tiled.estimate_us([512, channels.len(), 4096], 0.0), "{plan}");
            }
        }
    }
}
