//! Bad calls on a GPU: each returns its typed error, launches nothing, and leaves the stream usable.
//!
//! The calls come from `harness/refused.rs`; `driver.rs` makes the same calls on a fake driver.

use cust::memory::CopyDestination;
use libtest_mimic::Failed;
use liquidgemm::gpu::{DeviceSpan, Gpu, GpuError, Operands};
use liquidgemm::{Error, Group, OutputType, PackedWeights, Plan, Problem};
use liquidgemm_format::tile::TileShape;
use liquidgemm_gpu_tests::refused::{REFUSED_SHAPE, refused_calls};
use liquidgemm_gpu_tests::{Fixture, Session, Test, rng, run, to_device};

const TESTS: [Test; 4] = [
    (
        "bad_calls_are_refused_and_leave_output_and_stream_alone",
        bad_calls_are_refused_and_leave_output_and_stream_alone,
    ),
    (
        "a_plan_for_a_larger_gpu_does_not_fit_the_workspace",
        a_plan_for_a_larger_gpu_does_not_fit_the_workspace,
    ),
    ("a_gpu_beyond_the_last_does_not_exist", a_gpu_beyond_the_last_does_not_exist),
    ("a_thread_without_a_context_has_no_current_gpu", a_thread_without_a_context_has_no_current_gpu),
];

fn main() {
    run(&TESTS).exit();
}

fn bad_calls_are_refused_and_leave_output_and_stream_alone(gpu: &'static Gpu) -> Result<(), Failed> {
    const POISON: u8 = 0x5A;
    let [m, n, k] = REFUSED_SHAPE;
    let session = Session::new(gpu)?;
    let problem = Fixture::random(gpu, &mut rng(11), REFUSED_SHAPE)?;
    let output = to_device(&vec![POISON; m * n * OutputType::Bf16.size()])?;
    let good = problem.operands(DeviceSpan::from(&output), n, OutputType::Bf16, true);
    for call in refused_calls(good)? {
        // SAFETY: all operands stay alive until the stream has been synchronized.
        let outcome = unsafe {
            gpu.gemm_with_plan(
                &problem.device_weights,
                &call.operands,
                &call.plan,
                &session.workspace,
                &session.stream,
            )
        };
        match outcome {
            Err(error) if (call.is_expected)(&error) && error.to_string().contains(call.says) => {}
            Err(error) => return Err(format!("{}: {error:?} ({error})", call.wrong).into()),
            Ok(()) => return Err(format!("{} was accepted", call.wrong).into()),
        }
    }
    session.stream.synchronize()?;
    let mut bytes = vec![0; output.len()];
    output.copy_to(&mut bytes[..])?;
    if bytes.iter().any(|&byte| byte != POISON) {
        return Err("a refused call wrote to the output".into());
    }
    problem.check_type(gpu, &session, &gpu.plan(Problem { m, n, k })?, OutputType::Bf16, true, 0)
}

fn a_plan_for_a_larger_gpu_does_not_fit_the_workspace(gpu: &'static Gpu) -> Result<(), Failed> {
    let (m, n, k) = (1, 2048, 8192);
    let session = Session::new(gpu)?;
    let weights =
        PackedWeights::pack(&vec![7; n * k], &vec![(1, 120); n], vec![1.0; n], n, k, Group::Channel)?;
    let weights = gpu.upload(&weights)?;
    let activations = to_device(&vec![1i8; m * k])?;
    let scales = to_device(&vec![1f32; m])?;
    let output = to_device(&vec![-1f32; m * n])?;
    let operands = Operands {
        m,
        activations: (&activations).into(),
        activation_stride: k,
        token_scales: (&scales).into(),
        bias: None,
        output: (&output).into(),
        output_stride: n,
        output_type: OutputType::F32,
    };
    let tile = TileShape::with_tokens(256).ok_or("no tile of 256 tokens")?;
    let plan = Plan::with_tile(
        Problem { m, n, k },
        tile,
        &liquidgemm::DeviceFigures { multiprocessors: 100_000, clusters: [100_000; 4], ..*gpu.figures() },
    )?;
    // SAFETY: all operands stay alive until the stream has been synchronized.
    let outcome =
        unsafe { gpu.gemm_with_plan(&weights, &operands, &plan, &session.workspace, &session.stream) };
    let is_expected = matches!(outcome, Err(Error::Gpu(GpuError::BufferTooSmall { what: "workspace", .. })));
    session.stream.synchronize()?;
    let mut values = vec![0.0; m * n];
    output.copy_to(&mut values[..])?;
    if !is_expected || values.iter().any(|&value| value != -1.0) {
        return Err(format!("{outcome:?} for a plan of {} thread blocks", plan.blocks()).into());
    }
    Ok(())
}

fn a_gpu_beyond_the_last_does_not_exist(_: &'static Gpu) -> Result<(), Failed> {
    let count = cust::device::Device::num_devices()?;
    for ordinal in [count, u32::MAX] {
        match Gpu::with_device(ordinal) {
            Err(Error::Gpu(GpuError::NoSuchDevice { ordinal: named, count: existing }))
                if (named, existing) == (ordinal, count) => {}
            other => return Err(format!("{other:?} for GPU {ordinal} of {count}").into()),
        }
    }
    Ok(())
}

fn a_thread_without_a_context_has_no_current_gpu(_: &'static Gpu) -> Result<(), Failed> {
    let outcome = std::thread::spawn(|| Gpu::from_current_context().map(|gpu| gpu.description())).join();
    match outcome {
        Ok(Err(Error::Gpu(GpuError::NoContext))) => Ok(()),
        other => Err(format!("{other:?}").into()),
    }
}
