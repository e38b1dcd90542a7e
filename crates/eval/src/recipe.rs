//! How the layers of a model are made: which weights, which groups, with or without smoothing.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use candle_core::Tensor;
use liquidgemm::{Backend, Group, PackedWeights};

use crate::layers::{A8, Linear, W4A8};
use crate::model::{LinearWeights, Model};
use crate::moments::{Calibration, Moments};
use crate::{Error, Progress};

/// How weights become 4-bit codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Method {
    /// They do not: only activations are quantized, to int8.
    A8,
    /// The paper's recipe: round to nearest.
    Rtn,
}

impl Method {
    /// All methods.
    pub const ALL: [Method; 2] = [Method::A8, Method::Rtn];
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Method::A8 => "a8",
            Method::Rtn => "rtn",
        })
    }
}

impl FromStr for Method {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Method::ALL.into_iter().find(|method| method.to_string() == text);
        found.ok_or_else(|| format!("unknown method {text:?}; known are {}", Method::ALL.map(|m| m.to_string()).join(", ")))
    }
}

/// How the layers of a model are made.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Recipe {
    /// How weights become 4-bit codes.
    pub method: Method,
    /// The weights that share a pair. [`Method::A8`] has no groups.
    pub group: Group,
    /// The exponent of SmoothQuant, or `None` for no smoothing.
    pub smooth: Option<f32>,
}

impl Recipe {
    /// Returns whether the recipe needs second moments.
    pub fn needs_calibration(&self) -> bool {
        self.smooth.is_some()
    }

    /// Returns whether the recipe needs the full matrix of second moments.
    pub fn needs_hessian(&self) -> bool {
        false
    }

    /// Makes all linear layers of a model.
    ///
    /// # Errors
    /// [`Error::MissingCalibration`] if the recipe needs moments that are not there,
    /// [`Error::Layer`] if a layer can't be quantized.
    pub fn layers(
        &self,
        model: &Model,
        calibration: Option<&Calibration>,
        backend: &Arc<Backend>,
        progress: &dyn Progress,
    ) -> Result<Vec<Box<dyn Linear>>, Error> {
        progress.begin("quantizing", model.layers.len());
        let smoothing = self.smoothing(model, calibration)?;
        let mut layers = Vec::with_capacity(model.layers.len());
        for layer in &model.layers {
            layers.push(self.layer(layer, smoothing[layer.input].clone(), calibration, backend)?);
            progress.step();
        }
        Ok(layers)
    }

    fn layer(
        &self,
        layer: &LinearWeights,
        smoothing: Option<Vec<f32>>,
        _calibration: Option<&Calibration>,
        backend: &Arc<Backend>,
    ) -> Result<Box<dyn Linear>, Error> {
        let (n, k) = layer.shape();
        let failed = |source| Error::Layer { layer: layer.name.clone(), source };
        let weights = |weight: &Tensor| weight.flatten_all()?.to_vec1::<f32>();
        let smoothed = || -> Result<Vec<f32>, Error> {
            let weights = weights(&layer.weight)?;
            match &smoothing {
                None => Ok(weights),
                Some(factors) => liquidgemm::smooth_weights(&weights, n, k, factors).map_err(failed),
            }
        };
        let packed = match self.method {
            Method::A8 => return Ok(Box::new(A8::new(layer, smoothing)?)),
            Method::Rtn => PackedWeights::quantize(&smoothed()?, n, k, self.group),
        };
        let packed = packed.map_err(failed)?;
        Ok(Box::new(W4A8::new(&layer.name, packed, layer.bias.as_ref(), smoothing, Arc::clone(backend))?))
    }

    /// Returns the moments of a layer.
    fn moments<'a>(&self, layer: &str, calibration: Option<&'a Calibration>) -> Result<&'a Moments, Error> {
        calibration.and_then(|calibration| calibration.layer(layer)).ok_or_else(|| Error::MissingCalibration {
            method: self.to_string(),
            needed: "second moments",
            layer: layer.to_owned(),
            hint: "",
        })
    }

    /// Returns the smoothing vector of each input, at the number of its first layer.
    ///
    /// Layers with the same input share one vector, so that it can be folded into what comes before.
    /// `s = max|x|^α / max|w|^(1 − α)` for each channel (Xiao et al., arXiv 2211.10438),
    /// with the maximum of `|w|` over all of these layers.
    fn smoothing(
        &self,
        model: &Model,
        calibration: Option<&Calibration>,
    ) -> Result<Vec<Option<Vec<f32>>>, Error> {
        let mut vectors = vec![None; model.layers.len()];
        let Some(alpha) = self.smooth else { return Ok(vectors) };
        for (number, layer) in model.layers.iter().enumerate().filter(|(number, layer)| layer.input == *number) {
            let absmax = &self.moments(&layer.name, calibration)?.absmax;
            let (_, k) = layer.shape();
            if absmax.len() != k {
                let (actual, expected) = (vec![absmax.len()], vec![k]);
                return Err(Error::TensorShape { name: format!("{}.absmax", layer.name), actual, expected });
            }
            let mut weights = vec![0.0f32; k];
            for sharing in model.layers.iter().filter(|sharing| sharing.input == number) {
                let max = sharing.weight.abs()?.max(0)?.to_vec1::<f32>()?;
                weights.iter_mut().zip(max).for_each(|(weight, max)| *weight = weight.max(max));
            }
            vectors[number] = Some(absmax.iter().zip(&weights).map(|(&x, &w)| factor(x, w, alpha)).collect());
        }
        Ok(vectors)
    }
}

/// Returns `x^α / w^(1 − α)`, or 1 for a channel that is always zero or that no weight uses.
fn factor(x: f32, w: f32, alpha: f32) -> f32 {
    let factor = x.powf(alpha) / w.powf(1.0 - alpha);
    if x > 0.0 && w > 0.0 && factor.is_normal() { factor } else { 1.0 }
}

/// Writes `rtn g64`, `rtn channel`, `a8`, and with smoothing `rtn g64 smooth 0.5`.
impl fmt::Display for Recipe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.method)?;
        match self.group {
            _ if self.method == Method::A8 => {}
            Group::K(group) => write!(f, " g{group}")?,
            Group::Channel => write!(f, " channel")?,
        }
        self.smooth.map_or(Ok(()), |alpha| write!(f, " smooth {alpha}"))
    }
}
