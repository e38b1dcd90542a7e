//! Linear layers on the GPU against those on the CPU, bit for bit: single calls, memory of the caller,
//! shared activations, and a transformer layer's chain in a CUDA graph.

use cust::memory::{CopyDestination, DeviceBuffer, DeviceCopy};
use cust::sys;
use half::{bf16, f16};
use libtest_mimic::Failed;
use liquidgemm::cpu::{QuantizeInput, Residual};
use liquidgemm::gpu::{
    DeviceLinear, DeviceSpan, DeviceWeights, Gpu, GpuError, LinearInput, LinearOutput, QuantizedSpan,
    Workspace,
};
use liquidgemm::{Error, Gate, GateOrder, Half, HalfType, Linear, Operation, Output, OutputType};
use liquidgemm_gpu_tests::graph::{Graph, driver};
use liquidgemm_gpu_tests::{Session, Test, expect_values, random_bias, random_weights, rng, run, to_device};
use rand::RngExt;
use rand::rngs::StdRng;

const TESTS: [Test; 5] = [
    ("random_layers_equal_the_cpu", random_layers_equal_the_cpu),
    ("layers_in_memory_of_the_caller_equal_the_cpu", layers_in_memory_of_the_caller_equal_the_cpu),
    ("layers_share_quantized_activations", layers_share_quantized_activations),
    ("bad_calls_leave_everything_untouched", bad_calls_leave_everything_untouched),
    ("a_captured_chain_gives_the_bits_of_eager_calls", a_captured_chain_gives_the_bits_of_eager_calls),
];

fn main() {
    run(&TESTS).exit();
}

fn random<T: Half>(rng: &mut StdRng, count: usize) -> Vec<T> {
    (0..count).map(|_| T::round(rng.random_range(-3.0..3.0f32))).collect()
}

/// Returns the 16-bit values as a device buffer.
fn halves<T: Half>(values: &[T]) -> Result<DeviceBuffer<u16>, Failed> {
    to_device(bytemuck::cast_slice::<T, u16>(values))
}

fn poisoned(bytes: usize) -> Result<DeviceBuffer<u8>, Failed> {
    to_device(&vec![0xA5; bytes])
}

/// Returns a layer with random weights, with a bias and a smoothing vector or without.
fn random_layer(rng: &mut StdRng, n: usize, k: usize) -> Result<Linear, Failed> {
    let mut layer = Linear::new(random_weights(rng, n, k));
    if rng.random() {
        layer = layer.with_bias(random_bias(rng, n))?;
    }
    if rng.random() {
        layer = layer.with_smoothing((0..k).map(|_| rng.random_range(0.5..2.0f32)).collect())?;
    }
    Ok(layer)
}

fn span<T: DeviceCopy>(buffer: &DeviceBuffer<T>) -> DeviceSpan {
    buffer.into()
}

/// Runs a layer on random activations and compares its output.
fn check<T: Half, O: Output>(
    gpu: &Gpu,
    session: &Session,
    rng: &mut StdRng,
    layer: &Linear,
    on_device: &DeviceLinear,
    m: usize,
) -> Result<(), Failed> {
    let (n, k) = (layer.n(), layer.k());
    let gated = rng.random();
    let operation = if gated {
        Operation::Gated { gate: Gate::Silu, order: GateOrder::Interleaved }
    } else {
        Operation::Plain
    };
    let device_operation = if gated {
        Operation::Gated { gate: Gate::Silu, order: GateOrder::Interleaved }
    } else {
        Operation::Plain
    };
    let row = if gated { 2 * k } else { k };
    let input: Vec<T> = random(rng, m * row);
    let call = QuantizeInput { operation, input_stride: row, ..QuantizeInput::new(&input, m, k) };
    let expected: Vec<O> = layer.forward(&call, None)?;

    let device_input = halves(&input)?;
    let scratch = poisoned(on_device.scratch_bytes(m)?)?;
    let output = poisoned(m * n * size_of::<O>())?;
    let input = LinearInput {
        operation: device_operation,
        input_stride: row,
        ..LinearInput::new(span(&device_input), T::HALF, m, k)
    };
    let target = LinearOutput { output: span(&output), output_stride: n, output_type: O::TYPE };
    // SAFETY: everything lives until the stream has been synchronized.
    unsafe { on_device.forward(gpu, &input, &target, span(&scratch), &session.workspace, &session.stream) }?;
    session.stream.synchronize()?;
    expect_values(&output, &expected, || format!("m = {m}, n = {n}, k = {k}, {} to {}", T::HALF, O::TYPE))
}

fn random_layers_equal_the_cpu(gpu: &'static Gpu) -> Result<(), Failed> {
    let mut rng = rng(31);
    let session = Session::new(gpu)?;
    for _ in 0..40 {
        let (n, k) = (rng.random_range(1..600), rng.random_range(1..2000));
        let layer = random_layer(&mut rng, n, k)?;
        let on_device = gpu.upload_linear(&layer)?;
        for _ in 0..3 {
            let m = rng.random_range(1..200);
            check::<bf16, bf16>(gpu, &session, &mut rng, &layer, &on_device, m)?;
            check::<f16, f16>(gpu, &session, &mut rng, &layer, &on_device, m)?;
            check::<bf16, f32>(gpu, &session, &mut rng, &layer, &on_device, m)?;
        }
    }
    Ok(())
}

fn layers_in_memory_of_the_caller_equal_the_cpu(gpu: &'static Gpu) -> Result<(), Failed> {
    let mut rng = rng(32);
    let memory = poisoned(gpu.workspace_bytes())?;
    // SAFETY: the memory outlives the session.
    let workspace = unsafe { gpu.workspace_in(span(&memory)) }?;
    let session = Session { workspace, ..Session::new(gpu)? };
    for [n, k] in [[64, 64], [200, 1000], [1, 1], [4096, 512]] {
        let layer = random_layer(&mut rng, n, k)?;
        let weights = layer.weights();
        let bytes = DeviceWeights::bytes_for(n, k, weights.group())?;
        let copied = poisoned(bytes)?;
        let filled = to_device(&weights.device_bytes()?)?;
        let bias = layer.bias().map(to_device).transpose()?;
        let smoothing = layer.smoothing().map(to_device).transpose()?;
        for memory in [&copied, &filled] {
            // SAFETY: the memory outlives the layer, and holds what it must.
            let on_device = unsafe {
                let weights = if std::ptr::eq(memory, &copied) {
                    gpu.upload_to(weights, span(memory))?
                } else {
                    gpu.weights_in(span(memory), [n, k], weights.group())?
                };
                gpu.linear_of(weights, bias.as_ref().map(span), smoothing.as_ref().map(span))?
            };
            for m in [1, 16, 100, 700] {
                check::<bf16, bf16>(gpu, &session, &mut rng, &layer, &on_device, m)?;
            }
            if on_device.weights().download()? != *weights {
                return Err("the weights have changed".into());
            }
        }
    }
    Ok(())
}

fn layers_share_quantized_activations(gpu: &'static Gpu) -> Result<(), Failed> {
    let mut rng = rng(33);
    let session = Session::new(gpu)?;
    let (m, k) = (37, 1024);
    let input: Vec<bf16> = random(&mut rng, m * k);
    let device_input = halves(&input)?;
    let layers: Vec<Linear> =
        [64, 300, 1000].into_iter().map(|n| Linear::new(random_weights(&mut rng, n, k))).collect();
    let on_device = layers.iter().map(|layer| gpu.upload_linear(layer)).collect::<Result<Vec<_>, _>>()?;
    let scratch = poisoned(on_device[0].scratch_bytes(m)?)?;
    let outputs = layers.iter().map(|layer| poisoned(m * layer.n() * 2)).collect::<Result<Vec<_>, _>>()?;
    let call = LinearInput::new(span(&device_input), HalfType::Bf16, m, k);
    // SAFETY: everything lives until the stream has been synchronized.
    unsafe {
        let quantized = on_device[0].quantize(gpu, &call, span(&scratch), &session.stream)?;
        for (layer, output) in on_device.iter().zip(&outputs) {
            let target = LinearOutput {
                output: span(output),
                output_stride: layer.n(),
                output_type: OutputType::Bf16,
            };
            layer.forward_quantized(gpu, &quantized, &target, &session.workspace, &session.stream)?;
        }
    }
    session.stream.synchronize()?;
    for (layer, output) in layers.iter().zip(&outputs) {
        let expected: Vec<bf16> = layer.forward(&QuantizeInput::new(&input, m, k), None)?;
        expect_values(output, &expected, || format!("n = {}", layer.n()))?;
    }
    Ok(())
}

fn bad_calls_leave_everything_untouched(gpu: &'static Gpu) -> Result<(), Failed> {
    let mut rng = rng(34);
    let session = Session::new(gpu)?;
    let (m, n, k) = (5, 64, 128);
    let layer = Linear::new(random_weights(&mut rng, n, k));
    let on_device = gpu.upload_linear(&layer)?;
    let input: Vec<bf16> = random(&mut rng, m * k);
    let device_input = halves(&input)?;
    let scratch = poisoned(on_device.scratch_bytes(m)? + 16)?;
    let output = poisoned(m * n * 2)?;
    let good = LinearInput::new(span(&device_input), HalfType::Bf16, m, k);
    let target = LinearOutput { output: span(&output), output_stride: n, output_type: OutputType::Bf16 };
    let part = |of: &DeviceBuffer<u8>, offset: u64, bytes: usize| {
        // SAFETY: all parts lie inside their buffers.
        unsafe { DeviceSpan::from_raw(span(of).address() + offset, bytes) }
    };
    let needed = on_device.scratch_bytes(m)?;
    let cases = [
        (good, target, part(&scratch, 0, needed - 1), "BufferTooSmall"),
        (good, target, part(&scratch, 2, needed), "Misaligned"),
        (LinearInput { m: m + 1, ..good }, target, span(&scratch), "BufferTooSmall"),
        (LinearInput { input_stride: k - 1, ..good }, target, span(&scratch), "RowStrideTooShort"),
        (
            good,
            LinearOutput { output: part(&output, 0, m * n * 2 - 1), ..target },
            span(&scratch),
            "BufferTooSmall",
        ),
        (good, LinearOutput { output_stride: n - 1, ..target }, span(&scratch), "OutputStrideTooShort"),
        (
            LinearInput { residual: Some(span(&device_input)), ..good },
            target,
            span(&scratch),
            "UnexpectedResidual",
        ),
    ];
    for (input, target, scratch, expected) in cases {
        // SAFETY: the call is refused before it launches anything.
        let outcome =
            unsafe { on_device.forward(gpu, &input, &target, scratch, &session.workspace, &session.stream) };
        match outcome {
            Err(error) if format!("{error:?}").contains(expected) => {}
            other => return Err(format!("{other:?} instead of {expected}").into()),
        }
    }
    let other = QuantizedSpan::in_scratch(span(&scratch), 1, 64)?;
    // SAFETY: as above.
    let outcome =
        unsafe { on_device.forward_quantized(gpu, &other, &target, &session.workspace, &session.stream) };
    if !matches!(outcome, Err(Error::KMismatch { .. })) {
        return Err(format!("{outcome:?} instead of KMismatch").into());
    }
    // SAFETY: nothing is launched without tokens.
    unsafe {
        let none = LinearInput { m: 0, ..good };
        on_device.forward(gpu, &none, &target, part(&scratch, 0, 0), &session.workspace, &session.stream)?;
    }
    session.stream.synchronize()?;
    for buffer in [&scratch, &output] {
        let mut bytes = vec![0; buffer.len()];
        buffer.copy_to(&mut bytes[..])?;
        if bytes.iter().any(|&byte| byte != 0xA5) {
            return Err("a refused call has written".into());
        }
    }
    let small = poisoned(gpu.workspace_bytes() - 1)?;
    // SAFETY: the memory is allocated.
    let outcome = unsafe { gpu.workspace_in(span(&small)) };
    if !matches!(outcome, Err(Error::Gpu(GpuError::BufferTooSmall { .. }))) {
        return Err("a workspace in too little memory".into());
    }
    // The GPU works as before.
    check::<bf16, bf16>(gpu, &session, &mut rng, &layer, &on_device, m)
}

/// The layers of a transformer block without its attention, whose place the values take.
struct Chain<L> {
    qkv: L,
    out: L,
    gate_up: L,
    down: L,
}

const HIDDEN: usize = 512;
const INNER: usize = 1408;
const TOKENS: usize = 19;

/// The buffers of a chain on the device.
struct Buffers {
    hidden: DeviceBuffer<u16>,
    residual: DeviceBuffer<u16>,
    norms: [DeviceBuffer<u16>; 2],
    wide: DeviceBuffer<u8>,
    narrow: DeviceBuffer<u8>,
    scratch: DeviceBuffer<u8>,
    workspace: Workspace,
}

/// Launches a chain: the input is copied to the residual, and the output of `down` is the result.
fn launch(
    gpu: &Gpu,
    session: &Session,
    chain: &Chain<DeviceLinear>,
    buffers: &Buffers,
) -> Result<(), Failed> {
    let stream = &session.stream;
    let bytes = TOKENS * HIDDEN * 2;
    let from = span(&buffers.hidden).address();
    let to = span(&buffers.residual).address();
    // SAFETY: source and destination have this many bytes.
    driver("cuMemcpyDtoDAsync", unsafe { sys::cuMemcpyDtoDAsync_v2(to, from, bytes, stream.as_inner()) })?;
    let norm = |index: usize| Operation::RmsNorm { weight: span(&buffers.norms[index]), epsilon: 1e-5 };
    let step = |layer: &DeviceLinear, input: &LinearInput, output: &DeviceBuffer<u8>| {
        let target =
            LinearOutput { output: span(output), output_stride: layer.n(), output_type: OutputType::Bf16 };
        // SAFETY: everything lives until the stream has been synchronized, which orders all launches.
        unsafe { layer.forward(gpu, input, &target, span(&buffers.scratch), &buffers.workspace, stream) }
    };
    let first = LinearInput {
        operation: norm(0),
        ..LinearInput::new(span(&buffers.hidden), HalfType::Bf16, TOKENS, HIDDEN)
    };
    step(&chain.qkv, &first, &buffers.wide)?;
    let attention = LinearInput {
        input_stride: 3 * HIDDEN,
        ..LinearInput::new(span(&buffers.wide), HalfType::Bf16, TOKENS, HIDDEN)
    };
    step(&chain.out, &attention, &buffers.narrow)?;
    let second = LinearInput {
        operation: norm(1),
        residual: Some(span(&buffers.residual)),
        ..LinearInput::new(span(&buffers.narrow), HalfType::Bf16, TOKENS, HIDDEN)
    };
    step(&chain.gate_up, &second, &buffers.wide)?;
    let gated = LinearInput {
        operation: Operation::Gated { gate: Gate::Silu, order: GateOrder::Halves },
        input_stride: 2 * INNER,
        ..LinearInput::new(span(&buffers.wide), HalfType::Bf16, TOKENS, INNER)
    };
    step(&chain.down, &gated, &buffers.narrow)?;
    Ok(())
}

fn a_captured_chain_gives_the_bits_of_eager_calls(gpu: &'static Gpu) -> Result<(), Failed> {
    let mut rng = rng(35);
    let session = Session::new(gpu)?;
    let mut layer = |n, k| Linear::new(random_weights(&mut rng, n, k));
    let chain = Chain {
        qkv: layer(3 * HIDDEN, HIDDEN),
        out: layer(HIDDEN, HIDDEN),
        gate_up: layer(2 * INNER, HIDDEN),
        down: layer(HIDDEN, INNER),
    };
    let hidden: Vec<bf16> = random(&mut rng, TOKENS * HIDDEN);
    let norms = [(); 2].map(|()| random::<bf16>(&mut rng, HIDDEN));

    // On the CPU.
    let mut residual = hidden.clone();
    let norm = |index: usize| Operation::RmsNorm { weight: &norms[index][..], epsilon: 1e-5 };
    let call = QuantizeInput { operation: norm(0), ..QuantizeInput::new(&hidden, TOKENS, HIDDEN) };
    let qkv: Vec<bf16> = chain.qkv.forward(&call, None)?;
    let call = QuantizeInput { input_stride: 3 * HIDDEN, ..QuantizeInput::new(&qkv, TOKENS, HIDDEN) };
    let out: Vec<bf16> = chain.out.forward(&call, None)?;
    let call = QuantizeInput { operation: norm(1), ..QuantizeInput::new(&out, TOKENS, HIDDEN) };
    let sum = Residual { data: &mut residual, stride: HIDDEN };
    let gate_up: Vec<bf16> = chain.gate_up.forward(&call, Some(sum))?;
    let operation = Operation::Gated { gate: Gate::Silu, order: GateOrder::Halves };
    let call =
        QuantizeInput { operation, input_stride: 2 * INNER, ..QuantizeInput::new(&gate_up, TOKENS, INNER) };
    let expected: Vec<bf16> = chain.down.forward(&call, None)?;

    let on_device = Chain {
        qkv: gpu.upload_linear(&chain.qkv)?,
        out: gpu.upload_linear(&chain.out)?,
        gate_up: gpu.upload_linear(&chain.gate_up)?,
        down: gpu.upload_linear(&chain.down)?,
    };
    let buffers = Buffers {
        hidden: halves(&hidden)?,
        residual: halves(&vec![bf16::NAN; TOKENS * HIDDEN])?,
        norms: [halves(&norms[0])?, halves(&norms[1])?],
        wide: poisoned(TOKENS * 2 * INNER * 2)?,
        narrow: poisoned(TOKENS * HIDDEN * 2)?,
        scratch: poisoned(on_device.down.scratch_bytes(TOKENS)?)?,
        workspace: gpu.workspace()?,
    };
    for layer in [&on_device.qkv, &on_device.out, &on_device.gate_up, &on_device.down] {
        let operation = Operation::Gated { gate: Gate::Silu, order: GateOrder::Halves };
        for operation in [
            Operation::Plain,
            operation,
            Operation::RmsNorm { weight: span(&buffers.norms[0]), epsilon: 0.0 },
        ] {
            layer.prepare(gpu, &operation, HalfType::Bf16, TOKENS..=TOKENS)?;
        }
    }
    // Captured before the first eager call, because `prepare` has compiled everything.
    let graph = Graph::capture(&session.stream, || launch(gpu, &session, &on_device, &buffers))?;
    launch(gpu, &session, &on_device, &buffers)?;
    session.stream.synchronize()?;
    expect_values(&buffers.narrow, &expected, || "eager".into())?;
    for replay in 0..10_000 {
        // SAFETY: all memory that the graph uses is alive.
        unsafe { graph.replay(&session.stream) }?;
        if replay % 500 == 499 {
            expect_values(&buffers.narrow, &expected, || format!("replay {replay}"))?;
        }
    }
    Ok(())
}
