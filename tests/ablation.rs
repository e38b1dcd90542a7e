//! Every arm of the ablation against the CPU's GEMM, bit for bit.

use half::bf16;
use libtest_mimic::Failed;
use liquidgemm::gpu::ablation::Arm;
use liquidgemm::gpu::{Gpu, GpuError};
use liquidgemm::{Cut, Error, OutputType, Plan};
use liquidgemm_format::ablation::{TOKENS, tile};
use liquidgemm_format::tile::TileShape;
use liquidgemm_gpu_tests::{Problem, Session, Test, rng, run};

const TESTS: [Test; 3] = [
    ("small_odd_problems_equal_the_cpu_in_every_arm", small_odd_problems_equal_the_cpu_in_every_arm),
    ("rings_and_tiles_that_turn_often_equal_the_cpu", rings_and_tiles_that_turn_often_equal_the_cpu),
    ("other_outputs_and_tiles_are_refused", other_outputs_and_tiles_are_refused),
];

fn main() {
    run(&TESTS).exit();
}

/// One problem in every arm with every tile, under each of the cuts.
fn check_arms(
    gpu: &Gpu,
    session: &Session,
    problem: &Problem,
    cuts: &[(u32, u32, u32)],
) -> Result<(), Failed> {
    let [m, n, k] = problem.shape();
    let weights = gpu.upload_for_ablation(&problem.weights)?;
    for shape in TOKENS.into_iter().filter_map(tile) {
        for &(cluster, workers, streamed_waves) in cuts {
            let plan = Plan::with_cut(m, n, k, Cut { shape, cluster, workers, streamed_waves })?;
            for arm in Arm::ALL {
                for padding in [0, 3] {
                    let checked = problem.check_launch::<bf16>(session, &plan, false, padding, |operands| {
                        let (workspace, stream) = (&session.workspace, &session.stream);
                        // SAFETY: everything lives until `check_launch` has waited for the stream.
                        unsafe { gpu.ablation(arm, &weights, operands, &plan, workspace, stream) }
                    });
                    checked.map_err(|error| {
                        let message = error.message().unwrap_or("failed").to_owned();
                        Failed::from(format!("{arm}: {message}"))
                    })?;
                }
            }
        }
    }
    Ok(())
}

fn small_odd_problems_equal_the_cpu_in_every_arm(gpu: &'static Gpu) -> Result<(), Failed> {
    let mut rng = rng(31);
    let session = Session::new(gpu)?;
    for shape in [[1, 1, 1], [3, 5, 64], [8, 64, 128], [17, 129, 100], [40, 200, 1000]] {
        let problem = Problem::random(gpu, &mut rng, shape)?;
        check_arms(gpu, &session, &problem, &[(1, 4, 1), (2, 2, 1)])?;
    }
    Ok(())
}

fn rings_and_tiles_that_turn_often_equal_the_cpu(gpu: &'static Gpu) -> Result<(), Failed> {
    let mut rng = rng(32);
    let session = Session::new(gpu)?;
    let most = gpu.multiprocessors();
    for shape in [[131, 520, 4096], [260, 1000, 2240]] {
        let problem = Problem::random(gpu, &mut rng, shape)?;
        check_arms(gpu, &session, &problem, &[(1, 1, 0), (1, 3, 2), (2, 5, 1), (1, most, 1)])?;
    }
    Ok(())
}

fn other_outputs_and_tiles_are_refused(gpu: &'static Gpu) -> Result<(), Failed> {
    let mut rng = rng(33);
    let session = Session::new(gpu)?;
    let problem = Problem::random(gpu, &mut rng, [8, 64, 128])?;
    let weights = gpu.upload_for_ablation(&problem.weights)?;
    let output = liquidgemm_gpu_tests::to_device(&vec![0u8; 8 * 64 * 4])?;
    let plan = |shape| {
        Plan::with_tile(
            8,
            64,
            128,
            shape,
            &liquidgemm::DeviceFigures {
                multiprocessors: 1,
                clusters: [1, 0, 0, 0],
                ..liquidgemm::DeviceFigures::H100_SXM
            },
        )
    };
    let known = tile(16).ok_or("the ablation has tiles of 16 tokens")?;
    let unknown = TileShape::find(2, 8, 1, 1).ok_or("the library has tiles of 8 tokens")?;
    for (shape, output_type, bias) in
        [(known, OutputType::F16, false), (known, OutputType::Bf16, true), (unknown, OutputType::Bf16, false)]
    {
        let operands = problem.operands((&output).into(), 64, output_type, bias);
        let (workspace, stream) = (&session.workspace, &session.stream);
        for arm in Arm::ALL {
            // SAFETY: everything lives until the end, and nothing is launched.
            let outcome = unsafe { gpu.ablation(arm, &weights, &operands, &plan(shape)?, workspace, stream) };
            if !matches!(outcome, Err(Error::Gpu(GpuError::NotInAblation { .. }))) {
                return Err(format!("{arm} takes {output_type} with bias {bias}: {outcome:?}").into());
            }
        }
    }
    Ok(())
}
