//! Tests of GPTQ on correlated inputs, degenerate Hessians, every kind of group, and bad input.
//!
//! They test `src/quantize/gptq.rs` and `hessian.rs`.

use liquidgemm::{
    Error, GptqOptions, Group, Hessian, HessianBuilder, Inputs, PackedWeights, QuantizeOptions, rotate,
    smooth_weights,
};

const GROUPS: [Group; 3] = [Group::K(64), Group::K(128), Group::Channel];

/// Returns reproducible numbers that are nearly normally distributed.
fn normal(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut uniform = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1u64 << 24) as f32
    };
    (0..count).map(|_| (0..12).map(|_| uniform()).sum::<f32>() - 6.0).collect()
}

/// Returns inputs `[m, k]` like those of a language model: a few directions that all channels share,
/// and a few channels that are much larger than the others.
fn inputs(m: usize, k: usize) -> Vec<f32> {
    const DIRECTIONS: usize = 12;
    let (directions, noise) = (normal(DIRECTIONS * k, 31), normal(m * k, 32));
    let strengths = normal(m * DIRECTIONS, 33);
    let mut x = noise;
    for (token, x) in x.chunks_exact_mut(k).enumerate() {
        for (j, x) in x.iter_mut().enumerate() {
            for direction in 0..DIRECTIONS {
                *x += strengths[token * DIRECTIONS + direction] * directions[direction * k + j];
            }
            if j % 50 == 7 {
                *x *= 10.0;
            }
        }
    }
    x
}

fn hessian(x: &[f32], k: usize) -> Hessian {
    let mut builder = HessianBuilder::new(k).unwrap();
    builder.add(x, x.len() / k).unwrap();
    builder.finish().unwrap()
}

fn gptq(weights: &[f32], k: usize, hessian: &Hessian, group: Group) -> PackedWeights {
    let options = GptqOptions { group, ..Default::default() };
    PackedWeights::quantize_gptq(weights, weights.len() / k, k, hessian, &options).unwrap()
}

fn search(weights: &[f32], k: usize, hessian: &Hessian, group: Group) -> PackedWeights {
    let moments = hessian.second_moments();
    let options = QuantizeOptions { group, second_moments: Some(&moments), ..Default::default() };
    PackedWeights::quantize_with(weights, weights.len() / k, k, &options).unwrap()
}

fn outputs(packed: &PackedWeights, weights: &[f32], hessian: &Hessian) -> f64 {
    packed.output_error(weights, Inputs::Hessian(hessian)).unwrap().outputs
}

#[test]
fn errors_of_outputs_are_far_below_those_of_the_weighted_search_for_correlated_inputs() {
    let n = 70;
    for k in [64, 200, 384] {
        let weights = normal(n * k, 1);
        let hessian = hessian(&inputs(4 * k, k), k);
        for group in GROUPS {
            let gptq = outputs(&gptq(&weights, k, &hessian, group), &weights, &hessian);
            let search = outputs(&search(&weights, k, &hessian, group), &weights, &hessian);
            assert!(gptq < 0.8 * search, "k {k}, group {group}: {gptq}, the search has {search}");
        }
    }
}

#[test]
fn the_expected_error_is_the_mean_over_the_inputs() {
    let (n, k, m) = (5, 130, 40);
    let (weights, x) = (normal(n * k, 1), inputs(m, k));
    let hessian = hessian(&x, k);
    let packed = search(&weights, k, &hessian, Group::default());
    let back = packed.dequantize();
    let square = |matrix: &dyn Fn(usize) -> f64| -> f64 {
        let product = |x: &[f32], n: usize| (0..k).map(|j| matrix(n * k + j) * f64::from(x[j])).sum::<f64>();
        x.chunks_exact(k).flat_map(|x| (0..n).map(move |n| product(x, n).powi(2))).sum()
    };
    let error = square(&|i| f64::from(back[i]) - f64::from(weights[i]));
    let expected = (error / square(&|i| f64::from(weights[i]))).sqrt();
    let reported = outputs(&packed, &weights, &hessian);
    assert!((reported / expected - 1.0).abs() < 1e-3, "{reported}, measured {expected}");
}

#[test]
fn with_uncorrelated_inputs_of_one_size_it_is_the_search() {
    let (n, k) = (66, 150);
    let weights = normal(n * k, 4);
    let mut identity = vec![0f32; k * k];
    identity.iter_mut().step_by(k + 1).for_each(|value| *value = 3.0);
    let zero = Hessian::new(vec![0.0; k * k], k).unwrap();
    let identity = Hessian::new(identity, k).unwrap();
    for group in GROUPS {
        let search = search(&weights, k, &identity, group);
        assert!(gptq(&weights, k, &identity, group) == search, "group {group}");
        assert!(gptq(&weights, k, &zero, group) == search, "group {group}, inputs that are always 0");
    }
}

#[test]
fn inputs_that_are_always_zero_or_the_same_or_too_few_are_no_obstacle() {
    let (n, k) = (65, 192);
    let weights = normal(n * k, 6);
    let mut dead = inputs(400, k);
    for row in dead.chunks_exact_mut(k) {
        row[10..80].fill(0.0);
        row[100] = row[101];
    }
    for x in [dead, inputs(3, k), vec![1.0; 2 * k]] {
        let hessian = hessian(&x, k);
        for group in GROUPS {
            let gptq = outputs(&gptq(&weights, k, &hessian, group), &weights, &hessian);
            let search = outputs(&search(&weights, k, &hessian, group), &weights, &hessian);
            assert!(gptq <= search, "group {group}: {gptq}, the search has {search}");
        }
    }
}

#[test]
fn every_number_of_threads_gives_the_same_weights() {
    let (n, k) = (130, 300);
    let (weights, x) = (normal(n * k, 2), inputs(600, k));
    let results = [1, 2, 5].map(|threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let hessian = hessian(&x, k);
            let packed = gptq(&weights, k, &hessian, Group::default());
            let error = outputs(&packed, &weights, &hessian);
            (hessian, packed, error)
        })
    });
    assert!(results[0] == results[1] && results[1] == results[2]);
}

#[test]
fn the_smallest_and_the_most_extreme_weights_are_quantized() {
    let one = Hessian::new(vec![2.0], 1).unwrap();
    let packed = gptq(&[-3.0], 1, &one, Group::default());
    assert!((packed.dequantize()[0] + 3.0).abs() < 1e-5);

    let k = 100;
    let hessian = hessian(&inputs(300, k), k);
    for size in [0.0, 1e-42, 1e-30, 1e37] {
        let weights: Vec<f32> = normal(2 * k, 3).iter().map(|w| w * size).collect();
        for group in GROUPS {
            let packed = gptq(&weights, k, &hessian, group);
            let report = packed.output_error(&weights, Inputs::Hessian(&hessian)).unwrap();
            // Subnormal weights and scales have few bits.
            assert!(report.weights < 0.5, "size {size}, group {group}: {report:?}");
        }
    }
}

#[test]
fn smoothing_the_hessian_is_smoothing_the_inputs() {
    let (n, k) = (10, 90);
    let (weights, x) = (normal(n * k, 5), inputs(200, k));
    let factors: Vec<f32> = (0..k).map(|j| 0.25 * 2f32.powi(j as i32 % 5)).collect();
    let divided: Vec<f32> = x.iter().enumerate().map(|(i, x)| x / factors[i % k]).collect();
    let smoothed = hessian(&x, k).smoothed(&factors).unwrap();
    let expected = hessian(&divided, k);
    for (one, other) in smoothed.values().iter().zip(expected.values()) {
        assert!((one - other).abs() <= 1e-5 * other.abs().max(1e-3), "{one}, expected {other}");
    }
    // Powers of two change no rounding, so the outputs' errors are those of the same weights.
    let smooth = smooth_weights(&weights, n, k, &factors).unwrap();
    let packed = gptq(&smooth, k, &smoothed, Group::default());
    assert!(outputs(&packed, &smooth, &smoothed) < 0.2);
}

#[test]
fn rotating_the_hessian_is_rotating_the_inputs_and_keeps_the_error_low() {
    let (n, k) = (64, 192);
    let (mut weights, mut x) = (normal(n * k, 5), inputs(600, k));
    let plain = hessian(&x, k);
    let before = outputs(&gptq(&weights, k, &plain, Group::default()), &weights, &plain);
    let rotated = plain.rotated(64).unwrap();
    rotate(&mut x, k, 64).unwrap();
    let expected = hessian(&x, k);
    let largest = expected.second_moments().into_iter().fold(0.0, f32::max);
    for (one, other) in rotated.values().iter().zip(expected.values()) {
        assert!((one - other).abs() <= 1e-4 * largest, "{one}, expected {other}");
    }
    rotate(&mut weights, k, 64).unwrap();
    let after = outputs(&gptq(&weights, k, &rotated, Group::default()), &weights, &rotated);
    assert!(after < 1.1 * before, "{after}, before {before}");
    assert!(matches!(plain.rotated(128), Err(Error::InvalidRotation { block: 128, k: 192 })));
}

#[test]
fn bad_hessians_and_options_are_refused() {
    let k = 3;
    let good = vec![2.0, 0.5, 0.0, 0.5, 2.0, 0.0, 0.0, 0.0, 1.0];
    let with = |index: usize, value: f32| {
        let mut values = good.clone();
        values[index] = value;
        Hessian::new(values, k)
    };
    for bad in [f32::NAN, f32::INFINITY] {
        assert!(matches!(with(3, bad), Err(Error::InvalidHessian { row: 1, column: 0, .. })));
        assert!(matches!(with(4, bad), Err(Error::InvalidHessian { row: 1, column: 1, .. })));
    }
    assert!(matches!(with(1, 0.6), Err(Error::InvalidHessian { row: 1, column: 0, .. })));
    assert!(matches!(with(8, -1.0), Err(Error::InvalidMoment { k: 2, .. })));
    assert!(matches!(Hessian::new(vec![1.0; 8], k), Err(Error::ShapeMismatch { .. })));
    assert!(matches!(Hessian::new(vec![], 0), Err(Error::EmptyDimension { dimension: "k" })));

    let weights = [1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0];
    let quantize = |weights: &[f32], n, k, hessian: &Hessian, damping| {
        let options = GptqOptions { damping, ..Default::default() };
        PackedWeights::quantize_gptq(weights, n, k, hessian, &options)
    };
    let hessian = Hessian::new(good.clone(), k).unwrap();
    assert!(quantize(&weights, 2, 3, &hessian, 0.0).is_ok());
    assert!(matches!(quantize(&weights, 3, 2, &hessian, 0.01), Err(Error::ShapeMismatch { .. })));
    assert!(matches!(quantize(&weights, 2, 4, &hessian, 0.01), Err(Error::ShapeMismatch { .. })));
    for damping in [-0.1, f32::NAN, f32::INFINITY] {
        assert!(matches!(quantize(&weights, 2, 3, &hessian, damping), Err(Error::InvalidDamping { .. })));
    }
    let nan = [1.0, 2.0, 3.0, 4.0, f32::NAN, 6.0];
    let error = quantize(&nan, 2, 3, &hessian, 0.01).unwrap_err();
    assert!(matches!(error, Error::NonFiniteWeight { channel: 1, k: 1, .. }), "{error}");
    // No inputs have this Hessian.
    let indefinite = Hessian::new(vec![1.0, 3.0, 0.0, 3.0, 1.0, 0.0, 0.0, 0.0, 1.0], k).unwrap();
    let error = quantize(&weights, 2, 3, &indefinite, 0.01).unwrap_err();
    assert!(matches!(error, Error::HessianNotPositive { .. }), "{error}");
}

#[test]
fn inputs_that_are_not_finite_are_refused_and_change_nothing() {
    let mut builder = HessianBuilder::new(2).unwrap();
    builder.add(&[1.0f32, 2.0], 1).unwrap();
    let error = builder.add(&[9.0, f32::NAN], 1).unwrap_err();
    assert!(matches!(error, Error::NonFiniteActivation { token: 0, k: 1, .. }), "{error}");
    assert!(matches!(builder.add(&[1.0f32; 3], 2), Err(Error::ShapeMismatch { .. })));
    assert_eq!(builder.finish().unwrap().values(), [1.0, 2.0, 2.0, 4.0]);
    assert!(matches!(HessianBuilder::new(2).unwrap().finish(), Err(Error::NoTokens)));
}
