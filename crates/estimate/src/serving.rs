//! Time of a decoding step and of a prefill, from the products and the operations between them.
//!
//! ```text
//! step      = Σ blocks (products + attention + operations + all-reduces) + output embedding
//! attention = launch + max(KV bytes / (0.8 · memory speed), operations / (0.5 · bf16 throughput))
//! operation = 2.5 µs + bytes / (0.78 · memory speed)
//! all-reduce = 8 µs + 2 · (g − 1)/g · m · hidden · 2 bytes / (0.7 · link speed), two a block
//! ```
//!
//! The operations are two norms with a residual, the gate, the quantization of attention's output, and rotary
//! positions with the write to the KV cache; around experts also routing and the weighted sum. Their two factors are
//! fitted to the bench's record of activations, `docs/benchmarks/activations.json`.
//! Those of attention and of all-reduces are assumptions. Sampling and the host's work are left out:
//! an engine that replays CUDA graphs hides most of it.

use serde::Serialize;

use crate::architecture::{Attention, Model};
use crate::gemm::Terms;
use crate::gpus::Gpu;
use crate::layers::{self, Layer};
use crate::measurements::{Measurements, Source, product};
use crate::scheme::Scheme;

/// The part of memory's speed at which attention reads the KV cache. Assumed.
pub const ATTENTION_LOAD: f64 = 0.8;
/// The part of the bf16 throughput that attention reaches. Assumed.
pub const ATTENTION_MMA: f64 = 0.5;
/// Microseconds of attention besides: launches, and the combination of its parts. Assumed.
pub const ATTENTION_LAUNCH_US: f64 = 5.0;
/// Microseconds of an operation besides its bytes. Fitted.
pub const OPERATION_LAUNCH_US: f64 = 2.5;
/// The part of memory's speed that an operation reaches. Fitted.
pub const OPERATION_LOAD: f64 = 0.78;
/// Microseconds of an all-reduce besides its bytes. Assumed.
pub const ALL_REDUCE_US: f64 = 8.0;
/// The part of the links' speed that an all-reduce reaches. Assumed.
pub const ALL_REDUCE_LINK: f64 = 0.7;
/// Tokens that a prefill takes at a time.
pub const PREFILL_TOKENS: f64 = 4096.0;

/// A model on its GPUs, and what is known about them.
#[derive(Clone, Copy)]
pub struct Server<'a> {
    /// The model.
    pub model: &'a Model,
    /// The GPU.
    pub gpu: &'a Gpu,
    /// Number of GPUs (tensor parallelism).
    pub gpus: u64,
    /// Bytes of an element of the KV cache.
    pub cache_bytes: f64,
    /// Measured times.
    pub measurements: &'a Measurements,
}

/// The time of a layer in microseconds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LayerTime {
    /// The layer.
    #[serde(flatten)]
    pub layer: Layer,
    /// How many blocks have the layer.
    pub blocks: u64,
    /// The time.
    pub us: f64,
    /// Where it comes from.
    pub source: Source,
    /// The prediction alone.
    pub predicted_us: f64,
    /// The prediction's error relative to the measured time, where there is one.
    pub error: Option<f64>,
    /// The terms of the closed formula.
    pub terms: Terms,
}

/// The time of a step over all blocks, in microseconds.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Step {
    /// The whole step.
    pub us: f64,
    /// The mean of the blocks.
    pub block_us: f64,
    /// The products of all blocks and the output embedding.
    pub products_us: f64,
    /// Attention of all blocks.
    pub attention_us: f64,
    /// The operations of all blocks.
    pub operations_us: f64,
    /// The all-reduces of all blocks.
    pub all_reduces_us: f64,
    /// The layers, those of dense blocks first.
    pub layers: Vec<LayerTime>,
}

impl Server<'_> {
    /// Estimates a step that decodes one token of each of `batch` sequences with `context` cached positions each.
    pub fn decode(&self, scheme: Scheme, batch: f64, context: f64) -> Step {
        let Self { model, gpus, .. } = *self;
        let positions = model.cached_positions(context);
        let bytes = batch * positions * model.cached_elements_on_each(gpus) as f64 * self.cache_bytes;
        let operations = batch * positions * self.decoding_operations();
        let mut step = self.step(scheme, batch, self.attention(bytes, operations));
        let embedding = self.layer_time(&layers::output_embedding(model, gpus), 1, scheme, batch);
        step.products_us += embedding.us;
        step.us += embedding.us;
        step.layers.push(embedding);
        step
    }

    /// Estimates the prefill of `batch` sequences of `length` tokens, in microseconds.
    pub fn prefill(&self, scheme: Scheme, batch: f64, length: f64) -> f64 {
        let tokens = batch * length;
        let at_a_time = tokens.min(PREFILL_TOKENS);
        // A token attends to those before it: on average to half of them, or to the window.
        let seen = self.model.cached_positions(length / 2.0);
        let operations = at_a_time * seen * self.prefill_operations();
        let bytes = at_a_time * self.model.cached_elements_on_each(self.gpus) as f64 * self.cache_bytes;
        tokens / at_a_time * self.step(scheme, at_a_time, self.attention(bytes, operations)).us
    }

    /// A step of all blocks with these tokens.
    fn step(&self, scheme: Scheme, tokens: f64, attention_us: f64) -> Step {
        let Self { model, gpus, .. } = *self;
        let mut step = Step::default();
        for (sparse, blocks) in [false, true].into_iter().zip(model.blocks_by_kind()) {
            if blocks == 0 {
                continue;
            }
            let times: Vec<LayerTime> = layers::of_block(model, sparse, gpus)
                .iter()
                .map(|layer| self.layer_time(layer, blocks, scheme, tokens))
                .collect();
            let count = blocks as f64;
            step.products_us += count * times.iter().map(|time| time.us).sum::<f64>();
            step.operations_us += count * self.operations(scheme, tokens, sparse);
            step.layers.extend(times);
        }
        let blocks = model.blocks as f64;
        step.attention_us = blocks * attention_us;
        step.all_reduces_us = blocks * 2.0 * self.all_reduce(tokens);
        step.us = step.products_us + step.attention_us + step.operations_us + step.all_reduces_us;
        step.block_us = step.us / blocks;
        step
    }

    fn layer_time(&self, layer: &Layer, blocks: u64, scheme: Scheme, tokens: f64) -> LayerTime {
        let (us, predicted_us, source) = self.measurements.time(layer, tokens, scheme, self.gpu);
        let of_layer = if layer.quantized { scheme } else { Scheme::Bf16 };
        LayerTime {
            layer: *layer,
            blocks,
            us,
            source,
            predicted_us,
            error: (source == Source::Measured).then(|| predicted_us / us - 1.0),
            terms: Terms::of(&product(layer, tokens), of_layer, self.gpu),
        }
    }

    fn attention(&self, bytes: f64, operations: f64) -> f64 {
        let load = bytes / (ATTENTION_LOAD * self.gpu.memory_speed());
        let mma = operations / (ATTENTION_MMA * Scheme::Bf16.tensor_speed(self.gpu));
        ATTENTION_LAUNCH_US + load.max(mma)
    }

    /// Multiplications and additions of one token and one cached position, on one GPU.
    fn decoding_operations(&self) -> f64 {
        let gpus = self.gpus as f64;
        match self.model.attention {
            Attention::Heads { heads, width, .. } => 4.0 * heads as f64 * width as f64 / gpus,
            // Queries and outputs are in the latent space of all heads.
            Attention::Latent { heads, latent, rotary, .. } => {
                2.0 * heads as f64 * (2.0 * latent as f64 + rotary as f64) / gpus
            }
        }
    }

    fn prefill_operations(&self) -> f64 {
        match self.model.attention {
            Attention::Heads { .. } => self.decoding_operations(),
            Attention::Latent { heads, plain, rotary, value, .. } => {
                2.0 * heads as f64 * (plain + rotary + value) as f64 / self.gpus as f64
            }
        }
    }

    /// The operations of a block between its products.
    fn operations(&self, scheme: Scheme, tokens: f64, sparse: bool) -> f64 {
        let Self { model, gpus, .. } = *self;
        let each = gpus as f64;
        let hidden = model.hidden as f64;
        let activation = scheme.activation_bytes();
        // Launches, and bytes of a token.
        let (mut launches, mut bytes) = (2.0, 2.0 * (6.0 + activation) * hidden);
        let mut add = |of_token: f64| {
            launches += 1.0;
            bytes += of_token;
        };
        let (stacked, attended) = match model.attention {
            Attention::Heads { heads, key_value_heads, width, .. } => {
                let key_value = (key_value_heads / gpus).max(1) as f64;
                let heads = heads as f64 / each;
                ((heads + 2.0 * key_value) * width as f64, heads * width as f64)
            }
            Attention::Latent { heads, latent, plain, rotary, value, .. } => {
                let heads = heads as f64 / each;
                (heads * (plain + rotary) as f64 + (latent + rotary) as f64, heads * value as f64)
            }
        };
        add(4.0 * stacked);
        if activation < 2.0 {
            add((2.0 + activation) * attended);
        }
        let mixture = model.mixture.filter(|_| sparse);
        let gated = mixture
            .map_or(model.intermediate, |mixture| mixture.per_token * mixture.intermediate + mixture.shared);
        add((4.0 + activation) * gated as f64 / each);
        if let Some(mixture) = mixture {
            let rows = mixture.per_token as f64 * hidden;
            add(2.0 * activation * rows);
            add(2.0 * rows + 2.0 * hidden);
        }
        launches * OPERATION_LAUNCH_US + tokens * bytes / (OPERATION_LOAD * self.gpu.memory_speed())
    }

    fn all_reduce(&self, tokens: f64) -> f64 {
        if self.gpus == 1 {
            return 0.0;
        }
        let gpus = self.gpus as f64;
        let bytes = 2.0 * (gpus - 1.0) / gpus * tokens * self.model.hidden as f64 * 2.0;
        ALL_REDUCE_US + bytes / (ALL_REDUCE_LINK * self.gpu.link_gb_per_second * 1e3)
    }

    /// Returns the bytes of the weights on each GPU.
    pub fn weight_bytes(&self, scheme: Scheme) -> f64 {
        let Self { model, gpus, .. } = *self;
        let of_layer = |layer: &Layer| {
            let scheme = if layer.quantized { scheme } else { Scheme::Bf16 };
            layer.matrices() as f64 * scheme.weight_bytes(layer.n, layer.k)
        };
        let [dense, sparse] = model.blocks_by_kind().map(|blocks| blocks as f64);
        let block = |sparse| layers::of_block(model, sparse, gpus).iter().map(of_layer).sum::<f64>();
        let embedding = of_layer(&layers::output_embedding(model, gpus));
        let norms = 2.0 * 2.0 * model.hidden as f64 * model.blocks as f64;
        dense * block(false) + sparse * block(true) + norms + embedding * if model.tied { 1.0 } else { 2.0 }
    }

    /// Returns the bytes of the KV cache of a sequence of `length` tokens on each GPU.
    pub fn cache_bytes_of(&self, length: f64) -> f64 {
        let of_token = self.model.blocks as f64 * self.model.cached_elements_on_each(self.gpus) as f64;
        self.model.cached_positions(length) * of_token * self.cache_bytes
    }

    /// Returns the bytes of activations in flight on each GPU: two residual streams, the widest layer's input and output
    /// in 16 bits, and logits in 32.
    pub fn workspace_bytes(&self, batch: f64, length: f64) -> f64 {
        let Self { model, gpus, .. } = *self;
        let tokens = batch.max((batch * length).min(PREFILL_TOKENS));
        let mixture = model.blocks_by_kind()[1] > 0;
        let all = layers::of_block(model, mixture, gpus);
        let widest = all
            .iter()
            .map(|layer| {
                (layer.n + layer.k) as f64 * layer.experts.map_or(1.0, |experts| experts.per_token as f64)
            })
            .fold(0.0, f64::max);
        tokens * 2.0 * (2.0 * model.hidden as f64 + widest) + batch * 4.0 * model.vocabulary as f64
    }
}
