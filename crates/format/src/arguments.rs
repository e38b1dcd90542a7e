//! The arguments that the host passes to the GEMM kernels by value.
//!
//! `host/src/gpu/gemm.rs`, `skinny.rs`, `grouped.rs` and `combine.rs` beside it fill them.
//! `kernels-gpu/src/gemm`, `skinny`, `grouped` and `combine.rs` beside them read them.

use crate::brick::BRICK_CHANNELS;
use crate::divisor::Divisor;
use crate::grouped::GroupedSchedule;
use crate::schedule::Schedule;
use crate::skinny::TileRuns;
use crate::stream::WeightStream;

/// The values of the arguments' `output_type`: the element type of the output.
pub mod output_type {
    /// bfloat16.
    pub const BF16: u32 = 0;
    /// IEEE half precision.
    pub const F16: u32 = 1;
    /// IEEE single precision.
    pub const F32: u32 = 2;
    /// The raw int32 accumulator.
    pub const I32: u32 = 3;
}

/// Packed weights in device memory. Pointers are device addresses.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct WeightsArguments {
    /// The strips of packed weights, laid out as [`WeightStream`] describes.
    pub strips: u64,
    /// f32 `[n]`: the scale of each channel's int8 weights.
    pub channel_scales: u64,
    /// The layout of the strips.
    pub stream: WeightStream,
}

/// Arguments of the tiled GEMM kernels. Pointers are device addresses.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct GemmArguments {
    /// The packed weights of the n channels.
    pub weights: WeightsArguments,
    /// f32 `[m]`: the scale of each token.
    pub token_scales: u64,
    /// f32 `[n]`, or 0 for no bias.
    pub bias: u64,
    /// The output `[m, n]`, row-major with `output_stride` elements between the starts of rows.
    pub output: u64,
    /// Partial sums for stream-K.
    /// There is one slot of [`crate::tile::TileShape::partial_bytes`] for each thread block.
    pub partials: u64,
    /// Flags for stream-K: one u32 for each consumer of each thread block.
    /// They are zero between launches.
    pub flags: u64,
    /// Number of tokens.
    pub m: u32,
    /// Number of output channels.
    pub n: u32,
    /// Clock cycles from one stage to the next in the ring's first turn.
    /// In this time memory delivers one stage of weights to all thread blocks.
    /// Faster loads would only delay the first activations.
    pub first_turn_cycles: u32,
    /// Elements from the start of one output row to the start of the next.
    pub output_stride: u32,
    /// One of the constants in [`output_type`].
    pub output_type: u32,
    /// Assigns the tiles and their k-iterations to persistent clusters.
    /// The offset of this field must not be a multiple of 8.
    /// Otherwise the compiler copies parts of it through local memory, which `cargo xtask ptx` rejects.
    pub schedule: Schedule,
    /// Nonzero if the kernel may use its tensor map of the output.
    /// The output then has 16-bit elements, and its rows start at multiples of 16 bytes.
    pub output_is_mapped: u32,
}

impl GemmArguments {
    /// Returns the number of 64-channel strips of the output.
    #[inline(always)]
    #[must_use]
    pub const fn strips(&self) -> u32 {
        self.n.div_ceil(BRICK_CHANNELS as u32)
    }
}

/// Arguments of the skinny kernels (up to 32 tokens). Pointers are device addresses.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct SkinnyArguments {
    /// The packed weights of the n channels.
    pub weights: WeightsArguments,
    /// f32 `[m]`: the scale of each token.
    pub token_scales: u64,
    /// f32 `[n]`, or 0 for no bias.
    pub bias: u64,
    /// The output `[m, n]`, row-major with `output_stride` elements between the starts of rows.
    pub output: u64,
    /// Number of tokens.
    pub m: u32,
    /// Number of output channels.
    pub n: u32,
    /// Elements from the start of one output row to the start of the next.
    pub output_stride: u32,
    /// One of the constants in [`output_type`].
    pub output_type: u32,
    /// The m16 tiles of each thread block.
    pub runs: TileRuns,
}

/// Arguments of the grouped GEMM kernels. Pointers are device addresses.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct GroupedArguments {
    /// The packed weights of the first expert's n channels, and the channel scales f32 `[experts, n]`.
    pub weights: WeightsArguments,
    /// Bytes from the strips of one expert to those of the next.
    pub expert_bytes: u64,
    /// i32: the offsets `[experts + 1]` of contiguous rows, or the counts `[experts]` of masked ones.
    pub index: u64,
    /// A u32 that the launch sets to one of the values in [`status`](crate::grouped::status), or 0 for none.
    pub status: u64,
    /// f32: the scale of each row.
    pub token_scales: u64,
    /// f32 `[experts, n]`, or 0 for no bias.
    pub bias: u64,
    /// The output, one row for each row of the activations,
    /// with `output_stride` elements between the starts of rows.
    pub output: u64,
    /// Number of output channels of each expert.
    pub n: u32,
    /// Clock cycles from one stage to the next in the ring's first turn, as in [`GemmArguments`].
    pub first_turn_cycles: u32,
    /// Elements from the start of one output row to the start of the next.
    pub output_stride: u32,
    /// One of the constants in [`output_type`].
    pub output_type: u32,
    /// Nonzero if the kernel may use its tensor map of the output, as in [`GemmArguments`].
    pub output_is_mapped: u32,
    /// Assigns the tiles of all experts to persistent clusters.
    pub schedule: GroupedSchedule,
}

/// Arguments of the combine kernel. Pointers are device addresses.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct CombineArguments {
    /// The rows to combine, `[rows, n]` of 16-bit elements, `rows_stride` elements apart.
    pub rows: u64,
    /// i32 `[tokens, top_k]`: the row of each token's choices. A value outside `0..row_count` is skipped.
    pub positions: u64,
    /// f32 `[tokens, top_k]`: the weight of each choice.
    pub weights: u64,
    /// The output, `[tokens, n]` of the same element type, `output_stride` elements apart.
    pub output: u64,
    /// Number of tokens.
    pub tokens: u32,
    /// Choices of each token.
    pub top_k: u32,
    /// Number of rows.
    pub row_count: u32,
    /// Elements of a row.
    pub n: u32,
    /// Elements from the start of one row to the start of the next.
    pub rows_stride: u32,
    /// Elements from the start of one output row to the start of the next.
    pub output_stride: u32,
    /// [`output_type::BF16`] or [`output_type::F16`].
    pub element_type: u32,
    /// Nonzero if every row starts at a multiple of 16 bytes.
    pub is_aligned: u32,
    /// Divides by the number of thread blocks of each token.
    pub by_token_blocks: Divisor,
}
