//! Plans of two launches, one behind the other: some channels in whole waves of one tile, the others in tiles that fit what is left.

use std::fmt;
use std::ops::Range;

use liquidgemm_format::brick::BRICK_CHANNELS;

use super::cost::{Model, SECOND_LAUNCH, SWITCH};
use super::layout::{Grid, Layout, sizes};
use super::shapes::{SHAPES, ShapeFacts};
use super::{Cut, Method, Plan, Tiled, check_problem};
use crate::gpu::GpuError;
use crate::{DeviceFigures, Error};

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

    pub(super) fn new(boundary: usize, parts: [Tiled; 2]) -> Self {
        Self { boundary, parts }
    }

    /// An estimate of both launches' time in microseconds, for a problem of `[m, n, k]`.
    pub(super) fn estimate_us(&self, [m, n, k]: [usize; 3], model: &Model) -> f64 {
        let memory = [self.boundary, n - self.boundary].map(|channels| model.memory([m, channels, k]));
        let layouts = self.parts.map(|tiled| Layout::of(&tiled));
        // Each finds the GPU as hot as both make it, and the other's instructions.
        let alone = |index: usize| model.estimate(&layouts[index], memory[index], 0.0);
        let part = |index: usize| {
            let tokens = f64::from(self.parts[index].shape().tokens);
            model.estimate(&layouts[index], memory[index], alone(1 - index)) + SWITCH * tokens
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
    pub(super) fn divided_candidates([m, n, k]: [usize; 3], figures: &DeviceFigures) -> Vec<Self> {
        let model = Model::new(figures);
        let mut rests: Vec<(usize, Option<Tiled>)> = Vec::new();
        let mut plans = Vec::new();
        for (boundary, first) in firsts([m, n, k], figures) {
            let second = match rests.iter().find(|(other, _)| *other == boundary) {
                Some(&(_, rest)) => rest,
                None => {
                    let rest = Self::fastest_tiled([m, n - boundary, k], figures, &model);
                    rests.push((boundary, rest));
                    rest
                }
            };
            let plan = |second| Self {
                m,
                n,
                k,
                method: Method::Divided(Divided::new(boundary, [first.tiled(), second])),
            };
            plans.extend(second.map(plan));
        }
        plans
    }

    /// The tiles of one launch that are estimated to be the fastest, if any can be counted: compared one by one.
    fn fastest_tiled(problem: [usize; 3], figures: &DeviceFigures, model: &Model) -> Option<Tiled> {
        let plans = Self::whole_candidates(problem, figures).ok()?;
        let timed = plans.iter().filter_map(|plan| Some((plan.estimate_with(model), *plan.tiled()?)));
        timed.min_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, tiled)| tiled)
    }
}

/// The first launches that are worth considering, each with its channels.
pub(super) fn firsts(
    [m, n, k]: [usize; 3],
    figures: &DeviceFigures,
) -> impl Iterator<Item = (usize, Layout)> {
    let figures = *figures;
    let large = move |facts: &&'static ShapeFacts| {
        facts.shape.tokens.min(facts.channels) >= LEAST_EXTENT
            && facts.shape.split == 1
            && !facts.is_half_empty(m)
    };
    let sized =
        move |facts| sizes(facts, &figures).map(move |(cluster, most)| (facts, cluster, most as usize));
    SHAPES.iter().filter(large).flat_map(sized).flat_map(move |(facts, cluster, most)| {
        let channels = (facts.channels * cluster) as usize;
        let token_tiles = m.div_ceil(facts.shape.tokens as usize);
        let full_waves = n.div_ceil(channels) * token_tiles / most;
        [full_waves, full_waves.saturating_sub(1)].into_iter().filter_map(move |waves| {
            let channel_tiles = waves.saturating_mul(most) / token_tiles;
            let boundary = channel_tiles.saturating_mul(channels);
            if waves == 0 || boundary == 0 || boundary >= n {
                return None;
            }
            let workers = (channel_tiles * token_tiles).div_ceil(waves) as u32;
            // Too many tiles of this shape; a larger one may do.
            let grid = Grid::new([m, boundary, k], facts, cluster).ok()?;
            Some((boundary, grid.layout(workers, 0)))
        })
    })
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
    use liquidgemm_format::tile::TILE_SHAPES;

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
        let plan = Plan::new(512, 10_240, 8192, &DeviceFigures::H100_SXM).unwrap();
        let Method::Divided(divided) = plan.method() else { panic!("{plan}") };
        let [(first, whole_waves), (second, _)] = divided.parts(10_240);
        assert_eq!((first.start, first.end, second.end), (0, second.start, 10_240));
        let schedule = whole_waves.schedule();
        assert_eq!((schedule.tiles() % schedule.workers, schedule.streamed_tiles), (0, 0), "{plan}");
        // 256 tiles of 128 × 256: two even waves.
        assert!(Plan::new(1024, 8192, 8192, &DeviceFigures::H100_SXM).unwrap().tiled().is_some());
    }

    #[test]
    fn both_launches_together_take_longer_than_either() {
        let figures = DeviceFigures::H100_SXM;
        let model = Model::new(&figures);
        for plan in Plan::divided_candidates([512, 28_672, 4096], &figures) {
            let Method::Divided(divided) = plan.method() else { panic!("{plan}") };
            for (channels, tiled) in divided.parts(28_672) {
                assert!(
                    plan.estimate_us(&figures)
                        > model.estimate(&Layout::of(&tiled), model.memory([512, channels.len(), 4096]), 0.0),
                    "{plan}"
                );
            }
        }
    }
}
