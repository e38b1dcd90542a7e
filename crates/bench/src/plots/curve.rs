//! Draws time against the number of tokens in steps of 8 for one matrix, with linear axes.
//! Only this picture shows where the next larger tile takes over and where time falls with M.

use anyhow::anyhow;
use plotters::prelude::*;

use super::style::{self, Anchor, Entry, legend, text};
use super::title;
use crate::record::{Point, Run};
use crate::shapes::Matrix;

const SIZE: (u32, u32) = (860, 460);
/// Largest M of the picture.
const LAST: usize = 512;
/// Distance of the batch sizes that make a curve.
const STEP: usize = 8;
/// Tokens per unit of the M axis.
/// plotters places labels at round numbers of units, which are then multiples of 64 tokens.
const TICK: f64 = 64.0;
/// Number of multiples of [`STEP`] that a run needs for a curve.
const ENOUGH: usize = LAST / STEP / 2;

/// A line of the picture, with points in axis units and microseconds.
struct Line {
    entry: Entry<'static>,
    points: Vec<(f64, f64)>,
}

/// Returns the picture as SVG. `None` if no run has enough points.
///
/// All lines come from one run, because times differ between machines.
/// Among the runs with enough points, it is the one with the most points that have cuBLASLt fp8.
pub(super) fn draw(runs: &[Run], matrix: Matrix) -> anyhow::Result<Option<String>> {
    let points = |run: &'_ Run| -> Vec<Point> {
        let on_curve = |point: &&Point| point.matrix() == matrix && point.m <= LAST;
        let mut points: Vec<Point> = run.points.iter().filter(on_curve).cloned().collect();
        points.sort_by_key(|point| point.m);
        points.dedup_by_key(|point| point.m);
        points
    };
    let enough = |points: &Vec<Point>| points.iter().filter(|point| point.m % STEP == 0).count() >= ENOUGH;
    let rank =
        |points: &Vec<Point>| (points.iter().filter(|point| point.fp8.is_some()).count(), points.len());
    let Some(points) = runs.iter().map(points).filter(enough).max_by_key(rank) else {
        return Ok(None);
    };
    let line = |name, colour, width, time: &dyn Fn(&Point) -> Option<f64>| Line {
        // Only the floor is dashed; its width marks it.
        entry: Entry { name, colour, width, dashed: width == 1 },
        points: points.iter().filter_map(|point| Some((point.m as f64 / TICK, time(point)?))).collect(),
    };
    let mut lines = vec![
        line("floor: the slower probe", style::LIMIT, 1, &Point::floor),
        line("cuBLASLt fp8", style::FP8, 2, &|point| point.fp8.map(|timing| timing.us)),
        line("LiquidGEMM", style::OURS, 4, &|point| Some(point.ours.us)),
    ];
    lines.retain(|line| !line.points.is_empty());
    let mut svg = String::new();
    render(&mut svg, &title(matrix), &lines)
        .map_err(|error| anyhow!("cannot draw the curve of {matrix}: {error}"))?;
    Ok(Some(svg))
}

fn render(svg: &mut String, title: &str, lines: &[Line]) -> Result<(), Box<dyn std::error::Error>> {
    let high = lines.iter().flat_map(|line| &line.points).map(|&(_, us)| us).fold(0.0, f64::max) * 1.05;
    let area = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    let mut chart = style::begin(&area, title)?.build_cartesian_2d(0.0..LAST as f64 / TICK, 0.0..high)?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(style::GRID)
        .axis_style(style::GRID)
        .x_desc("M (tokens)")
        .y_desc("µs")
        .x_labels(LAST / TICK as usize + 1)
        .y_labels(8)
        .x_label_formatter(&|x| format!("{}", x * TICK))
        .y_label_formatter(&|us| format!("{us}"))
        .label_style(text(13, false, style::FAINT_TEXT, Anchor::Middle))
        .axis_desc_style(text(14, false, style::TEXT, Anchor::Middle))
        .draw()?;
    for Line { entry, points } in lines {
        let stroke = entry.colour.stroke_width(entry.width.max(2));
        if entry.dashed {
            chart.draw_series(DashedLineSeries::new(points.iter().copied(), 5, 4, stroke))?;
        } else {
            chart.draw_series(LineSeries::new(points.iter().copied(), stroke))?;
            let radius = entry.width.div_ceil(2);
            chart
                .draw_series(points.iter().map(|&point| Circle::new(point, radius, entry.colour.filled())))?;
        }
    }
    // Our kernel comes first in the legend.
    legend(&area, style::LEGEND_Y, lines.iter().rev().map(|line| line.entry))?;
    area.present()?;
    Ok(())
}
