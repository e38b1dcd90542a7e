//! The error type of this crate. Every message names the file or the module, the value found and, if it is not
//! obvious, the remedy.

use std::io;
use std::path::{Path, PathBuf};

/// An error of reading, quantizing or writing a checkpoint.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// The operating system refused an operation.
    #[error("{}: cannot {action}: {error}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The operation.
        action: &'static str,
        /// The system's error.
        error: io::Error,
    },

    /// A file can't be created, written or given its name.
    #[error(transparent)]
    File(liquidgemm::Error),

    /// A file or a folder is not what it should be.
    #[error("{}: {problem}", path.display())]
    Input {
        /// The file or folder.
        path: PathBuf,
        /// The problem with it.
        problem: Problem,
    },

    /// The library refused a module's weights.
    #[error("{module}: {error}")]
    Weights {
        /// The module, such as `model.layers.0.mlp.up_proj`.
        module: String,
        /// The reason.
        error: liquidgemm::Error,
    },

    /// A module with this name does not exist, or is not packed.
    #[error("there is no packed module {module:?}; `inspect` lists the modules")]
    NoModule {
        /// The name.
        module: String,
    },

    /// A tensor with this name does not exist.
    #[error("there is no tensor {tensor:?}; `inspect` lists the tensors")]
    NoTensor {
        /// The name.
        tensor: String,
    },

    /// A module can't be cut as asked.
    #[error("{module}: cannot cut {what} = {length} into {world} parts for rank {rank}: {reason}")]
    BadShard {
        /// The module.
        module: String,
        /// What is cut: `"n"` or `"k"`.
        what: &'static str,
        /// Its length.
        length: usize,
        /// The rank asked for.
        rank: usize,
        /// The number of ranks.
        world: usize,
        /// The reason.
        reason: &'static str,
    },

    /// A pattern of modules is not valid, or fits none.
    #[error("pattern {pattern:?}: {reason}")]
    Pattern {
        /// The pattern.
        pattern: String,
        /// The reason.
        reason: String,
    },

    /// The options contradict one another or the model.
    #[error("{reason}")]
    Options {
        /// The contradiction, and the remedy.
        reason: String,
    },

    /// The output's place is taken.
    #[error("{} exists; choose another output or replace it with --force", path.display())]
    OutputExists {
        /// The path.
        path: PathBuf,
    },

    /// An unfinished run with other options or another model lies beside the output.
    #[error(
        "{} holds an unfinished run of another model, other options or another version; \
         finish it with those, or discard it with --force",
        path.display()
    )]
    OtherRun {
        /// The folder of the unfinished run.
        path: PathBuf,
    },

    /// Another process writes the same output.
    #[error("another process is writing {}; wait for it or choose another output", path.display())]
    Busy {
        /// The folder of the unfinished run.
        path: PathBuf,
    },
}

/// The problem with a file or a folder.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Problem {
    /// Something else than a regular file.
    #[error("this is {found}, not a file")]
    NotAFile {
        /// What it is.
        found: &'static str,
    },

    /// A file is longer than any valid one.
    #[error(
        "{what} of {bytes} bytes is beyond the limit of {limit}: the file is damaged, or of another kind than expected"
    )]
    TooLong {
        /// What is too long.
        what: &'static str,
        /// Its length.
        bytes: u64,
        /// The limit.
        limit: u64,
    },

    /// A file ends too early or too late.
    #[error("the header describes {expected} bytes, but the file has {found}; it is truncated or damaged")]
    Length {
        /// Bytes according to the header.
        expected: u64,
        /// Bytes of the file.
        found: u64,
    },

    /// The header of a safetensors file is not valid: overlapping tensors, wrong sizes, overflow, or no JSON.
    #[error("not a valid safetensors file: {reason}")]
    Header {
        /// The reason.
        reason: String,
    },

    /// A GGUF file is not valid.
    #[error("not a valid GGUF file: {reason}")]
    Gguf {
        /// The reason.
        reason: String,
    },

    /// A JSON file is not valid.
    #[error("{reason}")]
    Json {
        /// The reason.
        reason: String,
    },

    /// The index names a file outside the folder.
    #[error("the index names {name:?}; only plain names of files in the same folder are accepted")]
    UnsafeName {
        /// The name.
        name: String,
    },

    /// The index names a file that does not exist, or a tensor that its file does not have.
    #[error("the index names {name:?}, which is missing; fetch the checkpoint again")]
    Missing {
        /// The file or the tensor.
        name: String,
    },

    /// A link leads out of the folder.
    #[error("this link leads to {}, outside the model's folder; copy the file into the folder", target.display())]
    LeadsOutside {
        /// The end of the link.
        target: PathBuf,
    },

    /// A tensor contradicts its use.
    #[error("tensor {name:?} {reason}")]
    Tensor {
        /// The tensor's name.
        name: String,
        /// The contradiction.
        reason: String,
    },

    /// Two files have a tensor of the same name.
    #[error("tensor {name:?} is in this file and in {other}; remove one of them")]
    Twice {
        /// The tensor's name.
        name: String,
        /// The other file.
        other: String,
    },

    /// The contents do not match their checksum.
    #[error(
        "{name:?} has the checksum {computed}, but {found} was stored: the file is damaged; fetch it again"
    )]
    Checksum {
        /// The tensor or the module.
        name: String,
        /// The stored checksum.
        found: String,
        /// The checksum of the contents.
        computed: String,
    },

    /// The format or one of its features is not supported.
    #[error("{what}; {remedy}")]
    Unsupported {
        /// What is not supported.
        what: String,
        /// What to do.
        remedy: &'static str,
    },
}

/// The result of this crate's functions.
pub type Result<T, E = CheckpointError> = std::result::Result<T, E>;

impl Problem {
    /// Turns the problem into an error about `path`.
    pub(crate) fn at(self, path: &Path) -> CheckpointError {
        CheckpointError::Input { path: path.to_owned(), problem: self }
    }

    pub(crate) fn tensor(name: &str, reason: impl Into<String>) -> Self {
        Problem::Tensor { name: name.to_owned(), reason: reason.into() }
    }
}

/// Returns a function that turns a system's error into an error about `path`.
pub(crate) fn io_error(path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> CheckpointError {
    let path = path.to_owned();
    move |error| CheckpointError::Io { path, action, error }
}

/// Returns a function that turns the library's error into an error about `module`.
pub(crate) fn weights_error(module: &str) -> impl FnOnce(liquidgemm::Error) -> CheckpointError {
    let module = module.to_owned();
    move |error| CheckpointError::Weights { module, error }
}
