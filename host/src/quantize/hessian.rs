//! The Hessian of a layer's output error, `E[x xᵀ]` of its inputs: accumulated over batches, and factorized.

use crate::check::{check_k, check_length, checked_elements};
use crate::{Error, Float};

/// `E[x xᵀ]` of a layer's inputs: a symmetric `[k, k]` matrix.
///
/// The expected squared error of an output is `d H dᵀ`, where `d` is the error of its weights.
#[derive(Clone, Debug, PartialEq)]
pub struct Hessian {
    values: Vec<f32>,
    k: usize,
}

impl Hessian {
    /// Takes a row-major symmetric `[k, k]` matrix. Its scale does not matter to the quantizer.
    ///
    /// # Errors
    /// - [`Error::EmptyDimension`] if `k` is 0, [`Error::KTooLarge`] if it exceeds 131,072.
    /// - [`Error::ShapeMismatch`] if the vector does not have `k²` elements.
    /// - [`Error::InvalidHessian`] if an element is not finite, or differs from its mirror image.
    /// - [`Error::InvalidMoment`] if an element of the diagonal is negative.
    pub fn new(values: Vec<f32>, k: usize) -> Result<Self, Error> {
        check_k(k)?;
        check_length("Hessian", "[k, k]", checked_elements("Hessian", k, k)?, values.len())?;
        for row in 0..k {
            for column in 0..=row {
                let value = values[row * k + column];
                if !value.is_finite() || value != values[column * k + row] {
                    return Err(Error::InvalidHessian { row, column, value });
                }
            }
            if values[row * k + row] < 0.0 {
                return Err(Error::InvalidMoment { k: row, value: values[row * k + row] });
            }
        }
        Ok(Self { values, k })
    }

    /// Returns the number of input channels.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Returns the matrix, row-major `[k, k]`.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// Returns its diagonal, E\[x²\] of each input channel: `[k]`.
    pub fn second_moments(&self) -> Vec<f32> {
        self.values.iter().step_by(self.k + 1).copied().collect()
    }
}

/// Accumulates a [`Hessian`] batch by batch.
#[derive(Clone, Debug)]
pub struct HessianBuilder {
    tokens: u64,
    /// `[k, k]`; the lower triangle.
    sum: Vec<f64>,
    k: usize,
}

impl HessianBuilder {
    /// Starts with no tokens, for inputs of `k` channels.
    ///
    /// # Errors
    /// - [`Error::EmptyDimension`] if `k` is 0, [`Error::KTooLarge`] if it exceeds 131,072.
    /// - [`Error::TooLarge`] if the matrix exceeds the address space.
    pub fn new(k: usize) -> Result<Self, Error> {
        check_k(k)?;
        Ok(Self { tokens: 0, sum: vec![0.0; checked_elements("Hessian", k, k)?], k })
    }

    /// Adds the inputs of `m` tokens, row-major `[m, k]`.
    ///
    /// # Errors
    /// - [`Error::ShapeMismatch`] if the slice does not have `m · k` elements.
    /// - [`Error::NonFiniteActivation`] with the position of the first value that is NaN or infinite.
    ///   The Hessian is then as it was.
    pub fn add<T: Float>(&mut self, inputs: &[T], m: usize) -> Result<(), Error> {
        let k = self.k;
        super::statistics::check_inputs(inputs, m, k)?;
        for row in inputs.chunks_exact(k) {
            for i in 0..k {
                let x = f64::from(row[i].to_f32());
                for j in 0..=i {
                    self.sum[i * k + j] += x * f64::from(row[j].to_f32());
                }
            }
        }
        self.tokens += m as u64;
        Ok(())
    }

    /// Returns the mean over all tokens.
    ///
    /// # Errors
    /// - [`Error::NoTokens`] if none was added.
    /// - [`Error::InvalidHessian`] if an element exceeds f32.
    pub fn finish(self) -> Result<Hessian, Error> {
        if self.tokens == 0 {
            return Err(Error::NoTokens);
        }
        let k = self.k;
        let mut values = vec![0f32; k * k];
        for i in 0..k {
            for j in 0..=i {
                let value = (self.sum[i * k + j] / self.tokens as f64) as f32;
                (values[i * k + j], values[j * k + i]) = (value, value);
            }
        }
        Hessian::new(values, k)
    }
}
