//! Tests of activation quantization: codes, scales, padding, smoothing, and the inputs that are refused.
//!
//! They test `src/activations.rs`, and compare products with the CPU backend's.

use half::{bf16, f16};
use liquidgemm::{ActivationsView, Error, Group, PackedWeights, QuantizedActivations, cpu, smooth_weights};
use proptest::prelude::*;

proptest! {
    #[test]
    fn codes_and_scales_follow_the_definition(
        m in 1usize..20,
        k in 1usize..100,
        exponent in -30i32..30,
        seed in proptest::collection::vec(-1f32..1.0, 1..300),
    ) {
        let values: Vec<f32> = (0..m * k).map(|i| seed[i % seed.len()] * 2f32.powi(exponent)).collect();
        let quantized = QuantizedActivations::quantize(&values, m, k).unwrap();
        prop_assert_eq!(quantized.stride() % 16, 0);
        prop_assert!(quantized.stride() >= k && quantized.stride() < k + 16);
        prop_assert_eq!(quantized.data().len(), m * quantized.stride());
        for token in 0..m {
            let row = &values[token * k..][..k];
            let scale = row.iter().fold(0f32, |max, x| max.max(x.abs())) / 127.0;
            prop_assert_eq!(quantized.scales()[token], scale);
            // Codes are exact products with the rounded reciprocal, in f64. Rounded quotients may be ties instead.
            let inverse = f64::from(if scale == 0.0 { 0.0 } else { 1.0 / scale });
            for (i, x) in row.iter().enumerate() {
                let code = (f64::from(*x) * inverse).round_ties_even().clamp(-127.0, 127.0);
                prop_assert_eq!(f64::from(quantized.row(token)[i]), code);
            }
            let padding = &quantized.data()[token * quantized.stride() + k..(token + 1) * quantized.stride()];
            prop_assert!(padding.iter().all(|&code| code == 0));
        }
    }

    #[test]
    fn smoothing_divides_each_column_before_the_scale_is_taken(
        k in 1usize..50,
        factor in 0.01f32..100.0,
    ) {
        let values: Vec<f32> = (0..2 * k).map(|i| (i as f32).sin()).collect();
        let smoothing: Vec<f32> = (0..k).map(|i| factor * (1.0 + i as f32)).collect();
        let divided: Vec<f32> = values.iter().enumerate().map(|(i, x)| x / smoothing[i % k]).collect();
        prop_assert_eq!(
            QuantizedActivations::with_smoothing(&values, 2, k, &smoothing).unwrap(),
            QuantizedActivations::quantize(&divided, 2, k).unwrap()
        );
    }
}

#[test]
fn half_precision_activations_quantize_like_the_same_values_in_f32() {
    let halves: Vec<f16> = (0..7 * 33).map(|i| f16::from_f32((i as f32).cos())).collect();
    let wide: Vec<f32> = halves.iter().map(|x| x.to_f32()).collect();
    assert_eq!(
        QuantizedActivations::quantize(&halves, 7, 33).unwrap(),
        QuantizedActivations::quantize(&wide, 7, 33).unwrap()
    );
    let brains: Vec<bf16> = wide.iter().map(|&x| bf16::from_f32(x)).collect();
    let wide: Vec<f32> = brains.iter().map(|x| x.to_f32()).collect();
    assert_eq!(
        QuantizedActivations::quantize(&brains, 7, 33).unwrap(),
        QuantizedActivations::quantize(&wide, 7, 33).unwrap()
    );
}

#[test]
fn a_token_of_zeros_has_scale_zero_and_product_zero() {
    let x = QuantizedActivations::quantize(&[0.0f32; 70], 1, 70).unwrap();
    assert_eq!(x.scales(), [0.0]);
    let weights = PackedWeights::quantize(&[1.0f32; 140], 2, 70, Group::default()).unwrap();
    let mut y = [f32::NAN; 2];
    cpu::gemm(&weights, &x, None, &mut y).unwrap();
    assert_eq!(y, [0.0; 2]);
}

#[test]
fn smoothing_both_operands_reduces_the_error_of_the_product() {
    let (m, n, k) = (4, 8, 256);
    let w: Vec<f32> = (0..n * k).map(|i| ((i * 7) as f32).sin()).collect();
    // One column of the activations is a hundred times larger than the others.
    let x: Vec<f32> = (0..m * k).map(|i| (i as f32).cos() * if i % k == 9 { 100.0 } else { 1.0 }).collect();
    let smoothing: Vec<f32> = (0..k).map(|i| if i == 9 { 10.0 } else { 1.0 }).collect();
    let product = |x: QuantizedActivations, w: &[f32]| {
        let w = PackedWeights::quantize(w, n, k, Group::default()).unwrap();
        let mut y = vec![0f32; m * n];
        cpu::gemm(&w, &x, None, &mut y).unwrap();
        y
    };
    let plain = product(QuantizedActivations::quantize(&x, m, k).unwrap(), &w);
    let smoothed = product(
        QuantizedActivations::with_smoothing(&x, m, k, &smoothing).unwrap(),
        &smooth_weights(&w, n, k, &smoothing).unwrap(),
    );
    let exact: Vec<f32> =
        (0..m * n).map(|i| (0..k).map(|j| x[i / n * k + j] * w[i % n * k + j]).sum()).collect();
    let error = |y: &[f32]| y.iter().zip(&exact).map(|(a, b)| (a - b).powi(2)).sum::<f32>();
    assert!(error(&smoothed) < error(&plain), "{} {}", error(&smoothed), error(&plain));
}

#[test]
fn activations_that_are_not_finite_are_named_by_their_first_position() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut x = vec![1.0f32; 50 * 20];
        x[30 * 20 + 1] = bad;
        x[7 * 20 + 19] = bad;
        let error = QuantizedActivations::quantize(&x, 50, 20).unwrap_err();
        assert!(matches!(error, Error::NonFiniteActivation { token: 7, k: 19, .. }), "{error}");
    }
    // The value is finite, but dividing it by the smoothing factor overflows.
    let error = QuantizedActivations::with_smoothing(&[f32::MAX], 1, 1, &[0.1]).unwrap_err();
    assert!(matches!(error, Error::NonFiniteActivation { token: 0, k: 0, .. }), "{error}");
}

#[test]
fn smoothing_factors_that_cannot_be_divided_by_are_refused() {
    for bad in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        let smoothing = [1.0, bad];
        let result = QuantizedActivations::with_smoothing(&[1.0f32; 2], 1, 2, &smoothing);
        assert!(matches!(result, Err(Error::InvalidSmoothing { k: 1, .. })), "{result:?}");
        assert!(matches!(
            smooth_weights(&[1.0f32; 2], 1, 2, &smoothing),
            Err(Error::InvalidSmoothing { k: 1, .. })
        ));
    }
    let result = QuantizedActivations::with_smoothing(&[1.0f32; 2], 1, 2, &[1.0]);
    assert!(matches!(result, Err(Error::ShapeMismatch { expected: 2, actual: 1, .. })), "{result:?}");
}

#[test]
fn impossible_shapes_are_errors_and_never_wrap() {
    let quantize = |m, k| QuantizedActivations::quantize::<f32>(&[], m, k).unwrap_err();
    assert!(matches!(quantize(1, 0), Error::EmptyDimension { dimension: "k" }));
    assert!(matches!(quantize(1, 131_073), Error::KTooLarge { .. }));
    assert!(matches!(quantize(usize::MAX, 2), Error::TooLarge { .. }));
    assert!(matches!(quantize(2, 3), Error::ShapeMismatch { expected: 6, actual: 0, .. }));
}

#[test]
fn borrowed_codes_are_checked() {
    let data = [1i8; 20];
    let view = |stride, scales: &[f32], m, k| ActivationsView::new(&data, stride, scales, m, k).map(|_| ());
    assert!(view(8, &[1.0; 2], 2, 8).is_ok());
    assert!(view(12, &[1.0; 2], 2, 8).is_ok(), "the last row needs no padding behind it");
    assert!(matches!(view(13, &[1.0; 2], 2, 8), Err(Error::ShapeMismatch { expected: 21, .. })));
    assert!(matches!(view(7, &[1.0; 2], 2, 8), Err(Error::StrideTooShort { stride: 7, k: 8 })));
    assert!(matches!(view(8, &[1.0; 3], 2, 8), Err(Error::ShapeMismatch { what: "token scales", .. })));
    assert!(matches!(view(8, &[1.0, f32::NAN], 2, 8), Err(Error::NonFiniteParameter { index: 1, .. })));
    assert!(matches!(view(usize::MAX, &[1.0; 3], 3, 8), Err(Error::TooLarge { .. })));
    assert!(matches!(view(usize::MAX, &[1.0; 2], 2, 8), Err(Error::TooLarge { .. })));
}

#[test]
fn every_int8_code_is_valid_and_so_is_a_batch_without_tokens() {
    let codes: Vec<i8> = (i8::MIN..=i8::MAX).collect();
    let x = QuantizedActivations::from_parts(&codes, vec![1.0; 2], 2, 128).unwrap();
    assert_eq!((x.row(0)[0], x.row(1)[127]), (-128, 127));
    assert!(ActivationsView::new(&[], 128, &[], 0, 128).is_ok());
    let none = QuantizedActivations::quantize::<f32>(&[], 0, 128).unwrap();
    assert_eq!((none.m(), none.data().len(), none.dequantize().len()), (0, 0, 0));
}

#[test]
fn subnormal_activations_are_not_clipped() {
    for ulps in [1u32, 50, 63, 64, 127, 128, 190, 191, 1000] {
        let value = f32::from_bits(ulps);
        let back = QuantizedActivations::quantize(&[value; 8], 1, 8).unwrap().dequantize();
        let error = (f64::from(back[0]) - f64::from(value)).abs() / f64::from(value);
        assert!(error <= 0.5 / 63.0, "{ulps} ulps come back as {} ({error})", back[0].to_bits());
    }
}

#[test]
fn a_quotient_that_rounds_to_a_tie_does_not_decide_the_code() {
    // 0.5109425 / (0.9906824 / 127) rounds to 65.5, whose even neighbour is 66; the exact product is below it.
    let values = [-0.9906824f32, -0.5109425];
    let quantized = QuantizedActivations::quantize(&values, 1, 2).unwrap();
    let scale = 0.9906824f32 / 127.0;
    assert_eq!(0.5109425f32 / scale, 65.5);
    assert!(f64::from(0.5109425f32) * f64::from(1.0 / scale) < 65.5);
    assert_eq!(quantized.row(0)[..2], [-127, -65]);
}
