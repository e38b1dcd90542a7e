//! Linear layers as a forward pass runs them: in float, with W4A8, or with int8 activations alone.

use std::cell::RefCell;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use liquidgemm::gpu::DeviceWeights;
use liquidgemm::{Backend, PackedWeights, QuantizedActivations};

use crate::Error;
use crate::model::{Layers, LinearWeights};

/// A linear layer of a forward pass.
pub trait Linear {
    /// Computes `[tokens, k]` to `[tokens, n]`.
    ///
    /// # Errors
    /// Whatever keeps the layer from being computed.
    fn forward(&self, x: &Tensor) -> Result<Tensor, Error>;
}

/// The float layers of a model.
#[derive(Debug)]
pub struct FloatLayers<'a>(pub &'a [LinearWeights]);

impl Layers for FloatLayers<'_> {
    fn apply(&self, layer: usize, x: &Tensor) -> Result<Tensor, Error> {
        let LinearWeights { weight, bias, .. } = &self.0[layer];
        float(x, weight, bias.as_ref())
    }
}

fn float(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor, Error> {
    let y = x.matmul(&weight.t()?)?;
    Ok(bias.map_or(Ok(y.clone()), |bias| y.broadcast_add(bias))?)
}

impl Layers for Vec<Box<dyn Linear>> {
    fn apply(&self, layer: usize, x: &Tensor) -> Result<Tensor, Error> {
        self[layer].forward(x)
    }
}

/// A layer with packed weights: activations become int8, the product is that of the library.
#[derive(Debug)]
pub struct W4A8 {
    name: String,
    weights: PackedWeights,
    /// The weights on the GPU, if the backend is one.
    device: Option<DeviceWeights>,
    bias: Option<Vec<f32>>,
    smoothing: Option<Vec<f32>>,
    backend: Arc<Backend>,
}

impl W4A8 {
    /// Takes packed weights, the bias and the smoothing vector of layer `name`.
    ///
    /// # Errors
    /// [`Error::Layer`] if the GPU has no memory for the weights.
    pub fn new(
        name: &str,
        weights: PackedWeights,
        bias: Option<&Tensor>,
        smoothing: Option<Vec<f32>>,
        backend: Arc<Backend>,
    ) -> Result<Self, Error> {
        let device = backend.as_gpu().map(|gpu| gpu.upload(&weights)).transpose();
        let device = device.map_err(|source| Error::Layer { layer: name.to_owned(), source })?;
        let bias = bias.map(|bias| bias.to_vec1()).transpose()?;
        Ok(Self { name: name.to_owned(), weights, device, bias, smoothing, backend })
    }
}

impl Linear for W4A8 {
    fn forward(&self, x: &Tensor) -> Result<Tensor, Error> {
        let failed = |source| Error::Layer { layer: self.name.clone(), source };
        let x = quantize(x, self.smoothing.as_deref()).map_err(failed)?;
        let bias = self.bias.as_deref();
        let y = match (self.backend.as_gpu(), &self.device) {
            (Some(gpu), Some(weights)) => gpu.multiply_with(weights, &x, bias),
            _ => self.backend.multiply::<f32>(&self.weights, &x, bias),
        };
        Ok(Tensor::from_vec(y.map_err(failed)?, (x.m(), self.weights.n()), &Device::Cpu)?)
    }
}

/// A layer with float weights and int8 activations: what W4A8 would be if weights lost nothing.
#[derive(Debug)]
pub struct A8 {
    name: String,
    /// `[n, k]`, multiplied by the smoothing vector.
    weight: Tensor,
    bias: Option<Tensor>,
    smoothing: Option<Vec<f32>>,
}

impl A8 {
    /// Takes a layer's float weights and its smoothing vector `[k]`.
    ///
    /// # Errors
    /// If the vector has another length.
    pub fn new(layer: &LinearWeights, smoothing: Option<Vec<f32>>) -> Result<Self, Error> {
        let weight = match &smoothing {
            None => layer.weight.clone(),
            Some(factors) => {
                layer.weight.broadcast_mul(&Tensor::from_slice(factors, factors.len(), &Device::Cpu)?)?
            }
        };
        Ok(Self { name: layer.name.clone(), weight, bias: layer.bias.clone(), smoothing })
    }
}

impl Linear for A8 {
    fn forward(&self, x: &Tensor) -> Result<Tensor, Error> {
        let failed = |source| Error::Layer { layer: self.name.clone(), source };
        let quantized = quantize(x, self.smoothing.as_deref()).map_err(failed)?;
        let x = Tensor::from_vec(quantized.dequantize(), x.shape(), &Device::Cpu)?;
        float(&x, &self.weight, self.bias.as_ref())
    }
}

fn quantize(x: &Tensor, smoothing: Option<&[f32]>) -> Result<QuantizedActivations, liquidgemm::Error> {
    let (m, k) = x.dims2().expect("activations have two dimensions");
    let values: Vec<f32> = x.flatten_all().and_then(|x| x.to_vec1()).expect("activations are f32 on the CPU");
    match smoothing {
        None => QuantizedActivations::quantize(&values, m, k),
        Some(factors) => QuantizedActivations::with_smoothing(&values, m, k, factors),
    }
}

/// Runs a model in float, and compares other layers on the same inputs as it goes.
pub struct Comparison<'a> {
    float: FloatLayers<'a>,
    others: &'a dyn Layers,
    /// For each layer the sums of squares of differences and of float outputs.
    sums: RefCell<Vec<[f64; 2]>>,
}

impl<'a> Comparison<'a> {
    /// Compares `others` with the float layers.
    pub fn new(layers: &'a [LinearWeights], others: &'a dyn Layers) -> Self {
        Self { float: FloatLayers(layers), others, sums: RefCell::new(vec![[0.0; 2]; layers.len()]) }
    }

    /// Returns each layer's `‖Y − Y_float‖ / ‖Y_float‖` over everything that it has computed.
    pub fn errors(&self) -> Vec<f64> {
        let ratio = |&[difference, output]: &[f64; 2]| {
            if output > 0.0 { (difference / output).sqrt() } else { 0.0 }
        };
        self.sums.borrow().iter().map(ratio).collect()
    }
}

impl Layers for Comparison<'_> {
    fn apply(&self, layer: usize, x: &Tensor) -> Result<Tensor, Error> {
        let y = self.float.apply(layer, x)?;
        let other = self.others.apply(layer, x)?;
        let [y_values, other] = [&y, &other].map(|y| y.flatten_all().and_then(|y| y.to_vec1::<f32>()));
        let mut sums = [0.0f64; 2];
        for (y, other) in y_values?.iter().zip(other?) {
            sums[0] += f64::from(y - other).powi(2);
            sums[1] += f64::from(*y).powi(2);
        }
        let total = &mut self.sums.borrow_mut()[layer];
        *total = [total[0] + sums[0], total[1] + sums[1]];
        Ok(y)
    }
}
