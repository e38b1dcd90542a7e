//! The grouped GEMM on the layers of mixtures of experts, beside recorded times of other projects,
//! and beside torch's fp8 grouped GEMM in the same run where torch is installed.
//!
//! | file | purpose |
//! |---|---|
//! | `recorded` | the layers and the recorded times |
//! | `text`, `page` | the results as text and as a page |
//!
//! Times differ between machines, so a ratio to a recorded time is only meaningful on the same kind of machine.
//! Where torch is measured, the other kernels are compared through it ([`Point::others`]).
//! Each point routes its tokens at random, so that as many experts get rows as on the recorded page.
//! Launches rotate through several routings, so that few experts do not stay in the L2 cache.

mod page;
mod recorded;
mod text;

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, ensure};
use cust::memory::DeviceBuffer;
use cust::stream::{Stream, StreamFlags};
use cust::sys;
use half::bf16;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::circumstances::Circumstances;
use super::data::{self, Pool};
use super::driver::During;
use super::record::{Baseline, parse_json, read_file, write_json};
use super::replay::{Clock, Contender, Pace};
use super::statistics::Timing;
use super::torch::{self, Outcome, Progress, Torch};
use liquidgemm::gpu::{DeviceExperts, DeviceRowIndex, DeviceSpan, Gpu, GroupedOperands};
use liquidgemm::{
    ActivationsView, Error, GROUPED_SHAPES, Group, GroupedPlan, GroupedProblem, OutputType, PackedWeights,
    cpu,
};

pub use page::write as write_page;
pub use recorded::{Page, PagePoint, page, points};
pub use text::{heading, row, summary};

use recorded::TORCH_FP8;

/// A run over layers and numbers of tokens.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Mixtures {
    /// GPU, driver, date and command.
    #[serde(flatten)]
    pub circumstances: Circumstances,
    /// False while points are still missing.
    pub complete: bool,
    /// The torch that was measured in this run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub torch: Option<Torch>,
    /// The results, in the order of measurement.
    pub points: Vec<Point>,
}

/// The result of one point.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// The layer, the tokens, and the recorded times.
    pub page: PagePoint,
    /// How many weights share a pair.
    pub group: String,
    /// The plan of our launch.
    pub plan: String,
    /// Our time.
    pub ours: Timing,
    /// The ideal floor, in microseconds.
    pub ideal_us: f64,
    /// Torch's fp8 grouped GEMM in this run. `None` if torch was not measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub torch_fp8: Option<Outcome>,
    /// What differs from the CPU backend's result, if anything does.
    pub mismatch: Option<String>,
}

/// Which plans to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plans {
    /// The library's choice.
    Chosen,
    /// Every tile shape, with clusters of one and of two thread blocks.
    Every,
}

impl Plans {
    fn of(self, gpu: &Gpu, problem: GroupedProblem) -> Result<Vec<GroupedPlan>, Error> {
        match self {
            Self::Chosen => Ok(vec![gpu.grouped_plan(problem, problem.rows)?]),
            Self::Every => [1, 2]
                .into_iter()
                .flat_map(|cluster_size| GROUPED_SHAPES.map(|shape| (shape, cluster_size)))
                .map(|(shape, cluster_size)| {
                    let clusters = gpu.multiprocessors() / cluster_size;
                    GroupedPlan::with_config(problem, shape, cluster_size, clusters)
                })
                .collect(),
        }
    }
}

/// Measures torch's fp8 grouped GEMM on points of the page, with the routings that [`run`] uses for weights of this group.
/// It belongs before `run`, which allocates most of its memory itself.
///
/// # Errors
/// If torch can't be measured. The failure of a single measurement is its outcome.
pub fn measure_torch(
    gpu: &Gpu,
    python: &Path,
    points: &[&PagePoint],
    group: Group,
    pace: Pace,
    watch: &mut dyn FnMut(Progress<'_>),
) -> anyhow::Result<torch::Results> {
    let job = |point: &&PagePoint| {
        let PagePoint { layer, experts, n, k, tokens, rows, .. } = point;
        json!({
            "name": format!("{layer}, {tokens} tokens"),
            "experts": experts, "n": n, "k": k, "rows": rows,
            "routings": point.routings(group),
        })
    };
    torch::measure(gpu, python, torch::MOE, pace, points.iter().map(job).collect(), watch)
}

/// Measures points of the page, each with the given plans.
///
/// `torch` has the outcomes of [`measure_torch`] for the same points.
/// After each point `measured` receives the run and the number of new results, which are the run's last ones.
///
/// # Errors
/// If the GPU or our kernel fails, or `measured` returns an error.
pub fn run(
    gpu: &Gpu,
    points: &[&PagePoint],
    group: Group,
    pace: Pace,
    plans: Plans,
    torch: Option<&torch::Results>,
    mut measured: impl FnMut(&Mixtures, usize) -> anyhow::Result<()>,
) -> anyhow::Result<Mixtures> {
    let missing = torch.is_some_and(|torch| torch.outcomes.len() != points.len());
    ensure!(!missing, "torch was measured on other points");
    gpu.make_current()?;
    gpu.prepare_grouped()?;
    let pool = Pool::new(Baseline::Int8);
    let layers: BTreeSet<&str> = points.iter().map(|point| point.layer.as_str()).collect();
    let mut run = Mixtures {
        circumstances: Circumstances::of(gpu),
        torch: torch.map(|torch| torch.torch.clone()),
        ..Mixtures::default()
    };
    for layer in layers {
        let of_layer: Vec<(usize, &PagePoint)> =
            points.iter().copied().enumerate().filter(|(_, point)| point.layer == layer).collect();
        let Some((_, first)) = of_layer.first() else { continue };
        let weights = data::random_weights(first.n, first.k, group)?;
        let experts = gpu.upload_experts(&vec![&weights; first.experts])?;
        for (index, point) in of_layer {
            let mut of_point = measure(gpu, &experts, &weights, point, (pace, plans), &pool)
                .with_context(|| format!("measuring {layer} with {} tokens", point.tokens))?;
            let torch_fp8 = torch.map(|torch| torch.outcomes[index].clone());
            of_point.iter_mut().for_each(|point| point.torch_fp8.clone_from(&torch_fp8));
            let new = of_point.len();
            run.points.extend(of_point);
            measured(&run, new)?;
        }
    }
    run.complete = true;
    Ok(run)
}

fn measure(
    gpu: &Gpu,
    experts: &DeviceExperts,
    weights: &PackedWeights,
    point: &PagePoint,
    (pace, plans): (Pace, Plans),
    pool: &Pool,
) -> anyhow::Result<Vec<Point>> {
    let PagePoint { rows, n, k, .. } = *point;
    let offsets = point.routings(weights.group());
    let device_offsets: Vec<DeviceBuffer<i32>> =
        offsets.iter().map(|offsets| DeviceBuffer::from_slice(offsets)).collect::<Result<_, _>>()?;
    // SAFETY: the pool fills the activations, and the kernel writes the output before it is read.
    let (activations, output) = unsafe {
        (DeviceBuffer::<u8>::uninitialized(rows * k)?, DeviceBuffer::<u16>::uninitialized(rows * n)?)
    };
    pool.fill(&activations, 0)?;
    let scales = data::random_scales(rows);
    let device_scales = DeviceBuffer::from_slice(&scales)?;
    let stream = Stream::new(StreamFlags::NON_BLOCKING, None)?;
    // SAFETY: null is the default stream, on which the copies above ran.
    unsafe { sys::cuStreamSynchronize(std::ptr::null_mut()) }.during("waiting for copies")?;
    let operands = |routing: usize| GroupedOperands {
        rows,
        index: DeviceRowIndex::Offsets((&device_offsets[routing]).into()),
        expected_rows: None,
        activations: (&activations).into(),
        activation_stride: k,
        token_scales: (&device_scales).into(),
        bias: None,
        output: (&output).into(),
        output_stride: n,
        output_type: OutputType::Bf16,
        status: None,
    };
    let launch = |plan: &GroupedPlan, routing: usize| -> anyhow::Result<()> {
        // SAFETY: everything stays alive until the stream has been synchronized.
        Ok(unsafe { gpu.grouped_gemm_with_plan(experts, &operands(routing), plan, &stream) }?)
    };
    let plans = plans.of(gpu, operands(0).problem(experts)?)?;
    let contender = |plan| Contender {
        copies: offsets.len(),
        launch: Box::new(move |routing| launch(plan, routing)) as Box<dyn Fn(usize) -> _>,
    };
    let timings = Clock::new(&stream, pace)?.measure(&plans.iter().map(contender).collect::<Vec<_>>());
    let mut points = Vec::new();
    for (plan, ours) in plans.iter().zip(timings) {
        // Launch the first routing once more, into an output that holds no result.
        let span = DeviceSpan::from(&output);
        // SAFETY: the output has this many bytes, and null is the default stream.
        unsafe {
            sys::cuMemsetD8_v2(span.address(), 0xA5, span.bytes()).during("clearing the output")?;
            sys::cuStreamSynchronize(std::ptr::null_mut()).during("waiting for the output")?;
        }
        launch(plan, 0)?;
        stream.synchronize()?;
        let mut mismatch = None;
        for row in [0, rows / 2, rows - 1] {
            let mut codes = vec![0i8; k];
            copy(&mut codes, (&activations).into(), row * k)?;
            let mut found = vec![bf16::ZERO; n];
            copy(&mut found, (&output).into(), row * n * 2)?;
            let view = ActivationsView::new(&codes, k, &scales[row..=row], 1, k)?;
            let mut expected = vec![bf16::ZERO; n];
            cpu::gemm(weights, view, None, &mut expected)?;
            let bits = |values: &[bf16]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
            if bits(&found) != bits(&expected) {
                mismatch = Some(format!("row {row} differs from the CPU backend's"));
            }
        }
        points.push(Point {
            page: point.clone(),
            group: weights.group().to_string(),
            plan: plan.to_string(),
            ours: ours?,
            ideal_us: point.ideal_us(weights.group()),
            torch_fp8: None,
            mismatch,
        });
    }
    Ok(points)
}

/// Copies device memory from `offset` bytes on to the host.
fn copy<T: bytemuck::Pod>(to: &mut [T], from: DeviceSpan, offset: usize) -> anyhow::Result<()> {
    let bytes: &mut [u8] = bytemuck::cast_slice_mut(to);
    anyhow::ensure!(offset + bytes.len() <= from.bytes(), "a copy past the end of device memory");
    // SAFETY: the source has been checked, and the destination has this many bytes.
    unsafe { sys::cuMemcpyDtoH_v2(bytes.as_mut_ptr().cast(), from.address() + offset as u64, bytes.len()) }
        .during("copying results")
}

impl Point {
    /// Returns the ideal floor divided by our time.
    pub(super) fn score(&self) -> f64 {
        self.ideal_us / self.ours.us
    }

    /// Returns the times of the page's other kernels in microseconds, in the order of its columns.
    ///
    /// Where torch was not measured, these are the recorded times.
    /// Where it was, torch fp8 is its time in this run, and the others are compared through it:
    /// their recorded times are multiplied by torch fp8's time in this run over its recorded time.
    /// If that measurement failed, there are no times.
    pub fn others(&self) -> Vec<Option<f64>> {
        let factor = match &self.torch_fp8 {
            None => Some(1.0),
            Some(outcome) => {
                outcome.timing.zip(self.page.recorded(TORCH_FP8)).map(|(here, then)| here.us / then)
            }
        };
        self.page.us.iter().map(|us| Some(us * factor?)).collect()
    }
}

/// Returns the points, of several plans of a point the fastest.
pub(super) fn fastest(results: &[Point]) -> Vec<&Point> {
    let mut points: Vec<&Point> = Vec::new();
    for result in results {
        let is_same = |point: &&mut &Point| {
            (&point.page.layer, point.page.tokens) == (&result.page.layer, result.page.tokens)
        };
        match points.iter_mut().find(is_same) {
            Some(point) if result.ours.us < point.ours.us => *point = result,
            Some(_) => {}
            None => points.push(result),
        }
    }
    points
}

impl Mixtures {
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
    /// If the file can't be read or is not such a run, or if a time is impossible.
    pub fn load(path: &Path) -> anyhow::Result<Self> {
        read_file(path, Self::from_json)
    }

    /// Reads a run from JSON; errors call it `name`.
    ///
    /// # Errors
    /// If it is not such a run, or if a time is impossible.
    pub fn from_json(json: &[u8], name: &str) -> anyhow::Result<Self> {
        let run: Self = parse_json(json, name, "run of mixtures of experts")?;
        let columns = page().columns.len();
        let plausible = run.points.iter().all(|point| {
            let torch = point.torch_fp8.as_ref();
            let others = point.page.us.len() == columns && point.page.us.iter().all(|&us| us > 0.0);
            point.ours.is_plausible()
                && point.ideal_us > 0.0
                && others
                && torch.is_none_or(Outcome::is_plausible)
        });
        ensure!(plausible, "{name} has an impossible time");
        Ok(run)
    }

    /// Returns the number of wrong results.
    pub fn mismatches(&self) -> usize {
        self.points.iter().filter(|point| point.mismatch.is_some()).count()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::torch::tests::results;

    /// A point of the page with `tokens` tokens, that takes `us` microseconds at a floor of 5.
    pub(crate) fn point(page: &PagePoint, us: f64) -> Point {
        Point {
            page: page.clone(),
            group: "64".into(),
            plan: "tiles".into(),
            ours: Timing::new(vec![0.99 * us, us, 1.01 * us], 20).unwrap(),
            ideal_us: 5.0,
            torch_fp8: None,
            mismatch: None,
        }
    }

    #[test]
    fn a_saved_run_is_loaded_unchanged_and_impossible_times_are_refused() {
        let torch = results(&[Ok(20.0), Err("out of memory")]);
        let pages = points(Some(&[1]));
        let measured = |(page, outcome): (&&PagePoint, &Outcome)| Point {
            torch_fp8: Some(outcome.clone()),
            ..point(page, 10.0)
        };
        let with_torch = Mixtures {
            points: pages.iter().zip(&torch.outcomes).map(measured).collect(),
            torch: Some(torch.torch),
            complete: true,
            ..Mixtures::default()
        };
        let without = Mixtures { points: vec![point(pages[0], 10.0)], complete: true, ..Mixtures::default() };
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("run.json");
        for mut run in [with_torch, without] {
            run.save(&path).unwrap();
            assert_eq!(Mixtures::load(&path).unwrap(), run);
            run.points[0].ours.us = 0.0;
            run.save(&path).unwrap();
            assert!(Mixtures::load(&path).unwrap_err().to_string().contains("an impossible time"));
        }
    }

    #[test]
    fn other_kernels_are_compared_through_torch_where_it_was_measured() {
        let recorded = points(Some(&[1]))[0];
        let then = recorded.recorded(TORCH_FP8).unwrap();
        let mut point = point(recorded, 10.0);
        let all = |factor: f64| recorded.us.iter().map(|us| Some(us * factor)).collect::<Vec<_>>();
        assert_eq!(point.others(), all(1.0));
        let [slower, failed] = &results(&[Ok(2.0 * then), Err("failed")]).outcomes[..] else { panic!() };
        point.torch_fp8 = Some(slower.clone());
        assert_eq!(point.others(), all(2.0));
        point.torch_fp8 = Some(failed.clone());
        assert_eq!(point.others(), vec![None; recorded.us.len()]);
    }
}
