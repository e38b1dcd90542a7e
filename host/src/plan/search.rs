//! The search for the plan with the lowest estimate, without forming those that cannot be it.

use super::cost::{
    Bound, Model, ROUNDING, Room, SECOND_LAUNCH, SWITCH, launch_estimate, least_launch_estimate,
};
use super::divided::{Divided, firsts};
use super::layout::{Column, Grid, Layout, sizes};
use super::shapes::SHAPES;
use super::{Method, Plan, Tiled, check_problem};
use crate::gpu::GpuError;
use crate::{DeviceFigures, Error};

/// The plan of lowest estimate; of several, the first of [`Plan::candidates`].
pub(super) fn fastest([m, n, k]: [usize; 3], figures: &DeviceFigures) -> Result<Option<Plan>, Error> {
    check_problem(m, n, k)?;
    let model = Model::new(figures);
    let mut best: Option<(f64, Plan)> = None;
    for plan in Plan::skinny_candidates([m, n, k], figures.multiprocessors) {
        let plan = plan?;
        let us = plan.estimate_with(&model);
        if best.is_none_or(|(least, _)| us < least) {
            best = Some((us, plan));
        }
    }
    let limit = best.map_or(f64::INFINITY, |(us, _)| us);
    let columns = Columns::new([m, k], figures, &model);
    let mut too_many = None;
    if let Some((us, layout)) = columns.fastest_layout(n, &model, limit, &mut too_many)
        && us < limit
    {
        best = Some((us, Plan { m, n, k, method: Method::Tiled(layout.tiled()) }));
    }
    let Some((us, plan)) = best else { return too_many.map_or(Ok(None), |error| Err(error.into())) };
    Ok(Some(divided_below([m, n, k], figures, &model, &columns, us).unwrap_or(plan)))
}

/// All that can be chosen for the tiles of a problem of `m` tokens and K, whatever its channels.
pub(super) struct Columns {
    problem: [usize; 2],
    /// The most promising first.
    list: Vec<SizedColumn>,
}

/// A tile shape in clusters of one size.
struct SizedColumn {
    /// Microseconds that a channel takes at the least.
    pace: f64,
    /// The place among the candidates.
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

    /// Microseconds that a channel takes at the least, in any shape.
    fn pace(&self) -> f64 {
        self.list.first().map_or(f64::INFINITY, |first| first.pace)
    }

    /// The layout of lowest estimate for `n` channels among those of one launch, unless all are certainly longer than `limit`.
    pub(super) fn fastest_layout(
        &self,
        n: usize,
        model: &Model,
        limit: f64,
        too_many: &mut Option<GpuError>,
    ) -> Option<(f64, Layout)> {
        let [m, k] = self.problem;
        let memory = model.memory([m, n, k]);
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
                // Too many tiles of this shape; a larger one may do.
                Err(error) => {
                    too_many.get_or_insert(error);
                }
            }
        }
        let mut best: Option<(f64, usize, Layout)> = None;
        let mut least = limit;
        // What is likely to be the fastest goes first, so that little more than its bound is looked at of the others.
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

/// Microseconds that a second launch costs, and this first one for its instructions.
fn switching(first: &Layout) -> f64 {
    SECOND_LAUNCH + SWITCH * f64::from(first.grid.facts.shape.tokens)
}

/// A first launch that may lead to the best plan of two.
struct First {
    /// Its place among the candidates.
    order: usize,
    /// Channels of the first launch.
    boundary: usize,
    layout: Layout,
    /// Microseconds that it takes at the least, with what a second launch costs besides its own time.
    least: f64,
    /// Microseconds that both launches take at the least.
    bound: f64,
}

impl First {
    /// A first launch, unless both launches certainly take longer than `limit` where each channel of the second takes `pace` microseconds
    /// at the least.
    ///
    /// Each launch finds the GPU as hot as both make it, so a bound of either makes that of the other tighter.
    fn below(
        limit: f64,
        (order, boundary, layout): (usize, usize, Layout),
        [m, n, k]: [usize; 3],
        model: &Model,
        pace: f64,
    ) -> Option<Self> {
        let limit = limit * (1.0 + ROUNDING) - switching(&layout);
        let memory = [boundary, n - boundary].map(|channels| model.memory([m, channels, k]));
        let rest = pace * (n - boundary) as f64;
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

/// The divided plan of lowest estimate, if that is below `limit`.
fn divided_below(
    [m, n, k]: [usize; 3],
    figures: &DeviceFigures,
    model: &Model,
    columns: &Columns,
    limit: f64,
) -> Option<Plan> {
    let pace = columns.pace();
    let certainly = 1.0 - ROUNDING;
    let firsts = firsts([m, n, k], figures).enumerate();
    let mut open: Vec<First> = firsts
        .filter_map(|(order, (boundary, layout))| {
            First::below(limit, (order, boundary, layout), [m, n, k], model, pace)
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
                let found = columns.fastest_layout(n - boundary, model, budget, &mut None);
                let rest = found.map(|(_, layout)| layout.tiled());
                rests.push((boundary, budget, rest));
                rest
            }
        };
        let Some(rest) = rest else { continue };
        let divided = Divided::new(boundary, [layout.tiled(), rest]);
        let us = divided.estimate_us([m, n, k], model);
        let is_best = best.map_or(us < limit, |(other, place, _)| us < other || us == other && order < place);
        if is_best {
            best = Some((us, order, Plan { m, n, k, method: Method::Divided(divided) }));
        }
    }
    best.map(|(_, _, plan)| plan)
}
