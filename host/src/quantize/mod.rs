//! Quantizes floating-point weights to packed 4-bit ones.
//!
//! A channel has one f32 scale, and each group of a channel has an integer pair `(s, a)`. A 4-bit code `q` represents
//! the weight `channel_scale · (q·s + a − 128)`. The way back to int8 needs one multiply-add and one XOR,
//! and the format's invariant `s ≥ 1`, `15·s + a ≤ 255` ensures that it cannot overflow.
//! The methods differ in how they choose scales, pairs and codes within that invariant:
//!
//! | file | what it does |
//! |---|---|
//! | `rtn.rs` | rounds to nearest by the paper's formulas |
//! | `search.rs` | searches each group's pair for the smallest squared error |
//! | `gptq.rs` | feeds each column's error back to the columns that follow (needs the inputs' Hessian) |
//! | `int4.rs` | takes the codes of other quantizers |
//! | `hessian.rs` | accumulates the Hessian, and factorizes it |
//! | `statistics.rs` | second moments and largest magnitudes of inputs |
//! | `smoothing.rs` | smoothing vectors |
//! | `rotation.rs` | rotates input channels by Hadamard matrices |
//! | `output_error.rs` | measures the error of packed weights |

#[cfg(feature = "gptq")]
mod gptq;
#[cfg(feature = "gptq")]
mod hessian;
mod int4;
mod output_error;
mod rotation;
mod rtn;
mod search;
mod smoothing;
mod statistics;

use std::fmt;
use std::str::FromStr;

use liquidgemm_format::brick::{BRICK_CHANNELS, BRICK_K};
use rayon::prelude::*;

use crate::check::{check_length, checked_elements};
use crate::packed::{PackedSizes, Packer};
use crate::{Error, Float, Group, PackedWeights};

#[cfg(feature = "gptq")]
pub use gptq::GptqOptions;
#[cfg(feature = "gptq")]
pub use hessian::{Hessian, HessianBuilder};
pub use int4::{ImportKind, Int4Import, Int4Weights};
pub use output_error::{Inputs, OutputError};
pub use rotation::rotate;
pub use smoothing::{SMOOTHING_SAMPLE, smoothing_auto, smoothing_auto_of_sample, smoothing_vector};
pub use statistics::{InputStatistics, InputStatisticsBuilder};

/// The protective range: int8 weights stay within ±119, so that the second level has room to round up.
const INT8_LIMIT: f32 = 119.0;

/// The largest 4-bit code.
const MAX_CODE: i32 = 15;

/// The value of the unsigned byte `q·s + a` that represents the weight 0.
const ZERO: i32 = 128;

/// How weights are quantized. All methods produce the same format, and cost the same at run time.
///
/// GPTQ needs more than a method's name, so it has a function of its own, `PackedWeights::quantize_gptq`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Method {
    /// Round to nearest: the formulas of the LiquidGEMM paper (arXiv 2509.01229).
    ///
    /// Each channel first becomes int8 weights `w8` with one f32 scale:
    /// - `scale = max|w| / 119`.
    ///   A subnormal quotient may be rounded down so far that the largest weight would be clipped;
    ///   the scale is then the next larger f32.
    /// - `w8 = clamp(rne(w / scale), −119, 119)`, where `rne` rounds to nearest, ties to even.
    /// - A channel of zeros has scale 0 and int8 weights 0.
    ///
    /// Each group of `w8` with extremes `min` and `max` then becomes codes `q` with a pair `(s, a)`.
    /// Here `round` takes ties up:
    /// - `s = max(1, round((max − min) / 15))`
    /// - `a = min(128 + min, 255 − 15·s)`
    /// - `q = clamp(round((w8 + 128 − a) / s), 0, 15)`
    ///
    /// The paper has no upper limit of `a`. Its `a = 128 + min` breaks the format's invariant `15·s + a ≤ 255`
    /// if `s = 1` and every `w8` of the group is above 112.
    /// The limit changes such groups only, and they are kept exactly.
    Rtn,
    /// Searches the pair of each group, and its codes, for the smallest squared error of the weights.
    ///
    /// With second moments the squared errors are weighted by them:
    /// the sum is then the expected squared error of the outputs, if the inputs are uncorrelated.
    #[default]
    Search,
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Method::Rtn => "rtn",
            Method::Search => "search",
        })
    }
}

impl FromStr for Method {
    type Err = Error;

    /// Parses the text that [`Display`](fmt::Display) writes: `rtn` or `search`.
    ///
    /// # Errors
    /// [`Error::UnknownMethod`] for other text.
    fn from_str(text: &str) -> Result<Self, Error> {
        match text {
            "rtn" => Ok(Method::Rtn),
            "search" => Ok(Method::Search),
            _ => Err(Error::UnknownMethod { text: text.to_owned() }),
        }
    }
}

/// Options of [`PackedWeights::quantize_with`].
#[derive(Clone, Copy, Debug, Default)]
pub struct QuantizeOptions<'a> {
    /// The method.
    pub method: Method,
    /// How many weights share a pair.
    pub group: Group,
    /// E\[x²\] of each input channel, `[k]`, as [`InputStatistics`] collects it.
    pub second_moments: Option<&'a [f32]>,
}

impl PackedWeights {
    /// Quantizes and packs row-major `[n, k]` weights by the default method, [`Method::Search`].
    ///
    /// # Errors
    /// - [`Error::EmptyDimension`] if `n` or `k` is 0, [`Error::KTooLarge`] if `k` exceeds 131,072.
    /// - [`Error::InvalidGroup`] if the group is not a positive multiple of 64.
    /// - [`Error::ShapeMismatch`] if the slice does not have `n · k` elements.
    /// - [`Error::TooLarge`] if the weights exceed the address space.
    /// - [`Error::NonFiniteWeight`] with the position of the first weight that is NaN or infinite.
    pub fn quantize<T: Float>(weights: &[T], n: usize, k: usize, group: Group) -> Result<Self, Error> {
        Self::quantize_with(weights, n, k, &QuantizeOptions { group, ..Default::default() })
    }

    /// Quantizes and packs row-major `[n, k]` weights by the method and with the data of `options`.
    ///
    /// # Errors
    /// As [`quantize`](Self::quantize), and
    /// - [`Error::ShapeMismatch`] if `second_moments` does not have `k` elements.
    /// - [`Error::InvalidMoment`] if one of them is negative or not finite.
    /// - [`Error::UnusedMoments`] if there are second moments but the method is [`Method::Rtn`].
    pub fn quantize_with<T: Float>(
        weights: &[T],
        n: usize,
        k: usize,
        options: &QuantizeOptions<'_>,
    ) -> Result<Self, Error> {
        let &QuantizeOptions { method, group, second_moments } = options;
        check_weights(weights, n, k, group)?;
        if let Some(moments) = second_moments {
            if method == Method::Rtn {
                return Err(Error::UnusedMoments { method });
            }
            statistics::check_moments(moments, k)?;
        }
        let group_k = group.blocks(k)? * BRICK_K;
        let mut packer = Packer::new(n, k, group)?;
        packer.for_each_strip(|channels, mut strip| {
            let mut row = vec![0f32; k];
            let mut codes = vec![0u8; k];
            let mut pairs = Vec::with_capacity(k.div_ceil(group_k));
            let mut int8_weight = vec![0i8; k];
            let mut search = search::PairSearch::default();
            for channel in channels {
                widen(&weights[channel * k..][..k], &mut row);
                pairs.clear();
                let scale = match method {
                    Method::Rtn => {
                        rtn::quantize_channel(&row, group_k, &mut int8_weight, &mut codes, &mut pairs)
                    }
                    Method::Search => {
                        let (codes, pairs) = (&mut codes, &mut pairs);
                        search::quantize_channel(&row, second_moments, group_k, &mut search, codes, pairs)
                    }
                };
                strip.write_channel(channel % BRICK_CHANNELS, scale, &codes, &pairs);
            }
        });
        Ok(packer.finish())
    }
}

/// Checks the shape and the group of `[n, k]` weights, and that all weights are finite.
fn check_weights<T: Float>(weights: &[T], n: usize, k: usize, group: Group) -> Result<(), Error> {
    PackedSizes::new(n, k, group)?;
    check_length("weights", "[n, k]", checked_elements("weight matrix", n, k)?, weights.len())?;
    match weights.par_iter().position_first(|weight| !weight.to_f32().is_finite()) {
        Some(index) => {
            Err(Error::NonFiniteWeight { channel: index / k, k: index % k, value: weights[index].to_f32() })
        }
        None => Ok(()),
    }
}

/// Converts a row to f32.
fn widen<T: Float>(from: &[T], to: &mut [f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = from.to_f32();
    }
}
