//! The results of mixtures of experts as lines of text, and their means.

use std::fmt::Write;

use super::{Point, fastest, page};
use crate::statistics::geometric_mean;
use crate::table::or_dash;

/// The fewest rows of a point that counts in the mean score.
const SCORED_ROWS: usize = 64;

/// Returns the column headings of [`row`], with units.
pub fn heading() -> String {
    let mut text = format!(
        "{:<20} {:>6} {:>6} {:>6} {:>9} {:>6} {:>9} {:>6}",
        "layer", "tokens", "rows", "active", "ours µs", "±", "ideal µs", "score"
    );
    for column in &page().columns {
        write!(text, " {:>17}", format!("× {column}")).expect("a String takes all");
    }
    text
}

/// Formats one point as a line. A ratio is the other kernel's time ([`Point::others`]) divided by ours.
pub fn row(point: &Point) -> String {
    let mut text = format!(
        "{:<20} {:>6} {:>6} {:>6} {:>9.2} {:>5.1}% {:>9.2} {:>6.3}",
        point.page.layer,
        point.page.tokens,
        point.page.rows,
        point.page.active,
        point.ours.us,
        100.0 * point.ours.spread(),
        point.ideal_us,
        point.score()
    );
    for us in point.others() {
        write!(text, " {:>17}", or_dash(us.map(|us| us / point.ours.us), 3)).expect("a String takes all");
    }
    write!(text, "  {}", point.plan).expect("a String takes all");
    if let Some(error) = point.torch_fp8.as_ref().and_then(|torch| torch.error.as_ref()) {
        write!(text, "  no torch: {error}").expect("a String takes all");
    }
    if let Some(mismatch) = &point.mismatch {
        write!(text, "  WRONG: {mismatch}").expect("a String takes all");
    }
    text
}

/// Formats the geometric means over all points, and the points that are slower than another kernel's time.
///
/// Of several plans of a point, the fastest counts.
pub fn summary(results: &[Point]) -> String {
    let points = fastest(results);
    let scored = points.iter().filter(|point| point.page.rows >= SCORED_ROWS);
    let score = geometric_mean(scored.map(|point| point.score()));
    let mut text = format!(
        "geometric means: ideal floor / time {} (points with {SCORED_ROWS} rows or more)",
        or_dash(score, 3)
    );
    for (column, name) in page().columns.iter().enumerate() {
        let ratios: Vec<f64> =
            points.iter().filter_map(|point| Some(point.others()[column]? / point.ours.us)).collect();
        let slower = ratios.iter().filter(|&&ratio| ratio < 1.0).count();
        write!(
            text,
            "; × {name} {}, slower at {slower} of {} points",
            or_dash(geometric_mean(ratios.iter().copied()), 3),
            ratios.len()
        )
        .expect("a String takes all");
    }
    text.push('\n');
    text
}
