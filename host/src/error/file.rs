//! Errors of reading and writing files (`file.rs`, `new_file.rs`).

use super::Error;

/// The problem with a file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FileError {
    /// The operating system refused an operation.
    #[error("cannot {action}: {error}")]
    Io {
        /// The operation.
        action: &'static str,
        /// The system's error.
        error: std::io::Error,
    },

    /// The file is not a safetensors file, or it is truncated or damaged.
    #[error("not a readable safetensors file ({0}); it may be truncated or damaged")]
    Safetensors(safetensors::SafeTensorError),

    /// The path is empty.
    #[error("the path is empty; give a file's name")]
    EmptyPath,

    /// The path does not lead to a regular file.
    #[error("this is {found}, not a file; give a file's name")]
    NotAFile {
        /// The kind of file that is there.
        found: &'static str,
    },

    /// Following symbolic links reached the limit.
    #[error("more than {limit} symbolic links lead on from here; they may form a circle")]
    TooManyLinks {
        /// The number of links that are followed.
        limit: usize,
    },

    /// Memory for the file's contents cannot be allocated.
    #[error("there is no memory for {bytes} bytes of the file")]
    OutOfMemory {
        /// Bytes requested.
        bytes: usize,
    },

    /// The header is longer than any of this format.
    #[error(
        "a header of {bytes} bytes is beyond the limit of {limit}: this is no file of packed weights, or it is damaged"
    )]
    HeaderTooLong {
        /// The header's length according to the file.
        bytes: u64,
        /// The largest length that is accepted.
        limit: u64,
    },

    /// The header contains a key twice, or is otherwise invalid.
    #[error("the header is not valid: {reason}")]
    BadHeader {
        /// The reason.
        reason: String,
    },

    /// The file contains a tensor that the format does not have.
    #[error("tensor {name:?} has no place in a file of packed weights")]
    UnknownTensor {
        /// The tensor's name.
        name: String,
    },

    /// The safetensors file has no metadata `format`, or another one than this format's.
    #[error("no packed LiquidGEMM weights: metadata \"format\" is {found:?}, not {expected:?}")]
    WrongFormat {
        /// The entry in the metadata, if there is one.
        found: Option<String>,
        /// The entry of this format.
        expected: &'static str,
    },

    /// This build cannot read the format version.
    #[error(
        "format version {found:?} is unknown; this build reads versions up to {expected:?}, so update it or repack"
    )]
    WrongVersion {
        /// The version in the metadata, if there is one.
        found: Option<String>,
        /// The version that this build writes. It also reads version 1.
        expected: &'static str,
    },

    /// A metadata entry is missing or cannot be parsed.
    #[error("metadata {key:?} is {found:?}; {expected} expected")]
    BadMetadata {
        /// The entry's key.
        key: &'static str,
        /// The entry's value, if there is one.
        found: Option<String>,
        /// A description of valid values.
        expected: &'static str,
    },

    /// A tensor's type or shape contradicts the metadata.
    #[error("tensor {name:?} is {found}; the metadata ask for {expected}")]
    WrongTensor {
        /// The tensor's name.
        name: &'static str,
        /// Its type and shape in the file.
        found: String,
        /// The type and shape that it should have.
        expected: String,
    },

    /// The contents do not match their checksum: they changed after they were written.
    #[error("checksum {found} does not match the contents, {computed}: the file is damaged; fetch it again")]
    ChecksumMismatch {
        /// The checksum in the metadata.
        found: String,
        /// The checksum of the contents.
        computed: String,
    },

    /// The contents are not valid packed weights, for example because a pair violates the format's invariant.
    #[error("{0}")]
    Invalid(Box<Error>),
}
