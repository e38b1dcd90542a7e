//! The performance targets, and which points miss them.
//!
//! Targets apply to the peer kernels' matrices, to the shards, and to M = N = K = 8192.
//! Times differ between machines, so a point is compared with its best peer through ratios to cuBLASLt fp8:
//! our ratio is from this run, the peer's from its page ([`peers`](mod@super::peers)).

use std::fmt::{self, Write};

use super::peers;
use super::record::{Baseline, Point, Run};
use super::shapes::{is_shard, peer_matrices};
use super::statistics::geometric_mean;

/// The matrices that a target applies to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Matrices {
    /// The matrices that the peer kernels were measured on.
    Peers,
    /// LLaMA-3-70B's matrices, sharded over several GPUs.
    Shards,
}

/// A target for a group of batch sizes.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    matrices: Matrices,
    /// The batch sizes, in ascending order.
    tokens: &'static [usize],
    /// Least geometric mean of cuBLASLt fp8's time divided by ours.
    fp8: f64,
    /// Least ratio at every single point, if the target has a limit of its own for that.
    slowest: Option<f64>,
    /// Largest geometric mean of our time divided by the ideal floor.
    over_ideal: Option<f64>,
    /// Whether it is enough to be as fast as the best peer.
    tie_is_enough: bool,
}

/// A target for the peer kernels' matrices at powers of two.
const fn power(tokens: &'static [usize], fp8: f64, over_ideal: f64, tie_is_enough: bool) -> Target {
    let over_ideal = Some(over_ideal);
    Target { matrices: Matrices::Peers, tokens, fp8, slowest: None, over_ideal, tie_is_enough }
}

/// A target for the peer kernels' matrices between the powers of two.
const fn between(tokens: &'static [usize], fp8: f64) -> Target {
    Target { matrices: Matrices::Peers, tokens, fp8, slowest: None, over_ideal: None, tie_is_enough: true }
}

/// All targets except those for single points.
pub const TARGETS: [Target; 12] = [
    power(&[1, 4, 8], 1.97, 1.25, false),
    power(&[16, 32, 64], 1.93, 1.25, false),
    power(&[128, 256], 1.51, 1.38, false),
    power(&[512, 1024], 1.12, 1.25, true),
    power(&[2048, 4096], 1.11, 1.25, true),
    between(&[24, 40, 48, 56], 1.90),
    between(&[72, 80, 96, 112], 1.82),
    between(&[136, 160, 176, 192], 1.45),
    between(&[208, 224, 240], 1.40),
    between(&[272, 320, 352, 384, 448], 1.20),
    between(&[640, 768, 896, 1280, 1536, 3072], 1.12),
    Target {
        matrices: Matrices::Shards,
        tokens: &[1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 512, 640, 768, 1024],
        fp8: 1.35,
        slowest: Some(1.0),
        over_ideal: None,
        tie_is_enough: true,
    },
];

/// Least ratio of cuBLASLt fp8's time to ours at every point of the peer kernels' matrices.
const SLOWEST: f64 = 1.0;
/// M = N = K of the cube, the only problem with a target of its own.
const CUBE: usize = 8192;
/// Least ratio of cuBLASLt fp8's time to ours on the cube.
const CUBE_FP8: f64 = 1.15;
/// Least speed on the cube, in tera-operations per second.
const CUBE_TOPS: f64 = 1500.0;

impl Target {
    /// The points of a run that the target applies to.
    fn points<'a>(&self, run: &'a Run) -> Vec<&'a Point> {
        let matrices = peer_matrices();
        let holds = |point: &&Point| {
            let matrix = point.matrix();
            self.tokens.contains(&point.m)
                && match self.matrices {
                    Matrices::Peers => matrices.contains(&matrix),
                    Matrices::Shards => is_shard(matrix),
                }
        };
        run.points.iter().filter(holds).collect()
    }

    fn is_between(&self) -> bool {
        self.matrices == Matrices::Peers && !self.tokens.iter().all(|m| m.is_power_of_two())
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let prefix = if self.matrices == Matrices::Shards { "shards, " } else { "" };
        match self.tokens {
            [first, .., last] => f.pad(&format!("{prefix}M {first}–{last}")),
            rest => f.pad(&format!("{prefix}M {rest:?}")),
        }
    }
}

/// A range of batch sizes over which means are given, for any matrices.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Band {
    first: usize,
    last: usize,
}

/// The bands, from single tokens to long prompts.
pub const BANDS: [Band; 5] = [
    Band { first: 1, last: 8 },
    Band { first: 16, last: 64 },
    Band { first: 128, last: 256 },
    Band { first: 512, last: 1024 },
    Band { first: 2048, last: 8192 },
];

impl Band {
    /// Whether a batch size belongs to this band. One that lies between two bands belongs to the upper one.
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

/// Geometric means over a set of points.
#[derive(Clone, Debug, PartialEq)]
pub struct Means {
    /// What the points have in common, such as their range of batch sizes.
    pub name: String,
    /// Number of points.
    pub points: usize,
    /// The floor divided by our time, over the points with probes.
    pub score: Option<f64>,
    /// Our time divided by the ideal floor.
    pub over_ideal: f64,
    /// Each baseline's time divided by ours, in the order of [`Baseline::ALL`], over the points that have it.
    pub speedups: [Option<f64>; 3],
}

impl Means {
    /// Computes the means. `None` if there are no points.
    pub fn of(name: String, points: &[&Point]) -> Option<Self> {
        Some(Self {
            name,
            points: points.len(),
            score: geometric_mean(points.iter().filter_map(|point| point.score())),
            over_ideal: geometric_mean(points.iter().map(|point| point.over_ideal()))?,
            speedups: Baseline::ALL
                .map(|baseline| geometric_mean(points.iter().filter_map(|point| point.speedup(baseline)))),
        })
    }
}

/// The means of every band that has points.
pub fn band_means(points: &[&Point]) -> Vec<Means> {
    let means = |band: &Band| {
        let points: Vec<&Point> = points.iter().copied().filter(|point| band.contains(point.m)).collect();
        Means::of(band.to_string(), &points)
    };
    BANDS.iter().filter_map(means).collect()
}

/// The means of the targets between the powers of two that have points.
pub fn between_means(run: &Run) -> Vec<Means> {
    let targets = TARGETS.iter().filter(|target| target.is_between());
    targets.filter_map(|target| Means::of(target.to_string(), &target.points(run))).collect()
}

/// The verdict on one target.
#[derive(Clone, Debug, PartialEq)]
pub struct Verdict {
    /// The batch sizes, such as `M 1–8`.
    pub name: String,
    /// Number of points that were judged.
    pub points: usize,
    /// The mean of cuBLASLt fp8's time divided by ours.
    pub fp8: Option<Goal>,
    /// The least of these ratios at a single point.
    pub slowest: Option<Goal>,
    /// Our time divided by the ideal floor, or tera-operations per second.
    pub absolute: Option<Goal>,
    /// The points that are behind their best peer, as text.
    pub behind_peer: Vec<String>,
    /// Number of points that were compared with a best peer.
    pub peers_compared: usize,
    /// The points whose ratio is below the limit for single points, as text.
    pub slower_than_fp8: Vec<String>,
}

/// The column headings of [`Verdict::cells`].
pub(super) const CELLS: [&str; 4] = ["× fp8", "slowest × fp8", "time / ideal", "ahead of best peer"];

impl Verdict {
    fn goals(&self) -> impl Iterator<Item = &Goal> {
        [&self.fp8, &self.slowest, &self.absolute].into_iter().flatten()
    }

    /// The table cells of every report: the goals, and how many points are ahead of their best peer.
    pub(super) fn cells(&self) -> [String; 4] {
        let cell = |goal: &Option<Goal>| match goal {
            Some(goal) if goal.name == "TOPS" => format!("TOPS {goal}"),
            Some(goal) => goal.to_string(),
            None => "-".into(),
        };
        let ahead = match self.peers_compared {
            0 => "-".into(),
            all => format!("{} of {all}", all - self.behind_peer.len()),
        };
        [cell(&self.fp8), cell(&self.slowest), cell(&self.absolute), ahead]
    }

    /// Whether every goal was measured and reached, and no point is behind its best peer.
    pub fn met(&self) -> bool {
        self.goals().all(|goal| goal.met() == Some(true)) && self.behind_peer.is_empty()
    }
}

/// A figure with its target.
#[derive(Clone, Debug, PartialEq)]
pub struct Goal {
    /// Name of the figure.
    pub name: &'static str,
    /// The measured value. `None` if it was not measured, for instance without cuBLASLt.
    pub value: Option<f64>,
    /// The target value.
    pub target: f64,
    /// Whether the target is a lower limit instead of an upper one.
    pub at_least: bool,
}

impl Goal {
    /// Whether the target is met. `None` if the figure was not measured.
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

/// Judges every target that has points in the run.
pub fn judge(run: &Run) -> Vec<Verdict> {
    let mut verdicts: Vec<Verdict> = TARGETS.iter().filter_map(|target| judge_target(run, target)).collect();
    verdicts.extend(judge_every_point(run));
    verdicts.extend(run.points.iter().find(|point| [point.m, point.n, point.k] == [CUBE; 3]).map(judge_cube));
    verdicts
}

fn judge_target(run: &Run, target: &Target) -> Option<Verdict> {
    let points = target.points(run);
    let means = Means::of(target.to_string(), &points)?;
    let mut behind_peer = Vec::new();
    let mut peers_compared = 0;
    for point in &points {
        let (Some(speedup), Some((name, best))) =
            (point.speedup(Baseline::Fp8), peers::best(point.m, point.n, point.k))
        else {
            continue;
        };
        peers_compared += 1;
        let ours = 1.0 / speedup;
        let ahead = if target.tie_is_enough { ours <= best } else { ours < best };
        if !ahead {
            behind_peer.push(format!(
                "{}: {:.1} µs is {ours:.3} × fp8, {name} {best:.3}: {:.1} % behind",
                place(point),
                point.ours.us,
                100.0 * (ours / best - 1.0)
            ));
        }
    }
    let fp8 = means.speedups[Baseline::Fp8 as usize];
    let slowest = target.slowest.map(|least| (slowest(&points, least), slower(&points, least)));
    let (slowest, slower_than_fp8) = slowest.unzip();
    Some(Verdict {
        name: means.name,
        points: means.points,
        fp8: Some(Goal { name: "× fp8", value: fp8, target: target.fp8, at_least: true }),
        slowest,
        absolute: target.over_ideal.map(|most| Goal {
            name: "time / ideal",
            value: Some(means.over_ideal),
            target: most,
            at_least: false,
        }),
        behind_peer,
        peers_compared,
        slower_than_fp8: slower_than_fp8.unwrap_or_default(),
    })
}

/// Judges all points of the peer kernels' matrices together, at any batch size.
/// `None` if no point has cuBLASLt fp8.
fn judge_every_point(run: &Run) -> Option<Verdict> {
    let matrices = peer_matrices();
    let with_fp8 = |point: &&Point| point.fp8.is_some() && matrices.contains(&point.matrix());
    let points: Vec<&Point> = run.points.iter().filter(with_fp8).collect();
    (!points.is_empty()).then(|| Verdict {
        name: "every M".into(),
        points: points.len(),
        fp8: None,
        slowest: Some(slowest(&points, SLOWEST)),
        absolute: None,
        behind_peer: Vec::new(),
        peers_compared: 0,
        slower_than_fp8: slower(&points, SLOWEST),
    })
}

fn judge_cube(point: &Point) -> Verdict {
    let fp8 = Goal { name: "× fp8", value: point.speedup(Baseline::Fp8), target: CUBE_FP8, at_least: true };
    Verdict {
        name: format!("M = N = K = {CUBE}"),
        points: 1,
        fp8: Some(fp8),
        slowest: None,
        absolute: Some(Goal { name: "TOPS", value: Some(point.tops()), target: CUBE_TOPS, at_least: true }),
        behind_peer: Vec::new(),
        peers_compared: 0,
        slower_than_fp8: Vec::new(),
    }
}

/// The least ratio of cuBLASLt fp8's time to ours.
fn slowest(points: &[&Point], target: f64) -> Goal {
    let value = points.iter().filter_map(|point| point.speedup(Baseline::Fp8)).min_by(f64::total_cmp);
    Goal { name: "slowest × fp8", value, target, at_least: true }
}

/// The points at which the ratio is below `least`, as text.
fn slower(points: &[&Point], least: f64) -> Vec<String> {
    let words = |point: &&Point| {
        let (speedup, fp8) = (point.speedup(Baseline::Fp8)?, point.fp8.as_ref()?.us);
        (speedup < least)
            .then(|| format!("{}: {:.1} µs, fp8 {fp8:.1} µs, × {speedup:.3}", place(point), point.ours.us))
    };
    points.iter().filter_map(words).collect()
}

fn place(point: &Point) -> String {
    format!("M = {}, N = {}, K = {}", point.m, point.n, point.k)
}

/// Formats the verdicts, one per line, then lists the points slower than fp8 or behind their best peer.
pub fn report(verdicts: &[Verdict]) -> String {
    let mut text = String::new();
    if verdicts.is_empty() {
        return text;
    }
    let mut line = |line: String| writeln!(text, "{}", line.trim_end()).expect("a String takes all");
    let row = |name: &str, points: &str, [fp8, slowest, absolute, ahead]: [&str; 4]| {
        format!("{name:<18} {points:>6}  {fp8:<24} {slowest:<24} {absolute:<26} {ahead}")
    };
    line(row("targets", "points", CELLS));
    for verdict in verdicts {
        let cells = verdict.cells();
        line(row(&verdict.name, &verdict.points.to_string(), cells.each_ref().map(String::as_str)));
    }
    for (heading, points) in misses(verdicts) {
        line(format!("\n{heading}:"));
        points.into_iter().for_each(|point| line(format!("  {point}")));
    }
    text
}

/// The lists of points that miss a target, each with a heading. Empty lists are left out.
pub(super) fn misses(verdicts: &[Verdict]) -> Vec<(&'static str, Vec<&String>)> {
    let slower = verdicts.iter().flat_map(|verdict| &verdict.slower_than_fp8).collect();
    let behind = verdicts.iter().flat_map(|verdict| &verdict.behind_peer).collect();
    let mut lists: Vec<(_, Vec<&String>)> =
        vec![("slower than cuBLASLt fp8", slower), ("behind the best peer", behind)];
    lists.retain(|(_, points)| !points.is_empty());
    lists
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::tests::point;
    use crate::shapes;

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
    fn every_point_of_the_lists_has_exactly_one_target() {
        let lists = [shapes::peer_cases(), shapes::between_cases(), shapes::shard_cases()];
        let mut judged = 0;
        for case in lists.iter().flatten() {
            for &m in &case.tokens {
                let one = run(vec![point(m, case.matrix.n, case.matrix.k, 5.0)]);
                let targets = TARGETS.iter().filter(|target| !target.points(&one).is_empty()).count();
                assert_eq!(targets, usize::from(m != CUBE), "M = {m}, {}", case.matrix);
                judged += targets;
            }
        }
        assert_eq!(judged, 120 + 260 + 8 * 21);
        let names: Vec<String> = TARGETS.iter().map(Target::to_string).collect();
        assert_eq!((names[0].as_str(), names[11].as_str()), ("M 1–8", "shards, M 1–1024"));
        let tokens = |target: &Target| target.tokens.is_sorted();
        assert!(TARGETS.iter().all(tokens));
    }

    #[test]
    fn means_are_per_band() {
        let points = [point(1, 4096, 4096, 5.0), point(64, 4096, 4096, 5.0)];
        let means = band_means(&points.iter().collect::<Vec<_>>());
        assert_eq!(means.len(), 2);
        assert_eq!((means[0].points, means[0].name.as_str()), (1, "1–8"));
        let speedups = means[1].speedups.map(|speedup| speedup.unwrap());
        for (speedup, expected) in speedups.into_iter().zip([3.0, 2.0, 4.0]) {
            assert!((speedup - expected).abs() < 1e-12);
        }
    }

    #[test]
    fn means_between_powers_of_two_follow_the_targets() {
        let run =
            run(vec![point(24, 4096, 4096, 5.0), point(48, 4096, 4096, 5.0), point(32, 4096, 4096, 5.0)]);
        let means = between_means(&run);
        assert_eq!(means.len(), 1);
        assert_eq!((means[0].points, means[0].name.as_str()), (2, "M 24–56"));
    }

    #[test]
    fn peers_are_judged_through_fp8_and_not_by_microseconds() {
        // At M = 64 on 57344×8192 the best peer is at 95.9 / 164.1 = 0.584 of fp8.
        let shape = (64, 57344, 8192);
        let at = |us: f64, fp8: f64| {
            let mut point = point(shape.0, shape.1, shape.2, us);
            point.fp8.as_mut().unwrap().us = fp8;
            judge(&run(vec![point])).remove(0)
        };
        // More microseconds than on the page, but on a slower machine: ahead.
        assert!(at(200.0, 400.0).behind_peer.is_empty());
        // Fewer microseconds than on the page, but on a faster machine: behind.
        let verdict = at(90.0, 120.0);
        assert_eq!((verdict.peers_compared, verdict.behind_peer.len()), (1, 1));
        assert!(verdict.behind_peer[0].contains("Humming W4A8 per channel"), "{}", verdict.behind_peer[0]);
        assert!(!verdict.met());
    }

    #[test]
    fn peers_between_the_powers_of_two_are_judged_too() {
        // There, the best peer is Humming, at 29.96 / 51.6 of fp8.
        let point = point(96, 28672, 4096, 30.0);
        let behind = |fp8: f64| {
            let mut point = point.clone();
            point.fp8.as_mut().unwrap().us = fp8;
            judge(&run(vec![point])).remove(0)
        };
        assert!(behind(52.5).behind_peer.is_empty());
        assert_eq!(behind(50.0).behind_peer.len(), 1);
        assert_eq!(behind(50.0).fp8.unwrap().target, 1.82);
    }

    #[test]
    fn points_outside_the_lists_have_no_target_for_their_mean() {
        assert!(judge(&run(vec![point(1, 5120, 5120, 1.0)])).is_empty());
        // On the peer kernels' matrices, no point may be slower than fp8.
        for m in [2, 8192] {
            let verdicts = judge(&run(vec![point(m, 4096, 4096, 1.0)]));
            assert_eq!(verdicts.iter().map(|verdict| verdict.name.as_str()).collect::<Vec<_>>(), ["every M"]);
            assert!(verdicts[0].met());
        }
    }

    #[test]
    fn every_point_slower_than_fp8_is_listed() {
        let with_fp8 = |m, n, k, us, fp8| {
            let mut point = point(m, n, k, us);
            point.fp8.as_mut().unwrap().us = fp8;
            point
        };
        let points = vec![
            with_fp8(1000, 4096, 4096, 10.0, 9.0),
            with_fp8(1000, 8192, 8192, 10.0, 11.0),
            with_fp8(64, 2560, 8192, 10.0, 9.5),
            // This is neither a shard nor a matrix of the peer kernels.
            with_fp8(64, 5120, 5120, 10.0, 5.0),
        ];
        let verdicts = judge(&run(points));
        let named: Vec<(&str, usize)> =
            verdicts.iter().map(|one| (one.name.as_str(), one.slower_than_fp8.len())).collect();
        assert_eq!(named, [("shards, M 1–1024", 1), ("every M", 1)]);
        assert!(verdicts.iter().all(|verdict| !verdict.met()));
        let text = report(&verdicts);
        assert!(text.contains("  M = 1000, N = 4096, K = 4096: 10.0 µs, fp8 9.0 µs, × 0.900\n"), "{text}");
        assert!(text.contains("0.95 (≥ 1.00) MISSED") && !text.contains("behind the best peer"), "{text}");
    }

    #[test]
    fn without_fp8_the_ratio_is_not_measured_and_nothing_is_met() {
        let point = Point { fp8: None, ..point(1, 4096, 4096, 2.9) };
        let verdicts = judge(&run(vec![point]));
        assert_eq!(verdicts.len(), 1);
        assert_eq!(verdicts[0].fp8.as_ref().unwrap().met(), None);
        assert_eq!(verdicts[0].absolute.as_ref().unwrap().met(), Some(true));
        assert!(!verdicts[0].met());
        assert!(report(&verdicts).contains("not measured"));
    }

    #[test]
    fn cube_is_judged_by_speed_and_fp8() {
        // 1,500 TOPS are 733 µs.
        let verdict = judge(&run(vec![point(8192, 8192, 8192, 730.0)])).pop().unwrap();
        assert!(verdict.met(), "{verdict:?}");
        let verdict = judge(&run(vec![point(8192, 8192, 8192, 740.0)])).pop().unwrap();
        assert_eq!(verdict.absolute.as_ref().unwrap().met(), Some(false));
        assert!(report(&[verdict]).contains("TOPS 1486 (≥ 1500) MISSED"));
    }
}
