//! Quantization of activations: a row of bf16 or f16 goes through an operation
//! and becomes int8 codes with one scale.
//!
//! `liquidgemm_format::activations` defines the arithmetic and the launches.
//! `host/src/cpu/activations.rs` computes the same on the CPU,
//! and the host twin, which launches these kernels, is `host/src/gpu/activations.rs`.
//!
//! [`row`] has the kernels for few rows, [`ring`] those for many.
//!
//! A row with a value that is not finite has the scale NaN and codes 0.

mod codes;
pub mod element;
pub mod operation;
mod reduce;
pub mod ring;
pub mod row;

use liquidgemm_format::activations::{QuantizeArguments, RowScale, VECTOR};

use crate::ptx::float::max_magnitude;
use crate::ptx::memory::{load_constant_x4_if, load_global, load_global_f32_if};
use element::{Vector, each};
use operation::Device;

/// Returns the row of the input from which row `index` of the output is made, or `None` if it does not exist.
///
/// # Safety
/// The arguments are valid.
#[inline(always)]
unsafe fn source_of_row(arguments: &QuantizeArguments, index: u32) -> Option<u32> {
    if arguments.rows == 0 {
        return Some(index);
    }
    // SAFETY: the caller guarantees the arguments.
    let source = unsafe { load_global(arguments.rows + index as u64 * 4) };
    (source < arguments.input_rows).then_some(source)
}

/// Returns how the values of row `index` become codes.
///
/// Their largest magnitude has the bits `max`, and the variance is that of [`RowScale::new`].
///
/// # Safety
/// The arguments are valid.
#[inline(always)]
unsafe fn scale_of_row(
    arguments: &QuantizeArguments,
    index: u32,
    max: u32,
    variance: Option<f32>,
) -> RowScale {
    let given = match arguments.given_scales {
        0 if arguments.static_scale < 0.0 => None,
        0 => Some(arguments.static_scale),
        // SAFETY: the caller guarantees the arguments.
        scales => Some(f32::from_bits(unsafe { load_global(scales + index as u64 * 4) })),
    };
    RowScale::new::<Device>(max, variance, given)
}

/// Returns the largest of `max` and the magnitudes of a vector's values, NaN if one is NaN.
#[inline(always)]
fn largest(max: f32, values: [f32; VECTOR]) -> f32 {
    let [a, b, c, d, e, f, g, h] = values;
    let [a, b, c, d] = [max_magnitude(a, b), max_magnitude(c, d), max_magnitude(e, f), max_magnitude(g, h)];
    max_magnitude(max, max_magnitude(max_magnitude(a, b), max_magnitude(c, d)))
}

/// Divides a vector's values by the smoothing vector, if there is one.
///
/// # Safety
/// The arguments are valid.
#[inline(always)]
unsafe fn smooth(arguments: &QuantizeArguments, vector: Vector, values: [f32; VECTOR]) -> [f32; VECTOR] {
    if arguments.smoothing == 0 {
        return values;
    }
    let address = arguments.smoothing + vector.first as u64 * 4;
    let fast = arguments.aligned != 0 && vector.is_whole();
    // SAFETY: the caller guarantees the elements.
    unsafe {
        let [a, b] = [load_constant_x4_if(fast, address), load_constant_x4_if(fast, address + 16)];
        let [[a, b, c, d], [e, f, g, h]] = [a, b].map(|words| words.map(f32::from_bits));
        let mut factors = [a, b, c, d, e, f, g, h];
        if !fast {
            factors = each(|i| load_global_f32_if((i as u32) < vector.length, address + i as u64 * 4, 1.0));
        }
        each(|i| values[i] / factors[i])
    }
}
