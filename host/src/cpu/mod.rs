//! The CPU backend: the exact integer GEMM and its epilogue, on all cores.
//!
//! It serves machines without a GPU and is the reference for every GPU test.
//! It follows the format's definition: dequantize to int8, multiply, accumulate in int32, scale.
//! A task is one strip of 64 channels times a block of tokens.
//! It dequantizes a chunk of K once and multiplies all of its tokens with it.
//! A [`Kernel`] is the inner loop for one instruction set. All kernels give the same bits.

mod activations;
pub(crate) mod arithmetic;
#[cfg(target_arch = "x86_64")]
mod avx2;
mod combine;
mod grouped;
mod portable;
mod row_parallel;
#[cfg(target_arch = "x86_64")]
mod vnni;

use std::fmt;
use std::sync::OnceLock;

pub use activations::{QuantizeInput, Residual, quantize};

use liquidgemm_format::brick::{BRICK_CHANNELS, BRICK_K};
use rayon::prelude::*;

pub use combine::{Combined, combine};
pub use grouped::{RowIndex, grouped_gemm};
pub use row_parallel::row_parallel;

use crate::check::check_call;
use crate::packed::Brick;
use crate::{ActivationsView, Error, Output, PackedWeights};

/// Bricks that a task dequantizes at a time. As int8 they take 16 KiB, half of a typical L1 cache.
const CHUNK_BRICKS: usize = 4;
/// Elements along K in a chunk.
const CHUNK_K: usize = CHUNK_BRICKS * BRICK_K;

/// Tokens per task if there are enough strips to keep all cores busy.
const LONG_TOKEN_BLOCK: usize = 256;
/// Tokens per task otherwise.
const SHORT_TOKEN_BLOCK: usize = 64;
/// Output rows that are divided among tasks at a time. This limits the memory for the list of tasks.
const ROWS_AT_ONCE: usize = 1024;

/// The accumulators of one token for the channels of a strip.
type Accumulators = [i32; BRICK_CHANNELS];

/// Computes `out[m, n] = epilogue(Σₖ x[m, k] · int8_weight[n, k])`, row-major and exact before the epilogue.
///
/// `bias` is `[n]`, and `out` has exactly `m · n` elements; `m` may be 0.
/// The epilogue is [`Output::from_accumulator`]. `out` is written only if all checks pass.
///
/// Sums are int32 and wrap, as on the GPU.
/// One case wraps: K = 131,072 with every activation and every int8 weight of the sum equal to −128.
///
/// # Errors
/// - [`Error::KMismatch`] if weights and activations differ in K.
/// - [`Error::ShapeMismatch`] if `out` is not `[m, n]` or `bias` is not `[n]`.
/// - [`Error::TooLarge`] if `[m, n]` exceeds the address space.
/// - [`Error::NonFiniteParameter`] if a bias is not finite.
/// - [`Error::BiasWithRawOutput`] for a bias with `i32` output.
pub fn gemm<'a, T: Output>(
    weights: &PackedWeights,
    x: impl Into<ActivationsView<'a>>,
    bias: Option<&[f32]>,
    out: &mut [T],
) -> Result<(), Error> {
    let x = x.into();
    check_call::<T>([weights.n(), weights.k()], &x, bias, out.len())?;
    multiply(Kernel::best(), weights, &x, bias, out);
    Ok(())
}

/// An instruction set of the inner loop. All kernels give the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kernel {
    /// Portable Rust, compiled for the target's baseline instructions.
    Portable,
    /// AVX2. It multiplies 4-bit codes before it applies their pairs, because their int16 sums are exact.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 VNNI, with int8 dot products.
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni,
}

impl Kernel {
    /// Returns the fastest kernel that this CPU supports. [`gemm`] uses it.
    pub fn best() -> Self {
        static BEST: OnceLock<Kernel> = OnceLock::new();
        *BEST.get_or_init(|| Self::available().last().unwrap_or(Kernel::Portable))
    }

    /// All kernels for the target's architecture, slowest first.
    pub const ALL: &[Kernel] = &[
        Kernel::Portable,
        #[cfg(target_arch = "x86_64")]
        Kernel::Avx2,
        #[cfg(target_arch = "x86_64")]
        Kernel::Avx512Vnni,
    ];

    /// Returns whether this CPU supports the kernel.
    pub fn is_available(self) -> bool {
        match self {
            Kernel::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx2 => avx2::is_available(),
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx512Vnni => vnni::is_available(),
        }
    }

    /// Returns the kernels that this CPU supports, slowest first.
    fn available() -> impl Iterator<Item = Self> {
        Self::ALL.iter().copied().filter(|kernel| kernel.is_available())
    }

    /// Adds the products of one chunk of bricks to the accumulators of every token in `x`.
    fn accumulate(self, bricks: &[Brick<'_>], x: &TokenBlock<'_>, chunk: usize, task: &mut Task) {
        match self {
            Kernel::Portable => portable::accumulate(bricks, x, chunk, task),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: all callers take kernels from `available`, which checks the CPU for AVX2.
            Kernel::Avx2 => unsafe { avx2::accumulate(bricks, x, chunk, task) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: all callers take kernels from `available`, which checks the CPU for AVX-512 VNNI.
            Kernel::Avx512Vnni => unsafe { vnni::accumulate(bricks, x, chunk, task) },
        }
    }
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Kernel::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx2 => "AVX2",
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx512Vnni => "AVX-512 VNNI",
        })
    }
}

/// The tokens of a task.
struct TokenBlock<'a> {
    x: &'a ActivationsView<'a>,
    first: usize,
    count: usize,
}

impl TokenBlock<'_> {
    /// Returns the activations of `token` for one chunk of K: [`CHUNK_K`] codes, or fewer at the end of K.
    /// `token` counts from the block's first.
    #[inline(always)]
    fn codes(&self, token: usize, chunk: usize) -> &[i8] {
        let row = self.x.row(self.first + token);
        let start = chunk * CHUNK_K;
        &row[start..row.len().min(start + CHUNK_K)]
    }
}

/// The working memory of a task. Each thread has one and reuses it.
#[derive(Default)]
struct Task {
    /// `[tokens][64]`.
    accumulators: Vec<Accumulators>,
    portable: portable::Panels,
    #[cfg(target_arch = "x86_64")]
    avx2: avx2::Panels,
    #[cfg(target_arch = "x86_64")]
    vnni: vnni::Panels,
}

/// Calls `multiply` for each whole group of `T` tokens and returns the remaining tokens.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn by_tokens<'a, 'x, const T: usize, X>(
    accumulators: &'a mut [Accumulators],
    x: &'x [X],
    mut multiply: impl FnMut(&mut [Accumulators; T], &[X; T]),
) -> (&'a mut [Accumulators], &'x [X]) {
    let (accumulator_groups, accumulators) = accumulators.as_chunks_mut::<T>();
    let (x_groups, x) = x.as_chunks::<T>();
    for (accumulators, x) in accumulator_groups.iter_mut().zip(x_groups) {
        multiply(accumulators, x);
    }
    (accumulators, x)
}

/// The output of one strip for a block of tokens: one slice per token.
struct OutputBlock<'a, T> {
    strip: usize,
    first_token: usize,
    rows: Vec<&'a mut [T]>,
}

/// Computes the product. The caller has checked the operands.
fn multiply<T: Output>(
    kernel: Kernel,
    weights: &PackedWeights,
    x: &ActivationsView<'_>,
    bias: Option<&[f32]>,
    out: &mut [T],
) {
    let enough_strips = weights.strips() >= 4 * rayon::current_num_threads();
    let token_block = if enough_strips { LONG_TOKEN_BLOCK } else { SHORT_TOKEN_BLOCK };
    for (index, rows) in out.chunks_mut(ROWS_AT_ONCE * weights.n()).enumerate() {
        deal_out(rows, index * ROWS_AT_ONCE, weights.n(), token_block).into_par_iter().for_each_init(
            Task::default,
            |task, block| {
                multiply_block(kernel, weights, x, &block, task);
                write_block(weights, x, bias, block, &task.accumulators);
            },
        );
    }
}

/// Divides output rows into blocks of 64 channels × `token_block` tokens.
///
/// `rows` is `[rows, n]` and begins with row `first_row` of the output.
fn deal_out<T>(rows: &mut [T], first_row: usize, n: usize, token_block: usize) -> Vec<OutputBlock<'_, T>> {
    let mut blocks = Vec::new();
    for (index, rows) in rows.chunks_mut(token_block * n).enumerate() {
        let first_token = first_row + index * token_block;
        let first_block = blocks.len();
        blocks.extend((0..n.div_ceil(BRICK_CHANNELS)).map(|strip| OutputBlock {
            strip,
            first_token,
            rows: Vec::with_capacity(rows.len() / n),
        }));
        for row in rows.chunks_mut(n) {
            for (block, piece) in blocks[first_block..].iter_mut().zip(row.chunks_mut(BRICK_CHANNELS)) {
                block.rows.push(piece);
            }
        }
    }
    blocks
}

/// Computes the exact sums of one block into `task.accumulators`.
fn multiply_block<T>(
    kernel: Kernel,
    weights: &PackedWeights,
    x: &ActivationsView<'_>,
    block: &OutputBlock<'_, T>,
    task: &mut Task,
) {
    let tokens = TokenBlock { x, first: block.first_token, count: block.rows.len() };
    task.accumulators.clear();
    task.accumulators.resize(tokens.count, [0; BRICK_CHANNELS]);
    let last = weights.k_blocks() - 1;
    for (chunk, first) in (0..=last).step_by(CHUNK_BRICKS).enumerate() {
        let bricks: [Brick<'_>; CHUNK_BRICKS] =
            std::array::from_fn(|index| weights.brick(block.strip, last.min(first + index)));
        kernel.accumulate(&bricks[..CHUNK_BRICKS.min(last + 1 - first)], &tokens, chunk, task);
    }
}

/// Applies the epilogue to one block.
fn write_block<T: Output>(
    weights: &PackedWeights,
    x: &ActivationsView<'_>,
    bias: Option<&[f32]>,
    block: OutputBlock<'_, T>,
    accumulators: &[Accumulators],
) {
    let first_channel = block.strip * BRICK_CHANNELS;
    let channel_scales = &weights.channel_scales()[first_channel..];
    let bias = bias.map(|bias| &bias[first_channel..]);
    let token_scales = &x.scales()[block.first_token..];
    for ((row, accumulators), &token_scale) in block.rows.into_iter().zip(accumulators).zip(token_scales) {
        for (channel, (y, &acc)) in row.iter_mut().zip(accumulators).enumerate() {
            let bias = bias.map(|bias| bias[channel]);
            *y = T::from_accumulator(acc, channel_scales[channel], token_scale, bias);
        }
    }
}

#[cfg(test)]
mod tests;
