//! What quantization costs: the errors of packed weights, and of the outputs that can be expected from them.

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
    /// `√(E‖(Ŵ − W)x‖² / E‖Wx‖²)`: the expected relative error of the outputs.
    pub outputs: f64,
    /// Weights that are exactly 0.
    pub zeros: usize,
    /// Those of them that are exactly 0 in the packed weights.
    pub zeros_kept: usize,
}

impl PackedWeights {
    /// Measures these packed weights against their originals, row-major `[n, k]`.
    ///
    /// A relative error is 0 if there is no error, and infinite if the originals are all 0 and the packed ones are not.
    ///
    /// # Errors
    /// - [`Error::ShapeMismatch`] if a slice has the wrong length.
    /// - [`Error::NonFiniteWeight`] with the position of the first weight that is NaN or infinite.
    /// - [`Error::InvalidMoment`] if a second moment is negative or not finite.
    /// - [`Error::KMismatch`] if a Hessian has another k.
    pub fn output_error<T: Float>(&self, weights: &[T], inputs: Inputs<'_>) -> Result<OutputError, Error> {
        let (n, k) = (self.n(), self.k());
        check_weights(weights, n, k, self.group())?;
        let ones;
        let moments = match inputs {
            Inputs::Unknown => {
                ones = vec![1.0; k];
                &ones[..]
            }
            Inputs::SecondMoments(moments) => moments,
            #[cfg(feature = "gptq")]
            Inputs::Hessian(hessian) => {
                ones = hessian.second_moments();
                &ones[..]
            }
        };
        statistics::check_moments(moments, k)?;
        let back = self.dequantize();
        let sums: Vec<[f64; 6]> = (0..n)
            .into_par_iter()
            .map(|channel| {
                let mut row = vec![0.0; k];
                widen(&weights[channel * k..][..k], &mut row);
                let mut sums = [0.0; 6];
                for ((&w, &b), &m) in row.iter().zip(&back[channel * k..]).zip(moments) {
                    let (w, b, m) = (f64::from(w), f64::from(b), f64::from(m));
                    let d = b - w;
                    let zero = f64::from(u8::from(w == 0.0));
                    let kept = f64::from(u8::from(w == 0.0 && b == 0.0));
                    for (sum, x) in sums.iter_mut().zip([d * d, w * w, m * d * d, m * w * w, zero, kept]) {
                        *sum += x;
                    }
                }
                sums
            })
            .collect();
        let total = sums.iter().fold([0.0; 6], |mut total, sums| {
            for (total, sum) in total.iter_mut().zip(sums) {
                *total += sum;
            }
            total
        });
        Ok(OutputError {
            weights: relative(total[0], total[1]),
            outputs: relative(total[2], total[3]),
            zeros: total[4] as usize,
            zeros_kept: total[5] as usize,
        })
    }
}

fn relative(error: f64, whole: f64) -> f64 {
    if error == 0.0 { 0.0 } else { (error / whole).sqrt() }
}
