//! The error type of the library, with one variant per cause.
//!
//! A message says what was wrong, gives the value found and, if it is not obvious, the remedy.
//! Functions return an error for bad input before they write any output.
//! Only accessors panic, for positions out of range, and their docs say so.

#[cfg(feature = "files")]
mod file;
#[cfg(feature = "gpu")]
pub(crate) mod gpu;
mod plan;

#[cfg(feature = "files")]
use std::path::PathBuf;

use liquidgemm_format::brick::{BRICK_K, MAX_K};

#[cfg(feature = "files")]
pub use file::FileError;
#[cfg(feature = "gpu")]
pub use gpu::{DriverStatus, GpuError};
pub use plan::PlanError;

/// An error of this library.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A dimension is 0.
    #[error("dimension {dimension} is 0; it must be at least 1")]
    EmptyDimension {
        /// The dimension: `"m"`, `"n"`, `"k"` or `"group"`.
        dimension: &'static str,
    },

    /// K is too large: an int32 accumulator could overflow.
    #[error(
        "k = {k} is too large: above {MAX_K} an int32 accumulator could overflow; split the product along K"
    )]
    KTooLarge {
        /// The K requested. The limit is 131,072.
        k: usize,
    },

    /// A matrix does not fit the address space.
    #[error("a [{rows}, {columns}] {what} does not fit this machine's address space")]
    TooLarge {
        /// The matrix.
        what: &'static str,
        /// Its rows.
        rows: usize,
        /// Its columns.
        columns: usize,
    },

    /// A slice's length contradicts its shape.
    #[error("{what} must have {expected} elements, {shape}, but has {actual}")]
    ShapeMismatch {
        /// The argument.
        what: &'static str,
        /// Elements in the shape.
        expected: usize,
        /// Elements in the slice.
        actual: usize,
        /// The shape, in symbols such as `[m, k]`.
        shape: &'static str,
    },

    /// Weights and activations differ in K.
    #[error("the weights have k = {weights} but the activations have k = {activations}; they must be equal")]
    KMismatch {
        /// K of the weights.
        weights: usize,
        /// K of the activations.
        activations: usize,
    },

    /// A row stride is shorter than a row.
    #[error("a row stride of {stride} bytes is shorter than a row of k = {k}; it must be at least k")]
    StrideTooShort {
        /// The row stride, in elements of one byte each.
        stride: usize,
        /// Elements in a row.
        k: usize,
    },

    /// The rows of a matrix would overlap.
    #[error(
        "the {what}'s row stride of {stride} elements is shorter than a row of {row}; it must be at least that"
    )]
    RowStrideTooShort {
        /// The matrix.
        what: &'static str,
        /// The row stride, in elements.
        stride: usize,
        /// Elements in a row.
        row: usize,
    },

    /// A norm's epsilon is negative or not finite.
    #[error("epsilon is {value}; it must be finite and not negative")]
    InvalidEpsilon {
        /// The value found.
        value: f32,
    },

    /// A static scale is not finite and positive.
    #[error("the static scale is {value}; it must be finite and greater than 0")]
    InvalidStaticScale {
        /// The value found.
        value: f32,
    },

    /// A residual was given for an operation that has none.
    #[error("a residual goes with a norm of rows in their own order; leave it out, or add it beforehand")]
    UnexpectedResidual,

    /// Activations for a layer have a smoothing vector of their own.
    #[error("the layer divides its activations by its own smoothing vector; leave that of the input out")]
    SmoothingTwice,

    /// A norm was asked for in a row-parallel layer.
    #[error(
        "a row-parallel layer has only a part of each row, but a norm needs all of it; \
         apply the norm before the rows are divided"
    )]
    NormOfShard,

    /// A range of weights that cannot be cut out.
    #[error(
        "cannot cut {what} {start}..{end} out of {length}: a shard must not be empty, \
         must begin at a multiple of {multiple}, and end at one or at {length}"
    )]
    BadCut {
        /// What is cut: `"channels"` or `"inputs"`.
        what: &'static str,
        /// First index of the range.
        start: usize,
        /// Index after the range.
        end: usize,
        /// Number of channels or inputs.
        length: usize,
        /// The multiple at which cuts may lie.
        multiple: usize,
    },

    /// An empty list of shards.
    #[error("there are no shards to join; give one at least")]
    NoShards,

    /// Shards that do not belong together.
    #[error("shard {shard} does not fit the first one: its {what} is {found}, not {expected}")]
    ShardsDiffer {
        /// Number of the shard, from 0.
        shard: usize,
        /// What differs.
        what: &'static str,
        /// The first shard's value.
        expected: String,
        /// This shard's value.
        found: String,
    },

    /// An empty list of experts.
    #[error("there are no experts; give one at least")]
    NoExperts,

    /// An expert that differs from the first in shape or group.
    #[error("expert {expert} does not fit the first one: its {what} is {found}, not {expected}")]
    ExpertsDiffer {
        /// Number of the expert, from 0.
        expert: usize,
        /// What differs: `"n"`, `"k"` or `"group"`.
        what: &'static str,
        /// The first expert's value.
        expected: String,
        /// This expert's value.
        found: String,
    },

    /// An expert's rows are out of range, or end before they begin.
    #[error(
        "expert {expert} has the rows {begin}..{end}, but they must ascend within 0..{limit}; \
         check the offsets, or the counts and the capacity"
    )]
    BadRowIndex {
        /// Number of the expert, from 0.
        expert: usize,
        /// First row, counted from the start of the expert's place if the rows are masked.
        begin: i64,
        /// Row after the last.
        end: i64,
        /// Number of rows, or the capacity if the rows are masked.
        limit: usize,
    },

    /// A weight is NaN or infinite.
    #[error("the weight of channel {channel} at k = {k} is {value}; weights must be finite")]
    NonFiniteWeight {
        /// Output channel (row).
        channel: usize,
        /// Position along K (column).
        k: usize,
        /// The value found.
        value: f32,
    },

    /// An activation is NaN or infinite, before or after division by the smoothing vector.
    #[error(
        "the activation of token {token} at k = {k} is {value}; activations must be finite, also smoothed"
    )]
    NonFiniteActivation {
        /// Token (row).
        token: usize,
        /// Position along K (column).
        k: usize,
        /// The value found.
        value: f32,
    },

    /// A scale, a zero or a bias is NaN or infinite.
    #[error("{what} {index} is {value}; it must be finite")]
    NonFiniteParameter {
        /// The parameter: `"channel scale"`, `"token scale"`, `"scale"`, `"zero"` or `"bias"`.
        what: &'static str,
        /// Position in the parameter's vector.
        index: usize,
        /// The value found.
        value: f32,
    },

    /// A smoothing factor is not finite and positive.
    #[error("smoothing factor {k} is {value}; every factor must be finite and greater than 0")]
    InvalidSmoothing {
        /// Position along K (column).
        k: usize,
        /// The value found.
        value: f32,
    },

    /// A second moment, a diagonal element of a Hessian, or a largest magnitude is negative or not finite.
    #[error(
        "the second moment or largest magnitude of input channel {k} is {value}; \
         it must be finite and not negative"
    )]
    InvalidMoment {
        /// Input channel (position along K).
        k: usize,
        /// The value found.
        value: f32,
    },

    /// An element of a Hessian is NaN or infinite, or differs from its mirror image.
    #[error(
        "element ({row}, {column}) of the Hessian is {value}; \
         all elements must be finite and the matrix symmetric"
    )]
    InvalidHessian {
        /// Row of the element.
        row: usize,
        /// Column of the element.
        column: usize,
        /// The value found.
        value: f32,
    },

    /// A Hessian has no Cholesky factor, even damped.
    #[error(
        "the Hessian is not positive definite at input channel {k} with a damping of {damping}; \
         accumulate it from the layer's inputs, or increase the damping"
    )]
    HessianNotPositive {
        /// Input channel (position along K) where the factorization failed.
        k: usize,
        /// The damping, as a fraction of the mean of the diagonal.
        damping: f32,
    },

    /// A damping of a Hessian is negative or not finite.
    #[error("the damping is {value}; it must be finite and not negative")]
    InvalidDamping {
        /// The value found.
        value: f32,
    },

    /// Moments were given to a method that does not use them.
    #[error("the method {method} does not use second moments; leave them out, or choose search")]
    UnusedMoments {
        /// The method.
        method: crate::Method,
    },

    /// A text is not a method.
    #[error("{text:?} is no quantization method; write \"rtn\" or \"search\"")]
    UnknownMethod {
        /// The text.
        text: String,
    },

    /// An exponent of smoothing is out of range.
    #[error("the smoothing exponent alpha is {value}; it must be from 0 to 1")]
    InvalidAlpha {
        /// The value found.
        value: f32,
    },

    /// A rotation whose block is no power of two, or does not divide k.
    #[error("a rotation in blocks of {block} is not possible; use a power of two that divides k = {k}")]
    InvalidRotation {
        /// The block requested.
        block: usize,
        /// Elements in a row.
        k: usize,
    },

    /// Statistics of activations without a single token.
    #[error("there are no activations to take statistics of; add one token at least")]
    NoTokens,

    /// The group size is not a positive multiple of 64.
    #[error(
        "a group of {group} is not possible; use a positive multiple of {BRICK_K}, or \"channel\" for one group a channel"
    )]
    InvalidGroup {
        /// The group size requested.
        group: usize,
    },

    /// A text is not a group.
    #[error("{text:?} is no group; write a positive multiple of {BRICK_K}, or \"channel\"")]
    UnknownGroup {
        /// The text.
        text: String,
    },

    /// A code does not fit four bits.
    #[error("the code of channel {channel} at k = {k} is {code}; codes are 0 to 15")]
    CodeOutOfRange {
        /// Output channel (row).
        channel: usize,
        /// Position along K (column).
        k: usize,
        /// The value found.
        code: u8,
    },

    /// A pair violates the format's invariant, `s ≥ 1` and `15·s + a ≤ 255`.
    #[error(
        "channel {channel}, k block {k_block} has (s, a) = ({s}, {a}): s must be at least 1 and \
         15·s + a at most 255, or dequantization would overflow; requantize these weights"
    )]
    InvariantBroken {
        /// Output channel. It may be a padded one, from `n` on.
        channel: usize,
        /// The group's first block of 64 along K.
        k_block: usize,
        /// The pair's scale.
        s: u8,
        /// The pair's offset.
        a: u8,
    },

    /// Two bricks of one group store different pairs. Only files of version 1 can contain this.
    #[error(
        "channel {channel}, k block {k_block} has another (s, a) than the first block of its group; \
         with group {group} all blocks of a group must repeat the same pair"
    )]
    PairsDiffer {
        /// Output channel.
        channel: usize,
        /// The block of 64 along K that differs from its group's first.
        k_block: usize,
        /// The group of the weights.
        group: String,
    },

    /// A bias was given with raw int32 output.
    #[error("int32 output is the raw accumulator and takes no bias; leave the bias out or ask for f32")]
    BiasWithRawOutput,

    /// A plan cannot be made.
    #[error(transparent)]
    Plan(#[from] PlanError),

    /// The GPU backend failed.
    #[cfg(feature = "gpu")]
    #[error(transparent)]
    Gpu(#[from] GpuError),

    /// A file cannot be written or read, or is not what it should be.
    #[cfg(feature = "files")]
    #[error("{}: {problem}", path.display())]
    File {
        /// The file's path.
        path: PathBuf,
        /// The problem with it.
        problem: FileError,
    },
}
