//! Tests of GGUF files: names, permuted rows, blocks, derived files, and damaged containers.

mod common;

use std::fs;
use std::path::Path;

use common::numbers;
use half::f16;
use liquidgemm_checkpoint::{
    Checkpoint, CheckpointError, DequantizedType, Fate, OpenOptions, Plan, Problem, QuantizeOptions, Source,
    open,
};
use safetensors::Dtype;

/// Writes GGUF files.
#[derive(Clone, Default)]
struct Gguf {
    metadata: Vec<(String, u32, Vec<u8>)>,
    /// Name, sides with columns first, type, data.
    tensors: Vec<(String, Vec<u64>, u32, Vec<u8>)>,
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

impl Gguf {
    fn number(mut self, key: &str, value: u32) -> Self {
        self.metadata.push((key.to_owned(), 4, value.to_le_bytes().to_vec()));
        self
    }

    fn text(mut self, key: &str, value: &str) -> Self {
        self.metadata.push((key.to_owned(), 8, text(value)));
        self
    }

    fn texts(mut self, key: &str, values: &[&str]) -> Self {
        let mut bytes = 8u32.to_le_bytes().to_vec();
        bytes.extend((values.len() as u64).to_le_bytes());
        values.iter().for_each(|value| bytes.extend(text(value)));
        self.metadata.push((key.to_owned(), 9, bytes));
        self
    }

    fn tensor(mut self, name: &str, shape: &[u64], kind: u32, data: Vec<u8>) -> Self {
        self.tensors.push((name.to_owned(), shape.iter().rev().copied().collect(), kind, data));
        self
    }

    fn f32(self, name: &str, shape: &[u64], values: &[f32]) -> Self {
        let data = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.tensor(name, shape, 0, data)
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(3u32.to_le_bytes());
        bytes.extend((self.tensors.len() as u64).to_le_bytes());
        bytes.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, kind, value) in &self.metadata {
            bytes.extend(text(key));
            bytes.extend(kind.to_le_bytes());
            bytes.extend(value);
        }
        let mut offset = 0u64;
        for (name, sides, kind, data) in &self.tensors {
            bytes.extend(text(name));
            bytes.extend((sides.len() as u32).to_le_bytes());
            sides.iter().for_each(|side| bytes.extend(side.to_le_bytes()));
            bytes.extend(kind.to_le_bytes());
            bytes.extend(offset.to_le_bytes());
            offset += (data.len() as u64).next_multiple_of(32);
        }
        for (.., data) in &self.tensors {
            bytes.resize(bytes.len().next_multiple_of(32), 0);
            bytes.extend(data);
        }
        bytes.resize(bytes.len().next_multiple_of(32), 0);
        bytes
    }
}

/// Q8_0 blocks, and the values that they stand for.
fn q8_0(count: usize, seed: u32) -> (Vec<u8>, Vec<f32>) {
    let (mut bytes, mut values) = (Vec::new(), Vec::new());
    for (block, numbers) in numbers(count, seed).chunks(32).enumerate() {
        let scale = f16::from_f32(0.001 * (block % 7 + 1) as f32);
        bytes.extend(scale.to_le_bytes());
        for number in numbers {
            let code = (number * 800.0).round() as i8;
            bytes.push(code as u8);
            values.push(f32::from(code) * scale.to_f32());
        }
    }
    (bytes, values)
}

const HIDDEN: usize = 128;
const HEADS: usize = 4;
const KEYS: usize = 2;
const HEAD: usize = HIDDEN / HEADS;

/// llama.cpp's order of the rows of query and key weights, as its converter makes it.
fn interleaved(rows: &[f32], heads: usize, columns: usize) -> Vec<f32> {
    let mut stored = Vec::new();
    for head in 0..heads {
        for pair in 0..HEAD / 2 {
            for half in 0..2 {
                let row = head * HEAD + half * (HEAD / 2) + pair;
                stored.extend(&rows[row * columns..][..columns]);
            }
        }
    }
    stored
}

fn metadata(architecture: &str) -> Gguf {
    let key = |name: &str| format!("{architecture}.{name}");
    Gguf::default()
        .text("general.architecture", architecture)
        .number(&key("embedding_length"), HIDDEN as u32)
        .number(&key("block_count"), 1)
        .number(&key("attention.head_count"), HEADS as u32)
        .number(&key("attention.head_count_kv"), KEYS as u32)
        .number(&key("context_length"), 64)
        .number(&key("feed_forward_length"), 256)
}

/// The weights in the order of Hugging Face.
struct Weights {
    query: Vec<f32>,
    key: Vec<f32>,
    query_bias: Vec<f32>,
    up: Vec<f32>,
    embedding: Vec<f32>,
}

fn llama(architecture: &str, is_interleaved: bool) -> (Gguf, Weights) {
    let (up_bytes, up) = q8_0(256 * HIDDEN, 4);
    let (embedding_bytes, embedding) = q8_0(64 * HIDDEN, 5);
    let query = numbers(HIDDEN * HIDDEN, 1);
    let key = numbers(KEYS * HEAD * HIDDEN, 2);
    let query_bias = numbers(HIDDEN, 3);
    let order = |rows: &[f32], heads, columns| {
        if is_interleaved { interleaved(rows, heads, columns) } else { rows.to_vec() }
    };
    let file = metadata(architecture)
        .f32("blk.0.attn_q.weight", &[HIDDEN as u64; 2], &order(&query, HEADS, HIDDEN))
        .f32("blk.0.attn_k.weight", &[(KEYS * HEAD) as u64, HIDDEN as u64], &order(&key, KEYS, HIDDEN))
        .f32("blk.0.attn_q.bias", &[HIDDEN as u64], &order(&query_bias, HEADS, 1))
        .tensor("blk.0.ffn_up.weight", &[256, HIDDEN as u64], 8, up_bytes)
        .tensor("token_embd.weight", &[64, HIDDEN as u64], 8, embedding_bytes)
        .f32("output_norm.weight", &[HIDDEN as u64], &[1.0; HIDDEN]);
    (file, Weights { query, key, query_bias, up, embedding })
}

fn write(folder: &Path, file: &Gguf) -> std::path::PathBuf {
    let path = folder.join("model.gguf");
    fs::write(&path, file.bytes()).unwrap();
    path
}

fn read(source: &dyn Source, name: &str) -> Vec<f32> {
    let tensor = source.tensors().iter().position(|tensor| tensor.name == name).unwrap();
    let info = &source.tensors()[tensor];
    let mut values = vec![f32::NAN; info.rows() * info.columns()];
    // In pieces that cut heads, as a block of channels may.
    for start in (0..info.rows()).step_by(24) {
        let rows = start..info.rows().min(start + 24);
        let part = rows.start * info.columns()..rows.end * info.columns();
        source.read_rows(tensor, rows, &mut values[part]).unwrap();
    }
    values
}

#[test]
fn tensors_have_the_names_and_the_order_of_hugging_face() {
    for (architecture, is_interleaved, class) in
        [("llama", true, "LlamaForCausalLM"), ("qwen2", false, "Qwen2ForCausalLM")]
    {
        let folder = tempfile::tempdir().unwrap();
        let (file, weights) = llama(architecture, is_interleaved);
        let source = open(write(folder.path(), &file), OpenOptions::default()).unwrap();
        assert_eq!(read(source.as_ref(), "model.layers.0.self_attn.q_proj.weight"), weights.query);
        assert_eq!(read(source.as_ref(), "model.layers.0.self_attn.k_proj.weight"), weights.key);
        assert_eq!(read(source.as_ref(), "model.layers.0.self_attn.q_proj.bias"), weights.query_bias);
        assert_eq!(read(source.as_ref(), "model.layers.0.mlp.up_proj.weight"), weights.up);
        assert_eq!(read(source.as_ref(), "model.embed_tokens.weight"), weights.embedding);
        let config = source.config();
        for (key, value) in [
            ("hidden_size", HIDDEN),
            ("num_attention_heads", HEADS),
            ("num_key_value_heads", KEYS),
            ("head_dim", HEAD),
            ("vocab_size", 64),
            ("intermediate_size", 256),
            ("num_hidden_layers", 1),
        ] {
            assert_eq!(config[key], value, "{key}");
        }
        assert_eq!(config["architectures"][0], class);
        assert_eq!(config["tie_word_embeddings"], true);
    }
}

#[test]
fn the_output_is_a_hugging_face_folder_with_kept_blocks_dequantized() {
    for (dequantized, dtype) in [
        (DequantizedType::F16, Dtype::F16),
        (DequantizedType::Bf16, Dtype::BF16),
        (DequantizedType::F32, Dtype::F32),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let (file, weights) = llama("llama", true);
        let source = open(write(folder.path(), &file), OpenOptions { dequantized }).unwrap();
        let plan = Plan::new(source.as_ref(), &QuantizeOptions::default()).unwrap();
        let packed = plan.layers().iter().filter(|layer| matches!(layer.fate, Fate::Packed { .. })).count();
        assert_eq!(packed, 3);
        plan.run(&folder.path().join("out"), false, &()).unwrap();
        let checkpoint = Checkpoint::open(folder.path().join("out")).unwrap();
        let embedding = checkpoint.tensor("model.embed_tokens.weight").unwrap();
        assert_eq!((embedding.dtype, &embedding.shape[..]), (dtype, &[64, HIDDEN][..]));
        let bytes: Vec<u8> = match dtype {
            Dtype::F16 => weights.embedding.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect(),
            Dtype::BF16 => {
                weights.embedding.iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect()
            }
            _ => weights.embedding.iter().flat_map(|x| x.to_le_bytes()).collect(),
        };
        assert!(embedding.bytes == bytes);
        let norm = checkpoint.tensor("model.norm.weight").unwrap();
        assert_eq!(norm.dtype, Dtype::F32);
    }
}

#[test]
fn experts_become_matrices_of_their_own() {
    let folder = tempfile::tempdir().unwrap();
    let experts = numbers(3 * 64 * 128, 7);
    let file = metadata("qwen3moe")
        .number("qwen3moe.expert_count", 3)
        .number("qwen3moe.expert_used_count", 2)
        .f32("token_embd.weight", &[64, 128], &numbers(64 * 128, 1))
        .f32("blk.0.ffn_gate_inp.weight", &[3, 128], &numbers(3 * 128, 2))
        .f32("blk.0.ffn_up_exps.weight", &[3, 64, 128], &experts);
    let source = open(write(folder.path(), &file), OpenOptions::default()).unwrap();
    for expert in 0..3 {
        let name = format!("model.layers.0.mlp.experts.{expert}.up_proj.weight");
        assert_eq!(read(source.as_ref(), &name), &experts[expert * 64 * 128..][..64 * 128]);
    }
    assert_eq!(source.config()["num_experts"], 3);
    let plan = Plan::new(source.as_ref(), &QuantizeOptions::default()).unwrap();
    assert_eq!(plan.layers().iter().filter(|layer| matches!(layer.fate, Fate::Packed { .. })).count(), 3);
}

#[test]
fn a_byte_level_vocabulary_becomes_a_tokenizer_and_others_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let (file, _) = llama("llama", true);
    let file = file.text("tokenizer.ggml.model", "gpt2").text("tokenizer.ggml.pre", "smollm");
    let with = file
        .clone()
        .texts("tokenizer.ggml.tokens", &["a", "b", "ab"])
        .texts("tokenizer.ggml.merges", &["a b"]);
    let with = with.number("tokenizer.ggml.bos_token_id", 1);
    let source = open(write(folder.path(), &with), OpenOptions::default()).unwrap();
    Plan::new(source.as_ref(), &QuantizeOptions::default())
        .unwrap()
        .run(&folder.path().join("out"), false, &())
        .unwrap();
    let read = |name: &str| -> serde_json::Value {
        serde_json::from_slice(&fs::read(folder.path().join("out").join(name)).unwrap()).unwrap()
    };
    let tokenizer = read("tokenizer.json");
    assert_eq!(tokenizer["model"]["vocab"]["ab"], 2);
    assert_eq!(tokenizer["model"]["merges"][0], "a b");
    assert_eq!(read("tokenizer_config.json")["bos_token"], "b");
    assert_eq!(read("generation_config.json")["bos_token_id"], 1);
    // Without the tokens, and with a vocabulary of another kind, the file is left out with a reason.
    let other = llama("llama", true).0.text("tokenizer.ggml.model", "llama");
    for file in [file, other] {
        let source = open(write(folder.path(), &file), OpenOptions::default()).unwrap();
        assert!(source.left_out().iter().any(|(name, reason)| name == "tokenizer" && !reason.is_empty()));
    }
}

fn refused(bytes: &[u8]) -> Problem {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    fs::write(&path, bytes).unwrap();
    match open(&path, OpenOptions::default()) {
        Err(CheckpointError::Input { problem, .. }) => problem,
        other => panic!("{other:?}"),
    }
}

#[test]
fn damaged_and_hostile_containers_are_refused() {
    let good = llama("llama", true).0;
    let bytes = good.bytes();
    // Ends at every place within the header, and within the data.
    for length in (4..1200).step_by(7).chain([bytes.len() - 33]) {
        assert!(matches!(refused(&bytes[..length]), Problem::Gguf { .. }), "{length}");
    }
    let patched = |at: usize, value: u64| {
        let mut bytes = bytes.clone();
        bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        refused(&bytes)
    };
    // The numbers of tensors and of metadata entries.
    for value in [u64::MAX, 1 << 40, 1 << 20] {
        assert!(matches!(patched(8, value), Problem::Gguf { .. }));
        assert!(matches!(patched(16, value), Problem::Gguf { .. }));
    }
    // The length of the first key.
    for value in [u64::MAX, 1 << 62, 1 << 27] {
        assert!(matches!(patched(24, value), Problem::Gguf { .. }));
    }
    let version = |version: u32| refused(&[&b"GGUF"[..], &version.to_le_bytes(), &bytes[8..]].concat());
    assert!(matches!(version(1), Problem::Unsupported { .. }));
    assert!(
        matches!(version(3u32.swap_bytes()), Problem::Unsupported { what, .. } if what.contains("big-endian"))
    );

    let array = |kind: u32, count: u64| {
        let mut file = good.clone();
        file.metadata.push(("x".to_owned(), 9, [&kind.to_le_bytes()[..], &count.to_le_bytes()].concat()));
        refused(&file.bytes())
    };
    for kind in [0, 8, 9, 12] {
        assert!(matches!(array(kind, u64::MAX), Problem::Gguf { .. }));
        assert!(matches!(array(kind, 1 << 23), Problem::Gguf { .. }));
    }
    let shaped = |shape: &[u64], kind: u32| {
        refused(&good.clone().tensor("blk.0.attn_v.weight", shape, kind, vec![0; 64]).bytes())
    };
    for shape in [&[u64::MAX, u64::MAX][..], &[1 << 32, 1 << 32], &[0, 4], &[], &[1; 5], &[1 << 40]] {
        assert!(matches!(shaped(shape, 0), Problem::Gguf { .. }), "{shape:?}");
    }
    assert!(matches!(shaped(&[1, 33], 8), Problem::Gguf { .. }));
    assert!(matches!(shaped(&[1, 256], 10), Problem::Unsupported { .. }));
    assert!(matches!(shaped(&[1, 256], 99), Problem::Unsupported { .. }));
    let twice = good.clone().f32("output_norm.weight", &[1], &[0.0]);
    assert!(matches!(refused(&twice.bytes()), Problem::Gguf { reason } if reason.contains("twice")));
    let unknown = good.clone().f32("blk.0.surprise.weight", &[1], &[0.0]);
    assert!(matches!(refused(&unknown.bytes()), Problem::Gguf { .. }));
    let other = metadata("mamba").f32("token_embd.weight", &[1], &[0.0]);
    assert!(matches!(refused(&other.bytes()), Problem::Unsupported { .. }));

    // Two tensors at the same place.
    let mut bytes = good.bytes();
    let entry = |name: &str| bytes.windows(name.len()).position(|window| window == name.as_bytes()).unwrap();
    let at = entry("blk.0.attn_k.weight") + "blk.0.attn_k.weight".len() + 4 + 16 + 4;
    bytes[at..at + 8].fill(0);
    assert!(matches!(refused(&bytes), Problem::Gguf { reason } if reason.contains("overlap")));
}

/// A fuzz target: a damaged GGUF file is an error, or all of its tensors can be read.
///
/// By default it runs for some seconds.
/// `BOLERO_RANDOM_TEST_TIME_MS=600000 BOLERO_RANDOM_ITERATIONS=1000000000` makes it run for ten minutes.
#[test]
fn fuzz_damaged_containers() {
    let (file, _) = llama("llama", true);
    let file = file.text("tokenizer.ggml.model", "gpt2").text("tokenizer.ggml.pre", "qwen2");
    let file =
        file.texts("tokenizer.ggml.tokens", &["a", "b"]).texts("tokenizer.ggml.merges", &["a b"]).bytes();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    bolero::check!().with_type::<Vec<(u16, u8, u8)>>().cloned().for_each(|changes| {
        let mut bytes = file.clone();
        for (position, change, byte) in changes {
            let at = position as usize % bytes.len().clamp(1, 1300);
            match change % 5 {
                0 if at < bytes.len() => bytes[at] = byte,
                1 if at < bytes.len() => bytes[at] ^= 1 << (byte % 8),
                2 => bytes.insert(at, byte),
                3 if at < bytes.len() => drop(bytes.remove(at)),
                _ => bytes.truncate(at.max(bytes.len() - bytes.len().min(byte as usize))),
            }
        }
        fs::write(&path, &bytes).unwrap();
        if let Ok(source) = open(&path, OpenOptions::default()) {
            for (index, tensor) in source.tensors().iter().enumerate() {
                let mut values = vec![0.0; tensor.rows() * tensor.columns()];
                source.read_rows(index, 0..tensor.rows(), &mut values).unwrap();
            }
            Plan::new(source.as_ref(), &QuantizeOptions::default()).map(drop).ok();
        }
    });
}
