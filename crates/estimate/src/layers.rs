//! The matrices of a decoder block, as they lie on one of several GPUs under tensor parallelism.
//! Q, K and V are stacked, as are gate and up. QKV, gate-up and the output embedding are cut by channels,
//! O and down along K. Small matrices that every GPU needs whole are copied.

use serde::Serialize;

use crate::architecture::{Attention, Model};

/// The matrices of a layer on one GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Layer {
    /// The layer's name.
    pub name: &'static str,
    /// Output channels.
    pub n: u64,
    /// Elements per channel.
    pub k: u64,
    /// The experts, if each of them has such a matrix.
    pub experts: Option<Experts>,
    /// Whether the layer has the number format in question. If not, it stays bf16.
    pub quantized: bool,
}

/// The experts of a grouped layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Experts {
    /// Number of experts.
    pub count: u64,
    /// Experts of each token.
    pub per_token: u64,
}

impl Experts {
    /// Returns the expected number of experts that get rows from `tokens` tokens, each with distinct experts
    /// drawn uniformly: `E · (1 − (1 − k/E)^tokens)`.
    pub fn active(&self, tokens: f64) -> f64 {
        let count = self.count as f64;
        count * (1.0 - (1.0 - self.per_token as f64 / count).powf(tokens))
    }
}

impl Layer {
    /// Returns the number of weights on one GPU.
    pub fn weights(&self) -> u128 {
        u128::from(self.n) * u128::from(self.k) * u128::from(self.matrices())
    }

    /// Returns the number of matrices: one, or one for each expert.
    pub fn matrices(&self) -> u64 {
        self.experts.map_or(1, |experts| experts.count)
    }
}

/// Returns the layers of a dense block or of one with experts, on each of `gpus` GPUs.
pub fn of_block(model: &Model, sparse: bool, gpus: u64) -> Vec<Layer> {
    let hidden = model.hidden;
    let layer = |name, n, k| Layer { name, n, k, experts: None, quantized: true };
    let mut layers = match model.attention {
        Attention::Heads { heads, key_value_heads, width, .. } => {
            let [heads, key_value] = [heads / gpus, (key_value_heads / gpus).max(1)];
            vec![layer("QKV", (heads + 2 * key_value) * width, hidden), layer("O", hidden, heads * width)]
        }
        Attention::Latent { heads, query_rank, latent, plain, rotary, value } => {
            let heads = heads / gpus;
            let queries = heads * (plain + rotary);
            // The latent projections are small and every GPU has them whole.
            let mut layers = match query_rank {
                Some(rank) => {
                    vec![layer("Q-KV down", rank + latent + rotary, hidden), layer("Q up", queries, rank)]
                }
                None => vec![layer("KV down", latent + rotary, hidden), layer("Q", queries, hidden)],
            };
            // Decoding absorbs this matrix into queries and outputs, head by head, so it stays bf16.
            layers.push(Layer { quantized: false, ..layer("KV up", heads * (plain + value), latent) });
            layers.push(layer("O", hidden, heads * value));
            layers
        }
    };
    match model.mixture.filter(|_| sparse) {
        None => {
            let intermediate = model.intermediate / gpus;
            layers.push(layer("gate-up", 2 * intermediate, hidden));
            layers.push(layer("down", hidden, intermediate));
        }
        Some(mixture) => {
            let experts = Some(Experts { count: mixture.experts, per_token: mixture.per_token });
            layers.push(Layer { quantized: false, ..layer("router", mixture.experts, hidden) });
            let intermediate = mixture.intermediate / gpus;
            layers.push(Layer { experts, ..layer("experts' gate-up", 2 * intermediate, hidden) });
            layers.push(Layer { experts, ..layer("experts' down", hidden, intermediate) });
            if mixture.shared > 0 {
                let shared = mixture.shared / gpus;
                layers.push(layer("shared gate-up", 2 * shared, hidden));
                layers.push(layer("shared down", hidden, shared));
            }
        }
    }
    layers
}

/// Returns the output embedding (`lm_head`) on each of `gpus` GPUs. It stays bf16, and rows are added where
/// the vocabulary is no multiple of `gpus`.
pub fn output_embedding(model: &Model, gpus: u64) -> Layer {
    Layer {
        name: "output embedding",
        n: model.vocabulary.div_ceil(gpus),
        k: model.hidden,
        experts: None,
        quantized: false,
    }
}
