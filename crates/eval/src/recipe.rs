//! How the layers of a model are made: which weights, which groups, with or without smoothing.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use liquidgemm::{Backend, GptqOptions, Group, Hessian, InputStatistics, PackedWeights, QuantizeOptions};
use liquidgemm_checkpoint::Smoothing;

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
    /// A search for the pairs with the smallest error of the weights, without data.
    Search,
    /// The same, weighted by the second moments of the inputs.
    Weighted,
    /// GPTQ, with the Hessian of the inputs.
    Gptq,
}

impl Method {
    /// All methods.
    pub const ALL: [Method; 5] = [Method::A8, Method::Rtn, Method::Search, Method::Weighted, Method::Gptq];
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Method::A8 => "a8",
            Method::Rtn => "rtn",
            Method::Search => "search",
            Method::Weighted => "weighted",
            Method::Gptq => "gptq",
        })
    }
}

impl FromStr for Method {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Method::ALL.into_iter().find(|method| method.to_string() == text).ok_or_else(|| {
            let known = Method::ALL.map(|method| method.to_string()).join(", ");
            format!("unknown method {text:?}; known are {known}")
        })
    }
}

/// How the layers of a model are made.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Recipe {
    /// How weights become 4-bit codes.
    pub method: Method,
    /// The weights that share a pair. [`Method::A8`] has no groups.
    pub group: Group,
    /// Whether inputs are smoothed, and by which exponent (arXiv 2211.10438).
    pub smooth: Option<Smoothing>,
}

impl Recipe {
    /// Returns whether the recipe needs second moments.
    pub fn needs_calibration(&self) -> bool {
        self.smooth.is_some() || matches!(self.method, Method::Weighted | Method::Gptq)
    }

    /// Returns whether the recipe needs the full matrix of second moments.
    pub fn needs_hessian(&self) -> bool {
        self.method == Method::Gptq
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
        calibration: Option<&Calibration>,
        backend: &Arc<Backend>,
    ) -> Result<Box<dyn Linear>, Error> {
        if self.method == Method::A8 {
            return Ok(Box::new(A8::new(layer, smoothing)?));
        }
        let (n, k) = layer.shape();
        let failed = |source| Error::Layer { layer: layer.name.clone(), source };
        let mut weights = layer.weight.flatten_all()?.to_vec1::<f32>()?;
        if let Some(factors) = &smoothing {
            weights = liquidgemm::smooth_weights(&weights, n, k, factors).map_err(failed)?;
        }
        let options = |method, second_moments| QuantizeOptions { method, group: self.group, second_moments };
        let packed = match self.method {
            Method::A8 => unreachable!("returned above"),
            Method::Rtn => {
                PackedWeights::quantize_with(&weights, n, k, &options(liquidgemm::Method::Rtn, None))
            }
            Method::Search => {
                PackedWeights::quantize_with(&weights, n, k, &options(liquidgemm::Method::Search, None))
            }
            Method::Weighted => {
                let mut moments = self.moments(layer, calibration)?.mean_square.clone();
                for (moment, factor) in moments.iter_mut().zip(smoothing.iter().flatten()) {
                    *moment /= factor * factor;
                }
                let options = options(liquidgemm::Method::Search, Some(&moments[..]));
                PackedWeights::quantize_with(&weights, n, k, &options)
            }
            Method::Gptq => {
                let hessian = self.hessian(layer, smoothing.as_deref(), calibration)?;
                let options = GptqOptions { group: self.group, ..GptqOptions::default() };
                PackedWeights::quantize_gptq(&weights, n, k, &hessian, &options)
            }
        };
        let packed = packed.map_err(failed)?;
        Ok(Box::new(W4A8::new(&layer.name, packed, layer.bias.as_ref(), smoothing, Arc::clone(backend))?))
    }

    /// Returns the Hessian of a layer's inputs after they were divided by the smoothing vector.
    fn hessian(
        &self,
        layer: &LinearWeights,
        smoothing: Option<&[f32]>,
        calibration: Option<&Calibration>,
    ) -> Result<Hessian, Error> {
        let Some(hessian) = &self.moments(layer, calibration)?.hessian else {
            return Err(self.missing(layer, "the Hessian", " --hessian"));
        };
        let (_, k) = layer.shape();
        let mut values = hessian.clone();
        if let Some(factors) = smoothing {
            for (row, by) in values.chunks_exact_mut(k).zip(factors) {
                row.iter_mut().zip(factors).for_each(|(value, factor)| *value /= by * factor);
            }
        }
        Hessian::new(values, k).map_err(|source| Error::Layer { layer: layer.name.clone(), source })
    }

    fn missing(&self, layer: &LinearWeights, needed: &'static str, hint: &'static str) -> Error {
        Error::MissingCalibration { method: self.to_string(), needed, layer: layer.name.clone(), hint }
    }

    /// Returns the moments of a layer, with a vector for each of its channels.
    fn moments<'a>(
        &self,
        layer: &LinearWeights,
        calibration: Option<&'a Calibration>,
    ) -> Result<&'a Moments, Error> {
        let moments = calibration
            .and_then(|calibration| calibration.layer(&layer.name))
            .ok_or_else(|| self.missing(layer, "second moments", ""))?;
        let (actual, (_, k)) = (moments.mean_square.len(), layer.shape());
        if actual != k {
            let name = format!("{}.mean_square", layer.name);
            return Err(Error::TensorShape { name, actual: vec![actual], expected: vec![k] });
        }
        Ok(moments)
    }

    /// Returns the smoothing vector of each input, at the number of its first layer.
    ///
    /// Layers with the same input share one vector, so that it can be folded into what comes before.
    /// It is that of their weights stacked.
    fn smoothing(
        &self,
        model: &Model,
        calibration: Option<&Calibration>,
    ) -> Result<Vec<Option<Vec<f32>>>, Error> {
        let mut vectors = vec![None; model.layers.len()];
        let Some(smooth) = self.smooth else { return Ok(vectors) };
        for (number, layer) in
            model.layers.iter().enumerate().filter(|(number, layer)| layer.input == *number)
        {
            let moments = self.moments(layer, calibration)?;
            let mut weights = Vec::new();
            for sharing in model.layers.iter().filter(|sharing| sharing.input == number) {
                weights.extend(sharing.weight.flatten_all()?.to_vec1::<f32>()?);
            }
            let k = layer.shape().1;
            let n = weights.len() / k;
            let vector = match smooth {
                Smoothing::Alpha(alpha) => {
                    liquidgemm::smoothing_vector(&moments.absmax, &weights, n, k, alpha)
                }
                Smoothing::Auto => {
                    let statistics = InputStatistics {
                        second_moments: moments.mean_square.clone(),
                        largest: moments.absmax.clone(),
                    };
                    liquidgemm::smoothing_auto(&statistics, &weights, n, k, self.group)
                        .map(|(vector, _)| vector)
                }
            };
            let failed = |source| Error::Layer { layer: layer.name.clone(), source };
            vectors[number] = Some(vector.map_err(failed)?);
        }
        Ok(vectors)
    }
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
        self.smooth.map_or(Ok(()), |smooth| write!(f, " smooth {smooth}"))
    }
}
