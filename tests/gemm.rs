//! Compares the GPU's GEMM with the CPU's, bit for bit:
//! tile shapes, tile configurations, output types and shapes.
//!
//! `harness/lib.rs` makes the problems and checks the outputs.

use libtest_mimic::Failed;
use liquidgemm::gpu::Gpu;
use liquidgemm::{OutputType, Plan, Problem, TileConfig};
use liquidgemm_format::skinny::SKINNY_SHAPES;
use liquidgemm_format::tile::TILE_SHAPES;
use liquidgemm_gpu_tests::{Fixture, Session, Test, rng, run};
use rand::RngExt;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;

const TESTS: [Test; 13] = [
    ("small_problems_equal_the_cpu_for_every_tile", small_problems_equal_the_cpu_for_every_tile),
    ("token_counts_around_tile_borders_equal_the_cpu", token_counts_around_tile_borders_equal_the_cpu),
    (
        "every_token_count_of_skinny_kernels_equals_the_cpu",
        every_token_count_of_skinny_kernels_equals_the_cpu,
    ),
    ("every_output_type_equals_the_cpu_for_every_tile", every_output_type_equals_the_cpu_for_every_tile),
    ("random_problems_equal_the_cpu", random_problems_equal_the_cpu),
    ("the_longest_k_equals_the_cpu", the_longest_k_equals_the_cpu),
    ("any_tile_configuration_gives_the_same_bits", any_tile_configuration_gives_the_same_bits),
    ("any_two_launch_plan_gives_the_same_bits", any_two_launch_plan_gives_the_same_bits),
    ("persistent_clusters_with_many_tiles_equal_the_cpu", persistent_clusters_with_many_tiles_equal_the_cpu),
    ("skinny_problems_equal_the_cpu_for_every_kernel", skinny_problems_equal_the_cpu_for_every_kernel),
    (
        "every_output_type_equals_the_cpu_for_every_skinny_kernel",
        every_output_type_equals_the_cpu_for_every_skinny_kernel,
    ),
    (
        "the_longest_k_equals_the_cpu_for_every_skinny_kernel",
        the_longest_k_equals_the_cpu_for_every_skinny_kernel,
    ),
    ("repeated_launches_give_the_same_bits", repeated_launches_give_the_same_bits),
];

fn main() {
    run(&TESTS).exit();
}

fn small_problems_equal_the_cpu_for_every_tile(gpu: &'static Gpu) -> Result<(), Failed> {
    let mut rng = rng(1);
    let session = Session::new(gpu)?;
    for shape in TILE_SHAPES {
        for [m, n, k] in [[1, 1, 1], [3, 5, 64], [8, 64, 128], [17, 129, 100], [40, 200, 1000]] {
            let problem = Fixture::random(gpu, &mut rng, [m, n, k])?;
            // Few persistent clusters, so that the pipeline wraps around and stream-K splits tiles.
            for (cluster_size, clusters) in [(1, 4), (2, 2)] {
                let plan = Plan::with_config(
                    Problem { m, n, k },
                    TileConfig { shape, cluster_size, clusters, stream_k_waves: 1 },
                )?;
                problem.check_type(gpu, &session, &plan, OutputType::I32, false, 0)?;
                problem.check_type(gpu, &session, &plan, OutputType::Bf16, true, 0)?;
            }
        }
    }
    Ok(())
}

/// Runs each kernel with token counts at its tile borders, and with one more and one less.
///
/// The last activation box has only the tokens that are left over.
fn token_counts_around_tile_borders_equal_the_cpu(gpu: &'static Gpu) -> Result<(), Failed> {
    let mut rng = rng(12);
    let session = Session::new(gpu)?;
    for shape in TILE_SHAPES {
        let tokens = shape.tokens as usize;
        let borders = [shape.finished_tokens() as usize, tokens / 2, tokens, 2 * tokens];
        for m in borders.into_iter().flat_map(|border| [border - 1, border, border + 1]) {
            if m == 0 {
                continue;
            }
            let (n, k) = (rng.random_range(65..400), rng.random_range(1..700));
            let problem = Fixture::random(gpu, &mut rng, [m, n, k])?;
            for (cluster_size, clusters) in [(1, 3), (2, 2)] {
                let plan = Plan::with_config(
                    Problem { m, n, k },
                    TileConfig { shape, cluster_size, clusters, stream_k_waves: 1 },
                )?;
                problem.check_type(gpu, &session, &plan, OutputType::I32, false, 0)?;
                problem.check_type(
                    gpu,
                    &session,
                    &plan,
                    OutputType::Bf16,
                    true,
                    n.next_multiple_of(8) - n,
                )?;
            }
        }
    }
    Ok(())
}

fn every_token_count_of_skinny_kernels_equals_the_cpu(gpu: &'static Gpu) -> Result<(), Failed> {
    let mut rng = rng(13);
    let session = Session::new(gpu)?;
    for shape in SKINNY_SHAPES {
        for m in 1..=shape.tokens as usize {
            let (n, k) = (rng.random_range(1..300), rng.random_range(1..1500));
            let problem = Fixture::random(gpu, &mut rng, [m, n, k])?;
            let plan = Plan::skinny(Problem { m, n, k }, shape, 5)?;
            problem.check_type(gpu, &session, &plan, OutputType::I32, false, 0)?;
        }
    }
    Ok(())
}

fn every_output_type_equals_the_cpu_for_every_tile(gpu: &'static Gpu) -> Result<(), Failed> {
    let mut rng = rng(2);
    let session = Session::new(gpu)?;
    for shape in TILE_SHAPES {
        for (m, n, k) in [(300, 264, 448), (77, 1000, 1024)] {
            let problem = Fixture::random(gpu, &mut rng, [m, n, k])?;
            let plan = Plan::with_tile(Problem { m, n, k }, shape, gpu.figures())?;
            for output_type in OutputType::ALL {
                for bias in [false, true] {
                    // Rows that are aligned to 16 bytes, and rows that are not.
                    for padding in [0, 8, 3] {
                        problem.check_type(gpu, &session, &plan, output_type, bias, padding)?;
                    }
                }
            }
        }
    }
    Ok(())
}

/// The most multiply-adds of a random problem. Bounds the CPU backend's time.
const MOST_PRODUCTS: usize = 400_000_000;

fn random_problems_equal_the_cpu(gpu: &'static Gpu) -> Result<(), Failed> {
    let mut rng = rng(3);
    let session = Session::new(gpu)?;
    let m_of = [1, 2, 7, 8, 9, 16, 31, 64, 65, 127, 128, 129, 251, 256, 257, 509, 1024, 2048, 5000];
    let n_of = [1, 2, 63, 64, 65, 127, 128, 191, 256, 509, 1021, 1536, 4096];
    let k_of = [1, 63, 64, 65, 127, 128, 192, 251, 384, 1000, 1024, 4096, 11008];
    let mut done = 0;
    while done < 240 {
        let pick = |rng: &mut StdRng, of: &[usize], limit: usize| {
            if rng.random() { *of.choose(rng).unwrap_or(&1) } else { rng.random_range(1..=limit) }
        };
        let (m, n, k) =
            (pick(&mut rng, &m_of, 5000), pick(&mut rng, &n_of, 3000), pick(&mut rng, &k_of, 5000));
        if m * n * k > MOST_PRODUCTS {
            continue;
        }
        let problem = Fixture::random(gpu, &mut rng, [m, n, k])?;
        let plan = if rng.random() {
            gpu.plan(Problem { m, n, k })?
        } else {
            Plan::with_config(Problem { m, n, k }, random_config(gpu, &mut rng))?
        };
        let output_type = *OutputType::ALL.choose(&mut rng).unwrap_or(&OutputType::Bf16);
        let padding = *[0, 0, 1, 8].choose(&mut rng).unwrap_or(&0);
        problem.check_type(gpu, &session, &plan, output_type, rng.random(), padding)?;
        done += 1;
    }
    Ok(())
}

fn the_longest_k_equals_the_cpu(gpu: &'static Gpu) -> Result<(), Failed> {
    let mut rng = rng(4);
    let session = Session::new(gpu)?;
    for [m, n] in [[1, 65], [5, 128], [130, 66]] {
        let problem = Fixture::random(gpu, &mut rng, [m, n, 131_072])?;
        let plan = gpu.plan(Problem::new(m, n, 131_072))?;
        problem.check_type(gpu, &session, &plan, OutputType::I32, false, 0)?;
        problem.check_type(gpu, &session, &plan, OutputType::F32, true, 0)?;
    }
    Ok(())
}

fn any_tile_configuration_gives_the_same_bits(gpu: &'static Gpu) -> Result<(), Failed> {
    let mut rng = rng(5);
    let session = Session::new(gpu)?;
    for shape in TILE_SHAPES {
        let (m, n, k) = (shape.tokens as usize + 3, 700, 4096);
        let problem = Fixture::random(gpu, &mut rng, [m, n, k])?;
        for cluster_size in [1, 2, 4] {
            for clusters in [1, 2, 3, 5, 12, 31, gpu.multiprocessors() / cluster_size] {
                for stream_k_waves in [0, 1, 2, 100] {
                    let plan = Plan::with_config(
                        Problem { m, n, k },
                        TileConfig { shape, cluster_size, clusters, stream_k_waves },
                    )?;
                    problem.check_type(gpu, &session, &plan, OutputType::I32, false, 0)?;
                }
            }
        }
    }
    Ok(())
}

fn persistent_clusters_with_many_tiles_equal_the_cpu(gpu: &'static Gpu) -> Result<(), Failed> {
    let mut rng = rng(11);
    let session = Session::new(gpu)?;
    for shape in TILE_SHAPES {
        // Few k-iterations a tile, so that the end of one tile overlaps the start of the next.
        // The last token tile is mostly empty.
        // With K = 64 a tile's stores may still run when the next tile's results are ready.
        let tokens = shape.tokens as usize;
        for [m, n, k] in [[tokens * 2 + tokens / 3, 1024, 448], [tokens * 4, 1024, 64], [77, 700, 100]] {
            let problem = Fixture::random(gpu, &mut rng, [m, n, k])?;
            // With cluster split-K, the thread blocks also exchange partial sums,
            // in an order that depends on timing.
            // Repeated runs test more of these orders.
            let clusters: &[u32] = if shape.cluster_split > 1 { &[1, 2, 5, 1, 2, 1, 2] } else { &[1, 2, 5] };
            for &clusters in clusters {
                let plan = Plan::with_config(
                    Problem { m, n, k },
                    TileConfig { shape, cluster_size: 1, clusters, stream_k_waves: 0 },
                )?;
                for output_type in OutputType::ALL {
                    for padding in [0, 3] {
                        problem.check_type(gpu, &session, &plan, output_type, rng.random(), padding)?;
                    }
                }
            }
        }
    }
    Ok(())
}

fn any_two_launch_plan_gives_the_same_bits(gpu: &'static Gpu) -> Result<(), Failed> {
    let mut rng = rng(10);
    let session = Session::new(gpu)?;
    // The last strip is full or partly filled, and the output's rows are aligned to 16 bytes or not.
    for [m, n, k] in [[300, 1024, 448], [130, 1000, 1030], [65, 129, 100], [257, 709, 640]] {
        let problem = Fixture::random(gpu, &mut rng, [m, n, k])?;
        for boundary in [64, n / 128 * 64, (n - 1) / 64 * 64] {
            for round in 0..6 {
                let configs = [random_config(gpu, &mut rng), random_config(gpu, &mut rng)];
                let plan = Plan::two_launches(Problem { m, n, k }, boundary, configs)?;
                let output_type = OutputType::ALL[round % OutputType::ALL.len()];
                let padding = *[0, 0, 8, 3].choose(&mut rng).unwrap_or(&0);
                problem.check_type(gpu, &session, &plan, output_type, rng.random(), padding)?;
            }
        }
    }
    Ok(())
}

fn skinny_problems_equal_the_cpu_for_every_kernel(gpu: &'static Gpu) -> Result<(), Failed> {
    let mut rng = rng(7);
    let session = Session::new(gpu)?;
    let most = gpu.multiprocessors();
    let shapes = [
        [1, 1, 1],
        [3, 5, 63],
        [8, 64, 64],
        [5, 17, 65],
        [2, 31, 100],
        [7, 200, 1000],
        [1, 509, 4097],
        [8, 1021, 4160],
        [9, 100, 4095],
        [16, 333, 2049],
        [13, 2200, 640],
        [16, 4096, 4096],
    ];
    for [m, n, k] in shapes {
        let problem = Fixture::random(gpu, &mut rng, [m, n, k])?;
        for shape in SKINNY_SHAPES.into_iter().filter(|shape| m <= shape.tokens as usize) {
            // Few thread blocks need many passes.
            for blocks in [most, 3, 1] {
                if blocks < most && n > 2200 {
                    continue;
                }
                let plan = Plan::skinny(Problem { m, n, k }, shape, blocks)?;
                problem.check_type(gpu, &session, &plan, OutputType::I32, false, 0)?;
                problem.check_type(gpu, &session, &plan, OutputType::Bf16, true, 0)?;
            }
        }
    }
    Ok(())
}

fn every_output_type_equals_the_cpu_for_every_skinny_kernel(gpu: &'static Gpu) -> Result<(), Failed> {
    let mut rng = rng(8);
    let session = Session::new(gpu)?;
    for shape in SKINNY_SHAPES {
        for (m, n, k) in [(shape.tokens as usize, 264, 448), (shape.tokens as usize - 1, 1001, 1030)] {
            let problem = Fixture::random(gpu, &mut rng, [m, n, k])?;
            let plan = Plan::skinny(Problem { m, n, k }, shape, 7)?;
            for output_type in OutputType::ALL {
                for bias in [false, true] {
                    // Rows that are aligned to 16 bytes, to 8, and to neither.
                    for padding in [0, 4, 8, 3] {
                        problem.check_type(gpu, &session, &plan, output_type, bias, padding)?;
                    }
                }
            }
        }
    }
    Ok(())
}

fn the_longest_k_equals_the_cpu_for_every_skinny_kernel(gpu: &'static Gpu) -> Result<(), Failed> {
    let mut rng = rng(9);
    let session = Session::new(gpu)?;
    for shape in SKINNY_SHAPES {
        let [m, n, k] = [shape.tokens as usize, 65, 131_072];
        let problem = Fixture::random(gpu, &mut rng, [m, n, k])?;
        let plan = Plan::skinny(Problem { m, n, k }, shape, gpu.multiprocessors())?;
        problem.check_type(gpu, &session, &plan, OutputType::I32, false, 0)?;
        problem.check_type(gpu, &session, &plan, OutputType::F32, true, 0)?;
    }
    Ok(())
}

/// Returns a random tile configuration.
fn random_config(gpu: &Gpu, rng: &mut StdRng) -> TileConfig {
    let shape = TILE_SHAPES[rng.random_range(0..TILE_SHAPES.len())];
    let cluster_size = 1 << rng.random_range(0..3);
    let most = gpu.multiprocessors() / cluster_size;
    TileConfig {
        shape,
        cluster_size,
        clusters: rng.random_range(1..=most),
        stream_k_waves: rng.random_range(0..4),
    }
}

fn repeated_launches_give_the_same_bits(gpu: &'static Gpu) -> Result<(), Failed> {
    let mut rng = rng(6);
    let session = Session::new(gpu)?;
    let (m, n, k) = (16, 4096, 4096);
    let problem = Fixture::random(gpu, &mut rng, [m, n, k])?;
    let plan = gpu.plan(Problem { m, n, k })?;
    for _ in 0..20 {
        problem.check_type(gpu, &session, &plan, OutputType::Bf16, true, 0)?;
    }
    Ok(())
}
