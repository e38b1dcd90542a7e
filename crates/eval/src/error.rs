//! What can go wrong between a model on disk and its figures.

use std::path::{Path, PathBuf};

/// An error of this crate. The message names the file, layer or value, and what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or folder can't be read or written.
    #[error("cannot {action} {}: {source}", .path.display())]
    Io {
        /// `read` or `write`.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The operating system's reason.
        source: std::io::Error,
    },
    /// A file can't be created or given its name.
    #[error(transparent)]
    File(liquidgemm::Error),
    /// A file is not what its place or its name says.
    #[error("{}: {reason}", .path.display())]
    InvalidFile {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The model's files can't be read.
    #[error(transparent)]
    Checkpoint(Box<liquidgemm_checkpoint::CheckpointError>),
    /// A model whose forward pass this crate does not have.
    #[error("the architecture {found:?} is not supported; supported are {}", SUPPORTED.join(", "))]
    UnsupportedArchitecture {
        /// The model's own name for it.
        found: String,
    },
    /// A setting of a model that its forward pass does not implement.
    #[error("the model has {setting} = {value}, which is not supported; supported is {supported}")]
    UnsupportedSetting {
        /// The key in config.json.
        setting: &'static str,
        /// Its value.
        value: String,
        /// What would be accepted.
        supported: &'static str,
    },
    /// A key is missing from config.json, or has the wrong type.
    #[error("the model's settings have no usable {key}")]
    MissingSetting {
        /// The key.
        key: String,
    },
    /// The model has no tokenizer.
    #[error(
        "no tokenizer: {} does not exist, and the model carries none that can be read ({reason})",
        .path.display()
    )]
    NoTokenizer {
        /// Where tokenizer.json was looked for.
        path: PathBuf,
        /// Why the model's own files do not help.
        reason: String,
    },
    /// The tokenizer refuses its data or a text.
    #[error("tokenizer: {reason}")]
    Tokenizer {
        /// The tokenizer's reason.
        reason: String,
    },
    /// A tensor is missing.
    #[error("the model has no tensor {name}")]
    MissingTensor {
        /// Its name.
        name: String,
    },
    /// A tensor has another shape than the model's settings say.
    #[error("tensor {name} has shape {actual:?}, expected {expected:?}")]
    TensorShape {
        /// Its name.
        name: String,
        /// The shape in the file.
        actual: Vec<usize>,
        /// The shape by the settings.
        expected: Vec<usize>,
    },
    /// A tensor is of a type that can't be read as f32.
    #[error(
        "tensor {name} has the type {stored}, which is none of weights; f32, f16, bf16, fp8 and GGUF's blocks are"
    )]
    TensorType {
        /// Its name.
        name: String,
        /// Its type.
        stored: String,
    },
    /// A token that the model has no embedding for.
    #[error(
        "token {token} is outside the model's vocabulary of {vocabulary}: tokenizer and model do not fit"
    )]
    TokenOutOfRange {
        /// The token.
        token: u32,
        /// Rows of the embedding.
        vocabulary: usize,
    },
    /// More tokens in one piece than the model has positions.
    #[error("{tokens} tokens in one piece, but the model has {positions} positions")]
    TooManyTokens {
        /// The tokens.
        tokens: usize,
        /// The model's limit.
        positions: usize,
    },
    /// A text without anything to measure.
    #[error("{what} is too short: {found} tokens, at least {needed} are needed")]
    TextTooShort {
        /// The text.
        what: String,
        /// Its tokens.
        found: usize,
        /// The least number of tokens.
        needed: usize,
    },
    /// A method needs calibration that is not there.
    #[error(
        "{method} needs {needed} of layer {layer}, which the calibration does not have; run `liquidgemm calibrate`{hint}"
    )]
    MissingCalibration {
        /// The method.
        method: String,
        /// `second moments` or `the Hessian`.
        needed: &'static str,
        /// The layer.
        layer: String,
        /// Options for the command.
        hint: &'static str,
    },
    /// A layer can't be quantized or multiplied.
    #[error("layer {layer}: {source}")]
    Layer {
        /// The layer.
        layer: String,
        /// The library's reason.
        source: liquidgemm::Error,
    },
    /// A forward pass that gave NaN or infinity.
    #[error("{what} gave a value that is not finite")]
    NotFinite {
        /// The run.
        what: String,
    },
    /// A tensor operation failed.
    #[error("tensor operation: {0}")]
    Tensor(#[from] candle_core::Error),
}

/// The architectures that [`Error::UnsupportedArchitecture`] lists.
pub const SUPPORTED: [&str; 3] = ["bert (sentence embeddings)", "llama", "qwen2"];

impl From<liquidgemm_checkpoint::CheckpointError> for Error {
    fn from(error: liquidgemm_checkpoint::CheckpointError) -> Self {
        Error::Checkpoint(Box::new(error))
    }
}

impl Error {
    pub(crate) fn read(path: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        move |source| Error::Io { action: "read", path: path.to_owned(), source }
    }

    pub(crate) fn write(path: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        move |source| Error::Io { action: "write", path: path.to_owned(), source }
    }

    pub(crate) fn invalid(path: &Path, reason: impl ToString) -> Self {
        Error::InvalidFile { path: path.to_owned(), reason: reason.to_string() }
    }
}
