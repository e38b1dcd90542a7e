//! The grouped GEMM on the layers of mixtures of experts, beside recorded times of other projects.
//!
//! The layers, the numbers of tokens and the other times are those of one page, `moe.json`.
//! Its `provenance` says where and how they were measured.
//! Times differ between machines, so a ratio to them is only meaningful on the same kind of machine.
//! Each point routes its tokens at random, so that as many experts get rows as on the page.
//! Launches rotate through several routings, so that few experts do not stay in the L2 cache.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::Path;
use std::sync::LazyLock;

use anyhow::{Context, ensure};
use cust::memory::DeviceBuffer;
use cust::stream::{Stream, StreamFlags};
use cust::sys;
use half::bf16;
use rand::SeedableRng;
use rand::seq::index;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::circumstances::Circumstances;
use super::data::{self, Pool};
use super::driver::During;
use super::markdown::facts;
use super::record::{Baseline, parse_json, weight_bytes, write_atomically, write_json};
use super::replay::{Clock, Contender, Pace};
use super::statistics::{Timing, geometric_mean};
use liquidgemm::gpu::{DeviceExperts, DeviceRowIndex, DeviceSpan, Gpu, GroupedOperands};
use liquidgemm::{
    ActivationsView, Error, GROUPED_SHAPES, Group, GroupedPlan, GroupedProblem, OutputType, PackedWeights,
    cpu,
};

/// Bytes of experts that a point's routings read together, if there are enough experts.
const ROTATED_BYTES: usize = 400_000_000;
/// The most routings of a point.
const MOST_ROUTINGS: usize = 16;
/// Bytes per second and operations per second of the ideal floor.
const IDEAL: (f64, f64) = (3.10e12, 1979e12);
/// The fewest rows of a point that counts in the mean score.
const SCORED_ROWS: usize = 64;

/// Recorded times of other projects' grouped GEMMs.
#[derive(Debug, Deserialize)]
pub struct Page {
    /// Device, driver, date, versions and method of the measurement.
    pub provenance: String,
    /// The names of the kernels, in the order of each point's times.
    pub columns: Vec<String>,
    /// The points.
    pub points: Vec<PagePoint>,
}

/// The recorded times of one layer and number of tokens.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct PagePoint {
    /// The model and the layer.
    pub layer: String,
    /// Number of experts.
    pub experts: usize,
    /// Output channels of each expert.
    pub n: usize,
    /// Input channels of each expert.
    pub k: usize,
    /// Number of tokens.
    pub tokens: usize,
    /// Rows of all experts: the tokens times the experts of each.
    pub rows: usize,
    /// Experts that have rows.
    pub active: usize,
    /// Microseconds, in the order of the page's columns.
    pub us: Vec<f64>,
}

/// The page, parsed on first use.
pub fn page() -> &'static Page {
    static PAGE: LazyLock<Page> =
        LazyLock::new(|| serde_json::from_str(include_str!("moe.json")).expect("the page is valid"));
    &PAGE
}

impl PagePoint {
    /// Returns the ideal floor in microseconds: the bytes of the active experts, the activations and the output
    /// at 3.10 TB/s, or the operations at 1979 TOPS.
    fn ideal_us(&self, group: Group) -> f64 {
        let bytes = self.active * weight_bytes(self.n, self.k, group) + self.rows * (self.k + 2 * self.n);
        let operations = 2.0 * self.rows as f64 * self.n as f64 * self.k as f64;
        1e6 * (bytes as f64 / IDEAL.0).max(operations / IDEAL.1)
    }

    /// Returns the offsets of a random routing in which as many experts get rows as on the page, if one is found.
    fn routing(&self, number: usize) -> Vec<i32> {
        const MOST_TRIES: usize = 5_000;
        let mut rng = ChaCha8Rng::seed_from_u64((self.tokens * MOST_ROUTINGS + number) as u64);
        let top_k = self.rows / self.tokens;
        let mut counts = vec![0; self.experts];
        for _ in 0..MOST_TRIES {
            counts.fill(0);
            for _ in 0..self.tokens {
                index::sample(&mut rng, self.experts, top_k)
                    .into_iter()
                    .for_each(|expert| counts[expert] += 1);
            }
            if counts.iter().filter(|&&count| count > 0).count() == self.active {
                break;
            }
        }
        let mut offsets = vec![0];
        for count in counts {
            offsets.push(offsets[offsets.len() - 1] + count);
        }
        offsets
    }
}

/// A run over layers and numbers of tokens.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Mixtures {
    /// GPU, driver, date and command.
    #[serde(flatten)]
    pub circumstances: Circumstances,
    /// False while points are still missing.
    pub complete: bool,
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
    /// What differs from the CPU backend's result, if anything does.
    pub mismatch: Option<String>,
}

/// Returns the points of the page with these numbers of tokens, or all if there are none given.
pub fn points(tokens: Option<&[usize]>) -> Vec<&'static PagePoint> {
    let chosen = |point: &&PagePoint| tokens.is_none_or(|tokens| tokens.contains(&point.tokens));
    page().points.iter().filter(chosen).collect()
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

/// Measures points of the page, each with the given plans.
///
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
    mut measured: impl FnMut(&Mixtures, usize) -> anyhow::Result<()>,
) -> anyhow::Result<Mixtures> {
    gpu.make_current()?;
    gpu.prepare_grouped()?;
    let pool = Pool::new(Baseline::Int8);
    let layers: BTreeSet<&str> = points.iter().map(|point| point.layer.as_str()).collect();
    let mut run = Mixtures { circumstances: Circumstances::of(gpu), ..Mixtures::default() };
    for layer in layers {
        let of_layer: Vec<&PagePoint> = points.iter().copied().filter(|point| point.layer == layer).collect();
        let Some(first) = of_layer.first() else { continue };
        let weights = data::random_weights(first.n, first.k, group)?;
        let experts = gpu.upload_experts(&vec![&weights; first.experts])?;
        for point in of_layer {
            let of_point = measure(gpu, &experts, &weights, point, (pace, plans), &pool)
                .with_context(|| format!("measuring {layer} with {} tokens", point.tokens))?;
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
    let expert_bytes = weight_bytes(n, k, weights.group());
    let routings = ROTATED_BYTES.div_ceil(point.active * expert_bytes).clamp(1, MOST_ROUTINGS);
    let offsets: Vec<Vec<i32>> = (0..routings).map(|number| point.routing(number)).collect();
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
        copies: routings,
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

/// Formats one point as a line. A ratio is the other kernel's recorded time divided by ours.
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
    for us in &point.page.us {
        write!(text, " {:>17.3}", us / point.ours.us).expect("a String takes all");
    }
    write!(text, "  {}", point.plan).expect("a String takes all");
    if let Some(mismatch) = &point.mismatch {
        write!(text, "  WRONG: {mismatch}").expect("a String takes all");
    }
    text
}

/// Formats the geometric means over all points, and the points that are slower than a recorded time.
///
/// Of several plans of a point, the fastest counts.
pub fn summary(results: &[Point]) -> String {
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
    let scored = points.iter().filter(|point| point.page.rows >= SCORED_ROWS);
    let score = geometric_mean(scored.map(|point| point.score()));
    let mut text = format!(
        "geometric means: ideal floor / time {} (points with {SCORED_ROWS} rows or more)",
        score.map_or("-".into(), |score| format!("{score:.3}"))
    );
    for (column, name) in page().columns.iter().enumerate() {
        let ratio = geometric_mean(points.iter().map(|point| point.page.us[column] / point.ours.us));
        let slower = points.iter().filter(|point| point.page.us[column] < point.ours.us).count();
        write!(
            text,
            "; × {name} {}, slower at {slower} of {} points",
            ratio.map_or("-".into(), |ratio| format!("{ratio:.3}")),
            points.len()
        )
        .expect("a String takes all");
    }
    text.push('\n');
    text
}

impl Point {
    /// Returns the ideal floor divided by our time.
    fn score(&self) -> f64 {
        self.ideal_us / self.ours.us
    }
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
        let name = path.display().to_string();
        let bytes = std::fs::read(path).with_context(|| format!("cannot read {name}"))?;
        Self::from_json(&bytes, &name)
    }

    /// Reads a run from JSON; errors call it `name`.
    ///
    /// # Errors
    /// If it is not such a run, or if a time is impossible.
    pub fn from_json(json: &[u8], name: &str) -> anyhow::Result<Self> {
        let run: Self = parse_json(json, name, "run of mixtures of experts")?;
        let columns = page().columns.len();
        let plausible = run
            .points
            .iter()
            .all(|point| point.ours.is_plausible() && point.ideal_us > 0.0 && point.page.us.len() == columns);
        ensure!(plausible, "{name} has an impossible time");
        Ok(run)
    }

    /// Returns the number of wrong results.
    pub fn mismatches(&self) -> usize {
        self.points.iter().filter(|point| point.mismatch.is_some()).count()
    }
}

/// Writes several runs as one Markdown page.
///
/// # Errors
/// If the file can't be written.
pub fn write_page(runs: &[Mixtures], path: &Path) -> anyhow::Result<()> {
    write_atomically(path, markdown(runs).context("a String takes all")?.as_bytes())
}

/// The explanation of the page.
const METHOD: &str = "
One launch multiplies the rows of all experts, which are sorted by expert; offsets are in device memory. Each point rotates through several random
routings, so that few experts do not stay in the L2 cache. The ideal floor is the larger of two times: the bytes of the active experts, the activations
and the output at 3.10 TB/s, and the operations at 1979 TOPS, which power does not allow for long. The score is the floor divided by our time.
× is another kernel's recorded time divided by ours. Those times are of another run, on the same kind of GPU:
";

fn markdown(runs: &[Mixtures]) -> Result<String, std::fmt::Error> {
    let mut text = String::new();
    let device = runs.first().map_or("no GPU", |run| run.circumstances.device_name());
    writeln!(text, "# Mixtures of experts, on {device}\n")?;
    writeln!(text, "Written by `liquidgemm bench --moe`; don't edit.")?;
    writeln!(text, "{METHOD}\n> {}", page().provenance)?;
    for run in runs {
        let groups: BTreeSet<&str> = run.points.iter().map(|point| point.group.as_str()).collect();
        let groups = groups.into_iter().collect::<Vec<_>>().join(", ");
        writeln!(text, "\n## Weights with group {groups}\n")?;
        let exact = match run.mismatches() {
            0 => format!("rows of all {} results equal the CPU backend's bits", run.points.len()),
            wrong => format!("**{wrong} of {} results are wrong**", run.points.len()),
        };
        facts(&run.circumstances, &[("checked", &exact)], run.complete, &mut text)?;
        writeln!(text, "\n{}", summary(&run.points))?;
        text.push_str("| layer | tokens | rows | active | µs | ideal µs | score |");
        page().columns.iter().try_for_each(|column| write!(text, " × {column} |"))?;
        text.push_str("\n|---|---|---|---|---|---|---|");
        text.push_str(&"---|".repeat(page().columns.len()));
        text.push('\n');
        for point in &run.points {
            let PagePoint { layer, tokens, rows, active, us, .. } = &point.page;
            let (ours, ideal, score) = (point.ours.us, point.ideal_us, point.score());
            write!(text, "| {layer} | {tokens} | {rows} | {active} | {ours:.2} | {ideal:.2} | {score:.2} |")?;
            us.iter().try_for_each(|us| write!(text, " {:.2} |", us / ours))?;
            text.push('\n');
        }
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::markdown::tests::assert_tables_are_whole;

    #[test]
    fn the_page_has_every_layer_at_every_number_of_tokens() {
        let page = page();
        let layers: BTreeSet<&str> = page.points.iter().map(|point| point.layer.as_str()).collect();
        assert_eq!((layers.len(), page.points.len()), (6, 42));
        for point in &page.points {
            assert_eq!(point.us.len(), page.columns.len());
            assert_eq!(point.rows % point.tokens, 0);
            assert!(point.active <= point.experts.min(point.rows));
        }
        assert_eq!(points(Some(&[1, 8])).len(), 12);
    }

    #[test]
    fn routings_have_all_rows_and_the_page_s_active_experts() {
        for point in points(Some(&[1, 8, 128])) {
            for number in 0..2 {
                let offsets = point.routing(number);
                assert_eq!((offsets.len(), offsets[point.experts]), (point.experts + 1, point.rows as i32));
                let active = offsets.windows(2).filter(|pair| pair[0] < pair[1]).count();
                assert!(active.abs_diff(point.active) <= 3, "{point:?}: {active}");
                let most = offsets.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap();
                assert!(most as usize <= point.tokens, "a token goes to an expert once");
            }
        }
    }

    #[test]
    fn a_saved_run_is_loaded_unchanged_and_its_page_has_whole_tables() {
        let timing = Timing::new(vec![9.9, 10.0, 10.1], 20).unwrap();
        let point = Point {
            page: points(Some(&[1]))[0].clone(),
            group: "64".into(),
            plan: "tiles".into(),
            ours: timing,
            ideal_us: 5.0,
            mismatch: None,
        };
        let mut run = Mixtures { points: vec![point], complete: true, ..Mixtures::default() };
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("run.json");
        run.save(&path).unwrap();
        assert_eq!(Mixtures::load(&path).unwrap(), run);
        let text = markdown(&[run.clone(), run.clone()]).unwrap();
        assert!(text.contains("| 10.00 | 5.00 | 0.50 |"), "{text}");
        assert_tables_are_whole(&text);
        run.points[0].mismatch = Some("row 3".into());
        assert!(markdown(&[run.clone()]).unwrap().contains("**1 of 1 results are wrong**"));
        run.points[0].ours.us = 0.0;
        run.save(&path).unwrap();
        assert!(Mixtures::load(&path).unwrap_err().to_string().contains("an impossible time"));
    }

    #[test]
    fn ideal_floors_are_those_of_the_page() {
        let ideal = |layer: &str, tokens| {
            let point = page().points.iter().find(|point| point.layer == layer && point.tokens == tokens);
            point.unwrap().ideal_us(Group::default())
        };
        for (layer, tokens, expected) in
            [("mixtral gate-up", 1, 40.3), ("dsv3 down", 128, 636.9), ("qwen3-30b gate-up", 8192, 208.3)]
        {
            assert!(
                (ideal(layer, tokens) / expected - 1.0).abs() < 0.01,
                "{layer}: {}",
                ideal(layer, tokens)
            );
        }
    }
}
