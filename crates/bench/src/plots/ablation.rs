//! Draws the speed of every variant of the ablation relative to the baseline, against M, for one matrix.
//! The speeds come from [`ablation`](crate::ablation).

use anyhow::anyhow;
use plotters::prelude::*;

use super::style::{self, Anchor, Entry, legend, text};
use super::{line_across, title};
use crate::ablation::Variant;
use crate::ablation::{Ablation, Point};
use crate::shapes::Matrix;

const SIZE: (u32, u32) = (860, 460);

fn colour(variant: Variant) -> RGBColor {
    match variant {
        Variant::Baseline => style::LIMIT,
        Variant::LiquidQuant => style::INT8,
        Variant::Explicit => style::FP8,
        Variant::Implicit => style::OURS,
        Variant::QServeImplicit => style::BF16,
    }
}

/// The library's own variant has the widest line.
fn width(variant: Variant) -> u32 {
    if variant == Variant::Implicit { 4 } else { 2 }
}

/// Returns the picture as SVG. `None` if there is no line to draw.
pub(super) fn draw(run: &Ablation, matrix: Matrix) -> anyhow::Result<Option<String>> {
    let points = run.points.iter().filter(|point| point.matrix() == matrix);
    let Some((points, across)) = line_across(points, |point| point.m) else {
        return Ok(None);
    };
    let mut svg = String::new();
    render(&mut svg, &title(matrix), &points, across)
        .map_err(|error| anyhow!("cannot draw the ablation of {matrix}: {error}"))?;
    Ok(Some(svg))
}

fn render(
    svg: &mut String,
    title: &str,
    points: &[&Point],
    across: std::ops::Range<f64>,
) -> Result<(), Box<dyn std::error::Error>> {
    let line = |variant: Variant| {
        points
            .iter()
            .filter_map(move |point| Some((point.m as f64, point.speedup(variant)?)))
            .collect::<Vec<_>>()
    };
    let all = || Variant::ALL.into_iter().flat_map(line).map(|(_, speed)| speed);
    let low = (all().fold(1.0, f64::min) * 10.0 - 1.0).floor() / 10.0;
    let high = (all().fold(1.0, f64::max) * 10.0 + 1.0).ceil() / 10.0;

    let area = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    let mut chart =
        style::begin(&area, title)?.build_cartesian_2d(across.clone().log_scale().base(2.0), low..high)?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(style::GRID)
        .axis_style(style::GRID)
        .x_desc("M (tokens)")
        .y_desc("speed relative to the baseline")
        .x_labels(16)
        .y_labels(10)
        .x_label_formatter(&|m| format!("{m}"))
        .y_label_formatter(&|speed| format!("{speed:.1}"))
        .label_style(text(13, false, style::FAINT_TEXT, Anchor::Middle))
        .axis_desc_style(text(14, false, style::TEXT, Anchor::Middle))
        .draw()?;
    for variant in Variant::ALL {
        let (line, colour, width) = (line(variant), colour(variant), width(variant));
        if variant == Variant::Baseline {
            chart.draw_series(DashedLineSeries::new(line, 5, 4, colour.stroke_width(width)))?;
            continue;
        }
        chart.draw_series(LineSeries::new(line.iter().copied(), colour.stroke_width(width)))?;
        chart.draw_series(line.iter().map(|&point| Circle::new(point, width + 1, colour.filled())))?;
    }

    let entries = Variant::ALL.into_iter().map(|variant| Entry {
        name: variant.name(),
        colour: colour(variant),
        width: width(variant),
        dashed: variant == Variant::Baseline,
    });
    legend(&area, style::LEGEND_Y, entries)?;
    area.present()?;
    Ok(())
}
