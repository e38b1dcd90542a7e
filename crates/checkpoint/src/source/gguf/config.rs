//! `config.json` and `generation_config.json`, derived from the metadata of a GGUF file.

use serde_json::{Map, Value as Json, json};

use super::container::{Container, Value};
use super::names::Family;
use crate::error::Problem;

/// The dimensions of attention.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Heads {
    /// Elements of a head.
    pub(crate) size: usize,
    /// Query heads.
    pub(crate) queries: usize,
    /// Key and value heads.
    pub(crate) keys: usize,
}

/// Reads numbers from the metadata.
pub(crate) struct Reader<'a> {
    pub(crate) container: &'a Container,
    pub(crate) family: Family,
}

impl Reader<'_> {
    fn get(&self, key: &str) -> Option<&Value> {
        self.container.metadata.get(&format!("{}.{key}", self.family.prefix()))
    }

    fn optional(&self, key: &str) -> Result<Option<u64>, Problem> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_u64() {
            // JSON's readers take numbers of this size exactly, and no model has larger ones.
            Some(number) if number <= 1 << 40 => Ok(Some(number)),
            _ => Err(Problem::Gguf {
                reason: format!("metadata {}.{key} is not one number in range", self.family.prefix()),
            }),
        }
    }

    fn required(&self, key: &str) -> Result<u64, Problem> {
        self.optional(key)?.ok_or_else(|| Problem::Gguf {
            reason: format!("metadata {}.{key} is missing", self.family.prefix()),
        })
    }

    fn float(&self, key: &str) -> Option<Json> {
        match self.get(key)? {
            Value::F32(value) => Some(shortest(*value)),
            Value::F64(value) => Some(json!(value)),
            _ => None,
        }
    }

    pub(crate) fn heads(&self) -> Result<Heads, Problem> {
        let queries = self.required("attention.head_count")?;
        let keys = self.optional("attention.head_count_kv")?.unwrap_or(queries);
        let hidden = self.required("embedding_length")?;
        let bad = |reason: String| Problem::Gguf { reason };
        if queries == 0 || keys == 0 || !queries.is_multiple_of(keys) {
            return Err(bad(format!("{queries} query heads and {keys} key heads")));
        }
        let size = match self.optional("attention.key_length")? {
            Some(size) => size,
            None if hidden.is_multiple_of(queries) => hidden / queries,
            None => return Err(bad(format!("{queries} heads do not divide {hidden}"))),
        };
        if size == 0 || !size.is_multiple_of(2) {
            return Err(bad(format!("heads of {size} elements")));
        }
        Ok(Heads { size: size as usize, queries: queries as usize, keys: keys as usize })
    }

    /// Makes `config.json`. `largest_rope_factor` is the largest of the factors in `rope_freqs.weight`.
    pub(crate) fn config(
        &self,
        largest_rope_factor: Option<f32>,
        torch_dtype: &str,
    ) -> Result<Map<String, Json>, Problem> {
        let Heads { size, queries, keys } = self.heads()?;
        let has = |name: &str| self.container.tensors.iter().any(|tensor| tensor.name == name);
        let (class, model_type) = match self.family {
            Family::Llama => ("LlamaForCausalLM", "llama"),
            Family::Mixtral => ("MixtralForCausalLM", "mixtral"),
            Family::Qwen2 => ("Qwen2ForCausalLM", "qwen2"),
            Family::Qwen3 => ("Qwen3ForCausalLM", "qwen3"),
            Family::Qwen2Moe => ("Qwen2MoeForCausalLM", "qwen2_moe"),
            Family::Qwen3Moe => ("Qwen3MoeForCausalLM", "qwen3_moe"),
        };
        let embedding = self.container.tensors.iter().find(|tensor| tensor.name == "token_embd.weight");
        let vocabulary = embedding.map(|tensor| tensor.shape[0] as u64);
        let vocabulary = vocabulary
            .ok_or_else(|| Problem::Gguf { reason: "there is no tensor \"token_embd.weight\"".into() })?;
        let mut config = Map::new();
        let mut set = |key: &str, value: Json| {
            config.insert(key.to_owned(), value);
        };
        set("architectures", json!([class]));
        set("model_type", json!(model_type));
        set("hidden_act", json!("silu"));
        set("hidden_size", json!(self.required("embedding_length")?));
        set("num_hidden_layers", json!(self.required("block_count")?));
        set("num_attention_heads", json!(queries));
        set("num_key_value_heads", json!(keys));
        set("head_dim", json!(size));
        set("max_position_embeddings", json!(self.required("context_length")?));
        set("vocab_size", json!(vocabulary));
        set("rms_norm_eps", self.float("attention.layer_norm_rms_epsilon").unwrap_or(json!(1e-5)));
        set("rope_theta", self.float("rope.freq_base").unwrap_or(json!(10000.0)));
        set("tie_word_embeddings", json!(!has("output.weight")));
        set("torch_dtype", json!(torch_dtype));
        if let Some(size) = self.optional("feed_forward_length")? {
            set("intermediate_size", json!(size));
        }
        match self.family {
            Family::Llama => {
                set("attention_bias", json!(has("blk.0.attn_q.bias")));
                set("mlp_bias", json!(has("blk.0.ffn_up.bias")));
            }
            Family::Qwen3 | Family::Qwen3Moe => set("attention_bias", json!(has("blk.0.attn_q.bias"))),
            Family::Mixtral | Family::Qwen2 | Family::Qwen2Moe => {}
        }
        if let Some(experts) = self.optional("expert_count")?.filter(|&experts| experts > 0) {
            let key = if self.family == Family::Mixtral { "num_local_experts" } else { "num_experts" };
            set(key, json!(experts));
            set("num_experts_per_tok", json!(self.required("expert_used_count")?));
            if let Some(size) = self.optional("expert_feed_forward_length")? {
                set("moe_intermediate_size", json!(size));
            }
            if let Some(size) = self.optional("expert_shared_feed_forward_length")? {
                set("shared_expert_intermediate_size", json!(size));
            }
            if self.family == Family::Qwen3Moe {
                set("norm_topk_prob", json!(true));
            }
        }
        if let Some(scaling) = self.rope_scaling(largest_rope_factor)? {
            set("rope_scaling", scaling);
        }
        for (key, from) in [("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")] {
            if let Some(id) = self.token_id(from) {
                set(key, json!(id));
            }
        }
        Ok(config)
    }

    /// The scaling of rotary embeddings. `rope_freqs.weight` holds the factors of LLaMA 3.1's rule: the largest is
    /// the rule's factor, and its other three constants are the same in all of these models.
    fn rope_scaling(&self, largest_factor: Option<f32>) -> Result<Option<Json>, Problem> {
        if let Some(factor) = largest_factor {
            return Ok(Some(json!({
                "rope_type": "llama3", "factor": shortest(factor), "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            })));
        }
        let kind = self.get("rope.scaling.type").and_then(Value::as_text).unwrap_or("none");
        if kind == "none" {
            return Ok(None);
        }
        let mut scaling = Map::new();
        scaling.insert("rope_type".into(), json!(kind));
        if let Some(factor) = self.float("rope.scaling.factor") {
            scaling.insert("factor".into(), factor);
        }
        if let Some(length) = self.optional("rope.scaling.original_context_length")? {
            scaling.insert("original_max_position_embeddings".into(), json!(length));
        }
        Ok(Some(Json::Object(scaling)))
    }

    /// Returns the number of a special token, such as `bos`.
    pub(crate) fn token_id(&self, name: &str) -> Option<u64> {
        self.container.metadata.get(&format!("tokenizer.ggml.{name}_token_id"))?.as_u64()
    }
}

/// The number in as few decimals as tell it from other f32 numbers: 1e-5, not 0.000009999999747378752.
fn shortest(value: f32) -> Json {
    json!(value.to_string().parse::<f64>().unwrap_or(f64::from(value)))
}
