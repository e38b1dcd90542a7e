//! Tests of rotated models: what is quantized and kept, which models are refused, and what calibration becomes.
//! That a rotated model computes the same is tested with the forward pass of `liquidgemm-eval`.

mod common;

use std::fs;
use std::path::Path;
use std::sync::Arc;

use common::{Tensor, bf16_tensor, bf16_values, f32_tensor, numbers, safetensors_bytes, write_json};
use liquidgemm::{Group, HessianBuilder, Inputs, PackedWeights, rotate};
use liquidgemm_checkpoint::{
    Calibration, Checkpoint, CheckpointError, Method, Model, OpenOptions, Plan, QuantizeOptions, Rotated,
    Smoothing, Source, open, verify,
};
use serde_json::{Value, json};

/// A multiple of 64, but no power of two.
const HIDDEN: usize = 192;
const INNER: usize = 256;
const TOKENS: usize = 64;
const UP: &str = "model.layers.0.mlp.up_proj";

fn tensors() -> Vec<Tensor> {
    let name = |part: &str| format!("model.layers.0.{part}");
    let mut tensors = vec![bf16_tensor("model.embed_tokens.weight", &[300, HIDDEN], 1)];
    for (part, n, k) in [
        ("self_attn.q_proj.weight", HIDDEN, HIDDEN),
        ("self_attn.k_proj.weight", HIDDEN, HIDDEN),
        ("self_attn.v_proj.weight", HIDDEN, HIDDEN),
        ("self_attn.o_proj.weight", HIDDEN, HIDDEN),
        ("mlp.gate_proj.weight", INNER, HIDDEN),
        ("mlp.up_proj.weight", INNER, HIDDEN),
        ("mlp.down_proj.weight", HIDDEN, INNER),
    ] {
        tensors.push(bf16_tensor(&name(part), &[n, k], tensors.len() as u32 + 1));
    }
    for norm in
        [&name("input_layernorm.weight"), &name("post_attention_layernorm.weight"), "model.norm.weight"]
    {
        let values: Vec<f32> = numbers(HIDDEN, 40).iter().map(|x| 1.0 + 3.0 * x).collect();
        tensors.push(f32_tensor(norm, &[HIDDEN], &values));
    }
    tensors
}

fn write(folder: &Path, tensors: &[Tensor], config: &Value) {
    fs::create_dir_all(folder).unwrap();
    write_json(&folder.join("config.json"), config);
    fs::write(folder.join("model.safetensors"), safetensors_bytes(tensors)).unwrap();
}

fn llama() -> Value {
    json!({"model_type": "llama", "tie_word_embeddings": true})
}

#[test]
fn a_tied_head_becomes_a_tensor_of_its_own_and_verify_rotates_the_original_alike() {
    let folder = tempfile::tempdir().unwrap();
    let (model, out) = (folder.path().join("model"), folder.path().join("out"));
    write(&model, &tensors(), &llama());
    let source = open(&model, OpenOptions::default()).unwrap();
    let rotated = Rotated::new(source.as_ref()).unwrap();
    assert_eq!(rotated.block(), 64);
    Plan::new(&rotated, &QuantizeOptions::default()).unwrap().run(&out, false, &()).unwrap();
    let checkpoint = Checkpoint::open(&out).unwrap();
    assert_eq!(checkpoint.config()["tie_word_embeddings"], json!(false));
    assert_eq!(checkpoint.modules().count(), 7);
    let head = checkpoint.tensor("lm_head.weight").unwrap();
    assert_eq!(head.shape, [300, HIDDEN]);
    assert_ne!(head.bytes, checkpoint.tensor("model.embed_tokens.weight").unwrap().bytes);
    let ones = checkpoint.tensor("model.layers.0.input_layernorm.weight").unwrap().bytes;
    assert!(ones.as_chunks().0.iter().all(|&bytes| f32::from_le_bytes(bytes) == 1.0));
    let verified = verify(&checkpoint, Some(&Model::open(&model).unwrap()), &()).unwrap();
    assert_eq!(verified.problems, Vec::<String>::new());
    assert!(verified.modules.iter().all(|module| (0.01..0.12).contains(&module.1.unwrap().relative)));
    // Rotated without being quantized, it is a model like any other.
    let float = folder.path().join("float");
    let mut keep = QuantizeOptions::default();
    keep.patterns.exclude.push("*".to_owned());
    Plan::new(&rotated, &keep).unwrap().run(&float, false, &()).unwrap();
    let source_of_again = open(&float, OpenOptions::default()).unwrap();
    let again = folder.path().join("again");
    Plan::new(source_of_again.as_ref(), &QuantizeOptions::default())
        .unwrap()
        .run(&again, false, &())
        .unwrap();
    let again = Checkpoint::open(&again).unwrap();
    assert_eq!(again.modules().count(), 7);
    let verified = verify(&again, Some(&Model::open(&float).unwrap()), &()).unwrap();
    assert_eq!(verified.problems, Vec::<String>::new());
    // Rows are the same in blocks of any size.
    for (tensor, info) in rotated.tensors().iter().enumerate().filter(|(_, info)| info.shape.len() == 2) {
        let (rows, columns) = (info.rows(), info.columns());
        let mut all = vec![0.0; rows * columns];
        rotated.read_rows(tensor, 0..rows, &mut all).unwrap();
        let mut part = vec![0.0; 70 * columns];
        rotated.read_rows(tensor, 50..120, &mut part).unwrap();
        assert!(part == all[50 * columns..120 * columns], "{}", info.name);
    }
}

#[test]
fn the_hessian_of_a_calibration_is_rotated_with_the_model() {
    let folder = tempfile::tempdir().unwrap();
    let (model, out, file) =
        (folder.path().join("model"), folder.path().join("out"), folder.path().join("inputs"));
    write(&model, &tensors(), &llama());
    // Inputs with outliers, as the original model's norm writes them.
    let inputs: Vec<f32> = numbers(TOKENS * HIDDEN, 9)
        .iter()
        .enumerate()
        .map(|(i, x)| x * if i % HIDDEN % 50 == 3 { 40.0 } else { 1.0 })
        .collect();
    fs::write(&file, safetensors_bytes(&[f32_tensor(UP, &[TOKENS, HIDDEN], &inputs)])).unwrap();
    let source = open(&model, OpenOptions::default()).unwrap();
    let rotated = Rotated::new(source.as_ref()).unwrap();
    let calibration = Some(Arc::new(Calibration::open(&file).unwrap()));
    let mut options = QuantizeOptions {
        method: Method::Gptq,
        group: Some(Group::K(64)),
        calibration,
        ..Default::default()
    };
    options.patterns.exclude =
        ["q", "k", "v", "o", "gate", "down"].map(|name| format!("*.{name}_proj")).to_vec();
    Plan::new(&rotated, &options).unwrap().run(&out, false, &()).unwrap();

    // The inputs and the weights of the rotated layer, computed here.
    let norm: Vec<f32> = numbers(HIDDEN, 40).iter().map(|x| 1.0 + 3.0 * x).collect();
    let mut turned: Vec<f32> = inputs.iter().enumerate().map(|(i, x)| x / norm[i % HIDDEN]).collect();
    rotate(&mut turned, HIDDEN, 64).unwrap();
    let weight = bf16_values(tensors().iter().find(|tensor| tensor.0 == format!("{UP}.weight")).unwrap());
    let mut weight: Vec<f32> = weight.iter().enumerate().map(|(i, w)| w * norm[i % HIDDEN]).collect();
    rotate(&mut weight, HIDDEN, 64).unwrap();
    let mut builder = HessianBuilder::new(HIDDEN).unwrap();
    builder.add(&turned, TOKENS).unwrap();
    let hessian = builder.finish().unwrap();
    let error =
        |packed: &PackedWeights| packed.output_error(&weight, Inputs::Hessian(&hessian)).unwrap().outputs;
    let expected =
        PackedWeights::quantize_gptq(&weight, INNER, HIDDEN, &hessian, &Default::default()).unwrap();
    let without = PackedWeights::quantize(&weight, INNER, HIDDEN, Group::K(64)).unwrap();
    let found = error(&Checkpoint::open(&out).unwrap().packed(UP).unwrap());
    assert!((found / error(&expected) - 1.0).abs() < 0.02, "{found} {}", error(&expected));
    assert!(found < 0.9 * error(&without), "{found} {}", error(&without));
}

#[test]
fn models_whose_structure_is_not_known_are_refused_with_the_reason() {
    let folder = tempfile::tempdir().unwrap();
    let error = |tensors: &[Tensor], config: &Value| -> String {
        let model = folder.path().join("model");
        write(&model, tensors, config);
        let source = open(&model, OpenOptions::default()).unwrap();
        let error = Rotated::new(source.as_ref()).map(drop).unwrap_err();
        assert!(matches!(error, CheckpointError::Input { .. }), "{error}");
        error.to_string()
    };
    let gemma = error(&tensors(), &json!({"model_type": "gemma"}));
    assert!(gemma.contains("gemma") && gemma.contains("llama, mistral, qwen2"), "{gemma}");
    for missing in 0..tensors().len() {
        let mut tensors = tensors();
        let (name, ..) = tensors.remove(missing);
        // Without its first norm, the block is no block, and what is left of it is in nobody's structure.
        assert!(name.contains("input_layernorm") || error(&tensors, &llama()).contains(&name), "{name}");
    }
    let mut more = tensors();
    more.push(bf16_tensor("model.layers.0.self_attn.extra.weight", &[HIDDEN, HIDDEN], 3));
    assert!(error(&more, &llama()).contains("extra"));
    let mut wide = tensors();
    wide[1] = bf16_tensor(&wide[1].0, &[HIDDEN, 2 * HIDDEN], 3);
    assert!(error(&wide, &llama()).contains("q_proj"));

    let model = folder.path().join("model");
    write(&model, &tensors(), &llama());
    let file = folder.path().join("inputs");
    fs::write(&file, safetensors_bytes(&[f32_tensor(UP, &[1, HIDDEN], &[1.0; HIDDEN])])).unwrap();
    let source = open(&model, OpenOptions::default()).unwrap();
    let rotated = Rotated::new(source.as_ref()).unwrap();
    let calibration = Some(Arc::new(Calibration::open(&file).unwrap()));
    let options = QuantizeOptions { smoothing: Some(Smoothing::Auto), calibration, ..Default::default() };
    assert!(matches!(Plan::new(&rotated, &options), Err(CheckpointError::Options { .. })));
}
