//! The record of a run: its circumstances and one entry per point, with the figures that follow from them.
//! The bench writes it as JSON after every point, so an interrupted run keeps what it has measured.

use std::fmt;
use std::path::Path;

use anyhow::{Context, ensure};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::circumstances::Circumstances;
use super::matrix::{Matrix, distinct};
use super::replay::Pace;
use super::statistics::Timing;
use liquidgemm::{Error, Group, NewFile};
use liquidgemm_format::brick;

/// HBM bandwidth of the ideal floor, in bytes per second: what the `stream` probe reaches on large reads.
const IDEAL_BYTES_PER_SECOND: f64 = 3.10e12;
/// int8 operations per second in the H100's data sheet, at its boost clock.
const IDEAL_OPERATIONS_PER_SECOND: f64 = 1979e12;

/// A product of cuBLASLt, measured in the same run as our kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Baseline {
    /// cuBLASLt int8 × int8 → int32, without scales.
    Int8,
    /// cuBLASLt e4m3 × e4m3 → bf16 with one scale per tensor.
    Fp8,
    /// cuBLASLt bf16.
    Bf16,
}

impl Baseline {
    /// Every baseline, in the order of the columns.
    pub const ALL: [Baseline; 3] = [Baseline::Int8, Baseline::Fp8, Baseline::Bf16];

    /// The column's name.
    pub const fn name(self) -> &'static str {
        match self {
            Baseline::Int8 => "int8",
            Baseline::Fp8 => "fp8",
            Baseline::Bf16 => "bf16",
        }
    }
}

/// The times of one problem.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// Tokens.
    pub m: usize,
    /// Output channels.
    pub n: usize,
    /// Elements per channel.
    pub k: usize,
    /// How many of our weights share a pair.
    #[serde(default, with = "group_text")]
    pub group: Group,
    /// The plan of our kernel as text.
    pub plan: String,
    /// Our kernel, with bf16 output.
    pub ours: Timing,
    /// The probe that only reads, if the run had probes.
    pub stream: Option<Timing>,
    /// The probe that only multiplies, if the run had probes.
    pub mma: Option<Timing>,
    /// cuBLASLt int8.
    pub int8: Option<Timing>,
    /// cuBLASLt fp8.
    pub fp8: Option<Timing>,
    /// cuBLASLt bf16.
    pub bf16: Option<Timing>,
    /// Number of tokens whose outputs were compared with the CPU backend, all channels of each.
    pub tokens_checked: usize,
    /// The first difference from the CPU backend's result, if there is one.
    pub mismatch: Option<String>,
}

impl Point {
    /// Number of kernels that were measured beside ours.
    fn columns(&self) -> usize {
        [&self.stream, &self.mma, &self.int8, &self.fp8, &self.bf16].into_iter().flatten().count()
    }

    /// The size of the weight matrix.
    pub fn matrix(&self) -> Matrix {
        Matrix { n: self.n, k: self.k }
    }

    /// Bytes of the packed weights, codes and pairs.
    pub fn weight_bytes(&self) -> usize {
        weight_bytes(self.n, self.k, self.group)
    }

    /// Bytes of packed weights, int8 activations and bf16 output.
    pub fn bytes(&self) -> usize {
        moved_bytes(self.m, self.n, self.k, self.group)
    }

    /// Number of multiplications and additions, 2·m·n·k.
    pub fn operations(&self) -> f64 {
        2.0 * self.m as f64 * self.n as f64 * self.k as f64
    }

    /// The time of the slower probe in this run, in microseconds. `None` without probes.
    pub fn floor(&self) -> Option<f64> {
        Some(self.stream?.us.max(self.mma?.us))
    }

    /// The floor divided by our time; 1 is the limit. `None` without probes.
    pub fn score(&self) -> Option<f64> {
        Some(self.floor()? / self.ours.us)
    }

    /// The ideal floor in microseconds, from the bandwidth and the data sheet, without launch cost.
    pub fn ideal(&self) -> f64 {
        1e6 * (self.bytes() as f64 / IDEAL_BYTES_PER_SECOND)
            .max(self.operations() / IDEAL_OPERATIONS_PER_SECOND)
    }

    /// Our time divided by the ideal floor.
    pub fn over_ideal(&self) -> f64 {
        self.ours.us / self.ideal()
    }

    /// Tera-operations per second.
    pub fn tops(&self) -> f64 {
        self.operations() / self.ours.us / 1e6
    }

    /// Speed at which packed weights are read, in GB/s.
    pub fn weight_gigabytes_per_second(&self) -> f64 {
        self.weight_bytes() as f64 / self.ours.us / 1e3
    }

    /// A baseline's time, if it was measured.
    pub fn baseline(&self, baseline: Baseline) -> Option<&Timing> {
        match baseline {
            Baseline::Int8 => self.int8.as_ref(),
            Baseline::Fp8 => self.fp8.as_ref(),
            Baseline::Bf16 => self.bf16.as_ref(),
        }
    }

    /// A baseline's time divided by ours; above 1 our kernel is faster.
    pub fn speedup(&self, baseline: Baseline) -> Option<f64> {
        Some(self.baseline(baseline)?.us / self.ours.us)
    }
}

/// A batch size that takes longer than a larger one.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Break {
    /// Output channels.
    pub n: usize,
    /// Elements per channel.
    pub k: usize,
    /// Tokens of the smaller batch.
    pub m: usize,
    /// Time of the smaller batch in microseconds.
    pub us: f64,
    /// Tokens of the fastest larger batch.
    pub larger_m: usize,
    /// Time of the larger batch in microseconds.
    pub larger_us: f64,
}

impl Break {
    /// How much longer the smaller batch takes, in percent.
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

/// Bytes of the codes and bytes of the pairs of packed weights `[n, k]`.
///
/// # Errors
/// If the group does not fit K, or a size overflows.
pub(super) fn packed_bytes(n: usize, k: usize, group: Group) -> Result<[usize; 2], Error> {
    let bytes = brick::codes_bytes(n, k).zip(brick::pairs_bytes(n, group.count(k)?));
    let bytes = bytes.ok_or(Error::TooLarge { what: "weight matrix", rows: n, columns: k })?;
    Ok([bytes.0, bytes.1])
}

/// Bytes of packed weights `[n, k]`, codes and pairs; the largest number if such weights can't exist.
pub(super) fn weight_bytes(n: usize, k: usize, group: Group) -> usize {
    packed_bytes(n, k, group).map_or(usize::MAX, |[codes, pairs]| codes.saturating_add(pairs))
}

/// The least bytes that a GEMM moves: packed weights, int8 activations and bf16 output.
pub(super) fn moved_bytes(m: usize, n: usize, k: usize, group: Group) -> usize {
    weight_bytes(n, k, group).saturating_add(m.saturating_mul(k.saturating_add(n.saturating_mul(2))))
}

/// Serializes a group as its text.
mod group_text {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    use liquidgemm::Group;

    pub(super) fn serialize<S: Serializer>(group: &Group, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(group)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Group, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

/// A run over all problems.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// GPU, driver, date and command.
    #[serde(flatten)]
    pub circumstances: Circumstances,
    /// Version and path of cuBLASLt, and how its algorithms were chosen. Empty without cuBLASLt.
    pub cublaslt: String,
    /// How long each kernel was measured.
    #[serde(default)]
    pub pace: Pace,
    /// Batch sizes that take longer than a larger one. `None` if the run did not search for them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub breaks: Option<Vec<Break>>,
    /// Remarks, such as the reason why a column is empty.
    pub notes: Vec<String>,
    /// False while points are still missing.
    pub complete: bool,
    /// The points, in the order of measurement.
    pub points: Vec<Point>,
}

impl Run {
    /// Writes the run to `path`. The file is replaced in one step, so a reader never sees half of it.
    ///
    /// # Errors
    /// If the file can't be written.
    pub fn save(&self, path: &Path) -> anyhow::Result<()> {
        write_json(path, self)
    }

    /// Reads a run from a file.
    ///
    /// # Errors
    /// If the file can't be read or is not a run, or if a dimension or a time is impossible.
    pub fn load(path: &Path) -> anyhow::Result<Self> {
        read_file(path, Self::from_json)
    }

    /// Reads a run from JSON; errors call it `name`.
    ///
    /// # Errors
    /// If it is not a run, or if a dimension or a time is impossible.
    pub fn from_json(json: &[u8], name: &str) -> anyhow::Result<Self> {
        let run: Self = parse_json(json, name, "benchmark run")?;
        let plausible = run.points.iter().all(|point| {
            let probes = [Some(&point.ours), point.stream.as_ref(), point.mma.as_ref()];
            let baselines = Baseline::ALL.map(|baseline| point.baseline(baseline));
            point.m.min(point.n).min(point.k) > 0
                && probes.into_iter().chain(baselines).flatten().all(Timing::is_plausible)
        }) && run.breaks.iter().flatten().all(|one| one.us > 0.0 && one.larger_us > 0.0);
        ensure!(plausible, "{name} has a dimension of 0 or an impossible time");
        Ok(run)
    }

    /// Merges runs into one that has each point once.
    ///
    /// Among several measurements of a point, the one with the most columns counts, and the last of those.
    /// Runs of only our kernel, which look for [`breaks`](Self::breaks), count only if there are no others.
    /// The circumstances are those of the first run that counts.
    pub fn merged(runs: &[Run]) -> Run {
        let compared = |run: &&Run| run.breaks.is_none();
        let mut counted: Vec<&Run> = runs.iter().filter(compared).collect();
        if counted.is_empty() {
            counted = runs.iter().collect();
        }
        let Some((first, others)) = counted.split_first() else {
            return Run::default();
        };
        let mut merged = Run { points: Vec::new(), ..(*first).clone() };
        merged.complete = counted.iter().all(|run| run.complete);
        for note in others.iter().flat_map(|run| &run.notes) {
            if !merged.notes.contains(note) {
                merged.notes.push(note.clone());
            }
        }
        for point in counted.iter().flat_map(|run| &run.points) {
            let same = |other: &&mut Point| (other.m, other.matrix()) == (point.m, point.matrix());
            match merged.points.iter_mut().find(same) {
                Some(other) if other.columns() <= point.columns() => *other = point.clone(),
                Some(_) => {}
                None => merged.points.push(point.clone()),
            }
        }
        // Sort by matrix, in the order of first occurrence, then by M.
        let order = merged.matrices();
        merged.points.sort_by_key(|point| (order.iter().position(|&other| other == point.matrix()), point.m));
        merged
    }

    /// The distinct matrices, in the order of their first occurrence.
    pub fn matrices(&self) -> Vec<Matrix> {
        distinct(self.points.iter().map(Point::matrix))
    }

    /// The points with wrong results.
    pub fn mismatches(&self) -> impl Iterator<Item = &Point> {
        self.points.iter().filter(|point| point.mismatch.is_some())
    }
}

/// Writes a value as JSON and replaces the file in one step.
pub fn write_json(path: &Path, value: &impl Serialize) -> anyhow::Result<()> {
    write_file(path, &serde_json::to_vec_pretty(value)?)
}

/// Reads a value that [`write_json`] wrote; errors call it `what`.
///
/// # Errors
/// If the file can't be read or does not hold such a value.
pub(super) fn read_json<T: DeserializeOwned>(path: &Path, what: &str) -> anyhow::Result<T> {
    read_file(path, |json, name| parse_json(json, name, what))
}

/// Reads a file and parses its contents, which are passed with the file's name.
pub(super) fn read_file<T>(
    path: &Path,
    parse: impl FnOnce(&[u8], &str) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let name = path.display().to_string();
    let contents = std::fs::read(path).with_context(|| format!("cannot read {name}"))?;
    parse(&contents, &name)
}

/// Parses a value that [`write_json`] wrote; errors call it `what` in `name`.
pub(super) fn parse_json<T: DeserializeOwned>(json: &[u8], name: &str, what: &str) -> anyhow::Result<T> {
    serde_json::from_slice(json).with_context(|| format!("{name} does not hold a recorded {what}"))
}

/// Replaces the file at `path` in one step and creates its directory if it is missing.
///
/// # Errors
/// If the directory or the file can't be written.
pub fn write_file(path: &Path, contents: &[u8]) -> anyhow::Result<()> {
    if let Some(directory) = path.parent() {
        let context = || format!("cannot create the folder {}", directory.display());
        std::fs::create_dir_all(directory).with_context(context)?;
    }
    NewFile::with_contents(path, contents).map_err(|error| anyhow::anyhow!("cannot write {error}"))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A point whose baselines take 3, 2 and 4 times as long as our kernel.
    pub(crate) fn point(m: usize, n: usize, k: usize, us: f64) -> Point {
        let timing = |us: f64| Timing::new(vec![us * 0.99, us, us * 1.02], 20).unwrap();
        Point {
            m,
            n,
            k,
            group: Group::default(),
            plan: "tile".into(),
            ours: timing(us),
            stream: Some(timing(us * 0.8)),
            mma: Some(timing(us * 0.5)),
            int8: Some(timing(us * 3.0)),
            fp8: Some(timing(us * 2.0)),
            bf16: Some(timing(us * 4.0)),
            tokens_checked: 4,
            mismatch: None,
        }
    }

    #[test]
    fn figures_follow_from_times() {
        let point = point(4096, 4096, 4096, 100.0);
        assert_eq!(point.weight_bytes(), 4096 * 4096 * 17 / 32);
        assert!((point.ideal() - 69.448).abs() < 0.01, "{}", point.ideal());
        assert!((point.over_ideal() - 1.43993).abs() < 1e-3);
        assert!((point.tops() - 1374.39).abs() < 0.1);
        assert!((point.score().unwrap() - 0.8).abs() < 1e-12);
        assert_eq!(point.speedup(Baseline::Fp8), Some(2.0));
        // With one token, the bytes decide.
        assert!((super::tests::point(1, 4096, 4096, 10.0).ideal() - 2.879).abs() < 1e-3);
    }

    #[test]
    fn a_saved_run_is_loaded_unchanged() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("made/for/it/run.json");
        let circumstances = Circumstances { device: "GPU".into(), ..Circumstances::default() };
        let mut run = Run { circumstances, notes: vec!["a".into()], ..Run::default() };
        run.points.push(point(1, 64, 128, 3.25));
        run.points.push(Point { fp8: None, mismatch: Some("m".into()), ..point(2, 128, 64, 1.0 / 3.0) });
        run.save(&path).unwrap();
        run.complete = true;
        run.save(&path).unwrap();
        assert_eq!(Run::load(&path).unwrap(), run);
        assert_eq!(run.matrices(), [Matrix { n: 64, k: 128 }, Matrix { n: 128, k: 64 }]);
        assert_eq!(run.mismatches().count(), 1);
        std::fs::write(&path, "{}").unwrap();
        assert!(Run::load(&path).is_err());
    }

    #[test]
    fn runs_recorded_without_pace_probes_or_breaks_can_be_loaded() {
        let mut run =
            serde_json::to_value(Run { points: vec![point(1, 64, 128, 3.25)], ..Run::default() }).unwrap();
        run.as_object_mut().unwrap().remove("pace").unwrap();
        assert!(run.get("breaks").is_none());
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("run.json");
        write_json(&path, &run).unwrap();
        let loaded = Run::load(&path).unwrap();
        assert_eq!((loaded.pace, loaded.breaks), (Pace::THOROUGH, None));
        for column in ["stream", "mma"] {
            run["points"][0].as_object_mut().unwrap().remove(column).unwrap();
        }
        write_json(&path, &run).unwrap();
        assert_eq!(Run::load(&path).unwrap().points[0].score(), None);
    }

    #[test]
    fn times_and_dimensions_of_zero_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("run.json");
        let wrong: [fn(&mut Point); 4] = [
            |point| point.ours.us = 0.0,
            |point| point.fp8.as_mut().unwrap().us = 0.0,
            |point| point.mma.as_mut().unwrap().us = 0.0,
            |point| point.m = 0,
        ];
        for spoil in wrong {
            let mut point = point(1, 64, 128, 3.25);
            spoil(&mut point);
            Run { points: vec![point], ..Run::default() }.save(&path).unwrap();
            let error = Run::load(&path).unwrap_err().to_string();
            assert!(error.ends_with("run.json has a dimension of 0 or an impossible time"), "{error}");
        }
    }

    #[test]
    fn merged_runs_have_every_point_once_and_the_one_with_most_columns() {
        let run = |points| Run { points, complete: true, ..Run::default() };
        let bare = Point { fp8: None, ..point(8, 64, 64, 9.0) };
        let runs = [
            run(vec![point(8, 64, 64, 1.0), point(16, 64, 64, 2.0), point(1, 64, 128, 3.0)]),
            Run { complete: false, ..run(vec![bare, point(4, 64, 64, 4.0), point(16, 64, 64, 5.0)]) },
            Run { breaks: Some(Vec::new()), ..run(vec![point(24, 64, 64, 6.0)]) },
        ];
        let merged = Run::merged(&runs);
        let times: Vec<(usize, f64)> = merged.points.iter().map(|point| (point.m, point.ours.us)).collect();
        assert_eq!(times, [(4, 4.0), (8, 1.0), (16, 5.0), (1, 3.0)]);
        assert!(!merged.complete);
        assert_eq!(Run::merged(&runs[2..]).points, runs[2].points);
        assert!(Run::merged(&[]).points.is_empty());
    }
}
