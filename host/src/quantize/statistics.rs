//! Statistics of a layer's inputs, channel by channel: second moments and largest magnitudes.
//! Calibration collects them over many batches; the quantizers and the smoothing vectors use them.

use crate::activations::check_smoothing;
use crate::check::{check_k, check_length, checked_elements};
use crate::{Error, Float};

/// Second moments and largest magnitudes of the input channels of a layer.
#[derive(Clone, Debug, PartialEq)]
pub struct InputStatistics {
    /// E\[x²\], `[k]`.
    pub second_moments: Vec<f32>,
    /// max|x|, `[k]`.
    pub largest: Vec<f32>,
}

impl InputStatistics {
    /// Returns the statistics of the inputs divided by a smoothing vector, `[k]`.
    /// A value beyond f32 becomes the largest f32.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] for another length, [`Error::InvalidSmoothing`] for a factor
    /// that is not finite and positive.
    pub fn smoothed(&self, smoothing: &[f32]) -> Result<Self, Error> {
        check_smoothing(smoothing, self.second_moments.len())?;
        let divide = |values: &[f32], power: i32| {
            let divide = |(&value, &factor): (&f32, &f32)| {
                within_f32(f64::from(value) / f64::from(factor).powi(power))
            };
            values.iter().zip(smoothing).map(divide).collect()
        };
        Ok(Self { second_moments: divide(&self.second_moments, 2), largest: divide(&self.largest, 1) })
    }
}

/// Converts a value that is not negative. One beyond f32 becomes the largest f32.
fn within_f32(value: f64) -> f32 {
    value.min(f64::from(f32::MAX)) as f32
}

/// Collects [`InputStatistics`] batch by batch.
#[derive(Clone, Debug)]
pub struct InputStatisticsBuilder {
    tokens: u64,
    squares: Vec<f64>,
    largest: Vec<f32>,
}

impl InputStatisticsBuilder {
    /// Starts with no tokens, for inputs of `k` channels.
    ///
    /// # Errors
    /// [`Error::EmptyDimension`] if `k` is 0, [`Error::KTooLarge`] if it exceeds 131,072.
    pub fn new(k: usize) -> Result<Self, Error> {
        check_k(k)?;
        Ok(Self { tokens: 0, squares: vec![0.0; k], largest: vec![0.0; k] })
    }

    /// Adds the inputs of `m` tokens, row-major `[m, k]`.
    ///
    /// # Errors
    /// - [`Error::ShapeMismatch`] if the slice does not have `m · k` elements.
    /// - [`Error::NonFiniteActivation`] with the position of the first value that is NaN or infinite.
    ///   The statistics are then as they were.
    pub fn add<T: Float>(&mut self, inputs: &[T], m: usize) -> Result<(), Error> {
        check_inputs(inputs, m, self.squares.len())?;
        for row in inputs.chunks_exact(self.squares.len()) {
            for ((square, largest), x) in self.squares.iter_mut().zip(&mut self.largest).zip(row) {
                let x = x.to_f32();
                *square += f64::from(x) * f64::from(x);
                *largest = largest.max(x.abs());
            }
        }
        self.tokens += m as u64;
        Ok(())
    }

    /// Returns the statistics of all tokens. A moment beyond f32 becomes the largest f32.
    ///
    /// # Errors
    /// [`Error::NoTokens`] if none was added.
    pub fn finish(self) -> Result<InputStatistics, Error> {
        if self.tokens == 0 {
            return Err(Error::NoTokens);
        }
        let tokens = self.tokens as f64;
        let second_moments = self.squares.into_iter().map(|square| within_f32(square / tokens)).collect();
        Ok(InputStatistics { second_moments, largest: self.largest })
    }
}

/// Checks inputs `[m, k]`: their number, and that all are finite.
pub(super) fn check_inputs<T: Float>(inputs: &[T], m: usize, k: usize) -> Result<(), Error> {
    check_length("activations", "[m, k]", checked_elements("activation matrix", m, k)?, inputs.len())?;
    match inputs.iter().position(|x| !x.to_f32().is_finite()) {
        Some(index) => {
            Err(Error::NonFiniteActivation { token: index / k, k: index % k, value: inputs[index].to_f32() })
        }
        None => Ok(()),
    }
}

/// Checks second moments `[k]`: finite and not negative.
pub(super) fn check_moments(moments: &[f32], k: usize) -> Result<(), Error> {
    check_length("second moments", "[k]", k, moments.len())?;
    match moments.iter().position(|moment| !(moment.is_finite() && *moment >= 0.0)) {
        Some(k) => Err(Error::InvalidMoment { k, value: moments[k] }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_add_up_to_the_statistics_of_all_tokens() {
        let x: Vec<f32> = (0..30).map(|i| (i as f32 - 11.0) * 0.5).collect();
        let mut builder = InputStatisticsBuilder::new(3).unwrap();
        builder.add(&x[..12], 4).unwrap();
        builder.add(&x[12..], 6).unwrap();
        let statistics = builder.finish().unwrap();
        for j in 0..3 {
            let column = || x.iter().skip(j).step_by(3);
            assert_eq!(statistics.second_moments[j], column().map(|x| x * x).sum::<f32>() / 10.0);
            assert_eq!(statistics.largest[j], column().fold(0f32, |max, x| max.max(x.abs())));
        }
        let smoothed = statistics.smoothed(&[2.0, 1.0, 0.5]).unwrap();
        assert_eq!(smoothed.second_moments[0], statistics.second_moments[0] / 4.0);
        assert_eq!(smoothed.largest[2], statistics.largest[2] * 2.0);
    }

    #[test]
    fn values_that_are_not_finite_are_refused_and_change_nothing() {
        let mut builder = InputStatisticsBuilder::new(2).unwrap();
        builder.add(&[1.0f32, 2.0], 1).unwrap();
        let error = builder.add(&[9.0, 9.0, 9.0, f32::INFINITY], 2).unwrap_err();
        assert!(matches!(error, Error::NonFiniteActivation { token: 1, k: 1, .. }), "{error}");
        assert!(matches!(builder.add(&[1.0f32; 3], 2), Err(Error::ShapeMismatch { .. })));
        assert_eq!(builder.finish().unwrap().second_moments, [1.0, 4.0]);
    }

    #[test]
    fn no_tokens_have_no_statistics() {
        assert!(matches!(InputStatisticsBuilder::new(2).unwrap().finish(), Err(Error::NoTokens)));
    }
}
