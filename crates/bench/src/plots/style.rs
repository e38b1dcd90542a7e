//! Colours, text styles and legends of all pictures, drawn with `plotters`.
//! The colours are Okabe and Ito's, which people with colour blindness can distinguish.
//! Our kernel has the strongest colour.

use plotters::coord::Shift;
use plotters::drawing::DrawingAreaErrorKind;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

pub(super) const OURS: RGBColor = RGBColor(213, 94, 0);
pub(super) const FP8: RGBColor = RGBColor(0, 114, 178);
pub(super) const INT8: RGBColor = RGBColor(0, 158, 115);
pub(super) const BF16: RGBColor = RGBColor(204, 121, 167);
pub(super) const LIMIT: RGBColor = RGBColor(90, 90, 90);
/// Colour of the bars of other kernels.
pub(super) const PLAIN: RGBColor = RGBColor(158, 178, 194);
pub(super) const TEXT: RGBColor = RGBColor(31, 35, 40);
pub(super) const FAINT_TEXT: RGBColor = RGBColor(87, 96, 106);
pub(super) const GRID: RGBColor = RGBColor(228, 231, 235);
/// Colour of the area below the floor, which no kernel can reach.
pub(super) const OUT_OF_REACH: RGBColor = RGBColor(241, 243, 245);

/// Which point of a text lies at its position.
#[derive(Clone, Copy)]
pub(super) enum Anchor {
    Left,
    Right,
    Middle,
}

/// A text style, vertically centred on the position.
pub(super) fn text(size: u32, bold: bool, colour: RGBColor, anchor: Anchor) -> TextStyle<'static> {
    let style = if bold { FontStyle::Bold } else { FontStyle::Normal };
    let horizontal = match anchor {
        Anchor::Left => HPos::Left,
        Anchor::Right => HPos::Right,
        Anchor::Middle => HPos::Center,
    };
    TextStyle {
        font: ("sans-serif", size, style).into_font(),
        color: colour.to_backend_color(),
        pos: Pos::new(horizontal, VPos::Center),
    }
}

/// Formats microseconds without needless digits.
pub(super) fn microseconds(us: f64) -> String {
    if us >= 1000.0 { format!("{} ms", us / 1000.0) } else { format!("{us} µs") }
}

/// Height of the legend in a picture with one chart, in pixels from the top.
pub(super) const LEGEND_Y: i32 = 54;

/// Begins a picture with one chart: white background, title, and room for the legend and the axis labels.
pub(super) fn begin<'a, B: DrawingBackend>(
    area: &'a DrawingArea<B, Shift>,
    title: &str,
) -> Result<ChartBuilder<'a, 'a, B>, DrawingAreaErrorKind<B::ErrorType>> {
    area.fill(&WHITE)?;
    area.draw(&Text::new(title.to_owned(), (22, 26), text(18, true, TEXT, Anchor::Left)))?;
    let mut chart = ChartBuilder::on(area);
    chart
        .margin_top(LEGEND_Y + 20)
        .margin_right(24)
        .margin_bottom(12)
        .margin_left(10)
        .x_label_area_size(46)
        .y_label_area_size(66);
    Ok(chart)
}

/// Begins a panel, one of several charts of a picture: a title, and room for the axis labels.
pub(super) fn panel<'a, B: DrawingBackend>(
    area: &'a DrawingArea<B, Shift>,
    title: String,
) -> Result<ChartBuilder<'a, 'a, B>, DrawingAreaErrorKind<B::ErrorType>> {
    area.draw(&Text::new(title, (72, 14), text(15, true, TEXT, Anchor::Left)))?;
    let mut chart = ChartBuilder::on(area);
    chart
        .margin_top(30)
        .margin_right(20)
        .margin_bottom(12)
        .margin_left(6)
        .x_label_area_size(40)
        .y_label_area_size(62);
    Ok(chart)
}

/// An entry of a [`legend`].
#[derive(Clone, Copy)]
pub(super) struct Entry<'a> {
    pub(super) name: &'a str,
    pub(super) colour: RGBColor,
    /// Width of the line in pixels. Only our kernel's line is wider than 2; its name is bold.
    pub(super) width: u32,
    pub(super) dashed: bool,
}

/// Draws the legend as one row of entries at height `y`.
pub(super) fn legend<'a, B: DrawingBackend>(
    area: &DrawingArea<B, Shift>,
    y: i32,
    entries: impl Iterator<Item = Entry<'a>>,
) -> Result<(), DrawingAreaErrorKind<B::ErrorType>> {
    let mut x = 76;
    for Entry { name, colour, width, dashed } in entries {
        let dashes = if dashed { [(0, 5), (9, 14), (18, 23)] } else { [(0, 22); 3] };
        let half = width.div_ceil(2) as i32;
        for (from, to) in dashes {
            area.draw(&Rectangle::new([(x + from, y - half), (x + to, y + half)], colour.filled()))?;
        }
        area.draw(&Text::new(name, (x + 28, y), text(14, width > 2, TEXT, Anchor::Left)))?;
        x += 44 + 8 * name.chars().count() as i32;
    }
    Ok(())
}
