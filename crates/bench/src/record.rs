//! What a run leaves behind: one record a point, the circumstances, and the figures that follow from them. It is
//! written as JSON after every point, so an interrupted run keeps what it has measured.

use std::io::Write;
use std::path::Path;

use anyhow::{Context, ensure};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::circumstances::Circumstances;
use super::monotone::Break;
use super::replay::Pace;
use super::shapes::{Matrix, distinct};
use super::statistics::Timing;
use crate::Group;
use crate::packed::PackedSizes;

/// HBM bandwidth that the ideal floor assumes, in bytes a second: what the `stream` probe reaches on large reads.
const IDEAL_BYTES_PER_SECOND: f64 = 3.10e12;
/// int8 operations a second of the H100's data sheet, at its boost clock.
const IDEAL_OPERATIONS_PER_SECOND: f64 = 1979e12;

/// A kernel of cuBLASLt, measured in the same run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Baseline {
    /// cuBLASLt int8 × int8 → int32, without scales.
    Int8,
    /// cuBLASLt e4m3 × e4m3 → bf16 with one scale a tensor.
    Fp8,
    /// cuBLASLt bf16.
    Bf16,
}

impl Baseline {
    /// All of them, in the order of the columns.
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

/// One problem, measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// Tokens.
    pub m: usize,
    /// Output channels.
    pub n: usize,
    /// Elements a channel.
    pub k: usize,
    /// How many of our weights share a pair.
    #[serde(default, with = "group_text")]
    pub group: Group,
    /// How our kernel was launched.
    pub plan: String,
    /// Our kernel, bf16 output.
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
    /// Tokens whose outputs were compared with the CPU backend, every channel of them.
    pub tokens_checked: usize,
    /// The first difference, if there is one.
    pub mismatch: Option<String>,
}

impl Point {
    /// How many kernels were measured beside ours.
    fn columns(&self) -> usize {
        [&self.stream, &self.mma, &self.int8, &self.fp8, &self.bf16].into_iter().flatten().count()
    }

    /// The weights.
    pub fn matrix(&self) -> Matrix {
        Matrix { n: self.n, k: self.k }
    }

    /// Bytes of the packed weights' codes and pairs.
    pub fn weight_bytes(&self) -> usize {
        weight_bytes(self.n, self.k, self.group)
    }

    /// Bytes of packed weights, int8 activations and bf16 output.
    pub fn bytes(&self) -> usize {
        moved_bytes(self.m, self.n, self.k, self.group)
    }

    /// Multiplications and additions.
    pub fn operations(&self) -> f64 {
        2.0 * self.m as f64 * self.n as f64 * self.k as f64
    }

    /// The speed of light of this run: the slower probe, in microseconds. `None` without probes.
    pub fn floor(&self) -> Option<f64> {
        Some(self.stream?.us.max(self.mma?.us))
    }

    /// Floor over time: 1 is the limit. `None` without probes.
    pub fn score(&self) -> Option<f64> {
        Some(self.floor()? / self.ours.us)
    }

    /// The data sheet's floor in microseconds; no launch cost in it.
    pub fn ideal(&self) -> f64 {
        1e6 * (self.bytes() as f64 / IDEAL_BYTES_PER_SECOND)
            .max(self.operations() / IDEAL_OPERATIONS_PER_SECOND)
    }

    /// Time over the ideal floor.
    pub fn over_ideal(&self) -> f64 {
        self.ours.us / self.ideal()
    }

    /// Tera-operations a second.
    pub fn tops(&self) -> f64 {
        self.operations() / self.ours.us / 1e6
    }

    /// Packed weights read, in GB/s.
    pub fn weight_gigabytes_per_second(&self) -> f64 {
        self.weight_bytes() as f64 / self.ours.us / 1e3
    }

    /// A baseline's time.
    pub fn baseline(&self, baseline: Baseline) -> Option<&Timing> {
        match baseline {
            Baseline::Int8 => self.int8.as_ref(),
            Baseline::Fp8 => self.fp8.as_ref(),
            Baseline::Bf16 => self.bf16.as_ref(),
        }
    }

    /// A baseline's time over ours: above 1 we are faster.
    pub fn speedup(&self, baseline: Baseline) -> Option<f64> {
        Some(self.baseline(baseline)?.us / self.ours.us)
    }
}

/// Bytes of packed weights: their codes and pairs.
pub(super) fn weight_bytes(n: usize, k: usize, group: Group) -> usize {
    PackedSizes::new(n, k, group).map_or(usize::MAX, |sizes| sizes.codes + sizes.pairs)
}

/// Bytes that a GEMM can't avoid to move: packed weights, int8 activations, bf16 output.
pub(super) fn moved_bytes(m: usize, n: usize, k: usize, group: Group) -> usize {
    weight_bytes(n, k, group).saturating_add(m.saturating_mul(k.saturating_add(n.saturating_mul(2))))
}

/// A group as its text.
mod group_text {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    use crate::Group;

    pub(super) fn serialize<S: Serializer>(group: &Group, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(group)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Group, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

/// A whole run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// On which GPU, when and with what.
    #[serde(flatten)]
    pub circumstances: Circumstances,
    /// Which cuBLASLt ran, and how it was asked.
    pub cublaslt: String,
    /// How much was measured.
    #[serde(default)]
    pub pace: Pace,
    /// Where fewer tokens take longer than more, if the run was to find out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub breaks: Option<Vec<Break>>,
    /// Why a column is empty, and other remarks.
    pub notes: Vec<String>,
    /// False while points are still missing.
    pub complete: bool,
    /// In the order of measuring.
    pub points: Vec<Point>,
}

impl Run {
    /// Writes the run to `path`: first beside it, then in its place, so that a reader never sees half a file.
    ///
    /// # Errors
    /// If the file can't be written.
    pub fn save(&self, path: &Path) -> anyhow::Result<()> {
        write_json(path, self)
    }

    /// Reads a run back.
    ///
    /// # Errors
    /// If the file can't be read or holds something else, or a dimension or a time is impossible.
    pub fn load(path: &Path) -> anyhow::Result<Self> {
        let run: Self = read_json(path, "run of the bench")?;
        let plausible = run.points.iter().all(|point| {
            let probes = [Some(&point.ours), point.stream.as_ref(), point.mma.as_ref()];
            let baselines = Baseline::ALL.map(|baseline| point.baseline(baseline));
            point.m.min(point.n).min(point.k) > 0
                && probes.into_iter().chain(baselines).flatten().all(Timing::is_plausible)
        }) && run.breaks.iter().flatten().all(|one| one.us > 0.0 && one.larger_us > 0.0);
        ensure!(plausible, "{} has a dimension of 0 or an impossible time", path.display());
        Ok(run)
    }

    /// One run with the points of all, each once: of several at the same place the one with the most columns, and of those
    /// the last. Runs that measured our kernel alone, for [`breaks`](Self::breaks), count only if there are no others. The
    /// circumstances are those of the first run that counts.
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
        // By matrix, each where it first occurs, and then by M.
        let order = merged.matrices();
        merged.points.sort_by_key(|point| (order.iter().position(|&other| other == point.matrix()), point.m));
        merged
    }

    /// The matrices, in the order in which they first occur.
    pub fn matrices(&self) -> Vec<Matrix> {
        distinct(self.points.iter().map(Point::matrix))
    }

    /// Every point whose result was wrong.
    pub fn mismatches(&self) -> impl Iterator<Item = &Point> {
        self.points.iter().filter(|point| point.mismatch.is_some())
    }
}

/// Writes anything as JSON, as [`Run::save`] does.
///
/// # Errors
/// If the file can't be written.
pub fn write_json(path: &Path, value: &impl Serialize) -> anyhow::Result<()> {
    write_atomically(path, &serde_json::to_vec_pretty(value)?)
}

/// Reads back what [`write_json`] wrote; an error calls it `what`.
///
/// # Errors
/// If the file can't be read or holds something else.
pub(super) fn read_json<T: DeserializeOwned>(path: &Path, what: &str) -> anyhow::Result<T> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_slice(&bytes).with_context(|| format!("{} holds no {what}", path.display()))
}

/// Replaces the file at `path` in one step. Its directory is made if it is missing.
pub(super) fn write_atomically(path: &Path, contents: &[u8]) -> anyhow::Result<()> {
    let write = || -> anyhow::Result<()> {
        let directory = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        std::fs::create_dir_all(directory)?;
        let mut builder = tempfile::Builder::new();
        #[cfg(unix)]
        builder.permissions(permissions());
        let mut file = builder.tempfile_in(directory)?;
        file.write_all(contents)?;
        file.persist(path)?;
        Ok(())
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

/// Those of any new file: a temporary one would be the owner's alone.
#[cfg(unix)]
fn permissions() -> std::fs::Permissions {
    std::os::unix::fs::PermissionsExt::from_mode(0o666)
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
        // One token: bytes decide.
        assert!((super::tests::point(1, 4096, 4096, 10.0).ideal() - 2.879).abs() < 1e-3);
    }

    #[test]
    fn run_survives_the_trip_through_a_file() {
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
    fn runs_without_pace_probes_or_breaks_are_read_as_they_were_written_then() {
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
