//! The bands of M, what each is meant to reach, and which points miss it.
//!
//! Targets hold on the peers' matrices and on M = N = K = 8192. "Faster than its best peer" compares ratios to
//! cuBLASLt fp8, ours from this run and the peer's from its page, because times move from machine to machine.

use std::fmt::{self, Write};

use super::peers;
use super::record::{Baseline, Point, Run};
use super::statistics::geometric_mean;

/// Batch sizes that are judged together.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Band {
    first: usize,
    last: usize,
    /// The largest M that a target speaks of.
    last_with_target: usize,
    /// Least geometric mean of cuBLASLt fp8's time over ours.
    fp8: f64,
    /// Largest geometric mean of our time over the ideal floor.
    over_ideal: f64,
    /// Whether being as fast as the best peer is enough.
    tie_is_enough: bool,
}

/// From single tokens to long prompts.
pub const BANDS: [Band; 5] = [
    Band { first: 1, last: 8, last_with_target: 8, fp8: 1.90, over_ideal: 1.25, tie_is_enough: false },
    Band { first: 16, last: 64, last_with_target: 64, fp8: 1.85, over_ideal: 1.25, tie_is_enough: false },
    Band { first: 128, last: 256, last_with_target: 256, fp8: 1.50, over_ideal: 1.38, tie_is_enough: false },
    Band { first: 512, last: 1024, last_with_target: 1024, fp8: 1.15, over_ideal: 1.25, tie_is_enough: true },
    Band {
        first: 2048,
        last: 8192,
        last_with_target: 4096,
        fp8: 1.12,
        over_ideal: 1.25,
        tie_is_enough: true,
    },
];

/// M = N = K of the largest cube.
const CUBE: usize = 8192;
/// Least cuBLASLt fp8's time over ours on the cube.
const CUBE_FP8: f64 = 1.15;
/// Least speed on the cube, in tera-operations a second.
const CUBE_TOPS: f64 = 1500.0;

impl Band {
    /// Whether a batch size belongs here. Each belongs to one band: those between two named ones to the upper.
    pub fn contains(&self, m: usize) -> bool {
        let below = BANDS.iter().map(|band| band.last).filter(|&last| last < self.first).max();
        m > below.unwrap_or(0) && (m <= self.last || self.last == BANDS[BANDS.len() - 1].last)
    }
}

impl fmt::Display for Band {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{}–{}", self.first, self.last))
    }
}

/// Geometric means over a band of one run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BandMeans {
    /// The band.
    pub band: Band,
    /// Points in it.
    pub points: usize,
    /// Floor over time, where the probes ran.
    pub score: Option<f64>,
    /// Time over ideal floor.
    pub over_ideal: f64,
    /// Each baseline's time over ours, in the order of [`Baseline::ALL`], where it ran.
    pub speedups: [Option<f64>; 3],
}

/// The means of every band that has points.
pub fn band_means(run: &Run) -> Vec<BandMeans> {
    let means = |band: &Band| {
        let points: Vec<&Point> = run.points.iter().filter(|point| band.contains(point.m)).collect();
        Some(BandMeans {
            band: *band,
            points: points.len(),
            score: geometric_mean(points.iter().filter_map(|point| point.score())),
            over_ideal: geometric_mean(points.iter().map(|point| point.over_ideal()))?,
            speedups: Baseline::ALL
                .map(|baseline| geometric_mean(points.iter().filter_map(|point| point.speedup(baseline)))),
        })
    };
    BANDS.iter().filter_map(means).collect()
}

/// How one band, or the cube, stands against its targets.
#[derive(Clone, Debug, PartialEq)]
pub struct Verdict {
    /// The band, as `M 1–8`.
    pub name: String,
    /// Points that were judged.
    pub points: usize,
    /// What was reached and what is asked for.
    pub goals: Vec<Goal>,
    /// Points that are behind their best peer, in words.
    pub behind_peer: Vec<String>,
    /// Points that were compared with a best peer.
    pub peers_compared: usize,
}

impl Verdict {
    /// The two goals and how many points are ahead of their best peer, as every report shows them.
    pub(super) fn cells(&self) -> [String; 3] {
        let mut goals = self.goals.iter().map(|goal| match goal.name {
            "TOPS" => format!("TOPS {goal}"),
            _ => goal.to_string(),
        });
        let (first, second) = (goals.next().unwrap_or_default(), goals.next().unwrap_or_default());
        let ahead = match self.peers_compared {
            0 => "-".into(),
            all => format!("{} of {all}", all - self.behind_peer.len()),
        };
        [first, second, ahead]
    }
}

/// One figure and its target.
#[derive(Clone, Debug, PartialEq)]
pub struct Goal {
    /// What is measured.
    pub name: &'static str,
    /// What it came to; `None` where cuBLASLt is missing.
    pub value: Option<f64>,
    /// What it should come to.
    pub target: f64,
    /// Whether more is better.
    pub at_least: bool,
}

impl Goal {
    /// `None` where nothing was measured.
    pub fn met(&self) -> Option<bool> {
        self.value.map(|value| if self.at_least { value >= self.target } else { value <= self.target })
    }
}

impl fmt::Display for Goal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = if self.target < 100.0 { 2 } else { 0 };
        let sign = if self.at_least { '≥' } else { '≤' };
        let mark = match self.met() {
            Some(true) => "met",
            Some(false) => "MISSED",
            None => "not measured",
        };
        match self.value {
            Some(value) => write!(f, "{value:.digits$}")?,
            None => f.write_str("-")?,
        }
        write!(f, " ({sign} {:.digits$}) {mark}", self.target)
    }
}

impl Verdict {
    /// Whether everything was measured and reached.
    pub fn met(&self) -> bool {
        self.goals.iter().all(|goal| goal.met() == Some(true)) && self.behind_peer.is_empty()
    }
}

/// Judges every band that has points of the peers' page, and the cube.
pub fn judge(run: &Run) -> Vec<Verdict> {
    let mut verdicts: Vec<Verdict> = BANDS.iter().filter_map(|band| judge_band(run, band)).collect();
    verdicts.extend(run.points.iter().find(|point| [point.m, point.n, point.k] == [CUBE; 3]).map(judge_cube));
    verdicts
}

fn judge_band(run: &Run, band: &Band) -> Option<Verdict> {
    let page = peers::page();
    let on_page = |point: &&Point| {
        band.contains(point.m)
            && point.m <= band.last_with_target
            && page.at(point.m, point.n, point.k).is_some()
    };
    let points: Vec<&Point> = run.points.iter().filter(on_page).collect();
    let over_ideal = geometric_mean(points.iter().map(|point| point.over_ideal()))?;
    let fp8 = geometric_mean(points.iter().filter_map(|point| point.speedup(Baseline::Fp8)));

    let mut behind_peer = Vec::new();
    let mut peers_compared = 0;
    for point in &points {
        let (Some(speedup), Some(peer)) = (point.speedup(Baseline::Fp8), page.at(point.m, point.n, point.k))
        else {
            continue;
        };
        peers_compared += 1;
        let (ours, (name, best)) = (1.0 / speedup, peer.best());
        let ahead = if band.tie_is_enough { ours <= best } else { ours < best };
        if !ahead {
            behind_peer.push(format!(
                "M = {}, N = {}, K = {}: {:.1} µs is {ours:.3} × fp8, {name} {best:.3}: {:.1} % behind",
                point.m,
                point.n,
                point.k,
                point.ours.us,
                100.0 * (ours / best - 1.0)
            ));
        }
    }
    Some(Verdict {
        name: format!("M {}–{}", band.first, band.last_with_target),
        points: points.len(),
        goals: vec![
            Goal { name: "× fp8", value: fp8, target: band.fp8, at_least: true },
            Goal { name: "time / ideal", value: Some(over_ideal), target: band.over_ideal, at_least: false },
        ],
        behind_peer,
        peers_compared,
    })
}

fn judge_cube(point: &Point) -> Verdict {
    Verdict {
        name: format!("M = N = K = {CUBE}"),
        points: 1,
        goals: vec![
            Goal { name: "× fp8", value: point.speedup(Baseline::Fp8), target: CUBE_FP8, at_least: true },
            Goal { name: "TOPS", value: Some(point.tops()), target: CUBE_TOPS, at_least: true },
        ],
        behind_peer: Vec::new(),
        peers_compared: 0,
    }
}

/// The verdicts as text: one line each, then every point that is behind its best peer.
pub fn report(verdicts: &[Verdict]) -> String {
    let mut text = String::new();
    if verdicts.is_empty() {
        return text;
    }
    let mut line = |line: String| writeln!(text, "{}", line.trim_end()).expect("a String takes all");
    line(format!(
        "{:<18} {:>6}  {:<24} {:<26} ahead of best peer",
        "targets", "points", "× fp8", "time / ideal"
    ));
    for verdict in verdicts {
        let [first, second, ahead] = verdict.cells();
        line(format!("{:<18} {:>6}  {first:<24} {second:<26} {ahead}", verdict.name, verdict.points));
    }
    let behind: Vec<&String> = verdicts.iter().flat_map(|verdict| &verdict.behind_peer).collect();
    if !behind.is_empty() {
        line("\nbehind the best peer:".into());
        behind.into_iter().for_each(|point| line(format!("  {point}")));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::record::tests::point;

    fn run(points: Vec<Point>) -> Run {
        Run { points, ..Run::default() }
    }

    #[test]
    fn every_batch_size_is_in_exactly_one_band() {
        for m in 1..20_000 {
            assert_eq!(BANDS.iter().filter(|band| band.contains(m)).count(), 1, "{m}");
        }
        assert!(BANDS[1].contains(9) && BANDS[2].contains(65) && BANDS[4].contains(8192));
    }

    #[test]
    fn means_are_per_band() {
        let means = band_means(&run(vec![point(1, 4096, 4096, 5.0), point(64, 4096, 4096, 5.0)]));
        assert_eq!(means.len(), 2);
        assert_eq!(means[0].points, 1);
        let speedups = means[1].speedups.map(|speedup| speedup.unwrap());
        for (speedup, expected) in speedups.into_iter().zip([3.0, 2.0, 4.0]) {
            assert!((speedup - expected).abs() < 1e-12);
        }
    }

    #[test]
    fn peers_are_judged_through_fp8_and_not_by_microseconds() {
        // At M = 64 on 57344×8192 the best peer is at 107.2 / 172.1 = 0.623 of fp8.
        let shape = (64, 57344, 8192);
        let at = |us: f64, fp8: f64| {
            let mut point = point(shape.0, shape.1, shape.2, us);
            point.fp8.as_mut().unwrap().us = fp8;
            judge(&run(vec![point])).remove(0)
        };
        // Slower in microseconds than the page, on a slower machine: ahead.
        assert!(at(200.0, 400.0).behind_peer.is_empty());
        // Faster in microseconds, on a faster machine: behind.
        let verdict = at(90.0, 120.0);
        assert_eq!((verdict.peers_compared, verdict.behind_peer.len()), (1, 1));
        assert!(verdict.behind_peer[0].contains("CUTLASS int4 x fp8"), "{}", verdict.behind_peer[0]);
        assert!(!verdict.met());
    }

    #[test]
    fn points_off_the_page_have_no_target() {
        assert!(judge(&run(vec![point(2, 4096, 4096, 1.0), point(1, 5120, 5120, 1.0)])).is_empty());
        // 8192 has a mean but no target.
        assert!(judge(&run(vec![point(8192, 4096, 4096, 200.0)])).is_empty());
    }

    #[test]
    fn without_fp8_the_ratio_is_not_measured_and_nothing_is_met() {
        let point = Point { fp8: None, ..point(1, 4096, 4096, 2.9) };
        let verdict = judge(&run(vec![point])).remove(0);
        assert_eq!(verdict.goals[0].met(), None);
        assert_eq!(verdict.goals[1].met(), Some(true));
        assert!(!verdict.met());
        assert!(report(&[verdict]).contains("not measured"));
    }

    #[test]
    fn cube_is_judged_by_speed_and_fp8() {
        // 1,500 TOPS are 733 µs.
        let verdict = judge(&run(vec![point(8192, 8192, 8192, 730.0)])).remove(0);
        assert!(verdict.met(), "{verdict:?}");
        let verdict = judge(&run(vec![point(8192, 8192, 8192, 740.0)])).remove(0);
        assert_eq!(verdict.goals[1].met(), Some(false));
        assert!(report(&[verdict]).contains("TOPS 1486 (≥ 1500) MISSED"));
    }
}
