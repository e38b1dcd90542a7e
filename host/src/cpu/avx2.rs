//! The AVX2 kernel, which multiplies the 4-bit codes before it applies their pairs.
//!
//! All weights of a channel in a brick share one pair, so their sum of products with a token's activations is
//! `s · Σ q·x + (a − 128) · Σ x`.
//! `vpmaddubsw` multiplies 32 codes with 32 activations and adds neighbouring products in int16.
//! Codes are at most 15, so this is far from saturation.
//! One `vpmaddwd` then multiplies with `s` and widens to int32.
//! No weight is dequantized. The codes stay in the brick's order, and the activations are permuted to match.
//! Partial sums may wrap, but the true result fits int32, so arithmetic modulo 2³² ends on it exactly.

use std::arch::x86_64::{
    __m256i, _mm_add_epi32, _mm_cvtsi128_si64, _mm_unpackhi_epi64, _mm256_add_epi16, _mm256_add_epi32,
    _mm256_and_si256, _mm256_blendv_epi8, _mm256_castsi256_si128, _mm256_cmpgt_epi32,
    _mm256_extracti128_si256, _mm256_loadu_si256, _mm256_madd_epi16, _mm256_maddubs_epi16,
    _mm256_permute2x128_si256, _mm256_permutevar8x32_epi32, _mm256_set1_epi8, _mm256_set1_epi16,
    _mm256_set1_epi32, _mm256_set1_epi64x, _mm256_setzero_si256, _mm256_shuffle_epi8, _mm256_srli_epi16,
    _mm256_storeu_si256, _mm256_sub_epi16, _mm256_unpackhi_epi16, _mm256_unpacklo_epi16,
};

use liquidgemm_format::brick::{BRICK_CHANNELS, BRICK_K, CODE_BYTES, code_at};

use super::{Accumulators, CHUNK_BRICKS, CHUNK_K, Task, TokenBlock, by_tokens};
use crate::packed::Brick;

/// int32 lanes of a register.
const LANES: usize = 8;
/// 64-byte pieces of a brick's codes. A piece holds two channels, which alternate in its 32-bit words.
/// Both have their pairs in one 32-bit word.
const PIECES: usize = CODE_BYTES / 64;
/// Registers that a piece's codes fill, one byte per code: low and high nibbles of both 32-byte halves.
const PIECE_REGISTERS: usize = 4;

/// The two channels of each piece.
const CHANNELS: [[usize; 2]; PIECES] = {
    let mut channels = [[0; 2]; PIECES];
    let mut piece = 0;
    while piece < PIECES {
        channels[piece] = [code_at(64 * piece, false).0, code_at(64 * piece + 4, false).0];
        piece += 1;
    }
    channels
};

/// For each lane of a piece's registers, the index of its group of four elements along K within the brick.
/// All pieces have the same ones; only their channels differ.
const FOURS: [[u32; LANES]; PIECE_REGISTERS] = {
    let mut fours = [[0; LANES]; PIECE_REGISTERS];
    let mut register = 0;
    while register < PIECE_REGISTERS {
        let mut lane = 0;
        while lane < LANES {
            let byte = 32 * (register / 2) + 4 * lane;
            fours[register][lane] = (code_at(byte, register % 2 == 1).1 / 4) as u32;
            lane += 1;
        }
        register += 1;
    }
    fours
};

/// One token's activations for a chunk of K.
#[derive(Clone, Copy, Default)]
struct TokenPanel {
    /// Per brick, the activations in the order of [`FOURS`], four in a word.
    x: [[[u32; LANES]; PIECE_REGISTERS]; CHUNK_BRICKS],
    /// The sums of the activations over each brick's K, two bricks in a word.
    sums: [[i16; 2]; CHUNK_BRICKS / 2],
}

/// The activations of all tokens for one chunk of K.
#[derive(Default)]
pub(super) struct Panels(Vec<TokenPanel>);

/// Per two bricks, `a − 128` of all channels as int16, two bricks in a lane, in the order of the pieces.
type Offsets = [[__m256i; BRICK_CHANNELS / LANES]; CHUNK_BRICKS / 2];

/// Whether this CPU has the instructions that [`accumulate`] is compiled for.
pub(super) fn is_available() -> bool {
    std::is_x86_feature_detected!("avx2")
}

/// Adds the products of one chunk of K to the accumulators.
#[target_feature(enable = "avx2")]
pub(super) fn accumulate(bricks: &[Brick<'_>], x: &TokenBlock<'_>, chunk: usize, task: &mut Task) {
    let Panels(panels) = &mut task.avx2;
    panels.resize(x.count, TokenPanel::default());
    for (token, panel) in panels.iter_mut().enumerate() {
        fill(panel, x.codes(token, chunk));
    }
    let offsets = &offsets(bricks);
    let (accumulators, x) = (&mut task.accumulators[..], &panels[..]);
    let (accumulators, x) = by_tokens::<8, _>(accumulators, x, |acc, x| multiply(bricks, offsets, x, acc));
    let (accumulators, x) = by_tokens::<4, _>(accumulators, x, |acc, x| multiply(bricks, offsets, x, acc));
    let (accumulators, x) = by_tokens::<2, _>(accumulators, x, |acc, x| multiply(bricks, offsets, x, acc));
    by_tokens::<1, _>(accumulators, x, |acc, x| multiply(bricks, offsets, x, acc));
}

/// Permutes and sums one token's activations. Beyond K they are zeros.
#[target_feature(enable = "avx2")]
fn fill(panel: &mut TokenPanel, codes: &[i8]) {
    let mut padded = [0i8; CHUNK_K];
    padded[..codes.len()].copy_from_slice(codes);
    for (index, codes) in padded.as_chunks::<BRICK_K>().0.iter().enumerate() {
        let (lower, upper) = codes.split_at(BRICK_K / 2);
        let lower = load::<i8, 32>(lower.first_chunk().expect("half a brick's K"));
        let upper = load::<i8, 32>(upper.first_chunk().expect("half a brick's K"));
        for (x, fours) in panel.x[index].iter_mut().zip(&FOURS) {
            let fours = load(fours);
            // The lower three bits of the index select a lane within the half.
            let from_lower = _mm256_permutevar8x32_epi32(lower, fours);
            let from_upper = _mm256_permutevar8x32_epi32(upper, fours);
            let is_upper = _mm256_cmpgt_epi32(fours, _mm256_set1_epi32(LANES as i32 - 1));
            store(x, _mm256_blendv_epi8(from_lower, from_upper, is_upper));
        }
        panel.sums[index / 2][index % 2] = codes.iter().map(|&code| i16::from(code)).sum();
    }
}

/// Extracts the [`Offsets`] of a chunk's bricks from their pairs.
///
/// A brick beyond the end of K may have any offset, because its activations are zeros.
#[target_feature(enable = "avx2")]
fn offsets(bricks: &[Brick<'_>]) -> Offsets {
    let mut offsets = [[_mm256_setzero_si256(); BRICK_CHANNELS / LANES]; CHUNK_BRICKS / 2];
    for (pair, offsets) in offsets.iter_mut().enumerate() {
        let Some(first) = bricks.get(2 * pair) else { break };
        let second = bricks.get(2 * pair + 1).unwrap_or(first);
        // Load the words [s, a, s', a'] of eight pieces at a time.
        for (eight, offsets) in offsets.as_chunks_mut::<2>().0.iter_mut().enumerate() {
            let a = |brick: &Brick<'_>| {
                let pairs = load::<u8, 32>(brick.pairs[32 * eight..].first_chunk().expect("32 words"));
                _mm256_sub_epi16(_mm256_srli_epi16::<8>(pairs), _mm256_set1_epi16(128))
            };
            let (first, second) = (a(first), a(second));
            // Unpacking interleaves each 128-bit half separately.
            let low = _mm256_unpacklo_epi16(first, second);
            let high = _mm256_unpackhi_epi16(first, second);
            *offsets =
                [_mm256_permute2x128_si256::<0x20>(low, high), _mm256_permute2x128_si256::<0x31>(low, high)];
        }
    }
    offsets
}

/// Adds the products of a chunk's bricks with `T` tokens, whose sums stay in registers within a piece.
#[target_feature(enable = "avx2")]
fn multiply<const T: usize>(
    bricks: &[Brick<'_>],
    offsets: &Offsets,
    x: &[TokenPanel; T],
    accumulators: &mut [Accumulators; T],
) {
    let mut products = [[0i64; PIECES]; T];
    for piece in 0..PIECES {
        let mut sums = [_mm256_setzero_si256(); T];
        for (index, &brick) in bricks.iter().enumerate() {
            let (codes, s) = piece_of(brick, piece);
            for (sum, x) in sums.iter_mut().zip(x) {
                let x = &x.x[index];
                // Each int16 lane is at most 4 · 2 · 15 · 128 = 15,360.
                let low = _mm256_add_epi16(
                    _mm256_maddubs_epi16(codes[0], load(&x[0])),
                    _mm256_maddubs_epi16(codes[1], load(&x[1])),
                );
                let high = _mm256_add_epi16(
                    _mm256_maddubs_epi16(codes[2], load(&x[2])),
                    _mm256_maddubs_epi16(codes[3], load(&x[3])),
                );
                *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(_mm256_add_epi16(low, high), s));
            }
        }
        for (products, sum) in products.iter_mut().zip(sums) {
            products[piece] = add_even_and_odd_lanes(sum);
        }
    }
    for ((accumulators, products), x) in accumulators.iter_mut().zip(&products).zip(x) {
        let mut totals = [[[0i32; 2]; LANES / 2]; PIECES / (LANES / 2)];
        for (index, (totals, products)) in totals.iter_mut().zip(products.as_chunks().0).enumerate() {
            let mut sum = load::<i64, 4>(products);
            for (offsets, &sums) in offsets.iter().zip(&x.sums) {
                let x_sums = _mm256_set1_epi32(bytemuck::cast(sums));
                sum = _mm256_add_epi32(sum, _mm256_madd_epi16(offsets[index], x_sums));
            }
            store(totals, sum);
        }
        for (totals, channels) in totals.as_flattened().iter().zip(&CHANNELS) {
            for (&total, &channel) in totals.iter().zip(channels) {
                accumulators[channel] = accumulators[channel].wrapping_add(total);
            }
        }
    }
}

/// Returns the codes of one piece of a brick in the order of [`FOURS`], and `s` for each int16 lane.
#[target_feature(enable = "avx2")]
fn piece_of(Brick { codes, pairs }: Brick<'_>, piece: usize) -> ([__m256i; PIECE_REGISTERS], __m256i) {
    let lower = load::<u8, 32>(codes[64 * piece..].first_chunk().expect("a piece is 64 bytes"));
    let upper = load::<u8, 32>(codes[64 * piece + 32..].first_chunk().expect("a piece is 64 bytes"));
    let nibble = _mm256_set1_epi8(15);
    let codes = [
        _mm256_and_si256(lower, nibble),
        _mm256_and_si256(_mm256_srli_epi16::<4>(lower), nibble),
        _mm256_and_si256(upper, nibble),
        _mm256_and_si256(_mm256_srli_epi16::<4>(upper), nibble),
    ];
    // Expand the word [s, a, s', a'] to the int16 lanes s, s, s', s'.
    let word: [u8; 4] = *pairs[4 * piece..].first_chunk().expect("four bytes a piece");
    let s = _mm256_shuffle_epi8(
        _mm256_set1_epi32(i32::from_le_bytes(word)),
        _mm256_set1_epi64x(0x8002_8002_8000_8000_u64 as i64),
    );
    (codes, s)
}

/// Sums the even and the odd lanes. The sum of the even ones is in the low half.
#[target_feature(enable = "avx2")]
fn add_even_and_odd_lanes(lanes: __m256i) -> i64 {
    let four = _mm_add_epi32(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256::<1>(lanes));
    _mm_cvtsi128_si64(_mm_add_epi32(four, _mm_unpackhi_epi64(four, four)))
}

/// Loads 32 bytes, unaligned.
#[target_feature(enable = "avx2")]
fn load<T: bytemuck::Pod, const N: usize>(values: &[T; N]) -> __m256i {
    const { assert!(size_of::<[T; N]>() == 32, "a register is 32 bytes") };
    // SAFETY: `values` is exactly the 32 initialized bytes that the unaligned load reads.
    unsafe { _mm256_loadu_si256(values.as_ptr().cast()) }
}

/// Stores 32 bytes, unaligned.
#[target_feature(enable = "avx2")]
fn store<T: bytemuck::Pod, const N: usize>(values: &mut [T; N], register: __m256i) {
    const { assert!(size_of::<[T; N]>() == 32, "a register is 32 bytes") };
    // SAFETY: `values` is exactly the 32 bytes that the unaligned store writes. Any bytes are a valid `T`.
    unsafe { _mm256_storeu_si256(values.as_mut_ptr().cast(), register) };
}
