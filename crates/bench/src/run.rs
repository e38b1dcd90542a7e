//! One run: every problem, every contender, one GPU.

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
use super::record::{Baseline, Point, Run, moved_bytes};
use super::replay::{Clock, Contender, Pace};
use super::shapes::{Case, Matrix};
use super::statistics::Timing;
use crate::gpu::{self, DeviceSpan, DeviceWeights, Gpu, StreamHandle, Workspace};
use crate::{Group, OutputType, PackedWeights, Plan};

/// What is measured, and against whom.
#[derive(Clone, Debug)]
pub struct Options {
    /// The problems.
    pub cases: Vec<Case>,
    /// What of cuBLASLt runs too.
    pub baselines: Vec<Baseline>,
    /// Whether the probes run too.
    pub probes: bool,
    /// How many of cuBLASLt's heuristics' algorithms are tried; the fastest counts.
    pub algorithms: usize,
    /// How much is measured.
    pub pace: Pace,
    /// Whether to find out where fewer tokens take longer than more.
    pub monotone: bool,
    /// A token tile to use instead of the planner's choice.
    pub tile: Option<TileShape>,
    /// How many weights share a pair.
    pub group: Group,
}

/// Is told what happens during a run.
pub trait Observer {
    /// A problem is about to be measured.
    fn starts(&mut self, m: usize, matrix: Matrix);

    /// A problem has been measured; it is the run's last point.
    ///
    /// # Errors
    /// An error ends the run.
    fn measured(&mut self, run: &Run) -> anyhow::Result<()>;

    /// Something is worth saying, in one line.
    fn note(&mut self, text: &str);
}

/// Measures everything.
///
/// A wrong result of our kernel is recorded in its point and does not end the run; a baseline that fails leaves its
/// column empty.
///
/// # Errors
/// If the GPU or our kernel fails, or the observer does.
pub fn run(gpu: &Gpu, options: &Options, observer: &mut dyn Observer) -> anyhow::Result<Run> {
    let mut run = Run {
        circumstances: Circumstances::of(gpu),
        pace: options.pace,
        breaks: options.monotone.then(Vec::new),
        ..Run::default()
    };
    let cublaslt = if options.baselines.is_empty() {
        None
    } else {
        open_cublaslt(options.algorithms, &mut run, observer)
    };
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

/// cuBLASLt, if it can be loaded; `run` says which it is, or why there is none.
fn open_cublaslt(algorithms: usize, run: &mut Run, observer: &mut dyn Observer) -> Option<CublasLt> {
    match CublasLt::open() {
        Ok(library) => {
            run.cublaslt = format!(
                "{}, 64 MiB of workspace, fastest of the first {algorithms} of its heuristics",
                library.description()
            );
            Some(library)
        }
        Err(error) => {
            let note = format!("no cuBLASLt columns: {error:#}").replace('\n', " ");
            observer.note(&note);
            run.notes.push(note);
            None
        }
    }
}

/// The GPU with everything that all problems share.
pub(super) struct Stage<'g> {
    pub(super) gpu: &'g Gpu,
    pub(super) stream: Stream,
    pub(super) workspace: Workspace,
    pub(super) arena: Arena,
    /// Empty if there is no cuBLASLt.
    baselines: Vec<Baseline>,
    cublaslt: Option<CublasLt>,
}

/// Our weights for one matrix, and what the products with them should be.
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
    /// For these problems, with these of cuBLASLt's products, if there is one.
    pub(super) fn new(
        gpu: &'g Gpu,
        cases: &[Case],
        cublaslt: Option<CublasLt>,
        baselines: &[Baseline],
    ) -> anyhow::Result<Self> {
        let baselines = if cublaslt.is_some() { baselines.to_vec() } else { Vec::new() };
        for Case { matrix, .. } in cases {
            ensure!(matrix.k.is_multiple_of(16), "the bench takes K in multiples of 16, and {matrix} isn't");
        }
        gpu.make_current()?;
        Ok(Self {
            gpu,
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

    /// Makes a matrix's weights, uploads copies of them, and computes the reference.
    pub(super) fn fixture(&self, case: &Case, group: Group) -> anyhow::Result<Fixture> {
        let weights = data::random_weights(case.matrix.n, case.matrix.k, group)?;
        let copies = arena::copies(weights.bytes());
        Ok(Fixture {
            weights: (0..copies).map(|_| self.gpu.upload(&weights)).collect::<Result<_, _>>()?,
            reference: self.reference(&weights, case)?,
        })
    }

    /// What the products with a matrix's weights should be.
    pub(super) fn reference(&self, weights: &PackedWeights, case: &Case) -> anyhow::Result<Reference> {
        Reference::new(weights, self.arena.int8(), &self.arena.token_scales, &case.tokens)
    }

    /// Measures one problem. The second result are remarks about baselines that could not be measured.
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

    /// The plan of one problem: the planner's, or one with the tile that was asked for.
    fn plan(&self, fixture: &Fixture, m: usize, options: &Options) -> anyhow::Result<Plan> {
        let (n, k) = (fixture.n(), fixture.k());
        Ok(match options.tile {
            Some(tile) => Plan::with_tile(m, n, k, tile, self.gpu.figures())?,
            None => self.gpu.plan(m, n, k)?,
        })
    }

    /// Times our kernel on two of a matrix's problems once more, in turns.
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

    /// Overwrites our output, so that what an earlier launch left there can't pass for this one's.
    pub(super) fn clear_output(&self) -> anyhow::Result<()> {
        arena::set_bytes(&self.arena.output, 0xFF)
    }

    /// Whether the output of the last launch of our kernel is right: the first difference, if there is one.
    pub(super) fn difference(&self, fixture: &Fixture, m: usize) -> anyhow::Result<Option<String>> {
        Ok(fixture.reference.compare(&self.arena, m)?.1)
    }

    /// Our kernel.
    pub(super) fn ours<'a>(&'a self, fixture: &'a Fixture, m: usize, plan: &Plan) -> Contender<'a> {
        let operands = self.operands([m, fixture.n(), fixture.k()]);
        let plan = *plan;
        Contender {
            copies: fixture.weights.len(),
            launch: Box::new(move |copy| {
                let (weights, workspace, stream) = (&fixture.weights[copy], &self.workspace, &self.stream);
                // SAFETY: all memory lives in the stage and the fixture, and one stream orders the launches.
                unsafe { self.gpu.gemm_with_plan(weights, &operands, &plan, workspace, stream) }?;
                Ok(())
            }),
        }
    }

    /// The operands of our product `[m, n, k]`: bf16 without bias.
    pub(super) fn operands(&self, [m, n, k]: [usize; 3]) -> gpu::Operands {
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

    /// The probe that reads as many bytes as the problem moves.
    pub(super) fn stream_probe(&self, m: usize, n: usize, k: usize, group: Group) -> Contender<'_> {
        let source = DeviceSpan::from(&self.arena.source);
        // The probe reads whole pieces of 8 KiB, and one at the least.
        let bytes = moved_bytes(m, n, k, group).next_multiple_of(STREAM_PIECE_BYTES as usize);
        let copies = (source.bytes() / bytes).max(1);
        Contender {
            copies,
            launch: Box::new(move |copy| {
                // SAFETY: the arena's source holds the bytes of every problem, `copies` times.
                unsafe {
                    let span = DeviceSpan::from_raw(source.address() + (copy * bytes) as u64, bytes);
                    self.gpu.probe_stream(span, &self.stream)
                }?;
                Ok(())
            }),
        }
    }

    /// The probe that does as many products.
    pub(super) fn mma_probe(&self, m: usize, n: usize, k: usize) -> Contender<'_> {
        let products = m as u64 * n as u64 * k as u64;
        Contender {
            copies: 1,
            launch: Box::new(move |_| {
                let sink = DeviceSpan::from(&self.arena.sink);
                // SAFETY: the arena's sink has 4 KiB a multiprocessor and lives as long as the stage.
                unsafe { self.gpu.probe_mma(products, sink, &self.stream) }?;
                Ok(())
            }),
        }
    }

    /// A baseline, checked, and the tokens that it is measured with: more than `m` where it takes no fewer.
    fn baseline(
        &self,
        clock: &Clock<'_>,
        baseline: Baseline,
        m: usize,
        n: usize,
        k: usize,
        algorithms: usize,
    ) -> anyhow::Result<(Contender<'_>, usize)> {
        let library = self.cublaslt.as_ref().context("there is no cuBLASLt")?;
        let operands = self.arena.operands(baseline).context("no memory for it")?;
        let slices = operands.slices(n, k).context("no memory for it")?;
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

    /// The fastest of a library's algorithms for a product.
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
            (None, None) => bail!("no algorithm"),
        }
    }

    fn library_contender<'a>(&'a self, gemm: Gemm<'a>, slices: &Slices) -> Contender<'a> {
        let Slices { first_weights, stride, copies, activations } = *slices;
        let output = DeviceSpan::from(&self.arena.baseline_output).address();
        Contender {
            copies,
            launch: Box::new(move |copy| {
                let weights = first_weights + copy as u64 * stride;
                // SAFETY: the arena holds every copy of the weights, and activations and output of the largest
                // problem; the stream belongs to the context that the library was opened in, and orders the launches.
                unsafe { gemm.launch(weights, activations, output, StreamHandle::from(&self.stream)) }
            }),
        }
    }
}
