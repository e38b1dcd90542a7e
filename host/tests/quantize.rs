//! Tests of the weight quantizer against a second, slow implementation of its definition.
//!
//! They test `src/quantize.rs`.

use half::{bf16, f16};
use liquidgemm::{Error, Float, Group, PackedWeights};
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

fn check_against_reference<T: Float>(weights: &[T], n: usize, k: usize, group: Group) {
    let packed = PackedWeights::quantize(weights, n, k, group).unwrap();
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
        let packed = PackedWeights::quantize(&values[..n * k], n, k, Group::default()).unwrap();
        let again = PackedWeights::from_parts(
            packed.codes().to_vec(), packed.pairs().to_vec(), packed.channel_scales().to_vec(), n, k, Group::default(),
        );
        prop_assert_eq!(again.unwrap(), packed);
    }
}

#[test]
fn subnormal_weights_are_not_clipped() {
    // 178 · 2⁻¹⁴⁹ / 119 rounds to 2⁻¹⁴⁹.
    // A scale of 2⁻¹⁴⁹ would clip all weights above 119 · 2⁻¹⁴⁹.
    for ulps in [1u32, 50, 59, 60, 119, 120, 178, 179, 300, 1000] {
        let value = f32::from_bits(ulps);
        let back = PackedWeights::quantize(&[value; 8], 1, 8, Group::default()).unwrap().dequantize();
        let error = (f64::from(back[0]) - f64::from(value)).abs() / f64::from(value);
        assert!(error <= 0.5 / 59.0, "{ulps} ulps come back as {} ({error})", back[0].to_bits());
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
    for value in [1.0f32, -1.0, 3.5e-20, 1e30] {
        let packed = PackedWeights::quantize(&[value; 200], 2, 100, Group::default()).unwrap();
        for k in 0..100 {
            assert_eq!(packed.int8_weight(1, k), if value > 0.0 { 119 } else { -119 });
        }
        assert!(packed.dequantize().iter().all(|w| (w / value - 1.0).abs() < 1e-6));
    }
}

#[test]
fn channels_of_zeros_stand_for_zero() {
    for value in [0.0, -0.0] {
        let packed = PackedWeights::quantize(&[value; 70], 1, 70, Group::default()).unwrap();
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

#[test]
fn normally_distributed_weights_have_the_relative_error_of_four_bits() {
    // Sums of twelve uniform numbers approximate a normal distribution.
    let mut state = 1u64;
    let mut uniform = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1u64 << 24) as f32
    };
    let weights: Vec<f32> = (0..128 * 512).map(|_| (0..12).map(|_| uniform()).sum::<f32>() - 6.0).collect();
    let mut previous = 0.0;
    for group in [Group::K(64), Group::K(128), Group::Channel] {
        let back = PackedWeights::quantize(&weights, 128, 512, group).unwrap().dequantize();
        let square = |values: &mut dyn Iterator<Item = f32>| values.map(|v| f64::from(v * v)).sum::<f64>();
        let error = square(&mut back.iter().zip(&weights).map(|(b, w)| b - w));
        let relative = (error / square(&mut weights.iter().copied())).sqrt();
        assert!(relative > previous && relative < 0.13, "group {group}: {relative}");
        previous = relative;
    }
}
