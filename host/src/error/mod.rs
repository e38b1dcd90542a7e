//! Everything that can go wrong, as one typed error.
//!
//! Each message says what was wrong, gives the value that was met and, where it isn't obvious, what to do. No
//! function of this crate panics on bad input, and none touches its output before all input is checked.

use std::path::PathBuf;

use liquidgemm_format::brick::{BRICK_K, MAX_K};

/// What any call of this crate may return instead of a result.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A dimension is 0.
    #[error("dimension {dimension} is 0; it must be at least 1")]
    EmptyDimension {
        /// Which one: `"m"`, `"n"` or `"k"`.
        dimension: &'static str,
    },

    /// K is beyond what an int32 accumulator holds exactly.
    #[error(
        "k = {k} is too large: above {MAX_K} an int32 accumulator could overflow; split the product along K"
    )]
    KTooLarge {
        /// The K that was asked for.
        k: usize,
    },

    /// A shape whose size in memory cannot be expressed.
    #[error("a [{rows}, {columns}] {what} does not fit this machine's address space")]
    TooLarge {
        /// What has that shape.
        what: &'static str,
        /// Rows asked for.
        rows: usize,
        /// Columns asked for.
        columns: usize,
    },

    /// A slice whose length contradicts its shape.
    #[error("{what} must have {expected} elements, {shape}, but has {actual}")]
    ShapeMismatch {
        /// Which argument.
        what: &'static str,
        /// Elements that its shape asks for.
        expected: usize,
        /// Elements that it has.
        actual: usize,
        /// The shape, as `[rows, columns]` with names.
        shape: &'static str,
    },

    /// Weights and activations that disagree about K.
    #[error("the weights have k = {weights} but the activations have k = {activations}; they must be equal")]
    KMismatch {
        /// K of the weights.
        weights: usize,
        /// K of the activations.
        activations: usize,
    },

    /// A row stride that is shorter than a row.
    #[error("a row stride of {stride} bytes is shorter than a row of k = {k}; it must be at least k")]
    StrideTooShort {
        /// The stride, in elements (one byte each).
        stride: usize,
        /// Elements in a row.
        k: usize,
    },

    /// A weight that is NaN or infinite.
    #[error("the weight of channel {channel} at k = {k} is {value}; weights must be finite")]
    NonFiniteWeight {
        /// Output channel (row).
        channel: usize,
        /// Position along K (column).
        k: usize,
        /// What stood there.
        value: f32,
    },

    /// An activation that is NaN or infinite, before or after division by the smoothing vector.
    #[error(
        "the activation of token {token} at k = {k} is {value}; activations must be finite, also smoothed"
    )]
    NonFiniteActivation {
        /// Token (row).
        token: usize,
        /// Position along K (column).
        k: usize,
        /// What stood there.
        value: f32,
    },

    /// A scale or bias value that is NaN or infinite.
    #[error("{what} {index} is {value}; it must be finite")]
    NonFiniteParameter {
        /// `"channel scale"`, `"token scale"` or `"bias"`.
        what: &'static str,
        /// Position in its vector.
        index: usize,
        /// What stood there.
        value: f32,
    },

    /// A smoothing factor that cannot be divided by.
    #[error("smoothing factor {k} is {value}; every factor must be finite and greater than 0")]
    InvalidSmoothing {
        /// Position along K.
        k: usize,
        /// What stood there.
        value: f32,
    },

    /// A group size that the format does not have.
    #[error(
        "a group of {group} is not possible; use a positive multiple of {BRICK_K}, or \"channel\" for one group a channel"
    )]
    InvalidGroup {
        /// The group size asked for.
        group: usize,
    },

    /// Text that names no group.
    #[error("{text:?} is no group; write a positive multiple of {BRICK_K}, or \"channel\"")]
    UnknownGroup {
        /// What was written.
        text: String,
    },

    /// A code that needs more than four bits.
    #[error("the code of channel {channel} at k = {k} is {code}; codes are 0 to 15")]
    CodeOutOfRange {
        /// Output channel.
        channel: usize,
        /// Position along K.
        k: usize,
        /// What stood there.
        code: u8,
    },

    /// A pair that breaks the format's invariant.
    #[error(
        "channel {channel}, k block {k_block} has (s, a) = ({s}, {a}): s must be at least 1 and \
         15·s + a at most 255, or dequantization would overflow; requantize these weights"
    )]
    InvariantBroken {
        /// Output channel, counted with the padding.
        channel: usize,
        /// Block of 64 along K.
        k_block: usize,
        /// The group's scale.
        s: u8,
        /// The group's offset.
        a: u8,
    },

    /// Two blocks of one group with different pairs.
    #[error(
        "channel {channel}, k block {k_block} has another (s, a) than the first block of its group; \
         with group {group} all blocks of a group must repeat the same pair"
    )]
    PairsDiffer {
        /// Output channel.
        channel: usize,
        /// Block of 64 along K that differs.
        k_block: usize,
        /// The declared group.
        group: crate::Group,
    },

    /// A bias together with raw int32 output.
    #[error("int32 output is the raw accumulator and takes no bias; leave the bias out or ask for f32")]
    BiasWithRawOutput,

    /// Something between this crate and the GPU.
    #[error(transparent)]
    Gpu(#[from] crate::gpu::GpuError),

    /// A file that could not be written or read, or holds something else than packed weights.
    #[error("{}: {problem}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What was wrong with it.
        problem: FileError,
    },
}

/// What was wrong with a file of packed weights.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FileError {
    /// The operating system refused.
    #[error("cannot {action}: {error}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The system's answer.
        error: std::io::Error,
    },

    /// Not a safetensors file, or a truncated or damaged one.
    #[error("not a readable safetensors file ({0}); it may be truncated or damaged")]
    Safetensors(safetensors::SafeTensorError),

    /// No path at all.
    #[error("the path is empty; give a file's name")]
    EmptyPath,

    /// Something else than a regular file.
    #[error("this is {found}, not a file; packed weights are read from and saved to files only")]
    NotAFile {
        /// What it is.
        found: &'static str,
    },

    /// Symbolic links that lead on and on.
    #[error("more than {limit} symbolic links lead on from here; they may form a circle")]
    TooManyLinks {
        /// How many are followed.
        limit: usize,
    },

    /// Memory for a file's contents.
    #[error("there is no memory for {bytes} bytes of the file")]
    OutOfMemory {
        /// Bytes asked for.
        bytes: usize,
    },

    /// A header that no file of this format has.
    #[error(
        "a header of {bytes} bytes is beyond the limit of {limit}: this is no file of packed weights, or it is damaged"
    )]
    HeaderTooLong {
        /// Bytes that the file says it has.
        bytes: u64,
        /// The most that are read.
        limit: u64,
    },

    /// A header that says something twice.
    #[error("the header is not valid: {reason}")]
    BadHeader {
        /// What is wrong.
        reason: String,
    },

    /// A tensor that the format does not have.
    #[error("tensor {name:?} has no place in a file of packed weights")]
    UnknownTensor {
        /// The tensor's name.
        name: String,
    },

    /// A safetensors file without this format's mark.
    #[error("no packed LiquidGEMM weights: metadata \"format\" is {found:?}, not {expected:?}")]
    WrongFormat {
        /// What the metadata says, if anything.
        found: Option<String>,
        /// What it should say.
        expected: &'static str,
    },

    /// A version that this crate does not know.
    #[error(
        "format version {found:?} is unknown; this build reads version {expected:?}, so update it or repack"
    )]
    WrongVersion {
        /// What the metadata says, if anything.
        found: Option<String>,
        /// What this crate reads.
        expected: &'static str,
    },

    /// A metadata entry that is missing or unreadable.
    #[error("metadata {key:?} is {found:?}; {expected} expected")]
    BadMetadata {
        /// The entry.
        key: &'static str,
        /// What it holds, if anything.
        found: Option<String>,
        /// What it should hold.
        expected: &'static str,
    },

    /// A tensor of another type or shape than the metadata asks for.
    #[error("tensor {name:?} is {found}; the metadata ask for {expected}")]
    WrongTensor {
        /// The tensor's name.
        name: &'static str,
        /// Its type and shape in the file.
        found: String,
        /// The type and shape that it should have.
        expected: String,
    },

    /// Contents that changed since they were written.
    #[error("checksum {found} does not match the contents, {computed}: the file is damaged; fetch it again")]
    ChecksumMismatch {
        /// What the metadata say.
        found: String,
        /// What the contents give.
        computed: String,
    },

    /// Contents that are no valid packed weights.
    #[error("{0}")]
    Invalid(Box<Error>),
}

/// `dimension` must be at least 1.
pub(crate) fn check_dimension(dimension: &'static str, value: usize) -> Result<(), Error> {
    if value == 0 { Err(Error::EmptyDimension { dimension }) } else { Ok(()) }
}

/// K must be at least 1 and small enough for exact int32 accumulation.
pub(crate) fn check_k(k: usize) -> Result<(), Error> {
    check_dimension("k", k)?;
    if k > MAX_K { Err(Error::KTooLarge { k }) } else { Ok(()) }
}

/// `rows · columns`, or the error that it is not expressible.
pub(crate) fn checked_elements(what: &'static str, rows: usize, columns: usize) -> Result<usize, Error> {
    rows.checked_mul(columns).ok_or(Error::TooLarge { what, rows, columns })
}

/// A slice must have exactly the length that its shape asks for.
pub(crate) fn check_length(
    what: &'static str,
    shape: &'static str,
    expected: usize,
    actual: usize,
) -> Result<(), Error> {
    if expected == actual { Ok(()) } else { Err(Error::ShapeMismatch { what, expected, actual, shape }) }
}

/// Every value of a vector of scales or biases must be finite.
pub(crate) fn check_finite(what: &'static str, values: &[f32]) -> Result<(), Error> {
    match values.iter().position(|value| !value.is_finite()) {
        Some(index) => Err(Error::NonFiniteParameter { what, index, value: values[index] }),
        None => Ok(()),
    }
}
