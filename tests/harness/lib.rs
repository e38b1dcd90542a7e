//! What the GPU tests share: finding the GPU, random problems, and running one with every byte accounted for.
//!
//! Without a GPU every test is reported as ignored, and a line says that they were skipped and why.

pub mod graph;
pub mod refused;

use cust::memory::{CopyDestination, DeviceBuffer, DeviceCopy};
use cust::stream::{Stream, StreamFlags};
use libtest_mimic::{Arguments, Conclusion, Failed, Trial};
use liquidgemm::gpu::{DeviceSpan, Gpu, Operands, Workspace};
use liquidgemm::{
    ActivationsView, Error, Group, Output, OutputType, PackedWeights, Plan, QuantizedActivations, cpu,
};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// A test: its name says the property that it checks.
pub type Test = (&'static str, fn(&'static Gpu) -> Result<(), Failed>);

/// Runs the tests on the GPU, or reports them all as ignored.
pub fn run(tests: &[Test]) -> Conclusion {
    let mut arguments = Arguments::from_args();
    // The driver ends a graph's capture when other threads allocate or load kernels meanwhile.
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

/// Random weights with codes and pairs over the whole range that the format allows, in groups of a random size.
pub fn random_weights(rng: &mut StdRng, n: usize, k: usize) -> PackedWeights {
    let groups = [Group::K(64), Group::K(64), Group::K(128), Group::K(192), Group::K(512), Group::Channel];
    let group = groups[rng.random_range(0..groups.len())];
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

/// Random activations over the whole int8 range that the format allows.
pub fn random_activations(rng: &mut StdRng, m: usize, k: usize) -> QuantizedActivations {
    let codes: Vec<i8> = (0..m * k).map(|_| rng.random_range(-127..=127)).collect();
    let scales: Vec<f32> = (0..m).map(|_| rng.random_range(1e-4..1e-2f32)).collect();
    QuantizedActivations::from_parts(&codes, scales, m, k).expect("valid activations")
}

/// A random bias.
pub fn random_bias(rng: &mut StdRng, n: usize) -> Vec<f32> {
    (0..n).map(|_| rng.random_range(-10.0..10.0f32)).collect()
}

/// A seeded generator: each test names its own seed.
pub fn rng(seed: u64) -> StdRng {
    StdRng::seed_from_u64(seed)
}

/// Copies to a new buffer on the device and waits until all of it is there, so that any stream may use it.
pub fn to_device<T: DeviceCopy>(values: &[T]) -> Result<DeviceBuffer<T>, Failed> {
    let buffer = DeviceBuffer::from_slice(values)?;
    settle()?;
    Ok(buffer)
}

/// Copies other values into a buffer and waits, as [`to_device`] does.
pub fn refill<T: DeviceCopy>(buffer: &mut DeviceBuffer<T>, values: &[T]) -> Result<(), Failed> {
    buffer.copy_from(values)?;
    settle()
}

/// Waits for the default stream, on which `cust` copies: such a copy may return while its last piece is still under way,
/// and other streams do not wait for it.
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
pub struct Problem {
    /// The weights on the host.
    pub weights: PackedWeights,
    /// The activations on the host.
    pub activations: QuantizedActivations,
    /// The bias on the host.
    pub bias: Vec<f32>,
    /// The weights on the device.
    pub device_weights: liquidgemm::gpu::DeviceWeights,
    /// The activations' codes on the device.
    pub codes: DeviceBuffer<i8>,
    /// Their scales on the device.
    pub scales: DeviceBuffer<f32>,
    /// The bias on the device.
    pub device_bias: DeviceBuffer<f32>,
}

impl Problem {
    /// A random problem of this shape.
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

    /// `[m, n, k]`.
    pub fn shape(&self) -> [usize; 3] {
        [self.activations.m(), self.weights.n(), self.weights.k()]
    }

    /// The CPU's result.
    pub fn expected<T: Output>(&self, with_bias: bool) -> Result<Vec<T>, Failed> {
        let [m, n, _] = self.shape();
        let mut expected: Vec<T> = vec![bytemuck::Zeroable::zeroed(); m * n];
        let bias = with_bias.then_some(&self.bias[..]);
        cpu::gemm(&self.weights, ActivationsView::from(&self.activations), bias, &mut expected)?;
        Ok(expected)
    }

    /// The operands of a call that writes `output_stride` elements a row into `output`.
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

    /// Runs the plan into a poisoned output with a padded stride and a guard zone on both sides, and compares every
    /// byte: the result with the CPU's bits, everything else with the poison.
    pub fn check<T: Output>(
        &self,
        gpu: &Gpu,
        session: &Session,
        plan: &Plan,
        with_bias: bool,
        padding: usize,
    ) -> Result<(), Failed> {
        self.check_launch::<T>(session, plan, with_bias, padding, |operands| {
            let (workspace, stream) = (&session.workspace, &session.stream);
            // SAFETY: everything lives until `check_launch` has waited for the stream, and the workspace is the session's.
            unsafe { gpu.gemm_with_plan(&self.device_weights, operands, plan, workspace, stream) }
        })
    }

    /// As [`check`](Self::check), for whatever `launch` puts on the session's stream.
    pub fn check_launch<T: Output>(
        &self,
        session: &Session,
        plan: &Plan,
        with_bias: bool,
        padding: usize,
        launch: impl FnOnce(&Operands) -> Result<(), Error>,
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

    /// [`check`](Self::check) for an output type given as a value.
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

/// A stream and its workspace.
pub struct Session {
    /// Where the launches go.
    pub stream: Stream,
    /// Their workspace.
    pub workspace: Workspace,
}

impl Session {
    /// A new stream with a workspace of its own.
    pub fn new(gpu: &Gpu) -> Result<Self, Failed> {
        Ok(Self { stream: Stream::new(StreamFlags::NON_BLOCKING, None)?, workspace: gpu.workspace()? })
    }
}
