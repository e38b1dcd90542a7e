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
use super::record::{Point, Rival, Run, moved_bytes};
use super::replay::{Clock, Contender, Pace};
use super::shapes::{Case, Matrix};
use super::statistics::Timing;
use crate::gpu::{self, DeviceSpan, DeviceWeights, Gpu, StreamHandle, Workspace};
use crate::{OutputType, PackedWeights, Plan};

/// What is measured, and against whom.
#[derive(Clone, Debug)]
pub struct Options {
    /// The problems.
    pub cases: Vec<Case>,
    /// Whether cuBLASLt runs too.
    pub cublaslt: bool,
    /// How many of its heuristics' algorithms are tried; the fastest counts.
    pub algorithms: usize,
    /// A token tile to use instead of the planner's choice.
    pub tile: Option<TileShape>,
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
/// A wrong result of our kernel is recorded in its point and does not end the run; a rival that fails leaves its
/// column empty.
///
/// # Errors
/// If the GPU or our kernel fails, or the observer does.
pub fn run(gpu: &Gpu, options: &Options, observer: &mut dyn Observer) -> anyhow::Result<Run> {
    let mut run = Run { circumstances: Circumstances::of(gpu), ..Run::default() };
    let cublaslt =
        if options.cublaslt { open_cublaslt(options.algorithms, &mut run, observer) } else { None };
    let stage = Stage::new(gpu, &options.cases, cublaslt)?;
    for case in &options.cases {
        let bed = stage.bed(case)?;
        for &m in &case.tokens {
            observer.starts(m, case.matrix);
            let plan = match options.tile {
                Some(tile) => Plan::with_tile(m, bed.n(), bed.k(), tile, gpu.figures())?,
                None => gpu.plan(m, bed.n(), bed.k())?,
            };
            let (point, remarks) = stage
                .point(&bed, m, &plan, options.algorithms)
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
    cublaslt: Option<CublasLt>,
}

/// Our weights for one matrix, and what the products with them should be.
pub(super) struct Bed {
    weights: Vec<DeviceWeights>,
    reference: Reference,
}

impl Bed {
    pub(super) fn n(&self) -> usize {
        self.weights[0].n()
    }

    pub(super) fn k(&self) -> usize {
        self.weights[0].k()
    }
}

impl<'g> Stage<'g> {
    /// For these problems, with cuBLASLt if it is to be measured too.
    pub(super) fn new(gpu: &'g Gpu, cases: &[Case], cublaslt: Option<CublasLt>) -> anyhow::Result<Self> {
        for Case { matrix, .. } in cases {
            ensure!(matrix.k.is_multiple_of(16), "the bench takes K in multiples of 16, and {matrix} isn't");
        }
        gpu.make_current()?;
        Ok(Self {
            gpu,
            stream: Stream::new(StreamFlags::NON_BLOCKING, None)?,
            workspace: gpu.workspace()?,
            arena: Arena::new(cases, cublaslt.is_some(), gpu.multiprocessors())?,
            cublaslt,
        })
    }

    pub(super) fn clock(&self, pace: Pace) -> anyhow::Result<Clock<'_>> {
        Clock::new(&self.stream, pace)
    }

    /// Makes a matrix's weights, uploads copies of them, and computes the reference.
    pub(super) fn bed(&self, case: &Case) -> anyhow::Result<Bed> {
        let weights = data::random_weights(case.matrix.n, case.matrix.k)?;
        let copies = arena::copies(weights.bricks().len());
        Ok(Bed {
            weights: (0..copies).map(|_| self.gpu.upload(&weights)).collect::<Result<_, _>>()?,
            reference: self.reference(&weights, case)?,
        })
    }

    /// What the products with a matrix's weights should be.
    pub(super) fn reference(&self, weights: &PackedWeights, case: &Case) -> anyhow::Result<Reference> {
        Reference::new(weights, self.arena.int8(), &self.arena.token_scales, &case.tokens)
    }

    /// Measures one problem. The second result are remarks about rivals that could not be measured.
    fn point(
        &self,
        bed: &Bed,
        m: usize,
        plan: &Plan,
        algorithms: usize,
    ) -> anyhow::Result<(Point, BTreeSet<String>)> {
        let (n, k) = (bed.n(), bed.k());
        let clock = self.clock(Pace::THOROUGH)?;
        let mut remarks = BTreeSet::new();
        let mut remark = |rival: Rival, error: &anyhow::Error| {
            remarks.insert(format!("cuBLASLt {}: {error:#}", rival.name()).replace('\n', " "));
        };

        let mut contenders =
            vec![self.ours(bed, m, plan), self.stream_probe(m, n, k), self.mma_probe(m, n, k)];
        let mut entered = Vec::new();
        for rival in Rival::ALL {
            match self.rival(&clock, rival, m, n, k, algorithms) {
                Ok(Some((contender, tokens))) => {
                    contenders.push(contender);
                    entered.push(rival);
                    if tokens != m {
                        remark(rival, &anyhow::anyhow!("M = {m} is measured as M = {tokens}"));
                    }
                }
                Ok(None) => {}
                Err(error) => remark(rival, &error),
            }
        }

        self.clear_output()?;
        let mut timings = clock.measure(&contenders).into_iter();
        let mut next = || timings.next().unwrap_or_else(|| bail!("not measured"));
        let [ours, stream, mma] = [next()?, next()?, next()?];
        let mut rivals: [Option<Timing>; Rival::ALL.len()] = [None; Rival::ALL.len()];
        for rival in entered {
            match next() {
                Ok(timing) => rivals[rival as usize] = Some(timing),
                Err(error) => remark(rival, &error),
            }
        }
        let (tokens_checked, mismatch) = bed.reference.compare(&self.arena, m)?;
        let [int8, fp8, bf16] = rivals;
        let plan = plan.to_string();
        let point = Point { m, n, k, plan, ours, stream, mma, int8, fp8, bf16, tokens_checked, mismatch };
        Ok((point, remarks))
    }

    /// Overwrites our output, so that what an earlier launch left there can't pass for this one's.
    pub(super) fn clear_output(&self) -> anyhow::Result<()> {
        arena::set_bytes(&self.arena.output, 0xFF)
    }

    /// Whether the output of the last launch of our kernel is right: the first difference, if there is one.
    pub(super) fn difference(&self, bed: &Bed, m: usize) -> anyhow::Result<Option<String>> {
        Ok(bed.reference.compare(&self.arena, m)?.1)
    }

    /// Our kernel.
    pub(super) fn ours<'a>(&'a self, bed: &'a Bed, m: usize, plan: &Plan) -> Contender<'a> {
        let operands = self.operands([m, bed.n(), bed.k()]);
        let plan = *plan;
        Contender {
            copies: bed.weights.len(),
            launch: Box::new(move |copy| {
                let (weights, workspace, stream) = (&bed.weights[copy], &self.workspace, &self.stream);
                // SAFETY: all memory lives in the stage and the bed, and one stream orders the launches.
                unsafe { self.gpu.gemm(weights, &operands, &plan, workspace, stream) }?;
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
    pub(super) fn stream_probe(&self, m: usize, n: usize, k: usize) -> Contender<'_> {
        let source = DeviceSpan::from(&self.arena.source);
        // The probe reads whole pieces of 8 KiB, and one at the least.
        let bytes = moved_bytes(m, n, k).next_multiple_of(STREAM_PIECE_BYTES as usize);
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

    /// A rival, checked, and the tokens that it is measured with: more than `m` where it takes no fewer. `None`
    /// if there are no rivals in this run.
    fn rival(
        &self,
        clock: &Clock<'_>,
        rival: Rival,
        m: usize,
        n: usize,
        k: usize,
        algorithms: usize,
    ) -> anyhow::Result<Option<(Contender<'_>, usize)>> {
        let Some(library) = &self.cublaslt else {
            return Ok(None);
        };
        let operands = &self.arena.operands[rival as usize];
        let slices = operands.slices(n, k).context("no memory for it")?;
        let mut outcome = self.fastest(clock, library, rival, [m, n, k], algorithms, &slices);
        let mut tokens = m;
        for padded in [16, MAX_PADDED_TOKENS] {
            if outcome.is_err() && m < padded {
                let retry = self.fastest(clock, library, rival, [padded, n, k], algorithms, &slices);
                if retry.is_ok() {
                    (outcome, tokens) = (retry, padded);
                }
            }
        }
        let contender = outcome?;
        arena::set_bytes(&self.arena.rival_output, 0xFF)?;
        (contender.launch)(0)?;
        self.stream.synchronize()?;
        check::rival_is_right(rival, &self.arena, operands, [tokens, n, k])?;
        Ok(Some((contender, tokens)))
    }

    /// The fastest of a library's algorithms for a product.
    fn fastest<'a>(
        &'a self,
        clock: &Clock<'_>,
        library: &'a CublasLt,
        rival: Rival,
        [m, n, k]: [usize; 3],
        algorithms: usize,
        slices: &Slices,
    ) -> anyhow::Result<Contender<'a>> {
        let mut fastest: Option<(f64, Contender<'a>)> = None;
        let mut failure = None;
        for gemm in library.gemm(rival, m, n, k, algorithms)? {
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
        let output = DeviceSpan::from(&self.arena.rival_output).address();
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
