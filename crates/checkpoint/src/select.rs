//! Which tensors are linear layers to quantize, and why others are kept.

use globset::{Glob, GlobSet, GlobSetBuilder};
use liquidgemm_format::brick::MAX_K;

use crate::error::{CheckpointError, Result};
use crate::source::{Source, SourceTensor};

/// Patterns that overrule the default choice of layers.
///
/// A pattern is a glob over the name of a module, such as `model.layers.*.mlp.*`; `*` also spans dots.
#[derive(Clone, Debug, Default)]
pub struct Patterns {
    /// Modules to quantize although they are kept by default.
    pub include: Vec<String>,
    /// Modules to keep. They win over `include`.
    pub exclude: Vec<String>,
}

/// Why a tensor is kept as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kept {
    /// Not a matrix named `….weight`: a bias, a norm, a convolution, fused experts.
    NotLinear,
    /// Its type is not one of weights.
    Type,
    /// An embedding.
    Embedding,
    /// The weight of a norm.
    Norm,
    /// The head: the last layer, which gives the logits.
    Head,
    /// A router or a gate of a mixture of experts.
    Router,
    /// The model stores the transposed matrix, as GPT-2 does.
    Transposed,
    /// K exceeds 131,072.
    TooLong,
    /// Packing would not make it smaller.
    NotSmaller,
    /// A pattern excludes it.
    Excluded,
    /// Another quantizer has left it in floating point.
    KeptBefore,
}

impl Kept {
    /// Returns the reason in a few words.
    pub fn reason(&self) -> &'static str {
        match self {
            Kept::NotLinear => "not a linear layer",
            Kept::Type => "not a type of weights",
            Kept::Embedding => "embedding",
            Kept::Norm => "norm",
            Kept::Head => "head",
            Kept::Router => "router",
            Kept::Transposed => "stored as [k, n]",
            Kept::TooLong => "k above 131072",
            Kept::NotSmaller => "packing would not make it smaller",
            Kept::Excluded => "excluded",
            Kept::KeptBefore => "kept by the model's quantizer",
        }
    }

    /// Returns whether the tensor belongs to a linear layer, which stays in floating point.
    pub fn is_linear(&self) -> bool {
        matches!(
            self,
            Kept::Head | Kept::Router | Kept::TooLong | Kept::NotSmaller | Kept::Excluded | Kept::KeptBefore
        )
    }
}

/// Parts of names that are heads.
const HEADS: [&str; 7] =
    ["lm_head", "embed_out", "classifier", "score", "cls", "qa_outputs", "vocab_projector"];
/// Parts of names that are routers or gates.
const ROUTERS: [&str; 4] = ["gate", "router", "shared_expert_gate", "wg"];
/// Parts of names that are embeddings.
const EMBEDDINGS: [&str; 5] = ["wte", "wpe", "shared", "relative_attention_bias", "tok_embeddings"];
/// Models whose linear layers are stored transposed, and the last part of those layers' names.
const TRANSPOSING_MODELS: [&str; 4] = ["gpt2", "openai-gpt", "imagegpt", "decision_transformer"];
const TRANSPOSED: [&str; 4] = ["c_attn", "c_proj", "c_fc", "q_attn"];

/// Decides for each tensor of a source.
pub(crate) struct Selection<'a> {
    source: &'a dyn Source,
    include: GlobSet,
    exclude: GlobSet,
    /// Whether another quantizer has chosen the layers.
    is_chosen: bool,
}

impl<'a> Selection<'a> {
    /// Compiles the patterns. Each must fit at least one module.
    pub(crate) fn new(source: &'a dyn Source, patterns: &Patterns) -> Result<Self> {
        let compile = |patterns: &[String]| -> Result<GlobSet> {
            let mut set = GlobSetBuilder::new();
            for pattern in patterns {
                let error = |reason: String| CheckpointError::Pattern { pattern: pattern.clone(), reason };
                let glob = Glob::new(pattern).map_err(|reason| error(reason.to_string()))?;
                let matcher = glob.compile_matcher();
                let mut modules = source.tensors().iter().filter_map(module);
                if !modules.any(|module| matcher.is_match(module)) {
                    return Err(error("no module of the model fits; `inspect` lists them".to_owned()));
                }
                set.add(glob);
            }
            set.build().map_err(|error| CheckpointError::Pattern {
                pattern: patterns.join(" "),
                reason: error.to_string(),
            })
        };
        let is_chosen = source.tensors().iter().any(|tensor| tensor.is_imported);
        Ok(Self {
            source,
            include: compile(&patterns.include)?,
            exclude: compile(&patterns.exclude)?,
            is_chosen,
        })
    }

    /// Returns the module to quantize, or why the tensor is kept.
    pub(crate) fn decide(&self, tensor: &'a SourceTensor) -> Result<&'a str, Kept> {
        let module = module(tensor).ok_or(Kept::NotLinear)?;
        if !tensor.is_readable {
            return Err(Kept::Type);
        }
        if self.exclude.is_match(module) {
            return Err(Kept::Excluded);
        }
        if tensor.columns() > MAX_K {
            return Err(Kept::TooLong);
        }
        if self.include.is_match(module) || tensor.is_imported {
            return Ok(module);
        }
        let kept = self.kept_by_default(module);
        let kept = kept.or(self.is_chosen.then_some(Kept::KeptBefore));
        kept.map_or(Ok(module), Err)
    }

    fn kept_by_default(&self, module: &str) -> Option<Kept> {
        let parts: Vec<&str> = module.split('.').collect();
        let last = parts.last().copied().unwrap_or_default();
        if parts.iter().any(|part| HEADS.contains(part)) {
            return Some(Kept::Head);
        }
        if ROUTERS.contains(&last) {
            return Some(Kept::Router);
        }
        if parts.iter().any(|part| EMBEDDINGS.contains(part) || part.contains("embed")) {
            return Some(Kept::Embedding);
        }
        if last.to_ascii_lowercase().contains("norm") || last.starts_with("ln_") {
            return Some(Kept::Norm);
        }
        let model = self.source.config().get("model_type").and_then(serde_json::Value::as_str);
        if model.is_some_and(|model| TRANSPOSING_MODELS.contains(&model)) && TRANSPOSED.contains(&last) {
            return Some(Kept::Transposed);
        }
        None
    }
}

/// Returns the module of a matrix named `MODULE.weight`.
fn module(tensor: &SourceTensor) -> Option<&str> {
    let is_matrix = tensor.shape.len() == 2 && tensor.shape.iter().all(|&side| side > 0);
    tensor.name.strip_suffix(".weight").filter(|module| is_matrix && !module.is_empty())
}
