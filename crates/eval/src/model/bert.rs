//! BERT (Devlin et al., arXiv 1810.04805) as an encoder of sentences: the mean of the last states, normalized.

use candle_core::Tensor;

use super::{Collector, Layers, check_tokens, embed};
use crate::Error;
use crate::ops::{attention, layer_norm};
use crate::source::Source;

/// Weights and bias of a LayerNorm.
#[derive(Debug)]
struct Norm {
    weight: Vec<f32>,
    bias: Vec<f32>,
}

/// One block. Numbers are those of linear layers.
#[derive(Debug)]
struct Block {
    query: usize,
    key: usize,
    value: usize,
    attention_output: usize,
    attention_norm: Norm,
    intermediate: usize,
    output: usize,
    output_norm: Norm,
}

/// A sentence encoder of the BERT family.
#[derive(Debug)]
pub struct Encoder {
    heads: usize,
    epsilon: f64,
    words: Tensor,
    positions: Tensor,
    /// The embedding of token type 0, `[1, hidden]`.
    token_type: Tensor,
    embedding_norm: Norm,
    blocks: Vec<Block>,
}

impl Encoder {
    pub(super) fn read(source: &Source, layers: &mut Collector<'_>) -> Result<Self, Error> {
        let only = |setting: &'static str, supported: &'static str| match source.setting(setting).as_str() {
            None => Ok(()),
            Some(value) if value == supported => Ok(()),
            Some(value) => Err(Error::UnsupportedSetting { setting, value: value.into(), supported }),
        };
        only("hidden_act", "gelu")?;
        only("position_embedding_type", "absolute")?;

        let hidden = source.size("hidden_size")?;
        let intermediate = source.size("intermediate_size")?;
        let heads = source.size("num_attention_heads")?;
        if !hidden.is_multiple_of(heads) {
            let value = heads.to_string();
            let supported = "a divisor of hidden_size";
            return Err(Error::UnsupportedSetting { setting: "num_attention_heads", value, supported });
        }
        let prefix = if source.has("embeddings.word_embeddings.weight") { "" } else { "bert." };
        let norm = |name: &str| {
            Ok::<_, Error>(Norm {
                weight: source.vector(&format!("{prefix}{name}.LayerNorm.weight"), hidden)?,
                bias: source.vector(&format!("{prefix}{name}.LayerNorm.bias"), hidden)?,
            })
        };
        let embedding = |name: &str, rows: usize| {
            source.tensor(&format!("{prefix}embeddings.{name}_embeddings.weight"), &[rows, hidden])
        };
        let mut blocks = Vec::new();
        for index in 0..source.size("num_hidden_layers")? {
            let block = format!("encoder.layer.{index}");
            let name = |part: &str| format!("{prefix}{block}.{part}");
            let query = layers.read(name("attention.self.query"), [hidden, hidden])?;
            blocks.push(Block {
                query,
                key: layers.read_beside(query, name("attention.self.key"), [hidden, hidden])?,
                value: layers.read_beside(query, name("attention.self.value"), [hidden, hidden])?,
                attention_output: layers.read(name("attention.output.dense"), [hidden, hidden])?,
                attention_norm: norm(&format!("{block}.attention.output"))?,
                intermediate: layers.read(name("intermediate.dense"), [intermediate, hidden])?,
                output: layers.read(name("output.dense"), [hidden, intermediate])?,
                output_norm: norm(&format!("{block}.output"))?,
            });
        }
        Ok(Self {
            heads,
            epsilon: source.number("layer_norm_eps").unwrap_or(1e-12),
            words: embedding("word", source.size("vocab_size")?)?,
            positions: embedding("position", source.size("max_position_embeddings")?)?,
            token_type: embedding("token_type", source.size("type_vocab_size")?)?.narrow(0, 0, 1)?,
            embedding_norm: norm("embeddings")?,
            blocks,
        })
    }

    /// Returns the most tokens of a sentence.
    pub fn positions(&self) -> usize {
        self.positions.dims()[0]
    }

    /// Returns the vector of one sentence, of length 1.
    ///
    /// # Errors
    /// For no tokens, too many tokens, and a token outside the vocabulary; and whatever `layers` returns.
    pub fn embed(&self, tokens: &[u32], layers: &dyn Layers) -> Result<Vec<f32>, Error> {
        check_tokens(tokens, self.positions())?;
        let normalize = |x: &Tensor, norm: &Norm| layer_norm(x, &norm.weight, &norm.bias, self.epsilon);
        let positions = self.positions.narrow(0, 0, tokens.len())?;
        let x = (embed(&self.words, tokens)? + positions)?.broadcast_add(&self.token_type)?;
        let mut x = normalize(&x, &self.embedding_norm)?;
        for block in &self.blocks {
            let q = layers.apply(block.query, &x)?;
            let k = layers.apply(block.key, &x)?;
            let v = layers.apply(block.value, &x)?;
            let attended = attention([&q, &k, &v], [self.heads, self.heads], false)?;
            let attended = layers.apply(block.attention_output, &attended)?;
            x = normalize(&(attended + &x)?, &block.attention_norm)?;
            let inner = layers.apply(block.intermediate, &x)?.gelu_erf()?;
            let outer = layers.apply(block.output, &inner)?;
            x = normalize(&(outer + &x)?, &block.output_norm)?;
        }
        let mean = x.mean(0)?.to_vec1::<f32>()?;
        let length = mean.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
        if !(length.is_finite() && length > 0.0) {
            return Err(Error::NotFinite { what: "a sentence's vector".into() });
        }
        Ok(mean.iter().map(|&x| (f64::from(x) / length) as f32).collect())
    }
}
