//! How weights are quantized.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use liquidgemm::{GptqOptions, Group, Hessian, InputStatistics, PackedWeights};

use crate::calibration::Calibration;
use crate::error::{CheckpointError, Result, weights_error};
use crate::select::Patterns;
use crate::smooth::Smoothing;

/// A method that chooses codes and pairs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Method {
    /// Round to nearest, as in the LiquidGEMM paper.
    Rtn,
    /// Searches each group's pair for the smallest squared error, weighted by the inputs' second moments if a calibration
    /// has them.
    #[default]
    Search,
    /// Feeds the error of each column back to those that follow. Needs a calibration with Hessians.
    Gptq,
}

impl Method {
    /// All methods.
    pub const ALL: [Self; 3] = [Method::Rtn, Method::Search, Method::Gptq];

    /// Returns the method for weights without statistics of their inputs: search in place of gptq.
    pub(crate) fn data_free(self) -> liquidgemm::Method {
        match self {
            Method::Rtn => liquidgemm::Method::Rtn,
            Method::Search | Method::Gptq => liquidgemm::Method::Search,
        }
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Method::Rtn => "rtn",
            Method::Search => "search",
            Method::Gptq => "gptq",
        })
    }
}

impl FromStr for Method {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|method| method.to_string() == text).ok_or_else(|| {
            let names: Vec<String> = Self::ALL.iter().map(ToString::to_string).collect();
            format!("{text:?} is no method; the methods are {}", names.join(", "))
        })
    }
}

/// What to quantize, and how.
#[derive(Clone, Debug, Default)]
pub struct QuantizeOptions {
    /// The method.
    pub method: Method,
    /// The group. Without one, 64, or the group of a model that another quantizer has quantized.
    pub group: Option<Group>,
    /// Patterns that overrule the default choice of layers.
    pub patterns: Patterns,
    /// Statistics of the layers' inputs.
    pub calibration: Option<Arc<Calibration>>,
    /// Smooths the inputs (SmoothQuant, arXiv 2211.10438). Modules with the same input share a smoothing vector.
    /// In LLaMA, Mistral and Qwen2 it is folded into the norm or the layer before where that is possible, else stored.
    pub smoothing: Option<Smoothing>,
}

impl QuantizeOptions {
    /// Fails if the options contradict one another.
    pub(crate) fn check(&self) -> Result<()> {
        let refuse = |reason: &str| Err(CheckpointError::Options { reason: reason.to_owned() });
        if self.calibration.is_none() && (self.method == Method::Gptq || self.smoothing.is_some()) {
            return refuse("gptq and smoothing need statistics of the inputs; give a calibration");
        }
        if self.calibration.is_some() && self.method == Method::Rtn && self.smoothing.is_none() {
            return refuse("rtn does not use a calibration; leave it out, or choose another method");
        }
        if matches!(self.smoothing, Some(Smoothing::Alpha(alpha)) if !(0.0..=1.0).contains(&alpha)) {
            return refuse("the exponent of smoothing must be from 0 to 1");
        }
        Ok(())
    }

    /// Returns a text that differs between options whose results could differ.
    /// The choice of layers is not part of it, because a plan lists the layers.
    pub(crate) fn fingerprint(&self) -> String {
        let calibration = self.calibration.as_ref().map(|calibration| calibration.fingerprint());
        format!("{} {:?} {calibration:?} {:?}", self.method, self.group, self.smoothing)
    }

    /// Prepares to quantize a module whose inputs are not those that the calibration has seen.
    pub(crate) fn quantizer(&self, module: &str, k: usize, inputs: &ChangedInputs<'_>) -> Result<Quantizer> {
        let Some(calibration) = &self.calibration else {
            return Ok(Quantizer::data_free(self.method));
        };
        Ok(match self.method {
            Method::Rtn => Quantizer::Rtn,
            Method::Search => {
                let InputStatistics { mut second_moments, .. } = calibration.statistics(module, k)?;
                for (column, moment) in second_moments.iter_mut().enumerate() {
                    *moment *= inputs.factor(column).powi(2);
                }
                if let Some(block) = inputs.block {
                    // Rotated, each of a block's channels has their mean, if they are uncorrelated.
                    for block in second_moments.chunks_mut(block) {
                        block.fill(block.iter().sum::<f32>() / block.len() as f32);
                    }
                }
                Quantizer::Search(Some(second_moments))
            }
            Method::Gptq => {
                let mut hessian = calibration.hessian(module, k)?;
                if inputs.smoothing.is_some() || inputs.norm.is_some() {
                    let factors: Vec<f32> = (0..k).map(|column| inputs.factor(column)).collect();
                    let scaled = hessian.values().iter().enumerate();
                    let scaled =
                        scaled.map(|(index, value)| value * (factors[index / k] * factors[index % k]));
                    hessian = Hessian::new(scaled.collect(), k).map_err(weights_error(module))?;
                }
                if let Some(block) = inputs.block {
                    hessian = hessian.rotated(block).map_err(weights_error(module))?;
                }
                Quantizer::Gptq(hessian)
            }
        })
    }
}

/// How the inputs of a module differ from those that the calibration has seen.
pub(crate) struct ChangedInputs<'a> {
    /// They are divided by this vector, `[k]`.
    pub(crate) smoothing: Option<&'a [f32]>,
    /// They lack this norm's weight, `[k]`.
    pub(crate) norm: Option<&'a [f32]>,
    /// They are rotated in blocks of so many channels.
    pub(crate) block: Option<usize>,
}

impl ChangedInputs<'_> {
    /// Returns what a channel is multiplied by. Nothing is known of a channel whose norm's weight is 0.
    fn factor(&self, column: usize) -> f32 {
        let divisor = |vector: Option<&[f32]>| vector.map_or(1.0, |vector| vector[column]);
        let divisor = divisor(self.smoothing) * divisor(self.norm);
        if divisor == 0.0 { 0.0 } else { 1.0 / divisor }
    }
}

/// A method with all that it needs for one module.
pub(crate) enum Quantizer {
    Rtn,
    /// With second moments of the inputs, `[k]`, or without.
    Search(Option<Vec<f32>>),
    Gptq(Hessian),
}

impl Quantizer {
    /// Prepares to quantize without statistics of the inputs.
    pub(crate) fn data_free(method: Method) -> Self {
        if method == Method::Rtn { Quantizer::Rtn } else { Quantizer::Search(None) }
    }

    /// Returns whether blocks of channels cost as much as all channels together.
    pub(crate) fn wants_all_channels(&self) -> bool {
        matches!(self, Quantizer::Gptq(_))
    }

    /// Quantizes channels `[n, k]`.
    pub(crate) fn quantize(
        &self,
        weights: &[f32],
        n: usize,
        k: usize,
        group: Group,
    ) -> Result<PackedWeights, liquidgemm::Error> {
        let (method, second_moments) = match self {
            Quantizer::Rtn => (liquidgemm::Method::Rtn, None),
            Quantizer::Search(moments) => (liquidgemm::Method::Search, moments.as_deref()),
            Quantizer::Gptq(hessian) => {
                let options = GptqOptions { group, ..GptqOptions::default() };
                return PackedWeights::quantize_gptq(weights, n, k, hessian, &options);
            }
        };
        PackedWeights::quantize_with(
            weights,
            n,
            k,
            &liquidgemm::QuantizeOptions { method, group, second_moments },
        )
    }
}
