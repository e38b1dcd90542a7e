//! GPTQ (arXiv 2210.17323) onto the two-level grid.

use super::{Hessian, check_weights};
use crate::{Error, Float, Group, PackedWeights, QuantizeOptions};

/// Options of [`PackedWeights::quantize_gptq`].
#[derive(Clone, Copy, Debug)]
pub struct GptqOptions {
    /// How many weights share a pair.
    pub group: Group,
    /// What is added to the Hessian's diagonal, as a fraction of its mean. Default: 0.01.
    pub damping: f32,
}

impl Default for GptqOptions {
    fn default() -> Self {
        Self { group: Group::default(), damping: 0.01 }
    }
}

impl PackedWeights {
    /// Quantizes and packs row-major `[n, k]` weights by GPTQ.
    ///
    /// # Errors
    /// As [`quantize`](Self::quantize), and
    /// - [`Error::ShapeMismatch`] if the Hessian is not `[k, k]`.
    /// - [`Error::InvalidDamping`] if the damping is negative or not finite.
    /// - [`Error::HessianNotPositive`] if the damped Hessian has no Cholesky factor.
    pub fn quantize_gptq<T: Float>(
        weights: &[T],
        n: usize,
        k: usize,
        hessian: &Hessian,
        options: &GptqOptions,
    ) -> Result<Self, Error> {
        check_weights(weights, n, k, options.group)?;
        crate::check::check_length("Hessian", "[k, k]", k * k, hessian.values().len())?;
        if !(options.damping.is_finite() && options.damping >= 0.0) {
            return Err(Error::InvalidDamping { value: options.damping });
        }
        let moments = hessian.second_moments();
        let options = QuantizeOptions {
            group: options.group,
            second_moments: Some(&moments),
            ..QuantizeOptions::default()
        };
        Self::quantize_with(weights, n, k, &options)
    }
}
