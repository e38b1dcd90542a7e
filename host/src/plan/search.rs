//! The search for the plan with the lowest estimate, without forming those that cannot be it.

use super::cost::{Model, ROUNDING, SECOND_LAUNCH, SWITCH, is_longer, launch_estimate};
use super::divided::{Divided, firsts};
use super::layout::{Grid, Layout, sizes};
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
    let mut too_many = None;
    if let Some((us, layout)) = fastest_layout([m, n, k], figures, &model, limit, &mut too_many)
        && us < limit
    {
        best = Some((us, Plan { m, n, k, method: Method::Tiled(layout.tiled()) }));
    }
    let Some((us, plan)) = best else { return too_many.map_or(Ok(None), |error| Err(error.into())) };
    Ok(Some(divided_below([m, n, k], figures, &model, us).unwrap_or(plan)))
}

/// The layout of lowest estimate among those of one launch, unless all are certainly longer than `limit`.
pub(super) fn fastest_layout(
    problem: [usize; 3],
    figures: &DeviceFigures,
    model: &Model,
    limit: f64,
    too_many: &mut Option<GpuError>,
) -> Option<(f64, Layout)> {
    let memory = model.memory(problem);
    let mut bounds = [[f64::INFINITY; 2]; SHAPES.len()];
    let mut first = (f64::INFINITY, [0, 0]);
    for (place, facts) in SHAPES.iter().enumerate() {
        if facts.is_half_empty(problem[0]) {
            continue;
        }
        for (size, (cluster, most)) in sizes(facts, figures).enumerate() {
            match Grid::new(problem, facts, cluster) {
                Ok(grid) => {
                    let bound = model.least_compute(&grid, most);
                    bounds[place][size] = bound;
                    if bound < first.0 {
                        first = (bound, [place, size]);
                    }
                }
                // Too many tiles of this shape; a larger one may do.
                Err(error) => {
                    too_many.get_or_insert(error);
                }
            }
        }
    }
    let mut best: Option<(f64, [usize; 2], Layout)> = None;
    let mut least = limit;
    let mut consider = |at: [usize; 2]| {
        if is_longer(bounds[at[0]][at[1]], memory, least) {
            return;
        }
        let facts = &SHAPES[at[0]];
        let Some((cluster, most)) = sizes(facts, figures).nth(at[1]) else { return };
        let Ok(grid) = Grid::new(problem, facts, cluster) else { return };
        for layout in grid.layouts(most) {
            let Some(us) = model.estimate_below(&layout, memory, least) else { continue };
            if best.is_none_or(|(other, place, _)| us < other || us == other && at < place) {
                best = Some((us, at, layout));
                least = least.min(us);
            }
        }
    };
    if first.0.is_finite() {
        consider(first.1);
    }
    for (place, of_sizes) in bounds.iter().enumerate() {
        for (size, bound) in of_sizes.iter().enumerate() {
            if bound.is_finite() && [place, size] != first.1 {
                consider([place, size]);
            }
        }
    }
    best.map(|(us, _, layout)| (us, layout))
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
    alone: f64,
    /// Microseconds that both launches take at the least.
    bound: f64,
}

/// The divided plan of lowest estimate, if that is below `limit`.
fn divided_below([m, n, k]: [usize; 3], figures: &DeviceFigures, model: &Model, limit: f64) -> Option<Plan> {
    // Microseconds a channel at the least, in any shape.
    let pace = SHAPES
        .iter()
        .filter(|facts| !facts.is_half_empty(m))
        .filter_map(|facts| {
            let grid = Grid::new([m, 1, k], facts, facts.shape.split).ok()?;
            Some(model.least_tile_compute(&grid) * f64::from(grid.tiles) / f64::from(facts.channels))
        })
        .fold(f64::INFINITY, f64::min);
    let certainly = 1.0 - ROUNDING;
    let mut open: Vec<First> = Vec::new();
    for (order, (boundary, layout)) in firsts([m, n, k], figures).enumerate() {
        let memory = [boundary, n - boundary].map(|channels| model.memory([m, channels, k]));
        let rest = pace * (n - boundary) as f64;
        let alone = model.estimate(&layout, memory[0], 0.0) + switching(&layout);
        let bound = alone + launch_estimate(rest, memory[1]);
        if bound * certainly < limit {
            open.push(First { order, boundary, layout, alone, bound });
        }
    }
    open.sort_unstable_by(|a, b| a.bound.total_cmp(&b.bound).then(a.order.cmp(&b.order)));
    let mut rests: Vec<(usize, f64, Option<Tiled>)> = Vec::new();
    let mut best: Option<(f64, usize, Plan)> = None;
    for First { order, boundary, layout, alone, bound } in open {
        let least = best.map_or(limit, |(us, ..)| us);
        if bound * certainly > least {
            break;
        }
        let budget = least - alone;
        let known = rests
            .iter()
            .find(|(other, within, rest)| *other == boundary && (rest.is_some() || *within >= budget));
        let rest = match known {
            Some(&(_, _, rest)) => rest,
            None => {
                let found = fastest_layout([m, n - boundary, k], figures, model, budget, &mut None);
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
