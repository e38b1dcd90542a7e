//! Plans: whatever is asked for, all of the output is computed once and the launch fits the GPU.

use liquidgemm::gpu::GpuError;
use liquidgemm::{Cut, DeviceFigures, Error, Method, Plan, Tiled};
use liquidgemm_format::tile::{TILE_SHAPES, TileShape};
use proptest::prelude::*;

/// The plan's tiles.
fn tiled(plan: &Plan) -> Tiled {
    let Some(tiled) = plan.tiled() else { panic!("not one launch in tiles: {plan}") };
    *tiled
}

/// The plan's launches in tiles.
fn launches(plan: &Plan) -> Vec<Tiled> {
    plan.tiled_launches().map(|(_, tiled)| tiled).collect()
}

/// Fails unless the plan covers `[m, n]` and K.
fn check_cover(plan: &Plan) -> Result<(), TestCaseError> {
    match plan.method() {
        Method::Tiled(tiled) => check_tiles(plan.problem(), tiled),
        Method::Divided(divided) => {
            let [m, n, k] = plan.problem();
            let [(first, _), (second, _)] = divided.parts(n);
            prop_assert_eq!((first.start, first.end, second.end), (0, second.start, n), "{}", plan);
            prop_assert!(first.end > 0 && first.end < n && first.end.is_multiple_of(64), "{plan}");
            divided
                .parts(n)
                .iter()
                .try_for_each(|(channels, tiled)| check_tiles([m, channels.len(), k], tiled))
        }
        Method::Skinny(skinny) => {
            let [m, n, _] = plan.problem();
            prop_assert!(m <= skinny.shape().tokens as usize, "tokens: {plan}");
            let mut next = 0;
            for block in 0..skinny.blocks() {
                let (begin, end) = skinny.shares().of_block(block);
                let is_busy = block < skinny.busy_blocks();
                prop_assert!(begin == next && (end > begin) == is_busy && end >= begin, "{plan}");
                next = end;
            }
            prop_assert_eq!(next as usize, n.div_ceil(16), "{}", plan);
            prop_assert!(skinny.shares().pass <= skinny.shape().units, "{plan}");
            Ok(())
        }
    }
}

/// Fails unless the tiles cover `[m, n]` and K, none of them in vain, and each tile's K steps are computed once.
fn check_tiles([m, n, k]: [usize; 3], tiled: &Tiled) -> Result<(), TestCaseError> {
    let schedule = tiled.schedule();
    let covers = |pieces: u32, size: usize, whole: usize| {
        pieces as usize * size >= whole && (pieces as usize - 1) * size < whole
    };
    let cluster_channels = tiled.cluster_channels() as usize;
    prop_assert!(covers(schedule.channel_tiles, cluster_channels, n), "channels: {tiled}");
    prop_assert!(covers(schedule.token_tiles, tiled.shape().tokens as usize, m), "tokens: {tiled}");
    let step_k = tiled.shape().stage_k() * tiled.shape().split;
    prop_assert!(covers(schedule.k_steps, step_k as usize, k), "K: {tiled}");
    prop_assert_eq!(schedule.workers * tiled.cluster(), tiled.blocks());

    let tiles = schedule.tiles() as usize;
    let mut at = vec![false; tiles];
    for tile in 0..schedule.tiles() {
        let position = schedule.position(tile);
        let index = position.token_tile * schedule.channel_tiles + position.channel_tile;
        prop_assert!(!std::mem::replace(&mut at[index as usize], true), "tile {tile} twice: {tiled}");
    }
    // Segments of a tile neither overlap nor leave a gap if, one behind the other, they are as long as the tile.
    let mut segments: Vec<_> = (0..schedule.workers).flat_map(|worker| schedule.segments(worker)).collect();
    segments.sort_by_key(|segment| (segment.tile, segment.k_begin));
    let mut next = (0, 0);
    for segment in segments {
        prop_assert_eq!((segment.tile, segment.k_begin), next, "{}", tiled);
        prop_assert!(segment.k_end > segment.k_begin && segment.k_end <= schedule.k_steps, "{tiled}");
        next = if segment.k_end == schedule.k_steps {
            (segment.tile + 1, 0)
        } else {
            (segment.tile, segment.k_end)
        };
    }
    prop_assert_eq!(next, (schedule.tiles(), 0), "{}", tiled);
    Ok(())
}

/// Fails unless all blocks of the launch have their slot in a workspace made for this many multiprocessors.
fn check_fit(plan: &Plan, multiprocessors: u32) -> Result<(), TestCaseError> {
    prop_assert!(plan.blocks() >= 1);
    prop_assert!(
        plan.blocks() <= multiprocessors,
        "{} blocks on {multiprocessors} multiprocessors: {plan}",
        plan.blocks()
    );
    for tiled in launches(plan) {
        let cluster = tiled.cluster();
        prop_assert!(cluster.is_power_of_two() && cluster <= tiled.shape().max_cluster().max(1));
    }
    Ok(())
}

/// Dimensions with an eye on the small ones and on both sides of round ones.
fn dimension(limit: usize) -> impl Strategy<Value = usize> {
    let round =
        (0..limit.ilog2(), -1..=1i64).prop_map(|(log, offset)| ((1i64 << log) + offset).max(1) as usize);
    prop_oneof![round, 1..=limit]
}

/// An H100's figures, with another number of SMs.
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
        let plan = Plan::new(m, n, k, &figures(multiprocessors)).unwrap();
        prop_assert_eq!(plan.problem(), [m, n, k]);
        check_cover(&plan)?;
        check_fit(&plan, multiprocessors)?;
    }

    #[test]
    fn every_candidate_is_a_plan_for_the_problem_and_none_is_estimated_below_the_chosen(
        m in dimension(1000), n in dimension(4096), k in dimension(16_384), multiprocessors in 2..=144u32,
    ) {
        let chosen = Plan::new(m, n, k, &figures(multiprocessors)).unwrap();
        let candidates = Plan::candidates(m, n, k, &figures(multiprocessors)).unwrap();
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
        let plan = Plan::with_tile(m, n, k, shape, &figures(multiprocessors)).unwrap();
        prop_assert_eq!(tiled(&plan).shape(), shape);
        check_cover(&plan)?;
        check_fit(&plan, multiprocessors.max(shape.split))?;
    }

    #[test]
    fn any_cut_is_brought_down_to_what_the_problem_can_use(
        m in dimension(1000),
        n in dimension(4096),
        k in dimension(16_384),
        shape in prop::sample::select(&TILE_SHAPES[..]),
        cluster in prop_oneof![0..10u32, Just(u32::MAX)],
        workers in prop_oneof![0..400u32, Just(u32::MAX)],
        streamed_waves in prop_oneof![0..4u32, Just(u32::MAX)],
    ) {
        let plan = Plan::with_cut(m, n, k, Cut { shape, cluster, workers, streamed_waves }).unwrap();
        check_cover(&plan)?;
        prop_assert!(tiled(&plan).cut().workers <= workers.max(1));
        prop_assert!(tiled(&plan).cluster() <= cluster.max(shape.split));
    }
}

#[test]
fn the_largest_k_has_a_plan_and_the_next_has_none() {
    assert!(Plan::new(1, 1, 131_072, &DeviceFigures::H100_SXM).is_ok());
    assert!(matches!(
        Plan::new(1, 1, 131_073, &DeviceFigures::H100_SXM),
        Err(Error::KTooLarge { k: 131_073 })
    ));
    assert!(matches!(
        Plan::new(1, 1, usize::MAX, &DeviceFigures::H100_SXM),
        Err(Error::KTooLarge { k: usize::MAX })
    ));
}

#[test]
fn dimensions_of_zero_are_named() {
    for (shape, name) in [([0, 5, 5], "m"), ([5, 0, 5], "n"), ([5, 5, 0], "k")] {
        let [m, n, k] = shape;
        match Plan::new(m, n, k, &DeviceFigures::H100_SXM) {
            Err(Error::EmptyDimension { dimension }) => assert_eq!(dimension, name),
            other => panic!("{shape:?}: {other:?}"),
        }
    }
}

#[test]
fn what_32_bits_cannot_count_is_an_error() {
    let too_long = 1 << 31;
    for (m, n, named) in [(too_long, 1, "m"), (1, too_long, "n"), (usize::MAX, 1, "m")] {
        match Plan::new(m, n, 64, &DeviceFigures::H100_SXM) {
            Err(Error::Gpu(GpuError::OutOfRange { what, value, .. })) => {
                assert_eq!((what, value), (named, m.max(n)));
            }
            other => panic!("m = {m}, n = {n}: {other:?}"),
        }
    }
    let (m, n) = (i32::MAX as usize, i32::MAX as usize);
    match Plan::new(m, n, 131_072, &DeviceFigures::H100_SXM) {
        Err(Error::Gpu(error @ GpuError::OutOfRange { what: "the number of tiles", .. })) => {
            assert!(error.to_string().contains("at most"), "{error}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_batch_too_large_for_small_tiles_is_planned_with_larger_ones() {
    let small = TILE_SHAPES[0];
    // Some of the larger tiles are too small for so many tokens, too.
    let plan = Plan::new(40_000_000, 57_344, 8192, &DeviceFigures::H100_SXM).unwrap();
    assert!(launches(&plan).iter().all(|tiled| tiled.shape().tokens > small.tokens), "{plan}");
    let (m, n, k) = (4_000_000, 57_344, 8192);
    assert!(matches!(
        Plan::with_tile(m, n, k, small, &DeviceFigures::H100_SXM),
        Err(Error::Gpu(GpuError::OutOfRange { .. }))
    ));
    let plan = Plan::new(m, n, k, &DeviceFigures::H100_SXM).unwrap();
    assert!(launches(&plan).iter().all(|tiled| tiled.shape().tokens > small.tokens), "{plan}");
}

#[test]
fn a_tile_without_a_kernel_is_refused_by_name() {
    for tokens in [0, 40] {
        let shape = TileShape { tokens, ..TILE_SHAPES[0] };
        match Plan::with_tile(5, 5, 5, shape, &DeviceFigures::H100_SXM) {
            Err(Error::Gpu(error @ GpuError::UnknownTile { .. })) => {
                assert!(error.to_string().contains(&format!("{tokens} tokens")), "{error}");
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_plan_shows_its_tile_and_workers_on_one_line() {
    let plan = Plan::new(64, 12_288, 4096, &DeviceFigures::H100_SXM).unwrap();
    let text = plan.to_string();
    assert_eq!(text.lines().count(), 1);
    let tiled = tiled(&plan);
    let tile = format!("{} channels x {} tokens", tiled.cluster_channels(), tiled.shape().tokens);
    assert!(text.contains(&tile), "{text}");
    assert!(text.contains(&format!("{} workers", tiled.cut().workers)), "{text}");
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
                let plan = Plan::new(m, n, k, &figures).unwrap();
                let estimates = Plan::candidates(m, n, k, &figures).unwrap();
                let least = estimates.iter().map(|plan| plan.estimate_us(&figures)).fold(f64::MAX, f64::min);
                assert_eq!(plan.estimate_us(&figures), least, "{m} x {n} x {k}: {plan}");
                assert!(plan.blocks() <= figures.multiprocessors, "{plan}");
                for tiled in launches(&plan) {
                    let clusters = figures.clusters[tiled.cluster().ilog2() as usize];
                    assert!(tiled.cut().workers <= clusters, "{plan}");
                }
                let faster = DeviceFigures { memory_bytes_per_second: 6_000_000_000_000, ..figures };
                let slower = DeviceFigures { clock_hz: 1_000_000_000, ..figures };
                assert!(plan.estimate_us(&faster) <= plan.estimate_us(&figures), "{plan}");
                assert!(plan.estimate_us(&slower) >= plan.estimate_us(&figures), "{plan}");
            }
        }
    }
}

/// A fuzz target: any numbers at all are a plan that covers its problem and fits the GPU, or an error.
///
/// It takes some seconds' worth of random numbers; `BOLERO_RANDOM_TEST_TIME_MS=600000 BOLERO_RANDOM_ITERATIONS=1000000000` makes it ten minutes.
#[test]
fn fuzz_plans_and_their_schedules() {
    /// More tiles than these take too long to go through.
    const MOST_TILES: u32 = 20_000;
    bolero::check!().with_type::<([u32; 3], [u8; 3], u8)>().cloned().for_each(
        |(dimensions, shifts, multiprocessors)| {
            // Of all magnitudes.
            let mut extents = [0; 3];
            for ((extent, dimension), shift) in extents.iter_mut().zip(dimensions).zip(shifts) {
                *extent = (dimension >> (shift % 32)) as usize;
            }
            let [m, n, k] = extents;
            let multiprocessors = u32::from(multiprocessors).max(2);
            let Ok(plan) = Plan::new(m, n, k, &figures(multiprocessors)) else { return };
            assert_eq!(plan.problem(), extents);
            assert!(plan.estimate_us(&figures(multiprocessors)).is_finite());
            check_fit(&plan, multiprocessors).unwrap();
            if launches(&plan).iter().all(|tiled| tiled.schedule().tiles() <= MOST_TILES) {
                check_cover(&plan).unwrap();
            }
        },
    );
}
