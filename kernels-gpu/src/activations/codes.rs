//! From values to int8 codes, a byte each.

use liquidgemm_format::activations::{RowScale, VECTOR};

use super::element::each;
use super::operation::Device;
use crate::ptx::integer::merge_bytes;

/// Clips a vector's values where the scale asks for it.
#[inline(always)]
pub fn adjust(scale: RowScale, values: [f32; VECTOR]) -> [f32; VECTOR] {
    each(|i| scale.adjust(values[i]))
}

/// Returns the codes of a vector of values.
#[inline(always)]
pub fn codes(scale: RowScale, values: [f32; VECTOR]) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = values.map(|value| scale.round::<Device>(value));
    [low_bytes(a, b, c, d), low_bytes(e, f, g, h)]
}

/// Returns the low bytes of four words.
#[inline(always)]
fn low_bytes(a: u32, b: u32, c: u32, d: u32) -> u32 {
    merge_bytes::<0x5410>(merge_bytes::<0x0040>(a, b), merge_bytes::<0x0040>(c, d))
}
