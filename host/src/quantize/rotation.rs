//! Rotations of input channels by Hadamard matrices, as in QuaRot (arXiv 2404.00456).
//!
//! If weights and activations are rotated alike, the product stays the same. A rotation spreads outliers
//! over the channels of its block, so both are easier to quantize.

use rayon::prelude::*;

use crate::Error;
use crate::check::{check_k, check_length, checked_elements};

/// Rotates each row of row-major `[rows, k]` values, in blocks of `block` neighbouring channels.
///
/// Each block is multiplied with the normalized Hadamard matrix of Sylvester's construction,
/// whose elements are `±1 / √block`. It is symmetric and its own inverse.
/// Weights are rotated offline. Activations are rotated before they are quantized,
/// or whatever writes them has rotated weights: for those, rotate the columns of their transpose.
///
/// # Errors
/// - [`Error::EmptyDimension`] if `k` is 0, [`Error::KTooLarge`] if it exceeds 131,072.
/// - [`Error::ShapeMismatch`] if the slice does not consist of whole rows.
/// - [`Error::InvalidRotation`] if the block is no power of two or does not divide `k`.
/// - [`Error::NonFiniteWeight`] with the position of the first value that is NaN or infinite.
pub fn rotate(values: &mut [f32], k: usize, block: usize) -> Result<(), Error> {
    check_k(k)?;
    if !block.is_power_of_two() || !k.is_multiple_of(block) {
        return Err(Error::InvalidRotation { block, k });
    }
    let expected = checked_elements("matrix", values.len().div_ceil(k), k)?;
    check_length("values", "[rows, k]", expected, values.len())?;
    if let Some(index) = values.par_iter().position_first(|value| !value.is_finite()) {
        return Err(Error::NonFiniteWeight { channel: index / k, k: index % k, value: values[index] });
    }
    // Dividing first keeps sums of large values within f32.
    let norm = (block as f32).sqrt().recip();
    values.par_chunks_exact_mut(k).for_each(|row| {
        for block in row.chunks_exact_mut(block) {
            block.iter_mut().for_each(|value| *value *= norm);
            butterflies(block);
        }
    });
    Ok(())
}

/// Multiplies with the Hadamard matrix of ±1.
fn butterflies(block: &mut [f32]) {
    let mut distance = 1;
    while distance < block.len() {
        for pair in block.chunks_exact_mut(2 * distance) {
            let (low, high) = pair.split_at_mut(distance);
            for (low, high) in low.iter_mut().zip(high) {
                (*low, *high) = (*low + *high, *low - *high);
            }
        }
        distance *= 2;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(count: usize, step: f32) -> Vec<f32> {
        (0..count).map(|i| (i as f32 * step).sin()).collect()
    }

    #[test]
    fn rotating_both_operands_keeps_their_product() {
        let k = 96;
        for block in [1, 2, 32] {
            let (mut w, mut x) = (values(k, 0.7), values(k, 1.3));
            let product = |w: &[f32], x: &[f32]| w.iter().zip(x).map(|(w, x)| w * x).sum::<f32>();
            let before = product(&w, &x);
            rotate(&mut w, k, block).unwrap();
            rotate(&mut x, k, block).unwrap();
            assert!((product(&w, &x) - before).abs() < 1e-4, "block {block}");
            assert!(block == 1 || w != values(k, 0.7));
        }
    }

    #[test]
    fn rotating_twice_changes_nothing_and_once_spreads_an_outlier_evenly() {
        let mut row = vec![0f32; 128];
        row[70] = 8.0;
        let original = row.clone();
        rotate(&mut row, 128, 64).unwrap();
        assert!(row[..64].iter().all(|&x| x == 0.0));
        assert!(row[64..].iter().all(|&x| x.abs() == 1.0));
        rotate(&mut row, 128, 64).unwrap();
        assert_eq!(row, original);
    }

    #[test]
    fn impossible_blocks_and_bad_values_are_refused_and_change_nothing() {
        let mut row = values(96, 1.0);
        for block in [0, 3, 64] {
            let error = rotate(&mut row, 96, block).unwrap_err();
            assert!(matches!(error, Error::InvalidRotation { k: 96, .. }), "{error}");
        }
        assert!(matches!(rotate(&mut row, 64, 64), Err(Error::ShapeMismatch { .. })));
        row[5] = f32::NAN;
        assert!(matches!(rotate(&mut row, 96, 32), Err(Error::NonFiniteWeight { channel: 0, k: 5, .. })));
        assert_eq!(row[..5], values(5, 1.0));
    }
}
