//! From values to int8 codes: `clamp(rne(x / scale))`, with correctly rounded quotients.

use liquidgemm_format::activations::{Arithmetic, CODE_LIMIT, VECTOR, scale_of_max};
use liquidgemm_format::rounding::{ROUNDING_SHIFT, scale_of};

use super::element::each;
use super::operation::Device;
use crate::ptx::float::multiply_add;
use crate::ptx::integer::merge_bytes;

/// 2⁸⁰, by which values and scale are multiplied or divided if the scale is outside of 2^±64.
const FAR: f32 = (1u128 << 80) as f32;
/// 2⁶⁴.
const RANGE: f32 = (1u128 << 64) as f32;

/// The scale of a row.
#[derive(Clone, Copy)]
pub struct RowScale {
    scale: f32,
    /// The power of two by which values are multiplied.
    factor: f32,
    /// The scale times the factor, from 2⁻⁶⁹ to 2⁶⁴.
    divisor: f32,
    /// 1 / divisor, rounded.
    inverse: f32,
    /// The magnitude to which values are clipped.
    most: f32,
}

impl RowScale {
    /// Returns the scale for a row whose largest magnitude has the bits `max`.
    ///
    /// `given` is a scale from elsewhere, used instead of the row's own.
    /// A row with a value that is not finite, or with such a given scale, has the scale NaN.
    #[inline(always)]
    pub fn new(max: u32, given: Option<f32>) -> Self {
        // With a largest magnitude from 2⁻⁵⁰ to 2⁶⁴ nothing is out of the ordinary.
        const LEAST: u32 = f32::to_bits(1.0 / (1u128 << 50) as f32);
        const INFINITE: u32 = f32::INFINITY.to_bits();
        if given.is_none() && (LEAST..RANGE.to_bits()).contains(&max) {
            let scale = scale_of_max::<Device>(f32::from_bits(max));
            let inverse = Device::reciprocal(scale);
            return Self { scale, factor: 1.0, divisor: scale, inverse, most: f32::INFINITY };
        }
        let scale = match given {
            Some(scale) => scale,
            None => scale_of(f32::from_bits(max), CODE_LIMIT),
        };
        let is_finite = max < INFINITE && scale.to_bits() & 0x7FFF_FFFF < INFINITE;
        if !is_finite || scale == 0.0 {
            let scale = if is_finite { 0.0 } else { f32::NAN };
            return Self { scale, factor: 1.0, divisor: 1.0, inverse: 1.0, most: 0.0 };
        }
        let magnitude = scale.abs();
        let factor = if magnitude < 1.0 / RANGE {
            FAR
        } else if magnitude > RANGE {
            1.0 / FAR
        } else {
            1.0
        };
        let divisor = scale * factor;
        // Between the largest code and where rounding would leave it.
        let most = magnitude * (CODE_LIMIT + 0.25);
        Self { scale, factor, divisor, inverse: Device::reciprocal(divisor), most }
    }

    /// Returns the scale.
    #[inline(always)]
    pub fn get(self) -> f32 {
        self.scale
    }

    /// Returns whether values must be [adjusted](Self::adjust) before [`codes`](Self::codes).
    #[inline(always)]
    pub fn adjusts(self) -> bool {
        self.most < f32::INFINITY
    }

    /// Clips values to the codes' range, or to 0 if the scale is 0 or NaN, and brings them near 1.
    ///
    /// The multiplication by a power of two is exact, except for values whose codes are 0.
    #[inline(always)]
    pub fn adjust(self, values: [f32; VECTOR]) -> [f32; VECTOR] {
        each(|i| values[i].max(-self.most).min(self.most) * self.factor)
    }

    /// Returns the codes of a vector of values, a byte each.
    ///
    /// The quotient is rounded correctly: an approximate one, and a correction by the exact remainder
    /// (P. Markstein, IBM J. Res. Dev. 34, 1990).
    #[inline(always)]
    pub fn codes(self, values: [f32; VECTOR]) -> [u32; 2] {
        let quotients = each(|i| {
            let near = values[i] * self.inverse;
            multiply_add(multiply_add(-near, self.divisor, values[i]), self.inverse, near)
        });
        let [a, b, c, d, e, f, g, h] = each(|i| quotients[i] + ROUNDING_SHIFT).map(f32::to_bits);
        [low_bytes(a, b, c, d), low_bytes(e, f, g, h)]
    }
}

/// Returns the low bytes of four words. Those of shifted values are their codes.
#[inline(always)]
fn low_bytes(a: u32, b: u32, c: u32, d: u32) -> u32 {
    merge_bytes::<0x5410>(merge_bytes::<0x0040>(a, b), merge_bytes::<0x0040>(c, d))
}
