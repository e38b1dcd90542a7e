//! Quantization of activations after an operation, and linear layers, on the CPU.

use half::{bf16, f16};
use liquidgemm::cpu::{QuantizeInput, Residual};
use liquidgemm::{
    Error, Gate, GateOrder, Gather, Group, Half, Linear, Operation, PackedWeights, QuantizedActivations,
    Scaling, cpu, smooth_weights,
};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

fn random<T: Half>(rng: &mut StdRng, count: usize, limit: f32) -> Vec<T> {
    (0..count).map(|_| T::round(rng.random_range(-limit..limit))).collect()
}

/// Quantizes rows of f32 by the definition.
fn by_definition(rows: &[Vec<f32>]) -> (Vec<i8>, Vec<f32>) {
    let mut codes = Vec::new();
    let mut scales = Vec::new();
    for row in rows {
        let scale = row.iter().fold(0.0f32, |max, x| max.max(x.abs())) / 127.0;
        // The product is exact in f64, and rounded once.
        let product = |x: f32| f64::from(x) * f64::from(1.0 / scale);
        codes.extend(row.iter().map(|&x| product(x).round_ties_even().clamp(-127.0, 127.0) as i8));
        scales.push(scale);
    }
    (codes, scales)
}

fn codes(activations: &QuantizedActivations) -> Vec<i8> {
    (0..activations.m()).flat_map(|row| activations.row(row).to_vec()).collect()
}

fn expect(activations: &QuantizedActivations, rows: &[Vec<f32>]) {
    let (expected, scales) = by_definition(rows);
    assert_eq!(activations.scales(), scales);
    assert_eq!(codes(activations), expected);
}

/// The sum in the documented order, written as a recursion.
fn sum(values: &[f32]) -> f32 {
    sum_of(values, |[a, b, c, d, e, f, g, h]| ((a + b) + (c + d)) + ((e + f) + (g + h)))
}

/// The sum of squares in the documented order.
fn sum_of_squares(values: &[f32]) -> f32 {
    sum_of(values, |[a, b, c, d, e, f, g, h]| {
        let chain = |[a, b, c, d]: [f32; 4]| d.mul_add(d, c.mul_add(c, b.mul_add(b, a * a)));
        chain([a, c, e, g]) + chain([b, d, f, h])
    })
}

/// The sum of all vectors' sums in the documented order.
fn sum_of(values: &[f32], of_vector: fn([f32; 8]) -> f32) -> f32 {
    let mut vectors: Vec<f32> = values
        .chunks(8)
        .map(|vector| of_vector(std::array::from_fn(|i| vector.get(i).copied().unwrap_or(0.0))))
        .collect();
    // Vectors of the same lane follow one another at a distance of 4,096.
    let rest = vectors.split_off(vectors.len().min(4096));
    vectors.resize(4096, 0.0);
    for (index, sum) in rest.into_iter().enumerate() {
        vectors[index % 4096] += sum;
    }
    fn tree(lanes: &[f32]) -> f32 {
        match lanes {
            [lane] => *lane,
            _ => {
                let (left, right) = lanes.split_at(lanes.len() / 2);
                tree(left) + tree(right)
            }
        }
    }
    tree(&vectors)
}

fn plain_rows_equal_the_float_quantizer<T: Half>() {
    let mut rng = StdRng::seed_from_u64(1);
    for [m, k] in [[1, 1], [3, 7], [5, 100], [2, 4100]] {
        let input: Vec<T> = random(&mut rng, m * k, 3.0);
        let smoothing: Vec<f32> = (0..k).map(|_| rng.random_range(0.1..8.0)).collect();
        let plain = cpu::quantize(&QuantizeInput::new(&input, m, k), None).unwrap();
        assert_eq!(plain, QuantizedActivations::quantize(&input, m, k).unwrap());
        let smooth = QuantizeInput { smoothing: Some(&smoothing[..]), ..QuantizeInput::new(&input, m, k) };
        let expected = QuantizedActivations::with_smoothing(&input, m, k, &smoothing).unwrap();
        assert_eq!(cpu::quantize(&smooth, None).unwrap(), expected);
    }
}

#[test]
fn plain_rows_equal_the_float_quantizer_for_both_types() {
    plain_rows_equal_the_float_quantizer::<bf16>();
    plain_rows_equal_the_float_quantizer::<f16>();
}

#[test]
fn norms_follow_their_formulas_operation_by_operation() {
    let mut rng = StdRng::seed_from_u64(2);
    for [m, k] in [[3, 5], [2, 64], [2, 1000], [1, 40_001]] {
        let input: Vec<bf16> = random(&mut rng, m * k, 3.0);
        let [weight, bias] = [(); 2].map(|()| random::<bf16>(&mut rng, k, 2.0));
        let epsilon = 1e-5;
        let rows: Vec<Vec<f32>> =
            input.chunks(k).map(|row| row.iter().map(|x| x.to_f32()).collect()).collect();
        let with = |operation| {
            cpu::quantize(&QuantizeInput { operation, ..QuantizeInput::new(&input, m, k) }, None).unwrap()
        };

        let deviation = |row: &[f32]| (sum_of_squares(row) * (1.0 / k as f32) + epsilon).sqrt();
        let weighted: Vec<Vec<f32>> =
            rows.iter().map(|row| row.iter().zip(&weight).map(|(x, w)| x * w.to_f32()).collect()).collect();
        let (expected, scales) = by_definition(&weighted);
        let scales: Vec<f32> = scales.iter().zip(&rows).map(|(scale, row)| scale / deviation(row)).collect();
        let actual = with(Operation::RmsNorm { weight: &weight, epsilon });
        assert_eq!(actual.scales(), scales);
        assert_eq!(codes(&actual), expected);

        let expected: Vec<Vec<f32>> = rows
            .iter()
            .map(|row| {
                let mean = sum(row) * (1.0 / k as f32);
                let centred: Vec<f32> = row.iter().map(|x| x - mean).collect();
                let inverse = 1.0 / deviation(&centred);
                let scaled = centred.iter().zip(&weight).map(|(x, w)| x * inverse * w.to_f32());
                scaled.zip(&bias).map(|(x, b)| x + b.to_f32()).collect()
            })
            .collect();
        expect(&with(Operation::LayerNorm { weight: &weight, bias: Some(&bias), epsilon }), &expected);
    }
}

#[test]
fn a_residual_becomes_the_rounded_sum_and_the_norm_is_that_of_the_sum() {
    let mut rng = StdRng::seed_from_u64(3);
    let (m, k, stride) = (4, 100, 117);
    let input: Vec<bf16> = random(&mut rng, m * k, 3.0);
    let mut residual: Vec<bf16> = random(&mut rng, m * stride, 3.0);
    let weight: Vec<bf16> = random(&mut rng, k, 2.0);
    let operation = Operation::RmsNorm { weight: &weight[..], epsilon: 1e-6 };
    let mut sums = residual.clone();
    for (input, residual) in input.chunks(k).zip(sums.chunks_mut(stride)) {
        for (x, residual) in input.iter().zip(residual) {
            *residual = bf16::from_f32(x.to_f32() + residual.to_f32());
        }
    }
    let call = QuantizeInput { operation, ..QuantizeInput::new(&input, m, k) };
    let with = cpu::quantize(&call, Some(Residual { data: &mut residual, stride })).unwrap();
    assert_eq!(residual, sums);
    let alone = QuantizeInput { operation, input_stride: stride, ..QuantizeInput::new(&sums, m, k) };
    assert_eq!(with, cpu::quantize(&alone, None).unwrap());
}

#[test]
fn both_orders_of_gates_give_the_same_and_are_close_to_the_functions() {
    let mut rng = StdRng::seed_from_u64(4);
    let (m, k) = (3, 77);
    let gates: Vec<f16> = random(&mut rng, m * k, 8.0);
    let ups: Vec<f16> = random(&mut rng, m * k, 2.0);
    let halves: Vec<f16> =
        gates.chunks(k).zip(ups.chunks(k)).flat_map(|(gates, ups)| [gates, ups].concat()).collect();
    let interleaved: Vec<f16> = gates.iter().zip(&ups).flat_map(|(&gate, &up)| [gate, up]).collect();
    for gate in Gate::ALL {
        let with = |input: &[f16], order| {
            let operation = Operation::Gated { gate, order };
            cpu::quantize(
                &QuantizeInput { operation, input_stride: 2 * k, ..QuantizeInput::new(input, m, k) },
                None,
            )
            .unwrap()
        };
        let quantized = with(&halves, GateOrder::Halves);
        assert_eq!(quantized, with(&interleaved, GateOrder::Interleaved));
        for (index, value) in quantized.dequantize().into_iter().enumerate() {
            let (g, u) = (gates[index].to_f64(), ups[index].to_f64());
            let exact = u * match gate {
                Gate::Silu => g / (1.0 + (-g).exp()),
                Gate::GeluTanh => {
                    let z = (2.0 / std::f64::consts::PI).sqrt() * (g + 0.044_715 * g.powi(3));
                    0.5 * g * (1.0 + z.tanh())
                }
            };
            let step = f64::from(quantized.scales()[index / k]);
            assert!(
                (f64::from(value) - exact).abs() <= 0.501 * step,
                "{gate:?}({g}) * {u}: {value}, {exact}"
            );
        }
    }
}

#[test]
fn rows_are_gathered_and_rows_out_of_range_are_nan() {
    let mut rng = StdRng::seed_from_u64(5);
    let k = 40;
    let input: Vec<bf16> = random(&mut rng, 5 * k, 3.0);
    let all = QuantizedActivations::quantize(&input, 5, k).unwrap();
    let rows = [4, 0, 4, 5, u32::MAX, 2];
    let call = QuantizeInput {
        gather: Some(Gather { rows: &rows[..], input_rows: 5 }),
        ..QuantizeInput::new(&input, rows.len(), k)
    };
    let gathered = cpu::quantize(&call, None).unwrap();
    for (row, &source) in rows.iter().enumerate() {
        if source < 5 {
            assert_eq!(gathered.row(row), all.row(source as usize));
            assert_eq!(gathered.scales()[row], all.scales()[source as usize]);
        } else {
            assert!(gathered.row(row).iter().all(|&code| code == 0) && gathered.scales()[row].is_nan());
        }
    }
}

#[test]
fn given_scales_clip_and_rows_that_are_not_finite_are_nan_and_stay_alone() {
    let input = [1.0f32, -300.0, 2.5, 0.0, f32::NAN, 1.0, 1.0, f32::INFINITY, 1.0].map(bf16::from_f32);
    let call = QuantizeInput { scaling: Scaling::Static(1.0), ..QuantizeInput::new(&input, 3, 3) };
    let quantized = cpu::quantize(&call, None).unwrap();
    assert_eq!(quantized.row(0), [1, -127, 2]);
    assert_eq!(quantized.scales()[0], 1.0);
    assert!(quantized.scales()[1..].iter().all(|scale| scale.is_nan()));
    assert!(codes(&quantized)[3..].iter().all(|&code| code == 0));
    let scales = [0.5, f32::INFINITY, 0.0];
    let call =
        QuantizeInput { scaling: Scaling::Given(&scales[..]), ..QuantizeInput::new(&input[..3], 1, 3) };
    for (scale, expected) in scales.iter().zip([[2, -127, 5], [0; 3], [0; 3]]) {
        let one = [*scale];
        let call = QuantizeInput { scaling: Scaling::Given(&one[..]), ..call };
        let quantized = cpu::quantize(&call, None).unwrap();
        assert_eq!(quantized.row(0), expected);
        assert_eq!(quantized.scales()[0].is_nan(), scale.is_infinite());
    }
}

#[test]
fn a_token_that_is_not_finite_has_a_product_of_nan() {
    let weights = PackedWeights::quantize(&[1.0f32; 3 * 64], 3, 64, Group::default()).unwrap();
    let mut input = vec![bf16::ONE; 2 * 64];
    input[5] = bf16::NAN;
    let y: Vec<bf16> = Linear::new(weights).forward(&QuantizeInput::new(&input, 2, 64), None).unwrap();
    assert!(y[..3].iter().all(|y| y.to_bits() == 0x7FFF));
    assert!(y[3..].iter().all(|y| (y.to_f32() - 64.0).abs() < 1.0));
}

#[test]
fn a_linear_layer_is_its_parts() {
    let mut rng = StdRng::seed_from_u64(6);
    let (m, k) = (5, 192);
    let smoothing: Vec<f32> = (0..k).map(|_| rng.random_range(0.5..2.0)).collect();
    let matrices: Vec<PackedWeights> = [70, 3, 64]
        .map(|n| {
            let weights: Vec<f32> = (0..n * k).map(|_| rng.random_range(-1.0..1.0)).collect();
            let smooth = smooth_weights(&weights, n, k, &smoothing).unwrap();
            PackedWeights::quantize(&smooth, n, k, Group::default()).unwrap()
        })
        .to_vec();
    let n = 70 + 3 + 64;
    let bias: Vec<f32> = (0..n).map(|_| rng.random_range(-5.0..5.0)).collect();
    let layer = Linear::stacked(&matrices)
        .and_then(|layer| layer.with_bias(bias.clone()))
        .and_then(|layer| layer.with_smoothing(smoothing.clone()))
        .unwrap();
    let input: Vec<bf16> = random(&mut rng, m * k, 3.0);
    let y: Vec<bf16> = layer.forward(&QuantizeInput::new(&input, m, k), None).unwrap();
    let x = QuantizedActivations::with_smoothing(&input, m, k, &smoothing).unwrap();
    let mut first = 0;
    for weights in &matrices {
        let channels = first..first + weights.n();
        let mut part = vec![bf16::ZERO; m * weights.n()];
        cpu::gemm(weights, &x, Some(&bias[channels.clone()]), &mut part).unwrap();
        for (token, part) in part.chunks(weights.n()).enumerate() {
            assert_eq!(part, &y[token * n..][channels.clone()]);
        }
        first = channels.end;
    }
    let none: Vec<bf16> = layer.forward(&QuantizeInput::new(&input, 0, k), None).unwrap();
    assert!(none.is_empty());
}

#[test]
fn bad_calls_are_refused_and_leave_the_residual_untouched() {
    let input = [bf16::ONE; 3 * 8];
    let weight = [bf16::ONE; 8];
    let good = QuantizeInput::new(&input[..], 3, 8);
    let norm = Operation::RmsNorm { weight: &weight[..], epsilon: 1e-5 };
    let mut residual = vec![bf16::ONE; 3 * 8];
    let mut refused = |call: QuantizeInput<'_, bf16>, stride| {
        let error = cpu::quantize(&call, Some(Residual { data: &mut residual, stride })).unwrap_err();
        assert!(residual.iter().all(|&x| x == bf16::ONE));
        error
    };
    assert!(matches!(refused(good, 8), Error::UnexpectedResidual));
    let normed = QuantizeInput { operation: norm, ..good };
    assert!(matches!(refused(normed, 7), Error::RowStrideTooShort { stride: 7, row: 8, .. }));
    assert!(matches!(refused(normed, 9), Error::ShapeMismatch { expected: 26, actual: 24, .. }));
    let epsilon = f32::NAN;
    let call = QuantizeInput { operation: Operation::RmsNorm { weight: &weight[..], epsilon }, ..good };
    assert!(matches!(refused(call, 8), Error::InvalidEpsilon { .. }));
    let call = QuantizeInput { operation: Operation::RmsNorm { weight: &weight[..7], epsilon: 0.0 }, ..good };
    assert!(matches!(refused(call, 8), Error::ShapeMismatch { what: "norm weight", .. }));
    let rows = [0, 1, 2];
    let call = QuantizeInput { gather: Some(Gather { rows: &rows[..], input_rows: 3 }), ..normed };
    assert!(matches!(refused(call, 8), Error::UnexpectedResidual));

    let refused = |call: QuantizeInput<'_, bf16>| cpu::quantize(&call, None).unwrap_err();
    assert!(matches!(refused(QuantizeInput { k: 0, ..good }), Error::EmptyDimension { .. }));
    assert!(matches!(refused(QuantizeInput { k: 131_073, ..good }), Error::KTooLarge { .. }));
    assert!(matches!(refused(QuantizeInput { m: 4, ..good }), Error::ShapeMismatch { what: "input", .. }));
    assert!(matches!(refused(QuantizeInput { m: usize::MAX, ..good }), Error::TooLarge { .. }));
    assert!(matches!(refused(QuantizeInput { input_stride: 7, ..good }), Error::RowStrideTooShort { .. }));
    for scale in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        let call = QuantizeInput { scaling: Scaling::Static(scale), ..good };
        assert!(matches!(refused(call), Error::InvalidStaticScale { .. }));
    }
    let call = QuantizeInput { smoothing: Some(&[0.0; 8][..]), ..good };
    assert!(matches!(refused(call), Error::InvalidSmoothing { .. }));
    let call = QuantizeInput { scaling: Scaling::Given(&[1.0; 2][..]), ..good };
    assert!(matches!(refused(call), Error::ShapeMismatch { what: "token scales", .. }));
    let call = QuantizeInput { gather: Some(Gather { rows: &rows[..2], input_rows: 3 }), ..good };
    assert!(matches!(refused(call), Error::ShapeMismatch { what: "row indices", .. }));
    let gated = Operation::Gated { gate: Gate::Silu, order: GateOrder::Halves };
    assert!(matches!(refused(QuantizeInput { operation: gated, ..good }), Error::RowStrideTooShort { .. }));

    let layer = Linear::new(PackedWeights::quantize(&[1.0f32; 8], 1, 8, Group::default()).unwrap());
    assert!(matches!(layer.clone().with_bias(vec![0.0; 2]), Err(Error::ShapeMismatch { .. })));
    assert!(matches!(layer.clone().with_bias(vec![f32::NAN]), Err(Error::NonFiniteParameter { .. })));
    assert!(matches!(layer.clone().with_smoothing(vec![0.0; 8]), Err(Error::InvalidSmoothing { .. })));
    let other = QuantizeInput { k: 4, input_stride: 8, ..good };
    assert!(matches!(layer.quantize(&other, None), Err(Error::KMismatch { weights: 8, activations: 4 })));
    let smooth = QuantizeInput { smoothing: Some(&[1.0; 8][..]), ..good };
    assert!(matches!(layer.quantize(&smooth, None), Err(Error::SmoothingTwice)));
    let biased = layer.with_bias(vec![1.0]).unwrap();
    assert!(matches!(biased.forward::<_, i32>(&good, None), Err(Error::BiasWithRawOutput)));
}
