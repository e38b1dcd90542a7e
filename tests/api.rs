//! The library's public calls on a GPU:
//! on host memory, on the caller's context and streams, and from many threads.
//!
//! The expected results come from the CPU backend.

use std::thread;

use cust::stream::{Stream, StreamFlags};
use half::{bf16, f16};
use libtest_mimic::Failed;
use liquidgemm::gpu::{DeviceSpan, Gpu, Operands, StreamHandle};
use liquidgemm::{ActivationsView, Backend, Error, Group, Output, OutputType, PackedWeights, Problem, cpu};
use liquidgemm_gpu_tests::{
    Fixture, Session, Test, expect_values, random_activations, random_bias, random_weights, refill, rng, run,
    to_device,
};

const TESTS: [Test; 10] = [
    ("multiply_gives_the_cpus_bits_in_every_type", multiply_gives_the_cpus_bits_in_every_type),
    ("multiply_takes_rows_at_any_stride", multiply_takes_rows_at_any_stride),
    ("multiply_refuses_what_the_cpu_refuses", multiply_refuses_what_the_cpu_refuses),
    ("weights_come_back_as_they_went_up", weights_come_back_as_they_went_up),
    ("the_automatic_backend_is_the_gpu", the_automatic_backend_is_the_gpu),
    ("a_gpu_can_be_made_of_the_current_context", a_gpu_can_be_made_of_the_current_context),
    ("two_gpu_values_work_side_by_side", two_gpu_values_work_side_by_side),
    ("threads_with_a_stream_each_do_not_disturb_one_another", threads_with_a_stream_each),
    ("one_gpu_value_serves_many_threads", one_gpu_value_serves_many_threads),
    ("spans_and_streams_of_another_framework_work", spans_and_streams_of_another_framework_work),
];

fn main() {
    run(&TESTS).exit();
}

fn check(holds: bool, otherwise: impl FnOnce() -> String) -> Result<(), Failed> {
    if holds { Ok(()) } else { Err(otherwise().into()) }
}

/// Compares `gpu.multiply` with the CPU for one random problem.
fn check_multiply<T: Output>(gpu: &Gpu, seed: u64, [m, n, k]: [usize; 3], bias: bool) -> Result<(), Failed> {
    let mut rng = rng(seed);
    let weights = random_weights(&mut rng, n, k);
    let x = random_activations(&mut rng, m, k);
    let bias = bias.then(|| random_bias(&mut rng, n));
    let mut expected: Vec<T> = vec![bytemuck::Zeroable::zeroed(); m * n];
    cpu::gemm(&weights, &x, bias.as_deref(), &mut expected)?;
    let y = gpu.multiply::<T>(&weights, &x, bias.as_deref())?;
    check(y == expected, || format!("[{m}, {n}, {k}] {} differs from the CPU", T::TYPE))
}

fn multiply_gives_the_cpus_bits_in_every_type(gpu: &'static Gpu) -> Result<(), Failed> {
    for (seed, shape) in [(31, [1, 1, 1]), (32, [3, 65, 100]), (33, [70, 300, 777]), (34, [257, 129, 4096])] {
        for bias in [false, true] {
            check_multiply::<bf16>(gpu, seed, shape, bias)?;
            check_multiply::<f16>(gpu, seed, shape, bias)?;
            check_multiply::<f32>(gpu, seed, shape, bias)?;
        }
        check_multiply::<i32>(gpu, seed, shape, false)?;
    }
    Ok(())
}

fn multiply_takes_rows_at_any_stride(gpu: &'static Gpu) -> Result<(), Failed> {
    let mut rng = rng(35);
    let (m, n, k) = (9, 100, 130);
    let weights = random_weights(&mut rng, n, k);
    let x = random_activations(&mut rng, m, k);
    for stride in [k, k + 1, 144, 300] {
        // Fill the gaps between the rows with −128, which must not be read.
        let mut data = vec![i8::MIN; (m - 1) * stride + k];
        for (token, row) in data.chunks_mut(stride).enumerate() {
            row[..k].copy_from_slice(x.row(token));
        }
        let view = ActivationsView::new(&data, stride, x.scales(), m, k)?;
        let mut expected = vec![0f32; m * n];
        cpu::gemm(&weights, view, None, &mut expected)?;
        let y = gpu.multiply::<f32>(&weights, view, None)?;
        check(y == expected, || format!("stride {stride} differs from the CPU"))?;
    }
    Ok(())
}

fn multiply_refuses_what_the_cpu_refuses(gpu: &'static Gpu) -> Result<(), Failed> {
    let mut rng = rng(36);
    let (m, n, k) = (2, 70, 100);
    let weights = random_weights(&mut rng, n, k);
    let x = random_activations(&mut rng, m, k);
    let longer = random_activations(&mut rng, m, k + 1);
    let mut nan = vec![0.0; n];
    nan[7] = f32::NAN;
    let outcome = gpu.multiply::<f32>(&weights, &longer, None);
    check(matches!(outcome, Err(Error::KMismatch { weights: 100, activations: 101 })), || {
        format!("{outcome:?}")
    })?;
    let outcome = gpu.multiply::<f32>(&weights, &x, Some(&[0.0; 69]));
    check(
        matches!(outcome, Err(Error::ShapeMismatch { what: "bias", expected: 70, actual: 69, .. })),
        || format!("{outcome:?}"),
    )?;
    let outcome = gpu.multiply::<f32>(&weights, &x, Some(&nan));
    check(matches!(outcome, Err(Error::NonFiniteParameter { what: "bias", index: 7, .. })), || {
        format!("{outcome:?}")
    })?;
    let outcome = gpu.multiply::<i32>(&weights, &x, Some(&[0.0; 70]));
    check(matches!(outcome, Err(Error::BiasWithRawOutput)), || format!("{outcome:?}"))
}

fn weights_come_back_as_they_went_up(gpu: &'static Gpu) -> Result<(), Failed> {
    for (n, k) in [(1, 1), (64, 64), (65, 130), (300, 1000)] {
        for group in [Group::K(64), Group::K(128), Group::Channel] {
            let values: Vec<f32> = (0..n * k).map(|i| (i as f32 * 0.37).sin()).collect();
            let weights = PackedWeights::quantize(&values, n, k, group)?;
            let device = gpu.upload(&weights)?;
            let same_shape = (device.n(), device.k(), device.group()) == (n, k, group);
            check(same_shape && device.bytes() >= weights.bytes(), || format!("{device:?}"))?;
            check(device.download()? == weights, || format!("[{n}, {k}], group {group} came back changed"))?;
        }
    }
    Ok(())
}

fn the_automatic_backend_is_the_gpu(gpu: &'static Gpu) -> Result<(), Failed> {
    let mut rng = rng(37);
    let (m, n, k) = (5, 200, 300);
    let weights = random_weights(&mut rng, n, k);
    let x = random_activations(&mut rng, m, k);
    let expected = Backend::cpu().multiply::<bf16>(&weights, &x, None)?;
    for backend in [Backend::auto(), Backend::gpu()?] {
        let chosen = backend.as_gpu().map(Gpu::description);
        check(chosen == Some(gpu.description()), || format!("{backend} because {}", backend.reason()))?;
        check(backend.multiply::<bf16>(&weights, &x, None)? == expected, || format!("{backend} differs"))?;
    }
    Ok(())
}

fn a_gpu_can_be_made_of_the_current_context(gpu: &'static Gpu) -> Result<(), Failed> {
    gpu.make_current()?;
    let current = Gpu::from_current_context()?;
    check(current.description() == gpu.description(), || current.description())?;
    check_multiply::<f32>(&current, 38, [4, 150, 500], true)?;
    drop(current);
    // Dropping the value must not end the context, which it does not own.
    check_multiply::<f32>(gpu, 39, [4, 150, 500], true)
}

fn two_gpu_values_work_side_by_side(gpu: &'static Gpu) -> Result<(), Failed> {
    let other = Gpu::new()?;
    let weights = random_weights(&mut rng(40), 300, 1024);
    let uploaded = other.upload(&weights)?;
    let x = random_activations(&mut rng(41), 6, 1024);
    let mut expected = vec![0f32; 6 * 300];
    cpu::gemm(&weights, &x, None, &mut expected)?;
    // Both use the same primary context, so either can use the other's weights.
    for value in [&other, gpu, &other] {
        let y = value.multiply_with::<f32>(&uploaded, &x, None)?;
        check(y == expected, || "the values differ".into())?;
    }
    drop(other);
    check(uploaded.download()? == weights, || "dropping a Gpu took weights with it".into())?;
    check_multiply::<bf16>(gpu, 42, [20, 300, 1024], true)
}

fn threads_with_a_stream_each(gpu: &'static Gpu) -> Result<(), Failed> {
    let work = |seed: u64| -> Result<(), Failed> {
        gpu.make_current()?;
        let mut rng = rng(seed);
        let session = Session::new(gpu)?;
        for shape in [[1, 700, 4096], [16, 2048, 2048], [100, 300, 1000]] {
            let problem = Fixture::random(gpu, &mut rng, shape)?;
            let [m, n, k] = shape;
            let plan = gpu.plan(Problem { m, n, k })?;
            for _ in 0..10 {
                problem.check_type(gpu, &session, &plan, OutputType::Bf16, true, 0)?;
            }
        }
        Ok(())
    };
    in_threads(6, |index| work(50 + index))
}

fn one_gpu_value_serves_many_threads(gpu: &'static Gpu) -> Result<(), Failed> {
    in_threads(6, |index| {
        (0..5).try_for_each(|_| check_multiply::<f32>(gpu, 60 + index, [10, 500, 2000], true))
    })
}

/// Runs `work` in `count` threads at once and returns the first failure, if any.
fn in_threads(count: u64, work: impl Fn(u64) -> Result<(), Failed> + Sync) -> Result<(), Failed> {
    let work = &work;
    thread::scope(|scope| {
        let threads: Vec<_> = (0..count).map(|index| scope.spawn(move || work(index))).collect();
        threads
            .into_iter()
            .try_for_each(|thread| thread.join().unwrap_or_else(|_| Err("a thread panicked".into())))
    })
}

fn spans_and_streams_of_another_framework_work(gpu: &'static Gpu) -> Result<(), Failed> {
    let mut rng = rng(70);
    let (m, n, k) = (20, 300, 200);
    let problem = Fixture::random(gpu, &mut rng, [m, n, k])?;
    let workspace = gpu.workspace()?;
    let expected = problem.expected::<f16>(true)?;
    // A foreign tensor with rows of 512 bytes. The activations begin in row 3 at byte 32.
    const STRIDE: usize = 512;
    const OFFSET: usize = 3 * STRIDE + 32;
    let mut tensor = vec![-128i8; OFFSET + m * STRIDE];
    for (token, row) in tensor[OFFSET..].chunks_exact_mut(STRIDE).enumerate() {
        row[..k].copy_from_slice(problem.activations.row(token));
    }
    let tensor = to_device(&tensor)?;
    let mut output = to_device(&vec![0u8; m * n * 2])?;
    let span = DeviceSpan::from(&tensor);
    // SAFETY: the span lies inside the buffer, from `OFFSET` on.
    let activations = unsafe { DeviceSpan::from_raw(span.address() + OFFSET as u64, (m - 1) * STRIDE + k) };
    let operands = Operands {
        activations,
        activation_stride: STRIDE,
        ..problem.operands(DeviceSpan::from(&output), n, OutputType::F16, true)
    };
    let stream = Stream::new(StreamFlags::DEFAULT, None)?;
    for raw in [stream.as_inner().cast(), std::ptr::null_mut()] {
        refill(&mut output, &vec![0xA5; m * n * 2])?;
        // SAFETY: the stream is alive: it is a stream of this context or the default one.
        let handle = unsafe { StreamHandle::from_raw(raw) };
        // SAFETY: all operands stay alive until the context has been synchronized,
        // and nothing else uses the workspace.
        unsafe { gpu.gemm(&problem.device_weights, &operands, &workspace, handle) }?;
        cust::context::CurrentContext::synchronize()?;
        expect_values(&output, &expected, || format!("stream {raw:?}"))?;
    }
    Ok(())
}
