//! Smoothing vectors: they move the spread of input channels from the activations to the weights, which bear it better.
//!
//! Activations are divided by the vector, and columns of weights are multiplied by it
//! ([`smooth_weights`](crate::smooth_weights)), so the product stays the same.
//! The formula is that of SmoothQuant (arXiv 2211.10438).

use super::statistics::check_moments;
use super::{check_weights, widen};
use crate::check::check_length;
use crate::{
    Error, Float, Group, InputStatistics, Inputs, Method, PackedWeights, QuantizeOptions, smooth_weights,
};

/// Exponents that [`smoothing_auto`] tries, in tenths.
const TENTHS: std::ops::RangeInclusive<u8> = 0..=9;

/// Channels of the weights on which [`smoothing_auto`] measures.
pub const SMOOTHING_SAMPLE: usize = 256;

/// The largest code of an activation.
const ACTIVATION_LIMIT: f64 = 127.0;

/// Squared distance from 0, in units of the second moment, at which the largest value of a token is expected.
const LARGEST_OF_TOKEN: f64 = 9.0;

/// Returns the smoothing vector `largest_x[j]^alpha / largest_w[j]^(1 − alpha)`, `[k]`.
///
/// `largest_x` is max|x| of each input channel, `[k]`, and `largest_w` that of each column of the weights.
/// The weights are row-major `[n, k]`. If several matrices have the same input, such as Q, K and V,
/// they need one vector: pass their rows one after another.
///
/// The vector is normalized: the mean of its logarithms is 0.
/// A factor is 1 if its inputs or its weights are all 0, or if it is no normal f32.
///
/// # Errors
/// - As [`PackedWeights::quantize`] for the weights.
/// - [`Error::ShapeMismatch`] if `largest_x` does not have `k` elements,
///   [`Error::InvalidMoment`] if one is negative or not finite.
/// - [`Error::InvalidAlpha`] if `alpha` is not from 0 to 1.
pub fn smoothing_vector<T: Float>(
    largest_x: &[f32],
    weights: &[T],
    n: usize,
    k: usize,
    alpha: f32,
) -> Result<Vec<f32>, Error> {
    check_weights(weights, n, k, Group::default())?;
    check_length("largest magnitudes", "[k]", k, largest_x.len())?;
    check_moments(largest_x, k)?;
    if !(0.0..=1.0).contains(&alpha) {
        return Err(Error::InvalidAlpha { value: alpha });
    }
    Ok(vector(largest_x, &largest_of_columns(weights, k), alpha))
}

/// Returns the smoothing vector with the smallest expected error of the outputs, and its exponent `alpha`.
///
/// Exponents are 0.1, 0.2, …, 0.9; a vector of ones, with the exponent `None`, is returned if it is better than all.
/// The expected squared error of an output is the sum of two:
/// - that of the weights, quantized by [`Method::Search`], weighted by the second moments of the smoothed inputs;
/// - that of the activations: rounding errors of variance `step²/12`, where the step is 1/127 of
///   the largest value that a token is expected to have. That is three times the root of the second moment,
///   but no more than the largest value seen, in the channel where this is largest.
///
/// It is measured on 256 of the channels, evenly spaced. [`smoothing_vector`] explains the arguments.
///
/// # Errors
/// As [`smoothing_vector`], and for an invalid group or statistics of another k as [`PackedWeights::quantize_with`].
pub fn smoothing_auto<T: Float>(
    inputs: &InputStatistics,
    weights: &[T],
    n: usize,
    k: usize,
    group: Group,
) -> Result<(Vec<f32>, Option<f32>), Error> {
    check_weights(weights, n, k, group)?;
    let sampled = n.min(SMOOTHING_SAMPLE);
    let mut sample = vec![0f32; sampled * k];
    for (index, row) in sample.chunks_exact_mut(k).enumerate() {
        widen(&weights[index * n / sampled * k..][..k], row);
    }
    smoothing_auto_of_sample(inputs, &largest_of_columns(weights, k), &sample, group)
}

/// As [`smoothing_auto`], from what it takes of the weights: `largest_w`, the largest magnitude in each column, `[k]`,
/// and some channels, `[·, k]`, of which [`SMOOTHING_SAMPLE`] are enough.
///
/// # Errors
/// As [`smoothing_auto`].
pub fn smoothing_auto_of_sample(
    inputs: &InputStatistics,
    largest_w: &[f32],
    sample: &[f32],
    group: Group,
) -> Result<(Vec<f32>, Option<f32>), Error> {
    let k = largest_w.len();
    check_weights(largest_w, 1, k, group)?;
    check_weights(sample, sample.len() / k, k, group)?;
    check_moments(&inputs.second_moments, k)?;
    check_length("largest magnitudes", "[k]", k, inputs.largest.len())?;
    check_moments(&inputs.largest, k)?;
    let mut best: Option<(f64, Vec<f32>, Option<f32>)> = None;
    for tenths in TENTHS {
        let alpha = (tenths > 0).then_some(f32::from(tenths) / 10.0);
        let factors = alpha.map_or(vec![1.0; k], |alpha| vector(&inputs.largest, largest_w, alpha));
        let Some(error) = expected_error(inputs, sample, k, &factors, group)? else { continue };
        if best.as_ref().is_none_or(|(least, ..)| error < *least) {
            best = Some((error, factors, alpha));
        }
    }
    Ok(best.map_or((vec![1.0; k], None), |(_, factors, alpha)| (factors, alpha)))
}

/// Returns the expected squared error of the outputs of all rows, or `None` if the smoothed weights overflow.
fn expected_error(
    inputs: &InputStatistics,
    rows: &[f32],
    k: usize,
    factors: &[f32],
    group: Group,
) -> Result<Option<f64>, Error> {
    let n = rows.len() / k;
    let InputStatistics { second_moments, largest } = inputs.smoothed(factors)?;
    let weights = smooth_weights(rows, n, k, factors)?;
    if weights.iter().any(|weight| !weight.is_finite()) {
        return Ok(None);
    }
    let square = |values: &[f32]| values.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>();
    let options = QuantizeOptions { method: Method::Search, group, second_moments: Some(&second_moments) };
    let packed = PackedWeights::quantize_with(&weights, n, k, &options)?;
    let relative = packed.output_error(&weights, Inputs::SecondMoments(&second_moments))?.outputs;
    let outputs: f64 = weights
        .chunks_exact(k)
        .flat_map(|row| row.iter().zip(&second_moments))
        .map(|(&weight, &moment)| f64::from(moment) * f64::from(weight).powi(2))
        .sum();
    let largest_of_token = second_moments
        .iter()
        .zip(&largest)
        .map(|(&moment, &largest)| (LARGEST_OF_TOKEN * f64::from(moment)).min(f64::from(largest).powi(2)))
        .fold(0.0, f64::max);
    let of_activations = largest_of_token / ACTIVATION_LIMIT.powi(2) / 12.0 * square(&weights);
    let error = relative.powi(2) * outputs + of_activations;
    Ok(error.is_finite().then_some(error))
}

/// Returns the largest magnitude in each column of row-major weights, `[k]`.
fn largest_of_columns<T: Float>(weights: &[T], k: usize) -> Vec<f32> {
    let mut largest = vec![0f32; k];
    for row in weights.chunks_exact(k) {
        for (largest, weight) in largest.iter_mut().zip(row) {
            *largest = largest.max(weight.to_f32().abs());
        }
    }
    largest
}

/// Returns the normalized smoothing vector for inputs and weights with these largest magnitudes.
fn vector(largest_x: &[f32], largest_w: &[f32], alpha: f32) -> Vec<f32> {
    let alpha = f64::from(alpha);
    let logarithms: Vec<Option<f64>> = largest_x
        .iter()
        .zip(largest_w)
        .map(|(&x, &w)| {
            (x > 0.0 && w > 0.0).then(|| alpha * f64::from(x).ln() - (1.0 - alpha) * f64::from(w).ln())
        })
        .collect();
    let known = logarithms.iter().flatten().count();
    let mean = logarithms.iter().flatten().sum::<f64>() / known.max(1) as f64;
    let factor = |logarithm: Option<f64>| {
        let factor = logarithm.map_or(1.0, |logarithm| (logarithm - mean).exp()) as f32;
        if factor.is_normal() { factor } else { 1.0 }
    };
    logarithms.into_iter().map(factor).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn at_one_half_inputs_and_weights_get_the_same_spread() {
        let largest_x = [8.0, 0.5, 2.0, 1.0];
        let weights = [0.5f32, -1.0, 0.125, 2.0, -0.25, 0.5, 0.0625, 1.0];
        let factors = smoothing_vector(&largest_x, &weights, 2, 4, 0.5).unwrap();
        let largest_w = [0.5, 1.0, 0.125, 2.0];
        let ratios: Vec<f32> =
            (0..4).map(|j| largest_x[j] / factors[j] / (largest_w[j] * factors[j])).collect();
        assert!(ratios.iter().all(|ratio| (ratio / ratios[0] - 1.0).abs() < 1e-5), "{ratios:?}");
        assert!((factors.iter().map(|f| f.ln()).sum::<f32>()).abs() < 1e-5, "{factors:?}");
    }

    #[test]
    fn dead_inputs_and_dead_weights_keep_the_factor_one() {
        let factors = smoothing_vector(&[0.0, 4.0, 9.0], &[1.0f32, 0.0, 1.0], 1, 3, 0.5).unwrap();
        assert_eq!(factors[..2], [1.0, 1.0]);
    }

    #[test]
    fn bad_statistics_and_exponents_are_refused() {
        let weights = [1.0f32; 6];
        for alpha in [-0.1, 1.1, f32::NAN] {
            let error = smoothing_vector(&[1.0; 3], &weights, 2, 3, alpha).unwrap_err();
            assert!(matches!(error, Error::InvalidAlpha { .. }), "{error}");
        }
        let error = smoothing_vector(&[1.0, f32::NAN, 1.0], &weights, 2, 3, 0.5).unwrap_err();
        assert!(matches!(error, Error::InvalidMoment { k: 1, .. }), "{error}");
        let error = smoothing_vector(&[1.0; 2], &weights, 2, 3, 0.5).unwrap_err();
        assert!(matches!(error, Error::ShapeMismatch { .. }), "{error}");
    }

    #[test]
    fn outlier_inputs_are_smoothed_and_even_ones_are_left_alone() {
        let (n, k) = (64, 256);
        let weights: Vec<f32> = (0..n * k).map(|i| ((i * i) as f32 * 0.37).sin()).collect();
        let even = InputStatistics { second_moments: vec![1.0; k], largest: vec![4.0; k] };
        let mut outliers = even.clone();
        for j in (0..k).step_by(50) {
            outliers.second_moments[j] = 10_000.0;
            outliers.largest[j] = 400.0;
        }
        let (factors, alpha) = smoothing_auto(&outliers, &weights, n, k, Group::default()).unwrap();
        assert!(alpha.is_some());
        assert!(factors[50] > 4.0 * factors[51], "{} {}", factors[50], factors[51]);
        let error = |factors: &[f32]| {
            expected_error(&outliers, &weights, k, factors, Group::default()).unwrap().unwrap()
        };
        assert!(error(&factors) < 0.5 * error(&vec![1.0; k]));
    }
}
