//! The AVX-512 VNNI kernel: one instruction multiplies 64 byte pairs and accumulates the products.
//!
//! `vpdpbusd` takes one unsigned operand. `q·s + a` without its XOR is unsigned: the int8 weight plus 128.
//! The kernel therefore leaves out the XOR and subtracts `128 · Σx` from each token's sums.
//! Partial sums may wrap, but the true result fits int32, so arithmetic modulo 2³² ends on it exactly.
//!
//! There are two loop orders.
//! For many tokens, a chunk of weights is dequantized into a panel with channels as lanes,
//! and each token's activations are broadcast.
//! For few tokens, building the panel would cost more than the products.
//! The weights then stay in the brick's order, and the activations are permuted to match.

use std::arch::x86_64::{
    __m512i, _mm_add_epi32, _mm_extract_epi32, _mm256_add_epi32, _mm256_castsi256_si128,
    _mm256_extracti128_si256, _mm512_add_epi32, _mm512_and_si512, _mm512_castsi512_si256,
    _mm512_dpbusd_epi32, _mm512_extracti64x4_epi64, _mm512_loadu_si512, _mm512_mullo_epi32,
    _mm512_permutexvar_epi32, _mm512_set1_epi32, _mm512_set4_epi32, _mm512_setzero_si512,
    _mm512_shuffle_epi8, _mm512_shuffle_i64x2, _mm512_srli_epi32, _mm512_storeu_si512, _mm512_unpackhi_epi64,
    _mm512_unpacklo_epi64,
};

use liquidgemm_format::brick::{BRICK_K, CODE_BYTES, code_at};

use super::{Accumulators, CHUNK_BRICKS, CHUNK_K, Task, TokenBlock, by_tokens};
use crate::packed::Brick;

/// Groups of four weights along K in a chunk.
const CHUNK_FOURS: usize = CHUNK_K / 4;
/// int32 lanes of a register.
const LANES: usize = 16;
/// Registers of channels that are accumulated at a time.
const REGISTERS: usize = 2;

/// The most tokens for which the weights stay in the brick's order.
const FEW_TOKENS: usize = 8;
/// 64-byte pieces of a brick's codes. A piece holds two channels, whose pairs share one 32-bit word.
const PIECES: usize = CODE_BYTES / 64;

/// 32-bit words of four weights along K for all 64 channels, in the order of the pieces: two channels each.
type PanelRow = [u64; PIECES];

/// One chunk of K, four elements along K in a word.
#[derive(Default)]
pub(super) struct Panels {
    /// Weights plus 128, `[CHUNK_FOURS][PIECES]`: the words of a piece's two channels are adjacent.
    weights: Vec<PanelRow>,
    /// Activations, `[tokens][CHUNK_FOURS]`, with zeros beyond K.
    x: Vec<[u32; CHUNK_FOURS]>,
}

/// Whether this CPU has the instructions that [`accumulate`] is compiled for.
pub(super) fn is_available() -> bool {
    std::is_x86_feature_detected!("avx512f")
        && std::is_x86_feature_detected!("avx512bw")
        && std::is_x86_feature_detected!("avx512vl")
        && std::is_x86_feature_detected!("avx512vnni")
}

/// Adds the products of one chunk of K to the accumulators.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) fn accumulate(bricks: &[Brick<'_>], x: &TokenBlock<'_>, chunk: usize, task: &mut Task) {
    let Panels { weights, x: panel_x } = &mut task.vnni;
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

    if x.count <= FEW_TOKENS {
        let (accumulators, x) = (&mut task.accumulators[..], &panel_x[..]);
        let (accumulators, x) =
            by_tokens::<8, _>(accumulators, x, |acc, x| multiply_in_order(bricks, x, acc));
        let (accumulators, x) =
            by_tokens::<4, _>(accumulators, x, |acc, x| multiply_in_order(bricks, x, acc));
        let (accumulators, x) =
            by_tokens::<2, _>(accumulators, x, |acc, x| multiply_in_order(bricks, x, acc));
        by_tokens::<1, _>(accumulators, x, |acc, x| multiply_in_order(bricks, x, acc));
        return;
    }

    weights.resize(CHUNK_FOURS, [0; PIECES]);
    for (&brick, weights) in bricks.iter().zip(weights.as_chunks_mut().0) {
        fill_panel(brick, weights);
    }
    let weights = &weights[..bricks.len() * (BRICK_K / 4)];
    let (accumulators, x) = (&mut task.accumulators[..], &panel_x[..]);
    let (accumulators, x) = by_tokens::<8, _>(accumulators, x, |acc, x| multiply(weights, x, acc));
    let (accumulators, x) = by_tokens::<2, _>(accumulators, x, |acc, x| multiply(weights, x, acc));
    by_tokens::<1, _>(accumulators, x, |acc, x| multiply(weights, x, acc));
}

/// Dequantizes a brick into its 16 rows of the panel.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn fill_panel(brick: Brick<'_>, panel: &mut [PanelRow; BRICK_K / 4]) {
    // Eight transposed pieces are whole cache lines of the panel.
    for first in (0..PIECES).step_by(8) {
        let (mut low, mut high) = ([_mm512_setzero_si512(); 8], [_mm512_setzero_si512(); 8]);
        for (piece, (low, high)) in low.iter_mut().zip(&mut high).enumerate() {
            [*low, *high] = dequantize_piece(brick, first + piece);
        }
        for (pieces, is_high) in [(&low, false), (&high, true)] {
            for (pair, words) in transpose(pieces).into_iter().enumerate() {
                let (_, k) = code_at(8 * pair, is_high);
                store::<u64, 8>(
                    panel[k / 4][first..].first_chunk_mut().expect("32 is a multiple of 8"),
                    words,
                );
            }
        }
    }
}

/// Transposes an 8×8 matrix of 64-bit words.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn transpose(rows: &[__m512i; 8]) -> [__m512i; 8] {
    // Selects 128-bit quarters of two registers: the even ones of both, or the odd ones.
    const EVEN: i32 = 0b10_00_10_00;
    const ODD: i32 = 0b11_01_11_01;
    let mut columns = [_mm512_setzero_si512(); 8];
    for odd in 0..2 {
        // Quarter j of pairs[i]: column 2 j + odd of rows 2 i and 2 i + 1.
        let mut pairs = [_mm512_setzero_si512(); 4];
        for (pair, rows) in pairs.iter_mut().zip(rows.as_chunks::<2>().0) {
            *pair = if odd == 0 {
                _mm512_unpacklo_epi64(rows[0], rows[1])
            } else {
                _mm512_unpackhi_epi64(rows[0], rows[1])
            };
        }
        // Columns 0 and 4 (or 1 and 5) of the upper and of the lower four rows; below, 2 and 6 (or 3 and 7).
        let upper = _mm512_shuffle_i64x2::<EVEN>(pairs[0], pairs[1]);
        let lower = _mm512_shuffle_i64x2::<EVEN>(pairs[2], pairs[3]);
        columns[odd] = _mm512_shuffle_i64x2::<EVEN>(upper, lower);
        columns[odd + 4] = _mm512_shuffle_i64x2::<ODD>(upper, lower);
        let upper = _mm512_shuffle_i64x2::<ODD>(pairs[0], pairs[1]);
        let lower = _mm512_shuffle_i64x2::<ODD>(pairs[2], pairs[3]);
        columns[odd + 2] = _mm512_shuffle_i64x2::<EVEN>(upper, lower);
        columns[odd + 6] = _mm512_shuffle_i64x2::<ODD>(upper, lower);
    }
    columns
}

/// Adds the products of a chunk's weights with `T` tokens, whose sums stay in registers within the loop.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn multiply<const T: usize>(
    weights: &[PanelRow],
    x: &[[u32; CHUNK_FOURS]; T],
    accumulators: &mut [Accumulators; T],
) {
    for first_piece in (0..PIECES).step_by(REGISTERS * LANES / 2) {
        let mut sums = [[_mm512_setzero_si512(); REGISTERS]; T];
        for (four, weights) in weights.iter().enumerate() {
            let mut w = [_mm512_setzero_si512(); REGISTERS];
            for (register, w) in w.iter_mut().enumerate() {
                let pieces = weights[first_piece + register * LANES / 2..].first_chunk();
                *w = load::<u64, 8>(pieces.expect("32 is a multiple of 8"));
            }
            for (sums, x) in sums.iter_mut().zip(x) {
                let x = _mm512_set1_epi32(x[four] as i32);
                for (sum, w) in sums.iter_mut().zip(w) {
                    *sum = _mm512_dpbusd_epi32(*sum, w, x);
                }
            }
        }
        for (accumulators, sums) in accumulators.iter_mut().zip(sums) {
            for (register, sums) in sums.into_iter().enumerate() {
                let mut lanes = [0i32; LANES];
                store(&mut lanes, sums);
                for (lane, sum) in lanes.into_iter().enumerate() {
                    let piece = first_piece + register * LANES / 2 + lane / 2;
                    let (channel, _) = code_at(64 * piece + 4 * (lane % 2), false);
                    accumulators[channel] = accumulators[channel].wrapping_add(sum);
                }
            }
        }
    }
}

/// Adds the products of a chunk's bricks with `T` tokens, with the weights in the brick's order.
/// A lane is one 32-bit word of codes.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn multiply_in_order<const T: usize>(
    bricks: &[Brick<'_>],
    x: &[[u32; CHUNK_FOURS]; T],
    accumulators: &mut [Accumulators; T],
) {
    // Per brick and token, gather the activations for the low and the high nibbles of each lane.
    // All pieces of a brick have the same k positions in their lanes; only their channels differ.
    const fn fours(high: bool) -> [u32; LANES] {
        let mut fours = [0; LANES];
        let mut lane = 0;
        while lane < LANES {
            fours[lane] = (code_at(4 * lane, high).1 / 4) as u32;
            lane += 1;
        }
        fours
    }
    let (low_lanes, high_lanes) = (load(&const { fours(false) }), load(&const { fours(true) }));
    let mut x_lanes = [[[_mm512_setzero_si512(); 2]; T]; CHUNK_BRICKS];
    for (brick, x_lanes) in x_lanes.iter_mut().enumerate() {
        for (x_lanes, x) in x_lanes.iter_mut().zip(x) {
            let fours = load::<u32, LANES>(x[brick * LANES..].first_chunk().expect("16 words a brick"));
            *x_lanes =
                [_mm512_permutexvar_epi32(low_lanes, fours), _mm512_permutexvar_epi32(high_lanes, fours)];
        }
    }

    for piece in 0..PIECES {
        let mut sums = [_mm512_setzero_si512(); T];
        for (&brick, x_lanes) in bricks.iter().zip(&x_lanes) {
            let [low, high] = dequantize_piece(brick, piece);
            for (sum, x) in sums.iter_mut().zip(x_lanes) {
                *sum = _mm512_dpbusd_epi32(*sum, low, x[0]);
                *sum = _mm512_dpbusd_epi32(*sum, high, x[1]);
            }
        }
        let (first, _) = code_at(64 * piece, false);
        let (second, _) = code_at(64 * piece + 4, false);
        for (accumulators, sum) in accumulators.iter_mut().zip(sums) {
            let [first_sum, second_sum] = add_even_and_odd_lanes(sum);
            accumulators[first] = accumulators[first].wrapping_add(first_sum);
            accumulators[second] = accumulators[second].wrapping_add(second_sum);
        }
    }
}

/// Returns the weights plus 128 of one piece of a brick, from its low and from its high nibbles.
/// Each has 16 words in the brick's order, four elements along K in a word.
/// Even lanes belong to the piece's first channel, odd ones to its second.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn dequantize_piece(Brick { codes, pairs }: Brick<'_>, piece: usize) -> [__m512i; 2] {
    let codes = load::<u8, 64>(codes[64 * piece..].first_chunk().expect("a piece is 64 bytes"));
    // Broadcast the word [s, a, s', a']. Then expand s and s' to 32-bit lanes, a and a' to all four bytes.
    let pairs: [u8; 4] = *pairs[4 * piece..].first_chunk().expect("four bytes a piece");
    let pairs = _mm512_set1_epi32(i32::from_le_bytes(pairs));
    const ZERO: i32 = 0x8080_8000_u32 as i32;
    let s = _mm512_shuffle_epi8(pairs, _mm512_set4_epi32(ZERO | 2, ZERO, ZERO | 2, ZERO));
    let a_bytes = _mm512_set4_epi32(0x0303_0303, 0x0101_0101, 0x0303_0303, 0x0101_0101);
    let a4 = _mm512_shuffle_epi8(pairs, a_bytes);
    let nibble = _mm512_set1_epi32(0x0F0F_0F0F);
    let low = _mm512_and_si512(codes, nibble);
    let high = _mm512_and_si512(_mm512_srli_epi32::<4>(codes), nibble);
    // Written out because the compiler does not inline closures over registers into `map`.
    [_mm512_add_epi32(_mm512_mullo_epi32(low, s), a4), _mm512_add_epi32(_mm512_mullo_epi32(high, s), a4)]
}

/// Sums the even and the odd lanes.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn add_even_and_odd_lanes(lanes: __m512i) -> [i32; 2] {
    let eight = _mm256_add_epi32(_mm512_castsi512_si256(lanes), _mm512_extracti64x4_epi64::<1>(lanes));
    let four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256::<1>(eight));
    [
        _mm_extract_epi32::<0>(four).wrapping_add(_mm_extract_epi32::<2>(four)),
        _mm_extract_epi32::<1>(four).wrapping_add(_mm_extract_epi32::<3>(four)),
    ]
}

/// Loads 64 bytes, unaligned.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn load<T: bytemuck::Pod, const N: usize>(values: &[T; N]) -> __m512i {
    const { assert!(size_of::<[T; N]>() == 64, "a register is 64 bytes") };
    // SAFETY: `values` is exactly the 64 initialized bytes that the unaligned load reads.
    unsafe { _mm512_loadu_si512(values.as_ptr().cast()) }
}

/// Stores 64 bytes, unaligned.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn store<T: bytemuck::Pod, const N: usize>(values: &mut [T; N], register: __m512i) {
    const { assert!(size_of::<[T; N]>() == 64, "a register is 64 bytes") };
    // SAFETY: `values` is exactly the 64 bytes that the unaligned store writes. Any bytes are a valid `T`.
    unsafe { _mm512_storeu_si512(values.as_mut_ptr().cast(), register) };
}
