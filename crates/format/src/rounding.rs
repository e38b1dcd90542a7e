//! The rounding of floating-point values to integers with a scale, which all quantizers share.

/// 1.5 · 2²³: a sum with it has no bits for a fraction, so it is rounded to an integer, ties to even.
pub const ROUNDING_SHIFT: f32 = 12_582_912.0;

/// Returns the scale with which the largest magnitude `max` gets the code `limit`: `max / limit` in f32.
///
/// A subnormal quotient may be rounded down so far that `max` would be clipped, or to 0.
/// The result is then the next larger f32.
#[inline(always)]
#[must_use]
pub fn scale_of(max: f32, limit: f32) -> f32 {
    let scale = max / limit;
    if scale < f32::MIN_POSITIVE && max > 0.0 && max / scale > limit + 0.5 {
        // The next larger f32.
        return f32::from_bits(scale.to_bits() + 1);
    }
    scale
}

/// Clamps to `±limit`, then rounds to the nearest integer, ties to even.
///
/// `limit` must be an integer below 2²².
/// The result is that of `round_ties_even`, but two additions vectorize on any CPU.
/// Because the limits are integers, clamping first gives the same result as clamping after rounding.
#[inline(always)]
#[must_use]
pub fn round_clamped(value: f32, limit: f32) -> i32 {
    (value.max(-limit).min(limit) + ROUNDING_SHIFT).to_bits() as i32 - ROUNDING_SHIFT.to_bits() as i32
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ties_round_to_even_like_the_standard_library() {
        for halves in -300..=300 {
            let value = halves as f32 / 2.0;
            for value in [value, value.next_up(), value.next_down()] {
                assert_eq!(round_clamped(value, 119.0), value.round_ties_even().clamp(-119.0, 119.0) as i32);
            }
        }
    }

    proptest! {
        #[test]
        fn any_finite_value_rounds_like_the_standard_library(value in proptest::num::f32::ANY) {
            prop_assume!(!value.is_nan());
            prop_assert_eq!(round_clamped(value, 127.0), value.round_ties_even().clamp(-127.0, 127.0) as i32);
        }

        #[test]
        fn the_largest_magnitude_gets_the_largest_code(max in proptest::num::f32::POSITIVE) {
            prop_assume!(max.is_finite());
            let scale = scale_of(max, 127.0);
            prop_assert!(max / scale <= 127.0 + 0.5, "{max} / {scale}");
            prop_assert!(scale == max / 127.0 || scale < f32::MIN_POSITIVE);
        }
    }
}
