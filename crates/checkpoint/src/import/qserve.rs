//! QServe checkpoints (QoQ, arXiv 2405.04532): 4-bit codes with one scale and zero a channel, or with two levels.
//!
//! | tensor | type | shape | |
//! |---|---|---|---|
//! | `P.qweight` | I8 or U8 | `[n, k/2]` | codes, see below |
//! | `P.s1_scales` | float | `[n]` | channel scales |
//! | `P.s1_szeros` | float | `[n]` | without groups: zeros, multiplied by the scales |
//! | `P.s2_scales` | I8 | `[groups, n]` | with groups: their scales, 0 to 127 |
//! | `P.s2_zeros` | I8 | `[groups, n]` | with groups: what is added to `code · s2_scale` |
//!
//! A block of 32 × 32 (n, k) is 512 bytes. Byte `64·(n mod 8) + 16·(k/4 mod 4) + 8·(k/16 mod 2) + 4·(n/8 mod 2) + (k mod 4)` of it
//! holds a code of channel `n mod 16` in its low four bits, and that of the channel 16 further in the high ones.
//! Rows of group scales and zeros have channel `8·q + r` of 32 at place `4·r + q`.
//!
//! Without groups a weight is `code · s1_scale − s1_szero`. With groups it is `(code · s2_scale + s2_zero) · s1_scale`, where the
//! factor in parentheses is an int8 that wraps.

use serde_json::Value;

use super::words::matrix;
use super::{Found, Parts};
use crate::error::Problem;

/// Channels and columns of a block.
const BLOCK: usize = 32;
/// Bytes of a block.
const BLOCK_BYTES: usize = BLOCK * BLOCK / 2;
/// A relative deviation of this much is the rounding of a product of f16 values to f16.
const ROUNDING: f32 = 1.0 / 1024.0;

/// Checks the configuration. The converter of QServe writes none; engines that load its files write one.
pub(super) fn check(config: &Value) -> Result<(), Problem> {
    let bits = ["wbits", "weight_bits", "bits"].iter().find_map(|key| config.get(key));
    match bits.map(Value::as_u64) {
        None | Some(Some(4)) => Ok(()),
        Some(other) => Err(Problem::Unsupported {
            what: format!("QServe weights with {other:?} bits; 4 expected"),
            remedy: "quantize the original checkpoint",
        }),
    }
}

/// Returns whether a tensor's name says that its model was converted by QServe.
pub(super) fn is_mark(name: &str) -> bool {
    name.ends_with(".s1_scales")
}

pub(super) fn find(parts: &Parts<'_>) -> Result<Vec<Found>, Problem> {
    let mut all = Vec::new();
    for (module, codes) in parts.with_suffix(".qweight") {
        let scales = parts.required(&module, ".s1_scales")?;
        let &[n] = parts.shape(scales) else { return Err(parts.wrong_shape(scales, "[n]")) };
        let [_, half] = parts.matrix_shape(codes)?;
        let k = half.checked_mul(2).ok_or_else(|| parts.wrong_shape(codes, "[n, k/2]"))?;
        if n == 0 || !n.is_multiple_of(BLOCK) || !k.is_multiple_of(BLOCK) {
            return Err(parts.wrong_shape(codes, "[n, k/2] with n and k multiples of 32"));
        }
        parts.expect(codes, &[n, half])?;
        let group_scales = parts.optional(&module, ".s2_scales");
        let (zeros, groups) = match group_scales {
            None => {
                let zeros = parts.required(&module, ".s1_szeros")?;
                parts.expect(zeros, &[n])?;
                (zeros, 1)
            }
            Some(tensor) => {
                let zeros = parts.required(&module, ".s2_zeros")?;
                let [groups, _] = parts.matrix_shape(tensor)?;
                parts.expect(tensor, &[groups, n])?;
                parts.expect(zeros, &[groups, n])?;
                (zeros, groups)
            }
        };
        let found = Found::new(module, [n, k], groups, [codes, scales]);
        all.push(Found { group_scales, zeros: Some(zeros), ..found });
    }
    Ok(all)
}

/// Unpacks codes to `[n, k]`.
pub(super) fn codes(bytes: &[u8], n: usize, k: usize) -> Vec<u8> {
    matrix(n, k, |row, column| {
        let block = row / BLOCK * (k / BLOCK) + column / BLOCK;
        let (row, column) = (row % BLOCK, column % BLOCK);
        let byte =
            64 * (row % 8) + 16 * (column / 4 % 4) + 8 * (column / 16) + 4 * (row / 8 % 2) + column % 4;
        bytes[block * BLOCK_BYTES + byte] >> (4 * (row / 16)) & 15
    })
}

/// Returns the zeros `[n]` of codes without groups. A quotient within rounding of an integer is that integer.
pub(super) fn channel_zeros(scales: &[f32], scaled_zeros: &[f32]) -> Result<Vec<f32>, String> {
    let zero = |(&scale, &scaled): (&f32, &f32)| {
        let zero = if scaled == 0.0 { 0.0 } else { scaled / scale };
        let whole = zero.round_ties_even();
        let zero = if (zero - whole).abs() <= ROUNDING * whole.abs() { whole } else { zero };
        // Beyond this no code could reach 0, and f32 would lose the codes.
        if zero.abs() < 4096.0 {
            Ok(zero)
        } else {
            Err(format!("has the zero {scaled} for the scale {scale}; a quotient within ±4096 expected"))
        }
    };
    scales.iter().zip(scaled_zeros).map(zero).collect()
}

/// Scales and zeros, each `[n, groups]`.
pub(super) type Levels = (Vec<f32>, Vec<f32>);

/// Returns the scales and zeros of codes `[n, k]` with groups: the product of both levels' scales, and the quotient of zero and scale.
pub(super) fn group_levels(
    codes: &[u8],
    channel_scales: &[f32],
    group_scales: &[u8],
    group_zeros: &[u8],
    k: usize,
    group: usize,
) -> Result<Levels, String> {
    let n = channel_scales.len();
    let groups = group_scales.len() / n;
    let (mut scales, mut zeros) = (Vec::with_capacity(n * groups), Vec::with_capacity(n * groups));
    for row in 0..n {
        for index in 0..groups {
            let place = row % BLOCK;
            let stored = index * n + row - place + 4 * (place % 8) + place / 8;
            let (scale, offset) = (group_scales[stored] as i8, i32::from(group_zeros[stored] as i8));
            if scale < 0 || (scale == 0 && offset != 0) {
                return Err(format!(
                    "has the scale {scale} with the zero {offset} for channel {row}, group {index}"
                ));
            }
            let codes = &codes[row * k + index * group..row * k + k.min((index + 1) * group)];
            let extremes = codes.iter().fold((15, 0), |(least, most), &code| {
                (i32::min(least, code.into()), i32::max(most, code.into()))
            });
            let scale = i32::from(scale);
            let fits =
                |offset: &i32| extremes.0 * scale + offset >= -128 && extremes.1 * scale + offset <= 127;
            // Zeros are the low eight bits of numbers down to −255.
            let offset = [offset, offset - 256].into_iter().find(fits).ok_or_else(|| {
                format!("has the scale {scale} with the zero {offset} for channel {row}, group {index}, whose weights exceed int8")
            })?;
            scales.push(channel_scales[row] * scale as f32);
            zeros.push(if scale == 0 { 0.0 } else { -offset as f32 / scale as f32 });
        }
    }
    Ok((scales, zeros))
}
