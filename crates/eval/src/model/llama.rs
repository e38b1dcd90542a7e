//! LLaMA (Touvron et al., arXiv 2302.13971) and Qwen2 (arXiv 2407.10671): causal language models with RMSNorm,
//! rotary positions, grouped-query attention and a SiLU-gated feed-forward network. Qwen2 adds biases to Q, K and V.

use candle_core::Tensor;

use super::{Collector, Layers, check_tokens, embed};
use crate::Error;
use crate::ops::{attention, rms_norm, rotate, silu_times};
use crate::source::Source;

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
    /// The angle of each pair of a head's channels from one position to the next, `[d/2]`.
    frequencies: Vec<f64>,
    embedding: Tensor,
    blocks: Vec<Block>,
    norm: Vec<f32>,
    /// `[vocabulary, hidden]`: the embedding itself if the model ties them.
    head: Tensor,
}

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
    pub(super) fn read(source: &Source, layers: &mut Collector<'_>) -> Result<Self, Error> {
        let sizes = Sizes::of(source)?;
        sizes.check()?;
        let Sizes { hidden, intermediate, heads, kv_heads, d, vocabulary, .. } = sizes;
        let mut blocks = Vec::new();
        for index in 0..sizes.blocks {
            let name = |part: &str| format!("model.layers.{index}.{part}");
            let norm = |part: &str| source.vector(&format!("{}.weight", name(part)), hidden);
            let q = layers.read(name("self_attn.q_proj"), [heads * d, hidden])?;
            let k = layers.read_beside(q, name("self_attn.k_proj"), [kv_heads * d, hidden])?;
            let v = layers.read_beside(q, name("self_attn.v_proj"), [kv_heads * d, hidden])?;
            let o = layers.read(name("self_attn.o_proj"), [hidden, heads * d])?;
            let gate = layers.read(name("mlp.gate_proj"), [intermediate, hidden])?;
            let up = layers.read_beside(gate, name("mlp.up_proj"), [intermediate, hidden])?;
            let down = layers.read(name("mlp.down_proj"), [hidden, intermediate])?;
            let (attention_norm, ffn_norm) = (norm("input_layernorm")?, norm("post_attention_layernorm")?);
            blocks.push(Block { attention_norm, q, k, v, o, ffn_norm, gate, up, down });
        }
        let embedding = source.tensor("model.embed_tokens.weight", &[vocabulary, hidden])?;
        let head = if source.has("lm_head.weight") {
            source.tensor("lm_head.weight", &[vocabulary, hidden])?
        } else {
            embedding.clone()
        };
        Ok(Self {
            heads,
            kv_heads,
            epsilon: sizes.epsilon,
            positions: sizes.positions,
            frequencies: sizes.frequencies,
            embedding,
            blocks,
            norm: source.vector("model.norm.weight", hidden)?,
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
        let turn = |x: &Tensor| rotate(x, &self.frequencies);
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
    fn of(source: &Source) -> Result<Self, Error> {
        if let Some(value) = source.setting("hidden_act").as_str().filter(|&value| value != "silu") {
            let (value, supported) = (value.to_owned(), "silu");
            return Err(Error::UnsupportedSetting { setting: "hidden_act", value, supported });
        }
        if source.setting("use_sliding_window").as_bool() == Some(true) {
            let (value, supported) = ("true".into(), "false");
            return Err(Error::UnsupportedSetting { setting: "use_sliding_window", value, supported });
        }
        let or_size = |key: &str, default: usize| {
            if source.setting(key).is_null() { Ok(default) } else { source.size(key) }
        };
        let hidden = source.size("hidden_size")?;
        let heads = source.size("num_attention_heads")?;
        let d = or_size("head_dim", hidden / heads)?;
        // Newer configurations keep everything about rotary positions in one object.
        let [parameters, scaling] = ["rope_parameters", "rope_scaling"].map(|key| source.setting(key));
        let rope = if parameters.is_object() { parameters } else { scaling };
        let base = source.number("rope_theta").or_else(|| rope["rope_theta"].as_f64()).unwrap_or(10_000.0);
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
