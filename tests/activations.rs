//! Compares the GPU's quantization of activations with the CPU's, bit for bit:
//! operations, types, row lengths, strides, alignments, gathered rows, scales, and values that are not finite.

use cust::memory::{CopyDestination, DeviceBuffer};
use half::{bf16, f16};
use libtest_mimic::Failed;
use liquidgemm::cpu::{QuantizeInput, Residual};
use liquidgemm::gpu::{DeviceSpan, Gpu, LinearInput, QuantizeOperands};
use liquidgemm::{Gate, GateOrder, Gather, Half, Operation, Scaling, cpu};
use liquidgemm_gpu_tests::{Session, Test, rng, run, to_device};
use rand::rngs::StdRng;
use rand::{Rng, RngExt};

const TESTS: [Test; 8] = [
    ("every_gate_equals_the_cpu", every_gate_equals_the_cpu),
    ("rows_of_any_length_equal_the_cpu", rows_of_any_length_equal_the_cpu),
    ("random_calls_equal_the_cpu", random_calls_equal_the_cpu),
    ("long_rows_equal_the_cpu", long_rows_equal_the_cpu),
    ("values_that_are_not_finite_equal_the_cpu", values_that_are_not_finite_equal_the_cpu),
    ("values_of_any_magnitude_equal_the_cpu", values_of_any_magnitude_equal_the_cpu),
    ("ties_equal_the_cpu", ties_equal_the_cpu),
    ("many_rows_equal_the_cpu", many_rows_equal_the_cpu),
];

fn main() {
    run(&TESTS).exit();
}

/// The operations with their options, without vectors.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Plain,
    RmsNorm { residual: bool },
    LayerNorm { residual: bool, bias: bool },
    Gated(Gate, GateOrder),
}

const KINDS: [Kind; 10] = [
    Kind::Plain,
    Kind::RmsNorm { residual: false },
    Kind::RmsNorm { residual: true },
    Kind::LayerNorm { residual: false, bias: false },
    Kind::LayerNorm { residual: false, bias: true },
    Kind::LayerNorm { residual: true, bias: true },
    Kind::Gated(Gate::Silu, GateOrder::Halves),
    Kind::Gated(Gate::Silu, GateOrder::Interleaved),
    Kind::Gated(Gate::GeluTanh, GateOrder::Halves),
    Kind::Gated(Gate::GeluTanh, GateOrder::Interleaved),
];

/// Where scales come from, without vectors.
#[derive(Clone, Copy, Debug)]
enum Scales {
    PerToken,
    Static(f32),
    Given,
}

/// A call, without its data.
#[derive(Clone, Copy, Debug)]
struct Call {
    kind: Kind,
    m: usize,
    k: usize,
    /// Elements behind each row of input and residual.
    padding: usize,
    /// Elements by which input and parameters are displaced from an aligned address.
    shift: usize,
    gathers: bool,
    smooths: bool,
    scales: Scales,
    epsilon: f32,
}

impl Call {
    fn new(kind: Kind, m: usize, k: usize) -> Self {
        Self {
            kind,
            m,
            k,
            padding: 0,
            shift: 0,
            gathers: false,
            smooths: false,
            scales: Scales::PerToken,
            epsilon: 1e-5,
        }
    }

    fn random(rng: &mut StdRng) -> Self {
        let kind = KINDS[rng.random_range(0..KINDS.len())];
        let has_residual =
            matches!(kind, Kind::RmsNorm { residual: true } | Kind::LayerNorm { residual: true, .. });
        let k = match rng.random_range(0..5) {
            0 => rng.random_range(1..100),
            1 => rng.random_range(1..500) * 8,
            2 => rng.random_range(1..20_000),
            _ => rng.random_range(1..9000),
        };
        Self {
            m: rng.random_range(1..40),
            padding: if rng.random() { 0 } else { rng.random_range(0..20) },
            shift: if rng.random() { 0 } else { rng.random_range(0..8) },
            gathers: !has_residual && rng.random_range(0..3) == 0,
            smooths: rng.random_range(0..3) == 0,
            scales: match rng.random_range(0..4) {
                0 => Scales::Static(rng.random_range(0.001..0.1)),
                1 => Scales::Given,
                _ => Scales::PerToken,
            },
            epsilon: [0.0, 1e-6, 1e-5, 0.1][rng.random_range(0..4)],
            ..Self::new(kind, 0, k)
        }
    }

    /// Returns the elements of a row of the input.
    fn row(&self) -> usize {
        if matches!(self.kind, Kind::Gated(..)) { 2 * self.k } else { self.k }
    }
}

/// A vector on the device, `shift` elements behind an aligned address.
struct Shifted<T: bytemuck::Pod> {
    buffer: DeviceBuffer<u8>,
    shift: usize,
    length: usize,
    marker: std::marker::PhantomData<T>,
}

impl<T: bytemuck::Pod> Shifted<T> {
    fn new(values: &[T], shift: usize) -> Result<Self, Failed> {
        let mut bytes = vec![0xA5; shift * size_of::<T>()];
        bytes.extend_from_slice(bytemuck::cast_slice(values));
        bytes.extend_from_slice(&[0xA5; 64]);
        let marker = std::marker::PhantomData;
        Ok(Self { buffer: to_device(&bytes)?, shift, length: values.len(), marker })
    }

    fn span(&self) -> DeviceSpan {
        let all = DeviceSpan::from(&self.buffer);
        let bytes = self.length * size_of::<T>();
        // SAFETY: the span lies inside the buffer.
        unsafe { DeviceSpan::from_raw(all.address() + (self.shift * size_of::<T>()) as u64, bytes) }
    }

    /// Returns the values, and fails if the bytes around them have changed.
    fn values(&self) -> Result<Vec<T>, Failed> {
        let mut bytes = vec![0; self.buffer.len()];
        self.buffer.copy_to(&mut bytes[..])?;
        let (before, rest) = bytes.split_at(self.shift * size_of::<T>());
        let (values, behind) = rest.split_at(self.length * size_of::<T>());
        if before.iter().chain(behind).any(|&byte| byte != 0xA5) {
            return Err("wrote outside".into());
        }
        Ok(values.chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned).collect())
    }
}

/// Runs a call on random values and compares everything that it writes with the CPU's.
fn check<T: Half>(
    gpu: &Gpu,
    session: &Session,
    rng: &mut StdRng,
    call: Call,
    mut element: impl FnMut(&mut StdRng) -> f32,
) -> Result<(), Failed> {
    let Call { m, k, padding, shift, .. } = call;
    let mut some =
        |rng: &mut StdRng, count: usize| -> Vec<T> { (0..count).map(|_| T::round(element(rng))).collect() };
    let input_rows = if call.gathers { m / 2 + 1 } else { m };
    let input_stride = call.row() + padding;
    let residual_stride = k + padding;
    let input = some(rng, (input_rows - 1) * input_stride + call.row());
    let residual = some(rng, (m - 1) * residual_stride + k);
    let [weight, bias] =
        [0, 1].map(|_| -> Vec<T> { (0..k).map(|_| T::round(rng.random_range(-2.0..2.0f32))).collect() });
    let smoothing: Vec<f32> = (0..k).map(|_| rng.random_range(0.1..10.0f32)).collect();
    let given: Vec<f32> = (0..m).map(|_| rng.random_range(0.0..0.1f32)).collect();
    // One index in ten is out of range.
    let limit = input_rows as u32 * 11 / 10 + 1;
    let rows: Vec<u32> = (0..m).map(|_| rng.random_range(0..limit)).collect();

    let device_input = Shifted::new(&input, shift)?;
    let device_residual = Shifted::new(&residual, shift)?;
    let [device_weight, device_bias] = [&weight, &bias].map(|values| Shifted::new(values, shift));
    let (device_weight, device_bias) = (device_weight?, device_bias?);
    let device_smoothing = Shifted::new(&smoothing, shift)?;
    let (device_given, device_rows) = (Shifted::new(&given, 0)?, Shifted::new(&rows, 0)?);
    let code_stride = k.next_multiple_of(16) + if padding > 0 { 32 } else { 0 };
    let codes = Shifted::new(&vec![0x5Au8; m * code_stride], 16)?;
    let scales = Shifted::new(&vec![0xA5A5_A5A5u32; m], 1)?;

    let (epsilon, mut has_residual) = (call.epsilon, false);
    let (operation, on_device) = match call.kind {
        Kind::Plain => (Operation::Plain, Operation::Plain),
        Kind::Gated(gate, order) => (Operation::Gated { gate, order }, Operation::Gated { gate, order }),
        Kind::RmsNorm { residual } => {
            has_residual = residual;
            (
                Operation::RmsNorm { weight: &weight[..], epsilon },
                Operation::RmsNorm { weight: device_weight.span(), epsilon },
            )
        }
        Kind::LayerNorm { residual, bias: has_bias } => {
            has_residual = residual;
            let (bias, device_bias) = (has_bias.then_some(&bias[..]), has_bias.then(|| device_bias.span()));
            (
                Operation::LayerNorm { weight: &weight[..], bias, epsilon },
                Operation::LayerNorm { weight: device_weight.span(), bias: device_bias, epsilon },
            )
        }
    };
    let (scaling, device_scaling) = match call.scales {
        Scales::PerToken => (Scaling::PerToken, Scaling::PerToken),
        Scales::Static(scale) => (Scaling::Static(scale), Scaling::Static(scale)),
        Scales::Given => (Scaling::Given(&given[..]), Scaling::Given(device_given.span())),
    };
    let operands = QuantizeOperands {
        source: LinearInput {
            m,
            operation: on_device,
            input_type: T::HALF,
            input: device_input.span(),
            input_stride,
            gather: call.gathers.then(|| Gather { rows: device_rows.span(), input_rows }),
            residual: has_residual.then(|| device_residual.span()),
            residual_stride,
            scaling: device_scaling,
        },
        k,
        smoothing: call.smooths.then(|| device_smoothing.span()),
        codes: codes.span(),
        code_stride,
        scales: scales.span(),
    };
    // SAFETY: everything lives until the stream has been synchronized.
    unsafe { gpu.quantize(&operands, &session.stream) }?;
    session.stream.synchronize()?;

    let mut sum = residual.clone();
    let expected = cpu::quantize(
        &QuantizeInput {
            m,
            k,
            operation,
            input: &input,
            input_stride,
            gather: call.gathers.then(|| Gather { rows: &rows[..], input_rows }),
            smoothing: call.smooths.then_some(&smoothing[..]),
            scaling,
        },
        has_residual.then(|| Residual { data: &mut sum, stride: residual_stride }),
    )?;
    let fail = |what: &str| Err(format!("{what} differ: {}, {call:?}", T::HALF).into());
    if device_input.values()?.iter().zip(&input).any(|(a, b)| bits(a) != bits(b)) {
        return fail("inputs");
    }
    let written = device_residual.values()?;
    for (row, (found, expected)) in
        written.chunks(residual_stride).zip(sum.chunks(residual_stride)).enumerate()
    {
        if found.iter().zip(expected).any(|(a, b)| bits(a) != bits(b)) {
            return fail(&format!("residuals of row {row}"));
        }
    }
    for (row, (found, expected)) in scales.values()?.into_iter().zip(expected.scales()).enumerate() {
        if found != expected.to_bits() {
            let found = f32::from_bits(found);
            return fail(&format!("scales of row {row}, {found} and {expected},"));
        }
    }
    for (row, found) in codes.values()?.chunks(code_stride).enumerate() {
        let expected = &expected.data()[row * expected.stride()..][..expected.stride()];
        let (inside, behind) = found.split_at(expected.len());
        if let Some(at) = inside.iter().zip(expected).position(|(&a, &b)| a != b as u8) {
            let (found, expected) = (inside[at] as i8, expected[at]);
            return fail(&format!("codes of row {row} at {at}, {found} and {expected},"));
        }
        if behind.iter().any(|&byte| byte != 0x5A) {
            return fail(&format!("bytes behind row {row}"));
        }
    }
    Ok(())
}

fn bits<T: Half>(value: &T) -> &[u8] {
    bytemuck::bytes_of(value)
}

/// Runs a call with both element types.
fn check_both(
    gpu: &Gpu,
    session: &Session,
    rng: &mut StdRng,
    call: Call,
    element: impl FnMut(&mut StdRng) -> f32 + Copy,
) -> Result<(), Failed> {
    check::<bf16>(gpu, session, rng, call, element)?;
    check::<f16>(gpu, session, rng, call, element)
}

fn moderate(rng: &mut StdRng) -> f32 {
    // A sum of three is roughly normal; one in a hundred is an outlier.
    let value: f32 = (0..3).map(|_| rng.random_range(-1.0..1.0f32)).sum();
    if rng.random_range(0..100) == 0 { value * 30.0 } else { value }
}

/// A row has one element, so its scale is that of one gate and shows all bits of it.
fn every_gate_equals_the_cpu(gpu: &'static Gpu) -> Result<(), Failed> {
    fn check_all<T: Half>(gpu: &Gpu, session: &Session, from_bits: fn(u16) -> T) -> Result<(), Failed> {
        let m = 1 << 16;
        for gate in Gate::ALL {
            for up in [1.0f32, -1.484_375] {
                let input: Vec<T> = (0..=u16::MAX).flat_map(|bits| [from_bits(bits), T::round(up)]).collect();
                let operation = Operation::Gated { gate, order: GateOrder::Interleaved };
                let device_input = Shifted::new(&input, 0)?;
                let codes = Shifted::new(&vec![0u8; m * 16], 0)?;
                let scales = Shifted::new(&vec![0u32; m], 0)?;
                let operands = QuantizeOperands {
                    source: LinearInput {
                        operation: Operation::Gated { gate, order: GateOrder::Interleaved },
                        input_stride: 2,
                        ..LinearInput::new(device_input.span(), T::HALF, m, 1)
                    },
                    k: 1,
                    smoothing: None,
                    codes: codes.span(),
                    code_stride: 16,
                    scales: scales.span(),
                };
                // SAFETY: everything lives until the stream has been synchronized.
                unsafe { gpu.quantize(&operands, &session.stream) }?;
                session.stream.synchronize()?;
                let input = QuantizeInput { operation, input_stride: 2, ..QuantizeInput::new(&input, m, 1) };
                let expected = cpu::quantize(&input, None)?;
                let pairs = scales.values()?.into_iter().zip(expected.scales());
                for (bits, (found, expected)) in pairs.enumerate() {
                    if found != expected.to_bits() {
                        return Err(format!(
                            "{gate:?} of {} {bits:#06x}: {} instead of {expected}",
                            T::HALF,
                            f32::from_bits(found)
                        )
                        .into());
                    }
                }
            }
        }
        Ok(())
    }
    let session = Session::new(gpu)?;
    check_all(gpu, &session, bf16::from_bits)?;
    check_all(gpu, &session, f16::from_bits)
}

fn rows_of_any_length_equal_the_cpu(gpu: &'static Gpu) -> Result<(), Failed> {
    let mut rng = rng(21);
    let session = Session::new(gpu)?;
    for kind in KINDS {
        for border in [8, 16, 2048, 4096, 8192, 10_240, 16_384] {
            for k in [border - 1, border, border + 1, border + 8] {
                check_both(gpu, &session, &mut rng, Call::new(kind, 3, k), moderate)?;
            }
        }
    }
    Ok(())
}

fn random_calls_equal_the_cpu(gpu: &'static Gpu) -> Result<(), Failed> {
    let mut rng = rng(22);
    let session = Session::new(gpu)?;
    for _ in 0..400 {
        let call = Call::random(&mut rng);
        check_both(gpu, &session, &mut rng, call, moderate)?;
    }
    Ok(())
}

fn long_rows_equal_the_cpu(gpu: &'static Gpu) -> Result<(), Failed> {
    let mut rng = rng(23);
    let session = Session::new(gpu)?;
    for kind in KINDS {
        for k in [28_672, 32_767, 32_768, 32_776, 65_537, 131_072] {
            for (shift, smooths) in [(0, false), (1, true)] {
                let call = Call { shift, smooths, ..Call::new(kind, 2, k) };
                check_both(gpu, &session, &mut rng, call, moderate)?;
            }
        }
    }
    Ok(())
}

fn values_that_are_not_finite_equal_the_cpu(gpu: &'static Gpu) -> Result<(), Failed> {
    let mut rng = rng(24);
    let session = Session::new(gpu)?;
    for rarity in [3, 300, 3000] {
        for _ in 0..60 {
            let call = Call { m: 20, ..Call::random(&mut rng) };
            check_both(gpu, &session, &mut rng, call, |rng| match rng.random_range(0..rarity) {
                0 => [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][rng.random_range(0..3)],
                _ => moderate(rng),
            })?;
        }
    }
    Ok(())
}

/// Includes sums of squares and products that overflow, subnormal values, zeros, and rows of zeros.
fn values_of_any_magnitude_equal_the_cpu(gpu: &'static Gpu) -> Result<(), Failed> {
    let mut rng = rng(25);
    let session = Session::new(gpu)?;
    for _ in 0..150 {
        let call = Call::random(&mut rng);
        let (low, high) = (rng.random_range(-140.0..100.0f32), rng.random_range(1.0..60.0f32));
        check_both(gpu, &session, &mut rng, call, move |rng| {
            let magnitude = rng.random_range(low..low + high).exp2();
            [magnitude, -magnitude, 0.0][rng.random_range(0..3)]
        })?;
        check_both(gpu, &session, &mut rng, call, |_| 0.0)?;
        // Any bits.
        check::<bf16>(gpu, &session, &mut rng, call, |rng| f32::from_bits(rng.next_u32() & 0xFFFF_0000))?;
    }
    Ok(())
}

/// With a scale that is a power of two, many quotients lie exactly between two integers.
fn ties_equal_the_cpu(gpu: &'static Gpu) -> Result<(), Failed> {
    let mut rng = rng(26);
    let session = Session::new(gpu)?;
    for k in [1000, 4096, 12_000] {
        for scale in [0.25, 1.0, 2.0 / 3.0, 1e-40, 1e37] {
            let call = Call { scales: Scales::Static(scale), ..Call::new(Kind::Plain, 8, k) };
            check_both(gpu, &session, &mut rng, call, |rng| {
                scale * rng.random_range(-300..=300) as f32 / 2.0
            })?;
        }
        let call = Call::new(Kind::Plain, 8, k);
        check_both(gpu, &session, &mut rng, call, |rng| rng.random_range(-254..=254) as f32 / 2.0)?;
    }
    Ok(())
}

fn many_rows_equal_the_cpu(gpu: &'static Gpu) -> Result<(), Failed> {
    let mut rng = rng(27);
    let session = Session::new(gpu)?;
    for kind in KINDS {
        for [m, k] in [[3000, 512], [1000, 8], [700, 4096], [301, 9000], [150, 28_672], [67, 32_768]] {
            check_both(gpu, &session, &mut rng, Call::new(kind, m, k), moderate)?;
        }
        for [m, k] in [[400, 2056], [900, 1000], [99, 20_480]] {
            let has_residual =
                matches!(kind, Kind::RmsNorm { residual: true } | Kind::LayerNorm { residual: true, .. });
            let call = Call {
                gathers: !has_residual,
                smooths: true,
                padding: 24,
                scales: Scales::Given,
                ..Call::new(kind, m, k)
            };
            check_both(gpu, &session, &mut rng, call, |rng| match rng.random_range(0..30_000) {
                0 => f32::NAN,
                _ => moderate(rng),
            })?;
        }
    }
    Ok(())
}
