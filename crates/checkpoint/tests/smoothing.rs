//! Tests of smoothing in models of a known family: what the vectors are folded into, and what is stored.

mod common;

use std::fs;
use std::path::Path;
use std::sync::Arc;

use common::{
    Tensor, bf16_tensor, bf16_values, contents, f32_tensor, numbers, safetensors_bytes, write_json,
};
use liquidgemm::{
    Group, InputStatistics, InputStatisticsBuilder, Method as Rounding, PackedWeights, smooth_weights,
    smoothing_auto, smoothing_vector,
};
use liquidgemm_checkpoint::{
    Calibration, Checkpoint, CheckpointError, Method, Model, OpenOptions, Plan, QuantizeOptions, Smoothing,
    open, verify,
};
use safetensors::SafeTensors;
use serde_json::json;

const TOKENS: usize = 30;
const HIDDEN: usize = 192;
const INNER: usize = 256;
const KV: usize = 64;
const FOLDED: &str = "liquidgemm_folded_smoothing";

/// The modules of the block, with n, k and the seed of their inputs.
const MODULES: [(&str, usize, usize, u32); 7] = [
    ("self_attn.q_proj", HIDDEN, HIDDEN, 1),
    ("self_attn.k_proj", KV, HIDDEN, 1),
    ("self_attn.v_proj", KV, HIDDEN, 1),
    ("self_attn.o_proj", HIDDEN, HIDDEN, 2),
    ("mlp.gate_proj", INNER, HIDDEN, 3),
    ("mlp.up_proj", INNER, HIDDEN, 3),
    ("mlp.down_proj", HIDDEN, INNER, 4),
];

fn name(module: &str) -> String {
    format!("model.layers.0.{module}")
}

/// Inputs whose channels differ in size.
fn inputs(k: usize, seed: u32) -> Vec<f32> {
    numbers(TOKENS * k, seed).iter().enumerate().map(|(i, x)| x * (1 + i % k % 9) as f32).collect()
}

fn statistics(k: usize, seed: u32) -> InputStatistics {
    let mut builder = InputStatisticsBuilder::new(k).unwrap();
    builder.add(&inputs(k, seed), TOKENS).unwrap();
    builder.finish().unwrap()
}

/// The tensors of a block with `kv` channels of keys and values.
fn tensors(kv: usize) -> Vec<Tensor> {
    let mut tensors: Vec<Tensor> = Vec::new();
    for (index, (module, n, k, _)) in MODULES.into_iter().enumerate() {
        let n = if n == KV { kv } else { n };
        tensors.push(bf16_tensor(&format!("{}.weight", name(module)), &[n, k], 50 + index as u32));
    }
    for (index, module) in ["self_attn.v_proj", "mlp.up_proj"].into_iter().enumerate() {
        let n = if index == 0 { kv } else { INNER };
        tensors.push(bf16_tensor(&format!("{}.bias", name(module)), &[n], 70 + index as u32));
    }
    for (index, norm) in ["input_layernorm", "post_attention_layernorm"].into_iter().enumerate() {
        tensors.push(bf16_tensor(&format!("{}.weight", name(norm)), &[HIDDEN], 60 + index as u32));
    }
    tensors
}

/// Writes a model of one block with three query heads and this many heads of keys and values, and its captured inputs.
fn write(folder: &Path, model_type: &str, kv_heads: usize) {
    let model = folder.join("model");
    fs::create_dir(&model).unwrap();
    let config = json!({"model_type": model_type, "num_attention_heads": 3, "num_key_value_heads": kv_heads});
    write_json(&model.join("config.json"), &config);
    fs::write(model.join("model.safetensors"), safetensors_bytes(&tensors(64 * kv_heads))).unwrap();
    let captured: Vec<Tensor> = MODULES
        .into_iter()
        .map(|(module, _, k, seed)| f32_tensor(&name(module), &[TOKENS, k], &inputs(k, seed)))
        .collect();
    fs::write(folder.join("inputs"), safetensors_bytes(&captured)).unwrap();
}

fn options(folder: &Path, smoothing: Smoothing) -> QuantizeOptions {
    let calibration = Some(Arc::new(Calibration::open(folder.join("inputs")).unwrap()));
    let (method, group) = (Method::Rtn, Some(Group::K(64)));
    QuantizeOptions { method, group, calibration, smoothing: Some(smoothing), ..Default::default() }
}

fn quantize(folder: &Path, options: &QuantizeOptions, out: &str) -> Checkpoint {
    let source = open(folder.join("model"), OpenOptions::default()).unwrap();
    Plan::new(source.as_ref(), options).unwrap().run(&folder.join(out), false, &()).unwrap();
    Checkpoint::open(folder.join(out)).unwrap()
}

/// The values of a tensor of the original.
fn original(kv: usize, tensor: &str) -> Vec<f32> {
    bf16_values(tensors(kv).iter().find(|found| found.0 == tensor).unwrap())
}

fn kept(checkpoint: &Checkpoint, tensor: &str) -> Vec<f32> {
    let bytes = checkpoint.tensor(tensor).unwrap().bytes;
    bytes.as_chunks().0.iter().map(|&bytes| half::bf16::from_le_bytes(bytes).to_f32()).collect()
}

/// The folded vectors by their first module.
fn folded(folder: &Path, out: &str, module: &str) -> Vec<f32> {
    let bytes = fs::read(folder.join(out).join(FOLDED)).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let data = file.tensor(&name(module)).unwrap().data().to_vec();
    data.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()
}

/// What a module's weights must be packed to, with its columns multiplied and its rows divided.
fn expected(kv: usize, module: &str, columns: &[f32], rows: Option<&[f32]>) -> PackedWeights {
    let weights = original(kv, &format!("{}.weight", name(module)));
    let k = columns.len();
    let n = weights.len() / k;
    let mut weights = smooth_weights(&weights, n, k, columns).unwrap();
    for (row, divisor) in weights.chunks_exact_mut(k).zip(rows.into_iter().flatten()) {
        row.iter_mut().for_each(|weight| *weight /= divisor);
    }
    let options =
        liquidgemm::QuantizeOptions { method: Rounding::Rtn, group: Group::K(64), second_moments: None };
    PackedWeights::quantize_with(&weights, n, k, &options).unwrap()
}

#[test]
fn vectors_are_folded_into_norms_and_the_layers_before_and_the_product_stays_the_same() {
    for model_type in ["llama", "mistral", "qwen2"] {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        write(folder, model_type, 3);
        let checkpoint = quantize(folder, &options(folder, Smoothing::Alpha(0.5)), "out");
        assert!(checkpoint.modules().all(|module| !module.has_smoothing));

        // Norms: the weight times the vector is the old weight, though it was rounded to bf16.
        let sites: [(&str, &[&str]); 2] = [
            ("input_layernorm", &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
            ("post_attention_layernorm", &["mlp.gate_proj", "mlp.up_proj"]),
        ];
        for (norm, readers) in sites {
            let tensor = format!("{}.weight", name(norm));
            let (before, after, vector) =
                (original(192, &tensor), kept(&checkpoint, &tensor), folded(folder, "out", readers[0]));
            let stacked: Vec<f32> = readers
                .iter()
                .flat_map(|module| original(192, &format!("{}.weight", name(module))))
                .collect();
            let seed = MODULES.iter().find(|module| module.0 == readers[0]).unwrap().3;
            let largest = statistics(HIDDEN, seed).largest;
            let wanted = smoothing_vector(&largest, &stacked, stacked.len() / HIDDEN, HIDDEN, 0.5).unwrap();
            for j in 0..HIDDEN {
                assert!((after[j] * vector[j] - before[j]).abs() <= 3e-7 * before[j].abs(), "{norm} {j}");
                assert!(before[j] == 0.0 || (vector[j] / wanted[j] - 1.0).abs() < 0.005, "{norm} {j}");
            }
        }
        // Linear layers: rows are divided by the vector of the layer behind.
        let [q, gate, o, down] = ["self_attn.q_proj", "mlp.gate_proj", "self_attn.o_proj", "mlp.down_proj"]
            .map(|module| folded(folder, "out", module));
        for (module, columns, rows) in [
            ("self_attn.q_proj", &q, None),
            ("self_attn.k_proj", &q, None),
            ("self_attn.v_proj", &q, Some(&o[..])),
            ("self_attn.o_proj", &o, None),
            ("mlp.gate_proj", &gate, None),
            ("mlp.up_proj", &gate, Some(&down[..])),
            ("mlp.down_proj", &down, None),
        ] {
            let found = checkpoint.packed(&name(module)).unwrap();
            assert!(found == expected(192, module, columns, rows), "{module}");
        }
        for (module, vector) in [("self_attn.v_proj", &o), ("mlp.up_proj", &down)] {
            let tensor = format!("{}.bias", name(module));
            let (before, after) = (original(192, &tensor), kept(&checkpoint, &tensor));
            for j in 0..vector.len() {
                assert!((after[j] * vector[j] - before[j]).abs() <= before[j].abs() / 256.0, "{module} {j}");
            }
        }

        // The comparison with the original knows all that.
        let original = Model::open(folder.join("model")).unwrap();
        let verified = verify(&checkpoint, Some(&original), &()).unwrap();
        assert_eq!(verified.problems, Vec::<String>::new());
        for (module, difference) in verified.modules {
            let relative = difference.unwrap().relative;
            assert!((0.01..0.2).contains(&relative), "{module}: {relative}");
        }
        // A norm that was not divided is found.
        fs::remove_file(folder.join("out").join(FOLDED)).unwrap();
        let checkpoint = Checkpoint::open(folder.join("out")).unwrap();
        assert_eq!(verify(&checkpoint, None, &()).unwrap().problems, Vec::<String>::new());
        let problems = verify(&checkpoint, Some(&original), &()).unwrap().problems;
        assert!(problems.len() == 11 && problems[0].contains(FOLDED), "{problems:?}");
    }
}

#[test]
fn what_has_no_layer_to_be_folded_into_is_stored() {
    // Values of one head serve three queries; the structure of other families is not known; a reader that is kept needs its inputs.
    for (model_type, kv_heads, exclude, stored) in [
        ("llama", 1, None, &["self_attn.o_proj"][..]),
        ("other", 3, None, &MODULES.map(|module| module.0)[..]),
        ("llama", 3, Some("*gate_proj"), &["mlp.up_proj"]),
        ("llama", 3, Some("*mlp.up_proj"), &["mlp.gate_proj", "mlp.down_proj"]),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        write(folder, model_type, kv_heads);
        let mut options = options(folder, Smoothing::Alpha(0.5));
        options.patterns.exclude.extend(exclude.map(str::to_owned));
        let checkpoint = quantize(folder, &options, "out");
        let mut found: Vec<String> = checkpoint
            .modules()
            .filter(|module| module.has_smoothing)
            .map(|module| module.name.to_owned())
            .collect();
        let mut stored: Vec<String> = stored.iter().map(|module| name(module)).collect();
        found.sort();
        stored.sort();
        assert_eq!(found, stored, "{model_type} {kv_heads} {exclude:?}");
        let original = Model::open(folder.join("model")).unwrap();
        let verified = verify(&checkpoint, Some(&original), &()).unwrap();
        assert_eq!(verified.problems, Vec::<String>::new());
        assert!(verified.modules.iter().all(|module| module.1.unwrap().relative < 0.2));
    }
}

#[test]
fn auto_takes_the_exponent_with_the_smallest_expected_error() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    write(folder, "other", 1);
    let checkpoint = quantize(folder, &options(folder, Smoothing::Auto), "out");
    for (module, _, k, seed) in MODULES {
        let weights = original(KV, &format!("{}.weight", name(module)));
        let (vector, alpha) =
            smoothing_auto(&statistics(k, seed), &weights, weights.len() / k, k, Group::K(64)).unwrap();
        assert!(alpha.is_some(), "{module}");
        assert_eq!(checkpoint.smoothing(&name(module)).unwrap().unwrap(), vector, "{module}");
    }
}

#[test]
fn a_run_that_was_killed_continues_with_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    write(folder, "llama", 1);
    let options = options(folder, Smoothing::Auto);
    quantize(folder, &options, "out");
    quantize(folder, &options, "again");
    assert!(contents(&folder.join("out")) == contents(&folder.join("again")));
}

#[test]
fn a_list_of_folded_vectors_that_is_not_valid_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    write(folder, "llama", 1);
    quantize(folder, &options(folder, Smoothing::Alpha(0.5)), "out");
    let path = folder.join("out").join("config.json");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replace("\"into\"", "\"onto\"")).unwrap();
    let error = Checkpoint::open(folder.join("out")).unwrap_err();
    assert!(matches!(error, CheckpointError::Input { .. }), "{error}");
    fs::write(&path, text).unwrap();
    // Vectors of another length.
    let short = [f32_tensor(&name("self_attn.q_proj"), &[5], &[1.0; 5])];
    fs::write(folder.join("out").join(FOLDED), safetensors_bytes(&short)).unwrap();
    let checkpoint = Checkpoint::open(folder.join("out")).unwrap();
    let original = Model::open(folder.join("model")).unwrap();
    assert!(!verify(&checkpoint, Some(&original), &()).unwrap().problems.is_empty());
}
