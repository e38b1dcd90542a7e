//! Models that `liquidgemm quantize` has transformed compute what the originals compute: rotated ones, and ones whose smoothing vectors are
//! folded into the layers before.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use liquidgemm_checkpoint::{
    Calibration, Checkpoint, OpenOptions, Plan, QuantizeOptions, Rotated, Smoothing, open,
};
use liquidgemm_eval::Model;
use liquidgemm_eval::layers::FloatLayers;
use liquidgemm_eval::model::Network;
use tempfile::tempdir;

use super::fixture::{
    BLOCKS, HEADS, HIDDEN, INTERMEDIATE, TEXT, Tensors, llama_config, llama_tensors, tokenizer,
};

/// Writes a Hugging Face folder with one file of weights.
fn write(folder: &Path, config: &serde_json::Value, tensors: &Tensors) {
    std::fs::create_dir_all(folder).unwrap();
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    std::fs::write(folder.join("tokenizer.json"), tokenizer().to_string()).unwrap();
    let named: HashMap<&str, Tensor> = tensors
        .iter()
        .map(|(name, (shape, values))| {
            (name.as_str(), Tensor::from_slice(values, &shape[..], &Device::Cpu).unwrap())
        })
        .collect();
    candle_core::safetensors::save(&named, folder.join("model.safetensors")).unwrap();
}

fn logits(folder: &Path) -> Vec<f32> {
    let model = Model::open(folder).unwrap();
    let Network::Causal(causal) = &model.network else { panic!("not a language model") };
    let tokens = model.tokens(TEXT).unwrap();
    let hidden = causal.hidden(&tokens, &FloatLayers(&model.layers)).unwrap();
    causal.logits(&hidden).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn check_close(found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len());
    let size = expected.iter().fold(0f32, |most, x| most.max(x.abs()));
    assert!(size > 0.5, "{size}");
    for (found, expected) in found.iter().zip(expected) {
        assert!((found - expected).abs() <= 1e-4, "{found} is not {expected}");
    }
}

#[test]
fn a_rotated_model_that_is_not_quantized_gives_the_same_logits() {
    // The LLaMA ties its head to the embedding; the Qwen2 has a head and biases.
    for qwen2 in [false, true] {
        let folder = tempdir().unwrap();
        let (model, out) = (folder.path().join("model"), folder.path().join("out"));
        let mut tensors = llama_tensors(qwen2);
        for block in 0..BLOCKS {
            // Biases of the layers that write the residual stream, which some LLaMAs have.
            let values = (0..HIDDEN).map(|i| (i as f32 * 0.7).sin() * 0.1).collect();
            tensors.insert(format!("model.layers.{block}.self_attn.o_proj.bias"), (vec![HIDDEN], values));
        }
        write(&model, &llama_config(qwen2), &tensors);
        let source = open(&model, OpenOptions::default()).unwrap();
        let rotated = Rotated::new(source.as_ref()).unwrap();
        let mut options = QuantizeOptions::default();
        options.patterns.exclude.push("*".to_owned());
        Plan::new(&rotated, &options).unwrap().run(&out, false, &()).unwrap();
        let original = logits(&model);
        check_close(&logits(&out), &original);

        // Without the norms' weights in the layers behind, it is another model.
        let mut wrong: HashMap<String, Tensor> =
            candle_core::safetensors::load(out.join("model.safetensors"), &Device::Cpu).unwrap();
        let name = "model.layers.0.input_layernorm.weight";
        let (shape, values) = &tensors[name];
        wrong.insert(name.to_owned(), Tensor::from_slice(values, &shape[..], &Device::Cpu).unwrap());
        candle_core::safetensors::save(&wrong, out.join("model.safetensors")).unwrap();
        let wrong = logits(&out);
        assert!(wrong.iter().zip(&original).any(|(wrong, right)| (wrong - right).abs() > 1e-2));
    }
}

#[test]
fn folded_smoothing_vectors_cancel_in_the_forward_pass() {
    for qwen2 in [false, true] {
        let folder = tempdir().unwrap();
        let (model, out, file) =
            (folder.path().join("model"), folder.path().join("out"), folder.path().join("inputs"));
        let mut tensors = llama_tensors(qwen2);
        let mut config = llama_config(qwen2);
        config["num_key_value_heads"] = HEADS.into();
        let mut inputs: HashMap<String, Tensor> = HashMap::new();
        for block in 0..BLOCKS {
            let module = |name: &str| format!("model.layers.{block}.{name}");
            // As many heads of keys and values as of queries.
            for (from, to) in [("o", "k"), ("q", "v")] {
                let weight = tensors[&module(&format!("self_attn.{from}_proj.weight"))].clone();
                tensors.insert(module(&format!("self_attn.{to}_proj.weight")), weight);
                if qwen2 {
                    let bias = tensors[&module("self_attn.q_proj.bias")].clone();
                    tensors.insert(module(&format!("self_attn.{to}_proj.bias")), bias);
                }
            }
            for name in ["q", "k", "v", "o"] {
                inputs.insert(module(&format!("self_attn.{name}_proj")), uneven(HIDDEN));
            }
            for (name, k) in [("gate", HIDDEN), ("up", HIDDEN), ("down", INTERMEDIATE)] {
                inputs.insert(module(&format!("mlp.{name}_proj")), uneven(k));
            }
        }
        write(&model, &config, &tensors);
        candle_core::safetensors::save(&inputs, &file).unwrap();
        let source = open(&model, OpenOptions::default()).unwrap();
        let calibration = Some(Arc::new(Calibration::open(&file).unwrap()));
        let smoothing = Some(Smoothing::Alpha(0.7));
        let options = QuantizeOptions { calibration, smoothing, ..QuantizeOptions::default() };
        Plan::new(source.as_ref(), &options).unwrap().run(&out, false, &()).unwrap();
        let checkpoint = Checkpoint::open(&out).unwrap();
        assert!(checkpoint.modules().all(|module| !module.has_smoothing));

        // The packed weights in float, once with what was folded, and once with all of it taken out again.
        let vectors =
            candle_core::safetensors::load(out.join("liquidgemm_folded_smoothing"), &Device::Cpu).unwrap();
        let vector = |module: String| vectors[&module].to_vec1::<f32>().unwrap();
        let (mut folded, mut plain) = (tensors.clone(), tensors.clone());
        for name in tensors.keys().filter(|name| name.contains("norm") || name.ends_with("bias")) {
            let values = Tensor::from_raw_buffer(
                &checkpoint.tensor(name).unwrap().bytes,
                DType::F32,
                &tensors[name].0,
                &Device::Cpu,
            );
            folded.get_mut(name).unwrap().1 = values.unwrap().to_vec1().unwrap();
        }
        for block in 0..BLOCKS {
            let module = |name: &str| format!("model.layers.{block}.{name}");
            let columns: BTreeMap<&str, &str> = BTreeMap::from([
                ("self_attn.q_proj", "self_attn.q_proj"),
                ("self_attn.k_proj", "self_attn.q_proj"),
                ("self_attn.v_proj", "self_attn.q_proj"),
                ("self_attn.o_proj", "self_attn.o_proj"),
                ("mlp.gate_proj", "mlp.gate_proj"),
                ("mlp.up_proj", "mlp.gate_proj"),
                ("mlp.down_proj", "mlp.down_proj"),
            ]);
            let rows =
                BTreeMap::from([("self_attn.v_proj", "self_attn.o_proj"), ("mlp.up_proj", "mlp.down_proj")]);
            for (name, site) in columns {
                let weights = checkpoint.packed(&module(name)).unwrap().dequantize();
                let key = module(&format!("{name}.weight"));
                let (columns, k) = (vector(module(site)), tensors[&key].0[1]);
                let rows = rows.get(name).map(|site| vector(module(site)));
                let undone = weights.iter().enumerate().map(|(i, weight)| {
                    weight / columns[i % k] * rows.as_ref().map_or(1.0, |rows| rows[i / k])
                });
                plain.get_mut(&key).unwrap().1 = undone.collect();
                folded.get_mut(&key).unwrap().1 = weights;
            }
        }
        let [with, without] = ["with", "without"].map(|name| folder.path().join(name));
        write(&with, &config, &folded);
        write(&without, &config, &plain);
        check_close(&logits(&with), &logits(&without));
        assert!(
            vectors.values().all(|vector| vector
                .to_vec1::<f32>()
                .unwrap()
                .iter()
                .any(|x| (x - 1.0).abs() > 0.2))
        );
    }
}

/// Captured inputs whose channels differ in size.
fn uneven(k: usize) -> Tensor {
    let values: Vec<f32> = (0..20 * k).map(|i| (i as f32 * 0.61).sin() * (1 + i % k % 7) as f32).collect();
    Tensor::from_vec(values, (20, k), &Device::Cpu).unwrap()
}
