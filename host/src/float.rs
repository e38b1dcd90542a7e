//! The floating-point types of weights and activations, and the rounding that both quantizers share.

use half::{bf16, f16};

/// An input element type: [`f32`], [`half::f16`] or [`bf16`]. The trait is sealed.
///
/// All three convert to f32 without rounding.
pub trait Float: bytemuck::Pod + Send + Sync + sealed::Sealed {
    /// Converts to f32, exactly.
    fn to_f32(self) -> f32;
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::f16 {}
    impl Sealed for half::bf16 {}
}

impl Float for f32 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
}

impl Float for f16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }
}

impl Float for bf16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }
}

/// Clamps to `±limit`, then rounds to the nearest integer, ties to even.
///
/// `limit` must be an integer below 2²².
/// The result is that of `round_ties_even`, but two additions vectorize on any CPU.
/// Because the limits are integers, clamping first gives the same result as clamping after rounding.
#[inline(always)]
pub(crate) fn round_clamped(value: f32, limit: f32) -> i32 {
    /// 1.5 · 2²³: adding it leaves no bits for a fraction, so the sum is rounded to an integer, ties to even.
    const SHIFT: f32 = 12_582_912.0;
    (value.clamp(-limit, limit) + SHIFT).to_bits() as i32 - SHIFT.to_bits() as i32
}

/// Returns the scale with which the largest magnitude `max` gets the code `limit`: `max / limit` in f32.
///
/// A subnormal quotient may be rounded down so far that `max` would be clipped, or to 0.
/// The result is then the next larger f32.
pub(crate) fn scale_of(max: f32, limit: f32) -> f32 {
    let scale = max / limit;
    let clips = max > 0.0 && max / scale > limit + 0.5;
    if clips { scale.next_up() } else { scale }
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
    }
}
