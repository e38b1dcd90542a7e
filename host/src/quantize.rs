//! LiquidQuant: floating-point weights to packed 4-bit ones, in two levels.
//!
//! Level 1 takes each channel to int8 with one f32 scale; level 2 takes each group of a channel to 4-bit codes
//! with an integer pair `(s, a)`, such that going back to int8 needs one multiply-add and one XOR and can never
//! overflow. Rounding is to nearest, ties to even at level 1 and upwards at level 2.

use liquidgemm_format::brick::{BRICK_CHANNELS, BRICK_K};
use rayon::prelude::*;

use crate::error::{check_length, checked_elements};
use crate::float::{Float, round_clamped, scale_of};
use crate::packed::{PackedSizes, Packer};
use crate::{Error, Group, PackedWeights};

/// The protective range: int8 weights stay within ±119, so that level 2 has room to round up.
pub(crate) const LEVEL1_LIMIT: f32 = 119.0;

/// The largest 4-bit code.
const MAX_CODE: i32 = 15;

/// The integer at which the unsigned byte `q·s + a` stands for the weight 0.
const ZERO: i32 = 128;

impl PackedWeights {
    /// Quantizes and packs row-major `[n, k]` weights.
    ///
    /// Per channel: `scale = max|w| / 119` (f32; the next larger number where a subnormal scale was rounded down so far that the largest
    /// weight would be clipped), `w8 = clamp(rne(w / scale), −119, 119)`. A channel that is all zero has scale 0 and weights 0. Per group of `w8`:
    /// `s = max(1, round((max − min) / 15))`, `a = min(128 + min, 255 − 15·s)` and
    /// `q = clamp(round((w8 + 128 − a) / s), 0, 15)`, with ties rounded up. The `min` for `a` acts only where
    /// `s = 1` and every `w8` of the group is above 112; it keeps the pair within the format's invariant and
    /// such groups exact.
    ///
    /// # Errors
    /// Zero `n` or `k`, K above 131,072, an impossible group, a slice that is not `n · k` long, and NaN or
    /// infinite weights, named by their position.
    pub fn quantize<T: Float>(weights: &[T], n: usize, k: usize, group: Group) -> Result<Self, Error> {
        let PackedSizes { group_blocks, groups, .. } = PackedSizes::new(n, k, group)?;
        check_length("weights", "[n, k]", checked_elements("weight matrix", n, k)?, weights.len())?;
        let scales: Vec<Result<f32, Error>> = weights
            .par_chunks_exact(k)
            .enumerate()
            .map(|(channel, row)| channel_scale(channel, row))
            .collect();
        // The first failing channel is reported, whichever thread met its own first.
        let scales = scales.into_iter().collect::<Result<Vec<f32>, _>>()?;

        let mut packer = Packer::new(n, k, group)?;
        packer.for_each_strip(|channels, mut strip| {
            let mut level1 = vec![0i8; k];
            let mut codes = vec![0u8; k];
            let mut pairs = Vec::with_capacity(groups);
            for channel in channels {
                quantize_channel(&weights[channel * k..][..k], scales[channel], &mut level1);
                pairs.clear();
                let group_k = group_blocks * BRICK_K;
                for (level1, codes) in level1.chunks(group_k).zip(codes.chunks_mut(group_k)) {
                    pairs.push(quantize_group(level1, codes));
                }
                strip.write_channel(channel % BRICK_CHANNELS, &codes, &pairs);
            }
        });
        Ok(packer.finish(scales))
    }
}

/// `max|w| / 119`, rounded so that no weight is clipped, or the first weight that is not finite.
fn channel_scale<T: Float>(channel: usize, row: &[T]) -> Result<f32, Error> {
    let mut max = 0.0f32;
    for (k, weight) in row.iter().enumerate() {
        let value = weight.to_f32();
        if !value.is_finite() {
            return Err(Error::NonFiniteWeight { channel, k, value });
        }
        max = max.max(value.abs());
    }
    Ok(scale_of(max, LEVEL1_LIMIT))
}

/// Level 1: `clamp(rne(w / scale), −119, 119)`, zeros where the scale is 0.
fn quantize_channel<T: Float>(row: &[T], scale: f32, level1: &mut [i8]) {
    if scale == 0.0 {
        level1.fill(0);
        return;
    }
    for (level1, weight) in level1.iter_mut().zip(row) {
        *level1 = round_clamped(weight.to_f32() / scale, LEVEL1_LIMIT) as i8;
    }
}

/// Level 2: the pair `(s, a)` of one group, and its codes.
fn quantize_group(level1: &[i8], codes: &mut [u8]) -> (u8, u8) {
    let (min, max) = level1.iter().fold((i32::MAX, i32::MIN), |(min, max), &w| {
        let w = i32::from(w);
        (min.min(w), max.max(w))
    });
    let s = round_ratio(max - min, MAX_CODE).max(1);
    // Where s is 1 and min above 112, 128 + min would leave no room for the code 15.
    let a = (ZERO + min).min(255 - MAX_CODE * s);
    for (code, &w) in codes.iter_mut().zip(level1) {
        *code = round_ratio(i32::from(w) + ZERO - a, s).min(MAX_CODE) as u8;
    }
    (s as u8, a as u8)
}

/// `numerator / denominator` to the nearest integer, ties up, for a numerator that is not negative.
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
                let level1: Vec<i8> = (min..=max).collect();
                let mut codes = vec![0xFF; level1.len()];
                let (s, a) = quantize_group(&level1, &mut codes);
                assert!(is_valid_pair(s, a), "min {min}, max {max}: s = {s}, a = {a}");
                for (&w, &q) in level1.iter().zip(&codes) {
                    assert!(q <= 15);
                    let error = (i32::from(w) - i32::from(dequantize(q, s, a))).abs();
                    // Half a step; where s was rounded down, the top of the range is up to 7 beyond code 15.
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
                let level1: Vec<i8> = (min..=max).collect();
                let mut codes = vec![0; level1.len()];
                let (s, a) = quantize_group(&level1, &mut codes);
                let back: Vec<i8> = codes.iter().map(|&q| dequantize(q, s, a)).collect();
                assert_eq!(back, level1);
            }
        }
    }

    #[test]
    fn the_recipe_of_the_paper_holds_wherever_it_keeps_the_invariant() {
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
