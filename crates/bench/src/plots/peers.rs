//! Draws the speed of our kernel and of the peer kernels relative to cuBLASLt fp8, at a few batch sizes.
//! Our speeds come from the run, the peers' from their pages ([`peers`](crate::peers)).
//! Each bar is the geometric mean over the matrices that both have.

use anyhow::anyhow;
use plotters::coord::Shift;
use plotters::prelude::*;

use super::style::{self, Anchor, text};
use crate::peers::{Comparison, compare};
use crate::record::Run;

const SIZE: (u32, u32) = (1080, 800);
/// Batch sizes, one panel each.
const TOKENS: [usize; 6] = [16, 64, 128, 256, 1024, 4096];
/// Height of the heading, in pixels.
const TOP: u32 = 70;

/// A bar: a name and a speed relative to cuBLASLt fp8.
struct Bar {
    name: &'static str,
    speed: f64,
    colour: RGBColor,
}

/// The bars of one batch size.
struct Panel {
    comparison: Comparison,
    bars: Vec<Bar>,
}

/// Returns the picture as SVG. `None` if the run has no point in common with the peers.
pub(super) fn draw(run: &Run) -> anyhow::Result<Option<String>> {
    let panels: Vec<Panel> = TOKENS.into_iter().filter_map(|m| Some(panel(compare(run, m)?))).collect();
    if panels.is_empty() {
        return Ok(None);
    }
    let mut svg = String::new();
    render(&mut svg, &panels).map_err(|error| anyhow!("cannot draw the peers: {error}"))?;
    Ok(Some(svg))
}

fn panel(comparison: Comparison) -> Panel {
    let ours = Bar { name: "LiquidGEMM", speed: comparison.ours, colour: style::OURS };
    let peers = comparison.peers.iter().map(|&(name, speed)| {
        let colour = if name == "cuBLASLt fp8" { style::FP8 } else { style::PLAIN };
        Bar { name, speed, colour }
    });
    let bars = std::iter::once(ours).chain(peers).collect();
    Panel { comparison, bars }
}

fn render(svg: &mut String, panels: &[Panel]) -> Result<(), Box<dyn std::error::Error>> {
    let rows = panels.len().div_ceil(3) as u32;
    let size = (SIZE.0, TOP + (SIZE.1 - TOP) * rows / 2);
    let area = SVGBackend::with_string(svg, size).into_drawing_area();
    area.fill(&WHITE)?;
    area.draw(&Text::new(
        "Speed relative to cuBLASLt fp8 (longer is faster)",
        (22, 26),
        text(20, true, style::TEXT, Anchor::Left),
    ))?;
    area.draw(&Text::new(
        "Geometric mean over the matrices. Other kernels were measured in earlier runs, relative to cuBLASLt fp8 in the same \
         run. Dashed: the ideal floor",
        (22, 50),
        text(14, false, style::FAINT_TEXT, Anchor::Left),
    ))?;
    let (_, body) = area.split_vertically(TOP as i32);
    let longest = panels
        .iter()
        .flat_map(|panel| panel.bars.iter().map(|bar| bar.speed).chain([panel.comparison.limit]))
        .fold(1.0, f64::max);
    for (panel, area) in panels.iter().zip(body.split_evenly((rows as usize, 3))) {
        render_panel(&area, panel, longest)?;
    }
    area.present()?;
    Ok(())
}

fn render_panel<'a>(
    area: &DrawingArea<SVGBackend<'a>, Shift>,
    panel: &Panel,
    longest: f64,
) -> Result<(), DrawingAreaErrorKind<<SVGBackend<'a> as DrawingBackend>::ErrorType>> {
    let (width, height) = area.dim_in_pixel();
    let (left, right, top, bottom) = (172, width as i32 - 46, 34, height as i32 - 10);
    let plural = if panel.comparison.matrices == 1 { "matrix" } else { "matrices" };
    area.draw(&Text::new(
        format!("M = {}", panel.comparison.m),
        (left, 16),
        text(16, true, style::TEXT, Anchor::Left),
    ))?;
    area.draw(&Text::new(
        format!("{} {plural}", panel.comparison.matrices),
        (right + 36, 16),
        text(12, false, style::FAINT_TEXT, Anchor::Right),
    ))?;
    let x = |speed: f64| left + (f64::from(right - left) * speed / longest) as i32;
    let pitch = (bottom - top) / panel.bars.len() as i32;
    let end = top + pitch * panel.bars.len() as i32;
    area.draw(&PathElement::new([(x(1.0), top), (x(1.0), end)], style::FP8.stroke_width(1)))?;
    for (index, bar) in panel.bars.iter().enumerate() {
        let ours = index == 0;
        let middle = top + pitch * index as i32 + pitch / 2;
        let half = pitch * 7 / 20;
        let corners = [(left, middle - half), (x(bar.speed), middle + half)];
        area.draw(&Rectangle::new(corners, bar.colour.filled()))?;
        area.draw(&Text::new(bar.name, (left - 8, middle), text(13, ours, style::TEXT, Anchor::Right)))?;
        // The values have a column of their own, where no bar or line crosses them.
        let value = format!("{:.2}", bar.speed);
        area.draw(&Text::new(value, (right + 36, middle), text(13, ours, style::TEXT, Anchor::Right)))?;
    }
    for y in (top..end).step_by(8) {
        area.draw(&PathElement::new(
            [(x(panel.comparison.limit), y), (x(panel.comparison.limit), (y + 4).min(end))],
            style::LIMIT.stroke_width(2),
        ))?;
    }
    Ok(())
}
