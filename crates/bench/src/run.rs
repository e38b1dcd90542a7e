//! Measures every problem of a run on one GPU: our kernel, the probes and cuBLASLt, all checked.
//! Device memory is in `arena`, timing in [`replay`](super::replay), the check of results in `check`.

use std::collections::BTreeSet;

use anyhow::{Context, bail, ensure};
use cust::stream::{Stream, StreamFlags};
use liquidgemm_format::probe::STREAM_PIECE_BYTES;
use liquidgemm_format::tile::TileShape;

use super::arena::{self, Arena, MAX_PADDED_TOKENS, Slices};
use super::check::{self, Reference};
use super::circumstances::Circumstances;
use super::cublaslt::{CublasLt, Gemm};
use super::data;
use super::monotone;
use super::probes::Probes;
use super::record::{Baseline, Point, Run, moved_bytes};
use super::replay::{Clock, Contender, Pace};
use super::shapes::{Case, Matrix};
use super::statistics::Timing;
use liquidgemm::gpu::{self, DeviceSpan, DeviceWeights, Gpu, StreamHandle, Workspace};
use liquidgemm::{Group, OutputType, PackedWeights, Plan, Problem};

/// What a run measures, and what it compares with.
#[derive(Clone, Debug)]
pub struct Options {
    /// The problems.
    pub cases: Vec<Case>,
    /// Products of cuBLASLt to measure.
    pub baselines: Vec<Baseline>,
    /// Whether a run without cuBLASLt is an error rather than a run without its columns.
    pub baselines_are_required: bool,
    /// Whether to measure the probes.
    pub probes: bool,
    /// Number of algorithms to try of those that cuBLASLt's heuristics propose; the fastest counts.
    pub algorithms: usize,
    /// How long to measure each kernel.
    pub pace: Pace,
    /// Whether to search for batch sizes that take longer than a larger one.
    pub monotone: bool,
    /// The tile shape to use instead of the planner's choice.
    pub tile: Option<TileShape>,
    /// How many weights share a pair.
    pub group: Group,
}

/// Receives the events of a run.
pub trait Observer {
    /// Announces the problem that is measured next.
    fn starts(&mut self, m: usize, matrix: Matrix);

    /// Receives the run after each point; the point is the run's last one.
    ///
    /// # Errors
    /// An error ends the run.
    fn measured(&mut self, run: &Run) -> anyhow::Result<()> {
        let _ = run;
        Ok(())
    }

    /// Receives a remark of one line.
    fn note(&mut self, text: &str);
}

/// Measures all problems.
///
/// A wrong result of our kernel is recorded in its point and does not end the run.
/// A baseline that fails leaves its column empty.
///
/// # Errors
/// If the GPU or our kernel fails, or the observer returns an error.
pub fn run(gpu: &Gpu, options: &Options, observer: &mut dyn Observer) -> anyhow::Result<Run> {
    let mut run = Run {
        circumstances: Circumstances::of(gpu),
        pace: options.pace,
        breaks: options.monotone.then(Vec::new),
        ..Run::default()
    };
    let cublaslt =
        if options.baselines.is_empty() { None } else { open_cublaslt(gpu, options, &mut run, observer)? };
    let stage = Stage::new(gpu, &options.cases, cublaslt, &options.baselines)?;
    for case in &options.cases {
        let fixture = stage.fixture(case, options.group)?;
        let first = run.points.len();
        for &m in &case.tokens {
            observer.starts(m, case.matrix);
            let (point, remarks) = stage
                .point(&fixture, m, options)
                .with_context(|| format!("measuring M = {m}, N×K = {}", case.matrix))?;
            run.points.push(point);
            for remark in remarks {
                if !run.notes.contains(&remark) {
                    observer.note(&remark);
                    run.notes.push(remark);
                }
            }
            observer.measured(&run)?;
        }
        if options.monotone {
            let found = monotone::confirmed(&mut run.points[first..], |points, pair| {
                stage.measure_again(&fixture, points, pair, options)
            })?;
            run.breaks.get_or_insert_default().extend(found);
        }
    }
    run.complete = true;
    Ok(run)
}

/// Opens cuBLASLt if it can be loaded, and records in `run` its version or why it is missing.
fn open_cublaslt(
    gpu: &Gpu,
    options: &Options,
    run: &mut Run,
    observer: &mut dyn Observer,
) -> anyhow::Result<Option<CublasLt>> {
    match CublasLt::open(gpu) {
        Ok(library) => {
            run.cublaslt = format!(
                "{}, 64 MiB of workspace, algorithms tried of those that its heuristics propose: {}",
                library.description(),
                options.algorithms
            );
            Ok(Some(library))
        }
        Err(error) if options.baselines_are_required => Err(error.context("no baseline can be measured")),
        Err(error) => {
            let note = format!("no cuBLASLt columns: {error:#}").replace('\n', " ");
            observer.note(&note);
            run.notes.push(note);
            Ok(None)
        }
    }
}

/// The GPU with the kernels and the device memory that all problems share.
pub(super) struct Stage<'g> {
    pub(super) gpu: &'g Gpu,
    probes: Probes<'g>,
    pub(super) stream: Stream,
    pub(super) workspace: Workspace,
    pub(super) arena: Arena,
    /// The baselines to measure; empty without cuBLASLt.
    baselines: Vec<Baseline>,
    cublaslt: Option<CublasLt>,
}

/// Copies of our weights for one matrix, and the expected outputs.
pub(super) struct Fixture {
    weights: Vec<DeviceWeights>,
    reference: Reference,
}

impl Fixture {
    pub(super) fn n(&self) -> usize {
        self.weights[0].n()
    }

    pub(super) fn k(&self) -> usize {
        self.weights[0].k()
    }
}

impl<'g> Stage<'g> {
    /// Prepares the GPU for these problems and these baselines. Without cuBLASLt there are no baselines.
    pub(super) fn new(
        gpu: &'g Gpu,
        cases: &[Case],
        cublaslt: Option<CublasLt>,
        baselines: &[Baseline],
    ) -> anyhow::Result<Self> {
        let baselines = if cublaslt.is_some() { baselines.to_vec() } else { Vec::new() };
        for Case { matrix, .. } in cases {
            ensure!(
                matrix.k.is_multiple_of(16),
                "the bench needs K to be a multiple of 16; the matrix {matrix} doesn't fit"
            );
        }
        gpu.make_current()?;
        Ok(Self {
            gpu,
            probes: Probes::new(gpu),
            stream: Stream::new(StreamFlags::NON_BLOCKING, None)?,
            workspace: gpu.workspace()?,
            arena: Arena::new(cases, &baselines, gpu.multiprocessors())?,
            baselines,
            cublaslt,
        })
    }

    pub(super) fn clock(&self, pace: Pace) -> anyhow::Result<Clock<'_>> {
        Clock::new(&self.stream, pace)
    }

    /// Generates the weights of a matrix, uploads copies of them, and computes the expected outputs.
    pub(super) fn fixture(&self, case: &Case, group: Group) -> anyhow::Result<Fixture> {
        let weights = data::random_weights(case.matrix.n, case.matrix.k, group)?;
        let copies = arena::copies(weights.bytes());
        Ok(Fixture {
            weights: (0..copies).map(|_| self.gpu.upload(&weights)).collect::<Result<_, _>>()?,
            reference: self.reference(&weights, case)?,
        })
    }

    /// Computes the expected outputs for a matrix's weights and all its batch sizes.
    pub(super) fn reference(&self, weights: &PackedWeights, case: &Case) -> anyhow::Result<Reference> {
        Reference::new(weights, self.arena.int8(), &self.arena.token_scales, &case.tokens)
    }

    /// Measures one problem. The second value holds remarks about baselines that could not be measured.
    fn point(
        &self,
        fixture: &Fixture,
        m: usize,
        options: &Options,
    ) -> anyhow::Result<(Point, BTreeSet<String>)> {
        let (n, k) = (fixture.n(), fixture.k());
        let plan = self.plan(fixture, m, options)?;
        let clock = self.clock(options.pace)?;
        let mut remarks = BTreeSet::new();
        let mut remark = |baseline: Baseline, error: &anyhow::Error| {
            remarks.insert(format!("cuBLASLt {}: {error:#}", baseline.name()).replace('\n', " "));
        };

        let mut contenders = vec![self.ours(fixture, m, &plan)];
        if options.probes {
            contenders.extend([self.stream_probe(m, n, k, options.group), self.mma_probe(m, n, k)]);
        }
        let mut entered = Vec::new();
        for &baseline in &self.baselines {
            match self.baseline(&clock, baseline, m, n, k, options.algorithms) {
                Ok((contender, tokens)) => {
                    contenders.push(contender);
                    entered.push(baseline);
                    if tokens != m {
                        remark(baseline, &anyhow::anyhow!("M = {m} is measured as M = {tokens}"));
                    }
                }
                Err(error) => remark(baseline, &error),
            }
        }

        self.clear_output()?;
        let mut timings = clock.measure(&contenders).into_iter();
        let mut next = || timings.next().unwrap_or_else(|| bail!("not measured"));
        let ours = next()?;
        let (stream, mma) = if options.probes { (Some(next()?), Some(next()?)) } else { (None, None) };
        let mut baselines: [Option<Timing>; Baseline::ALL.len()] = [None; Baseline::ALL.len()];
        for baseline in entered {
            match next() {
                Ok(timing) => baselines[baseline as usize] = Some(timing),
                Err(error) => remark(baseline, &error),
            }
        }
        let (tokens_checked, mismatch) = fixture.reference.compare(&self.arena, m)?;
        let [int8, fp8, bf16] = baselines;
        let plan = plan.to_string();
        let point = Point {
            m,
            n,
            k,
            group: options.group,
            plan,
            ours,
            stream,
            mma,
            int8,
            fp8,
            bf16,
            tokens_checked,
            mismatch,
        };
        Ok((point, remarks))
    }

    /// The plan of one problem: the planner's choice, or a plan with the tile in `options`.
    fn plan(&self, fixture: &Fixture, m: usize, options: &Options) -> anyhow::Result<Plan> {
        let (n, k) = (fixture.n(), fixture.k());
        Ok(match options.tile {
            Some(tile) => Plan::with_tile(Problem { m, n, k }, tile, self.gpu.figures())?,
            None => self.gpu.plan(Problem { m, n, k })?,
        })
    }

    /// Times our kernel once more on two points of a matrix, in alternating turns.
    fn measure_again(
        &self,
        fixture: &Fixture,
        points: &mut [Point],
        pair: [usize; 2],
        options: &Options,
    ) -> anyhow::Result<()> {
        let mut contenders = Vec::new();
        for index in pair {
            let m = points[index].m;
            contenders.push(self.ours(fixture, m, &self.plan(fixture, m, options)?));
        }
        for (index, timing) in pair.into_iter().zip(self.clock(Pace::THOROUGH)?.measure(&contenders)) {
            points[index].ours = timing?;
        }
        Ok(())
    }

    /// Overwrites our output, so that the output of an earlier launch can't pass for that of the next one.
    pub(super) fn clear_output(&self) -> anyhow::Result<()> {
        arena::set_bytes(&self.arena.output, 0xFF)
    }

    /// Compares the output of our kernel's last launch with the expected one. Returns the first difference.
    pub(super) fn difference(&self, fixture: &Fixture, m: usize) -> anyhow::Result<Option<String>> {
        Ok(fixture.reference.compare(&self.arena, m)?.1)
    }

    /// Our kernel with a plan, ready to be timed.
    pub(super) fn ours<'a>(&'a self, fixture: &'a Fixture, m: usize, plan: &Plan) -> Contender<'a> {
        let operands = self.operands(Problem::new(m, fixture.n(), fixture.k()));
        let plan = *plan;
        Contender {
            copies: fixture.weights.len(),
            launch: Box::new(move |copy| {
                let (weights, workspace, stream) = (&fixture.weights[copy], &self.workspace, &self.stream);
                // SAFETY: all memory belongs to the stage and the fixture, which outlive the launch.
                // All launches are on one stream, which orders them.
                unsafe { self.gpu.gemm_with_plan(weights, &operands, &plan, workspace, stream) }?;
                Ok(())
            }),
        }
    }

    /// The operands of our product `[m, n, k]`, with bf16 output and without bias.
    pub(super) fn operands(&self, Problem { m, n, k }: Problem) -> gpu::Operands {
        gpu::Operands {
            m,
            activations: self.arena.int8().activations(),
            activation_stride: k,
            token_scales: (&self.arena.token_scales_device).into(),
            bias: None,
            output: (&self.arena.output).into(),
            output_stride: n,
            output_type: OutputType::Bf16,
        }
    }

    /// The probe that reads as many bytes as the problem moves, ready to be timed.
    pub(super) fn stream_probe(&self, m: usize, n: usize, k: usize, group: Group) -> Contender<'_> {
        let source = DeviceSpan::from(&self.arena.source);
        // The probe reads whole pieces, and at least one.
        let bytes = moved_bytes(m, n, k, group).next_multiple_of(STREAM_PIECE_BYTES as usize);
        let copies = (source.bytes() / bytes).max(1);
        Contender {
            copies,
            launch: Box::new(move |copy| {
                // SAFETY: the arena's source holds `copies` spans of `bytes` bytes.
                // It has at least the bytes of the largest problem.
                unsafe {
                    let span = DeviceSpan::from_raw(source.address() + (copy * bytes) as u64, bytes);
                    self.probes.stream(span, &self.stream)
                }
            }),
        }
    }

    /// The probe that does as many multiply-adds as the problem, ready to be timed.
    pub(super) fn mma_probe(&self, m: usize, n: usize, k: usize) -> Contender<'_> {
        let products = m as u64 * n as u64 * k as u64;
        Contender {
            copies: 1,
            launch: Box::new(move |_| {
                let sink = DeviceSpan::from(&self.arena.sink);
                // SAFETY: the arena's sink has 4 KiB per SM and lives as long as the stage.
                unsafe { self.probes.mma(products, sink, &self.stream) }
            }),
        }
    }

    /// Prepares and checks a baseline. Returns it with the number of tokens that it is measured with.
    /// If cuBLASLt has no algorithm for `m` tokens, the number is 16 or 32.
    fn baseline(
        &self,
        clock: &Clock<'_>,
        baseline: Baseline,
        m: usize,
        n: usize,
        k: usize,
        algorithms: usize,
    ) -> anyhow::Result<(Contender<'_>, usize)> {
        let library = self.cublaslt.as_ref().context("cuBLASLt is not loaded")?;
        let operands = self.arena.operands(baseline).context("no device memory for its operands")?;
        let slices = operands.slices(n, k).context("no device memory for its weights")?;
        let mut outcome = self.fastest(clock, library, baseline, [m, n, k], algorithms, &slices);
        let mut tokens = m;
        for padded in [16, MAX_PADDED_TOKENS] {
            if outcome.is_err() && m < padded {
                let retry = self.fastest(clock, library, baseline, [padded, n, k], algorithms, &slices);
                if retry.is_ok() {
                    (outcome, tokens) = (retry, padded);
                }
            }
        }
        let contender = outcome?;
        arena::set_bytes(&self.arena.baseline_output, 0xFF)?;
        (contender.launch)(0)?;
        self.stream.synchronize()?;
        check::baseline_is_right(baseline, &self.arena, operands, [tokens, n, k])?;
        Ok((contender, tokens))
    }

    /// Returns the fastest of the algorithms that the library proposes for a product.
    fn fastest<'a>(
        &'a self,
        clock: &Clock<'_>,
        library: &'a CublasLt,
        baseline: Baseline,
        [m, n, k]: [usize; 3],
        algorithms: usize,
        slices: &Slices,
    ) -> anyhow::Result<Contender<'a>> {
        let mut fastest: Option<(f64, Contender<'a>)> = None;
        let mut failure = None;
        for gemm in library.gemm(baseline, m, n, k, algorithms)? {
            let contender = self.library_contender(gemm, slices);
            match clock.estimate(&contender) {
                Ok(us) if fastest.as_ref().is_none_or(|(best, _)| us < *best) => {
                    fastest = Some((us, contender));
                }
                Ok(_) => {}
                Err(error) => failure = Some(error),
            }
        }
        match (fastest, failure) {
            (Some((_, contender)), _) => Ok(contender),
            (None, Some(error)) => Err(error),
            (None, None) => bail!("cuBLASLt proposes no algorithm"),
        }
    }

    /// A product of cuBLASLt, ready to be timed.
    fn library_contender<'a>(&'a self, gemm: Gemm<'a>, slices: &Slices) -> Contender<'a> {
        let Slices { first_weights, stride, copies, activations } = *slices;
        let output = DeviceSpan::from(&self.arena.baseline_output).address();
        Contender {
            copies,
            launch: Box::new(move |copy| {
                let weights = first_weights + copy as u64 * stride;
                // SAFETY: the arena holds every copy of the weights,
                // and the activations and the output of the largest problem.
                // The stream belongs to the context of the library, and it orders the launches.
                unsafe { gemm.launch(weights, activations, output, StreamHandle::from(&self.stream)) }
            }),
        }
    }
}
