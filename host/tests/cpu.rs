//! Tests of the CPU backend's public calls: results near the floating-point product, strides,
//! and refused calls that leave the output untouched.
//!
//! `src/cpu/tests.rs` tests the kernels against plain 64-bit loops.

use half::{bf16, f16};
use liquidgemm::{ActivationsView, Error, Group, Output, PackedWeights, QuantizedActivations, cpu};

fn operands(m: usize, n: usize, k: usize) -> (PackedWeights, QuantizedActivations) {
    let w: Vec<f32> = (0..n * k).map(|i| ((i * i) as f32 * 0.7).sin()).collect();
    let x: Vec<f32> = (0..m * k).map(|i| ((i * 3) as f32).cos()).collect();
    (
        PackedWeights::quantize(&w, n, k, Group::default()).unwrap(),
        QuantizedActivations::quantize(&x, m, k).unwrap(),
    )
}

#[test]
fn rows_at_any_stride_give_the_same_product_and_gaps_are_ignored() {
    let (m, n, k) = (5, 70, 67);
    let (weights, x) = operands(m, n, k);
    let mut expected = vec![0f32; m * n];
    cpu::gemm(&weights, &x, None, &mut expected).unwrap();
    for stride in [67, 68, 80, 99] {
        // Fill the gaps between the rows with −128. The last row has no padding behind it.
        let mut data = vec![-128i8; (m - 1) * stride + k];
        for token in 0..m {
            data[token * stride..][..k].copy_from_slice(x.row(token));
        }
        let view = ActivationsView::new(&data, stride, x.scales(), m, k).unwrap();
        let mut out = vec![f32::NAN; m * n];
        cpu::gemm(&weights, view, None, &mut out).unwrap();
        assert_eq!(out, expected, "stride {stride}");
    }
}

#[test]
fn the_result_does_not_depend_on_the_number_of_threads() {
    let (weights, x) = operands(130, 300, 200);
    let product = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let mut out = vec![bf16::ZERO; 130 * 300];
        pool.install(|| cpu::gemm(&weights, &x, None, &mut out)).unwrap();
        out
    };
    let alone = product(1);
    for threads in [2, 3, 16] {
        assert_eq!(product(threads), alone, "{threads} threads");
    }
}

#[test]
fn a_token_gives_the_same_bits_alone_and_in_any_batch() {
    let (weights, x) = operands(37, 100, 300);
    let mut batch = vec![0f32; 37 * 100];
    cpu::gemm(&weights, &x, None, &mut batch).unwrap();
    for token in 0..37 {
        let alone = QuantizedActivations::from_parts(x.row(token), vec![x.scales()[token]], 1, 300).unwrap();
        let mut out = vec![0f32; 100];
        cpu::gemm(&weights, &alone, None, &mut out).unwrap();
        assert_eq!(out, batch[token * 100..][..100]);
    }
}

/// Runs a call that must fail, checks that it wrote nothing, and returns its error.
fn refused<T: Output>(
    weights: &PackedWeights,
    x: &QuantizedActivations,
    bias: Option<&[f32]>,
    length: usize,
    poison: T,
) -> Error {
    let mut out = vec![poison; length];
    let error = cpu::gemm(weights, x, bias, &mut out).unwrap_err();
    assert!(out.iter().all(|y| *y == poison), "output was touched");
    error
}

#[test]
fn operands_that_do_not_fit_are_refused_and_the_output_stays_untouched() {
    let (weights, x) = operands(3, 5, 70);
    let (_, other_k) = operands(3, 5, 71);
    let error = refused(&weights, &other_k, None, 15, 7f32);
    assert!(matches!(error, Error::KMismatch { weights: 70, activations: 71 }), "{error}");
    for length in [0, 14, 16] {
        let error = refused(&weights, &x, None, length, 7f32);
        assert!(matches!(error, Error::ShapeMismatch { what: "output", expected: 15, .. }), "{error}");
    }
    for length in [0, 4, 6] {
        let error = refused(&weights, &x, Some(&vec![0.0; length]), 15, 7f32);
        assert!(matches!(error, Error::ShapeMismatch { what: "bias", expected: 5, .. }), "{error}");
    }
    let error = refused(&weights, &x, Some(&[0.0, 0.0, f32::NAN, 0.0, 0.0]), 15, 7f32);
    assert!(matches!(error, Error::NonFiniteParameter { what: "bias", index: 2, .. }), "{error}");
    let error = refused(&weights, &x, Some(&[0.0; 5]), 15, 7i32);
    assert!(matches!(error, Error::BiasWithRawOutput), "{error}");
}

#[test]
fn the_product_is_near_the_floating_point_one() {
    let (m, n, k) = (8, 64, 1024);
    let w: Vec<f32> = (0..n * k).map(|i| ((i * i) as f32 * 0.7).sin()).collect();
    let x: Vec<f32> = (0..m * k).map(|i| ((i * i) as f32 * 0.3).cos()).collect();
    let weights = PackedWeights::quantize(&w, n, k, Group::default()).unwrap();
    let quantized = QuantizedActivations::quantize(&x, m, k).unwrap();
    let mut y = vec![0f32; m * n];
    cpu::gemm(&weights, &quantized, None, &mut y).unwrap();
    let (mut error, mut norm) = (0.0, 0.0);
    for (index, y) in y.iter().enumerate() {
        let (token, channel) = (index / n, index % n);
        let exact: f64 = (0..k).map(|i| f64::from(x[token * k + i]) * f64::from(w[channel * k + i])).sum();
        error += (f64::from(*y) - exact).powi(2);
        norm += exact.powi(2);
    }
    let relative = (error / norm).sqrt();
    assert!(relative < 0.12, "{relative}");
}

#[test]
fn values_beyond_the_output_types_range_become_infinite() {
    let weights = PackedWeights::quantize(&[1.0f32, -1.0], 2, 1, Group::default()).unwrap();
    let products = |scale: f32| {
        // The sums are ±119. Times the channel scale 1 / 119 and the token scale, they are ±`scale`.
        let x = QuantizedActivations::from_parts(&[1], vec![scale], 1, 1).unwrap();
        let mut f16_out = [f16::ZERO; 2];
        let mut bf16_out = [bf16::ZERO; 2];
        cpu::gemm(&weights, &x, None, &mut f16_out).unwrap();
        cpu::gemm(&weights, &x, None, &mut bf16_out).unwrap();
        (f16_out, bf16_out)
    };
    assert_eq!(products(65_504.0).0, [f16::MAX, f16::MIN]);
    assert_eq!(products(65_536.0).0, [f16::INFINITY, f16::NEG_INFINITY]);
    assert_eq!(products(f32::MAX).1, [bf16::INFINITY, bf16::NEG_INFINITY]);
    let large = PackedWeights::pack(&[15], &[(1, 128)], vec![f32::MAX], 1, 1, Group::default()).unwrap();
    let x = QuantizedActivations::from_parts(&[1], vec![1e-30], 1, 1).unwrap();
    let mut out = [0f32];
    cpu::gemm(&large, &x, None, &mut out).unwrap();
    assert_eq!(out, [f32::INFINITY], "the channel scale must be applied first");
}
