//! Shows a feed-forward block in a CUDA graph: RMSNorm, gate and up, SiLU · mul, down.
//! The linear layers quantize their activations on the GPU. A replay has the bits of the CPU.
//!
//! `cargo run --release -p liquidgemm --example 04_graph`

use std::ptr;

use cust::memory::{CopyDestination, DeviceBuffer};
use cust::stream::{Stream, StreamFlags};
use cust::sys::{self, CUgraph, CUgraphExec, CUstreamCaptureMode_enum};
use half::bf16;
use liquidgemm::cpu::QuantizeInput;
use liquidgemm::gpu::{DeviceLinear, Gpu, LinearInput, LinearOutput, Workspace};
use liquidgemm::{Gate, GateOrder, Group, HalfType, Linear, Operation, OutputType, PackedWeights};

const TOKENS: usize = 8;
const HIDDEN: usize = 1024;
const INNER: usize = 2816;
const EPSILON: f32 = 1e-5;

/// What a block needs on the device.
struct Block {
    gate_up: DeviceLinear,
    down: DeviceLinear,
    norm: DeviceBuffer<u16>,
    hidden: DeviceBuffer<u16>,
    inner: DeviceBuffer<u16>,
    output: DeviceBuffer<u16>,
    scratch: DeviceBuffer<u8>,
    workspace: Workspace,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let gpu = match Gpu::new() {
        Ok(gpu) => gpu,
        Err(error) => {
            println!("skipped: {error}");
            return Ok(());
        }
    };
    let wave = |i: usize, step: f32| (i as f32 * step).sin();
    let matrix = |n: usize, k: usize, step: f32| {
        let weights: Vec<f32> = (0..n * k).map(|i| wave(i, step)).collect();
        PackedWeights::quantize(&weights, n, k, Group::default())
    };
    // One product computes gate and up.
    let gate_up = Linear::stacked(&[matrix(INNER, HIDDEN, 0.71)?, matrix(INNER, HIDDEN, 0.37)?])?;
    let down = Linear::new(matrix(HIDDEN, INNER, 0.53)?);
    let norm: Vec<bf16> = (0..HIDDEN).map(|i| bf16::from_f32(1.0 + 0.1 * wave(i, 0.9))).collect();
    let hidden: Vec<bf16> = (0..TOKENS * HIDDEN).map(|i| bf16::from_f32(wave(i, 0.13))).collect();

    gpu.make_current()?;
    let stream = Stream::new(StreamFlags::NON_BLOCKING, None)?;
    let block = Block {
        gate_up: gpu.upload_linear(&gate_up)?,
        down: gpu.upload_linear(&down)?,
        norm: DeviceBuffer::from_slice(bytemuck::cast_slice(&norm))?,
        hidden: DeviceBuffer::from_slice(bytemuck::cast_slice(&hidden))?,
        inner: DeviceBuffer::zeroed(TOKENS * 2 * INNER)?,
        output: DeviceBuffer::zeroed(TOKENS * HIDDEN)?,
        // The layers run one after another, so one scratch serves both.
        scratch: DeviceBuffer::zeroed(gpu.upload_linear(&down)?.scratch_bytes(TOKENS)?)?,
        workspace: gpu.workspace()?,
    };

    // Compile everything first: a capture cannot.
    let normed = Operation::RmsNorm { weight: (&block.norm).into(), epsilon: EPSILON };
    let gated = Operation::Gated { gate: Gate::Silu, order: GateOrder::Halves };
    block.gate_up.prepare(&gpu, &normed, HalfType::Bf16, TOKENS..=TOKENS)?;
    block.down.prepare(&gpu, &gated, HalfType::Bf16, TOKENS..=TOKENS)?;

    let graph = capture(&stream, || launch(&gpu, &block, &stream))?;
    for _ in 0..1000 {
        // SAFETY: all memory that the graph uses is alive.
        check(unsafe { sys::cuGraphLaunch(graph, stream.as_inner()) })?;
    }
    stream.synchronize()?;
    // SAFETY: the graph has finished.
    check(unsafe { sys::cuGraphExecDestroy(graph) })?;
    let mut y = vec![0u16; TOKENS * HIDDEN];
    block.output.copy_to(&mut y)?;

    let operation = Operation::RmsNorm { weight: &norm[..], epsilon: EPSILON };
    let input = QuantizeInput { operation, ..QuantizeInput::new(&hidden, TOKENS, HIDDEN) };
    let inner: Vec<bf16> = gate_up.forward(&input, None)?;
    let operation = Operation::Gated { gate: Gate::Silu, order: GateOrder::Halves };
    let input =
        QuantizeInput { operation, input_stride: 2 * INNER, ..QuantizeInput::new(&inner, TOKENS, INNER) };
    let expected: Vec<bf16> = down.forward(&input, None)?;
    assert_eq!(bytemuck::cast_slice::<u16, bf16>(&y), expected);
    println!("{}: 1,000 replays, bit for bit the CPU's results", gpu.description());
    Ok(())
}

/// Launches the block on the stream.
fn launch(gpu: &Gpu, block: &Block, stream: &Stream) -> Result<(), liquidgemm::Error> {
    let input = LinearInput {
        operation: Operation::RmsNorm { weight: (&block.norm).into(), epsilon: EPSILON },
        ..LinearInput::new((&block.hidden).into(), HalfType::Bf16, TOKENS, HIDDEN)
    };
    let output = LinearOutput {
        output: (&block.inner).into(),
        output_stride: 2 * INNER,
        output_type: OutputType::Bf16,
    };
    let (scratch, workspace) = ((&block.scratch).into(), &block.workspace);
    // SAFETY: the block outlives its launches, which the stream orders.
    unsafe { block.gate_up.forward(gpu, &input, &output, scratch, workspace, stream) }?;
    let input = LinearInput {
        operation: Operation::Gated { gate: Gate::Silu, order: GateOrder::Halves },
        input_stride: 2 * INNER,
        ..LinearInput::new((&block.inner).into(), HalfType::Bf16, TOKENS, INNER)
    };
    let output =
        LinearOutput { output: (&block.output).into(), output_stride: HIDDEN, output_type: OutputType::Bf16 };
    // SAFETY: as above.
    unsafe { block.down.forward(gpu, &input, &output, scratch, workspace, stream) }
}

/// Captures the work that `enqueue` puts on the stream.
fn capture(
    stream: &Stream,
    enqueue: impl FnOnce() -> Result<(), liquidgemm::Error>,
) -> Result<CUgraphExec, Box<dyn std::error::Error>> {
    let mode = CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    let (mut graph, mut executable): (CUgraph, CUgraphExec) = (ptr::null_mut(), ptr::null_mut());
    // SAFETY: the stream is alive, and the pointers are valid for writes.
    unsafe {
        check(sys::cuStreamBeginCapture_v2(stream.as_inner(), mode))?;
        let enqueued = enqueue();
        check(sys::cuStreamEndCapture(stream.as_inner(), &mut graph))?;
        enqueued?;
        check(sys::cuGraphInstantiateWithFlags(&mut executable, graph, 0))?;
        check(sys::cuGraphDestroy(graph))?;
    }
    Ok(executable)
}

fn check(status: sys::CUresult) -> Result<(), String> {
    if status == sys::CUresult::CUDA_SUCCESS {
        Ok(())
    } else {
        Err(format!("the driver returned {status:?}"))
    }
}
