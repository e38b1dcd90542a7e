//! The kernel in portable Rust: dot products along K over int16.
//! LLVM compiles them to multiply-add instructions on every target (`pmaddwd`, `smlal`).

use liquidgemm_format::brick::{BRICK_CHANNELS, BRICK_K, code_at};
use liquidgemm_format::dequant::{broadcast, dequantize_word, multiply_add_flip};

use super::{CHUNK_K, Task, TokenBlock};
use crate::packed::Brick;

/// The weights of one chunk of K, widened to int16.
#[derive(Default)]
pub(super) struct Panels {
    /// `[64 channels][CHUNK_K]`.
    weights: Vec<[i16; CHUNK_K]>,
}

/// Adds the products of one chunk of K to the accumulators.
pub(super) fn accumulate(bricks: &[Brick<'_>], x: &TokenBlock<'_>, chunk: usize, task: &mut Task) {
    let weights = &mut task.portable.weights;
    weights.resize(BRICK_CHANNELS, [0; CHUNK_K]);
    for (index, &brick) in bricks.iter().enumerate() {
        dequantize_brick(brick, |channel, values| {
            let place: &mut [i16; BRICK_K] =
                weights[channel][index * BRICK_K..].first_chunk_mut().expect("a chunk is whole bricks");
            *place = values.map(i16::from);
        });
    }

    // Beyond K the activations are zeros. The weights there are padding, or remain from an earlier chunk.
    let mut token_x = [0i16; CHUNK_K];
    for (token, accumulators) in task.accumulators.iter_mut().enumerate() {
        let codes = x.codes(token, chunk);
        token_x[codes.len()..].fill(0);
        for (wide, &code) in token_x.iter_mut().zip(codes) {
            *wide = i16::from(code);
        }
        for (accumulator, weights) in accumulators.iter_mut().zip(weights.iter()) {
            *accumulator = accumulator.wrapping_add(dot(weights, &token_x));
        }
    }
}

// Not inlined: otherwise LLVM widens the activations to int32 once for all channels,
// and narrows them again for each channel.
#[inline(never)]
fn dot(a: &[i16; CHUNK_K], b: &[i16; CHUNK_K]) -> i32 {
    a.iter().zip(b).map(|(&a, &b)| i32::from(a) * i32::from(b)).sum()
}

/// Dequantizes one brick and calls `store(channel, weights)` for each of its 64 channels.
#[inline(always)]
fn dequantize_brick(Brick { codes, pairs }: Brick<'_>, mut store: impl FnMut(usize, [i8; BRICK_K])) {
    // A 32-bit word of pairs serves two channels, whose codes take 64 bytes.
    // Even words of codes belong to the first channel, odd ones to the second.
    for (piece, (codes, pairs)) in codes.as_chunks::<64>().0.iter().zip(pairs.as_chunks::<4>().0).enumerate()
    {
        let mut channels = [[0u32; BRICK_K / 4]; 2];
        for (word, codes) in codes.as_chunks::<4>().0.iter().enumerate() {
            let (s, a) = (pairs[word % 2 * 2], pairs[word % 2 * 2 + 1]);
            let fours =
                dequantize_word(u32::from_le_bytes(*codes), u32::from(s), broadcast(a), multiply_add_flip);
            for (four, high) in fours.into_iter().zip([false, true]) {
                let (_, k) = code_at(4 * word, high);
                channels[word % 2][k / 4] = four.to_le();
            }
        }
        for (word, fours) in channels.into_iter().enumerate() {
            let (channel, _) = code_at(64 * piece + 4 * word, false);
            store(channel, bytemuck::cast(fours));
        }
    }
}
