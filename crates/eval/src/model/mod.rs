//! Models: their float weights and their forward passes.
//!
//! A forward pass asks a [`Layers`] for each linear layer, by number. So the same code runs a model in float,
//! quantized, and while something is recorded.

mod bert;
mod llama;

use std::path::Path;

use candle_core::Tensor;
use tokenizers::Tokenizer;

pub use bert::Encoder;
pub use llama::Causal;

use crate::source::Source;
use crate::{Error, tokenizer};

/// A linear layer's float weights.
#[derive(Clone, Debug)]
pub struct LinearWeights {
    /// The name of its weight tensor in a Hugging Face checkpoint, without `.weight`.
    pub name: String,
    /// The number of the first layer that gets the same input, such as Q for K and V; its own number if there is none.
    pub input: usize,
    /// f32 `[n, k]`.
    pub weight: Tensor,
    /// f32 `[n]`.
    pub bias: Option<Tensor>,
}

impl LinearWeights {
    /// Returns `(n, k)`.
    pub fn shape(&self) -> (usize, usize) {
        self.weight.dims2().expect("weights have two dimensions")
    }
}

/// All linear layers of a model, as a forward pass sees them.
pub trait Layers {
    /// Computes layer number `layer` for `[tokens, k]` activations, and returns `[tokens, n]`.
    ///
    /// # Errors
    /// Whatever keeps the layer from being computed.
    fn apply(&self, layer: usize, x: &Tensor) -> Result<Tensor, Error>;
}

/// A model in float, with its tokenizer.
#[derive(Debug)]
pub struct Model {
    /// The model's name, from its folder or file.
    pub name: String,
    /// Text to tokens.
    pub tokenizer: Tokenizer,
    /// The linear layers that are quantized: all but embeddings and the head.
    pub layers: Vec<LinearWeights>,
    /// The forward pass.
    pub network: Network,
}

/// The forward pass of a model.
#[derive(Debug)]
pub enum Network {
    /// Sentences to vectors.
    Encoder(Encoder),
    /// Tokens to the next one.
    Causal(Causal),
}

impl Model {
    /// Reads a Hugging Face folder, a GGUF file, or a folder with one GGUF file.
    ///
    /// # Errors
    /// One that names the file, tensor or setting that is missing, wrong or not supported.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let source = Source::open(path)?;
        let architecture = source.architecture()?;
        let mut layers = Collector { source: &source, layers: Vec::new() };
        let network = match architecture {
            "bert" => Network::Encoder(Encoder::read(&source, &mut layers)?),
            "llama" | "qwen2" => Network::Causal(Causal::read(&source, &mut layers)?),
            _ => return Err(Error::UnsupportedArchitecture { found: architecture.to_owned() }),
        };
        let layers = layers.layers;
        Ok(Self { name: source.name(), tokenizer: tokenizer::read(&source)?, layers, network })
    }

    /// Returns the most tokens that one forward pass takes.
    pub fn positions(&self) -> usize {
        match &self.network {
            Network::Encoder(encoder) => encoder.positions(),
            Network::Causal(causal) => causal.positions(),
        }
    }

    /// Runs the network for its linear layers' inputs, and drops its result.
    ///
    /// # Errors
    /// As the network's.
    pub fn run(&self, tokens: &[u32], layers: &dyn Layers) -> Result<(), Error> {
        match &self.network {
            Network::Encoder(encoder) => encoder.embed(tokens, layers).map(drop),
            Network::Causal(causal) => causal.hidden(tokens, layers).map(drop),
        }
    }

    /// Splits a text into tokens, with the special tokens that the tokenizer adds.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the tokenizer refuses it.
    pub fn tokens(&self, text: &str) -> Result<Vec<u32>, Error> {
        let encoding = self.tokenizer.encode_fast(text, true);
        let encoding = encoding.map_err(|error| Error::Tokenizer { reason: error.to_string() })?;
        Ok(encoding.get_ids().to_vec())
    }
}

/// Reads linear layers and numbers them.
pub(crate) struct Collector<'a> {
    source: &'a Source,
    layers: Vec<LinearWeights>,
}

impl Collector<'_> {
    /// Reads the layer `name` with weights `[n, k]`, and with its bias if it has one. Returns its number.
    fn read(&mut self, name: String, [n, k]: [usize; 2]) -> Result<usize, Error> {
        self.read_beside(self.layers.len(), name, [n, k])
    }

    /// As [`read`](Self::read), for a layer that gets the input of layer number `input`.
    fn read_beside(&mut self, input: usize, name: String, [n, k]: [usize; 2]) -> Result<usize, Error> {
        let weight = self.source.tensor(&format!("{name}.weight"), &[n, k])?;
        let bias = format!("{name}.bias");
        let bias = self.source.has(&bias).then(|| self.source.tensor(&bias, &[n])).transpose()?;
        self.layers.push(LinearWeights { name, input, weight, bias });
        Ok(self.layers.len() - 1)
    }
}

/// Returns the rows of an embedding `[vocabulary, channels]` for some tokens.
fn embed(embedding: &Tensor, tokens: &[u32]) -> Result<Tensor, Error> {
    let vocabulary = embedding.dim(0)?;
    if let Some(&token) = tokens.iter().find(|&&token| token as usize >= vocabulary) {
        return Err(Error::TokenOutOfRange { token, vocabulary });
    }
    let indices = Tensor::from_slice(tokens, tokens.len(), embedding.device())?;
    Ok(embedding.index_select(&indices, 0)?)
}

/// Fails if there are no tokens, or more than positions.
fn check_tokens(tokens: &[u32], positions: usize) -> Result<(), Error> {
    if tokens.is_empty() {
        return Err(Error::TextTooShort { what: "a piece of text".into(), found: 0, needed: 1 });
    }
    if tokens.len() > positions {
        return Err(Error::TooManyTokens { tokens: tokens.len(), positions });
    }
    Ok(())
}
