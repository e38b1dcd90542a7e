//! Draws the score of the quantization of activations against the number of rows: a panel for each operation,
//! a line for each length of a row. Torch's score is drawn thin where it was measured in the same run.

use anyhow::anyhow;
use plotters::coord::Shift;
use plotters::prelude::*;

use super::line_across;
use super::style::{self, Anchor, Entry, legend, text};
use crate::activations::{Activations, Measured, Point};
use crate::matrix::distinct;

const SIZE: (u32, u32) = (1080, 760);
/// Height of the heading, in pixels.
const TOP: i32 = 78;
/// The colours of the lengths.
const COLOURS: [RGBColor; 4] = [style::OURS, style::FP8, style::INT8, style::BF16];

/// The line of one length of a row.
struct Line {
    colour: RGBColor,
    /// Rows and scores.
    ours: Vec<(f64, f64)>,
    torch: Vec<(f64, f64)>,
}

struct Panel {
    measured: Measured,
    across: std::ops::Range<f64>,
    lines: Vec<Line>,
}

/// Returns the picture as SVG. `None` if there is no line to draw.
pub(super) fn draw(run: &Activations, title: &str) -> anyhow::Result<Option<String>> {
    let lengths = distinct(run.points.iter().map(|point| point.k));
    let panels: Vec<Panel> =
        Measured::ALL.into_iter().filter_map(|measured| panel(run, measured, &lengths)).collect();
    if panels.is_empty() {
        return Ok(None);
    }
    let mut svg = String::new();
    render(&mut svg, title, &lengths, &panels)
        .map_err(|error| anyhow!("cannot draw the quantization of activations: {error}"))?;
    Ok(Some(svg))
}

fn panel(run: &Activations, measured: Measured, lengths: &[usize]) -> Option<Panel> {
    let of_operation = || run.points.iter().filter(|point| point.measured == measured);
    let (_, across) = line_across(of_operation(), |point| point.m)?;
    let line = |(&k, colour): (&usize, &RGBColor)| {
        let (points, _) = line_across(of_operation().filter(|point| point.k == k), |point| point.m)?;
        let scores = |us: &dyn Fn(&Point) -> Option<f64>| {
            points.iter().filter_map(|point| Some((point.m as f64, point.stream.us / us(point)?))).collect()
        };
        Some(Line {
            colour: *colour,
            ours: scores(&|point| Some(point.ours.us)),
            torch: scores(&Point::torch_us),
        })
    };
    let lines: Vec<Line> = lengths.iter().zip(COLOURS.iter().cycle()).filter_map(line).collect();
    Some(Panel { measured, across, lines })
}

fn render(
    svg: &mut String,
    title: &str,
    lengths: &[usize],
    panels: &[Panel],
) -> Result<(), Box<dyn std::error::Error>> {
    let rows = panels.len().div_ceil(2);
    let height = TOP as u32 + (SIZE.1 - TOP as u32) * rows as u32 / 2;
    let area = SVGBackend::with_string(svg, (SIZE.0, height)).into_drawing_area();
    area.fill(&WHITE)?;
    area.draw(&Text::new(title, (22, 24), text(18, true, style::TEXT, Anchor::Left)))?;
    let names: Vec<String> = lengths.iter().map(|k| format!("k = {k}")).collect();
    let mut entries: Vec<Entry<'_>> = names
        .iter()
        .zip(COLOURS.iter().cycle())
        .map(|(name, &colour)| Entry { name, colour, width: 2, dashed: false })
        .collect();
    let limit = |name| Entry { name, colour: style::LIMIT, width: 1, dashed: true };
    entries.push(limit("1: as fast as a kernel that only reads as many bytes"));
    let torch = panels.iter().flat_map(|panel| &panel.lines).any(|line| !line.torch.is_empty());
    entries.extend(torch.then(|| Entry { dashed: false, ..limit("torch.compile, thin lines") }));
    legend(&area, 52, entries.into_iter())?;
    let scores = panels.iter().flat_map(|panel| panel.lines.iter().flat_map(|line| &line.ours));
    let high = scores.map(|&(_, score)| score).fold(1.0, f64::max) * 1.08;
    let (_, body) = area.split_vertically(TOP);
    for (panel, area) in panels.iter().zip(body.split_evenly((rows, 2))) {
        render_panel(&area, panel, high)?;
    }
    area.present()?;
    Ok(())
}

fn render_panel(
    area: &DrawingArea<SVGBackend<'_>, Shift>,
    panel: &Panel,
    high: f64,
) -> Result<(), Box<dyn std::error::Error>> {
    let Panel { measured, across, lines } = panel;
    let mut chart = style::panel(area, measured.to_string())?
        .build_cartesian_2d(across.clone().log_scale().base(2.0), 0.0..high)?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(style::GRID)
        .axis_style(style::GRID)
        .x_desc("rows")
        .y_desc("score")
        .x_labels(14)
        .y_labels(6)
        .x_label_formatter(&|rows| format!("{rows}"))
        .y_label_formatter(&|score| format!("{score:.1}"))
        .label_style(text(13, false, style::FAINT_TEXT, Anchor::Middle))
        .axis_desc_style(text(14, false, style::TEXT, Anchor::Middle))
        .draw()?;
    let ends = [(across.start, 1.0), (across.end, 1.0)];
    chart.draw_series(DashedLineSeries::new(ends, 5, 4, style::LIMIT.stroke_width(1)))?;
    for Line { colour, ours, torch } in lines {
        chart.draw_series(LineSeries::new(torch.iter().copied(), colour.stroke_width(1)))?;
        chart.draw_series(LineSeries::new(ours.iter().copied(), colour.stroke_width(3)))?;
        chart.draw_series(ours.iter().map(|&point| Circle::new(point, 4, colour.filled())))?;
    }
    Ok(())
}
