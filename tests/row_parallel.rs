//! Row-parallel layers on one GPU against the CPU, bit for bit: all shards on it, in turn and on threads,
//! with a communicator that adds on the host. `two_gpus.rs` does so on two, with NCCL.

use cust::memory::CopyDestination;
use half::{bf16, f16};
use libtest_mimic::Failed;
use liquidgemm::gpu::{
    AllReduce, DeviceSpan, Gpu, GpuError, LinearInput, LinearOutput, Partials, Reduction, RowParallelCall,
    RowParallelLinear, StreamHandle, SumsOperands,
};
use liquidgemm::{Error, Half, Linear, Operation, Output, OutputType};
use liquidgemm_gpu_tests::communicator::HostCommunicator;
use liquidgemm_gpu_tests::ranks::{POISON, Problem, Rank, expect_bits};
use liquidgemm_gpu_tests::{Session, Test, random_bias, random_weights, rng, run, to_device};
use rand::RngExt;
use rand::rngs::StdRng;

const TESTS: [Test; 6] = [
    ("the_epilogue_of_sums_equals_the_cpu", the_epilogue_of_sums_equals_the_cpu),
    ("shards_in_turn_give_the_bits_of_the_whole_layer", shards_in_turn_give_the_bits_of_the_whole_layer),
    (
        "shards_on_threads_give_the_bits_of_the_whole_layer",
        shards_on_threads_give_the_bits_of_the_whole_layer,
    ),
    ("rounded_partials_are_added_with_one_bias", rounded_partials_are_added_with_one_bias),
    ("bad_calls_of_any_rank_leave_everything_untouched", bad_calls_of_any_rank_leave_everything_untouched),
    ("a_call_without_tokens_does_not_communicate", a_call_without_tokens_does_not_communicate),
];

fn main() {
    run(&TESTS).exit();
}

/// Applies the epilogue to random sums at unaligned places, and compares every byte of the output's buffer.
fn check_sums<O: Output>(
    gpu: &Gpu,
    session: &Session,
    rng: &mut StdRng,
    [m, n]: [usize; 2],
) -> Result<(), Failed> {
    const GUARD: usize = 256;
    let size = size_of::<O>();
    let [shift, sums_gap, output_gap] = [(); 3].map(|()| [0, 0, 1, 3, 4, 8][rng.random_range(0..6)]);
    let (sums_stride, output_stride) = (n + sums_gap, n + output_gap);
    let sums: Vec<i32> = (0..shift + m * sums_stride)
        .map(|_| match rng.random_range(0..8) {
            0 => 0,
            1 => rng.random(),
            2 => [i32::MIN, i32::MAX, -1, 1 << 24, (1 << 24) + 1][rng.random_range(0..5)],
            _ => rng.random_range(-3_000_000..3_000_000),
        })
        .collect();
    let channel_scales: Vec<f32> = (0..shift + n)
        .map(|_| if rng.random_range(0..9) == 0 { 0.0 } else { rng.random_range(1e-5..1e-2f32) })
        .collect();
    let token_scales: Vec<f32> = (0..m)
        .map(|_| match rng.random_range(0..8) {
            0 => f32::NAN,
            1 => 0.0,
            2 => 1e38,
            3 => 1e-40,
            _ => rng.random_range(1e-4..1e-2f32),
        })
        .collect();
    let bias = (O::TYPE != OutputType::I32 && rng.random()).then(|| random_bias(rng, shift + n));

    let device_sums = to_device(&sums)?;
    let device_scales = to_device(&channel_scales)?;
    let device_tokens = to_device(&token_scales)?;
    let device_bias = bias.as_deref().map(to_device).transpose()?;
    let length = ((m - 1) * output_stride + n) * size;
    let output = to_device(&vec![POISON; length + 2 * GUARD])?;
    let from = |span: DeviceSpan, skipped: usize| {
        // SAFETY: so many bytes at the start of the buffer are left out.
        unsafe { DeviceSpan::from_raw(span.address() + skipped as u64, span.bytes() - skipped) }
    };
    let operands = SumsOperands {
        m,
        n,
        sums: from((&device_sums).into(), shift * 4),
        sums_stride,
        channel_scales: from((&device_scales).into(), shift * 4),
        token_scales: (&device_tokens).into(),
        bias: device_bias.as_ref().map(|bias| from(bias.into(), shift * 4)),
        output: from((&output).into(), GUARD),
        output_stride,
        output_type: O::TYPE,
    };
    // SAFETY: everything lives until the stream has been synchronized.
    unsafe { gpu.scale_sums(&operands, &session.stream) }?;
    session.stream.synchronize()?;
    let mut found = vec![0; output.len()];
    output.copy_to(&mut found[..])?;
    let mut expected = vec![POISON; output.len()];
    for (token, &token_scale) in token_scales.iter().enumerate() {
        for channel in 0..n {
            let sum = sums[shift + token * sums_stride + channel];
            let bias = bias.as_ref().map(|bias| bias[shift + channel]);
            let y = O::from_accumulator(sum, channel_scales[shift + channel], token_scale, bias);
            let place = GUARD + (token * output_stride + channel) * size;
            expected[place..place + size].copy_from_slice(bytemuck::bytes_of(&y));
        }
    }
    match found.iter().zip(&expected).position(|(found, expected)| found != expected) {
        None => Ok(()),
        Some(byte) => Err(format!(
            "byte {byte} before or behind {GUARD}: m = {m}, n = {n}, {}, shift {shift}, gaps {sums_gap} and {output_gap}",
            O::TYPE
        )
        .into()),
    }
}

fn the_epilogue_of_sums_equals_the_cpu(gpu: &'static Gpu) -> Result<(), Failed> {
    let mut rng = rng(81);
    let session = Session::new(gpu)?;
    for round in 0..60 {
        let m = if round % 20 == 0 { 1500 } else { rng.random_range(1..70) };
        let n = match round % 3 {
            0 => rng.random_range(1..40),
            1 => rng.random_range(1..1000),
            _ => rng.random_range(1..100) * 8,
        };
        check_sums::<bf16>(gpu, &session, &mut rng, [m, n])?;
        check_sums::<f16>(gpu, &session, &mut rng, [m, n])?;
        check_sums::<f32>(gpu, &session, &mut rng, [m, n])?;
        check_sums::<i32>(gpu, &session, &mut rng, [m, n])?;
    }
    Ok(())
}

/// Puts all ranks of a problem on one GPU.
fn ranks<T: Half, O: Output>(
    gpu: &'static Gpu,
    problem: &Problem<T>,
    partials: Partials,
    padding: usize,
) -> Result<Vec<Rank>, Failed> {
    (0..problem.ends.len()).map(|rank| Rank::new::<T, O>(gpu, problem, rank, partials, padding)).collect()
}

/// Computes a random problem with all ranks on one thread, and compares each rank's output.
fn check_in_turn<T: Half, O: Output>(
    gpu: &'static Gpu,
    rng: &mut StdRng,
    shape: [usize; 3],
    count: usize,
) -> Result<(), Failed> {
    let problem = Problem::<T>::random(rng, shape, count)?;
    let expected = problem.expected::<O>()?;
    let ranks = ranks::<T, O>(gpu, &problem, Partials::Int32, [0, 0, 3, 8][rng.random_range(0..4)])?;
    let world = HostCommunicator::world(count);
    let calls: Vec<_> = ranks.iter().zip(&world).map(|(rank, handle)| rank.call::<O, _>(handle)).collect();
    // SAFETY: everything lives until the streams have been synchronized.
    unsafe { RowParallelCall::forward_all(&calls) }?;
    for (number, rank) in ranks.iter().enumerate() {
        expect_bits(&rank.result::<O>()?, &expected, || {
            format!("rank {number} of {count}, {shape:?}, {:?}, {:?}", problem.ends, problem.gate)
        })?;
    }
    Ok(())
}

fn shards_in_turn_give_the_bits_of_the_whole_layer(gpu: &'static Gpu) -> Result<(), Failed> {
    let mut rng = rng(82);
    for _ in 0..25 {
        let count = rng.random_range(1..5);
        let shape = [rng.random_range(1..150), rng.random_range(1..500), rng.random_range(300..1200)];
        check_in_turn::<bf16, bf16>(gpu, &mut rng, shape, count)?;
        check_in_turn::<f16, f16>(gpu, &mut rng, shape, count)?;
        check_in_turn::<bf16, f32>(gpu, &mut rng, shape, count)?;
    }
    check_in_turn::<bf16, bf16>(gpu, &mut rng, [2000, 1024, 4096], 2)
}

fn shards_on_threads_give_the_bits_of_the_whole_layer(gpu: &'static Gpu) -> Result<(), Failed> {
    let mut rng = rng(83);
    for count in [2, 3] {
        let shape = [37, 200, 900];
        let problem = Problem::<bf16>::random(&mut rng, shape, count)?;
        let expected = problem.expected::<bf16>()?;
        let world = HostCommunicator::world(count);
        let problem = &problem;
        let results = std::thread::scope(|scope| {
            let threads: Vec<_> = world
                .iter()
                .enumerate()
                .map(|(number, handle)| {
                    scope.spawn(move || -> Result<Vec<bf16>, String> {
                        let text = |failed: Failed| failed.message().unwrap_or("failed").to_owned();
                        let rank = Rank::new::<bf16, bf16>(gpu, problem, number, Partials::Int32, 0)
                            .map_err(text)?;
                        // SAFETY: everything lives until the stream has been synchronized.
                        unsafe { rank.call::<bf16, _>(handle).forward() }
                            .map_err(|error| error.to_string())?;
                        rank.result().map_err(text)
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().expect("no panic")).collect::<Vec<_>>()
        });
        for (number, result) in results.into_iter().enumerate() {
            expect_bits(&result?, &expected, || format!("rank {number} of {count}"))?;
        }
    }
    Ok(())
}

fn check_rounded<T: Half + Output>(gpu: &'static Gpu, rng: &mut StdRng, padding: usize) -> Result<(), Failed>
where
    f32: From<T>,
{
    let problem = Problem::<T>::random(rng, [33, 200, 1000], 3)?;
    let ranks = ranks::<T, T>(gpu, &problem, Partials::Rounded, padding)?;
    let world = HostCommunicator::world(3);
    let calls: Vec<_> = ranks.iter().zip(&world).map(|(rank, handle)| rank.call::<T, _>(handle)).collect();
    // SAFETY: everything lives until the streams have been synchronized.
    unsafe { RowParallelCall::forward_all(&calls) }?;
    // The host communicator adds in f32 in the order of the ranks, and rounds once.
    let parts = (0..3).map(|rank| problem.expected_of_rank::<T>(rank)).collect::<Result<Vec<_>, _>>()?;
    let expected: Vec<f32> = (0..parts[0].len())
        .map(|index| parts.iter().fold(0.0, |sum, part| sum + f32::from(part[index])))
        .collect();
    for rank in &ranks {
        let found = rank.result::<T>()?;
        for (index, (&found, &expected)) in found.iter().zip(&expected).enumerate() {
            let (found, expected) = (f32::from(found), f32::from(T::round(expected)));
            if found.to_bits() != expected.to_bits() && !(found.is_nan() && expected.is_nan()) {
                return Err(
                    format!("element {index}: {found} instead of {expected}, padding {padding}").into()
                );
            }
        }
    }
    match world[0].reductions() {
        1 => Ok(()),
        other => Err(format!("{other} reductions").into()),
    }
}

fn rounded_partials_are_added_with_one_bias(gpu: &'static Gpu) -> Result<(), Failed> {
    let mut rng = rng(84);
    for padding in [0, 0, 5, 8] {
        check_rounded::<bf16>(gpu, &mut rng, padding)?;
        check_rounded::<f16>(gpu, &mut rng, padding)?;
    }
    Ok(())
}

fn bad_calls_of_any_rank_leave_everything_untouched(gpu: &'static Gpu) -> Result<(), Failed> {
    let mut rng = rng(85);
    let problem = Problem::<bf16>::random(&mut rng, [9, 64, 256], 2)?;
    let norm = to_device(&[0u16; 256])?;
    let narrow = Linear::new(random_weights(&mut rng, 63, problem.range(1).len()));
    for partials in [Partials::Int32, Partials::Rounded] {
        let ranks = ranks::<bf16, bf16>(gpu, &problem, partials, 0)?;
        let world = HostCommunicator::world(2);
        let narrow = RowParallelLinear::new(gpu.upload_linear(&narrow)?).with_partials(partials);
        let good = |rank: usize| ranks[rank].call::<bf16, _>(&world[rank]);
        let small = |span: DeviceSpan, less: usize| {
            // SAFETY: the span lies inside the other one.
            unsafe { DeviceSpan::from_raw(span.address(), span.bytes() - less) }
        };
        let call = good(1);
        let input = call.input;
        let output = call.output;
        let bad = [
            (
                RowParallelCall {
                    input: LinearInput {
                        operation: Operation::RmsNorm { weight: (&norm).into(), epsilon: 1e-5 },
                        ..input
                    },
                    ..good(1)
                },
                "NormOfShard",
            ),
            (RowParallelCall { scratch: small(call.scratch, 1), ..good(1) }, "BufferTooSmall"),
            (
                RowParallelCall {
                    output: LinearOutput { output: small(output.output, 1), ..output },
                    ..good(1)
                },
                "BufferTooSmall",
            ),
            (
                RowParallelCall { output: LinearOutput { output_stride: 63, ..output }, ..good(1) },
                "StrideTooShort",
            ),
            (
                RowParallelCall { input: LinearInput { input_stride: 0, ..input }, ..good(1) },
                "RowStrideTooShort",
            ),
            (RowParallelCall { input: LinearInput { m: 8, ..input }, ..good(1) }, "ShardsDiffer"),
            (
                RowParallelCall {
                    output: LinearOutput { output_type: OutputType::F16, ..output },
                    ..good(1)
                },
                "ShardsDiffer",
            ),
            (RowParallelCall { layer: &narrow, ..good(1) }, "ShardsDiffer"),
        ];
        for (bad, expected) in bad {
            // SAFETY: the call is refused before it launches anything.
            match unsafe { RowParallelCall::forward_all(&[good(0), bad]) } {
                Err(error) if format!("{error:?}").contains(expected) => {}
                outcome => return Err(format!("{outcome:?} instead of {expected}").into()),
            }
        }
        if partials == Partials::Rounded {
            let wide = RowParallelCall {
                output: LinearOutput { output_type: OutputType::F32, ..output },
                ..good(0)
            };
            // SAFETY: as above.
            let outcome = unsafe { wide.forward() };
            if !outcome.as_ref().is_err_and(|error| error.to_string().contains("bf16 or f16, not f32")) {
                return Err(format!("{outcome:?}").into());
            }
        }
        if world[0].reductions() != 0 {
            return Err("a refused call has communicated".into());
        }
        for rank in &ranks {
            let poison = bytemuck::pod_read_unaligned::<bf16>(&[POISON; 2]);
            if rank.result::<bf16>()?.iter().any(|y| y.to_bits() != poison.to_bits()) {
                return Err("a refused call has written".into());
            }
        }
        // The ranks work as before.
        // SAFETY: everything lives until the streams have been synchronized.
        unsafe { RowParallelCall::forward_all(&[good(0), good(1)]) }?;
        if partials == Partials::Int32 {
            expect_bits(&ranks[1].result::<bf16>()?, &problem.expected::<bf16>()?, || "after errors".into())?;
        }
    }
    let outcome = ranks::<bf16, bf16>(gpu, &problem, Partials::Int32, 0)?[0].layer.prepare(
        gpu,
        &Operation::RmsNorm { weight: (&norm).into(), epsilon: 1e-5 },
        bf16::HALF,
        1..=1,
    );
    if matches!(outcome, Err(Error::NormOfShard)) { Ok(()) } else { Err(format!("{outcome:?}").into()) }
}

/// A communicator that must not be called.
struct Nobody;

impl AllReduce for Nobody {
    fn rank(&self) -> usize {
        0
    }

    unsafe fn all_reduce(&self, _: Reduction, _: DeviceSpan, _: StreamHandle) -> Result<(), Error> {
        Err(GpuError::AllReduce { reason: "called".into() }.into())
    }

    fn begin_group(&self) -> Result<(), Error> {
        Err(GpuError::AllReduce { reason: "called".into() }.into())
    }

    fn end_group(&self) -> Result<(), Error> {
        self.begin_group()
    }
}

fn a_call_without_tokens_does_not_communicate(gpu: &'static Gpu) -> Result<(), Failed> {
    let mut rng = rng(86);
    let problem = Problem::<bf16> { m: 0, input: Vec::new(), ..Problem::random(&mut rng, [4, 64, 256], 2)? };
    let session = Session::new(gpu)?;
    let shard = problem.layer.input_shard(problem.range(0))?;
    for partials in [Partials::Int32, Partials::Rounded] {
        let layer = RowParallelLinear::new(gpu.upload_linear(&shard)?).with_partials(partials);
        // SAFETY: nothing uses empty memory.
        let nothing = unsafe { DeviceSpan::from_raw(0, 0) };
        let call = RowParallelCall {
            gpu,
            layer: &layer,
            communicator: &Nobody,
            input: LinearInput::new(nothing, bf16::HALF, 0, shard.k()),
            output: LinearOutput { output: nothing, output_stride: 64, output_type: OutputType::Bf16 },
            scratch: nothing,
            workspace: &session.workspace,
            stream: (&session.stream).into(),
        };
        // SAFETY: nothing is launched without tokens.
        unsafe { call.forward() }?;
        // SAFETY: as above.
        unsafe { RowParallelCall::<Nobody>::forward_all(&[]) }?;
    }
    Ok(())
}
