//! Round-to-nearest: the quantizer of the LiquidGEMM paper (arXiv 2509.01229).
//!
//! The first level takes each channel to int8 weights with one f32 scale. It rounds to nearest, ties to even.
//! The second level takes each group of int8 weights to 4-bit codes with an integer pair `(s, a)`.
//! It rounds to nearest, ties up. [`Method::Rtn`](crate::Method::Rtn) has the formulas.

use liquidgemm_format::rounding::{round_clamped, scale_of};

use super::{INT8_LIMIT, MAX_CODE, ZERO};

/// Quantizes one channel in groups of `group_k`: writes its codes and its pairs, and returns its scale.
pub(super) fn quantize_channel(
    row: &[f32],
    group_k: usize,
    int8_weight: &mut [i8],
    codes: &mut [u8],
    pairs: &mut Vec<(u8, u8)>,
) -> f32 {
    let scale = channel_scale(row);
    round_channel(row, scale, int8_weight);
    for (int8_weight, codes) in int8_weight.chunks(group_k).zip(codes.chunks_mut(group_k)) {
        pairs.push(quantize_group(int8_weight, codes));
    }
    scale
}

/// Returns `max|w| / 119`, rounded so that no weight is clipped.
pub(super) fn channel_scale(row: &[f32]) -> f32 {
    scale_of(row.iter().fold(0.0f32, |max, w| max.max(w.abs())), INT8_LIMIT)
}

/// First level: `clamp(rne(w / scale), −119, 119)`, or zeros if the scale is 0.
fn round_channel(row: &[f32], scale: f32, int8_weight: &mut [i8]) {
    if scale == 0.0 {
        int8_weight.fill(0);
        return;
    }
    for (int8_weight, weight) in int8_weight.iter_mut().zip(row) {
        *int8_weight = round_clamped(weight / scale, INT8_LIMIT) as i8;
    }
}

/// Second level: writes the codes of one group and returns its pair `(s, a)`.
fn quantize_group(int8_weight: &[i8], codes: &mut [u8]) -> (u8, u8) {
    let (min, max) = int8_weight.iter().fold((i32::MAX, i32::MIN), |(min, max), &w| {
        let w = i32::from(w);
        (min.min(w), max.max(w))
    });
    let (s, a) = pair(min, max);
    for (code, &w) in codes.iter_mut().zip(int8_weight) {
        *code = round_ratio(i32::from(w) + ZERO - a, s).min(MAX_CODE) as u8;
    }
    (s as u8, a as u8)
}

/// Returns the pair of a group of int8 weights with these extremes.
pub(super) fn pair(min: i32, max: i32) -> (i32, i32) {
    let s = round_ratio(max - min, MAX_CODE).max(1);
    // If s is 1 and min is above 112, 128 + min leaves no room for the code 15.
    (s, (ZERO + min).min(255 - MAX_CODE * s))
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
