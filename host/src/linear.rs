//! A linear layer on the host: packed weights with their bias and their smoothing vector.
//! Its twin in device memory is `gpu::DeviceLinear`, which gives the same bits.

use std::ops::Range;

use crate::activations::check_smoothing;
use crate::check::{check_finite, check_length, checked_elements};
use crate::cpu::{self, QuantizeInput, Residual};
use crate::operation::Half;
use crate::{Error, Output, PackedWeights, QuantizedActivations};

/// A linear layer `Y[m, n] = (X[m, k] / smoothing) · W[n, k]ᵀ + bias` with bf16 or f16 activations.
///
/// The activations are quantized to int8 on the way, after a norm or a gated activation function if one is asked for.
///
/// ```
/// use half::bf16;
/// use liquidgemm::cpu::QuantizeInput;
/// use liquidgemm::{Group, Linear, PackedWeights};
///
/// let (m, n, k) = (2, 3, 128);
/// let weights: Vec<f32> = (0..n * k).map(|i| (i as f32 * 0.37).sin()).collect();
/// let x: Vec<bf16> = (0..m * k).map(|i| bf16::from_f32((i as f32 * 0.11).cos())).collect();
///
/// let weights = PackedWeights::quantize(&weights, n, k, Group::default())?;
/// let layer = Linear::new(weights).with_bias(vec![1.0, 2.0, 3.0])?;
/// let y: Vec<bf16> = layer.forward(&QuantizeInput::new(&x, m, k), None)?;
/// assert_eq!(y.len(), m * n);
/// # Ok::<(), liquidgemm::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Linear {
    weights: PackedWeights,
    bias: Option<Vec<f32>>,
    smoothing: Option<Vec<f32>>,
}

impl Linear {
    /// Makes a layer without bias and smoothing.
    pub fn new(weights: PackedWeights) -> Self {
        Self { weights, bias: None, smoothing: None }
    }

    /// Makes a layer of several matrices with the same input, such as Q, K and V, or gate and up.
    ///
    /// Their outputs lie side by side in each row. One product computes all of them.
    ///
    /// # Errors
    /// As [`PackedWeights::join_channels`].
    pub fn stacked(matrices: &[PackedWeights]) -> Result<Self, Error> {
        Ok(Self::new(PackedWeights::join_channels(matrices)?))
    }

    /// Adds a bias, `[n]`.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] for another length, [`Error::NonFiniteParameter`] for a value that is not finite.
    pub fn with_bias(self, bias: Vec<f32>) -> Result<Self, Error> {
        check_length("bias", "[n]", self.n(), bias.len())?;
        check_finite("bias", &bias)?;
        Ok(Self { bias: Some(bias), ..self })
    }

    /// Adds a smoothing vector, `[k]`, by which activations are divided.
    ///
    /// The weights were multiplied by it before they were quantized
    /// ([`smooth_weights`](crate::smooth_weights)).
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] for another length, [`Error::InvalidSmoothing`] for a factor
    /// that is not finite and positive.
    pub fn with_smoothing(self, smoothing: Vec<f32>) -> Result<Self, Error> {
        check_smoothing(&smoothing, self.k())?;
        Ok(Self { smoothing: Some(smoothing), ..self })
    }

    /// Returns the layer of some output channels: a shard for column parallelism.
    ///
    /// The outputs of shards over consecutive ranges, side by side, are those of the whole layer, bit for bit.
    /// Each shard takes the whole input, so it needs no communication.
    /// Of stacked matrices such as Q, K and V, cut each for itself, and stack the shards of a GPU
    /// ([`stacked`](Self::stacked)).
    ///
    /// # Errors
    /// As [`PackedWeights::channel_shard`].
    pub fn channel_shard(&self, channels: Range<usize>) -> Result<Self, Error> {
        Ok(Self {
            weights: self.weights.channel_shard(channels.clone())?,
            bias: self.bias.as_ref().map(|bias| bias[channels].to_vec()),
            smoothing: self.smoothing.clone(),
        })
    }

    /// Returns the layer of some input channels: a shard for row parallelism.
    ///
    /// [`cpu::row_parallel`] and `gpu::RowParallelLinear` compute the whole layer from such shards.
    /// Each has the part of the smoothing vector that belongs to it, and the whole bias, which is added once.
    ///
    /// # Errors
    /// As [`PackedWeights::input_shard`].
    pub fn input_shard(&self, inputs: Range<usize>) -> Result<Self, Error> {
        Ok(Self {
            weights: self.weights.input_shard(inputs.clone())?,
            bias: self.bias.clone(),
            smoothing: self.smoothing.as_ref().map(|smoothing| smoothing[inputs].to_vec()),
        })
    }

    /// Returns the weights.
    pub fn weights(&self) -> &PackedWeights {
        &self.weights
    }

    /// Returns the bias, `[n]`.
    pub fn bias(&self) -> Option<&[f32]> {
        self.bias.as_deref()
    }

    /// Returns the smoothing vector, `[k]`.
    pub fn smoothing(&self) -> Option<&[f32]> {
        self.smoothing.as_deref()
    }

    /// Returns the number of output channels.
    pub fn n(&self) -> usize {
        self.weights.n()
    }

    /// Returns the number of input channels.
    pub fn k(&self) -> usize {
        self.weights.k()
    }

    /// Quantizes activations for this layer, and for others with the same smoothing vector.
    ///
    /// # Errors
    /// As [`cpu::quantize`].
    /// Also [`Error::KMismatch`] for another k, and [`Error::SmoothingTwice`] for an input with smoothing.
    pub fn quantize<T: Half>(
        &self,
        input: &QuantizeInput<'_, T>,
        residual: Option<Residual<'_, T>>,
    ) -> Result<QuantizedActivations, Error> {
        if input.k != self.k() {
            return Err(Error::KMismatch { weights: self.k(), activations: input.k });
        }
        if input.smoothing.is_some() {
            return Err(Error::SmoothingTwice);
        }
        cpu::quantize(&QuantizeInput { smoothing: self.smoothing(), ..*input }, residual)
    }

    /// Computes the layer on the CPU, and returns `[m, n]`.
    ///
    /// # Errors
    /// As [`quantize`](Self::quantize) and [`forward_quantized`](Self::forward_quantized).
    pub fn forward<T: Half, O: Output>(
        &self,
        input: &QuantizeInput<'_, T>,
        residual: Option<Residual<'_, T>>,
    ) -> Result<Vec<O>, Error> {
        // Fail before the residual changes.
        let mut product = self.product::<O>(input.m)?;
        let activations = self.quantize(input, residual)?;
        cpu::gemm(&self.weights, &activations, self.bias(), &mut product)?;
        Ok(product)
    }

    /// Computes the layer on the CPU with quantized activations, and returns `[m, n]`.
    ///
    /// # Errors
    /// As [`cpu::gemm`], and [`Error::TooLarge`] if `[m, n]` exceeds the address space.
    pub fn forward_quantized<O: Output>(&self, activations: &QuantizedActivations) -> Result<Vec<O>, Error> {
        let mut product = self.product::<O>(activations.m())?;
        cpu::gemm(&self.weights, activations, self.bias(), &mut product)?;
        Ok(product)
    }

    fn product<O: Output>(&self, m: usize) -> Result<Vec<O>, Error> {
        if self.bias.is_some() && O::TYPE == crate::OutputType::I32 {
            return Err(Error::BiasWithRawOutput);
        }
        Ok(vec![O::zeroed(); checked_elements("output matrix", m, self.n())?])
    }
}
