//! Two-launch plans: the first launch computes some channels in whole waves of one tile,
//! and the second computes the remaining channels in tiles that suit them.

use std::fmt;
use std::ops::Range;

use liquidgemm_format::brick::BRICK_CHANNELS;

use super::cost::{Model, SECOND_LAUNCH, SWITCH};
use super::layout::{Grid, Layout, sizes};
use super::shapes::{SHAPES, ShapeFacts};
use super::{Algorithm, Plan, TileConfig, Tiled, check_problem};
use crate::error::PlanError;
use crate::{DeviceFigures, Error, Problem};

/// The fewest tokens and channels of the first launch's tiles.
/// With smaller tiles the remainder is small, or memory is the limit.
const LEAST_EXTENT: u32 = 128;

/// Up to this many full waves, the first launch may leave one of them to the second.
/// Of more waves, one is too small a part to gain anything.
const MOST_WAVES_FOR_ONE_LESS: usize = 2;

/// A problem whose channels are divided between two launches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TwoLaunches {
    /// Channels of the first launch.
    boundary: usize,
    parts: [Tiled; 2],
}

impl TwoLaunches {
    /// Returns the channels and the tiling of both launches, in launch order. `n` is the problem's.
    #[must_use]
    pub fn parts(&self, n: usize) -> [(Range<usize>, Tiled); 2] {
        [(0..self.boundary, self.parts[0]), (self.boundary..n, self.parts[1])]
    }

    pub(super) fn new(boundary: usize, parts: [Tiled; 2]) -> Self {
        Self { boundary, parts }
    }

    /// Estimates both launches' time in microseconds.
    pub(super) fn estimate_us(&self, problem: Problem, model: &Model) -> f64 {
        let memory =
            [self.boundary, problem.n - self.boundary].map(|n| model.memory(Problem { n, ..problem }));
        let layouts = self.parts.map(|tiled| Layout::of(&tiled));
        // Both launches heat the GPU for each other, and each evicts the other's instructions.
        let alone = |index: usize| model.estimate(&layouts[index], memory[index], 0.0);
        let part = |index: usize| {
            let tokens = f64::from(self.parts[index].shape().tokens);
            model.estimate(&layouts[index], memory[index], alone(1 - index)) + SWITCH * tokens
        };
        part(0) + part(1) + SECOND_LAUNCH
    }
}

impl Plan {
    /// Makes the plan that computes the first `boundary` channels by one launch and the others by a second.
    ///
    /// The launches use `configs[0]` and `configs[1]`.
    ///
    /// # Errors
    /// As [`Plan::with_config`], and [`PlanError::NoSuchBoundary`]
    /// if `boundary` is not a multiple of 64 between 0 and `n`, both excluded.
    pub fn two_launches(problem: Problem, boundary: usize, configs: [TileConfig; 2]) -> Result<Self, Error> {
        check_problem(problem)?;
        let n = problem.n;
        if boundary == 0 || boundary >= n || !boundary.is_multiple_of(BRICK_CHANNELS) {
            return Err(PlanError::NoSuchBoundary { boundary, n }.into());
        }
        let parts = [
            Tiled::new(Problem { n: boundary, ..problem }, configs[0])?,
            Tiled::new(Problem { n: n - boundary, ..problem }, configs[1])?,
        ];
        Ok(Self { problem, algorithm: Algorithm::TwoLaunches(TwoLaunches { boundary, parts }) })
    }

    /// Returns the two-launch plans that are worth considering.
    ///
    /// Each large tile that leaves a wave partly empty gives one.
    /// The first launch has its full waves, and the second has the fastest estimated tiles for the rest.
    /// With two full waves there is another plan, whose first launch has only one.
    pub(super) fn two_launch_candidates(problem: Problem, figures: &DeviceFigures) -> Vec<Self> {
        let model = Model::new(figures);
        let mut rests: Vec<(usize, Option<Tiled>)> = Vec::new();
        let mut plans = Vec::new();
        for (boundary, first) in firsts(problem, figures) {
            let second = match rests.iter().find(|(other, _)| *other == boundary) {
                Some(&(_, rest)) => rest,
                None => {
                    let rest =
                        Self::fastest_tiled(Problem { n: problem.n - boundary, ..problem }, figures, &model);
                    rests.push((boundary, rest));
                    rest
                }
            };
            let plan = |second| Self {
                problem,
                algorithm: Algorithm::TwoLaunches(TwoLaunches::new(boundary, [first.tiled(), second])),
            };
            plans.extend(second.map(plan));
        }
        plans
    }

    /// Returns the one-launch tiling with the lowest estimate, or `None` if no tiles can be counted.
    ///
    /// It compares the candidates one by one.
    fn fastest_tiled(problem: Problem, figures: &DeviceFigures, model: &Model) -> Option<Tiled> {
        let plans = Self::whole_candidates(problem, figures).ok()?;
        let timed = plans.iter().filter_map(|plan| Some((plan.estimate_with(model), *plan.tiled()?)));
        timed.min_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, tiled)| tiled)
    }
}

/// Returns the first launches that are worth considering, each with its number of channels.
pub(super) fn firsts(problem: Problem, figures: &DeviceFigures) -> impl Iterator<Item = (usize, Layout)> {
    let figures = *figures;
    let Problem { m, n, .. } = problem;
    let large = move |facts: &&'static ShapeFacts| {
        facts.shape.tokens.min(facts.channels) >= LEAST_EXTENT
            && facts.shape.cluster_split == 1
            && !facts.is_half_empty(m)
    };
    let sized =
        move |facts| sizes(facts, &figures).map(move |(cluster, most)| (facts, cluster, most as usize));
    SHAPES.iter().filter(large).flat_map(sized).flat_map(move |(facts, cluster, most)| {
        let channels = (facts.channels * cluster) as usize;
        let token_tiles = m.div_ceil(facts.shape.tokens as usize);
        let full_waves = n.div_ceil(channels) * token_tiles / most;
        let one_less = if full_waves <= MOST_WAVES_FOR_ONE_LESS { full_waves.saturating_sub(1) } else { 0 };
        [full_waves, one_less].into_iter().filter_map(move |waves| {
            let channel_tiles = waves.saturating_mul(most) / token_tiles;
            let boundary = channel_tiles.saturating_mul(channels);
            if waves == 0 || boundary == 0 || boundary >= n {
                return None;
            }
            let clusters = (channel_tiles * token_tiles).div_ceil(waves) as u32;
            // There are too many tiles of this shape. A larger one may fit.
            let grid = Grid::new(Problem { n: boundary, ..problem }, facts, cluster).ok()?;
            Some((boundary, grid.layout(clusters, 0)))
        })
    })
}

impl fmt::Display for TwoLaunches {
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
        let configs =
            [TileConfig { shape: TILE_SHAPES[0], cluster_size: 1, clusters: 4, stream_k_waves: 0 }; 2];
        assert!(Plan::two_launches(Problem::new(5, 200, 64), 128, configs).is_ok());
        for boundary in [0, 1, 127, 200, 256, usize::MAX] {
            match Plan::two_launches(Problem::new(5, 200, 64), boundary, configs) {
                Err(Error::Plan(error @ PlanError::NoSuchBoundary { .. })) => {
                    assert!(error.to_string().contains(&boundary.to_string()), "{error}");
                }
                other => panic!("{boundary}: {other:?}"),
            }
        }
    }

    #[test]
    fn two_launches_are_chosen_where_they_save_most_of_a_wave() {
        // 320 tiles of 128 × 128 are 2.4 waves of 132, and 160 of 128 × 256 are 1.2.
        let plan = Plan::new(Problem::new(512, 10_240, 8192), &DeviceFigures::H100_SXM).unwrap();
        let Algorithm::TwoLaunches(two_launches) = plan.algorithm() else { panic!("{plan}") };
        let [(first, whole_waves), (second, _)] = two_launches.parts(10_240);
        assert_eq!((first.start, first.end, second.end), (0, second.start, 10_240));
        let schedule = whole_waves.schedule();
        assert_eq!((schedule.tiles() % schedule.clusters, schedule.stream_k_tiles), (0, 0), "{plan}");
        // 256 tiles of 128 × 256 are two nearly full waves.
        assert!(
            Plan::new(Problem::new(1024, 8192, 8192), &DeviceFigures::H100_SXM).unwrap().tiled().is_some()
        );
    }

    #[test]
    fn both_launches_together_take_longer_than_either() {
        let figures = DeviceFigures::H100_SXM;
        let model = Model::new(&figures);
        for plan in Plan::two_launch_candidates(Problem::new(512, 28_672, 4096), &figures) {
            let Algorithm::TwoLaunches(two_launches) = plan.algorithm() else { panic!("{plan}") };
            for (channels, tiled) in two_launches.parts(28_672) {
                assert!(
                    plan.estimate_us(&figures)
                        > model.estimate(
                            &Layout::of(&tiled),
                            model.memory(Problem::new(512, channels.len(), 4096)),
                            0.0
                        ),
                    "{plan}"
                );
            }
        }
    }
}
