//! What is known of model families: which layers read and write what, by the tensors' names.

use std::collections::HashMap;

use crate::source::Source;

/// Families whose blocks are made of the tensors below, by `model_type`.
/// All have RMSNorm, `y = x / rms(x) · weight`, in front of the linear layers that read the residual stream.
pub(crate) const FAMILIES: [&str; 3] = ["llama", "mistral", "qwen2"];

/// The embedding, the last norm and the head.
pub(crate) const EMBEDDING: &str = "model.embed_tokens.weight";
pub(crate) const LAST_NORM: &str = "model.norm.weight";
pub(crate) const HEAD: &str = "lm_head.weight";

/// A part of a block: `consumers` read what `producer` writes, and nothing else reads it.
pub(crate) struct Link {
    pub(crate) producer: String,
    pub(crate) is_norm: bool,
    pub(crate) consumers: Vec<String>,
}

/// A model of a known family.
pub(crate) struct Structure<'a> {
    by_name: HashMap<&'a str, usize>,
    blocks: usize,
    heads: Option<u64>,
    kv_heads: Option<u64>,
}

impl<'a> Structure<'a> {
    /// Returns the structure of a model, or its `model_type` if that is of no known family.
    pub(crate) fn of(source: &'a dyn Source) -> Result<Self, &'a str> {
        let config = source.config();
        let model = config.get("model_type").and_then(serde_json::Value::as_str).unwrap_or("");
        if !FAMILIES.contains(&model) {
            return Err(model);
        }
        let by_name: HashMap<&str, usize> = source
            .tensors()
            .iter()
            .enumerate()
            .map(|(index, tensor)| (tensor.name.as_str(), index))
            .collect();
        let blocks = (0..).take_while(|block| by_name.contains_key(norms(*block)[0].as_str())).count();
        let number = |key: &str| config.get(key).and_then(serde_json::Value::as_u64);
        let heads = number("num_attention_heads");
        Ok(Self { by_name, blocks, heads, kv_heads: number("num_key_value_heads").or(heads) })
    }

    /// Returns a tensor's index.
    pub(crate) fn tensor(&self, name: &str) -> Option<usize> {
        self.by_name.get(name).copied()
    }

    pub(crate) fn blocks(&self) -> usize {
        self.blocks
    }

    /// Returns the links of all blocks. Modules and norms are named without `.weight`.
    pub(crate) fn links(&self) -> Vec<Link> {
        let mut links = Vec::new();
        for block in 0..self.blocks {
            let module = |name: &str| format!("model.layers.{block}.{name}");
            let link = |producer: &str, is_norm: bool, consumers: &[&str]| Link {
                producer: module(producer),
                is_norm,
                consumers: consumers.iter().map(|name| module(name)).collect(),
            };
            links.push(link(NORMS[0], true, &READERS[..3]));
            links.push(link(NORMS[1], true, &READERS[3..]));
            links.push(link("mlp.up_proj", false, &["mlp.down_proj"]));
            // With fewer heads of values than of queries, several inputs of the output projection are one value.
            if self.heads.is_some() && self.heads == self.kv_heads {
                links.push(link("self_attn.v_proj", false, &["self_attn.o_proj"]));
            }
        }
        links
    }
}

/// The norms of a block.
const NORMS: [&str; 2] = ["input_layernorm", "post_attention_layernorm"];
/// The linear layers that read the residual stream: three behind the first norm, two behind the second.
pub(crate) const READERS: [&str; 5] =
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"];
/// The linear layers that write it.
pub(crate) const WRITERS: [&str; 2] = ["self_attn.o_proj", "mlp.down_proj"];

/// Returns the names of the weights of a block's norms.
pub(crate) fn norms(block: usize) -> [String; 2] {
    NORMS.map(|norm| format!("model.layers.{block}.{norm}.weight"))
}
