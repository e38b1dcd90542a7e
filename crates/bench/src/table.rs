//! The results as text: one line per point during the run, and the means of each band of M at the end.
//! Every ratio is the baseline's time divided by ours.

use std::fmt::Write;

use super::record::{Baseline, Point, Run};
use super::targets::band_means;

/// The column headings of [`row`], with units.
pub fn heading() -> String {
    let mut text = format!(
        "{:>5} {:>6} {:>6} {:>9} {:>6} {:>6} {:>6} {:>9} {:>9} {:>6} {:>7}",
        "M", "N", "K", "ours µs", "±", "TOPS", "W GB/s", "stream µs", "mma µs", "score", "t/ideal"
    );
    for baseline in Baseline::ALL {
        write!(text, " {:>9} {:>6}", format!("{} µs", baseline.name()), "ratio").expect("a String takes all");
    }
    text
}

/// Formats one point as a line.
pub fn row(point: &Point) -> String {
    let mut text = format!(
        "{:>5} {:>6} {:>6} {:>9.2} {:>5.1}% {:>6.0} {:>6.0} {:>9} {:>9} {:>6} {:>7.3}",
        point.m,
        point.n,
        point.k,
        point.ours.us,
        100.0 * point.ours.spread(),
        point.tops(),
        point.weight_gigabytes_per_second(),
        or_dash(point.stream.map(|timing| timing.us), 2),
        or_dash(point.mma.map(|timing| timing.us), 2),
        or_dash(point.score(), 3),
        point.over_ideal()
    );
    for baseline in Baseline::ALL {
        match point.baseline(baseline).zip(point.speedup(baseline)) {
            Some((timing, ratio)) => write!(text, " {:>9.2} {ratio:>6.3}", timing.us),
            None => write!(text, " {:>9} {:>6}", "-", "-"),
        }
        .expect("a String takes all");
    }
    if let Some(mismatch) = &point.mismatch {
        write!(text, "  WRONG: {mismatch}").expect("a String takes all");
    }
    text
}

/// Formats a number, or a dash if there is none.
pub(super) fn or_dash(value: Option<f64>, digits: usize) -> String {
    value.map_or("-".into(), |value| format!("{value:.digits$}"))
}

/// The meaning of the columns.
pub const LEGEND: &str = "\
ours: median of the replays, ± half the distance between the quartiles; score: floor / ours, where the floor is the
slower of stream and mma; t/ideal: ours / max(bytes / 3.10 TB/s, operations / 1979 TOPS); ratio: cuBLASLt's time / ours
(int8: without scales, i32 output; fp8: e4m3 with one scale per tensor, bf16 output)
";

/// Formats the geometric means of each band of M over the whole run.
pub fn bands(run: &Run) -> String {
    let mut text = format!("{:<12} {:>6} {:>7} {:>8}", "M", "points", "score", "t/ideal");
    for baseline in Baseline::ALL {
        write!(text, " {:>7}", format!("× {}", baseline.name())).expect("a String takes all");
    }
    text.push_str("   (geometric means)\n");
    for means in band_means(&run.points.iter().collect::<Vec<_>>()) {
        write!(
            text,
            "{:<12} {:>6} {:>7} {:>8.3}",
            means.name,
            means.points,
            or_dash(means.score, 3),
            means.over_ideal
        )
        .expect("a String takes all");
        for speedup in means.speedups {
            write!(text, " {:>7}", or_dash(speedup, 3)).expect("a String takes all");
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::tests::point;

    #[test]
    fn columns_are_aligned_with_their_headings() {
        let full = row(&point(8192, 57344, 8192, 5432.1));
        assert_eq!(full.chars().count(), heading().chars().count());
        let bare = Point { int8: None, fp8: None, bf16: None, ..point(1, 4096, 4096, 3.0) };
        let empty = Point { stream: None, mma: None, ..bare };
        assert_eq!(row(&empty).chars().count(), heading().chars().count());
        assert!(row(&empty).ends_with("-"));
    }

    #[test]
    fn wrong_results_are_marked() {
        let point = Point { mismatch: Some("token 0".into()), ..point(1, 64, 64, 3.0) };
        assert!(row(&point).ends_with("WRONG: token 0"));
    }

    #[test]
    fn bands_without_points_have_no_line() {
        let run = Run { points: vec![point(16, 64, 64, 3.0)], ..Run::default() };
        assert_eq!(bands(&run).lines().count(), 2);
        assert!(bands(&run).contains("16–64"));
    }
}
