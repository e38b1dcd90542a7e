//! Linear layers in device memory: quantization of the activations and the GEMM, on a caller's stream.
//! The twin on the host is `host/src/linear.rs`.

use std::ops::RangeInclusive;

use liquidgemm_format::activations::CODE_ALIGNMENT;

use crate::check::checked_elements;
use crate::gpu::memory::DeviceMemory;
use crate::gpu::{
    DeviceSpan, DeviceWeights, Gpu, LinearInput, Operands, QuantizeOperands, StreamHandle, Workspace,
};
use crate::operation::{HalfType, Operation};
use crate::{Error, Linear, OutputType};

/// Alignment of scratch memory.
const SCRATCH_ALIGNMENT: u64 = 16;

/// A linear layer in device memory. [`Gpu::upload_linear`] creates it.
#[derive(Debug)]
pub struct DeviceLinear {
    weights: DeviceWeights,
    /// f32 `[n]`.
    bias: Option<DeviceMemory>,
    /// f32 `[k]`.
    smoothing: Option<DeviceMemory>,
}

/// The output of a linear layer, `[m, n]`.
#[derive(Clone, Copy, Debug)]
pub struct LinearOutput {
    /// `[m, n]` of `output_type`, row-major. The address is a multiple of the element's size.
    pub output: DeviceSpan,
    /// Elements from one row to the next: at least n. A multiple of 8 makes 16-bit stores fast.
    pub output_stride: usize,
    /// The element type.
    pub output_type: OutputType,
}

/// Quantized activations `[m, k]` in device memory, which several linear layers may share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QuantizedSpan {
    m: usize,
    k: usize,
    codes: DeviceSpan,
    code_stride: usize,
    scales: DeviceSpan,
}

impl QuantizedSpan {
    /// Rows of codes begin at multiples of this many bytes, which TMA reads fast.
    pub const STRIDE_ALIGNMENT: usize = 64;

    /// Returns the bytes that activations `[m, k]` take in scratch memory.
    ///
    /// # Errors
    /// [`Error::TooLarge`] if they exceed the address space.
    pub fn bytes(m: usize, k: usize) -> Result<usize, Error> {
        let stride = k.next_multiple_of(Self::STRIDE_ALIGNMENT);
        let too_large = Error::TooLarge { what: "activation matrix", rows: m, columns: k };
        checked_elements("activation matrix", m, stride)?.checked_add(m.saturating_mul(4)).ok_or(too_large)
    }

    /// Lays out activations `[m, k]` in scratch memory: the codes, and behind them the scales.
    ///
    /// # Errors
    /// - [`GpuError::BufferTooSmall`](crate::gpu::GpuError::BufferTooSmall) or [`GpuError::Misaligned`](crate::gpu::GpuError::Misaligned) for unsuitable memory.
    /// - [`Error::TooLarge`] if the activations exceed the address space.
    pub fn in_scratch(scratch: DeviceSpan, m: usize, k: usize) -> Result<Self, Error> {
        if m > 0 {
            scratch.check("scratch", Self::bytes(m, k)?, SCRATCH_ALIGNMENT)?;
        }
        let code_stride = k.next_multiple_of(Self::STRIDE_ALIGNMENT);
        let code_bytes = m * code_stride;
        let part = |offset: usize, bytes| {
            // SAFETY: both parts lie inside the scratch memory, or are empty.
            unsafe { DeviceSpan::from_raw(scratch.address() + offset as u64, bytes) }
        };
        Ok(Self { m, k, codes: part(0, code_bytes), code_stride, scales: part(code_bytes, m * 4) })
    }

    /// Returns the same activations with their scales elsewhere.
    pub(super) fn with_scales(self, scales: DeviceSpan) -> Self {
        Self { scales, ..self }
    }

    /// Returns the number of tokens.
    pub fn m(&self) -> usize {
        self.m
    }

    /// Returns the number of elements per token.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Returns the int8 codes, [`code_stride`](Self::code_stride) bytes for each token.
    pub fn codes(&self) -> DeviceSpan {
        self.codes
    }

    /// Returns the bytes from one row of the codes to the next.
    pub fn code_stride(&self) -> usize {
        self.code_stride
    }

    /// Returns the scales, f32 `[m]`.
    pub fn scales(&self) -> DeviceSpan {
        self.scales
    }
}

impl Gpu {
    /// Copies a linear layer to the GPU and waits for the copy.
    ///
    /// # Errors
    /// [`GpuError::Cuda`](crate::gpu::GpuError::Cuda) if device memory runs out or the driver fails.
    pub fn upload_linear(&self, linear: &Linear) -> Result<DeviceLinear, Error> {
        let copy = |values: &[f32], action| DeviceMemory::copy_of(&self.context, values, action);
        Ok(DeviceLinear {
            weights: self.upload(linear.weights())?,
            bias: linear.bias().map(|bias| copy(bias, "copying the bias to the GPU")).transpose()?,
            smoothing: linear
                .smoothing()
                .map(|smoothing| copy(smoothing, "copying the smoothing vector to the GPU"))
                .transpose()?,
        })
    }

    /// Makes a linear layer of weights, bias f32 `[n]` and smoothing vector f32 `[k]` that are on the GPU already.
    ///
    /// # Errors
    /// [`GpuError::BufferTooSmall`](crate::gpu::GpuError::BufferTooSmall), [`GpuError::Misaligned`](crate::gpu::GpuError::Misaligned) or [`GpuError::OtherContext`](crate::gpu::GpuError::OtherContext) for an unsuitable part.
    ///
    /// # Safety
    /// Bias and smoothing vector stay allocated, and nobody writes them, as long as the layer lives.
    /// The smoothing factors are finite and positive.
    pub unsafe fn linear_of(
        &self,
        weights: DeviceWeights,
        bias: Option<DeviceSpan>,
        smoothing: Option<DeviceSpan>,
    ) -> Result<DeviceLinear, Error> {
        self.check_context("weights", weights.context())?;
        let (n, k) = (weights.n(), weights.k());
        bias.map_or(Ok(()), |bias| bias.check("bias", n * 4, 4))?;
        smoothing.map_or(Ok(()), |smoothing| smoothing.check("smoothing vector", k * 4, 4))?;
        let borrow = |span| DeviceMemory::borrowed(&self.context, span);
        Ok(DeviceLinear { weights, bias: bias.map(borrow), smoothing: smoothing.map(borrow) })
    }
}

impl DeviceLinear {
    /// Returns the weights.
    pub fn weights(&self) -> &DeviceWeights {
        &self.weights
    }

    /// Returns the bias, f32 `[n]`.
    pub(super) fn bias(&self) -> Option<DeviceSpan> {
        self.bias.as_ref().map(DeviceMemory::span)
    }

    /// Returns the number of output channels.
    pub fn n(&self) -> usize {
        self.weights.n()
    }

    /// Returns the number of input channels.
    pub fn k(&self) -> usize {
        self.weights.k()
    }

    /// Returns the bytes of scratch memory that [`forward`](Self::forward) needs for `m` tokens.
    /// The memory lies at a multiple of 16 bytes.
    ///
    /// # Errors
    /// [`Error::TooLarge`] if they exceed the address space.
    pub fn scratch_bytes(&self, m: usize) -> Result<usize, Error> {
        QuantizedSpan::bytes(m, self.k())
    }

    /// Prepares for calls with these numbers of tokens, so that they compile nothing:
    /// the GEMM's kernels, and those that quantize inputs of this type after this operation.
    ///
    /// # Errors
    /// As [`Gpu::prepare`].
    pub fn prepare(
        &self,
        gpu: &Gpu,
        operation: &Operation<DeviceSpan>,
        input_type: HalfType,
        m: RangeInclusive<usize>,
    ) -> Result<(), Error> {
        gpu.prepare_quantize(operation, input_type, self.k())?;
        gpu.prepare(&[[self.n(), self.k()]], m)
    }

    /// Quantizes activations for this layer to scratch memory, on `stream`, and returns at once.
    ///
    /// The result is for this layer, and for others with the same k and the same smoothing vector.
    ///
    /// # Errors
    /// As [`Gpu::quantize`] and [`QuantizedSpan::in_scratch`].
    ///
    /// # Safety
    /// As for [`Gpu::quantize`]; the scratch memory is what it writes.
    pub unsafe fn quantize(
        &self,
        gpu: &Gpu,
        input: &LinearInput,
        scratch: DeviceSpan,
        stream: impl Into<StreamHandle>,
    ) -> Result<QuantizedSpan, Error> {
        let quantized = QuantizedSpan::in_scratch(scratch, input.m, self.k())?;
        // SAFETY: the caller upholds the same contract.
        unsafe { self.quantize_to(gpu, input, &quantized, stream.into()) }?;
        Ok(quantized)
    }

    /// Quantizes activations to memory that is laid out for them.
    ///
    /// # Safety
    /// As for [`Gpu::quantize`].
    pub(super) unsafe fn quantize_to(
        &self,
        gpu: &Gpu,
        input: &LinearInput,
        quantized: &QuantizedSpan,
        stream: StreamHandle,
    ) -> Result<(), Error> {
        gpu.check_context("weights", self.weights.context())?;
        // SAFETY: the caller upholds the same contract.
        unsafe { gpu.quantize(&self.quantize_operands(input, quantized), stream) }
    }

    /// Returns the operands of the quantization for this layer.
    pub(super) fn quantize_operands(
        &self,
        input: &LinearInput,
        quantized: &QuantizedSpan,
    ) -> QuantizeOperands {
        QuantizeOperands {
            source: *input,
            k: self.k(),
            smoothing: self.smoothing.as_ref().map(DeviceMemory::span),
            codes: quantized.codes,
            code_stride: quantized.code_stride,
            scales: quantized.scales,
        }
    }

    /// Computes the layer on `stream`, and returns at once.
    ///
    /// With `m = 0` it only checks the operands.
    /// The call allocates nothing and waits for nothing, so a CUDA graph can capture it
    /// once [`prepare`](Self::prepare) has compiled the kernels.
    /// The quantization lets the GEMM begin early, so that its weights stream meanwhile.
    ///
    /// # Errors
    /// As [`quantize`](Self::quantize) and [`forward_quantized`](Self::forward_quantized).
    /// After an error of the second launch, the first one may be running.
    ///
    /// # Safety
    /// As for [`Gpu::quantize`] and [`Gpu::gemm_with_plan`]; nothing else uses the scratch memory meanwhile.
    pub unsafe fn forward(
        &self,
        gpu: &Gpu,
        input: &LinearInput,
        output: &LinearOutput,
        scratch: DeviceSpan,
        workspace: &Workspace,
        stream: impl Into<StreamHandle>,
    ) -> Result<(), Error> {
        let stream = stream.into();
        let quantized = QuantizedSpan::in_scratch(scratch, input.m, self.k())?;
        // Bad operands of the second launch must not leave the first one running.
        gpu.check_operands(&self.weights, &self.operands(&quantized, output), workspace)?;
        // SAFETY: the caller upholds the same contract. The stream orders the launches.
        unsafe {
            self.quantize_to(gpu, input, &quantized, stream)?;
            self.forward_quantized(gpu, &quantized, output, workspace, stream)
        }
    }

    /// Computes the layer with quantized activations on `stream`, and returns at once.
    ///
    /// # Errors
    /// As [`Gpu::gemm`], and [`Error::KMismatch`] for activations of another k.
    ///
    /// # Safety
    /// As for [`Gpu::gemm_with_plan`].
    pub unsafe fn forward_quantized(
        &self,
        gpu: &Gpu,
        activations: &QuantizedSpan,
        output: &LinearOutput,
        workspace: &Workspace,
        stream: impl Into<StreamHandle>,
    ) -> Result<(), Error> {
        if activations.k != self.k() {
            return Err(Error::KMismatch { weights: self.k(), activations: activations.k });
        }
        let operands = self.operands(activations, output);
        // SAFETY: the caller upholds the same contract.
        unsafe { gpu.gemm(&self.weights, &operands, workspace, stream) }
    }

    /// Returns the operands of the GEMM.
    pub(super) fn operands(&self, activations: &QuantizedSpan, output: &LinearOutput) -> Operands {
        Operands {
            m: activations.m,
            activations: activations.codes,
            activation_stride: activations.code_stride,
            token_scales: activations.scales,
            bias: self.bias(),
            output: output.output,
            output_stride: output.output_stride,
            output_type: output.output_type,
        }
    }
}

const _: () = assert!(QuantizedSpan::STRIDE_ALIGNMENT.is_multiple_of(CODE_ALIGNMENT as usize));
