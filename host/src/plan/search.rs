//! Finds the plan with the lowest estimate.
//! Lower bounds from `cost.rs` rule out most candidates before they are formed.

use super::cost::{
    Bound, Model, ROUNDING, Room, SECOND_LAUNCH, SWITCH, launch_estimate, least_launch_estimate,
};
use super::layout::{Column, Grid, Layout, sizes};
use super::shapes::SHAPES;
use super::two_launches::{TwoLaunches, firsts};
use super::{Algorithm, Plan, Tiled, check_problem};
use crate::error::PlanError;
use crate::{DeviceFigures, Error, Problem};

/// Returns the plan with the lowest estimate. Among equal ones it is the first of [`Plan::candidates`].
pub(super) fn fastest(problem: Problem, figures: &DeviceFigures) -> Result<Option<Plan>, Error> {
    check_problem(problem)?;
    let model = Model::new(figures);
    let mut best: Option<(f64, Plan)> = None;
    for plan in Plan::skinny_candidates(problem, figures.multiprocessors) {
        let plan = plan?;
        let us = plan.estimate_with(&model);
        if best.is_none_or(|(least, _)| us < least) {
            best = Some((us, plan));
        }
    }
    let limit = best.map_or(f64::INFINITY, |(us, _)| us);
    let columns = Columns::new([problem.m, problem.k], figures, &model);
    let mut too_many = None;
    if let Some((us, layout)) = columns.fastest_layout(problem.n, &model, limit, &mut too_many)
        && us < limit
    {
        best = Some((us, Plan { problem, algorithm: Algorithm::Tiled(layout.tiled()) }));
    }
    let Some((us, plan)) = best else { return too_many.map_or(Ok(None), |error| Err(error.into())) };
    Ok(Some(two_launches_below(problem, figures, &model, &columns, us).unwrap_or(plan)))
}

/// All choices for the tiles of a problem with `m` tokens and K, for any number of channels.
pub(super) struct Columns {
    problem: [usize; 2],
    /// Sorted by [`SizedColumn::pace`], so that the most promising comes first.
    list: Vec<SizedColumn>,
}

/// A tile shape in clusters of one size.
struct SizedColumn {
    /// Lower bound of the microseconds per channel.
    pace: f64,
    /// Position among the candidates.
    order: usize,
    /// Clusters that run at a time.
    most: u32,
    column: Column,
}

impl Columns {
    pub(super) fn new([m, k]: [usize; 2], figures: &DeviceFigures, model: &Model) -> Self {
        let mut list = Vec::with_capacity(2 * SHAPES.len());
        for facts in SHAPES.iter().filter(|facts| !facts.is_half_empty(m)) {
            for (cluster, most) in sizes(facts, figures) {
                let column = Column::new([m, k], facts, cluster);
                let pace = model.least_tile_compute(&column) * f64::from(column.token_tiles)
                    / f64::from(column.channels());
                list.push(SizedColumn { pace, order: list.len(), most, column });
            }
        }
        list.sort_unstable_by(|a, b| a.pace.total_cmp(&b.pace));
        Self { problem: [m, k], list }
    }

    /// Returns a lower bound of the microseconds per channel in any shape.
    fn pace(&self) -> f64 {
        self.list.first().map_or(f64::INFINITY, |first| first.pace)
    }

    /// Returns the lowest estimate in microseconds for `n` channels in one launch, and its layout.
    ///
    /// Returns `None` if all layouts certainly exceed `limit`.
    /// If a shape has too many tiles to count, `too_many` keeps the first such error.
    pub(super) fn fastest_layout(
        &self,
        n: usize,
        model: &Model,
        limit: f64,
        too_many: &mut Option<PlanError>,
    ) -> Option<(f64, Layout)> {
        let [m, k] = self.problem;
        let memory = model.memory(Problem { m, n, k });
        let mut open: Vec<(Bound, &SizedColumn, Grid)> = Vec::with_capacity(self.list.len());
        let mut first = 0;
        let mut room = Room::new(memory, limit);
        for sized in &self.list {
            if sized.pace * n as f64 > room.alone {
                break;
            }
            match sized.column.grid(n) {
                Ok(grid) => {
                    let bound = model.bound(&grid, sized.most);
                    if bound.exceeds(&room) {
                        continue;
                    }
                    if open.get(first).is_some_and(|(least, ..)| bound.least() < least.least()) {
                        first = open.len();
                    }
                    open.push((bound, sized, grid));
                }
                // There are too many tiles of this shape. A larger one may fit.
                Err(error) => {
                    too_many.get_or_insert(error);
                }
            }
        }
        let mut best: Option<(f64, usize, Layout)> = None;
        let mut least = limit;
        // Begin with the layout that is probably the fastest. Bounds then rule out most of the others.
        let others = open.iter().enumerate().filter(|&(index, _)| index != first).map(|(_, one)| one);
        for (bound, sized, grid) in open.get(first).into_iter().chain(others) {
            if bound.exceeds(&room) {
                continue;
            }
            for layout in grid.layouts(sized.most) {
                let Some(us) = model.estimate_below(&layout, memory, least) else { continue };
                if best.is_none_or(|(other, order, _)| us < other || us == other && sized.order < order) {
                    best = Some((us, sized.order, layout));
                    if us < least {
                        least = us;
                        room = Room::new(memory, least);
                    }
                }
            }
        }
        best.map(|(us, _, layout)| (us, layout))
    }
}

/// Returns the microseconds for a second launch and for this first one's refill of the instruction cache.
fn switching(first: &Layout) -> f64 {
    SECOND_LAUNCH + SWITCH * f64::from(first.grid.facts.shape.tokens)
}

/// A first launch that may lead to the fastest two-launch plan.
struct First {
    /// Position among the candidates.
    order: usize,
    /// Channels of the first launch.
    boundary: usize,
    layout: Layout,
    /// Lower bound of the launch's microseconds, including the additional cost of a second launch.
    least: f64,
    /// Lower bound of both launches' microseconds.
    bound: f64,
}

impl First {
    /// Returns a first launch, or `None` if both launches together certainly exceed `limit`.
    ///
    /// Each channel of the second launch takes at least `pace` microseconds.
    /// Both launches heat the GPU for each other, so a bound of one makes the other's tighter.
    fn below(
        limit: f64,
        (order, boundary, layout): (usize, usize, Layout),
        problem: Problem,
        model: &Model,
        pace: f64,
    ) -> Option<Self> {
        let limit = limit * (1.0 + ROUNDING) - switching(&layout);
        let memory = [boundary, problem.n - boundary].map(|n| model.memory(Problem { n, ..problem }));
        let rest = pace * (problem.n - boundary) as f64;
        let rest_alone = least_launch_estimate(rest, memory[1]);
        let (cold, handover) = model.compute_and_handover(&layout, 0.0);
        let drawn = model.drawn(&layout, memory[0]);
        if least_launch_estimate(cold, drawn) + handover + rest_alone > limit {
            return None;
        }
        let (compute, _) = model.compute_and_handover(&layout, rest_alone);
        let rest = model.least_heated(rest, least_launch_estimate(cold, drawn) + handover);
        if least_launch_estimate(compute, drawn) + handover + least_launch_estimate(rest, memory[1]) > limit {
            return None;
        }
        let least = launch_estimate(compute, drawn) + handover + switching(&layout);
        Some(Self { order, boundary, layout, least, bound: least + launch_estimate(rest, memory[1]) })
    }
}

/// Returns the two-launch plan with the lowest estimate, if that is below `limit`.
fn two_launches_below(
    problem: Problem,
    figures: &DeviceFigures,
    model: &Model,
    columns: &Columns,
    limit: f64,
) -> Option<Plan> {
    let pace = columns.pace();
    let certainly = 1.0 - ROUNDING;
    let firsts = firsts(problem, figures).enumerate();
    let mut open: Vec<First> = firsts
        .filter_map(|(order, (boundary, layout))| {
            First::below(limit, (order, boundary, layout), problem, model, pace)
        })
        .collect();
    open.sort_unstable_by(|a, b| a.bound.total_cmp(&b.bound).then(a.order.cmp(&b.order)));
    let mut rests: Vec<(usize, f64, Option<Tiled>)> = Vec::new();
    let mut best: Option<(f64, usize, Plan)> = None;
    for First { order, boundary, layout, least, bound } in open {
        let limit = best.map_or(limit, |(us, ..)| us);
        if bound * certainly > limit {
            break;
        }
        let budget = limit - least * certainly;
        let known = rests
            .iter()
            .find(|(other, within, rest)| *other == boundary && (rest.is_some() || *within >= budget));
        let rest = match known {
            Some(&(_, _, rest)) => rest,
            None => {
                let found = columns.fastest_layout(problem.n - boundary, model, budget, &mut None);
                let rest = found.map(|(_, layout)| layout.tiled());
                rests.push((boundary, budget, rest));
                rest
            }
        };
        let Some(rest) = rest else { continue };
        let two_launches = TwoLaunches::new(boundary, [layout.tiled(), rest]);
        let us = two_launches.estimate_us(problem, model);
        let is_best = best.map_or(us < limit, |(other, place, _)| us < other || us == other && order < place);
        if is_best {
            best = Some((us, order, Plan { problem, algorithm: Algorithm::TwoLaunches(two_launches) }));
        }
    }
    best.map(|(_, _, plan)| plan)
}
