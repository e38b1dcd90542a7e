//! Tests of importers: models are written as other quantizers write them, taken over, and multiplied against the
//! source's own dequantization.

mod common;

use std::fs;
use std::path::Path;

use common::{Tensor, bf16_tensor, contents, f32_tensor, i32_tensor, numbers, safetensors_bytes, write_json};
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

#[test]
fn layers_that_the_quantizer_kept_are_kept() {
    let matrix = Matrix::new([128, 256, 256], |_, _| 0.01, |_, _| 8);
    let taken = take(matrix.awq("fc"), r#"{"quant_method": "awq", "bits": 4}"#, None);
    let kept: Vec<&str> = taken.checkpoint.tensors().map(|tensor| tensor.0).collect();
    assert_eq!(kept, ["other.weight"]);
}

#[test]
fn parts_that_are_missing_or_have_another_shape_are_errors_and_leave_nothing() {
    let matrix = Matrix::new([128, 256, 128], |_, _| 0.01, |_, _| 8);
    for (tensors, config) in formats(&matrix, true) {
        for index in 0..tensors.len() {
            let is_optional =
                ["g_idx", "weight_zero_point"].iter().any(|name| tensors[index].0.ends_with(name));
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
