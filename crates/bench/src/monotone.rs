//! Whether time rises with the number of tokens. A caller may always pad its tokens to a larger batch, so a batch
//! size that takes longer than a larger one is a choice of the planner that can be bettered.

use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::record::Point;
use super::shapes::Matrix;

/// How much longer than a larger M an M may take: what two measurements of one kernel may differ by.
pub const TOLERANCE: f64 = 0.03;

/// An M that takes longer than a larger one.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Break {
    /// Output channels.
    pub n: usize,
    /// Elements a channel.
    pub k: usize,
    /// Tokens.
    pub m: usize,
    /// Its time in microseconds.
    pub us: f64,
    /// Of the larger M the fastest.
    pub larger_m: usize,
    /// Its time in microseconds.
    pub larger_us: f64,
}

impl Break {
    /// How much longer the smaller M takes, in percent.
    pub fn percent(&self) -> f64 {
        100.0 * (self.us / self.larger_us - 1.0)
    }
}

impl fmt::Display for Break {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { n, k, m, us, larger_m, larger_us } = self;
        write!(
            f,
            "{:<12} M = {m:>4}: {us:>8.2} µs, M = {larger_m:>4}: {larger_us:>8.2} µs, {:.1} % longer",
            Matrix { n: *n, k: *k }.to_string(),
            self.percent()
        )
    }
}

/// Every break among points of one matrix, by rising M: of each M the one with the fastest larger M.
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

/// The breaks among points of one matrix that a second measurement confirms. `again` measures two points once more, given
/// as indices; those times take the place of the earlier ones. Two points that both have been measured again are believed.
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
        let index = |m| points.iter().position(|point| point.m == m).expect("a break's points are measured");
        let pair = [m, larger_m].map(index);
        again(points, pair)?;
        twice.extend([m, larger_m]);
    }
}

/// The verdict over a run's points, and each break, one a line.
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
    use crate::bench::record::tests::point;

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
    fn noise_is_dismissed_and_what_lies_behind_it_is_found() {
        // M = 16's first time is far too short, M = 32's is right, and M = 8 is slower than either.
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
