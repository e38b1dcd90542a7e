//! Finds batch sizes that take longer than a larger one.
//! A caller can always pad its tokens to a larger batch, so the planner can do better at such a batch size.
//! The measurements come from [`run`](super::run).

use std::collections::BTreeSet;

use super::record::{Break, Point};

/// Tolerated excess over the time of a larger M: two measurements of one kernel may differ by this fraction.
pub const TOLERANCE: f64 = 0.03;

/// The breaks among the points of one matrix, by ascending M; each is paired with the fastest larger M.
fn breaks(points: &[Point]) -> Vec<Break> {
    let mut sorted: Vec<&Point> = points.iter().collect();
    sorted.sort_by_key(|point| point.m);
    sorted.dedup_by_key(|point| point.m);
    let mut found = Vec::new();
    let mut fastest: Option<&Point> = None;
    for point in sorted.into_iter().rev() {
        let us = point.ours.us;
        if let Some(larger) = fastest
            && us > (1.0 + TOLERANCE) * larger.ours.us
        {
            let Point { n, k, m, .. } = *point;
            found.push(Break { n, k, m, us, larger_m: larger.m, larger_us: larger.ours.us });
        }
        if fastest.is_none_or(|fastest| us < fastest.ours.us) {
            fastest = Some(point);
        }
    }
    found.reverse();
    found
}

/// The breaks among the points of one matrix that a second measurement confirms.
///
/// `again` measures two points, given by their indices, once more and replaces their times.
/// A break counts as confirmed when both its points have been measured again.
pub(super) fn confirmed(
    points: &mut [Point],
    mut again: impl FnMut(&mut [Point], [usize; 2]) -> anyhow::Result<()>,
) -> anyhow::Result<Vec<Break>> {
    let mut twice = BTreeSet::new();
    loop {
        let found = breaks(points);
        let doubtful = found.iter().find(|one| !(twice.contains(&one.m) && twice.contains(&one.larger_m)));
        let Some(&Break { m, larger_m, .. }) = doubtful else {
            return Ok(found);
        };
        let index =
            |m| points.iter().position(|point| point.m == m).expect("a break consists of measured points");
        let pair = [m, larger_m].map(index);
        again(points, pair)?;
        twice.extend([m, larger_m]);
    }
}

/// Formats the breaks, one per line, and a verdict over all points of a run.
pub fn report(breaks: &[Break], points: &[Point]) -> String {
    let mut text: String = breaks.iter().map(|one| format!("{one}\n")).collect();
    let tolerance = 100.0 * TOLERANCE;
    text += &match breaks.len() {
        0 => format!(
            "monotone: of {} points none takes over {tolerance} % longer than a larger M\n",
            points.len()
        ),
        count => format!(
            "NOT monotone: {count} of {} points take over {tolerance} % longer than a larger M\n",
            points.len()
        ),
    };
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::tests::point;

    fn curve(times: &[(usize, f64)]) -> Vec<Point> {
        times.iter().map(|&(m, us)| point(m, 64, 128, us)).collect()
    }

    #[test]
    fn breaks_are_over_three_percent_and_name_the_fastest_larger_batch() {
        let points = curve(&[(1, 10.0), (8, 10.29), (16, 13.0), (24, 12.0), (32, 10.0), (40, 11.0)]);
        let found = breaks(&points);
        assert_eq!(found.iter().map(|one| (one.m, one.larger_m)).collect::<Vec<_>>(), [(16, 32), (24, 32)]);
        assert!((found[0].percent() - 30.0).abs() < 1e-9);
        assert!(breaks(&points[..2]).is_empty());
        assert!(breaks(&[]).is_empty());
    }

    #[test]
    fn order_of_measuring_does_not_matter_and_equal_batches_are_no_break() {
        let found = breaks(&curve(&[(32, 10.0), (8, 12.0)]));
        assert_eq!(found.iter().map(|one| (one.m, one.larger_m)).collect::<Vec<_>>(), [(8, 32)]);
        assert!(breaks(&curve(&[(8, 12.0), (8, 9.0)])).is_empty());
    }

    #[test]
    fn noise_is_dismissed_and_a_break_hidden_by_it_is_found() {
        // The first time of M = 16 is far too short, that of M = 32 is right, and M = 8 is slower than both.
        let mut points = curve(&[(8, 12.0), (16, 5.0), (32, 10.0)]);
        let mut measured = Vec::new();
        let found = confirmed(&mut points, |points, pair| {
            for index in pair {
                measured.push(points[index].m);
                if points[index].m == 16 {
                    points[index].ours.us = 11.9;
                }
            }
            Ok(())
        })
        .unwrap();
        assert_eq!(measured, [8, 16, 8, 32]);
        assert_eq!(found.iter().map(|one| (one.m, one.larger_m)).collect::<Vec<_>>(), [(8, 32), (16, 32)]);
    }

    #[test]
    fn verdict_counts_breaks() {
        let points = curve(&[(8, 12.0), (16, 10.0)]);
        let text = report(&breaks(&points), &points);
        assert!(
            text.contains("64x128       M =    8:    12.00 µs, M =   16:    10.00 µs, 20.0 % longer"),
            "{text}"
        );
        assert!(text.contains("NOT monotone: 1 of 2 points"), "{text}");
        assert!(report(&[], &points).starts_with("monotone: of 2 points none"));
    }
}
