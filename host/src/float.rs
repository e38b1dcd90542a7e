//! The floating-point types that weights and activations may come in.

use half::{bf16, f16};

/// An input element: [`f32`], [`half::f16`] or [`bf16`]. All of them convert to f32 without rounding.
pub trait Float: bytemuck::Pod + Send + Sync + sealed::Sealed {
    /// The same value as f32.
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

/// `rne(value)` after clamping to `±limit`, for a limit below 2²²: exactly `round_ties_even`, in two additions
/// that vectorize on any CPU.
///
/// Clamping first gives the same as clamping after, because the limits are integers.
#[inline(always)]
pub(crate) fn round_clamped(value: f32, limit: f32) -> i32 {
    /// 1.5 · 2²³: adding it leaves no bit for a fraction, so the sum is rounded to an integer, ties to even.
    const SHIFT: f32 = 12_582_912.0;
    (value.clamp(-limit, limit) + SHIFT).to_bits() as i32 - SHIFT.to_bits() as i32
}

/// The scale with which the largest magnitude becomes the code `limit`: `max / limit`, or where that is subnormal and rounded down so far that
/// the magnitude would be clipped, or to 0, the next number.
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
