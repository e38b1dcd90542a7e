//! The kernel for AVX-512 VNNI: one instruction multiplies and adds 64 byte pairs.
//!
//! `vpdpbusd` wants one factor unsigned, and `q·s + a` before its XOR is just that: the weight plus 128. So the
//! XOR is left out and `128 · Σx` taken off each token's sums instead. The sums wrap on the way, but the true
//! result fits int32, and arithmetic modulo 2³² ends on it exactly.

use std::arch::x86_64::{
    __m512i, _mm512_dpbusd_epi32, _mm512_loadu_si512, _mm512_set1_epi32, _mm512_storeu_si512,
};

use liquidgemm_format::brick::{BRICK_BYTES, BRICK_CHANNELS, BRICK_K};

use super::{Accumulators, CHUNK_K, Task, TokenBlock, dequantize_brick};

/// Runs of four weights along K in a chunk.
const CHUNK_FOURS: usize = CHUNK_K / 4;
/// int32 lanes of a register.
const LANES: usize = 16;
/// Registers' worth of channels that are accumulated together.
const REGISTERS: usize = 2;

/// One chunk of K, four elements along K a word.
#[derive(Default)]
pub(super) struct Panels {
    /// Weights plus 128, `[CHUNK_FOURS][64 channels]`.
    weights: Vec<[u32; BRICK_CHANNELS]>,
    /// Activations, `[tokens][CHUNK_FOURS]`, with zeros behind K.
    x: Vec<[u32; CHUNK_FOURS]>,
}

/// Whether this CPU has all the instructions that [`accumulate`] is compiled for.
pub(super) fn is_available() -> bool {
    std::is_x86_feature_detected!("avx512f")
        && std::is_x86_feature_detected!("avx512bw")
        && std::is_x86_feature_detected!("avx512vl")
        && std::is_x86_feature_detected!("avx512vnni")
}

/// Adds one chunk's products.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) fn accumulate(bricks: &[u8], x: &TokenBlock<'_>, chunk: usize, task: &mut Task) {
    let Panels { weights, x: panel_x } = &mut task.vnni;
    weights.resize(CHUNK_FOURS, [0; BRICK_CHANNELS]);
    for (index, brick) in bricks.chunks_exact(BRICK_BYTES).enumerate() {
        let multiply_add = |nibbles: u32, s: u32, a4: u32| nibbles.wrapping_mul(s).wrapping_add(a4);
        let weights = &mut weights[index * BRICK_K / 4..][..BRICK_K / 4];
        dequantize_brick(brick, multiply_add, |channel, k, four| weights[k / 4][channel] = four);
    }

    panel_x.resize(x.count, [0; CHUNK_FOURS]);
    for (token, (words, accumulators)) in panel_x.iter_mut().zip(&mut task.accumulators).enumerate() {
        let codes = x.codes(token, chunk);
        let mut padded = [0i8; CHUNK_K];
        padded[..codes.len()].copy_from_slice(codes);
        for (word, four) in words.iter_mut().zip(padded.as_chunks::<4>().0) {
            *word = u32::from_le_bytes(four.map(|code| code as u8));
        }
        let sum: i32 = padded.iter().map(|&code| i32::from(code)).sum();
        for accumulator in accumulators {
            *accumulator = accumulator.wrapping_sub(128 * sum);
        }
    }

    let weights = &weights[..bricks.len() / BRICK_BYTES * (BRICK_K / 4)];
    let (eights, x_rest) = panel_x.as_chunks::<8>();
    let (accumulator_eights, accumulator_rest) = task.accumulators.as_chunks_mut::<8>();
    for (x, accumulators) in eights.iter().zip(accumulator_eights) {
        multiply(weights, x, accumulators);
    }
    let (pairs, x_rest) = x_rest.as_chunks::<2>();
    let (accumulator_pairs, accumulator_rest) = accumulator_rest.as_chunks_mut::<2>();
    for (x, accumulators) in pairs.iter().zip(accumulator_pairs) {
        multiply(weights, x, accumulators);
    }
    let (singles, accumulator_singles) = (x_rest.as_chunks::<1>().0, accumulator_rest.as_chunks_mut::<1>().0);
    for (x, accumulators) in singles.iter().zip(accumulator_singles) {
        multiply(weights, x, accumulators);
    }
}

/// Adds the products of a chunk's weights with `T` tokens, whose sums stay in registers meanwhile.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn multiply<const T: usize>(
    weights: &[[u32; BRICK_CHANNELS]],
    x: &[[u32; CHUNK_FOURS]; T],
    accumulators: &mut [Accumulators; T],
) {
    for part in 0..BRICK_CHANNELS / (LANES * REGISTERS) {
        let first = |register: usize| (part * REGISTERS + register) * LANES;
        let mut sums: [[__m512i; REGISTERS]; T] = [[_mm512_set1_epi32(0); REGISTERS]; T];
        for token in 0..T {
            for register in 0..REGISTERS {
                let lanes: &[i32] = &accumulators[token][first(register)..][..LANES];
                // SAFETY: `lanes` is 16 int32, the 64 bytes that an unaligned load reads.
                sums[token][register] = unsafe { _mm512_loadu_si512(lanes.as_ptr().cast()) };
            }
        }
        for (four, weights) in weights.iter().enumerate() {
            let mut w = [_mm512_set1_epi32(0); REGISTERS];
            for register in 0..REGISTERS {
                let lanes: &[u32] = &weights[first(register)..][..LANES];
                // SAFETY: `lanes` is 16 words, the 64 bytes that an unaligned load reads.
                w[register] = unsafe { _mm512_loadu_si512(lanes.as_ptr().cast()) };
            }
            for token in 0..T {
                let x = _mm512_set1_epi32(x[token][four] as i32);
                for register in 0..REGISTERS {
                    sums[token][register] = _mm512_dpbusd_epi32(sums[token][register], w[register], x);
                }
            }
        }
        for token in 0..T {
            for register in 0..REGISTERS {
                let lanes: &mut [i32] = &mut accumulators[token][first(register)..][..LANES];
                // SAFETY: `lanes` is 16 int32, the 64 bytes that an unaligned store writes.
                unsafe { _mm512_storeu_si512(lanes.as_mut_ptr().cast(), sums[token][register]) };
            }
        }
    }
}
