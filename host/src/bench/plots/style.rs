//! Colours and lettering of all pictures. The colours are Okabe and Ito's, which people with colour blindness
//! tell apart; ours is the strongest.

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

pub(super) const OURS: RGBColor = RGBColor(213, 94, 0);
pub(super) const FP8: RGBColor = RGBColor(0, 114, 178);
pub(super) const INT8: RGBColor = RGBColor(0, 158, 115);
pub(super) const BF16: RGBColor = RGBColor(204, 121, 167);
pub(super) const LIMIT: RGBColor = RGBColor(90, 90, 90);
/// Bars that are there for comparison.
pub(super) const PLAIN: RGBColor = RGBColor(158, 178, 194);
pub(super) const TEXT: RGBColor = RGBColor(31, 35, 40);
pub(super) const FAINT_TEXT: RGBColor = RGBColor(87, 96, 106);
pub(super) const GRID: RGBColor = RGBColor(228, 231, 235);
/// What no kernel can reach.
pub(super) const OUT_OF_REACH: RGBColor = RGBColor(241, 243, 245);

/// Where text stands relative to its point.
#[derive(Clone, Copy)]
pub(super) enum Anchor {
    Left,
    Right,
    Middle,
}

/// Lettering, vertically centred on its point.
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

/// Microseconds without needless digits.
pub(super) fn microseconds(us: f64) -> String {
    if us >= 1000.0 { format!("{} ms", us / 1000.0) } else { format!("{us} µs") }
}
