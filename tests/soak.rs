//! Mixed operations of random shapes on several streams and threads, for as long as asked for.
//! Every result is compared with the CPU's, bit for bit.
//!
//! It runs for five seconds. `LIQUIDGEMM_SOAK_SECONDS=600 cargo xtask gpu-test` runs it for ten minutes.

use std::time::{Duration, Instant};

use cust::memory::DeviceBuffer;
use cust::sys;
use half::bf16;
use libtest_mimic::Failed;
use liquidgemm::cpu::QuantizeInput;
use liquidgemm::gpu::{DeviceLinear, DeviceSpan, Gpu, LinearInput, LinearOutput, StreamHandle};
use liquidgemm::{Gate, GateOrder, Half, HalfType, Linear, Operation, OutputType};
use liquidgemm_gpu_tests::graph::driver;
use liquidgemm_gpu_tests::grouped::{GroupedFixture, Index};
use liquidgemm_gpu_tests::{
    Fixture, Session, Test, expect_values, random_bias, random_weights, rng, run, to_device,
};
use rand::RngExt;
use rand::rngs::StdRng;

const TESTS: [Test; 1] =
    [("mixed_operations_on_many_streams_stay_right", mixed_operations_on_many_streams_stay_right)];

/// Threads, each with a stream and jobs of its own.
const THREADS: u64 = 4;
/// Jobs of a thread.
const JOBS: usize = 12;
/// The most launches between two checks.
const MOST_LAUNCHES: usize = 30;

fn main() {
    run(&TESTS).exit();
}

/// What a job launches.
enum Work {
    Gemm(Fixture),
    Linear { layer: DeviceLinear, input: DeviceBuffer<u16>, scratch: DeviceBuffer<u8>, m: usize, gated: bool },
    Grouped { fixture: GroupedFixture, index: Index, device_index: DeviceBuffer<i32> },
}

/// A call with its result.
struct Job {
    work: Work,
    output: DeviceBuffer<u8>,
    expected: Vec<bf16>,
    name: String,
}

impl Job {
    fn new(gpu: &Gpu, rng: &mut StdRng, kind: usize) -> Result<Self, Failed> {
        let [m, n, k] = [
            if rng.random() { rng.random_range(1..40) } else { rng.random_range(1..700) },
            rng.random_range(1..900),
            rng.random_range(1..1500),
        ];
        let (work, expected, name) = match kind % 3 {
            0 => {
                let fixture = Fixture::random(gpu, rng, [m, n, k])?;
                let expected = fixture.expected::<bf16>(true)?;
                (Work::Gemm(fixture), expected, "gemm")
            }
            1 => {
                let gated = rng.random();
                let row = if gated { 2 * k } else { k };
                let layer = Linear::new(random_weights(rng, n, k)).with_bias(random_bias(rng, n))?;
                let input: Vec<bf16> =
                    (0..m * row).map(|_| bf16::round(rng.random_range(-4.0..4.0f32))).collect();
                let call = QuantizeInput {
                    operation: operation(gated),
                    input_stride: row,
                    ..QuantizeInput::new(&input, m, k)
                };
                let expected: Vec<bf16> = layer.forward(&call, None)?;
                let layer = gpu.upload_linear(&layer)?;
                let scratch = to_device(&vec![0xA5u8; layer.scratch_bytes(m)?])?;
                let input = to_device(bytemuck::cast_slice::<bf16, u16>(&input))?;
                (Work::Linear { layer, input, scratch, m, gated }, expected, "linear")
            }
            _ => {
                let experts = rng.random_range(1..20);
                let mut counts = vec![0; experts];
                (0..m).for_each(|_| counts[rng.random_range(0..experts)] += 1);
                let fixture = GroupedFixture::random(gpu, rng, experts, [m, n, k])?;
                let index = Index::of_counts(&counts);
                let (rows, _) = fixture.expected::<bf16>(&index, true)?;
                let device_index = to_device(index.values())?;
                let expected = rows.into_iter().flatten().flatten().collect();
                (Work::Grouped { fixture, index, device_index }, expected, "grouped")
            }
        };
        let output = to_device(&vec![0xA5u8; m * n * 2])?;
        Ok(Self { work, output, expected, name: format!("{name} m = {m}, n = {n}, k = {k}") })
    }

    /// Poisons the output and launches the job.
    fn launch(&self, gpu: &Gpu, session: &Session) -> Result<(), Failed> {
        let output = DeviceSpan::from(&self.output);
        let (stream, workspace) = (StreamHandle::from(&session.stream), &session.workspace);
        // SAFETY: everything lives until the stream has been synchronized, and only this stream uses it.
        unsafe {
            driver(
                "cuMemsetD8Async",
                sys::cuMemsetD8Async(output.address(), 0xA5, output.bytes(), stream.as_raw().cast()),
            )?;
            match &self.work {
                Work::Gemm(fixture) => {
                    let operands = fixture.operands(output, fixture.shape()[1], OutputType::Bf16, true);
                    gpu.gemm(&fixture.device_weights, &operands, workspace, stream)?;
                }
                Work::Linear { layer, input, scratch, m, gated } => {
                    let row = if *gated { 2 * layer.k() } else { layer.k() };
                    let input = LinearInput {
                        operation: operation(*gated),
                        input_stride: row,
                        ..LinearInput::new(input.into(), HalfType::Bf16, *m, layer.k())
                    };
                    let target =
                        LinearOutput { output, output_stride: layer.n(), output_type: OutputType::Bf16 };
                    layer.forward(gpu, &input, &target, scratch.into(), workspace, stream)?;
                }
                Work::Grouped { fixture, index, device_index } => {
                    let n = fixture.device_experts.n();
                    let operands = fixture.operands(index, device_index, output, n, OutputType::Bf16, true);
                    gpu.grouped_gemm(&fixture.device_experts, &operands, stream)?;
                }
            }
        }
        Ok(())
    }
}

fn operation<V>(gated: bool) -> Operation<V> {
    if gated {
        Operation::Gated { gate: Gate::GeluTanh, order: GateOrder::Interleaved }
    } else {
        Operation::Plain
    }
}

fn mixed_operations_on_many_streams_stay_right(gpu: &'static Gpu) -> Result<(), Failed> {
    let seconds = match std::env::var("LIQUIDGEMM_SOAK_SECONDS") {
        Ok(text) => text.parse().map_err(|_| format!("LIQUIDGEMM_SOAK_SECONDS is {text:?}, not a number"))?,
        Err(_) => 5,
    };
    let counts: Vec<Result<u64, String>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|thread| {
                scope.spawn(move || {
                    soak(gpu, thread, seconds)
                        .map_err(|failed| failed.message().unwrap_or("failed").to_owned())
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|_| Err("a thread panicked".into())))
            .collect()
    });
    let launches: u64 = counts.into_iter().sum::<Result<_, _>>()?;
    eprintln!("{launches} launches on {THREADS} streams in {seconds} s");
    Ok(())
}

/// Launches random jobs of one thread, and checks the results. Returns the number of launches.
fn soak(gpu: &Gpu, thread: u64, seconds: u64) -> Result<u64, Failed> {
    gpu.make_current()?;
    let mut rng = rng(1000 + thread);
    let session = Session::new(gpu)?;
    let jobs: Vec<Job> = (0..JOBS).map(|kind| Job::new(gpu, &mut rng, kind)).collect::<Result<_, _>>()?;
    let begin = Instant::now();
    let mut launches = 0;
    while begin.elapsed() < Duration::from_secs(seconds) {
        let mut launched = [false; JOBS];
        for _ in 0..rng.random_range(1..MOST_LAUNCHES) {
            let job = rng.random_range(0..JOBS);
            jobs[job].launch(gpu, &session)?;
            launched[job] = true;
            launches += 1;
        }
        session.stream.synchronize()?;
        for (job, _) in jobs.iter().zip(launched).filter(|(_, launched)| *launched) {
            expect_values(&job.output, &job.expected, || format!("{} after {launches} launches", job.name))?;
        }
    }
    Ok(launches)
}
