//! What quantization costs: the errors of packed weights, and of the outputs that can be expected from them.

use liquidgemm_format::brick::BRICK_CHANNELS;
use rayon::prelude::*;

use super::{check_weights, statistics, widen};
use crate::{Error, Float, PackedWeights};

/// What is known of a layer's inputs.
#[derive(Clone, Copy, Debug, Default)]
pub enum Inputs<'a> {
    /// Nothing: input channels are taken as uncorrelated and equally large.
    #[default]
    Unknown,
    /// E\[x²\] of each input channel, `[k]`: they are taken as uncorrelated.
    SecondMoments(&'a [f32]),
    /// E\[x xᵀ\].
    #[cfg(feature = "gptq")]
    Hessian(&'a super::Hessian),
}

/// The error of packed weights against their originals.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OutputError {
    /// `‖Ŵ − W‖ / ‖W‖`, with Frobenius norms.
    pub weights: f64,
    /// `√(E‖(Ŵ − W)x‖² / E‖Wx‖²)`: the expected relative error of the outputs. That of activations is not in it.
    pub outputs: f64,
    /// Weights that are exactly 0.
    pub zeros: usize,
    /// Those of them that are exactly 0 in the packed weights.
    pub zeros_kept: usize,
}

/// Sums over channels.
#[derive(Clone, Copy, Default)]
struct Sums {
    weight_error: f64,
    weight: f64,
    output_error: f64,
    output: f64,
    zeros: usize,
    zeros_kept: usize,
}

impl PackedWeights {
    /// Measures these packed weights against their originals, row-major `[n, k]`.
    ///
    /// A relative error is 0 if there is no error, and infinite if the originals give only zeros and the packed weights do not.
    ///
    /// # Errors
    /// - [`Error::ShapeMismatch`] if a slice has the wrong length, or a Hessian is not `[k, k]`.
    /// - [`Error::NonFiniteWeight`] with the position of the first weight that is NaN or infinite.
    /// - [`Error::InvalidMoment`] if a second moment is negative or not finite.
    pub fn output_error<T: Float>(&self, weights: &[T], inputs: Inputs<'_>) -> Result<OutputError, Error> {
        let (n, k) = (self.n(), self.k());
        check_weights(weights, n, k, self.group())?;
        match inputs {
            Inputs::Unknown => {}
            Inputs::SecondMoments(moments) => statistics::check_moments(moments, k)?,
            #[cfg(feature = "gptq")]
            Inputs::Hessian(hessian) => {
                crate::check::check_length("Hessian", "[k, k]", k * k, hessian.values().len())?;
            }
        }
        // The sums are added in the order of the strips, so they do not depend on the number of threads.
        let strips: Vec<Sums> =
            (0..self.strips()).into_par_iter().map(|strip| self.strip_sums(strip, weights, inputs)).collect();
        let total = strips.into_iter().fold(Sums::default(), |total, of_strip| Sums {
            weight_error: total.weight_error + of_strip.weight_error,
            weight: total.weight + of_strip.weight,
            output_error: total.output_error + of_strip.output_error,
            output: total.output + of_strip.output,
            zeros: total.zeros + of_strip.zeros,
            zeros_kept: total.zeros_kept + of_strip.zeros_kept,
        });
        Ok(OutputError {
            weights: relative(total.weight_error, total.weight),
            outputs: relative(total.output_error, total.output),
            zeros: total.zeros,
            zeros_kept: total.zeros_kept,
        })
    }

    /// Sums over the channels of a strip.
    fn strip_sums<T: Float>(&self, strip: usize, weights: &[T], inputs: Inputs<'_>) -> Sums {
        let k = self.k();
        let first = strip * BRICK_CHANNELS;
        let channels = first..(first + BRICK_CHANNELS).min(self.n());
        let mut originals = vec![0f32; channels.len() * k];
        widen(&weights[channels.start * k..channels.end * k], &mut originals);
        let mut errors = vec![0f32; channels.len() * k];
        let mut sums = Sums::default();
        for channel in channels {
            let rows = (channel - first) * k..(channel - first + 1) * k;
            let scale = self.channel_scales()[channel];
            for (i, (error, &weight)) in errors[rows.clone()].iter_mut().zip(&originals[rows]).enumerate() {
                let int8_weight = self.int8_weight(channel, i);
                *error = f32::from(int8_weight) * scale - weight;
                sums.weight_error += f64::from(*error).powi(2);
                sums.weight += f64::from(weight).powi(2);
                sums.zeros += usize::from(weight == 0.0);
                sums.zeros_kept += usize::from(weight == 0.0 && int8_weight == 0);
            }
        }
        let expected = |rows: &[f32]| -> f64 {
            match inputs {
                Inputs::Unknown => rows.iter().map(|&x| f64::from(x).powi(2)).sum(),
                Inputs::SecondMoments(moments) => {
                    let square = |(&x, &moment): (&f32, &f32)| f64::from(moment) * f64::from(x).powi(2);
                    rows.chunks_exact(k).flat_map(|row| row.iter().zip(moments)).map(square).sum()
                }
                #[cfg(feature = "gptq")]
                Inputs::Hessian(hessian) => hessian.expected_square(rows),
            }
        };
        Sums { output_error: expected(&errors), output: expected(&originals), ..sums }
    }
}

/// Returns `√(error / whole)`.
fn relative(error: f64, whole: f64) -> f64 {
    // A Hessian that is not positive semidefinite may give a negative sum.
    if error <= 0.0 { 0.0 } else { (error / whole).sqrt() }
}
