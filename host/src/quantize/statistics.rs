//! Statistics of a layer's inputs, channel by channel: second moments and largest magnitudes.
//! Calibration collects them over many batches; the quantizers and the smoothing vectors use them.

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
        let moment = |square: f64| (square / tokens).min(f64::from(f32::MAX)) as f32;
        let second_moments = self.squares.into_iter().map(moment).collect();
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
