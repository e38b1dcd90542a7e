//! LLaMA (Touvron et al., arXiv 2302.13971) and Qwen2 (arXiv 2407.10671): causal language models with RMSNorm,
//! rotary positions, grouped-query attention and a SiLU-gated feed-forward network. Qwen2 adds biases to Q, K and V.

use candle_core::Tensor;

use super::{Collector, Layers, check_tokens, embed};
use crate::Error;
use crate::ops::{Rotation, attention, rms_norm, rotate, silu_times};
use crate::source::{Settings, Source};

/// One block. Numbers are those of linear layers.
#[derive(Debug)]
struct Block {
    attention_norm: Vec<f32>,
    q: usize,
    k: usize,
    v: usize,
    o: usize,
    ffn_norm: Vec<f32>,
    gate: usize,
    up: usize,
    down: usize,
}

/// A causal language model.
#[derive(Debug)]
pub struct Causal {
    heads: usize,
    kv_heads: usize,
    epsilon: f64,
    positions: usize,
    rotation: Rotation,
    /// The angle of each pair of a head's channels from one position to the next, `[d/2]`.
    frequencies: Vec<f64>,
    embedding: Tensor,
    blocks: Vec<Block>,
    norm: Vec<f32>,
    /// `[vocabulary, hidden]`: the embedding itself if the model ties them.
    head: Tensor,
}

/// The names of a block's tensors in one of the two formats.
struct Names {
    block: &'static str,
    attention_norm: &'static str,
    qkvo: [&'static str; 4],
    ffn_norm: &'static str,
    gate_up_down: [&'static str; 3],
    embedding: &'static str,
    norm: &'static str,
    head: &'static str,
}

const HUGGING_FACE: Names = Names {
    block: "model.layers.",
    attention_norm: "input_layernorm",
    qkvo: ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"],
    ffn_norm: "post_attention_layernorm",
    gate_up_down: ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
    embedding: "model.embed_tokens.weight",
    norm: "model.norm.weight",
    head: "lm_head.weight",
};
const GGUF: Names = Names {
    block: "blk.",
    attention_norm: "attn_norm",
    qkvo: ["attn_q", "attn_k", "attn_v", "attn_output"],
    ffn_norm: "ffn_norm",
    gate_up_down: ["ffn_gate", "ffn_up", "ffn_down"],
    embedding: "token_embd.weight",
    norm: "output_norm.weight",
    head: "output.weight",
};

/// The sizes of a model.
struct Sizes {
    hidden: usize,
    intermediate: usize,
    blocks: usize,
    heads: usize,
    kv_heads: usize,
    /// Channels of a head.
    d: usize,
    positions: usize,
    vocabulary: usize,
    epsilon: f64,
    frequencies: Vec<f64>,
}

impl Causal {
    pub(super) fn read(
        source: &Source,
        architecture: &str,
        layers: &mut Collector<'_>,
    ) -> Result<Self, Error> {
        let (sizes, names, rotation) = match source {
            Source::Folder { .. } => (Sizes::of_folder(source)?, HUGGING_FACE, Rotation::Halves),
            // The converter of GGUF files reorders Q and K of this architecture.
            Source::Gguf { .. } if architecture == "llama" => {
                (Sizes::of_gguf(source, architecture)?, GGUF, Rotation::Neighbours)
            }
            Source::Gguf { .. } => (Sizes::of_gguf(source, architecture)?, GGUF, Rotation::Halves),
        };
        sizes.check()?;
        let Sizes { hidden, intermediate, heads, kv_heads, d, vocabulary, .. } = sizes;
        let mut blocks = Vec::new();
        for index in 0..sizes.blocks {
            let name = |part: &str| format!("{}{index}.{part}", names.block);
            let norm = |part: &str| source.vector(&format!("{}.weight", name(part)), hidden);
            let [q_name, k_name, v_name, o_name] = names.qkvo.map(name);
            let [gate_name, up_name, down_name] = names.gate_up_down.map(name);
            let q = layers.read(q_name, [heads * d, hidden])?;
            let k = layers.read_beside(q, k_name, [kv_heads * d, hidden])?;
            let v = layers.read_beside(q, v_name, [kv_heads * d, hidden])?;
            let o = layers.read(o_name, [hidden, heads * d])?;
            let gate = layers.read(gate_name, [intermediate, hidden])?;
            let up = layers.read_beside(gate, up_name, [intermediate, hidden])?;
            let down = layers.read(down_name, [hidden, intermediate])?;
            let (attention_norm, ffn_norm) = (norm(names.attention_norm)?, norm(names.ffn_norm)?);
            blocks.push(Block { attention_norm, q, k, v, o, ffn_norm, gate, up, down });
        }
        let embedding = source.tensor(names.embedding, &[vocabulary, hidden])?;
        let head = if source.has(names.head) {
            source.tensor(names.head, &[vocabulary, hidden])?
        } else {
            embedding.clone()
        };
        Ok(Self {
            heads,
            kv_heads,
            epsilon: sizes.epsilon,
            positions: sizes.positions,
            rotation,
            frequencies: sizes.frequencies,
            embedding,
            blocks,
            norm: source.vector(names.norm, hidden)?,
            head,
        })
    }

    /// Returns the most tokens of a window.
    pub fn positions(&self) -> usize {
        self.positions
    }

    /// Returns the normalized last states of a window of tokens, `[tokens, hidden]`.
    ///
    /// # Errors
    /// For no tokens, too many tokens, and a token outside the vocabulary; and whatever `layers` returns.
    pub fn hidden(&self, tokens: &[u32], layers: &dyn Layers) -> Result<Tensor, Error> {
        check_tokens(tokens, self.positions)?;
        let turn = |x: &Tensor| rotate(x, &self.frequencies, self.rotation);
        let mut x = embed(&self.embedding, tokens)?;
        for block in &self.blocks {
            let normed = rms_norm(&x, &block.attention_norm, self.epsilon)?;
            let q = turn(&layers.apply(block.q, &normed)?)?;
            let k = turn(&layers.apply(block.k, &normed)?)?;
            let v = layers.apply(block.v, &normed)?;
            let attended = attention([&q, &k, &v], [self.heads, self.kv_heads], true)?;
            x = (x + layers.apply(block.o, &attended)?)?;

            let normed = rms_norm(&x, &block.ffn_norm, self.epsilon)?;
            let gate = layers.apply(block.gate, &normed)?;
            let up = layers.apply(block.up, &normed)?;
            x = (x + layers.apply(block.down, &silu_times(&gate, &up)?)?)?;
        }
        rms_norm(&x, &self.norm, self.epsilon)
    }

    /// Returns the logits of the next token, `[tokens, vocabulary]`, for the states of [`hidden`](Self::hidden).
    ///
    /// # Errors
    /// If memory runs out.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor, Error> {
        Ok(hidden.matmul(&self.head.t()?)?)
    }
}

impl Sizes {
    fn of_folder(source: &Source) -> Result<Self, Error> {
        let Source::Folder { config, .. } = source else { unreachable!("called for folders") };
        if let Some(value) = config["hidden_act"].as_str().filter(|&value| value != "silu") {
            let (value, supported) = (value.to_owned(), "silu");
            return Err(Error::UnsupportedSetting { setting: "hidden_act", value, supported });
        }
        if config["use_sliding_window"].as_bool() == Some(true) {
            let (value, supported) = ("true".into(), "false");
            return Err(Error::UnsupportedSetting { setting: "use_sliding_window", value, supported });
        }
        let or_size = |key: &str, default: usize| {
            if config[key].is_null() { Ok(default) } else { source.size(key) }
        };
        let hidden = source.size("hidden_size")?;
        let heads = source.size("num_attention_heads")?;
        let d = or_size("head_dim", hidden / heads)?;
        // Newer configurations keep everything about rotary positions in one object.
        let rope = if config["rope_parameters"].is_object() {
            &config["rope_parameters"]
        } else {
            &config["rope_scaling"]
        };
        let base = config["rope_theta"].as_f64().or_else(|| rope["rope_theta"].as_f64()).unwrap_or(10_000.0);
        let mut frequencies = frequencies(base, d);
        match rope["rope_type"].as_str().or_else(|| rope["type"].as_str()) {
            None | Some("default") => {}
            Some("llama3") => {
                let number = |key: &str| {
                    rope[key]
                        .as_f64()
                        .ok_or_else(|| Error::MissingSetting { key: format!("rope_scaling.{key}") })
                };
                let scaling = Llama3Scaling {
                    factor: number("factor")?,
                    low: number("low_freq_factor")?,
                    high: number("high_freq_factor")?,
                    positions: number("original_max_position_embeddings")?,
                };
                frequencies.iter_mut().for_each(|frequency| *frequency = scaling.apply(*frequency));
            }
            Some(value) => {
                let (value, supported) = (value.to_owned(), "default or llama3");
                return Err(Error::UnsupportedSetting { setting: "rope_scaling", value, supported });
            }
        }
        Ok(Self {
            hidden,
            intermediate: source.size("intermediate_size")?,
            blocks: source.size("num_hidden_layers")?,
            heads,
            kv_heads: or_size("num_key_value_heads", heads)?,
            d,
            positions: source.size("max_position_embeddings")?,
            vocabulary: source.size("vocab_size")?,
            epsilon: source.number("rms_norm_eps").unwrap_or(1e-6),
            frequencies,
        })
    }

    fn of_gguf(source: &Source, architecture: &str) -> Result<Self, Error> {
        let key = |key: &str| format!("{architecture}.{key}");
        let hidden = source.size(&key("embedding_length"))?;
        let heads = source.size(&key("attention.head_count"))?;
        let or_size = |name: &str, default: usize| {
            if source.gguf_value(&key(name)).is_none() { Ok(default) } else { source.size(&key(name)) }
        };
        let d = or_size("attention.key_length", hidden / heads)?;
        let mut frequencies = frequencies(source.number(&key("rope.freq_base")).unwrap_or(10_000.0), d);
        if source.has("rope_freqs.weight") {
            let factors = source.vector("rope_freqs.weight", d / 2)?;
            for (frequency, factor) in frequencies.iter_mut().zip(factors) {
                *frequency /= f64::from(factor);
            }
        }
        if let Ok(value) = source.gguf_text(&key("rope.scaling.type"))
            && value != "none"
        {
            let (value, supported) = (value.to_owned(), "none");
            return Err(Error::UnsupportedSetting { setting: "rope.scaling.type", value, supported });
        }
        Ok(Self {
            hidden,
            intermediate: source.size(&key("feed_forward_length"))?,
            blocks: source.size(&key("block_count"))?,
            heads,
            kv_heads: or_size("attention.head_count_kv", heads)?,
            d,
            positions: source.size(&key("context_length"))?,
            vocabulary: source.gguf_list("tokenizer.ggml.tokens")?.len(),
            epsilon: source.number(&key("attention.layer_norm_rms_epsilon")).unwrap_or(1e-5),
            frequencies,
        })
    }

    fn check(&self) -> Result<(), Error> {
        let unless = |ok: bool, setting: &'static str, value: usize, supported: &'static str| {
            if ok {
                Ok(())
            } else {
                Err(Error::UnsupportedSetting { setting, value: value.to_string(), supported })
            }
        };
        unless(
            self.heads.is_multiple_of(self.kv_heads),
            "number of key-value heads",
            self.kv_heads,
            "a divisor of the number of heads",
        )?;
        unless(self.d > 0 && self.d.is_multiple_of(2), "channels of a head", self.d, "a positive even number")
    }
}

/// Returns `base^(−2i/d)` for each pair `i` of a head's `d` channels.
fn frequencies(base: f64, d: usize) -> Vec<f64> {
    (0..d / 2).map(|i| base.powf(-2.0 * i as f64 / d as f64)).collect()
}

/// How LLaMA 3.1 stretches rotary positions (Grattafiori et al., arXiv 2407.21783, and its reference code):
/// long waves are slowed by a factor, short ones stay, and those between are interpolated.
struct Llama3Scaling {
    factor: f64,
    low: f64,
    high: f64,
    /// The context length before stretching.
    positions: f64,
}

impl Llama3Scaling {
    fn apply(&self, frequency: f64) -> f64 {
        let waves = self.positions * frequency / (2.0 * std::f64::consts::PI);
        let kept = ((waves - self.low) / (self.high - self.low)).clamp(0.0, 1.0);
        frequency * (kept + (1.0 - kept) / self.factor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scaled_positions_keep_short_waves_and_slow_long_ones() {
        let scaling = Llama3Scaling { factor: 8.0, low: 1.0, high: 4.0, positions: 8192.0 };
        assert_eq!(scaling.apply(1.0), 1.0);
        assert_eq!(scaling.apply(1e-4), 1e-4 / 8.0);
        let between = 2.5 * 2.0 * std::f64::consts::PI / 8192.0;
        assert!((scaling.apply(between) / between - (0.5 + 0.5 / 8.0)).abs() < 1e-12);
    }
}
