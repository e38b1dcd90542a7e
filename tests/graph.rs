//! Consecutive GEMMs on one stream, as a server launches them:
//! after copies, after one another, and in CUDA graphs.
//!
//! Programmatic dependent launch lets each launch begin before the previous one ends.
//! It must still see everything that the previous one wrote.

use cust::memory::DeviceBuffer;
use cust::sys;
use libtest_mimic::Failed;
use liquidgemm::gpu::{DeviceSpan, DeviceWeights, Gpu, Operands};
use liquidgemm::{Group, OutputType, PackedWeights, Plan, Problem, QuantizedActivations, TileConfig, cpu};
use liquidgemm_format::skinny::SKINNY_SHAPES;
use liquidgemm_format::tile::TILE_SHAPES;
use liquidgemm_gpu_tests::graph::{Graph, driver};
use liquidgemm_gpu_tests::{
    Fixture, Session, Test, expect_values, random_activations, random_weights, refill, rng, run, to_device,
};
use rand::RngExt;
use rand::rngs::StdRng;

const TESTS: [Test; 8] = [
    ("a_captured_gemm_replays_with_inputs_that_changed", a_captured_gemm_replays_with_inputs_that_changed),
    ("a_gemm_sees_the_copy_before_it", a_gemm_sees_the_copy_before_it),
    ("a_gemm_sees_what_the_gemm_before_it_wrote", a_gemm_sees_what_the_gemm_before_it_wrote),
    ("a_skinny_gemm_sees_what_the_one_before_it_wrote", a_skinny_gemm_sees_what_the_one_before_it_wrote),
    (
        "a_two_launch_gemm_sees_what_the_one_before_it_wrote",
        a_two_launch_gemm_sees_what_the_one_before_it_wrote,
    ),
    ("skinny_gemms_and_tiled_ones_in_a_row", skinny_gemms_and_tiled_ones_in_a_row),
    ("different_gemms_in_a_row_share_a_workspace", different_gemms_in_a_row_share_a_workspace),
    (
        "the_same_gemm_in_a_row_gives_the_same_bits_each_time",
        the_same_gemm_in_a_row_gives_the_same_bits_each_time,
    ),
];

fn main() {
    run(&TESTS).exit();
}

/// Returns an output of `elements` elements, filled with a poison value.
fn poisoned<T>(elements: usize) -> Result<DeviceBuffer<u8>, Failed> {
    to_device(&vec![0xA5; elements * size_of::<T>()])
}

/// Enqueues a problem's GEMM with bias and f32 output.
fn enqueue(
    gpu: &Gpu,
    session: &Session,
    problem: &Fixture,
    plan: &Plan,
    output: &DeviceBuffer<u8>,
) -> Result<(), Failed> {
    let operands = problem.operands(DeviceSpan::from(output), problem.shape()[1], OutputType::F32, true);
    // SAFETY: the callers keep all operands alive until they have synchronized the stream,
    // and only this session's stream uses the workspace.
    unsafe {
        gpu.gemm_with_plan(&problem.device_weights, &operands, plan, &session.workspace, &session.stream)
    }?;
    Ok(())
}

fn a_captured_gemm_replays_with_inputs_that_changed(gpu: &'static Gpu) -> Result<(), Failed> {
    let mut rng = rng(21);
    let session = Session::new(gpu)?;
    for [m, n, k] in [[1, 1000, 4096], [33, 520, 1000], [300, 700, 2048]] {
        let mut problem = Fixture::random(gpu, &mut rng, [m, n, k])?;
        let plan = gpu.plan(Problem { m, n, k })?;
        let output = poisoned::<f32>(m * n)?;
        // The first call loads the kernel, which is not allowed during a capture.
        enqueue(gpu, &session, &problem, &plan, &output)?;
        session.stream.synchronize()?;
        let graph = Graph::capture(&session.stream, || enqueue(gpu, &session, &problem, &plan, &output))?;
        for replay in 0..4 {
            problem.activations = random_activations(&mut rng, m, k);
            refill(&mut problem.codes, problem.activations.data())?;
            refill(&mut problem.scales, problem.activations.scales())?;
            // SAFETY: all memory that the graph uses is alive.
            unsafe { graph.replay(&session.stream) }?;
            expect_values(&output, &problem.expected::<f32>(true)?, || {
                format!("replay {replay}, [{m}, {n}, {k}], {plan}")
            })?;
        }
    }
    Ok(())
}

fn a_gemm_sees_the_copy_before_it(gpu: &'static Gpu) -> Result<(), Failed> {
    const STEPS: usize = 6;
    let mut rng = rng(22);
    let session = Session::new(gpu)?;
    let (m, n, k) = (24, 640, 4096);
    let problem = Fixture::random(gpu, &mut rng, [m, n, k])?;
    let plan = gpu.plan(Problem { m, n, k })?;
    let batches: Vec<QuantizedActivations> = (0..STEPS).map(|_| random_activations(&mut rng, m, k)).collect();
    let sources = batches.iter().map(|batch| to_device(batch.data())).collect::<Result<Vec<_>, _>>()?;
    let outputs = (0..STEPS).map(|_| poisoned::<f32>(m * n)).collect::<Result<Vec<_>, _>>()?;
    // All steps use the same activation buffer, so each copy must also wait for the GEMM before it.
    let all = || {
        for (source, output) in sources.iter().zip(&outputs) {
            let (to, from) = (problem.codes.as_device_ptr().as_raw(), source.as_device_ptr().as_raw());
            let stream = session.stream.as_inner();
            // SAFETY: the buffers are alive, long enough, and used on this stream only.
            unsafe {
                let poison =
                    sys::cuMemsetD8Async(output.as_device_ptr().as_raw(), 0xC3, output.len(), stream);
                driver("cuMemsetD8Async", poison)?;
                driver("cuMemcpyDtoDAsync", sys::cuMemcpyDtoDAsync_v2(to, from, source.len(), stream))?;
            }
            enqueue(gpu, &session, &problem, &plan, output)?;
        }
        Ok(())
    };
    let check = |what: &str| -> Result<(), Failed> {
        for (step, (batch, output)) in batches.iter().zip(&outputs).enumerate() {
            // Only the codes were copied: the token scales stay the problem's.
            let codes: Vec<i8> = (0..m).flat_map(|token| batch.row(token).iter().copied()).collect();
            let batch = QuantizedActivations::from_parts(&codes, problem.activations.scales().into(), m, k)?;
            let mut expected = vec![0f32; m * n];
            cpu::gemm(&problem.weights, &batch, Some(&problem.bias), &mut expected)?;
            expect_values(output, &expected, || format!("{what}, step {step}, {plan}"))?;
        }
        Ok(())
    };
    all()?;
    session.stream.synchronize()?;
    check("on a stream")?;
    let graph = Graph::capture(&session.stream, all)?;
    for _ in 0..3 {
        // SAFETY: all memory that the graph uses is alive.
        unsafe { graph.replay(&session.stream) }?;
        check("in a graph")?;
    }
    Ok(())
}

/// Two GEMMs. The second reads the bytes of the first one's int32 output as its int8 activations.
struct Chain {
    /// Tokens of both, channels of the first, K of the first, channels of the second.
    /// The second one's K is four times the channels of the first.
    shape: [usize; 4],
    first: PackedWeights,
    second: PackedWeights,
    device_first: DeviceWeights,
    device_second: DeviceWeights,
    plans: [Plan; 2],
    scales: Vec<f32>,
    device_scales: DeviceBuffer<f32>,
    /// The first one's output, shared by all steps.
    between: DeviceBuffer<u8>,
}

/// The input and the output of one pass through the chain.
struct ChainStep {
    x: QuantizedActivations,
    codes: DeviceBuffer<i8>,
    output: DeviceBuffer<u8>,
}

impl Chain {
    fn new(gpu: &Gpu, rng: &mut StdRng, shape: [usize; 4]) -> Result<Self, Failed> {
        let [m, middle, k, n] = shape;
        let plans = [gpu.plan(Problem::new(m, middle, k))?, gpu.plan(Problem::new(m, n, 4 * middle))?];
        Self::with_plans(gpu, rng, shape, plans)
    }

    fn with_plans(gpu: &Gpu, rng: &mut StdRng, shape: [usize; 4], plans: [Plan; 2]) -> Result<Self, Failed> {
        let [m, middle, k, n] = shape;
        // Int8 weights from 0 to 15 and at most eight activations of 1 give sums from 0 to 120.
        // Every byte of such a sum is a valid activation code.
        let codes: Vec<u8> = (0..middle * k).map(|_| rng.random_range(0..16)).collect();
        let pairs = vec![(1, 128); middle];
        let first = PackedWeights::pack(&codes, &pairs, vec![1.0; middle], middle, k, Group::Channel)?;
        let second = random_weights(rng, n, 4 * middle);
        let scales: Vec<f32> = (0..m).map(|_| rng.random_range(1e-4..1e-2f32)).collect();
        Ok(Self {
            shape,
            device_first: gpu.upload(&first)?,
            device_second: gpu.upload(&second)?,
            plans,
            device_scales: to_device(&scales)?,
            between: poisoned::<i32>(m * middle)?,
            first,
            second,
            scales,
        })
    }

    fn step(&self, rng: &mut StdRng) -> Result<ChainStep, Failed> {
        let [m, _, k, n] = self.shape;
        let x = self.random_x(rng)?;
        let codes = to_device(x.data())?;
        assert_eq!(x.stride(), k, "k is a multiple of 16");
        Ok(ChainStep { x, codes, output: poisoned::<f32>(m * n)? })
    }

    fn random_x(&self, rng: &mut StdRng) -> Result<QuantizedActivations, Failed> {
        let [m, _, k, _] = self.shape;
        let mut codes = vec![0; m * k];
        for row in codes.chunks_exact_mut(k) {
            for _ in 0..8 {
                row[rng.random_range(0..k)] = 1;
            }
        }
        Ok(QuantizedActivations::from_parts(&codes, self.scales.clone(), m, k)?)
    }

    fn enqueue(&self, gpu: &Gpu, session: &Session, step: &ChainStep) -> Result<(), Failed> {
        let [m, middle, k, n] = self.shape;
        let first = Operands {
            m,
            activations: (&step.codes).into(),
            activation_stride: k,
            token_scales: (&self.device_scales).into(),
            bias: None,
            output: (&self.between).into(),
            output_stride: middle,
            output_type: OutputType::I32,
        };
        let second = Operands {
            activations: (&self.between).into(),
            activation_stride: 4 * middle,
            output: (&step.output).into(),
            output_stride: n,
            output_type: OutputType::F32,
            ..first
        };
        let (workspace, stream) = (&session.workspace, &session.stream);
        // SAFETY: the callers keep all operands alive until they have synchronized the stream,
        // and use them on this stream only.
        unsafe {
            gpu.gemm_with_plan(&self.device_first, &first, &self.plans[0], workspace, stream)?;
            gpu.gemm_with_plan(&self.device_second, &second, &self.plans[1], workspace, stream)?;
        }
        Ok(())
    }

    fn check(&self, step: &ChainStep, case: impl Fn() -> String) -> Result<(), Failed> {
        let [m, middle, _, n] = self.shape;
        let mut between = vec![0i32; m * middle];
        cpu::gemm(&self.first, &step.x, None, &mut between)?;
        let codes = bytemuck::cast_slice(&between);
        let between = QuantizedActivations::from_parts(codes, self.scales.clone(), m, 4 * middle)?;
        let mut expected = vec![0f32; m * n];
        cpu::gemm(&self.second, &between, None, &mut expected)?;
        expect_values(&step.output, &expected, case)
    }
}

fn a_gemm_sees_what_the_gemm_before_it_wrote(gpu: &'static Gpu) -> Result<(), Failed> {
    let mut rng = rng(23);
    let session = Session::new(gpu)?;
    for shape in [[1, 1024, 2048, 512], [16, 512, 4096, 4096], [48, 1024, 2048, 512], [200, 512, 1024, 640]] {
        let chain = Chain::new(gpu, &mut rng, shape)?;
        check_chain(gpu, &session, &mut rng, &chain)?;
    }
    Ok(())
}

/// Runs a chain six times in a row, on a stream and in a graph, and checks the outputs.
fn check_chain(gpu: &Gpu, session: &Session, rng: &mut StdRng, chain: &Chain) -> Result<(), Failed> {
    let shape = chain.shape;
    let mut steps = (0..6).map(|_| chain.step(rng)).collect::<Result<Vec<_>, _>>()?;
    let all = |steps: &[ChainStep]| steps.iter().try_for_each(|step| chain.enqueue(gpu, session, step));
    let check = |steps: &[ChainStep], what: &str| {
        steps
            .iter()
            .enumerate()
            .try_for_each(|(index, step)| chain.check(step, || format!("{what}, step {index} of {shape:?}")))
    };
    all(&steps)?;
    session.stream.synchronize()?;
    check(&steps, "on a stream")?;
    let graph = Graph::capture(&session.stream, || all(&steps))?;
    for _ in 0..3 {
        for step in &mut steps {
            step.x = chain.random_x(rng)?;
            refill(&mut step.codes, step.x.data())?;
        }
        // SAFETY: all memory that the graph uses is alive.
        unsafe { graph.replay(&session.stream) }?;
        check(&steps, "in a graph")?;
    }
    Ok(())
}

fn a_two_launch_gemm_sees_what_the_one_before_it_wrote(gpu: &'static Gpu) -> Result<(), Failed> {
    let mut rng = rng(27);
    let session = Session::new(gpu)?;
    let most = gpu.multiprocessors();
    for (index, &shape) in TILE_SHAPES.iter().enumerate() {
        // Both launches use stream-K, and so both use the workspace.
        let configs = [shape, TILE_SHAPES[(7 * index + 3) % TILE_SHAPES.len()]].map(|shape| TileConfig {
            shape,
            cluster_size: 1,
            clusters: most,
            stream_k_waves: 1,
        });
        let m = shape.tokens as usize + 1;
        for [middle, k, n] in [[512, 2048, 1000], [256, 4096, 600]] {
            let plan = |n: usize, k, boundary| Plan::two_launches(Problem { m, n, k }, boundary, configs);
            let plans = [plan(middle, k, middle / 2)?, plan(n, 4 * middle, 448)?];
            let chain = Chain::with_plans(gpu, &mut rng, [m, middle, k, n], plans)?;
            check_chain(gpu, &session, &mut rng, &chain)?;
        }
    }
    Ok(())
}

fn a_skinny_gemm_sees_what_the_one_before_it_wrote(gpu: &'static Gpu) -> Result<(), Failed> {
    let mut rng = rng(26);
    let session = Session::new(gpu)?;
    for kernel in SKINNY_SHAPES {
        let m = kernel.tokens as usize;
        for [middle, k, n] in [[1024, 2048, 4096], [512, 4096, 600]] {
            let plan = |n, k| Plan::skinny(Problem { m, n, k }, kernel, gpu.multiprocessors());
            let plans = [plan(middle, k)?, plan(n, 4 * middle)?];
            let chain = Chain::with_plans(gpu, &mut rng, [m, middle, k, n], plans)?;
            check_chain(gpu, &session, &mut rng, &chain)?;
        }
    }
    Ok(())
}

/// Captures many launches in one graph: every skinny kernel, each followed by a tiled one.
fn skinny_gemms_and_tiled_ones_in_a_row(gpu: &'static Gpu) -> Result<(), Failed> {
    let mut rng = rng(27);
    let session = Session::new(gpu)?;
    let mut launches = Vec::new();
    for kernel in SKINNY_SHAPES {
        for [n, k] in [[4096, 4096], [700, 3000]] {
            let m = kernel.tokens as usize;
            let problem = Fixture::random(gpu, &mut rng, [m, n, k])?;
            let skinny = Plan::skinny(Problem { m, n, k }, kernel, gpu.multiprocessors())?;
            let tiled = Plan::with_tile(Problem { m, n, k }, TILE_SHAPES[1], gpu.figures())?;
            let outputs = [poisoned::<f32>(m * n)?, poisoned::<f32>(m * n)?];
            launches.push((problem, [skinny, tiled], outputs));
        }
    }
    let all = || {
        for (problem, plans, outputs) in launches.iter().chain(&launches) {
            for (plan, output) in plans.iter().zip(outputs) {
                enqueue(gpu, &session, problem, plan, output)?;
            }
        }
        Ok(())
    };
    all()?;
    session.stream.synchronize()?;
    let graph = Graph::capture(&session.stream, all)?;
    for _ in 0..5 {
        // SAFETY: all memory that the graph uses is alive.
        unsafe { graph.replay(&session.stream) }?;
    }
    for (problem, plans, outputs) in &launches {
        let expected = problem.expected::<f32>(true)?;
        for (plan, output) in plans.iter().zip(outputs) {
            expect_values(output, &expected, || plan.to_string())?;
        }
    }
    Ok(())
}

fn different_gemms_in_a_row_share_a_workspace(gpu: &'static Gpu) -> Result<(), Failed> {
    let mut rng = rng(24);
    let session = Session::new(gpu)?;
    let mut launches = Vec::new();
    for shape in TILE_SHAPES {
        // Few tiles and a long K: many thread blocks share a tile, so each launch stores its partial sums
        // where the previous launch stored its own.
        for [m, n, k] in [[shape.tokens as usize, 128, 16_384], [shape.tokens as usize + 1, 300, 2048]] {
            let problem = Fixture::random(gpu, &mut rng, [m, n, k])?;
            let plan = Plan::with_tile(Problem { m, n, k }, shape, gpu.figures())?;
            let output = poisoned::<f32>(m * n)?;
            launches.push((problem, plan, output));
        }
    }
    // Launch from large tiles to small ones, then from small ones to large ones.
    let there_and_back = || {
        let mut all = launches.iter().rev().chain(&launches);
        all.try_for_each(|(problem, plan, output)| enqueue(gpu, &session, problem, plan, output))
    };
    let check = |what: &str| {
        launches.iter().try_for_each(|(problem, plan, output)| {
            let [m, n, k] = problem.shape();
            expect_values(output, &problem.expected::<f32>(true)?, || {
                format!("{what}, [{m}, {n}, {k}], {plan}")
            })
        })
    };
    there_and_back()?;
    session.stream.synchronize()?;
    check("on a stream")?;
    let graph = Graph::capture(&session.stream, there_and_back)?;
    for _ in 0..5 {
        // SAFETY: all memory that the graph uses is alive.
        unsafe { graph.replay(&session.stream) }?;
    }
    check("in a graph")
}

fn the_same_gemm_in_a_row_gives_the_same_bits_each_time(gpu: &'static Gpu) -> Result<(), Failed> {
    const LAUNCHES: usize = 100;
    let mut rng = rng(25);
    let session = Session::new(gpu)?;
    for [m, n, k] in [[1, 4096, 4096], [16, 1024, 8192], [130, 1000, 3000]] {
        let problem = Fixture::random(gpu, &mut rng, [m, n, k])?;
        let plan = gpu.plan(Problem { m, n, k })?;
        let outputs = (0..LAUNCHES).map(|_| poisoned::<f32>(m * n)).collect::<Result<Vec<_>, _>>()?;
        let all = || outputs.iter().try_for_each(|output| enqueue(gpu, &session, &problem, &plan, output));
        all()?;
        session.stream.synchronize()?;
        let graph = Graph::capture(&session.stream, all)?;
        // SAFETY: all memory that the graph uses is alive.
        unsafe { graph.replay(&session.stream) }?;
        let expected = problem.expected::<f32>(true)?;
        for (launch, output) in outputs.iter().enumerate() {
            expect_values(output, &expected, || format!("launch {launch}, [{m}, {n}, {k}], {plan}"))?;
        }
    }
    Ok(())
}
