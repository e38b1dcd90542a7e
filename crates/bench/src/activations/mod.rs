//! Measures the quantization of activations against the `stream` probe for the bytes that it moves,
//! and beside what `torch.compile` makes of the same operations, where torch is installed.
//! Every result is compared with the CPU backend's. The page about a run is in `page`.

mod page;

use std::fmt;
use std::path::Path;

use anyhow::{Context, ensure};
use cust::memory::DeviceBuffer;
use cust::stream::{Stream, StreamFlags};
use half::bf16;
use liquidgemm::cpu::{QuantizeInput, Residual};
use liquidgemm::gpu::{DeviceSpan, Gpu, LinearInput, QuantizeOperands};
use liquidgemm::{Gate, GateOrder, HalfType, Operation, cpu};
use liquidgemm_format::probe::STREAM_PIECE_BYTES;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::arena::{copies, download, uninitialized};
use super::circumstances::Circumstances;
use super::data::Pool;
use super::probes::Probes;
use super::record::{Baseline, read_json, write_json};
use super::replay::{Clock, Contender, Pace};
use super::statistics::Timing;
use super::torch::{self, Outcome, Progress, Torch};

pub use page::write as write_page;

/// Rows that are compared with the CPU backend's, spread over all rows of a problem.
const CHECKED_ROWS: usize = 16;
/// The epsilon of the norms.
const EPSILON: f32 = 1e-5;

/// An operation before quantization, on bf16.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Measured {
    /// Quantization only.
    Plain,
    /// RMSNorm.
    RmsNorm,
    /// RMSNorm of the sum with a residual, which is written back.
    ResidualRmsNorm,
    /// SiLU of the gates times the ups, in halves of a row of 2k.
    SiluMul,
}

impl Measured {
    /// All operations, in the order of the tables.
    pub const ALL: [Measured; 4] =
        [Measured::Plain, Measured::RmsNorm, Measured::ResidualRmsNorm, Measured::SiluMul];

    /// Returns the bytes that are read and written for each element of the result.
    fn bytes_per_element(self) -> usize {
        match self {
            Measured::Plain | Measured::RmsNorm => 2 + 1,
            Measured::ResidualRmsNorm => 2 + 2 + 2 + 1,
            Measured::SiluMul => 4 + 1,
        }
    }

    fn operation<V>(self, weight: V) -> Operation<V> {
        match self {
            Measured::Plain => Operation::Plain,
            Measured::RmsNorm | Measured::ResidualRmsNorm => Operation::RmsNorm { weight, epsilon: EPSILON },
            Measured::SiluMul => Operation::Gated { gate: Gate::Silu, order: GateOrder::Halves },
        }
    }

    /// Returns the elements of a row of the input.
    fn row(self, k: usize) -> usize {
        if self == Measured::SiluMul { 2 * k } else { k }
    }
}

impl fmt::Display for Measured {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Measured::Plain => "quantize",
            Measured::RmsNorm => "RMSNorm",
            Measured::ResidualRmsNorm => "residual + RMSNorm",
            Measured::SiluMul => "SiLU · mul",
        })
    }
}

/// The time of one operation at one size.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// The operation.
    pub measured: Measured,
    /// Rows.
    pub m: usize,
    /// Elements of a row of the result.
    pub k: usize,
    /// Our kernel.
    pub ours: Timing,
    /// The probe that only reads as many bytes as the operation reads and writes.
    pub stream: Timing,
    /// What `torch.compile` makes of the operation, in this run. `None` if it was not measured at this size.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub torch: Option<Outcome>,
    /// The first difference from the CPU backend's result, if there is one.
    pub mismatch: Option<String>,
}

impl Point {
    /// Returns the bytes that are read and written, each once.
    pub fn bytes(&self) -> usize {
        self.m * self.k * self.measured.bytes_per_element()
    }

    /// Returns the bytes moved in a second, in GB/s.
    pub fn gigabytes_per_second(&self) -> f64 {
        self.bytes() as f64 / self.ours.us / 1e3
    }

    /// Returns the probe's time divided by ours; 1 is the limit.
    pub fn score(&self) -> f64 {
        self.stream.us / self.ours.us
    }

    /// Returns torch's time in microseconds, if it was measured.
    pub fn torch_us(&self) -> Option<f64> {
        Some(self.torch.as_ref()?.timing?.us)
    }

    /// Formats the point as a line under [`heading`].
    pub fn row(&self) -> String {
        let wrong = self.mismatch.as_ref().map_or(String::new(), |what| format!("  WRONG: {what}"));
        let torch = match self.torch.as_ref().map(|torch| (torch.timing, &torch.error)) {
            None => String::new(),
            Some((Some(Timing { us, .. }), _)) => format!("  torch {us:.2}, × {:.2}", us / self.ours.us),
            Some((None, error)) => format!("  no torch: {}", error.as_deref().unwrap_or("failed")),
        };
        format!(
            "{:>18} {:>5} {:>6} {:>9.2} {:>7.0} {:>9.2} {:>6.2}{torch}{wrong}",
            self.measured,
            self.m,
            self.k,
            self.ours.us,
            self.gigabytes_per_second(),
            self.stream.us,
            self.score()
        )
    }
}

/// The column headings of [`Point::row`]. Times are in microseconds.
pub fn heading() -> String {
    format!(
        "{:>18} {:>5} {:>6} {:>9} {:>7} {:>9} {:>6}",
        "operation", "rows", "k", "ours", "GB/s", "stream", "score"
    )
}

/// A run over all operations and sizes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Activations {
    /// GPU, driver, date and command.
    #[serde(flatten)]
    pub circumstances: Circumstances,
    /// False while points are still missing.
    pub complete: bool,
    /// The torch that was measured in this run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub torch: Option<Torch>,
    /// The points, in the order of measurement.
    pub points: Vec<Point>,
}

impl Activations {
    /// Writes the run to `path` and replaces the file in one step.
    ///
    /// # Errors
    /// If the file can't be written.
    pub fn save(&self, path: &Path) -> anyhow::Result<()> {
        write_json(path, self)
    }

    /// Reads a run from a file.
    ///
    /// # Errors
    /// If the file can't be read or is not such a run, or if a dimension or a time is impossible.
    pub fn load(path: &Path) -> anyhow::Result<Self> {
        let run: Self = read_json(path, "run of activations")?;
        let plausible = run.points.iter().all(|point| {
            point.m.min(point.k) > 0
                && point.ours.is_plausible()
                && point.stream.is_plausible()
                && point.torch.as_ref().is_none_or(Outcome::is_plausible)
        });
        ensure!(plausible, "{} has a dimension of 0 or an impossible time", path.display());
        Ok(run)
    }

    /// Returns the number of wrong results.
    pub fn mismatches(&self) -> usize {
        self.points.iter().filter(|point| point.mismatch.is_some()).count()
    }
}

/// Numbers of rows at which torch is measured: each costs a compilation of more than a second.
const TORCH_ROWS: [usize; 5] = [1, 16, 256, 2048, 8192];

/// A run over all operations, each at some numbers of rows and lengths of rows.
#[derive(Clone, Copy, Debug)]
pub struct Options<'a> {
    /// Numbers of rows.
    pub rows: &'a [usize],
    /// Elements of a row of the result.
    pub lengths: &'a [usize],
    /// How long to measure.
    pub pace: Pace,
}

impl Options<'_> {
    /// Returns the operation, the rows and their length of every point, in the order of measurement.
    pub fn problems(&self) -> impl Iterator<Item = (Measured, usize, usize)> + '_ {
        Measured::ALL.into_iter().flat_map(move |operation| {
            self.lengths.iter().flat_map(move |&k| self.rows.iter().map(move |&m| (operation, m, k)))
        })
    }

    /// Returns the points at which torch is measured, in the order of measurement.
    /// The norm with a residual comes last, because torch's time may not suffice for all.
    fn torch_problems(&self) -> impl Iterator<Item = (Measured, usize, usize)> + '_ {
        let of = |last: bool| {
            self.problems().filter(move |(operation, m, _)| {
                TORCH_ROWS.contains(m) && (*operation == Measured::ResidualRmsNorm) == last
            })
        };
        of(false).chain(of(true))
    }
}

/// Measures what `torch.compile` makes of the operations, at some of the points of [`run`].
/// It belongs before `run`, which allocates most of its memory itself.
///
/// # Errors
/// If torch can't be measured. The failure of a single measurement is its outcome.
pub fn measure_torch(
    gpu: &Gpu,
    python: &Path,
    options: &Options<'_>,
    watch: &mut dyn FnMut(Progress<'_>),
) -> anyhow::Result<torch::Results> {
    let job = |(operation, m, k): (Measured, usize, usize)| {
        json!({
            "name": format!("{operation}, {m} × {k}"),
            "operation": operation, "rows": m, "k": k,
            "copies": copies(m * k * operation.bytes_per_element()),
        })
    };
    let jobs = options.torch_problems().map(job).collect();
    torch::measure(gpu, python, torch::ACTIVATIONS, options.pace, jobs, watch)
}

/// Returns the number of measurements of [`measure_torch`].
pub fn torch_jobs(options: &Options<'_>) -> usize {
    options.torch_problems().count()
}

/// Measures every operation for all numbers of rows and lengths of rows,
/// and passes the run to `measured` after each point.
///
/// `torch` has the outcomes of [`measure_torch`] for the same options.
///
/// # Errors
/// If the GPU or a kernel fails, or `measured` returns an error.
pub fn run(
    gpu: &Gpu,
    options: &Options<'_>,
    torch: Option<&torch::Results>,
    mut measured: impl FnMut(&Activations) -> anyhow::Result<()>,
) -> anyhow::Result<Activations> {
    let mut run = Activations {
        circumstances: Circumstances::of(gpu),
        torch: torch.map(|torch| torch.torch.clone()),
        ..Activations::default()
    };
    let missing = torch.is_some_and(|torch| torch.outcomes.len() != torch_jobs(options));
    ensure!(!missing, "torch was measured on other points");
    let outcome_of = |problem| {
        let index = options.torch_problems().position(|other| other == problem)?;
        Some(torch?.outcomes[index].clone())
    };
    gpu.make_current()?;
    let most = |of: &[usize]| of.iter().copied().max().unwrap_or(1);
    let stage = Stage::new(gpu, most(options.rows), most(options.lengths))?;
    for problem in options.problems() {
        let (operation, m, k) = problem;
        let point = stage.point(operation, m, k, options.pace);
        let point = point.with_context(|| format!("measuring {operation} of {m} × {k}"))?;
        run.points.push(Point { torch: outcome_of(problem), ..point });
        measured(&run)?;
    }
    run.complete = true;
    Ok(run)
}

/// Device memory for all points.
struct Stage<'g> {
    gpu: &'g Gpu,
    probes: Probes<'g>,
    stream: Stream,
    /// Random bf16, also the source of the probe.
    input: DeviceBuffer<u8>,
    residual: DeviceBuffer<u8>,
    weight: DeviceBuffer<u8>,
    codes: DeviceBuffer<u8>,
    scales: DeviceBuffer<u8>,
}

impl<'g> Stage<'g> {
    fn new(gpu: &'g Gpu, m: usize, k: usize) -> anyhow::Result<Self> {
        let pool = Pool::new(Baseline::Bf16);
        let random = |bytes: usize| {
            let memory = uninitialized(bytes)?;
            pool.fill(&memory, 0)?;
            anyhow::Ok(memory)
        };
        // Any number of copies takes less than one of the largest problem more than the rotation.
        let bytes = |element: usize| 2 * m * k * element + 2 * super::arena::ROTATION_BYTES;
        Ok(Self {
            gpu,
            probes: Probes::new(gpu),
            stream: Stream::new(StreamFlags::NON_BLOCKING, None)?,
            input: random(bytes(5))?,
            residual: random(bytes(2))?,
            weight: random(k * 2)?,
            codes: uninitialized(bytes(1))?,
            scales: uninitialized(m * 4)?,
        })
    }

    /// Returns the operands of a copy.
    fn operands(&self, measured: Measured, m: usize, k: usize, copy: usize) -> QuantizeOperands {
        let code_stride = k.next_multiple_of(16);
        let slice = |memory: &DeviceBuffer<u8>, bytes: usize| {
            let bytes = bytes.next_multiple_of(256);
            let address = DeviceSpan::from(memory).address() + (copy * bytes) as u64;
            // SAFETY: the stage's memory holds all copies.
            unsafe { DeviceSpan::from_raw(address, bytes) }
        };
        let residual = slice(&self.residual, m * k * 2);
        let input = slice(&self.input, m * measured.row(k) * 2);
        QuantizeOperands {
            source: LinearInput {
                operation: measured.operation((&self.weight).into()),
                input_stride: measured.row(k),
                residual: (measured == Measured::ResidualRmsNorm).then_some(residual),
                ..LinearInput::new(input, HalfType::Bf16, m, k)
            },
            k,
            smoothing: None,
            codes: slice(&self.codes, m * code_stride),
            code_stride,
            scales: (&self.scales).into(),
        }
    }

    fn point(&self, measured: Measured, m: usize, k: usize, pace: Pace) -> anyhow::Result<Point> {
        let mismatch = self.difference(measured, m, k)?;
        let bytes = m * k * measured.bytes_per_element();
        let pieces = bytes.next_multiple_of(STREAM_PIECE_BYTES as usize);
        let ours = Contender {
            copies: copies(bytes),
            launch: Box::new(move |copy| {
                let operands = self.operands(measured, m, k, copy);
                // SAFETY: all memory belongs to the stage, and all launches are on its stream.
                Ok(unsafe { self.gpu.quantize(&operands, &self.stream) }?)
            }),
        };
        let probe = Contender {
            copies: (self.input.len() / pieces).min(copies(pieces)).max(1),
            launch: Box::new(move |copy| {
                let address = DeviceSpan::from(&self.input).address() + (copy * pieces) as u64;
                // SAFETY: the input holds all copies.
                unsafe { self.probes.stream(DeviceSpan::from_raw(address, pieces), &self.stream) }
            }),
        };
        let mut timings = Clock::new(&self.stream, pace)?.measure(&[ours, probe]).into_iter();
        let mut next = || timings.next().context("not measured")?;
        Ok(Point { measured, m, k, ours: next()?, stream: next()?, torch: None, mismatch })
    }

    /// Runs an operation once and returns the first difference from the CPU backend in some of its rows.
    fn difference(&self, measured: Measured, m: usize, k: usize) -> anyhow::Result<Option<String>> {
        let row = measured.row(k);
        let rows: Vec<usize> =
            (0..m.min(CHECKED_ROWS)).map(|index| index * m / m.min(CHECKED_ROWS)).collect();
        let gathered = |memory: &DeviceBuffer<u8>, row: usize| -> anyhow::Result<Vec<bf16>> {
            let of_rows = rows.iter().map(|index| download(memory, index * row, row));
            Ok(of_rows.collect::<anyhow::Result<Vec<_>>>()?.concat())
        };
        let input = gathered(&self.input, row)?;
        let mut residual = gathered(&self.residual, k)?;
        let weight: Vec<bf16> = download(&self.weight, 0, k)?;
        let operands = self.operands(measured, m, k, 0);
        // SAFETY: all memory belongs to the stage.
        unsafe { self.gpu.quantize(&operands, &self.stream) }?;
        self.stream.synchronize()?;
        let has_residual = measured == Measured::ResidualRmsNorm;
        let expected = cpu::quantize(
            &QuantizeInput {
                operation: measured.operation(&weight[..]),
                input_stride: row,
                ..QuantizeInput::new(&input, rows.len(), k)
            },
            has_residual.then(|| Residual { data: &mut residual, stride: k }),
        )?;
        for (index, &row) in rows.iter().enumerate() {
            let codes: Vec<i8> = download(&self.codes, row * operands.code_stride, k)?;
            let scale: Vec<f32> = download(&self.scales, row, 1)?;
            if codes != expected.row(index) || scale[0] != expected.scales()[index] {
                return Ok(Some(format!("row {row}")));
            }
        }
        Ok((has_residual && gathered(&self.residual, k)? != residual).then(|| "the residual".into()))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::torch::tests::results;

    /// A point that takes `us` microseconds, with a probe of 5.
    pub(crate) fn point(measured: Measured, m: usize, us: f64) -> Point {
        let timing = |us| Timing::new(vec![us], 20).unwrap();
        Point { measured, m, k: 4096, ours: timing(us), stream: timing(5.0), torch: None, mismatch: None }
    }

    #[test]
    fn a_saved_run_is_loaded_unchanged_and_impossible_times_are_refused() {
        let torch = results(&[Ok(30.0), Err("failed")]);
        let mut points = vec![point(Measured::Plain, 1, 10.0); 3];
        points.iter_mut().zip(&torch.outcomes).for_each(|(point, torch)| point.torch = Some(torch.clone()));
        let mut run = Activations { points, torch: Some(torch.torch), ..Activations::default() };
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("run.json");
        run.save(&path).unwrap();
        assert_eq!(Activations::load(&path).unwrap(), run);
        assert!(run.points[0].row().contains("torch 30.00, × 3.00"), "{}", run.points[0].row());
        assert!(run.points[1].row().contains("no torch: failed"), "{}", run.points[1].row());
        // Neither a time nor a reason.
        run.points[1].torch = Some(Outcome { timing: None, error: None });
        run.save(&path).unwrap();
        assert!(Activations::load(&path).unwrap_err().to_string().contains("an impossible time"));
    }

    #[test]
    fn torch_is_measured_for_every_operation_and_length_at_some_numbers_of_rows() {
        let options = Options { rows: &[1, 4, 16, 2048], lengths: &[4096, 8192], pace: Pace::BRIEF };
        assert_eq!(options.problems().count(), 4 * 2 * 4);
        assert_eq!(torch_jobs(&options), 4 * 2 * 3);
        assert!(options.torch_problems().all(|problem| options.problems().any(|other| other == problem)));
    }
}
