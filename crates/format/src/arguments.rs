//! What the host passes to the GEMM kernels by value.

use crate::brick::BRICK_CHANNELS;
use crate::schedule::Schedule;
use crate::skinny::UnitShares;
use crate::stream::WeightStream;

/// The type of the result, as the kernel's `output_type` says it.
pub mod output_type {
    /// bfloat16.
    pub const BF16: u32 = 0;
    /// IEEE half precision.
    pub const F16: u32 = 1;
    /// IEEE single precision.
    pub const F32: u32 = 2;
    /// The raw accumulator.
    pub const I32: u32 = 3;
}

/// Packed weights as the kernels find them. Pointers are device addresses.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct WeightsArguments {
    /// The strips, as [`WeightStream`] has them.
    pub strips: u64,
    /// f32 `[n]`, level-1 scale of each channel.
    pub channel_scales: u64,
    /// How the strips are laid out.
    pub stream: WeightStream,
}

/// Arguments of the GEMM kernels. Pointers are device addresses.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct GemmArguments {
    /// The weights of the n channels.
    pub weights: WeightsArguments,
    /// f32 `[m]`, scale of each token.
    pub token_scales: u64,
    /// f32 `[n]`, or 0 for none.
    pub bias: u64,
    /// `[m, n]`, row-major with `output_stride` elements from row to row.
    pub output: u64,
    /// One slot of [`crate::tile::TileShape::partial_bytes`] for each worker.
    pub partials: u64,
    /// One u32 for each worker and consumer, zero between launches.
    pub flags: u64,
    /// Tokens.
    pub m: u32,
    /// Output channels.
    pub n: u32,
    /// Cycles from one stage of the ring's first turn to the next, in which memory delivers all blocks' weights of a stage. What the launch
    /// asked for sooner would only stand in the way of the first activations.
    pub first_turn_cycles: u32,
    /// Elements from one row of the output to the next.
    pub output_stride: u32,
    /// One of [`output_type`].
    pub output_type: u32,
    /// Who computes what. From an offset that is a multiple of 8 the compiler would copy parts of it through local memory, which
    /// `cargo xtask ptx` refuses.
    pub schedule: Schedule,
    /// Whether the kernel's map of the output may be used: 16-bit elements in rows on 16 bytes.
    pub output_is_mapped: u32,
}

impl GemmArguments {
    /// 64-channel strips of the output.
    #[inline(always)]
    #[must_use]
    pub const fn strips(&self) -> u32 {
        self.n.div_ceil(BRICK_CHANNELS as u32)
    }
}

/// Arguments of the kernels for few tokens. Pointers are device addresses.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct SkinnyArguments {
    /// The weights of the n channels.
    pub weights: WeightsArguments,
    /// f32 `[m]`, scale of each token.
    pub token_scales: u64,
    /// f32 `[n]`, or 0 for none.
    pub bias: u64,
    /// `[m, n]`, row-major with `output_stride` elements from row to row.
    pub output: u64,
    /// Tokens.
    pub m: u32,
    /// Output channels.
    pub n: u32,
    /// Elements from one row of the output to the next.
    pub output_stride: u32,
    /// One of [`output_type`].
    pub output_type: u32,
    /// Who computes which channels.
    pub shares: UnitShares,
}
