//! Tests of plans: for every problem, each output is computed exactly once and the launch fits the GPU.
//!
//! They test `src/plan.rs` and the schedules of `crates/format/src/schedule.rs`. They need no GPU.

use liquidgemm::PlanError;
use liquidgemm::{Algorithm, DeviceFigures, Error, Plan, Problem, TileConfig, Tiled};
use liquidgemm_format::tile::{TILE_SHAPES, TileShape};
use proptest::prelude::*;

/// Returns the tiles of a plan with one tiled launch.
fn tiled(plan: &Plan) -> Tiled {
    let Some(tiled) = plan.tiled() else { panic!("not a plan with one tiled launch: {plan}") };
    *tiled
}

/// Returns the plan's tiled launches. A skinny plan has none.
fn launches(plan: &Plan) -> Vec<Tiled> {
    plan.tiled_launches().map(|(_, tiled)| tiled).collect()
}

/// Fails unless the plan covers `[m, n]` and K exactly once.
fn check_cover(plan: &Plan) -> Result<(), TestCaseError> {
    match plan.algorithm() {
        Algorithm::Tiled(tiled) => check_tiles(plan.problem(), tiled),
        Algorithm::TwoLaunches(two_launches) => {
            let Problem { m, n, k } = plan.problem();
            let [(first, _), (second, _)] = two_launches.parts(n);
            prop_assert_eq!((first.start, first.end, second.end), (0, second.start, n), "{}", plan);
            prop_assert!(first.end > 0 && first.end < n && first.end.is_multiple_of(64), "{plan}");
            two_launches
                .parts(n)
                .iter()
                .try_for_each(|(channels, tiled)| check_tiles(Problem::new(m, channels.len(), k), tiled))
        }
        Algorithm::Skinny(skinny) => {
            let Problem { m, n, .. } = plan.problem();
            prop_assert!(m <= skinny.shape().tokens as usize, "tokens: {plan}");
            let mut next = 0;
            for block in 0..skinny.blocks() {
                let (begin, end) = skinny.runs().of_block(block);
                let is_busy = block < skinny.busy_blocks();
                prop_assert!(begin == next && (end > begin) == is_busy && end >= begin, "{plan}");
                next = end;
            }
            prop_assert_eq!(next as usize, n.div_ceil(16), "{}", plan);
            prop_assert!(skinny.runs().pass <= skinny.shape().m16_tiles, "{plan}");
            Ok(())
        }
    }
}

/// Fails unless the tiles cover `[m, n]` and K, no tile is empty,
/// and each k-iteration of a tile is computed once.
fn check_tiles(Problem { m, n, k }: Problem, tiled: &Tiled) -> Result<(), TestCaseError> {
    let schedule = tiled.schedule();
    let covers = |pieces: u32, size: usize, whole: usize| {
        pieces as usize * size >= whole && (pieces as usize - 1) * size < whole
    };
    let cluster_channels = tiled.cluster_channels() as usize;
    prop_assert!(covers(schedule.channel_tiles, cluster_channels, n), "channels: {tiled}");
    prop_assert!(covers(schedule.token_tiles, tiled.shape().tokens as usize, m), "tokens: {tiled}");
    let iteration_k = tiled.shape().stage_k() * tiled.shape().cluster_split;
    prop_assert!(covers(schedule.k_iterations, iteration_k as usize, k), "K: {tiled}");
    prop_assert_eq!(schedule.clusters * tiled.cluster_size(), tiled.blocks());

    let tiles = schedule.tiles() as usize;
    let mut at = vec![false; tiles];
    for tile in 0..schedule.tiles() {
        let position = schedule.position(tile);
        let index = position.token_tile * schedule.channel_tiles + position.channel_tile;
        prop_assert!(!std::mem::replace(&mut at[index as usize], true), "tile {tile} twice: {tiled}");
    }
    // A tile's sorted segments must follow one another without overlap or gap.
    let mut segments: Vec<_> =
        (0..schedule.clusters).flat_map(|cluster| schedule.segments(cluster)).collect();
    segments.sort_by_key(|segment| (segment.tile, segment.k_begin));
    let mut next = (0, 0);
    for segment in segments {
        prop_assert_eq!((segment.tile, segment.k_begin), next, "{}", tiled);
        prop_assert!(segment.k_end > segment.k_begin && segment.k_end <= schedule.k_iterations, "{tiled}");
        next = if segment.k_end == schedule.k_iterations {
            (segment.tile + 1, 0)
        } else {
            (segment.tile, segment.k_end)
        };
    }
    prop_assert_eq!(next, (schedule.tiles(), 0), "{}", tiled);
    Ok(())
}

/// Fails unless a workspace for this many SMs has a slot for every thread block of the launch.
fn check_fit(plan: &Plan, multiprocessors: u32) -> Result<(), TestCaseError> {
    prop_assert!(plan.blocks() >= 1);
    prop_assert!(
        plan.blocks() <= multiprocessors,
        "{} thread blocks on {multiprocessors} SMs: {plan}",
        plan.blocks()
    );
    for tiled in launches(plan) {
        let cluster = tiled.cluster_size();
        prop_assert!(cluster.is_power_of_two() && cluster <= tiled.shape().max_cluster().max(1));
    }
    Ok(())
}

/// Returns a strategy for dimensions up to `limit` that favours powers of two and their neighbours.
fn dimension(limit: usize) -> impl Strategy<Value = usize> {
    let round =
        (0..limit.ilog2(), -1..=1i64).prop_map(|(log, offset)| ((1i64 << log) + offset).max(1) as usize);
    prop_oneof![round, 1..=limit]
}

/// Returns an H100's figures with another number of SMs.
fn figures(multiprocessors: u32) -> DeviceFigures {
    let clusters = DeviceFigures::cautious_clusters(multiprocessors);
    DeviceFigures { multiprocessors, clusters, ..DeviceFigures::H100_SXM }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn every_plan_covers_its_problem_once_and_fits_the_gpu(
        m in dimension(3000), n in dimension(8192), k in dimension(32_768), multiprocessors in 2..=144u32,
    ) {
        let plan = Plan::new(Problem { m, n, k }, &figures(multiprocessors)).unwrap();
        prop_assert_eq!(plan.problem(), Problem { m, n, k });
        check_cover(&plan)?;
        check_fit(&plan, multiprocessors)?;
    }

    #[test]
    fn every_candidate_covers_the_problem_and_none_has_a_lower_estimate_than_the_chosen(
        m in dimension(1000), n in dimension(4096), k in dimension(16_384), multiprocessors in 2..=144u32,
    ) {
        let chosen = Plan::new(Problem { m, n, k }, &figures(multiprocessors)).unwrap();
        let candidates = Plan::candidates(Problem { m, n, k }, &figures(multiprocessors)).unwrap();
        prop_assert!(candidates.contains(&chosen));
        for candidate in candidates {
            check_cover(&candidate)?;
            check_fit(&candidate, multiprocessors)?;
            let us = candidate.estimate_us(&figures(multiprocessors));
            prop_assert!(us.is_finite(), "{us} µs: {candidate}");
            prop_assert!(us >= chosen.estimate_us(&figures(multiprocessors)), "{us} µs: {candidate}");
        }
    }

    #[test]
    fn every_tile_covers_every_problem_once_and_fits_the_gpu(
        m in dimension(1000),
        n in dimension(4096),
        k in dimension(16_384),
        multiprocessors in 1..=144u32,
        shape in prop::sample::select(&TILE_SHAPES[..]),
    ) {
        let plan = Plan::with_tile(Problem { m, n, k }, shape, &figures(multiprocessors)).unwrap();
        prop_assert_eq!(tiled(&plan).shape(), shape);
        check_cover(&plan)?;
        check_fit(&plan, multiprocessors.max(shape.cluster_split))?;
    }

    #[test]
    fn any_tile_configuration_is_reduced_to_what_the_problem_can_use(
        m in dimension(1000),
        n in dimension(4096),
        k in dimension(16_384),
        shape in prop::sample::select(&TILE_SHAPES[..]),
        cluster_size in prop_oneof![0..10u32, Just(u32::MAX)],
        clusters in prop_oneof![0..400u32, Just(u32::MAX)],
        stream_k_waves in prop_oneof![0..4u32, Just(u32::MAX)],
    ) {
        let plan = Plan::with_config(Problem { m, n, k }, TileConfig { shape, cluster_size, clusters, stream_k_waves }).unwrap();
        check_cover(&plan)?;
        prop_assert!(tiled(&plan).config().clusters <= clusters.max(1));
        prop_assert!(tiled(&plan).cluster_size() <= cluster_size.max(shape.cluster_split));
    }
}

#[test]
fn the_largest_k_has_a_plan_and_the_next_has_none() {
    assert!(Plan::new(Problem::new(1, 1, 131_072), &DeviceFigures::H100_SXM).is_ok());
    assert!(matches!(
        Plan::new(Problem::new(1, 1, 131_073), &DeviceFigures::H100_SXM),
        Err(Error::KTooLarge { k: 131_073 })
    ));
    assert!(matches!(
        Plan::new(Problem::new(1, 1, usize::MAX), &DeviceFigures::H100_SXM),
        Err(Error::KTooLarge { k: usize::MAX })
    ));
}

#[test]
fn dimensions_of_zero_are_named() {
    for (shape, name) in [([0, 5, 5], "m"), ([5, 0, 5], "n"), ([5, 5, 0], "k")] {
        let [m, n, k] = shape;
        match Plan::new(Problem { m, n, k }, &DeviceFigures::H100_SXM) {
            Err(Error::EmptyDimension { dimension }) => assert_eq!(dimension, name),
            other => panic!("{shape:?}: {other:?}"),
        }
    }
}

#[test]
fn sizes_beyond_32_bits_are_errors() {
    let too_long = 1 << 31;
    for (m, n, named) in [(too_long, 1, "m"), (1, too_long, "n"), (usize::MAX, 1, "m")] {
        match Plan::new(Problem::new(m, n, 64), &DeviceFigures::H100_SXM) {
            Err(Error::Plan(PlanError::OutOfRange { what, value, .. })) => {
                assert_eq!((what, value), (named, m.max(n)));
            }
            other => panic!("m = {m}, n = {n}: {other:?}"),
        }
    }
    let (m, n) = (i32::MAX as usize, i32::MAX as usize);
    match Plan::new(Problem::new(m, n, 131_072), &DeviceFigures::H100_SXM) {
        Err(Error::Plan(error @ PlanError::OutOfRange { what: "the number of tiles", .. })) => {
            assert!(error.to_string().contains("at most"), "{error}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_batch_too_large_for_small_tiles_is_planned_with_larger_ones() {
    let small = TILE_SHAPES[0];
    // Some of the larger tiles are also too small for so many tokens.
    let plan = Plan::new(Problem::new(40_000_000, 57_344, 8192), &DeviceFigures::H100_SXM).unwrap();
    assert!(launches(&plan).iter().all(|tiled| tiled.shape().tokens > small.tokens), "{plan}");
    let (m, n, k) = (4_000_000, 57_344, 8192);
    assert!(matches!(
        Plan::with_tile(Problem { m, n, k }, small, &DeviceFigures::H100_SXM),
        Err(Error::Plan(PlanError::OutOfRange { .. }))
    ));
    let plan = Plan::new(Problem { m, n, k }, &DeviceFigures::H100_SXM).unwrap();
    assert!(launches(&plan).iter().all(|tiled| tiled.shape().tokens > small.tokens), "{plan}");
}

#[test]
fn a_tile_without_a_kernel_is_refused_by_name() {
    let strips = TILE_SHAPES[0].strips;
    for (strips, tokens) in [(strips, 0), (strips, 40), (u32::MAX, 8)] {
        let shape = TileShape { strips, tokens, ..TILE_SHAPES[0] };
        match Plan::with_tile(Problem::new(5, 5, 5), shape, &DeviceFigures::H100_SXM) {
            Err(Error::Plan(error @ PlanError::UnknownTile { .. })) => {
                assert!(error.to_string().contains(&format!("{tokens} tokens")), "{error}");
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_plan_shows_its_tile_and_clusters_on_one_line() {
    let plan = Plan::new(Problem::new(64, 12_288, 4096), &DeviceFigures::H100_SXM).unwrap();
    let text = plan.to_string();
    assert_eq!(text.lines().count(), 1);
    let tiled = tiled(&plan);
    let tile = format!("{} channels x {} tokens", tiled.cluster_channels(), tiled.shape().tokens);
    assert!(text.contains(&tile), "{text}");
    assert!(text.contains(&format!("{} clusters", tiled.config().clusters)), "{text}");
}

#[test]
fn the_search_finds_the_least_estimate_of_all_candidates_and_fits_every_gpu() {
    let gpus = [
        DeviceFigures::H100_SXM,
        DeviceFigures::H100_PCIE,
        DeviceFigures::H200,
        DeviceFigures::GH200,
        DeviceFigures::H20,
    ];
    let matrices = [(4096, 4096), (12_288, 4096), (10_240, 8192), (57_344, 8192), (1280, 8192), (5001, 130)];
    for figures in gpus {
        for (n, k) in matrices {
            for m in [1, 9, 33, 100, 129, 300, 512, 1500, 5000, 100_000] {
                let plan = Plan::new(Problem { m, n, k }, &figures).unwrap();
                let estimates = Plan::candidates(Problem { m, n, k }, &figures).unwrap();
                let least = estimates.iter().map(|plan| plan.estimate_us(&figures)).fold(f64::MAX, f64::min);
                assert_eq!(plan.estimate_us(&figures), least, "{m} x {n} x {k}: {plan}");
                assert!(plan.blocks() <= figures.multiprocessors, "{plan}");
                for tiled in launches(&plan) {
                    let clusters = figures.clusters[tiled.cluster_size().ilog2() as usize];
                    assert!(tiled.config().clusters <= clusters, "{plan}");
                }
                let faster = DeviceFigures { memory_bytes_per_second: 6_000_000_000_000, ..figures };
                let slower = DeviceFigures { clock_hz: 1_000_000_000, ..figures };
                assert!(plan.estimate_us(&faster) <= plan.estimate_us(&figures), "{plan}");
                assert!(plan.estimate_us(&slower) >= plan.estimate_us(&figures), "{plan}");
            }
        }
    }
}

/// A fuzz target: any numbers give an error, or a plan that covers its problem and fits the GPU.
///
/// By default it runs for some seconds.
/// `BOLERO_RANDOM_TEST_TIME_MS=600000 BOLERO_RANDOM_ITERATIONS=1000000000` makes it run for ten minutes.
#[test]
fn fuzz_plans_and_their_schedules() {
    /// Plans with more tiles take too long to check.
    const MOST_TILES: u32 = 20_000;
    bolero::check!().with_type::<([u32; 3], [u8; 3], u8)>().cloned().for_each(
        |(dimensions, shifts, multiprocessors)| {
            // Shift the numbers to get dimensions of all magnitudes.
            let mut extents = [0; 3];
            for ((extent, dimension), shift) in extents.iter_mut().zip(dimensions).zip(shifts) {
                *extent = (dimension >> (shift % 32)) as usize;
            }
            let [m, n, k] = extents;
            let multiprocessors = u32::from(multiprocessors).max(2);
            let Ok(plan) = Plan::new(Problem { m, n, k }, &figures(multiprocessors)) else { return };
            assert_eq!(plan.problem(), Problem { m, n, k });
            assert!(plan.estimate_us(&figures(multiprocessors)).is_finite());
            check_fit(&plan, multiprocessors).unwrap();
            if launches(&plan).iter().all(|tiled| tiled.schedule().tiles() <= MOST_TILES) {
                check_cover(&plan).unwrap();
            }
        },
    );
}
