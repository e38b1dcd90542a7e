//! Draws time against the number of tokens for every layer of a run over mixtures of experts, a panel each,
//! with logarithmic axes: our grouped GEMM, the ideal floor, torch fp8 and Humming.

use anyhow::anyhow;
use plotters::coord::Shift;
use plotters::prelude::*;

use super::style::{self, Anchor, Entry, legend, text};
use super::{line_across, log_axes};
use crate::matrix::distinct;
use crate::moe::{Mixtures, Point, fastest, page};

/// Width of the picture and height of a row of panels, in pixels.
const SIZE: (u32, u32) = (1080, 340);
/// Height of the heading, in pixels.
const TOP: i32 = 92;
/// The other kernels, by their names on the recorded page.
const OTHERS: [(&str, RGBColor); 3] =
    [("torch fp8", style::FP8), ("Humming channel", style::INT8), ("Humming g128", style::BF16)];
const OURS: Entry<'static> = Entry { name: "LiquidGEMM", colour: style::OURS, width: 3, dashed: false };
const FLOOR: Entry<'static> = Entry { name: "ideal floor", colour: style::LIMIT, width: 1, dashed: true };

/// A line, with points in tokens and microseconds.
struct Line {
    entry: Entry<'static>,
    points: Vec<(f64, f64)>,
}

struct Panel<'a> {
    layer: &'a str,
    across: std::ops::Range<f64>,
    /// Ours is the last one, and drawn above the others.
    lines: Vec<Line>,
}

/// Returns the picture as SVG. `None` if there is no line to draw.
pub(super) fn draw(run: &Mixtures, title: &str) -> anyhow::Result<Option<String>> {
    let points = fastest(&run.points);
    let layers = distinct(points.iter().map(|point| point.page.layer.as_str()));
    let panels: Vec<Panel<'_>> = layers.into_iter().filter_map(|layer| panel(&points, layer)).collect();
    if panels.is_empty() {
        return Ok(None);
    }
    let note = if run.torch.is_some() {
        "torch fp8: measured in this run. Humming: recorded in another run, compared through torch fp8"
    } else {
        "torch fp8 and Humming: recorded in another run, on the same kind of GPU"
    };
    let mut svg = String::new();
    render(&mut svg, title, note, &panels)
        .map_err(|error| anyhow!("cannot draw mixtures of experts: {error}"))?;
    Ok(Some(svg))
}

fn panel<'a>(points: &[&Point], layer: &'a str) -> Option<Panel<'a>> {
    let of_layer = points.iter().copied().filter(|point| point.page.layer == layer);
    let (points, across) = line_across(of_layer, |point| point.page.tokens)?;
    let line = |entry, us: &dyn Fn(&Point) -> Option<f64>| Line {
        entry,
        points: points.iter().filter_map(|point| Some((point.page.tokens as f64, us(point)?))).collect(),
    };
    let mut lines = vec![line(FLOOR, &|point| Some(point.ideal_us))];
    for (name, colour) in OTHERS {
        let column = page().columns.iter().position(|column| column == name)?;
        let entry = Entry { name, colour, width: 2, dashed: false };
        lines.push(line(entry, &|point| point.others()[column]));
    }
    lines.push(line(OURS, &|point| Some(point.ours.us)));
    Some(Panel { layer, across, lines })
}

fn render(
    svg: &mut String,
    title: &str,
    note: &str,
    panels: &[Panel<'_>],
) -> Result<(), Box<dyn std::error::Error>> {
    let rows = panels.len().div_ceil(2);
    let area = SVGBackend::with_string(svg, (SIZE.0, TOP as u32 + SIZE.1 * rows as u32)).into_drawing_area();
    area.fill(&WHITE)?;
    area.draw(&Text::new(title, (22, 24), text(18, true, style::TEXT, Anchor::Left)))?;
    area.draw(&Text::new(note, (22, 46), text(13, false, style::FAINT_TEXT, Anchor::Left)))?;
    let others = OTHERS.map(|(name, colour)| Entry { name, colour, width: 2, dashed: false });
    legend(&area, 70, [OURS].into_iter().chain(others).chain([FLOOR]))?;
    let (_, body) = area.split_vertically(TOP);
    for (panel, part) in panels.iter().zip(body.split_evenly((rows, 2))) {
        render_panel(&area, &part, panel)?;
    }
    area.present()?;
    Ok(())
}

/// Draws a panel into its `part` of the whole `area`.
fn render_panel<'a>(
    area: &DrawingArea<SVGBackend<'a>, Shift>,
    part: &DrawingArea<SVGBackend<'a>, Shift>,
    panel: &Panel<'_>,
) -> Result<(), Box<dyn std::error::Error>> {
    let Panel { layer, across, lines } = panel;
    let all = || lines.iter().flat_map(|line| &line.points).map(|&(_, us)| us);
    let up = all().fold(f64::INFINITY, f64::min) / 1.4..all().fold(0.0, f64::max) * 1.4;
    let mut chart = style::panel(part, (*layer).to_owned())?
        .build_cartesian_2d(across.clone().log_scale().base(2.0), up.clone().log_scale())?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(style::GRID)
        .axis_style(style::GRID)
        .x_desc("tokens")
        .x_labels(14)
        // Ours are drawn below.
        .disable_y_mesh()
        .y_label_formatter(&|_| String::new())
        .x_label_formatter(&|tokens| format!("{tokens}"))
        .label_style(text(13, false, style::FAINT_TEXT, Anchor::Middle))
        .axis_desc_style(text(14, false, style::TEXT, Anchor::Middle))
        .draw()?;
    log_axes::label_microseconds(area, &chart, across.clone(), &up)?;
    for Line { entry, points } in lines {
        let stroke = entry.colour.stroke_width(entry.width.max(2));
        if entry.dashed {
            chart.draw_series(DashedLineSeries::new(points.iter().copied(), 5, 4, stroke))?;
            continue;
        }
        chart.draw_series(LineSeries::new(points.iter().copied(), stroke))?;
        chart
            .draw_series(points.iter().map(|&at| Circle::new(at, entry.width + 1, entry.colour.filled())))?;
    }
    Ok(())
}
