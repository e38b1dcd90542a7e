//! The shared parts of the GPU tests: finding the GPU, making random problems,
//! and checking every output byte of a GEMM.
//!
//! The expected results come from the CPU backend.
//! Without a GPU, every test is reported as ignored, and one line says why.

pub mod communicator;
pub mod graph;
pub mod grouped;
pub mod ranks;
pub mod refused;

use cust::memory::{CopyDestination, DeviceBuffer, DeviceCopy};
use cust::stream::{Stream, StreamFlags};
use libtest_mimic::{Arguments, Conclusion, Failed, Trial};
use liquidgemm::gpu::{DeviceSpan, Gpu, Operands, Workspace};
use liquidgemm::{
    ActivationsView, Group, Output, OutputType, PackedWeights, Plan, QuantizedActivations, cpu,
};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// A test: the property that it checks (its name), and its function.
pub type Test = (&'static str, fn(&'static Gpu) -> Result<(), Failed>);

/// Runs the tests on the GPU, or reports them all as ignored.
pub fn run(tests: &[Test]) -> Conclusion {
    let mut arguments = Arguments::from_args();
    // The driver ends a graph capture if another thread allocates or loads a kernel during it.
    arguments.test_threads.get_or_insert(1);
    let gpu: Option<&'static Gpu> = match Gpu::new() {
        Ok(gpu) => {
            eprintln!("on {}", gpu.description());
            Some(Box::leak(Box::new(gpu)))
        }
        Err(error) => {
            eprintln!("skipped: no GPU ({error})");
            None
        }
    };
    let trials = tests.iter().map(|&(name, test)| match gpu {
        Some(gpu) => Trial::test(name, move || {
            gpu.make_current()?;
            test(gpu)
        }),
        None => Trial::test(name, || Ok(())).with_ignored_flag(true),
    });
    libtest_mimic::run(&arguments, trials.collect())
}

/// A test that needs two GPUs.
pub type TestOfTwo = (&'static str, fn(&'static [Gpu; 2]) -> Result<(), Failed>);

/// Runs the tests on the first two GPUs, or reports them all as ignored if there are fewer.
pub fn run_on_two(tests: &[TestOfTwo]) -> Conclusion {
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert(1);
    let gpus: Option<&'static [Gpu; 2]> = match [Gpu::with_device(0), Gpu::with_device(1)] {
        [Ok(first), Ok(second)] => {
            eprintln!("on {} and {}", first.description(), second.description());
            Some(Box::leak(Box::new([first, second])))
        }
        [Err(error), _] | [_, Err(error)] => {
            eprintln!("skipped: these tests need two Hopper GPUs ({error})");
            None
        }
    };
    let trials = tests.iter().map(|&(name, test)| match gpus {
        Some(gpus) => Trial::test(name, move || test(gpus)),
        None => Trial::test(name, || Ok(())).with_ignored_flag(true),
    });
    libtest_mimic::run(&arguments, trials.collect())
}

/// Returns a random group size.
pub fn random_group(rng: &mut StdRng) -> Group {
    let groups = [Group::K(64), Group::K(64), Group::K(128), Group::K(192), Group::K(512), Group::Channel];
    groups[rng.random_range(0..groups.len())]
}

/// Returns random weights with a random group size. Codes and pairs span the format's whole range.
pub fn random_weights(rng: &mut StdRng, n: usize, k: usize) -> PackedWeights {
    let group = random_group(rng);
    random_weights_in_groups(rng, n, k, group)
}

/// Returns random weights with this group size. Codes and pairs span the format's whole range.
pub fn random_weights_in_groups(rng: &mut StdRng, n: usize, k: usize, group: Group) -> PackedWeights {
    let count = group.count(k).expect("a valid group");
    let codes: Vec<u8> = (0..n * k).map(|_| rng.random_range(0..16)).collect();
    let pairs: Vec<(u8, u8)> = (0..n * count)
        .map(|_| {
            let s = rng.random_range(1..=17u8);
            (s, rng.random_range(0..=(255 - 15 * s as u32) as u8))
        })
        .collect();
    let scales: Vec<f32> = (0..n).map(|_| rng.random_range(1e-4..1e-2f32)).collect();
    PackedWeights::pack(&codes, &pairs, scales, n, k, group).expect("valid weights")
}

/// Returns random activations with codes from -127 to 127.
pub fn random_activations(rng: &mut StdRng, m: usize, k: usize) -> QuantizedActivations {
    let codes: Vec<i8> = (0..m * k).map(|_| rng.random_range(-127..=127)).collect();
    let scales: Vec<f32> = (0..m).map(|_| rng.random_range(1e-4..1e-2f32)).collect();
    QuantizedActivations::from_parts(&codes, scales, m, k).expect("valid activations")
}

/// Returns a random bias of `n` values between -10 and 10.
pub fn random_bias(rng: &mut StdRng, n: usize) -> Vec<f32> {
    (0..n).map(|_| rng.random_range(-10.0..10.0f32)).collect()
}

/// Returns a random generator. Each test has a seed of its own.
pub fn rng(seed: u64) -> StdRng {
    StdRng::seed_from_u64(seed)
}

/// Copies values to a new device buffer and waits for the copy, so that any stream may use it.
pub fn to_device<T: DeviceCopy>(values: &[T]) -> Result<DeviceBuffer<T>, Failed> {
    let buffer = DeviceBuffer::from_slice(values)?;
    settle()?;
    Ok(buffer)
}

/// Copies values into an existing device buffer and waits for the copy.
pub fn refill<T: DeviceCopy>(buffer: &mut DeviceBuffer<T>, values: &[T]) -> Result<(), Failed> {
    buffer.copy_from(values)?;
    settle()
}

/// Waits for the default stream, on which `cust` copies.
///
/// Such a copy may return before its last bytes have arrived, and other streams do not wait for it.
fn settle() -> Result<(), Failed> {
    // SAFETY: null is the default stream, which always exists.
    graph::driver("cuStreamSynchronize", unsafe { cust::sys::cuStreamSynchronize(std::ptr::null_mut()) })
}

/// Fails unless the buffer holds exactly these values, bit for bit.
pub fn expect_values<T: Output>(
    buffer: &DeviceBuffer<u8>,
    expected: &[T],
    case: impl Fn() -> String,
) -> Result<(), Failed> {
    let mut bytes = vec![0; buffer.len()];
    buffer.copy_to(&mut bytes[..])?;
    let expected: &[u8] = bytemuck::cast_slice(expected);
    if bytes == expected {
        return Ok(());
    }
    let size = size_of::<T>();
    let differ = |(y, e): &(&[u8], &[u8])| y != e;
    let pairs = || bytes.chunks(size).zip(expected.chunks(size));
    let wrong = pairs().filter(differ).count();
    let first = pairs().position(|pair| differ(&pair));
    Err(format!("{wrong} wrong of {}, the first at {first:?}: {}", expected.len() / size, case()).into())
}

/// A problem with its operands on host and device.
pub struct Fixture {
    /// The weights on the host.
    pub weights: PackedWeights,
    /// The activations on the host.
    pub activations: QuantizedActivations,
    /// The bias on the host.
    pub bias: Vec<f32>,
    /// The weights on the device.
    pub device_weights: liquidgemm::gpu::DeviceWeights,
    /// The activations' int8 codes on the device.
    pub codes: DeviceBuffer<i8>,
    /// The activations' scales on the device, one f32 a token.
    pub scales: DeviceBuffer<f32>,
    /// The bias on the device.
    pub device_bias: DeviceBuffer<f32>,
}

impl Fixture {
    /// Returns a random problem of this shape.
    pub fn random(gpu: &Gpu, rng: &mut StdRng, [m, n, k]: [usize; 3]) -> Result<Self, Failed> {
        let weights = random_weights(rng, n, k);
        let activations = random_activations(rng, m, k);
        let bias = random_bias(rng, n);
        Ok(Self {
            device_weights: gpu.upload(&weights)?,
            codes: to_device(activations.data())?,
            scales: to_device(activations.scales())?,
            device_bias: to_device(&bias)?,
            weights,
            activations,
            bias,
        })
    }

    /// Returns `[m, n, k]`.
    pub fn shape(&self) -> [usize; 3] {
        [self.activations.m(), self.weights.n(), self.weights.k()]
    }

    /// Returns the CPU's result, `[m, n]`.
    pub fn expected<T: Output>(&self, with_bias: bool) -> Result<Vec<T>, Failed> {
        let [m, n, _] = self.shape();
        let mut expected: Vec<T> = vec![bytemuck::Zeroable::zeroed(); m * n];
        let bias = with_bias.then_some(&self.bias[..]);
        cpu::gemm(&self.weights, ActivationsView::from(&self.activations), bias, &mut expected)?;
        Ok(expected)
    }

    /// Returns the operands of a call that writes into `output`.
    /// The output's rows are `output_stride` elements apart.
    pub fn operands(
        &self,
        output: DeviceSpan,
        output_stride: usize,
        output_type: OutputType,
        bias: bool,
    ) -> Operands {
        Operands {
            m: self.activations.m(),
            activations: (&self.codes).into(),
            activation_stride: self.activations.stride(),
            token_scales: (&self.scales).into(),
            bias: bias.then(|| (&self.device_bias).into()),
            output,
            output_stride,
            output_type,
        }
    }

    /// Runs the plan and compares every byte of a poisoned output buffer.
    ///
    /// The result must equal the CPU's bits.
    /// The `padding` elements behind each row and the guard zones on both sides must still hold the poison.
    pub fn check<T: Output>(
        &self,
        gpu: &Gpu,
        session: &Session,
        plan: &Plan,
        with_bias: bool,
        padding: usize,
    ) -> Result<(), Failed> {
        self.check_launch::<T, _>(session, plan, with_bias, padding, |operands| {
            let (workspace, stream) = (&session.workspace, &session.stream);
            // SAFETY: all operands stay alive until `check_launch` has synchronized the stream,
            // and only this session's stream uses the workspace.
            unsafe { gpu.gemm_with_plan(&self.device_weights, operands, plan, workspace, stream) }
        })
    }

    /// Checks any launch that `launch` puts on the session's stream, as [`check`](Self::check) does.
    pub fn check_launch<T: Output, E: std::fmt::Display>(
        &self,
        session: &Session,
        plan: &Plan,
        with_bias: bool,
        padding: usize,
        launch: impl FnOnce(&Operands) -> Result<(), E>,
    ) -> Result<(), Failed> {
        const POISON: u8 = 0xA5;
        const GUARD: usize = 4096;
        let [m, n, k] = self.shape();
        let stride = n + padding;
        let size = size_of::<T>();
        let length = ((m - 1) * stride + n) * size;
        let output = to_device(&vec![POISON; length + 2 * GUARD])?;
        let inside = DeviceSpan::from(&output);
        // SAFETY: the span lies inside the buffer, between the guard zones.
        let inside = unsafe { DeviceSpan::from_raw(inside.address() + GUARD as u64, length) };
        let operands = self.operands(inside, stride, T::TYPE, with_bias);
        launch(&operands)?;
        session.stream.synchronize()?;

        let mut bytes = vec![0; length + 2 * GUARD];
        output.copy_to(&mut bytes[..])?;
        let expected = self.expected::<T>(with_bias)?;
        let case =
            || format!("m = {m}, n = {n}, k = {k}, {}, bias {with_bias}, stride {stride}, {plan}", T::TYPE);
        let intact = |bytes: &[u8]| bytes.iter().all(|&byte| byte == POISON);
        if !intact(&bytes[..GUARD]) || !intact(&bytes[GUARD + length..]) {
            return Err(format!("wrote outside the output: {}", case()).into());
        }
        for (token, expected) in expected.chunks_exact(n).enumerate() {
            let row = &bytes[GUARD + token * stride * size..];
            let (row, gap) =
                (&row[..n * size], &row[n * size..][..if token + 1 < m { padding * size } else { 0 }]);
            let expected: &[u8] = bytemuck::cast_slice(expected);
            if row != expected {
                let channel =
                    row.chunks(size).zip(expected.chunks(size)).position(|(y, e)| y != e).unwrap_or(0);
                let wrong = row.chunks(size).zip(expected.chunks(size)).filter(|(y, e)| y != e).count();
                let (y, e) = (&row[channel * size..][..size], &expected[channel * size..][..size]);
                return Err(format!(
                    "token {token}: {wrong} wrong of {n}, first channel {channel}: {y:02x?} instead of {e:02x?}; {}",
                    case()
                )
                .into());
            }
            if !intact(gap) {
                return Err(format!("wrote between rows, after token {token}: {}", case()).into());
            }
        }
        Ok(())
    }

    /// Calls [`check`](Self::check) with the output type given as a value. Int32 output gets no bias.
    pub fn check_type(
        &self,
        gpu: &Gpu,
        session: &Session,
        plan: &Plan,
        output_type: OutputType,
        with_bias: bool,
        padding: usize,
    ) -> Result<(), Failed> {
        match output_type {
            OutputType::Bf16 => self.check::<half::bf16>(gpu, session, plan, with_bias, padding),
            OutputType::F16 => self.check::<half::f16>(gpu, session, plan, with_bias, padding),
            OutputType::F32 => self.check::<f32>(gpu, session, plan, with_bias, padding),
            OutputType::I32 => self.check::<i32>(gpu, session, plan, false, padding),
        }
    }
}

/// A stream and the workspace of its launches.
pub struct Session {
    /// The stream of all launches.
    pub stream: Stream,
    /// The workspace, used on this stream only.
    pub workspace: Workspace,
}

impl Session {
    /// Creates a stream with a workspace of its own.
    pub fn new(gpu: &Gpu) -> Result<Self, Failed> {
        Ok(Self { stream: Stream::new(StreamFlags::NON_BLOCKING, None)?, workspace: gpu.workspace()? })
    }
}
