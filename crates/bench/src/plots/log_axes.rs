//! Grid lines and labels of a logarithmic axis of times, for which plotters has only powers of ten.

use plotters::coord::Shift;
use plotters::coord::combinators::LogCoord;
use plotters::drawing::DrawingAreaErrorKind;
use plotters::prelude::*;

use super::style::{self, Anchor, microseconds, text};

/// A chart with two logarithmic axes.
pub(super) type LogChart<'a, B> = ChartContext<'a, B, Cartesian2d<LogCoord<f64>, LogCoord<f64>>>;

/// Draws grid lines at round times in `up`, from one end of `across` to the other, and their labels on the left.
/// `area` is the whole picture, because a chart's positions are relative to that.
pub(super) fn label_microseconds<B: DrawingBackend>(
    area: &DrawingArea<B, Shift>,
    chart: &LogChart<'_, B>,
    across: std::ops::Range<f64>,
    up: &std::ops::Range<f64>,
) -> Result<(), DrawingAreaErrorKind<B::ErrorType>> {
    for us in ticks(up) {
        let [left, right] =
            [across.start, across.end].map(|x| chart.plotting_area().map_coordinate(&(x, us)));
        area.draw(&PathElement::new([left, right], style::GRID.stroke_width(1)))?;
        let lettering = text(13, false, style::FAINT_TEXT, Anchor::Right);
        area.draw(&Text::new(microseconds(us), (left.0 - 8, left.1), lettering))?;
    }
    Ok(())
}

/// The numbers 1, 2 and 5 times a power of ten within a range.
fn ticks(range: &std::ops::Range<f64>) -> Vec<f64> {
    let decades = range.start.log10().floor() as i32..=range.end.log10().ceil() as i32;
    let all = decades.flat_map(|decade| [1.0, 2.0, 5.0].map(|step| step * 10f64.powi(decade)));
    all.filter(|tick| range.contains(tick)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_numbers_inside_the_range() {
        assert_eq!(ticks(&(1.5..60.0)), [2.0, 5.0, 10.0, 20.0, 50.0]);
        assert_eq!(
            ticks(&(900.0..2100.0)).iter().map(|us| microseconds(*us)).collect::<Vec<_>>(),
            ["1 ms", "2 ms"]
        );
    }
}
