//! The arguments of the kernel that applies the epilogue to int32 sums in memory.
//!
//! `host/src/gpu/scale_sums.rs` fills them, and `kernels-gpu/src/scale_sums.rs` reads them.

use crate::divisor::Divisor;

/// Threads of a thread block.
pub const SCALE_SUMS_THREADS: u32 = 128;
/// Neighbouring channels of one token that a thread computes.
pub const SCALE_SUMS_CHANNELS: u32 = 8;

/// Arguments of the kernel. Pointers are device addresses.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ScaleSumsArguments {
    /// i32 `[m, n]`, `sums_stride` elements apart.
    pub sums: u64,
    /// Elements from the start of one row of sums to the start of the next.
    pub sums_stride: u64,
    /// f32 `[n]`.
    pub channel_scales: u64,
    /// f32 `[m]`.
    pub token_scales: u64,
    /// f32 `[n]`, or 0 for no bias.
    pub bias: u64,
    /// `[m, n]` of the output type, `output_stride` elements apart.
    pub output: u64,
    /// Elements from the start of one output row to the start of the next.
    pub output_stride: u64,
    /// Number of channels.
    pub n: u32,
    /// One of the constants in [`output_type`](crate::arguments::output_type).
    pub output_type: u32,
    /// Nonzero if every row of sums and of the output, the channel scales and the bias
    /// start at multiples of 16 bytes.
    pub is_aligned: u32,
    /// The pieces of [`SCALE_SUMS_CHANNELS`] channels in all tokens, each for one thread.
    pub pieces: u32,
    /// Divides by the number of pieces in each token.
    pub by_token_pieces: Divisor,
}
