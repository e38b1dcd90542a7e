//! Tests of importers: models are written as other quantizers write them, taken over, and multiplied against the
//! source's own dequantization.

mod common;

use std::fs;
use std::path::Path;

use common::{
    Tensor, bf16_tensor, contents, f16_tensor, f32_tensor, i32_tensor, numbers, safetensors_bytes, write_json,
};
use half::f16;
use liquidgemm::{Group, QuantizedActivations, cpu};
use liquidgemm_checkpoint::{
    Checkpoint, CheckpointError, ImportKind, Model, OpenOptions, Plan, QuantizeOptions, Summary, open, verify,
};
use serde_json::{Value, json};

/// A matrix as another quantizer has it.
#[derive(Clone)]
struct Matrix {
    n: usize,
    k: usize,
    group: usize,
    codes: Vec<u8>,
    /// `[n, groups]`.
    scales: Vec<f32>,
    /// `[n, groups]`.
    zeros: Vec<u8>,
    /// The group of each column.
    of: Vec<usize>,
}

impl Matrix {
    /// Random codes, with scales by `scale(channel, group)` and zeros by `zero(channel, group)`.
    fn new(
        [n, k, group]: [usize; 3],
        scale: impl Fn(usize, usize) -> f32,
        zero: impl Fn(usize, usize) -> u8,
    ) -> Self {
        let groups = k / group;
        let codes =
            numbers(n * k, 5).iter().map(|x| ((x * 60.0 + 8.0).round() as i32).clamp(0, 15) as u8).collect();
        let all = || (0..n).flat_map(|channel| (0..groups).map(move |group| (channel, group)));
        Self {
            n,
            k,
            group,
            codes,
            scales: all().map(|(channel, group)| scale(channel, group)).collect(),
            zeros: all().map(|(channel, group)| zero(channel, group)).collect(),
            of: (0..k).map(|column| column / group).collect(),
        }
    }

    /// Gives the columns to the groups in another order.
    fn shuffled(mut self) -> Self {
        let (k, groups) = (self.k, self.groups());
        self.of = (0..k).map(|column| column * 37 % k % groups).collect();
        self
    }

    fn groups(&self) -> usize {
        self.k / self.group
    }

    /// The weights by the formula that all formats share.
    fn weights(&self) -> Vec<f32> {
        let Self { n, k, .. } = *self;
        (0..n * k)
            .map(|i| {
                let group = i / k * self.groups() + self.of[i % k];
                (f32::from(self.codes[i]) - f32::from(self.zeros[group])) * self.scales[group]
            })
            .collect()
    }

    fn compressed_tensors(&self, module: &str, with_zeros: bool) -> Vec<Tensor> {
        let Self { n, k, .. } = *self;
        let groups = self.groups();
        let packed = words(n, k.div_ceil(8), |row, word, i| at(&self.codes, n, k, row, word * 8 + i));
        let zeros =
            words(n.div_ceil(8), groups, |word, group, i| at(&self.zeros, n, groups, word * 8 + i, group));
        let mut tensors = vec![
            i32_tensor(&format!("{module}.weight_packed"), &[n, k.div_ceil(8)], &packed),
            f32_tensor(&format!("{module}.weight_scale"), &[n, groups], &self.scales),
        ];
        let shape = [n as i64, k as i64].iter().flat_map(|side| side.to_le_bytes()).collect();
        tensors.push((format!("{module}.weight_shape"), safetensors::Dtype::I64, vec![2], shape));
        if with_zeros {
            tensors.push(i32_tensor(
                &format!("{module}.weight_zero_point"),
                &[n.div_ceil(8), groups],
                &zeros,
            ));
        }
        tensors
    }

    /// `less` is what the file's version subtracts from zeros.
    fn gptq(&self, module: &str, less: u8) -> Vec<Tensor> {
        let Self { n, k, .. } = *self;
        let groups = self.groups();
        let codes = words(k / 8, n, |word, row, i| at(&self.codes, n, k, row, word * 8 + i));
        let zeros =
            words(groups, n / 8, |group, word, i| at(&self.zeros, n, groups, word * 8 + i, group) - less);
        let of: Vec<u32> = self.of.iter().map(|&group| group as u32).collect();
        vec![
            i32_tensor(&format!("{module}.qweight"), &[k / 8, n], &codes),
            i32_tensor(&format!("{module}.qzeros"), &[groups, n / 8], &zeros),
            f32_tensor(&format!("{module}.scales"), &[groups, n], &transposed(&self.scales, n, groups)),
            i32_tensor(&format!("{module}.g_idx"), &[k], &of),
        ]
    }

    fn awq(&self, module: &str) -> Vec<Tensor> {
        // The channel in the four bits from 4i on, as AutoAWQ's packer has it.
        const ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];
        let Self { n, k, .. } = *self;
        let groups = self.groups();
        let codes = words(k, n / 8, |column, word, i| at(&self.codes, n, k, word * 8 + ORDER[i], column));
        let zeros =
            words(groups, n / 8, |group, word, i| at(&self.zeros, n, groups, word * 8 + ORDER[i], group));
        vec![
            i32_tensor(&format!("{module}.qweight"), &[k, n / 8], &codes),
            i32_tensor(&format!("{module}.qzeros"), &[groups, n / 8], &zeros),
            f32_tensor(&format!("{module}.scales"), &[groups, n], &transposed(&self.scales, n, groups)),
        ]
    }
}

/// Writers of the two formats whose layout is that of a kernel. They go through the steps of the quantizers' own packers:
/// cut the matrix into blocks, permute the axes, and take elements in the order of the tensor core's fragments.
impl Matrix {
    /// Codes are 8 above the signed ones. `channel` is the part of the scales that is the channel's.
    fn qqq(&self, module: &str, channel: &[f32]) -> Vec<Tensor> {
        let Self { n, k, .. } = *self;
        let groups = self.groups();
        let by_k: Vec<u8> = (0..k * n).map(|i| self.codes[i % n * k + i / n]).collect();
        let tiles = permuted(&by_k, &[k / 16, 16, n / 16, 16], &[0, 2, 1, 3]);
        let mut order = Vec::new();
        for lane in 0..32 {
            for tile in 0..4 {
                for half in 0..2 {
                    for row in 0..4 {
                        order.push(256 * tile + 16 * (4 * (lane % 4) + row) + lane / 4 + 8 * half);
                    }
                }
            }
        }
        let of_word: [usize; 8] =
            if groups > 1 { [0, 2, 4, 6, 1, 3, 5, 7] } else { [4, 0, 5, 1, 6, 2, 7, 3] };
        let words: Vec<u32> = (0..n * k / 8)
            .map(|word| {
                let (block, first) = (word * 8 / 1024 * 1024, word * 8 % 1024);
                (0..8).fold(0, |bits, i| {
                    let code = u32::from(tiles[block + order[first + of_word[i]]]);
                    let code = if groups > 1 { code } else { code.wrapping_sub(8) & 15 };
                    bits | code << (4 * i)
                })
            })
            .collect();
        let pairs = [0, 1, 8, 9, 16, 17, 24, 25];
        let single: Vec<usize> = (0..4).flat_map(|i| pairs.map(|j| 2 * i + j)).collect();
        let scaled: Vec<f32> = channel.iter().map(|x| if groups > 1 { *x } else { x / 16.0 }).collect();
        let s_channel: Vec<f32> = (0..n).map(|i| scaled[i / 32 * 32 + single[i % 32]]).collect();
        let mut tensors = vec![
            i32_tensor(&format!("{module}.B"), &[k / 16, 2 * n], &words),
            f32_tensor(&format!("{module}.s_channel"), &[1, n], &s_channel),
        ];
        if groups > 1 {
            let of_group = transposed(&self.scales, n, groups);
            let of_group = of_group.iter().enumerate().map(|(i, s)| s / channel[i % n]).collect::<Vec<_>>();
            let wide: Vec<usize> = (0..8).flat_map(|i| (0..8).map(move |j| i + 8 * j)).collect();
            let s_group: Vec<f32> = (0..groups * n).map(|i| of_group[i / 64 * 64 + wide[i % 64]]).collect();
            tensors.push(f16_tensor(&format!("{module}.s_group"), &[groups, n], &s_group));
        } else {
            tensors.push(f16_tensor(&format!("{module}.s_group"), &[0], &[]));
        }
        tensors
    }

    /// `channel` is the part of the scales that is the channel's.
    /// Without groups, `zero` is stored for a channel in place of the product of its zero and scale, if it is there.
    fn qserve(&self, module: &str, channel: &[f32], zero: Option<&[f32]>) -> Vec<Tensor> {
        let Self { n, k, .. } = *self;
        let groups = self.groups();
        let blocks = permuted(&self.codes, &[n / 32, 2, 2, 8, k / 32, 2, 4, 4], &[0, 4, 3, 6, 5, 2, 7, 1]);
        let bytes = blocks.as_chunks::<2>().0.iter().map(|[low, high]| high << 4 | low).collect();
        let mut tensors = vec![
            (format!("{module}.qweight"), safetensors::Dtype::I8, vec![n, k / 2], bytes),
            f16_tensor(&format!("{module}.s1_scales"), &[n], channel),
        ];
        if groups == 1 {
            let product: Vec<f32> = (0..n).map(|i| f32::from(self.zeros[i]) * channel[i]).collect();
            let zero = zero.map_or(product, <[f32]>::to_vec);
            tensors.push(f16_tensor(&format!("{module}.s1_szeros"), &[n], &zero));
            return tensors;
        }
        let scale = |i: usize| (self.scales[i] / channel[i / groups]).round() as i32;
        let second: Vec<[u8; 2]> =
            (0..n * groups).map(|i| [scale(i) as u8, (-i32::from(self.zeros[i]) * scale(i)) as u8]).collect();
        let second = permuted(&second, &[n / 32, 4, 8, groups], &[3, 0, 2, 1]);
        for (index, name) in ["s2_scales", "s2_zeros"].iter().enumerate() {
            let bytes = second.iter().map(|both| both[index]).collect();
            tensors.push((format!("{module}.{name}"), safetensors::Dtype::I8, vec![groups, n], bytes));
        }
        tensors
    }
}

/// Permutes the axes of a row-major array of this shape.
fn permuted<T: Copy>(values: &[T], shape: &[usize], axes: &[usize]) -> Vec<T> {
    let strides: Vec<usize> = (0..shape.len()).map(|axis| shape[axis + 1..].iter().product()).collect();
    (0..values.len())
        .map(|mut index| {
            let mut from = 0;
            for &axis in axes.iter().rev() {
                from += index % shape[axis] * strides[axis];
                index /= shape[axis];
            }
            values[from]
        })
        .collect()
}

/// An element of a row-major matrix, or 0 outside it.
fn at(values: &[u8], rows: usize, columns: usize, row: usize, column: usize) -> u8 {
    if row < rows && column < columns { values[row * columns + column] } else { 0 }
}

fn words(rows: usize, columns: usize, code: impl Fn(usize, usize, usize) -> u8) -> Vec<u32> {
    let word = |row, column| (0..8).fold(0, |word, i| word | u32::from(code(row, column, i)) << (4 * i));
    (0..rows * columns).map(|index| word(index / columns, index % columns)).collect()
}

fn transposed(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    (0..rows * columns).map(|i| values[i % rows * columns + i / rows]).collect()
}

const INT4: &str = r#"{"quant_method": "compressed-tensors", "format": "pack-quantized",
    "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int"}}}}"#;

/// Writes a model of one matrix `fc` and a head that its quantizer has kept.
fn write(folder: &Path, mut tensors: Vec<Tensor>, config: &str) {
    fs::create_dir_all(folder).unwrap();
    let config: Value = serde_json::from_str(config).unwrap();
    write_json(&folder.join("config.json"), &json!({"quantization_config": config}));
    tensors.push(bf16_tensor("other.weight", &[128, 128], 9));
    fs::write(folder.join("model.safetensors"), safetensors_bytes(&tensors)).unwrap();
}

/// A model that was taken over.
struct Taken {
    _folder: tempfile::TempDir,
    checkpoint: Checkpoint,
    summary: Summary,
    /// The distance to the source that `verify` measures.
    error: f64,
}

fn take(tensors: Vec<Tensor>, config: &str, group: Option<Group>) -> Taken {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    write(&model, tensors, config);
    let source = open(&model, OpenOptions::default()).unwrap();
    let plan = Plan::new(source.as_ref(), &QuantizeOptions { group, ..Default::default() }).unwrap();
    let summary = plan.run(&folder.path().join("out"), false, &()).unwrap();
    let checkpoint = Checkpoint::open(folder.path().join("out")).unwrap();
    let verified = verify(&checkpoint, Some(&Model::open(&model).unwrap()), &()).unwrap();
    assert_eq!(verified.problems, Vec::<String>::new());
    let error = verified.modules[0].1.unwrap().relative;
    Taken { _folder: folder, checkpoint, summary, error }
}

/// Checks that the packed matrix, multiplied, gives what the source's dequantization gives.
fn check_product(taken: &Taken, matrix: &Matrix, tolerance: f32) {
    let Matrix { n, k, .. } = *matrix;
    let packed = taken.checkpoint.packed("fc").unwrap();
    let permutation = taken.checkpoint.input_permutation("fc").unwrap();
    let (m, weights) = (3, matrix.weights());
    // Whole numbers with a scale of 1, so that activations lose nothing.
    let activations: Vec<f32> = numbers(m * k, 11)
        .iter()
        .enumerate()
        .map(|(i, x)| if i % k == 0 { 127.0 } else { (x * 600.0).round() })
        .collect();
    let ordered: Vec<f32> = match &permutation {
        Some(order) => (0..m * k).map(|i| activations[i / k * k + order[i % k]]).collect(),
        None => activations.clone(),
    };
    let quantized = QuantizedActivations::quantize(&ordered, m, k).unwrap();
    let mut product = vec![0f32; m * n];
    cpu::gemm(&packed, &quantized, None, &mut product).unwrap();
    for (index, &found) in product.iter().enumerate() {
        let (x, w) = (&activations[index / n * k..][..k], &weights[index % n * k..][..k]);
        let terms = || x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w));
        let (expected, size) = (terms().sum::<f64>(), terms().map(f64::abs).sum::<f64>());
        assert!(
            ((f64::from(found) - expected).abs() as f32) <= tolerance * size as f32,
            "{index}: {found} {expected}"
        );
    }
}

/// The four ways to write a matrix: tensors and configuration.
fn formats(matrix: &Matrix, is_symmetric: bool) -> Vec<(Vec<Tensor>, &'static str)> {
    let mut all = vec![
        (matrix.compressed_tensors("fc", true), INT4),
        (matrix.gptq("fc", 1), r#"{"quant_method": "gptq", "bits": 4}"#),
        (matrix.gptq("fc", 0), r#"{"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"}"#),
        (matrix.awq("fc"), r#"{"quant_method": "awq", "bits": 4, "version": "gemm"}"#),
    ];
    if is_symmetric {
        all.push((matrix.compressed_tensors("fc", false), INT4));
    }
    all
}

#[test]
fn one_scale_a_channel_is_taken_over_exactly() {
    for is_symmetric in [true, false] {
        let zero = |channel: usize, _| if is_symmetric { 8 } else { (channel % 14 + 1) as u8 };
        let matrix = Matrix::new([128, 256, 256], |channel, _| 0.001 * (channel + 1) as f32, zero);
        for (tensors, config) in formats(&matrix, is_symmetric) {
            let taken = take(tensors, config, None);
            assert_eq!(taken.summary.imports[0].kind, ImportKind::Exact, "{config}");
            assert!(taken.error < 1e-7, "{config}: {}", taken.error);
            assert_eq!(taken.checkpoint.packed("fc").unwrap().group(), Group::Channel);
            check_product(&taken, &matrix, 1e-6);
        }
    }
}

#[test]
fn scales_that_are_multiples_of_one_number_are_taken_over_exactly() {
    // s from 1 to 8 with zeros around the middle: s·z ≤ 128 and s·(15 − z) ≤ 127.
    let scale =
        |channel: usize, group: usize| 0.0007 * (channel % 5 + 1) as f32 * ((channel + group) % 8 + 1) as f32;
    let matrix = Matrix::new([128, 512, 128], scale, |channel, group| ((channel * 3 + group) % 5 + 6) as u8);
    for (tensors, config) in formats(&matrix, false) {
        for group in [None, Some(Group::K(64))] {
            let taken = take(tensors.clone(), config, group);
            assert_eq!(taken.summary.imports[0].kind, ImportKind::Exact, "{config}");
            assert!(taken.error < 1e-6, "{config}: {}", taken.error);
            assert_eq!(taken.checkpoint.packed("fc").unwrap().group(), group.unwrap_or(Group::K(128)));
            check_product(&taken, &matrix, 1e-5);
        }
    }
}

#[test]
fn other_scales_are_snapped_or_the_weights_requantized_whichever_is_better() {
    let scale = |channel: usize, group: usize| 0.01 * (1.0 + 0.37 * ((channel * 7 + group * 3) as f32).sin());
    let matrix = Matrix::new([128, 512, 128], scale, |_, _| 8);
    for (tensors, config) in formats(&matrix, true) {
        let taken = take(tensors, config, None);
        let outcome = &taken.summary.imports[0];
        assert_eq!(outcome.kind, ImportKind::Snapped, "{config}");
        assert!((outcome.error - taken.error).abs() < 1e-9);
        // A scale is off by up to half of 1/16 of the largest.
        assert!((0.001..0.04).contains(&outcome.error), "{}", outcome.error);
        check_product(&taken, &matrix, 0.05);
    }
}

#[test]
fn groups_that_the_format_does_not_have_are_requantized() {
    let matrix = Matrix::new([128, 256, 32], |_, group| 0.01 + 0.001 * group as f32, |_, _| 8);
    for (tensors, config) in formats(&matrix, true) {
        let taken = take(tensors, config, None);
        assert_eq!(taken.summary.imports.len(), 0, "{config}");
        assert!((0.0..0.12).contains(&taken.error), "{}", taken.error);
        assert_eq!(taken.checkpoint.packed("fc").unwrap().group(), Group::K(64));
        check_product(&taken, &matrix, 0.12);
    }
}

#[test]
fn activation_order_is_stored_as_a_permutation_of_the_inputs() {
    let matrix = Matrix::new([128, 256, 64], |_, group| 0.002 * (group + 1) as f32, |_, _| 8).shuffled();
    let taken = take(matrix.gptq("fc", 1), r#"{"quant_method": "gptq", "bits": 4, "desc_act": true}"#, None);
    assert_eq!(taken.summary.imports[0].kind, ImportKind::Exact);
    let order = taken.checkpoint.input_permutation("fc").unwrap().unwrap();
    assert!(order.iter().enumerate().all(|(column, &from)| matrix.of[from] == column / 64));
    assert!(taken.error < 1e-6);
    check_product(&taken, &matrix, 1e-5);
    assert!(matches!(taken.checkpoint.linear("fc"), Err(CheckpointError::Options { .. })));
}

const QQQ: &str = r#"{"quant_method": "qqq", "wbits": 4, "group_size": 128}"#;
/// QServe's converter writes no configuration.
const QSERVE: &str = "null";
const QOQ: &str = r#"{"quant_method": "qoq", "wbits": 4, "group_size": 128}"#;

/// Scales of channels that are f16 numbers, as are their products with numbers up to 16.
fn channel_scales(n: usize) -> Vec<f32> {
    (0..n).map(|channel| (channel % 61 + 3) as f32 / 4096.0).collect()
}

#[test]
fn qqq_and_qserve_with_one_scale_a_channel_are_taken_over_exactly() {
    let channel = channel_scales(192);
    let symmetric = Matrix::new([192, 320, 320], |row, _| channel[row], |_, _| 8);
    let other = Matrix::new([192, 320, 320], |row, _| channel[row], |row, _| (row % 16) as u8);
    for (matrix, tensors, config) in [
        (&symmetric, symmetric.qqq("fc", &channel), QQQ),
        (&symmetric, symmetric.qserve("fc", &channel, None), QSERVE),
        (&other, other.qserve("fc", &channel, None), QSERVE),
        (&other, other.qserve("fc", &channel, None), QOQ),
    ] {
        let taken = take(tensors, config, None);
        assert_eq!(taken.summary.imports[0].kind, ImportKind::Exact, "{config}");
        assert_eq!(taken.error, 0.0, "{config}");
        assert_eq!(taken.checkpoint.packed("fc").unwrap().group(), Group::Channel);
        check_product(&taken, matrix, 1e-6);
    }
}

#[test]
fn qserve_zeros_that_were_rounded_to_f16_are_still_integers_and_others_are_approximated() {
    let channel: Vec<f32> = (0..64).map(|row| f16::from_f32(0.001 + row as f32 * 0.00013).to_f32()).collect();
    let matrix = Matrix::new([64, 128, 128], |row, _| channel[row], |row, _| (row % 13 + 3) as u8);
    let product = |row: usize, extra: f32| (f32::from(matrix.zeros[row]) + extra) * channel[row];
    let stored =
        |extra: f32| -> Vec<f32> { (0..64).map(|row| f16::from_f32(product(row, extra)).to_f32()).collect() };
    assert!((0..64).any(|row| stored(0.0)[row] != product(row, 0.0)));
    let taken = take(matrix.qserve("fc", &channel, Some(&stored(0.0))), QSERVE, None);
    assert_eq!((taken.summary.imports[0].kind, taken.error), (ImportKind::Exact, 0.0));
    check_product(&taken, &matrix, 1e-6);

    // Zeros between integers: the source's own dequantization is code · scale − zero.
    let taken = take(matrix.qserve("fc", &channel, Some(&stored(0.4))), QSERVE, None);
    assert_ne!(taken.summary.imports[0].kind, ImportKind::Exact);
    let packed = taken.checkpoint.packed("fc").unwrap().dequantize();
    let (mut square, mut error) = (0.0, 0.0);
    for (i, found) in packed.iter().enumerate() {
        let weight = f32::from(matrix.codes[i]) * channel[i / 128] - stored(0.4)[i / 128];
        square += f64::from(weight).powi(2);
        error += f64::from(found - weight).powi(2);
    }
    let error = (error / square).sqrt();
    assert!((taken.error - error).abs() < 1e-6 && error < 0.15, "{error} {}", taken.error);
}

#[test]
fn qserve_with_groups_is_taken_over_exactly_also_where_codes_must_be_shifted() {
    let channel = channel_scales(192);
    // s from 1 to 16, and all zeros. Codes keep within what makes int8 weights.
    let s = |row: usize, group: usize| (row * 5 + group * 3) % 16 + 1;
    let mut matrix = Matrix::new(
        [192, 512, 128],
        |row, group| channel[row] * s(row, group) as f32,
        |row, group| ((row / 3 + group) % 16) as u8,
    );
    let mut beyond = [false; 2];
    for i in 0..192 * 512 {
        let (row, group) = (i / 512, i % 512 / 128);
        let (s, zero) = (s(row, group) as i32, i32::from(matrix.zeros[row * 4 + group]));
        let range = ((-128 / s + zero).max(0), (127 / s + zero).min(15));
        matrix.codes[i] = i32::from(matrix.codes[i]).clamp(range.0, range.1) as u8;
        // Pairs that break the invariant without a shift, and zeros that wrap.
        beyond[0] |= 15 * s + 128 - zero * s > 255;
        beyond[1] |= zero * s > 128;
    }
    assert_eq!(beyond, [true; 2]);
    for config in [QSERVE, QOQ] {
        for group in [None, Some(Group::K(64))] {
            let taken = take(matrix.qserve("fc", &channel, None), config, group);
            assert_eq!(taken.summary.imports[0].kind, ImportKind::Exact);
            assert!(taken.error < 1e-6, "{}", taken.error);
            assert_eq!(taken.checkpoint.packed("fc").unwrap().group(), group.unwrap_or(Group::K(128)));
            check_product(&taken, &matrix, 1e-5);
        }
    }
}

#[test]
fn qqq_with_groups_keeps_its_codes_and_snaps_its_scales() {
    let channel = channel_scales(192);
    let s_group =
        |row: usize, group: usize| f16::from_f32(9.0 + 7.0 * ((row * 7 + group * 3) as f32).sin()).to_f32();
    let matrix = Matrix::new([192, 512, 128], |row, group| channel[row] * s_group(row, group), |_, _| 8);
    let taken = take(matrix.qqq("fc", &channel), QQQ, None);
    let outcome = &taken.summary.imports[0];
    assert_eq!(outcome.kind, ImportKind::Snapped);
    assert!((outcome.error - taken.error).abs() < 1e-9);
    assert!((0.001..0.05).contains(&outcome.error), "{}", outcome.error);
    check_product(&taken, &matrix, 0.06);
    // Integers as group scales are multiples already.
    let whole = |row: usize, group: usize| channel[row] * ((row + group) % 8 + 1) as f32;
    let matrix = Matrix::new([192, 512, 128], whole, |_, _| 8);
    let taken = take(matrix.qqq("fc", &channel), QQQ, None);
    assert_eq!(taken.summary.imports[0].kind, ImportKind::Exact);
    check_product(&taken, &matrix, 1e-5);
}

#[test]
fn qserve_groups_whose_weights_exceed_int8_are_an_error() {
    let matrix = Matrix::new([64, 256, 128], |_, _| 16.0 / 4096.0, |_, _| 15);
    let folder = tempfile::tempdir().unwrap();
    write(&folder.path().join("model"), matrix.qserve("fc", &[1.0 / 4096.0; 64], None), QSERVE);
    let source = open(folder.path().join("model"), OpenOptions::default()).unwrap();
    let plan = Plan::new(source.as_ref(), &QuantizeOptions::default()).unwrap();
    let error = plan.run(&folder.path().join("out"), false, &()).unwrap_err().to_string();
    assert!(error.contains("s2_zeros") && error.contains("int8"), "{error}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn layers_that_the_quantizer_kept_are_kept() {
    let matrix = Matrix::new([128, 256, 256], |_, _| 0.01, |_, _| 8);
    let taken = take(matrix.awq("fc"), r#"{"quant_method": "awq", "bits": 4}"#, None);
    let kept: Vec<&str> = taken.checkpoint.tensors().map(|tensor| tensor.0).collect();
    assert_eq!(kept, ["other.weight"]);
}

#[test]
fn parts_that_are_missing_or_have_another_shape_are_errors_and_leave_nothing() {
    let matrix = Matrix::new([128, 256, 128], |_, _| 2.0, |_, _| 8);
    let mut all = formats(&matrix, true);
    all.extend([(matrix.qqq("fc", &[0.5; 128]), QQQ), (matrix.qserve("fc", &[0.5; 128], None), QOQ)]);
    for (tensors, config) in all {
        for index in 0..tensors.len() {
            let is_optional =
                ["g_idx", "weight_zero_point", "s_group"].iter().any(|name| tensors[index].0.ends_with(name));
            let mut missing = tensors.clone();
            missing.remove(index);
            let mut short = tensors.clone();
            let (_, dtype, shape, bytes) = &mut short[index];
            let last = shape.len() - 1;
            shape[last] -= 1;
            let length = shape.iter().product::<usize>() * dtype.bitsize() / 8;
            bytes.truncate(length);
            let mut other = tensors.clone();
            other[index].1 = match other[index].1 {
                safetensors::Dtype::F32 => safetensors::Dtype::I32,
                safetensors::Dtype::I64 => safetensors::Dtype::F64,
                safetensors::Dtype::F16 => safetensors::Dtype::I16,
                safetensors::Dtype::I8 => safetensors::Dtype::BOOL,
                _ => safetensors::Dtype::F32,
            };
            // With one group less, symmetric codes without zeros are another valid matrix.
            let is_shorter_valid = tensors.len() == 3 && tensors[index].0.ends_with("weight_scale");
            for (tensors, is_valid) in [(missing, is_optional), (short, is_shorter_valid), (other, false)] {
                let folder = tempfile::tempdir().unwrap();
                write(&folder.path().join("model"), tensors, config);
                let before = contents(folder.path());
                let outcome = open(folder.path().join("model"), OpenOptions::default()).and_then(|source| {
                    Plan::new(source.as_ref(), &QuantizeOptions::default())?.run(
                        &folder.path().join("out"),
                        false,
                        &(),
                    )
                });
                // Without its codes, a matrix is only left-over tensors, which are kept.
                let has_codes = index != 0 || outcome.is_err();
                if !is_valid && has_codes {
                    assert!(
                        matches!(outcome, Err(CheckpointError::Input { .. })),
                        "{config} {index}: {outcome:?}"
                    );
                    assert!(contents(folder.path()) == before);
                }
            }
        }
    }
}

#[test]
fn a_group_index_that_is_no_order_of_whole_groups_is_an_error() {
    let mut matrix = Matrix::new([128, 256, 64], |_, _| 0.01, |_, _| 8);
    for bad in [vec![0; 256], vec![9; 256], (0..256).map(|column| column % 3).collect()] {
        matrix.of = bad;
        let folder = tempfile::tempdir().unwrap();
        // Only the index is used.
        write(&folder.path().join("model"), matrix.gptq("fc", 1), r#"{"quant_method": "gptq", "bits": 4}"#);
        let outcome = open(folder.path().join("model"), OpenOptions::default()).and_then(|source| {
            Plan::new(source.as_ref(), &QuantizeOptions::default())?.run(
                &folder.path().join("out"),
                false,
                &(),
            )
        });
        assert!(matches!(outcome, Err(CheckpointError::Input { .. })), "{outcome:?}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
