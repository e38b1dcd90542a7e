//! The kernel in plain Rust: dot products along K over int16, which LLVM turns into multiply-add instructions
//! on every target (`pmaddwd`, `smlal`).

use liquidgemm_format::brick::{BRICK_BYTES, BRICK_CHANNELS, BRICK_K};
use liquidgemm_format::dequant::multiply_add_flip;

use super::{CHUNK_K, Task, TokenBlock, dequantize_brick};

/// One chunk of K, widened to int16.
#[derive(Default)]
pub(super) struct Panels {
    /// `[64 channels][CHUNK_K]`.
    weights: Vec<[i16; CHUNK_K]>,
}

/// Adds one chunk's products, compiled for the target's baseline.
pub(super) fn accumulate(bricks: &[u8], x: &TokenBlock<'_>, chunk: usize, task: &mut Task) {
    accumulate_inlined(bricks, x, chunk, task);
}

/// Adds one chunk's products, compiled for AVX2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
pub(super) fn accumulate_avx2(bricks: &[u8], x: &TokenBlock<'_>, chunk: usize, task: &mut Task) {
    accumulate_inlined(bricks, x, chunk, task);
}

#[inline(always)]
fn accumulate_inlined(bricks: &[u8], x: &TokenBlock<'_>, chunk: usize, task: &mut Task) {
    let weights = &mut task.portable.weights;
    weights.resize(BRICK_CHANNELS, [0; CHUNK_K]);
    for (index, brick) in bricks.chunks_exact(BRICK_BYTES).enumerate() {
        dequantize_brick(brick, multiply_add_flip, |channel, k, four| {
            let place = &mut weights[channel][index * BRICK_K + k..][..4];
            place.copy_from_slice(&four.to_le_bytes().map(|weight| i16::from(weight as i8)));
        });
    }

    // Zeros meet the weights behind K: the padding's, and at K's end those of an earlier chunk.
    let mut token_x = [0i16; CHUNK_K];
    for (token, accumulators) in task.accumulators.iter_mut().enumerate() {
        let codes = x.codes(token, chunk);
        token_x[codes.len()..].fill(0);
        for (wide, &code) in token_x.iter_mut().zip(codes) {
            *wide = i16::from(code);
        }
        for (accumulator, weights) in accumulators.iter_mut().zip(weights.iter()) {
            *accumulator += dot(weights, &token_x);
        }
    }
}

#[inline(always)]
fn dot(a: &[i16; CHUNK_K], b: &[i16; CHUNK_K]) -> i32 {
    a.iter().zip(b).map(|(&a, &b)| i32::from(a) * i32::from(b)).sum()
}
