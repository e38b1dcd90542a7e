//! QQQ checkpoints (arXiv 2406.09904): symmetric int4 weights in the layout of a Marlin kernel.
//!
//! | tensor | type | shape | |
//! |---|---|---|---|
//! | `P.B` | I32 | `[k/16, 2·n]` | codes, see below |
//! | `P.s_channel` | float | `[1, n]` | channel scales |
//! | `P.s_group` | float | `[groups, n]`, or empty | group scales, as multiples of the channel's |
//! | `P.workspace`, `P.reduce_buffer` | | | memory of the kernel, which some files hold |
//!
//! `B` has 128 words for each 16 × 64 block of (k, n). Word `16·(n mod 8) + 4·(k/4 mod 4) + (n/16 mod 4)` of a block holds
//! eight weights: four along K, and the same four of the channel 8 further.
//!
//! With groups a weight is `(code − 8) · s_group · s_channel`. The kernel rounds `(code − 8) · s_group` to an integer when it runs;
//! that is no part of the weights. Without groups a weight is `16 · code · s_channel`, with codes in two's complement.

use serde_json::Value;

use super::words::{CODES, code, matrix, words};
use super::{Found, Parts};
use crate::error::Problem;

/// Rows of a block, along K.
const BLOCK_K: usize = 16;
/// Channels of a block.
const BLOCK_N: usize = 64;
/// Words of a block.
const BLOCK_WORDS: usize = BLOCK_K * BLOCK_N / CODES;
/// Channels over which channel scales are permuted.
const SCALES: usize = 32;
/// What the kernel's shift by four bits multiplies codes without groups by.
const SHIFT: f32 = 16.0;
/// The bit in which signed and unsigned codes differ.
const SIGN: u8 = 8;

/// Checks the configuration.
pub(super) fn check(config: &Value) -> Result<(), Problem> {
    match config.get("wbits").and_then(Value::as_u64) {
        Some(4) => Ok(()),
        other => Err(Problem::Unsupported {
            what: format!("QQQ weights with {other:?} bits; 4 expected"),
            remedy: "quantize the original checkpoint",
        }),
    }
}

pub(super) fn find(parts: &Parts<'_>) -> Result<Vec<Found>, Problem> {
    let mut all = Vec::new();
    for (module, codes) in parts.with_suffix(".B") {
        let scales = parts.required(&module, ".s_channel")?;
        let [one, n] = parts.matrix_shape(scales)?;
        if one != 1 || !n.is_multiple_of(BLOCK_N) {
            return Err(parts.wrong_shape(scales, "[1, n] with n a multiple of 64"));
        }
        let [blocks, _] = parts.matrix_shape(codes)?;
        let k = blocks.checked_mul(BLOCK_K).ok_or_else(|| parts.wrong_shape(codes, "[k/16, 2·n]"))?;
        parts.expect(codes, &[blocks, BLOCK_WORDS * (n / BLOCK_N)])?;
        let group_scales = parts.optional(&module, ".s_group");
        let group_scales_are_empty = group_scales.is_none_or(|tensor| parts.shape(tensor).contains(&0));
        let (mut groups, mut others) = (1, Vec::new());
        if let Some(tensor) = group_scales.filter(|_| !group_scales_are_empty) {
            [groups, _] = parts.matrix_shape(tensor)?;
            parts.expect(tensor, &[groups, n])?;
        } else {
            others.extend(group_scales);
        }
        let buffers = [".workspace", ".reduce_buffer"].map(|suffix| parts.optional(&module, suffix));
        others.extend(buffers.into_iter().flatten());
        let group_scales = group_scales.filter(|_| !group_scales_are_empty);
        let found = Found::new(module, [n, k], groups, [codes, scales]);
        all.push(Found { group_scales, others, ..found });
    }
    Ok(all)
}

/// Unpacks codes to `[n, k]`. Their zero is 8.
pub(super) fn codes(bytes: &[u8], n: usize, k: usize, has_groups: bool) -> Vec<u8> {
    // The position in a word of each of four neighbours along K, and of those of the channel 8 further.
    let positions: [usize; CODES] =
        if has_groups { [0, 4, 1, 5, 2, 6, 3, 7] } else { [1, 3, 5, 7, 0, 2, 4, 6] };
    // Two's complement is 8 above the signed code but for the highest bit.
    let flip = if has_groups { 0 } else { SIGN };
    let words = words(bytes);
    matrix(n, k, |row, column| {
        let (in_k, in_n) = (column % BLOCK_K, row % BLOCK_N);
        let word = BLOCK_K * (in_n % 8) + 4 * (in_k / 4) + in_n / 16;
        let block = column / BLOCK_K * (n / BLOCK_N) + row / BLOCK_N;
        code(words[block * BLOCK_WORDS + word], positions[in_k % 4 + 4 * (in_n / 8 % 2)]) ^ flip
    })
}

/// Returns the scales `[n, groups]`.
pub(super) fn scales(channels: &[f32], groups: Option<&[f32]>, n: usize) -> Vec<f32> {
    let channel = |row: usize| {
        let place = row % SCALES;
        channels[row - place + 8 * (place % 8 / 2) + 2 * (place / 8) + place % 2]
    };
    match groups {
        None => (0..n).map(|row| SHIFT * channel(row)).collect(),
        Some(scales) => matrix(n, scales.len() / n, |row, group| {
            let place = row % BLOCK_N;
            scales[group * n + row - place + 8 * (place % 8) + place / 8] * channel(row)
        }),
    }
}
