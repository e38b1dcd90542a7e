//! Compares every variant of the ablation's kernels with the CPU's GEMM, bit for bit.
//!
//! `harness/lib.rs` makes the problems and checks the outputs.

use half::bf16;
use libtest_mimic::Failed;
use liquidgemm::gpu::Gpu;
use liquidgemm::{OutputType, Plan, Problem, TileConfig};
use liquidgemm_bench::ablation::{Variant, VariantWeights, Variants};
use liquidgemm_format::ablation::{TOKENS, tile};
use liquidgemm_format::tile::TileShape;
use liquidgemm_gpu_tests::{Fixture, Session, Test, rng, run};

const TESTS: [Test; 3] = [
    ("small_odd_problems_equal_the_cpu_in_every_variant", small_odd_problems_equal_the_cpu_in_every_variant),
    (
        "pipelines_that_wrap_often_and_many_tiles_equal_the_cpu",
        pipelines_that_wrap_often_and_many_tiles_equal_the_cpu,
    ),
    ("other_outputs_and_tiles_are_refused", other_outputs_and_tiles_are_refused),
];

fn main() {
    run(&TESTS).exit();
}

/// Checks a problem in every variant, with every tile, for each `(cluster_size, clusters, stream_k_waves)`.
fn check_variants(
    gpu: &Gpu,
    session: &Session,
    problem: &Fixture,
    configs: &[(u32, u32, u32)],
) -> Result<(), Failed> {
    let [m, n, k] = problem.shape();
    let weights = VariantWeights::upload(gpu, &problem.weights)?;
    let variants = Variants::new(gpu);
    for shape in TOKENS.into_iter().filter_map(tile) {
        for &(cluster_size, clusters, stream_k_waves) in configs {
            let plan = Plan::with_config(
                Problem { m, n, k },
                TileConfig { shape, cluster_size, clusters, stream_k_waves },
            )?;
            for variant in Variant::ALL {
                for padding in [0, 3] {
                    let checked =
                        problem.check_launch::<bf16, _>(session, &plan, false, padding, |operands| {
                            let (workspace, stream) = (&session.workspace, &session.stream);
                            // SAFETY: all operands stay alive until `check_launch` has synchronized.
                            unsafe { variants.launch(variant, &weights, operands, &plan, workspace, stream) }
                        });
                    checked.map_err(|error| {
                        let message = error.message().unwrap_or("failed").to_owned();
                        Failed::from(format!("{variant}: {message}"))
                    })?;
                }
            }
        }
    }
    Ok(())
}

fn small_odd_problems_equal_the_cpu_in_every_variant(gpu: &'static Gpu) -> Result<(), Failed> {
    let mut rng = rng(31);
    let session = Session::new(gpu)?;
    for shape in [[1, 1, 1], [3, 5, 64], [8, 64, 128], [17, 129, 100], [40, 200, 1000]] {
        let problem = Fixture::random(gpu, &mut rng, shape)?;
        check_variants(gpu, &session, &problem, &[(1, 4, 1), (2, 2, 1)])?;
    }
    Ok(())
}

fn pipelines_that_wrap_often_and_many_tiles_equal_the_cpu(gpu: &'static Gpu) -> Result<(), Failed> {
    let mut rng = rng(32);
    let session = Session::new(gpu)?;
    let most = gpu.multiprocessors();
    for shape in [[131, 520, 4096], [260, 1000, 2240]] {
        let problem = Fixture::random(gpu, &mut rng, shape)?;
        check_variants(gpu, &session, &problem, &[(1, 1, 0), (1, 3, 2), (2, 5, 1), (1, most, 1)])?;
    }
    Ok(())
}

fn other_outputs_and_tiles_are_refused(gpu: &'static Gpu) -> Result<(), Failed> {
    let mut rng = rng(33);
    let session = Session::new(gpu)?;
    let problem = Fixture::random(gpu, &mut rng, [8, 64, 128])?;
    let weights = VariantWeights::upload(gpu, &problem.weights)?;
    let variants = Variants::new(gpu);
    let output = liquidgemm_gpu_tests::to_device(&vec![0u8; 8 * 64 * 4])?;
    let plan = |shape| {
        Plan::with_tile(
            Problem::new(8, 64, 128),
            shape,
            &liquidgemm::DeviceFigures {
                multiprocessors: 1,
                clusters: [1, 0, 0, 0],
                ..liquidgemm::DeviceFigures::H100_SXM
            },
        )
    };
    let known = tile(16).ok_or("the ablation has no tile of 16 tokens")?;
    let unknown = TileShape::find(2, 8, 1, 1).ok_or("the library has no tile of 8 tokens")?;
    for (shape, output_type, bias) in
        [(known, OutputType::F16, false), (known, OutputType::Bf16, true), (unknown, OutputType::Bf16, false)]
    {
        let operands = problem.operands((&output).into(), 64, output_type, bias);
        let (workspace, stream) = (&session.workspace, &session.stream);
        for variant in Variant::ALL {
            // SAFETY: all operands stay alive, and the refused call launches nothing.
            let outcome =
                unsafe { variants.launch(variant, &weights, &operands, &plan(shape)?, workspace, stream) };
            if !outcome
                .as_ref()
                .is_err_and(|error| error.to_string().contains("the ablation has no kernel for"))
            {
                return Err(format!("{variant} takes {output_type} with bias {bias}: {outcome:?}").into());
            }
        }
    }
    Ok(())
}
