//! Row-parallel layers on two GPUs with NCCL against the CPU, bit for bit:
//! both ranks on one thread, each on its thread, and replayed from CUDA graphs.
//!
//! The tests need two Hopper GPUs and `libnccl.so.2`; on machines with fewer GPUs they are ignored, and say so.

use std::sync::Barrier;

use half::{bf16, f16};
use libtest_mimic::Failed;
use liquidgemm::gpu::{Communicator, Gpu, Partials, RowParallelCall, UniqueId, nccl_version};
use liquidgemm::{Half, Output};
use liquidgemm_gpu_tests::graph::Graph;
use liquidgemm_gpu_tests::ranks::{Problem, Rank, expect_bits};
use liquidgemm_gpu_tests::{TestOfTwo, rng, run_on_two};
use rand::RngExt;
use rand::rngs::StdRng;

const TESTS: [TestOfTwo; 6] = [
    ("ranks_on_one_thread_give_the_bits_of_the_whole_layer", on_one_thread),
    ("ranks_on_threads_give_the_bits_of_the_whole_layer", on_threads),
    ("rounded_partials_agree_on_both_gpus_and_are_near_the_exact_result", rounded),
    ("captured_calls_give_the_bits_of_eager_calls", captured),
    ("a_raw_communicator_works_and_is_not_destroyed", raw),
    ("the_same_gpu_twice_is_refused_with_the_message_of_nccl", same_gpu),
];

fn main() {
    if let Ok(version) = nccl_version() {
        eprintln!("with NCCL {version}");
    }
    run_on_two(&TESTS).exit();
}

type Gpus = &'static [Gpu; 2];

fn ranks<T: Half, O: Output>(
    gpus: Gpus,
    problem: &Problem<T>,
    partials: Partials,
    padding: usize,
) -> Result<Vec<Rank>, Failed> {
    (0..2).map(|rank| Rank::new::<T, O>(&gpus[rank], problem, rank, partials, padding)).collect()
}

/// Calls all ranks on this thread.
fn forward_all<O: Output>(ranks: &[Rank], world: &[Communicator]) -> Result<(), Failed> {
    let calls: Vec<_> = ranks.iter().zip(world).map(|(rank, handle)| rank.call::<O, _>(handle)).collect();
    // SAFETY: everything lives until the streams have been synchronized.
    Ok(unsafe { RowParallelCall::forward_all(&calls) }?)
}

fn check<T: Half, O: Output>(
    gpus: Gpus,
    world: &[Communicator],
    rng: &mut StdRng,
    shape: [usize; 3],
) -> Result<(), Failed> {
    let problem = Problem::<T>::random(rng, shape, 2)?;
    let expected = problem.expected::<O>()?;
    let ranks = ranks::<T, O>(gpus, &problem, Partials::Int32, [0, 3][rng.random_range(0..2)])?;
    forward_all::<O>(&ranks, world)?;
    for (number, rank) in ranks.iter().enumerate() {
        expect_bits(&rank.result::<O>()?, &expected, || {
            format!("rank {number}, {shape:?}, {:?}", problem.ends)
        })?;
    }
    Ok(())
}

fn on_one_thread(gpus: Gpus) -> Result<(), Failed> {
    let mut rng = rng(91);
    let world = Communicator::of_process(&[&gpus[0], &gpus[1]])?;
    for _ in 0..15 {
        let shape = [rng.random_range(1..200), rng.random_range(1..600), rng.random_range(200..2000)];
        check::<bf16, bf16>(gpus, &world, &mut rng, shape)?;
        check::<f16, f16>(gpus, &world, &mut rng, shape)?;
        check::<bf16, f32>(gpus, &world, &mut rng, shape)?;
    }
    check::<bf16, bf16>(gpus, &world, &mut rng, [2048, 4096, 8192])?;
    world.iter().try_for_each(Communicator::check)?;
    Ok(())
}

/// Runs `of` for each rank on a thread of its own, with a communicator made there.
fn each_on_its_thread<R: Send>(
    gpus: Gpus,
    of: impl Fn(usize, Communicator) -> Result<R, Failed> + Sync,
) -> Result<Vec<R>, Failed> {
    let id = UniqueId::new()?;
    // What one process would send to the other.
    let sent = id.to_bytes();
    let outcomes: Vec<Result<R, String>> = std::thread::scope(|scope| {
        let of = &of;
        let threads = [0, 1].map(|rank| {
            scope.spawn(move || {
                let run = || {
                    let id = UniqueId::from_bytes(sent);
                    of(rank, Communicator::new(&gpus[rank], id, rank, 2)?)
                };
                run().map_err(|failed: Failed| failed.message().unwrap_or("failed").to_owned())
            })
        });
        threads.map(|thread| thread.join().unwrap_or_else(|_| Err("a rank panicked".into()))).into()
    });
    outcomes.into_iter().map(|outcome| outcome.map_err(Failed::from)).collect()
}

fn on_threads(gpus: Gpus) -> Result<(), Failed> {
    let mut rng = rng(92);
    let problems = (0..8)
        .map(|_| {
            let shape = [rng.random_range(1..300), rng.random_range(1..600), rng.random_range(200..2000)];
            Problem::<bf16>::random(&mut rng, shape, 2)
        })
        .collect::<Result<Vec<_>, _>>()?;
    let expected = problems.iter().map(Problem::expected::<bf16>).collect::<Result<Vec<_>, _>>()?;
    each_on_its_thread(gpus, |number, communicator| {
        for (problem, expected) in problems.iter().zip(&expected) {
            let rank = Rank::new::<bf16, bf16>(&gpus[number], problem, number, Partials::Int32, 0)?;
            // SAFETY: everything lives until the stream has been synchronized.
            unsafe { rank.call::<bf16, _>(&communicator).forward() }?;
            expect_bits(&rank.result::<bf16>()?, expected, || format!("rank {number}"))?;
        }
        Ok(())
    })?;
    Ok(())
}

fn rounded(gpus: Gpus) -> Result<(), Failed> {
    let mut rng = rng(93);
    let world = Communicator::of_process(&[&gpus[0], &gpus[1]])?;
    for padding in [0, 8] {
        let problem = Problem::<bf16>::random(&mut rng, [100, 512, 2048], 2)?;
        let ranks = ranks::<bf16, bf16>(gpus, &problem, Partials::Rounded, padding)?;
        forward_all::<bf16>(&ranks, &world)?;
        let results = [ranks[0].result::<bf16>()?, ranks[1].result::<bf16>()?];
        expect_bits(&results[0], &results[1], || "the ranks' results differ".into())?;
        // A sum of two parts that are rounded to bf16 each. Twice 2⁻⁸ of the parts is more than all roundings.
        let parts = [problem.expected_of_rank::<f32>(0)?, problem.expected_of_rank::<f32>(1)?];
        for (index, &found) in results[0].iter().enumerate() {
            let [first, second] = [parts[0][index], parts[1][index]];
            let (sum, found) = (first + second, found.to_f32());
            let most = (first.abs() + second.abs()) / 128.0;
            if (found - sum).abs() > most || found.is_nan() != sum.is_nan() {
                return Err(format!("element {index}: {found}, but {first} + {second}").into());
            }
        }
    }
    Ok(())
}

fn captured(gpus: Gpus) -> Result<(), Failed> {
    let mut rng = rng(94);
    let problem = Problem::<bf16>::random(&mut rng, [64, 1024, 2048], 2)?;
    let expected = problem.expected::<bf16>()?;
    // A capture ends if another thread allocates or compiles meanwhile.
    let ready = Barrier::new(2);
    each_on_its_thread(gpus, |number, communicator| {
        let mut rank = Rank::new::<bf16, bf16>(&gpus[number], &problem, number, Partials::Int32, 0)?;
        rank.layer.prepare(&gpus[number], &problem.operation(), bf16::HALF, problem.m..=problem.m)?;
        // SAFETY: everything lives until the stream has been synchronized.
        unsafe { rank.call::<bf16, _>(&communicator).forward() }?;
        expect_bits(&rank.result::<bf16>()?, &expected, || format!("rank {number}, eager"))?;
        rank.poison()?;
        ready.wait();
        let graph = Graph::capture(&rank.session.stream, || {
            // SAFETY: as above.
            Ok(unsafe { rank.call::<bf16, _>(&communicator).forward() }?)
        });
        ready.wait();
        let graph = graph?;
        for replay in 0..500 {
            // SAFETY: everything that the graph uses is alive.
            unsafe { graph.replay(&rank.session.stream) }?;
            if replay % 100 == 0 {
                expect_bits(&rank.result::<bf16>()?, &expected, || {
                    format!("rank {number}, replay {replay}")
                })?;
            }
        }
        // NCCL keeps what graphs use until they are destroyed.
        drop(graph);
        Ok(())
    })?;
    Ok(())
}

fn raw(gpus: Gpus) -> Result<(), Failed> {
    let mut rng = rng(95);
    let owners = Communicator::of_process(&[&gpus[0], &gpus[1]])?;
    for _ in 0..2 {
        // SAFETY: the owners outlive the borrowed communicators, and are not used meanwhile.
        let world = owners
            .iter()
            .map(|owner| unsafe { Communicator::from_raw(owner.as_raw()) })
            .collect::<Result<Vec<_>, _>>()?;
        for (number, handle) in world.iter().enumerate() {
            if (handle.rank(), handle.world_size()) != (number, 2) {
                return Err(format!("{handle:?} instead of rank {number} of 2").into());
            }
        }
        check::<bf16, bf16>(gpus, &world, &mut rng, [20, 128, 512])?;
    }
    Ok(())
}

fn same_gpu(gpus: Gpus) -> Result<(), Failed> {
    match Communicator::of_process(&[&gpus[0], &gpus[0]]) {
        Err(error) if error.to_string().contains("NCCL status") => Ok(()),
        other => Err(format!("{other:?}").into()),
    }
}
