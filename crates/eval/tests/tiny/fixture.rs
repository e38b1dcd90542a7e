//! Tiny models with random weights, as files.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::quantized::gguf_file::Value;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, Normal};
use serde_json::json;

/// Channels of a model.
pub const HIDDEN: usize = 64;
/// Channels inside of the feed-forward network.
pub const INTERMEDIATE: usize = 96;
/// Query heads.
pub const HEADS: usize = 4;
/// Key-value heads of the language models.
pub const KV_HEADS: usize = 2;
/// Blocks.
pub const BLOCKS: usize = 2;
/// Words of the vocabulary.
pub const WORDS: [&str; 12] =
    ["<unk>", "the", "a", "cat", "dog", "sees", "hears", "old", "young", "house", "river", "."];
/// Base of the rotary positions.
pub const ROPE_BASE: f64 = 10_000.0;
/// Epsilon of all norms.
pub const EPSILON: f64 = 1e-5;
/// A text of known words.
pub const TEXT: &str = "the old cat sees a dog . a young dog hears the river . the house sees the cat .";

/// The tensors of a model: shapes and values, by name.
pub type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// Adds random tensors to a model.
struct Random(ChaCha8Rng, Tensors);

impl Random {
    fn add(&mut self, name: &str, shape: &[usize], mean: f32, deviation: f32) {
        let normal = Normal::new(mean, deviation).unwrap();
        let values = (0..shape.iter().product()).map(|_| normal.sample(&mut self.0)).collect();
        self.1.insert(name.to_owned(), (shape.to_vec(), values));
    }

    fn linear(&mut self, name: &str, [n, k]: [usize; 2], bias: bool) {
        self.add(&format!("{name}.weight"), &[n, k], 0.0, 1.0 / (k as f32).sqrt());
        if bias {
            self.add(&format!("{name}.bias"), &[n], 0.0, 0.1);
        }
    }
}

fn random(seed: u64) -> Random {
    Random(ChaCha8Rng::seed_from_u64(seed), Tensors::new())
}

/// Returns the tensors of a BERT.
pub fn bert_tensors() -> Tensors {
    let mut tensors = random(1);
    for (name, rows) in [("word", WORDS.len()), ("position", 40), ("token_type", 2)] {
        tensors.add(&format!("embeddings.{name}_embeddings.weight"), &[rows, HIDDEN], 0.0, 0.5);
    }
    let norm = |tensors: &mut Random, name: &str| {
        tensors.add(&format!("{name}.LayerNorm.weight"), &[HIDDEN], 1.0, 0.2);
        tensors.add(&format!("{name}.LayerNorm.bias"), &[HIDDEN], 0.0, 0.1);
    };
    norm(&mut tensors, "embeddings");
    for block in (0..BLOCKS).map(|index| format!("encoder.layer.{index}")) {
        for part in
            ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"]
        {
            tensors.linear(&format!("{block}.{part}"), [HIDDEN, HIDDEN], true);
        }
        tensors.linear(&format!("{block}.intermediate.dense"), [INTERMEDIATE, HIDDEN], true);
        tensors.linear(&format!("{block}.output.dense"), [HIDDEN, INTERMEDIATE], true);
        norm(&mut tensors, &format!("{block}.attention.output"));
        norm(&mut tensors, &format!("{block}.output"));
    }
    tensors.1
}

/// Returns the tensors of a LLaMA, or of a Qwen2, which has biases and here a head of its own.
pub fn llama_tensors(qwen2: bool) -> Tensors {
    let mut tensors = random(2);
    let kv = HIDDEN / HEADS * KV_HEADS;
    tensors.add("model.embed_tokens.weight", &[WORDS.len(), HIDDEN], 0.0, 0.5);
    for block in (0..BLOCKS).map(|index| format!("model.layers.{index}")) {
        for (part, n) in [("q", HIDDEN), ("k", kv), ("v", kv)] {
            tensors.linear(&format!("{block}.self_attn.{part}_proj"), [n, HIDDEN], qwen2);
        }
        tensors.linear(&format!("{block}.self_attn.o_proj"), [HIDDEN, HIDDEN], false);
        for part in ["gate", "up"] {
            tensors.linear(&format!("{block}.mlp.{part}_proj"), [INTERMEDIATE, HIDDEN], false);
        }
        tensors.linear(&format!("{block}.mlp.down_proj"), [HIDDEN, INTERMEDIATE], false);
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            tensors.add(&format!("{block}.{norm}.weight"), &[HIDDEN], 1.0, 0.2);
        }
    }
    tensors.add("model.norm.weight", &[HIDDEN], 1.0, 0.2);
    if qwen2 {
        tensors.add("lm_head.weight", &[WORDS.len(), HIDDEN], 0.0, 0.5);
    }
    tensors.1
}

/// Returns config.json of the BERT.
pub fn bert_config() -> serde_json::Value {
    json!({
        "model_type": "bert", "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE,
        "num_attention_heads": HEADS, "num_hidden_layers": BLOCKS, "vocab_size": WORDS.len(),
        "max_position_embeddings": 40, "type_vocab_size": 2, "layer_norm_eps": EPSILON, "hidden_act": "gelu",
    })
}

/// Returns config.json of the LLaMA or the Qwen2.
pub fn llama_config(qwen2: bool) -> serde_json::Value {
    json!({
        "model_type": if qwen2 { "qwen2" } else { "llama" }, "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        "num_hidden_layers": BLOCKS, "vocab_size": WORDS.len(), "max_position_embeddings": 40,
        "rms_norm_eps": EPSILON, "rope_theta": ROPE_BASE, "hidden_act": "silu", "rope_scaling": null,
    })
}

/// Returns a tokenizer.json that splits at white space.
pub fn tokenizer() -> serde_json::Value {
    let vocabulary: HashMap<&str, usize> = WORDS.iter().zip(0..).map(|(word, id)| (*word, id)).collect();
    json!({
        "version": "1.0", "truncation": {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
        "padding": null, "added_tokens": [], "normalizer": null, "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    })
}

/// Writes a Hugging Face folder, its tensors in two shards with an index.
pub fn write_folder(folder: &Path, config: &serde_json::Value, tensors: &Tensors) {
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    std::fs::write(folder.join("tokenizer.json"), tokenizer().to_string()).unwrap();
    let named: Vec<(&String, Tensor)> = tensors
        .iter()
        .map(|(name, (shape, values))| (name, Tensor::from_slice(values, &shape[..], &Device::Cpu).unwrap()))
        .collect();
    let mut index = serde_json::Map::new();
    for (number, shard) in named.chunks(named.len().div_ceil(2)).enumerate() {
        let file = format!("model-0000{}-of-00002.safetensors", number + 1);
        index.extend(shard.iter().map(|(name, _)| ((*name).clone(), json!(file))));
        let shard: HashMap<&str, Tensor> =
            shard.iter().map(|(name, tensor)| (name.as_str(), tensor.clone())).collect();
        candle_core::safetensors::save(&shard, folder.join(file)).unwrap();
    }
    let index = json!({"metadata": {}, "weight_map": index});
    std::fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

/// Writes the LLaMA as a GGUF file: with GGUF's names, and the rows of Q and K in its order.
///
/// Its tokenizer is byte-level BPE that knows single lower-case letters, the space, and a few merges.
pub fn write_gguf(file: &Path, tensors: &Tensors) {
    let rename = |name: &str| {
        let mut name = name.to_owned();
        for (from, to) in [
            ("model.embed_tokens", "token_embd"),
            ("model.norm", "output_norm"),
            ("model.layers.", "blk."),
            ("self_attn.q_proj", "attn_q"),
            ("self_attn.k_proj", "attn_k"),
            ("self_attn.v_proj", "attn_v"),
            ("self_attn.o_proj", "attn_output"),
            ("mlp.gate_proj", "ffn_gate"),
            ("mlp.up_proj", "ffn_up"),
            ("mlp.down_proj", "ffn_down"),
            ("input_layernorm", "attn_norm"),
            ("post_attention_layernorm", "ffn_norm"),
        ] {
            name = name.replace(from, to);
        }
        name
    };
    let quantized: Vec<(String, QTensor)> = tensors
        .iter()
        .map(|(name, (shape, values))| {
            let values = if name.contains("q_proj") || name.contains("k_proj") {
                neighbours_from_halves(values, shape[1])
            } else {
                values.clone()
            };
            let tensor = Tensor::from_vec(values, &shape[..], &Device::Cpu).unwrap();
            (rename(name), QTensor::quantize(&tensor, GgmlDType::F32).unwrap())
        })
        .collect();
    let texts =
        |texts: &[&str]| Value::Array(texts.iter().map(|text| Value::String((*text).into())).collect());
    let metadata = [
        ("general.architecture", Value::String("llama".into())),
        ("llama.embedding_length", Value::U32(HIDDEN as u32)),
        ("llama.feed_forward_length", Value::U32(INTERMEDIATE as u32)),
        ("llama.attention.head_count", Value::U32(HEADS as u32)),
        ("llama.attention.head_count_kv", Value::U32(KV_HEADS as u32)),
        ("llama.block_count", Value::U32(BLOCKS as u32)),
        ("llama.context_length", Value::U32(40)),
        ("llama.attention.layer_norm_rms_epsilon", Value::F32(EPSILON as f32)),
        ("llama.rope.freq_base", Value::F32(ROPE_BASE as f32)),
        ("tokenizer.ggml.model", Value::String("gpt2".into())),
        ("tokenizer.ggml.pre", Value::String("smollm".into())),
        ("tokenizer.ggml.tokens", texts(&GGUF_TOKENS)),
        ("tokenizer.ggml.merges", texts(&["a t", "c at", "Ġ cat"])),
        ("tokenizer.ggml.token_type", Value::Array(vec![Value::I32(3); 1])),
    ];
    let metadata: Vec<(&str, &Value)> = metadata.iter().map(|(key, value)| (*key, value)).collect();
    let tensors: Vec<(&str, &QTensor)> =
        quantized.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let mut file = std::fs::File::create(file).unwrap();
    candle_core::quantized::gguf_file::write(&mut file, &metadata, &tensors).unwrap();
}

/// The vocabulary of the GGUF file: as many tokens as the folder has words.
pub const GGUF_TOKENS: [&str; 12] = ["<end>", "a", "c", "t", "s", "Ġ", "1", "2", ".", "at", "cat", "Ġcat"];

/// Reorders the rows of each head: `i` and `i + d/2` become neighbours.
fn neighbours_from_halves(values: &[f32], k: usize) -> Vec<f32> {
    let d = HIDDEN / HEADS;
    let row = |row: usize| &values[row * k..][..k];
    let order = (0..values.len() / k).map(|index| {
        let (head, pair, second) = (index / d, index % d / 2, index % 2);
        head * d + second * (d / 2) + pair
    });
    order.flat_map(|from| row(from).iter().copied()).collect()
}
