//! The CPU backend: the exact integer GEMM and its epilogue, on all cores.
//!
//! It is the default where there is no GPU and the oracle for every GPU test, so it does what the format's
//! definition says and nothing else: dequantize to int8, multiply, add in int32, scale. A task is one strip of
//! 64 channels times a block of tokens; it dequantizes a chunk of K once and multiplies all of its tokens with
//! it. Which instructions do that is a [`Kernel`]; every kernel gives the same bits.

#[cfg(target_arch = "x86_64")]
mod avx2;
mod portable;
#[cfg(target_arch = "x86_64")]
mod vnni;

use std::fmt;
use std::sync::OnceLock;

use liquidgemm_format::brick::{BRICK_CHANNELS, BRICK_K};
use rayon::prelude::*;

use crate::error::{check_finite, check_length, checked_elements};
use crate::packed::Brick;
use crate::{ActivationsView, Error, Output, OutputType, PackedWeights};

/// Bricks that a task dequantizes at once: as int8 they take 16 KiB, half of a usual L1 cache.
const CHUNK_BRICKS: usize = 4;
/// Elements along K of such a chunk.
const CHUNK_K: usize = CHUNK_BRICKS * BRICK_K;

/// Tokens a task multiplies with each dequantized chunk, where there are strips enough to keep all cores busy …
const LONG_TOKEN_BLOCK: usize = 256;
/// … and where there are not.
const SHORT_TOKEN_BLOCK: usize = 64;
/// Rows of the output that are dealt out to tasks at a time, to bound the bookkeeping.
const ROWS_AT_ONCE: usize = 1024;

/// The accumulators of one token for a strip's channels.
type Accumulators = [i32; BRICK_CHANNELS];

/// `out[m, n] = epilogue(Σₖ x[m, k] · level1[n, k])`, row-major, exact before the epilogue. With `m = 0` there is nothing to do.
///
/// The sums are int32 and wrap like the GPU's. They can't, but where K is 131,072 and every activation and every weight of the sum is −128.
///
/// `bias` is `[n]`; `out` has exactly `m · n` elements and is written only if everything was in order. The
/// epilogue is [`Output::from_accumulator`].
///
/// # Errors
/// K of weights and activations that differ, an `out` or `bias` of another length, a bias that is not finite,
/// a bias with `i32` output.
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

/// Everything that must hold before a product with weights `[n, k]` may be written to `out_length` elements.
pub(crate) fn check_call<T: Output>(
    [n, k]: [usize; 2],
    x: &ActivationsView<'_>,
    bias: Option<&[f32]>,
    out_length: usize,
) -> Result<(), Error> {
    if k != x.k() {
        return Err(Error::KMismatch { weights: k, activations: x.k() });
    }
    check_length("output", "[m, n]", checked_elements("output matrix", x.m(), n)?, out_length)?;
    if let Some(bias) = bias {
        if T::TYPE == OutputType::I32 {
            return Err(Error::BiasWithRawOutput);
        }
        check_length("bias", "[n]", n, bias.len())?;
        check_finite("bias", bias)?;
    }
    Ok(())
}

/// The instructions that the inner loop runs on. All kernels give the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kernel {
    /// Whatever the compiler makes of it for the target's baseline.
    Portable,
    /// AVX2, whose int8 products are exact while the weights are still 4-bit codes.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 with its int8 dot products.
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni,
}

impl Kernel {
    /// The fastest kernel that this CPU has the instructions for; what [`gemm`] uses.
    pub fn best() -> Self {
        static BEST: OnceLock<Kernel> = OnceLock::new();
        *BEST.get_or_init(|| Self::available().last().unwrap_or(Kernel::Portable))
    }

    /// Every kernel for the target's architecture, slowest first.
    pub const ALL: &[Kernel] = &[
        Kernel::Portable,
        #[cfg(target_arch = "x86_64")]
        Kernel::Avx2,
        #[cfg(target_arch = "x86_64")]
        Kernel::Avx512Vnni,
    ];

    /// Whether this CPU has the instructions for it.
    pub fn is_available(self) -> bool {
        match self {
            Kernel::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx2 => avx2::is_available(),
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx512Vnni => vnni::is_available(),
        }
    }

    /// Those that this CPU has the instructions for.
    fn available() -> impl Iterator<Item = Self> {
        Self::ALL.iter().copied().filter(|kernel| kernel.is_available())
    }

    /// Adds the products of one chunk of bricks to the accumulators of every token in `x`.
    fn accumulate(self, bricks: &[Brick<'_>], x: &TokenBlock<'_>, chunk: usize, task: &mut Task) {
        match self {
            Kernel::Portable => portable::accumulate(bricks, x, chunk, task),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: only kernels from `available` get here, which has asked the CPU for AVX2.
            Kernel::Avx2 => unsafe { avx2::accumulate(bricks, x, chunk, task) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: only kernels from `available` get here, which has asked the CPU for AVX-512 VNNI.
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

/// The tokens that a task multiplies.
struct TokenBlock<'a> {
    x: &'a ActivationsView<'a>,
    first: usize,
    count: usize,
}

impl TokenBlock<'_> {
    /// The part of token `token` (counted from the block's first) that meets chunk `chunk` of K: up to
    /// [`CHUNK_K`] codes, fewer at the end of K.
    #[inline(always)]
    fn codes(&self, token: usize, chunk: usize) -> &[i8] {
        let row = self.x.row(self.first + token);
        let start = chunk * CHUNK_K;
        &row[start..row.len().min(start + CHUNK_K)]
    }
}

/// The memory that a task works in; one a thread, used again for the next task.
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

/// Calls `multiply` for as many whole groups of `T` tokens as there are, and gives back the rest.
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

/// One strip's channels of the output for a block of tokens: one slice a token.
struct OutputBlock<'a, T> {
    strip: usize,
    first_token: usize,
    rows: Vec<&'a mut [T]>,
}

/// The product itself; the operands fit.
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

/// Cuts rows of the output, `[rows, n]` from row `first_row` on, into blocks of 64 channels × `token_block`.
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

/// Leaves the exact products of one block in `task.accumulators`.
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

/// The epilogue of one block.
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
