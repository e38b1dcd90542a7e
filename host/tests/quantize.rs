//! Tests of round-to-nearest against a second, slow implementation of its definition,
//! and of what all methods without calibration data have in common.
//!
//! They test `src/quantize/rtn.rs`, `search.rs`, and `output_error.rs` beside them.

use half::{bf16, f16};
use liquidgemm::{Error, Float, Group, Inputs, Method, PackedWeights, QuantizeOptions};
use proptest::prelude::*;

/// Quantizes one channel straight from the definition.
///
/// Returns the channel scale, the int8 weights, and the `(q, s, a)` of every element:
/// its code and its group's pair.
fn reference(row: &[f32], group: usize) -> (f32, Vec<i32>, Vec<(i32, i32, i32)>) {
    let scale = row.iter().fold(0f32, |max, w| max.max(w.abs())) / 119.0;
    let int8_weight: Vec<i32> = row
        .iter()
        .map(|w| if scale == 0.0 { 0 } else { (w / scale).round_ties_even().clamp(-119.0, 119.0) as i32 })
        .collect();
    let mut stored = Vec::new();
    for group in int8_weight.chunks(group) {
        let (min, max) = (*group.iter().min().unwrap(), *group.iter().max().unwrap());
        let s = (((max - min) as f64 / 15.0).round() as i32).max(1);
        // If the offset 128 + min breaks the invariant, take the largest offset that keeps it.
        let a = (128 + min).min(255 - 15 * s);
        stored.extend(group.iter().map(|w| {
            let q = ((w + 128 - a) as f64 / s as f64).round().clamp(0.0, 15.0) as i32;
            (q, s, a)
        }));
    }
    (scale, int8_weight, stored)
}

const METHODS: [Method; 2] = [Method::Rtn, Method::Search];

fn quantize<T: Float>(method: Method, weights: &[T], n: usize, k: usize, group: Group) -> PackedWeights {
    let options = QuantizeOptions { method, group, second_moments: None };
    PackedWeights::quantize_with(weights, n, k, &options).unwrap()
}

fn check_against_reference<T: Float>(weights: &[T], n: usize, k: usize, group: Group) {
    let packed = quantize(Method::Rtn, weights, n, k, group);
    let group_k = if let Group::K(group) = group { group } else { k };
    for channel in 0..n {
        let row: Vec<f32> = weights[channel * k..][..k].iter().map(|w| w.to_f32()).collect();
        let (scale, int8_weight, stored) = reference(&row, group_k);
        assert_eq!(packed.channel_scales()[channel], scale);
        for i in 0..k {
            let (s, a) = packed.pair(channel, i / 64);
            let got = (packed.code(channel, i) as i32, s as i32, a as i32);
            assert_eq!(got, stored[i], "channel {channel}, k {i}");
            let error = (i32::from(packed.int8_weight(channel, i)) - int8_weight[i]).abs();
            assert!(error <= 8, "channel {channel}, k {i}: {error} off");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn every_code_and_pair_follows_the_definition(
        n in 1usize..80,
        k in 1usize..300,
        group in prop_oneof![Just(Group::K(64)), Just(Group::K(128)), Just(Group::Channel)],
        scale in -30i32..30,
        seed in proptest::collection::vec(-1f32..1.0, 1..500),
    ) {
        let weights: Vec<f32> = (0..n * k)
            .map(|i| seed[i % seed.len()] * (1.0 + (i % 7) as f32) * 2f32.powi(scale))
            .collect();
        check_against_reference(&weights, n, k, group);
        let weights: Vec<bf16> = weights.iter().map(|&w| bf16::from_f32(w)).collect();
        check_against_reference(&weights, n, k, group);
    }

    #[test]
    fn any_finite_bits_quantize_without_a_panic_into_valid_weights(
        bits in proptest::collection::vec(any::<u32>(), 1..400),
        k in 1usize..100,
    ) {
        let values: Vec<f32> = bits
            .iter()
            .map(|&bits| f32::from_bits(bits))
            .map(|w| if w.is_finite() { w } else { 0.0 })
            .collect();
        let k = k.min(values.len());
        let n = values.len() / k;
        for method in METHODS {
            let packed = quantize(method, &values[..n * k], n, k, Group::default());
            let again = PackedWeights::from_parts(
                packed.codes().to_vec(), packed.pairs().to_vec(), packed.channel_scales().to_vec(), n, k, Group::default(),
            );
            prop_assert_eq!(again.unwrap(), packed);
        }
    }
}

#[test]
fn subnormal_weights_are_not_clipped() {
    // 178 · 2⁻¹⁴⁹ / 119 rounds to 2⁻¹⁴⁹.
    // A scale of 2⁻¹⁴⁹ would clip all weights above 119 · 2⁻¹⁴⁹.
    for ulps in [1u32, 50, 59, 60, 119, 120, 178, 179, 300, 1000] {
        let value = f32::from_bits(ulps);
        for method in METHODS {
            let back = quantize(method, &[value; 8], 1, 8, Group::default()).dequantize();
            let error = (f64::from(back[0]) - f64::from(value)).abs() / f64::from(value);
            assert!(
                error <= 0.5 / 59.0,
                "{method}: {ulps} ulps come back as {} ({error})",
                back[0].to_bits()
            );
        }
    }
}

#[test]
fn f16_weights_quantize_like_the_same_values_in_f32() {
    let weights: Vec<f16> = (0..70 * 130).map(|i| f16::from_f32(((i * i) as f32).sin())).collect();
    let wide: Vec<f32> = weights.iter().map(|w| w.to_f32()).collect();
    let quantize_wide = PackedWeights::quantize(&wide, 70, 130, Group::K(128)).unwrap();
    assert_eq!(PackedWeights::quantize(&weights, 70, 130, Group::K(128)).unwrap(), quantize_wide);
}

#[test]
fn constant_weights_are_kept_exactly_although_their_group_lies_at_the_top_of_the_range() {
    for (value, method) in [1.0f32, -1.0, 3.5e-20, 1e30].into_iter().flat_map(|v| METHODS.map(|m| (v, m))) {
        let packed = quantize(method, &[value; 200], 2, 100, Group::default());
        for k in 0..100 {
            assert_eq!(packed.int8_weight(1, k), if value > 0.0 { 119 } else { -119 });
        }
        assert!(packed.dequantize().iter().all(|w| (w / value - 1.0).abs() < 1e-6));
    }
}

#[test]
fn channels_of_zeros_stand_for_zero() {
    for (value, method) in [0.0f32, -0.0].into_iter().flat_map(|v| METHODS.map(|m| (v, m))) {
        let packed = quantize(method, &[value; 70], 1, 70, Group::default());
        assert_eq!(packed.channel_scales(), [0.0]);
        assert!((0..70).all(|k| packed.int8_weight(0, k) == 0));
        assert!(packed.dequantize().iter().all(|&w| w == 0.0));
    }
}

#[test]
fn weights_as_large_as_f32_allows_keep_a_finite_scale_and_their_sign() {
    let packed = PackedWeights::quantize(&[f32::MAX, -f32::MAX, 0.0], 1, 3, Group::default()).unwrap();
    assert!(packed.channel_scales()[0].is_finite());
    // Rounding to 4 bits may increase a weight's magnitude.
    // Dequantized, it can then exceed the largest f32, so compare the int8 weights' signs.
    assert_eq!([0, 1].map(|k| packed.int8_weight(0, k).signum()), [1, -1]);
    assert!(packed.int8_weight(0, 2).abs() <= 8);
}

#[test]
fn weights_that_are_not_finite_are_named_by_their_first_position() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut weights = vec![1.0f32; 100 * 70];
        weights[93 * 70 + 3] = bad;
        weights[40 * 70 + 69] = bad;
        let error = PackedWeights::quantize(&weights, 100, 70, Group::default()).unwrap_err();
        assert!(matches!(error, Error::NonFiniteWeight { channel: 40, k: 69, .. }), "{error}");
        let text = error.to_string();
        assert!(text.contains("channel 40 at k = 69"), "{text}");
    }
}

/// Returns reproducible numbers that are nearly normally distributed.
fn normal(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut uniform = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1u64 << 24) as f32
    };
    (0..count).map(|_| (0..12).map(|_| uniform()).sum::<f32>() - 6.0).collect()
}

#[test]
fn normally_distributed_weights_have_the_relative_error_of_four_bits() {
    let weights = normal(128 * 512, 1);
    let mut previous = 0.0;
    for group in [Group::K(64), Group::K(128), Group::Channel] {
        let back = quantize(Method::Rtn, &weights, 128, 512, group).dequantize();
        let square = |values: &mut dyn Iterator<Item = f32>| values.map(|v| f64::from(v * v)).sum::<f64>();
        let error = square(&mut back.iter().zip(&weights).map(|(b, w)| b - w));
        let relative = (error / square(&mut weights.iter().copied())).sqrt();
        assert!(relative > previous && relative < 0.13, "group {group}: {relative}");
        previous = relative;
    }
}

/// Matrices `[8, k]` that are hard to quantize, with what they are.
fn hard_matrices(k: usize) -> Vec<(&'static str, Vec<f32>)> {
    let base = normal(8 * k, 3);
    let with = |change: &dyn Fn(usize, f32) -> f32| -> Vec<f32> {
        base.iter().enumerate().map(|(i, &w)| change(i, w)).collect()
    };
    vec![
        ("normal", base.clone()),
        ("all equal", with(&|_, _| -0.7)),
        ("one outlier", with(&|i, w| if i % k == 5 % k { 1000.0 } else { w })),
        ("pruned", with(&|i, w| if (i * 2654435761) % 100 < 88 { 0.0 } else { w })),
        ("tiny", with(&|_, w| w * 1e-36)),
        ("subnormal", with(&|_, w| w * 1e-42)),
        ("huge", with(&|_, w| w * 4e37)),
        ("mixed magnitudes", with(&|i, w| w * 10f32.powi((i % 30) as i32 - 25))),
        ("positive", with(&|_, w| w.abs() + 10.0)),
        ("two values", with(&|_, w| if w > 0.0 { 3.0 } else { -0.1 })),
    ]
}

#[test]
fn search_is_never_worse_than_rounding_to_nearest() {
    for k in [1, 7, 64, 100, 200] {
        let moments: Vec<f32> = normal(k, 9).iter().map(|m| m * m).collect();
        for (what, weights) in hard_matrices(k) {
            for group in [Group::K(64), Group::K(128), Group::Channel] {
                for moments in [None, Some(&moments[..])] {
                    let inputs = moments.map_or(Inputs::Unknown, Inputs::SecondMoments);
                    let options = QuantizeOptions { method: Method::Search, group, second_moments: moments };
                    let search = PackedWeights::quantize_with(&weights, 8, k, &options).unwrap();
                    let search = search.output_error(&weights, inputs).unwrap().outputs;
                    let rtn = quantize(Method::Rtn, &weights, 8, k, group);
                    let rtn = rtn.output_error(&weights, inputs).unwrap().outputs;
                    let weighted = moments.is_some();
                    assert!(
                        search <= rtn * (1.0 + 1e-4) + 1e-6,
                        "{what}, k {k}, group {group}, weighted {weighted}: {search}, but rtn has {rtn}"
                    );
                }
            }
        }
    }
}

#[test]
fn search_lowers_the_error_of_normally_distributed_weights_by_a_tenth() {
    let (n, k) = (64, 512);
    let weights = normal(n * k, 11);
    for group in [Group::K(64), Group::K(128), Group::Channel] {
        let [rtn, search] = METHODS.map(|method| {
            let packed = quantize(method, &weights, n, k, group);
            packed.output_error(&weights, Inputs::Unknown).unwrap().weights
        });
        assert!(search < 0.93 * rtn, "group {group}: {search}, but rtn has {rtn}");
    }
}

#[test]
fn pruned_weights_come_back_zero() {
    let (n, k) = (64, 256);
    let mut weights = normal(n * k, 5);
    for (i, weight) in weights.iter_mut().enumerate() {
        if (i * 2654435761) % 100 < 88 {
            *weight = 0.0;
        }
    }
    let [rtn, search] = METHODS.map(|method| {
        quantize(method, &weights, n, k, Group::default()).output_error(&weights, Inputs::Unknown).unwrap()
    });
    assert_eq!(search.zeros, weights.iter().filter(|w| **w == 0.0).count());
    assert!(search.zeros_kept as f64 > 0.99 * search.zeros as f64, "{search:?}");
    assert!(rtn.zeros_kept < search.zeros / 2, "{rtn:?}");
}

#[test]
fn every_number_of_threads_gives_the_same_weights() {
    let (n, k) = (200, 300);
    let weights = normal(n * k, 21);
    let moments: Vec<f32> = normal(k, 22).iter().map(|m| m * m).collect();
    let options = QuantizeOptions { second_moments: Some(&moments), ..Default::default() };
    let results = [1, 2, 5].map(|threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| PackedWeights::quantize_with(&weights, n, k, &options).unwrap())
    });
    assert!(results[0] == results[1] && results[1] == results[2]);
}

#[test]
fn the_default_is_the_search() {
    let weights = normal(64 * 128, 2);
    let default = PackedWeights::quantize(&weights, 64, 128, Group::default()).unwrap();
    assert_eq!(default, quantize(Method::Search, &weights, 64, 128, Group::default()));
    assert_ne!(default, quantize(Method::Rtn, &weights, 64, 128, Group::default()));
}

#[test]
fn methods_are_parsed_from_the_text_that_they_write() {
    for method in METHODS {
        assert_eq!(method.to_string().parse::<Method>().unwrap(), method);
    }
    let error = "gguf".parse::<Method>().unwrap_err();
    assert!(error.to_string().contains("\"gguf\""), "{error}");
}

#[test]
fn bad_second_moments_are_refused() {
    let weights = [1.0f32; 2 * 3];
    let quantize = |method, moments: &[f32]| {
        let options = QuantizeOptions { method, second_moments: Some(moments), ..Default::default() };
        PackedWeights::quantize_with(&weights, 2, 3, &options).unwrap_err()
    };
    for bad in [f32::NAN, f32::INFINITY, -1.0] {
        let error = quantize(Method::Search, &[1.0, bad, 1.0]);
        assert!(matches!(error, Error::InvalidMoment { k: 1, .. }), "{error}");
    }
    assert!(matches!(quantize(Method::Search, &[1.0; 2]), Error::ShapeMismatch { .. }));
    assert!(matches!(quantize(Method::Rtn, &[1.0; 3]), Error::UnusedMoments { method: Method::Rtn }));
}

#[test]
fn moments_that_are_all_zero_count_as_equal() {
    let (n, k) = (3, 130);
    let weights = normal(n * k, 8);
    let options = QuantizeOptions { second_moments: Some(&[0.0; 130]), ..Default::default() };
    let packed = PackedWeights::quantize_with(&weights, n, k, &options).unwrap();
    assert_eq!(packed, quantize(Method::Search, &weights, n, k, Group::default()));
}

#[test]
fn the_error_report_counts_what_differs() {
    // Codes 0 and 1 with the pair (2, 128) represent 0 and 2.
    let packed =
        PackedWeights::pack(&[0, 1, 0, 1], &[(2, 128); 2], vec![1.0; 2], 2, 2, Group::default()).unwrap();
    let report = packed.output_error(&[0.0f32, 2.0, 1.0, 0.0], Inputs::Unknown).unwrap();
    assert_eq!((report.zeros, report.zeros_kept), (2, 1));
    // Errors are 0, 0, −1 and 2; weights 0, 2, 1 and 0.
    assert_eq!(report.weights, 1.0);
    assert_eq!(report.outputs, 1.0);
    let report = packed.output_error(&[0.0f32, 2.0, 1.0, 0.0], Inputs::SecondMoments(&[4.0, 1.0])).unwrap();
    // (4 · 1 + 1 · 4) / (4 · 1 + 1 · 4).
    assert_eq!(report.outputs, 1.0);
    let exact = packed.output_error(&[0.0f32, 2.0, 0.0, 2.0], Inputs::Unknown).unwrap();
    assert_eq!((exact.weights, exact.outputs, exact.zeros, exact.zeros_kept), (0.0, 0.0, 2, 2));
    assert!(matches!(packed.output_error(&[0.0f32; 3], Inputs::Unknown), Err(Error::ShapeMismatch { .. })));
}
