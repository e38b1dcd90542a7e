//! Draws time against the number of tokens for one matrix, with logarithmic axes: an inverted roofline.
//! The floor is flat where bytes are the limit and rises where multiply-adds are; no kernel can be below it.

use anyhow::anyhow;
use plotters::prelude::*;

use super::style::{self, Anchor, Entry, legend, text};
use super::{line_across, log_axes, title};
use crate::record::{Baseline, Point, Run};
use crate::shapes::Matrix;

const SIZE: (u32, u32) = (860, 520);

/// Lines with more points than this have a mark only at powers of two.
const MANY: usize = 24;

/// A line of the picture, with points in tokens and microseconds.
struct Line {
    name: &'static str,
    colour: RGBColor,
    width: u32,
    points: Vec<(f64, f64)>,
}

/// Returns the picture as SVG. `None` if there is no line to draw.
pub(super) fn draw(run: &Run, matrix: Matrix) -> anyhow::Result<Option<String>> {
    let points = run.points.iter().filter(|point| point.matrix() == matrix);
    let Some((points, across)) = line_across(points, |point| point.m) else {
        return Ok(None);
    };
    let line = |name, colour, width, time: &dyn Fn(&Point) -> Option<f64>| Line {
        name,
        colour,
        width,
        points: points.iter().filter_map(|point| Some((point.m as f64, time(point)?))).collect(),
    };
    let baseline = |name, colour, baseline| {
        line(name, colour, 2, &|point| point.baseline(baseline).map(|timing| timing.us))
    };
    let mut lines = vec![
        baseline("cuBLASLt bf16", style::BF16, Baseline::Bf16),
        baseline("cuBLASLt int8", style::INT8, Baseline::Int8),
        baseline("cuBLASLt fp8", style::FP8, Baseline::Fp8),
        line("LiquidGEMM", style::OURS, 4, &|point| Some(point.ours.us)),
    ];
    lines.retain(|line| !line.points.is_empty());
    let floor = line("floor: the slower probe", style::LIMIT, 1, &|point| point.floor());

    let all = || lines.iter().chain([&floor]).flat_map(|line| &line.points).map(|&(_, us)| us);
    let low = all().fold(f64::INFINITY, f64::min) / 1.6;
    let high = all().fold(0.0, f64::max) * 1.4;

    let mut svg = String::new();
    render(&mut svg, &title(matrix), &lines, &floor, across, low..high)
        .map_err(|error| anyhow!("cannot draw {matrix}: {error}"))?;
    Ok(Some(svg))
}

fn render(
    svg: &mut String,
    title: &str,
    lines: &[Line],
    floor: &Line,
    across: std::ops::Range<f64>,
    up: std::ops::Range<f64>,
) -> Result<(), Box<dyn std::error::Error>> {
    let area = SVGBackend::with_string(svg, SIZE).into_drawing_area();

    let (low, first, last) = (up.start, across.start, across.end);
    let mut chart = style::begin(&area, title)?
        .build_cartesian_2d(across.log_scale().base(2.0), up.clone().log_scale())?;

    // Draw the unreachable area below the floor first, so that everything else covers it.
    let mut ground = vec![(first, low)];
    ground.extend(floor.points.first().map(|&(_, us)| (first, us)));
    ground.extend(&floor.points);
    ground.extend(floor.points.last().map(|&(_, us)| (last, us)));
    ground.push((last, low));
    if !floor.points.is_empty() {
        chart.draw_series([Polygon::new(ground, style::OUT_OF_REACH.filled())])?;
    }

    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(style::GRID)
        .axis_style(style::GRID)
        .x_desc("M (tokens)")
        .x_labels(16)
        // Ours are drawn below.
        .disable_y_mesh()
        .y_label_formatter(&|_| String::new())
        .x_label_formatter(&|m| format!("{m}"))
        .label_style(text(13, false, style::FAINT_TEXT, Anchor::Middle))
        .axis_desc_style(text(14, false, style::TEXT, Anchor::Middle))
        .draw()?;

    log_axes::label_microseconds(&area, &chart, first..last, &up)?;
    chart.draw_series(DashedLineSeries::new(
        floor.points.iter().copied(),
        5,
        4,
        style::LIMIT.stroke_width(2),
    ))?;
    for line in lines {
        chart.draw_series(LineSeries::new(
            line.points.iter().copied(),
            line.colour.stroke_width(line.width),
        ))?;
        let radius = line.width + 1;
        // Lines with many points have a mark only at powers of two.
        let few = line.points.len() <= MANY;
        let marked = line.points.iter().filter(|(m, _)| few || (*m as usize).is_power_of_two());
        chart.draw_series(marked.map(|&point| Circle::new(point, radius, line.colour.filled())))?;
    }

    // Our kernel comes first in the legend.
    let entries = lines.iter().rev().chain([floor]).filter(|line| !line.points.is_empty()).map(|line| {
        // Only the floor is dashed; its width marks it.
        Entry { name: line.name, colour: line.colour, width: line.width, dashed: line.width == 1 }
    });
    legend(&area, style::LEGEND_Y, entries)?;
    area.present()?;
    Ok(())
}
