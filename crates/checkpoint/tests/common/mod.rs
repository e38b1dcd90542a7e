//! Small models for the tests: written to temporary folders, and read back as bytes.
#![allow(dead_code)] // Each test file uses a part.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

use half::{bf16, f16};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

/// A tensor: name, type, shape, bytes.
pub type Tensor = (String, Dtype, Vec<usize>, Vec<u8>);

/// Numbers that look like weights, the same for the same seed.
pub fn numbers(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12_345);
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..count).map(|_| (next() + next() + next()) * 0.1).collect()
}

pub fn f32_tensor(name: &str, shape: &[usize], values: &[f32]) -> Tensor {
    let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    (name.to_owned(), Dtype::F32, shape.to_vec(), bytes)
}

/// A bf16 tensor of [`numbers`].
pub fn bf16_tensor(name: &str, shape: &[usize], seed: u32) -> Tensor {
    let values = numbers(shape.iter().product(), seed);
    let bytes = values.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()).collect();
    (name.to_owned(), Dtype::BF16, shape.to_vec(), bytes)
}

/// The f32 values of [`bf16_tensor`].
pub fn bf16_values(tensor: &Tensor) -> Vec<f32> {
    tensor.3.as_chunks().0.iter().map(|&bytes| bf16::from_le_bytes(bytes).to_f32()).collect()
}

/// An f16 tensor. The values must be f16 numbers.
pub fn f16_tensor(name: &str, shape: &[usize], values: &[f32]) -> Tensor {
    let encode = |&value: &f32| {
        let rounded = f16::from_f32(value);
        assert_eq!(rounded.to_f32(), value);
        rounded.to_le_bytes()
    };
    (name.to_owned(), Dtype::F16, shape.to_vec(), values.iter().flat_map(encode).collect())
}

pub fn i32_tensor(name: &str, shape: &[usize], words: &[u32]) -> Tensor {
    let bytes = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    (name.to_owned(), Dtype::I32, shape.to_vec(), bytes)
}

/// The bytes of a safetensors file.
pub fn safetensors_bytes(tensors: &[Tensor]) -> Vec<u8> {
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        (name.as_str(), TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize(views, Some(metadata)).unwrap()
}

pub fn write_json(path: &Path, value: &Value) {
    fs::write(path, value.to_string()).unwrap();
}

/// The tensors of a small LLaMA in two shards, and side files.
pub fn llama() -> [Vec<Tensor>; 2] {
    let layer = |index: usize| {
        let name = |module: &str| format!("model.layers.{index}.{module}");
        let seed = 100 * index as u32;
        vec![
            bf16_tensor(&name("self_attn.q_proj.weight"), &[128, 192], seed + 1),
            bf16_tensor(&name("self_attn.q_proj.bias"), &[128], seed + 2),
            bf16_tensor(&name("mlp.up_proj.weight"), &[200, 192], seed + 3),
            bf16_tensor(&name("mlp.down_proj.weight"), &[192, 256], seed + 4),
            bf16_tensor(&name("mlp.gate.weight"), &[128, 192], seed + 5),
            bf16_tensor(&name("input_layernorm.weight"), &[192], seed + 6),
        ]
    };
    let mut first = layer(0);
    first.push(bf16_tensor("model.embed_tokens.weight", &[300, 192], 7));
    let mut second = layer(1);
    second.push(bf16_tensor("lm_head.weight", &[300, 192], 8));
    [first, second]
}

/// Writes the small LLaMA to a folder.
pub fn write_llama(folder: &Path) {
    fs::create_dir_all(folder).unwrap();
    let config = json!({"model_type": "llama", "hidden_size": 192, "architectures": ["LlamaForCausalLM"]});
    write_json(&folder.join("config.json"), &config);
    let mut map = BTreeMap::new();
    for (index, tensors) in llama().iter().enumerate() {
        let name = format!("model-{:05}-of-00002.safetensors", index + 1);
        fs::write(folder.join(&name), safetensors_bytes(tensors)).unwrap();
        map.extend(tensors.iter().map(|tensor| (tensor.0.clone(), name.clone())));
    }
    write_json(&folder.join("model.safetensors.index.json"), &json!({"metadata": {}, "weight_map": map}));
    fs::write(folder.join("tokenizer.json"), "{\"tokens\": true}").unwrap();
    fs::create_dir(folder.join("1_Pooling")).unwrap();
    fs::write(folder.join("1_Pooling").join("config.json"), "{}").unwrap();
    fs::write(folder.join("pytorch_model.bin"), "pickled").unwrap();
}

/// All files of a folder with their contents.
pub fn contents(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    visit(folder, folder, &mut found);
    found
}

fn visit(root: &Path, folder: &Path, found: &mut BTreeMap<String, Vec<u8>>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        // Do not follow links: they may lead anywhere.
        if fs::symlink_metadata(&path).unwrap().is_dir() {
            visit(root, &path, found);
        } else if !path.is_dir() {
            let name = path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
            found.insert(name, fs::read(&path).unwrap());
        }
    }
}
