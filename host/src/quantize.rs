//! LiquidQuant: quantizes floating-point weights to packed 4-bit ones, in two levels.
//!
//! The first level takes each channel to int8 weights with one f32 scale. It rounds to nearest, ties to even.
//! The second level takes each group of int8 weights to 4-bit codes with an integer pair `(s, a)`.
//! It rounds to nearest, ties up.
//! Dequantization from codes to int8 needs one multiply-add and one XOR, and cannot overflow.
//! The method is that of the LiquidGEMM paper (arXiv 2509.01229).

use liquidgemm_format::brick::{BRICK_CHANNELS, BRICK_K};
use liquidgemm_format::rounding::{round_clamped, scale_of};
use rayon::prelude::*;

use crate::check::{check_length, checked_elements};
use crate::packed::{PackedSizes, Packer};
use crate::{Error, Float, Group, PackedWeights};

/// The protective range: int8 weights stay within ±119, so that the second level has room to round up.
pub(crate) const INT8_LIMIT: f32 = 119.0;

/// The largest 4-bit code.
const MAX_CODE: i32 = 15;

/// The value of the unsigned byte `q·s + a` that represents the weight 0.
const ZERO: i32 = 128;

impl PackedWeights {
    /// Quantizes and packs row-major `[n, k]` weights.
    ///
    /// Each channel first becomes int8 weights `w8` with one f32 scale:
    /// - `scale = max|w| / 119`.
    ///   A subnormal quotient may be rounded down so far that the largest weight would be clipped;
    ///   the scale is then the next larger f32.
    /// - `w8 = clamp(rne(w / scale), −119, 119)`, where `rne` rounds to nearest, ties to even.
    /// - A channel of zeros has scale 0 and int8 weights 0.
    ///
    /// Each group of `w8` with extremes `min` and `max` then becomes codes `q` with a pair `(s, a)`.
    /// Here `round` takes ties up:
    /// - `s = max(1, round((max − min) / 15))`
    /// - `a = min(128 + min, 255 − 15·s)`
    /// - `q = clamp(round((w8 + 128 − a) / s), 0, 15)`
    ///
    /// The formulas are those of the LiquidGEMM paper (arXiv 2509.01229), except for the upper limit of `a`.
    /// The paper's `a = 128 + min` breaks the format's invariant `15·s + a ≤ 255`
    /// if `s = 1` and every `w8` of the group is above 112.
    /// The limit changes such groups only, and they are kept exactly.
    ///
    /// # Errors
    /// - [`Error::EmptyDimension`] if `n` or `k` is 0, [`Error::KTooLarge`] if `k` exceeds 131,072.
    /// - [`Error::InvalidGroup`] if the group is not a positive multiple of 64.
    /// - [`Error::ShapeMismatch`] if the slice does not have `n · k` elements.
    /// - [`Error::TooLarge`] if the weights exceed the address space.
    /// - [`Error::NonFiniteWeight`] with the position of the first weight that is NaN or infinite.
    pub fn quantize<T: Float>(weights: &[T], n: usize, k: usize, group: Group) -> Result<Self, Error> {
        let PackedSizes { group_blocks, groups, .. } = PackedSizes::new(n, k, group)?;
        check_length("weights", "[n, k]", checked_elements("weight matrix", n, k)?, weights.len())?;
        let scales: Vec<Result<f32, Error>> = weights
            .par_chunks_exact(k)
            .enumerate()
            .map(|(channel, row)| channel_scale(channel, row))
            .collect();
        // Reports the first failing channel, whichever thread failed first.
        let scales = scales.into_iter().collect::<Result<Vec<f32>, _>>()?;

        let mut packer = Packer::new(n, k, group)?;
        packer.for_each_strip(|channels, mut strip| {
            let mut int8_weight = vec![0i8; k];
            let mut codes = vec![0u8; k];
            let mut pairs = Vec::with_capacity(groups);
            for channel in channels {
                quantize_channel(&weights[channel * k..][..k], scales[channel], &mut int8_weight);
                pairs.clear();
                let group_k = group_blocks * BRICK_K;
                for (int8_weight, codes) in int8_weight.chunks(group_k).zip(codes.chunks_mut(group_k)) {
                    pairs.push(quantize_group(int8_weight, codes));
                }
                strip.write_channel(channel % BRICK_CHANNELS, &codes, &pairs);
            }
        });
        Ok(packer.finish(scales))
    }
}

/// Returns `max|w| / 119`, rounded so that no weight is clipped, or an error for a weight that is not finite.
fn channel_scale<T: Float>(channel: usize, row: &[T]) -> Result<f32, Error> {
    let mut max = 0.0f32;
    for (k, weight) in row.iter().enumerate() {
        let value = weight.to_f32();
        if !value.is_finite() {
            return Err(Error::NonFiniteWeight { channel, k, value });
        }
        max = max.max(value.abs());
    }
    Ok(scale_of(max, INT8_LIMIT))
}

/// First level: `clamp(rne(w / scale), −119, 119)`, or zeros if the scale is 0.
fn quantize_channel<T: Float>(row: &[T], scale: f32, int8_weight: &mut [i8]) {
    if scale == 0.0 {
        int8_weight.fill(0);
        return;
    }
    for (int8_weight, weight) in int8_weight.iter_mut().zip(row) {
        *int8_weight = round_clamped(weight.to_f32() / scale, INT8_LIMIT) as i8;
    }
}

/// Second level: writes the codes of one group and returns its pair `(s, a)`.
fn quantize_group(int8_weight: &[i8], codes: &mut [u8]) -> (u8, u8) {
    let (min, max) = int8_weight.iter().fold((i32::MAX, i32::MIN), |(min, max), &w| {
        let w = i32::from(w);
        (min.min(w), max.max(w))
    });
    let s = round_ratio(max - min, MAX_CODE).max(1);
    // If s is 1 and min is above 112, 128 + min leaves no room for the code 15.
    let a = (ZERO + min).min(255 - MAX_CODE * s);
    for (code, &w) in codes.iter_mut().zip(int8_weight) {
        *code = round_ratio(i32::from(w) + ZERO - a, s).min(MAX_CODE) as u8;
    }
    (s as u8, a as u8)
}

/// Returns `numerator / denominator`, rounded to the nearest integer, ties up. `numerator` is not negative.
fn round_ratio(numerator: i32, denominator: i32) -> i32 {
    (2 * numerator + denominator) / (2 * denominator)
}

#[cfg(test)]
mod tests {
    use super::*;
    use liquidgemm_format::dequant::{dequantize, is_valid_pair};

    #[test]
    fn every_minimum_and_maximum_gives_a_valid_pair_and_an_error_within_half_a_step() {
        for min in -119i8..=119 {
            for max in min..=119 {
                let int8_weight: Vec<i8> = (min..=max).collect();
                let mut codes = vec![0xFF; int8_weight.len()];
                let (s, a) = quantize_group(&int8_weight, &mut codes);
                assert!(is_valid_pair(s, a), "min {min}, max {max}: s = {s}, a = {a}");
                for (&w, &q) in int8_weight.iter().zip(&codes) {
                    assert!(q <= 15);
                    let error = (i32::from(w) - i32::from(dequantize(q, s, a))).abs();
                    // The error is at most s/2.
                    // If s was rounded down, the top of the range is up to 7 beyond code 15.
                    let beyond = (i32::from(max) - i32::from(min) - 15 * i32::from(s)).max(0);
                    assert!(2 * error <= i32::from(s).max(2 * beyond), "w {w}, q {q}, s {s}, a {a}");
                }
            }
        }
    }

    #[test]
    fn groups_no_wider_than_the_codes_are_kept_exactly() {
        for min in -119i8..=119 {
            for max in min..=min.saturating_add(15).min(119) {
                let int8_weight: Vec<i8> = (min..=max).collect();
                let mut codes = vec![0; int8_weight.len()];
                let (s, a) = quantize_group(&int8_weight, &mut codes);
                let back: Vec<i8> = codes.iter().map(|&q| dequantize(q, s, a)).collect();
                assert_eq!(back, int8_weight);
            }
        }
    }

    #[test]
    fn the_papers_formulas_hold_wherever_they_keep_the_invariant() {
        for min in -119i32..=119 {
            for max in min..=119 {
                let mut codes = [0; 2];
                let (s, a) = quantize_group(&[min as i8, max as i8], &mut codes);
                let paper_s = (f64::from(max - min) / 15.0).round().max(1.0) as i32;
                assert_eq!(i32::from(s), paper_s);
                if 15 * paper_s + 128 + min <= 255 {
                    assert_eq!(i32::from(a), 128 + min);
                } else {
                    assert!(s == 1 && min > 112, "min {min}, max {max}");
                }
            }
        }
    }
}
