//! Division by a number that is known in advance, as one multiplication.
//!
//! The kernels use it to look up their tiles: GPUs have no instruction for integer division,
//! and every cycle at the start of a kernel counts.
//! The algorithm is that of Granlund and Montgomery,
//! *Division by Invariant Integers using Multiplication*, PLDI 1994, figure 4.1.

/// A divisor with the constants that divide by it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Divisor {
    divisor: u32,
    /// `⌊2³² · (2^shift − divisor) / divisor⌋ + 1`.
    multiplier: u32,
    /// `⌈log₂ divisor⌉`.
    shift: u32,
}

impl Divisor {
    /// Prepares division by `divisor`. Treats 0 as 1.
    #[must_use]
    pub const fn new(divisor: u32) -> Self {
        let divisor = if divisor == 0 { 1 } else { divisor };
        let shift = u32::BITS - (divisor - 1).leading_zeros();
        let power = 1u64 << shift;
        let multiplier = (((power - divisor as u64) << 32) / divisor as u64 + 1) as u32;
        Self { divisor, multiplier, shift }
    }

    /// Returns the divisor.
    #[inline(always)]
    #[must_use]
    pub const fn divisor(self) -> u32 {
        self.divisor
    }

    /// Returns `⌊dividend / divisor⌋`. It is exact for every dividend.
    #[inline(always)]
    #[must_use]
    pub const fn quotient(self, dividend: u32) -> u32 {
        let high = (dividend as u64 * self.multiplier as u64) >> 32;
        // The shift is at most 32. The mask only shows that it stays below 64.
        ((high + dividend as u64) >> (self.shift & 63)) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_extremes_divide_exactly() {
        let interesting = [
            1,
            2,
            3,
            5,
            7,
            64,
            127,
            128,
            641,
            65_535,
            65_536,
            1 << 31,
            (1 << 31) + 1,
            u32::MAX - 1,
            u32::MAX,
        ];
        for divisor in interesting {
            for dividend in interesting.into_iter().chain([0]) {
                assert_eq!(
                    Divisor::new(divisor).quotient(dividend),
                    dividend / divisor,
                    "{dividend} / {divisor}"
                );
            }
        }
    }

    #[test]
    fn zero_divides_like_one() {
        assert_eq!(Divisor::new(0).quotient(12), 12);
    }

    proptest! {
        #[test]
        fn quotients_are_those_of_division(dividend: u32, divisor in 1u32.., small in 1u32..5000) {
            prop_assert_eq!(Divisor::new(divisor).quotient(dividend), dividend / divisor);
            prop_assert_eq!(Divisor::new(small).quotient(dividend), dividend / small);
        }
    }
}
