//! The shape of a decoder, read from the `config.json` of a Hugging Face folder.
//! Missing keys take the defaults that the model's class in `transformers` has.
//! Every number is checked against a limit, so that no product of them exceeds a `u128`.

use anyhow::{Context, bail, ensure};
use serde_json::Value;

use crate::layers::{self, Layer};

/// Limits of single numbers: far beyond any model, and small enough that products of all of them fit a `u128`.
const MOST_ROWS: u64 = 1 << 31;
const MOST_WIDTH: u64 = 1 << 24;
const MOST_COUNT: u64 = 1 << 16;

/// A decoder-only language model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Model {
    /// The name, for reports.
    pub name: String,
    /// `model_type` of the configuration.
    pub model_type: String,
    /// Entries of the vocabulary.
    pub vocabulary: u64,
    /// Width of the residual stream.
    pub hidden: u64,
    /// Number of decoder blocks.
    pub blocks: u64,
    /// Attention of every block.
    pub attention: Attention,
    /// Width of the dense feed-forward network.
    pub intermediate: u64,
    /// The mixture of experts, where blocks have one.
    pub mixture: Option<Mixture>,
    /// Whether input and output embeddings are one matrix.
    pub tied: bool,
}

/// Attention of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attention {
    /// Heads with keys and values of their own, or shared by several heads (grouped-query attention).
    Heads {
        /// Query heads.
        heads: u64,
        /// Heads of keys and of values.
        key_value_heads: u64,
        /// Width of a head.
        width: u64,
        /// The most positions that a token attends to. `None` without a sliding window.
        window: Option<u64>,
        /// Biases of Q, K and V, and of O.
        biases: [bool; 2],
        /// Whether queries and keys are normalized (two vectors of a head's width).
        norms: bool,
    },
    /// Multi-head latent attention (DeepSeek-V2 and V3): one latent vector and one rotary key for all heads.
    Latent {
        /// Query heads.
        heads: u64,
        /// Rank of the queries' projection. `None` if it is a single matrix.
        query_rank: Option<u64>,
        /// Width of the latent vector.
        latent: u64,
        /// Width of a query head without position.
        plain: u64,
        /// Width of a query head with rotary position.
        rotary: u64,
        /// Width of a value head.
        value: u64,
    },
}

/// The mixture of experts of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mixture {
    /// Number of blocks that have it. The others are dense.
    pub blocks: u64,
    /// Number of experts.
    pub experts: u64,
    /// Experts of each token.
    pub per_token: u64,
    /// Width of an expert.
    pub intermediate: u64,
    /// Width of the experts that every token takes, all together. 0 without any.
    pub shared: u64,
}

/// Reads numbers of a configuration; every error names the key and its value.
struct Reader<'a>(&'a Value);

impl Reader<'_> {
    /// A number that may be missing or null.
    fn optional(&self, key: &str, most: u64) -> anyhow::Result<Option<u64>> {
        let value = match self.0.get(key) {
            None | Some(Value::Null) => return Ok(None),
            Some(value) => value,
        };
        let number = value.as_u64().filter(|number| (1..=most).contains(number));
        match number {
            Some(number) => Ok(Some(number)),
            None => bail!("{key} is {}; it must be a whole number from 1 to {most}", brief(value)),
        }
    }

    fn required(&self, key: &str, most: u64) -> anyhow::Result<u64> {
        self.optional(key, most)?.with_context(|| format!("the key {key} is missing"))
    }

    /// Like [`optional`](Self::optional), but 0 is allowed and the default.
    fn or_zero(&self, key: &str, most: u64) -> anyhow::Result<u64> {
        if self.0.get(key).and_then(Value::as_u64) == Some(0) {
            return Ok(0);
        }
        Ok(self.optional(key, most)?.unwrap_or(0))
    }

    fn flag(&self, key: &str, default: bool) -> anyhow::Result<bool> {
        match self.0.get(key) {
            None | Some(Value::Null) => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(value) => bail!("{key} is {}; it must be true or false", brief(value)),
        }
    }
}

/// A value as text, cut to a length that fits a message.
fn brief(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(40) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

impl Model {
    /// Reads a configuration.
    ///
    /// `model_type` may be llama, yi, mistral, mixtral, qwen2, qwen3, qwen3_moe or deepseek_v3.
    ///
    /// # Errors
    /// If the type is another, a key is missing, a number is 0, not whole or beyond any model,
    /// or if numbers contradict one another.
    pub fn from_config(name: &str, config: &Value) -> anyhow::Result<Self> {
        ensure!(config.is_object(), "the configuration is not a JSON object");
        let reader = Reader(config);
        let model_type = match config.get("model_type") {
            Some(Value::String(text)) => text.to_ascii_lowercase(),
            Some(value) => bail!("model_type is {}; it must be a string", brief(value)),
            None => bail!("the key model_type is missing"),
        };
        let mixture = match model_type.as_str() {
            "llama" | "yi" | "mistral" | "qwen2" | "qwen3" => None,
            "mixtral" => Some(mixtral(&reader)?),
            "qwen3_moe" => Some(qwen3_moe(&reader)?),
            "deepseek_v3" => Some(deepseek(&reader)?),
            other => bail!(
                "model_type is {}; known are llama, yi, mistral, mixtral, qwen2, qwen3, qwen3_moe and deepseek_v3",
                brief(&other.into())
            ),
        };
        let attention =
            if model_type == "deepseek_v3" { latent(&reader)? } else { heads(&reader, &model_type)? };
        let blocks = reader.required("num_hidden_layers", MOST_COUNT)?;
        if let Some(mixture) = &mixture {
            ensure!(
                mixture.per_token <= mixture.experts,
                "num_experts_per_tok is {}, but there are {} experts",
                mixture.per_token,
                mixture.experts
            );
        }
        // A model whose blocks all have experts needs no dense width.
        let all_sparse = mixture.is_some_and(|mixture| mixture.blocks == blocks);
        let intermediate = match reader.optional("intermediate_size", MOST_WIDTH)? {
            Some(intermediate) => intermediate,
            None if all_sparse => 1,
            None => bail!("the key intermediate_size is missing"),
        };
        Ok(Self {
            name: name.to_owned(),
            vocabulary: reader.required("vocab_size", MOST_ROWS)?,
            hidden: reader.required("hidden_size", MOST_WIDTH)?,
            blocks,
            attention,
            intermediate,
            mixture,
            tied: reader.flag("tie_word_embeddings", false)?,
            model_type,
        })
    }

    /// Returns the number of dense blocks and of blocks with experts.
    pub fn blocks_by_kind(&self) -> [u64; 2] {
        let sparse = self.mixture.map_or(0, |mixture| mixture.blocks);
        [self.blocks - sparse, sparse]
    }

    /// Returns the number of parameters, without layers that only predict further tokens.
    pub fn parameters(&self) -> u128 {
        self.count(|_| true)
    }

    /// Returns the number of parameters that a token passes through, embeddings included.
    pub fn active_parameters(&self) -> u128 {
        let idle = self.mixture.map_or(0, |mixture| {
            let of_expert = 3 * u128::from(self.hidden) * u128::from(mixture.intermediate);
            u128::from(mixture.blocks) * u128::from(mixture.experts - mixture.per_token) * of_expert
        });
        self.parameters() - idle
    }

    /// Returns the number of weights of the layers that are quantized.
    pub fn quantized_parameters(&self) -> u128 {
        let of_block = |sparse| {
            layers::of_block(self, sparse, 1)
                .iter()
                .filter(|layer| layer.quantized)
                .map(Layer::weights)
                .sum::<u128>()
        };
        let [dense, sparse] = self.blocks_by_kind();
        u128::from(dense) * of_block(false) + u128::from(sparse) * of_block(true)
    }

    fn count(&self, which: impl Fn(&Layer) -> bool) -> u128 {
        let of_block = |sparse| -> u128 {
            let all = layers::of_block(self, sparse, 1);
            let matrices = all.iter().filter(|layer| which(layer)).map(Layer::weights).sum::<u128>();
            matrices + u128::from(self.vectors(sparse))
        };
        let [dense, sparse] = self.blocks_by_kind();
        let embeddings = u128::from(self.vocabulary) * u128::from(self.hidden);
        u128::from(dense) * of_block(false)
            + u128::from(sparse) * of_block(true)
            + embeddings * if self.tied { 1 } else { 2 }
            + u128::from(self.hidden)
    }

    /// Returns the parameters of a block's norms and biases.
    fn vectors(&self, sparse: bool) -> u64 {
        let of_attention = match self.attention {
            Attention::Heads { heads, key_value_heads, width, biases, norms, .. } => {
                let stacked = (heads + 2 * key_value_heads) * width;
                [stacked, self.hidden]
                    .into_iter()
                    .zip(biases)
                    .map(|(n, has)| if has { n } else { 0 })
                    .sum::<u64>()
                    + if norms { 2 * width } else { 0 }
            }
            Attention::Latent { query_rank, latent, .. } => query_rank.unwrap_or(0) + latent,
        };
        let correction = match (sparse, self.attention, self.mixture) {
            // DeepSeek-V3's router has one bias for each expert.
            (true, Attention::Latent { .. }, Some(mixture)) => mixture.experts,
            _ => 0,
        };
        2 * self.hidden + of_attention + correction
    }

    /// Returns the elements of the KV cache of one token in one block, over all GPUs.
    pub fn cached_elements(&self) -> u64 {
        match self.attention {
            Attention::Heads { key_value_heads, width, .. } => 2 * key_value_heads * width,
            Attention::Latent { latent, rotary, .. } => latent + rotary,
        }
    }

    /// Returns the elements of the KV cache of one token in one block on each of `gpus` GPUs.
    /// Heads are dealt out, and copied where there are more GPUs; a latent vector is on every GPU.
    pub fn cached_elements_on_each(&self, gpus: u64) -> u64 {
        match self.attention {
            Attention::Heads { key_value_heads, width, .. } => 2 * (key_value_heads / gpus).max(1) * width,
            Attention::Latent { .. } => self.cached_elements(),
        }
    }

    /// Returns the cached positions of a sequence of `length` tokens.
    pub fn cached_positions(&self, length: f64) -> f64 {
        match self.attention {
            Attention::Heads { window: Some(window), .. } => length.min(window as f64),
            _ => length,
        }
    }

    /// Checks that the model's layers can be divided among GPUs.
    ///
    /// # Errors
    /// If `gpus` is 0, or heads or widths are no multiple of it.
    pub fn check_gpus(&self, gpus: u64) -> anyhow::Result<()> {
        ensure!(gpus > 0, "the number of GPUs is 0");
        let heads = match self.attention {
            Attention::Heads { heads, .. } | Attention::Latent { heads, .. } => heads,
        };
        let mut divided = vec![("attention heads", heads)];
        let [dense, sparse] = self.blocks_by_kind();
        if dense > 0 {
            divided.push(("channels of the feed-forward network", self.intermediate));
        }
        if let Some(mixture) = self.mixture.filter(|_| sparse > 0) {
            divided.push(("channels of each expert", mixture.intermediate));
            divided.push(("channels of the shared experts", mixture.shared));
        }
        for (what, count) in divided {
            ensure!(count % gpus == 0, "{count} {what} can't be divided among {gpus} GPUs");
        }
        if let Attention::Heads { key_value_heads, .. } = self.attention {
            ensure!(
                key_value_heads.is_multiple_of(gpus) || gpus.is_multiple_of(key_value_heads),
                "{key_value_heads} heads of keys and values can be neither divided among {gpus} GPUs nor copied evenly"
            );
        }
        Ok(())
    }
}

fn heads(reader: &Reader<'_>, model_type: &str) -> anyhow::Result<Attention> {
    let heads = reader.required("num_attention_heads", MOST_COUNT)?;
    let key_value_heads = reader.optional("num_key_value_heads", MOST_COUNT)?.unwrap_or(heads);
    ensure!(
        heads % key_value_heads == 0,
        "num_attention_heads is {heads}, which is no multiple of num_key_value_heads, {key_value_heads}"
    );
    let width = match reader.optional("head_dim", MOST_COUNT)? {
        Some(width) => width,
        None => {
            let hidden = reader.required("hidden_size", MOST_WIDTH)?;
            ensure!(
                hidden % heads == 0,
                "hidden_size is {hidden}, which is no multiple of num_attention_heads, {heads}, and there is no head_dim"
            );
            hidden / heads
        }
    };
    let is_qwen = model_type.starts_with("qwen");
    let biased = reader.flag("attention_bias", false)?;
    let biases = if model_type == "qwen2" { [true, false] } else { [biased; 2] };
    let slides = reader.flag("use_sliding_window", !is_qwen)?;
    let window = if slides { reader.optional("sliding_window", MOST_ROWS)? } else { None };
    Ok(Attention::Heads {
        heads,
        key_value_heads,
        width,
        window,
        biases,
        norms: model_type.starts_with("qwen3"),
    })
}

fn latent(reader: &Reader<'_>) -> anyhow::Result<Attention> {
    Ok(Attention::Latent {
        heads: reader.required("num_attention_heads", MOST_COUNT)?,
        query_rank: reader.optional("q_lora_rank", MOST_WIDTH)?,
        latent: reader.required("kv_lora_rank", MOST_WIDTH)?,
        plain: reader.required("qk_nope_head_dim", MOST_COUNT)?,
        rotary: reader.required("qk_rope_head_dim", MOST_COUNT)?,
        value: reader.required("v_head_dim", MOST_COUNT)?,
    })
}

fn mixtral(reader: &Reader<'_>) -> anyhow::Result<Mixture> {
    Ok(Mixture {
        blocks: reader.required("num_hidden_layers", MOST_COUNT)?,
        experts: reader.required("num_local_experts", MOST_COUNT)?,
        per_token: reader.required("num_experts_per_tok", MOST_COUNT)?,
        intermediate: reader.required("intermediate_size", MOST_WIDTH)?,
        shared: 0,
    })
}

fn qwen3_moe(reader: &Reader<'_>) -> anyhow::Result<Mixture> {
    let blocks = reader.required("num_hidden_layers", MOST_COUNT)?;
    let every = reader.optional("decoder_sparse_step", MOST_COUNT)?.unwrap_or(1);
    let dense: Vec<u64> = match reader.0.get("mlp_only_layers") {
        None | Some(Value::Null) => Vec::new(),
        Some(value) => {
            let list =
                value.as_array().map(|list| list.iter().map(Value::as_u64).collect::<Option<Vec<_>>>());
            list.flatten().with_context(|| {
                format!("mlp_only_layers is {}; it must be a list of whole numbers", brief(value))
            })?
        }
    };
    let mut listed = vec![false; usize::try_from(blocks).context("num_hidden_layers is too large")?];
    for block in dense {
        if let Some(place) = usize::try_from(block).ok().and_then(|block| listed.get_mut(block)) {
            *place = true;
        }
    }
    let sparse = (1..=blocks).zip(listed).filter(|&(number, dense)| number % every == 0 && !dense).count();
    Ok(Mixture {
        blocks: sparse as u64,
        experts: reader.required("num_experts", MOST_COUNT)?,
        per_token: reader.required("num_experts_per_tok", MOST_COUNT)?,
        intermediate: reader.required("moe_intermediate_size", MOST_WIDTH)?,
        shared: 0,
    })
}

fn deepseek(reader: &Reader<'_>) -> anyhow::Result<Mixture> {
    let blocks = reader.required("num_hidden_layers", MOST_COUNT)?;
    let dense = reader.or_zero("first_k_dense_replace", MOST_COUNT)?;
    ensure!(dense <= blocks, "first_k_dense_replace is {dense}, more than the {blocks} of num_hidden_layers");
    let every = reader.optional("moe_layer_freq", MOST_COUNT)?.unwrap_or(1);
    let intermediate = reader.required("moe_intermediate_size", MOST_WIDTH)?;
    Ok(Mixture {
        blocks: (dense..blocks).filter(|block| block % every == 0).count() as u64,
        experts: reader.required("n_routed_experts", MOST_COUNT)?,
        per_token: reader.required("num_experts_per_tok", MOST_COUNT)?,
        intermediate,
        shared: reader.or_zero("n_shared_experts", MOST_COUNT)? * intermediate,
    })
}
