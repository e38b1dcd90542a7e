//! Checks and launches the quantization of activations.
//! The device twin is `kernels-gpu/src/activations/mod.rs`; on the CPU it is `host/src/cpu/activations.rs`.

use std::ffi::c_void;

use liquidgemm_format::activations::{
    CODE_ALIGNMENT, ElementType, Gate, QuantizeArguments, RowOperation, RowRing, Rows,
};

use crate::Error;
use crate::check::{check_k, spanned_elements};
use crate::error::gpu::{During, GpuError};
use crate::gpu::gemm::StreamHandle;
use crate::gpu::launch::Launch;
use crate::gpu::{DeviceSpan, Gpu};
use crate::operation::{GateOrder, Gather, HalfType, Operation, Scaling};

/// The most rows of one launch.
const MOST_ROWS: usize = 1 << 28;

/// The activations of a linear layer, before they are quantized.
///
/// Addresses are multiples of 2. The kernels read fast if rows and parameters lie at multiples of 16 bytes.
#[derive(Clone, Copy, Debug)]
pub struct LinearInput {
    /// Tokens. May be 0.
    pub m: usize,
    /// What happens to a row before it is quantized.
    pub operation: Operation<DeviceSpan>,
    /// The element type of the input, the residual and the norm's parameters.
    pub input_type: HalfType,
    /// Rows of k elements, or of 2k for a gated activation function.
    pub input: DeviceSpan,
    /// Elements from one row of the input to the next.
    pub input_stride: usize,
    /// The rows of the input to take, or `None` for the first m in order.
    pub gather: Option<Gather<DeviceSpan>>,
    /// `[m, k]`, to which the input is added, rounded, before a norm. The norm is that of the sum.
    pub residual: Option<DeviceSpan>,
    /// Elements from one row of the residual to the next.
    pub residual_stride: usize,
    /// Where the scales come from.
    pub scaling: Scaling<DeviceSpan>,
}

impl LinearInput {
    /// Returns the input `[m, k]` without any operation, its rows behind one another.
    pub fn new(input: DeviceSpan, input_type: HalfType, m: usize, k: usize) -> Self {
        Self {
            m,
            operation: Operation::Plain,
            input_type,
            input,
            input_stride: k,
            gather: None,
            residual: None,
            residual_stride: k,
            scaling: Scaling::PerToken,
        }
    }
}

/// Rows of activations to quantize, in device memory, and the memory for the result.
#[derive(Clone, Copy, Debug)]
pub struct QuantizeOperands {
    /// The rows before they are quantized.
    pub source: LinearInput,
    /// Elements of a row after the operation.
    pub k: usize,
    /// f32 `[k]`, by which values are divided after the operation. Each factor is finite and positive.
    /// The address is a multiple of 4, better of 16.
    pub smoothing: Option<DeviceSpan>,
    /// int8 `[m, k]`, written with zeros behind each row up to a multiple of 16 bytes.
    /// The address is a multiple of 16.
    pub codes: DeviceSpan,
    /// Bytes from one row of the codes to the next: at least k, and a multiple of 16.
    pub code_stride: usize,
    /// f32 `[m]`, written.
    pub scales: DeviceSpan,
}

impl QuantizeOperands {
    pub(super) fn check(&self) -> Result<(), Error> {
        let &Self { source: LinearInput { m, .. }, k, .. } = self;
        check_k(k)?;
        self.source.operation.check()?;
        self.source.scaling.check()?;
        let at_most = |what, value, limit| match value {
            value if value > limit => Err(GpuError::OutOfRange { what, value, limit }),
            _ => Ok(()),
        };
        at_most("the number of rows", m, MOST_ROWS)?;
        if self.code_stride < k {
            return Err(Error::StrideTooShort { stride: self.code_stride, k });
        }
        if !self.code_stride.is_multiple_of(CODE_ALIGNMENT as usize) {
            return Err(GpuError::Misaligned {
                what: "codes' row stride",
                value: self.code_stride as u64,
                multiple: CODE_ALIGNMENT.into(),
                fix: "round it up to the next multiple",
            }
            .into());
        }
        let check_rows = |what, span: DeviceSpan, rows, stride, row, size: usize, alignment| {
            let elements = spanned_elements(what, rows, stride, row)?;
            let bytes = elements.saturating_mul(size);
            // With no rows there may be no memory.
            if rows == 0 { Ok::<_, Error>(()) } else { Ok(span.check(what, bytes, alignment)?) }
        };
        let input_rows = match self.source.gather {
            Some(gather) => {
                at_most("the number of input rows", gather.input_rows, u32::MAX as usize)?;
                check_rows("row indices", gather.rows, 1, m, m, 4, 4)?;
                gather.input_rows
            }
            None => m,
        };
        let row = self.source.operation.input_elements(k);
        check_rows("input", self.source.input, input_rows, self.source.input_stride, row, 2, 2)?;
        if let Some(residual) = self.source.residual {
            if !self.source.operation.is_norm() || self.source.gather.is_some() {
                return Err(Error::UnexpectedResidual);
            }
            check_rows("residual", residual, m, self.source.residual_stride, k, 2, 2)?;
        }
        match self.source.operation {
            Operation::RmsNorm { weight, .. } => weight.check("norm weight", k * 2, 2)?,
            Operation::LayerNorm { weight, bias, .. } => {
                weight.check("norm weight", k * 2, 2)?;
                bias.map_or(Ok(()), |bias| bias.check("norm bias", k * 2, 2))?;
            }
            Operation::Plain | Operation::Gated { .. } => {}
        }
        self.smoothing.map_or(Ok(()), |smoothing| smoothing.check("smoothing vector", k * 4, 4))?;
        if let Scaling::Given(scales) = self.source.scaling {
            check_rows("given scales", scales, 1, m, m, 4, 4)?;
        }
        let padded = k.next_multiple_of(CODE_ALIGNMENT as usize);
        check_rows("codes", self.codes, m, self.code_stride, padded, 1, CODE_ALIGNMENT.into())?;
        check_rows("scales", self.scales, 1, m, m, 4, 4)
    }

    /// Returns whether every vector of eight elements that the kernel reads lies at a multiple of 16 bytes.
    fn is_aligned(&self) -> bool {
        let (weight, bias) = self.parameters();
        let gates = match self.source.operation {
            Operation::Gated { order: GateOrder::Halves, .. } => self.k * 2,
            _ => 0,
        };
        let spans = [Some(self.source.input), self.source.residual, weight, bias, self.smoothing];
        let strides = [
            self.source.input_stride * 2,
            self.source.residual.map_or(0, |_| self.source.residual_stride * 2),
            gates,
        ];
        spans.into_iter().flatten().all(|span| span.address().is_multiple_of(16))
            && strides.iter().all(|stride| stride.is_multiple_of(16))
    }

    /// Returns the norm's weight and bias.
    fn parameters(&self) -> (Option<DeviceSpan>, Option<DeviceSpan>) {
        match self.source.operation {
            Operation::RmsNorm { weight, .. } => (Some(weight), None),
            Operation::LayerNorm { weight, bias, .. } => (Some(weight), bias),
            Operation::Plain | Operation::Gated { .. } => (None, None),
        }
    }

    fn arguments(&self, ring: RowRing) -> QuantizeArguments {
        let address = |span: Option<DeviceSpan>| span.map_or(0, DeviceSpan::address);
        let (weight, bias) = self.parameters();
        let interleaved =
            matches!(self.source.operation, Operation::Gated { order: GateOrder::Interleaved, .. });
        QuantizeArguments {
            input: self.source.input.address(),
            input_stride: self.source.input_stride as u64 * 2,
            rows: address(self.source.gather.map(|gather| gather.rows)),
            residual: address(self.source.residual),
            residual_stride: self.source.residual_stride as u64 * 2,
            weight: address(weight),
            bias: address(bias),
            smoothing: address(self.smoothing),
            given_scales: match self.source.scaling {
                Scaling::Given(scales) => scales.address(),
                _ => 0,
            },
            codes: self.codes.address(),
            code_stride: self.code_stride as u64,
            scales: self.scales.address(),
            m: self.source.m as u32,
            k: self.k as u32,
            input_rows: self.source.gather.map_or(0, |gather| gather.input_rows as u32),
            interleaved: interleaved.into(),
            aligned: self.is_aligned().into(),
            inverse_k: 1.0 / self.k as f32,
            epsilon: match self.source.operation {
                Operation::RmsNorm { epsilon, .. } | Operation::LayerNorm { epsilon, .. } => epsilon,
                _ => 0.0,
            },
            static_scale: match self.source.scaling {
                Scaling::Static(scale) => scale,
                _ => -1.0,
            },
            ring,
        }
    }

    /// Returns what the choice of the kernel depends on.
    fn rows(&self) -> Rows {
        let (operation, element) = kind(&self.source.operation, self.source.input_type);
        Rows {
            operation,
            element,
            m: self.source.m as u32,
            k: self.k as u32,
            has_residual: self.source.residual.is_some(),
            aligned: self.is_aligned(),
            smooths: self.smoothing.is_some(),
        }
    }
}

/// Returns the names that the list of kernels has for an operation and an element type.
fn kind(operation: &Operation<DeviceSpan>, input_type: HalfType) -> (RowOperation, ElementType) {
    let operation = match operation {
        Operation::Plain => RowOperation::Plain,
        Operation::RmsNorm { .. } => RowOperation::RmsNorm,
        Operation::LayerNorm { .. } => RowOperation::LayerNorm,
        Operation::Gated { gate: Gate::Silu, .. } => RowOperation::Silu,
        Operation::Gated { gate: Gate::GeluTanh, .. } => RowOperation::GeluTanh,
    };
    let element = match input_type {
        HalfType::Bf16 => ElementType::Bf16,
        HalfType::F16 => ElementType::F16,
    };
    (operation, element)
}

impl Gpu {
    /// Compiles the kernels that quantize rows of `k` elements of this type after an operation.
    ///
    /// [`Gpu::quantize`] then compiles nothing, in traffic or in a graph capture, whatever the number of rows.
    ///
    /// # Errors
    /// [`Error::EmptyDimension`] if `k` is 0, [`Error::KTooLarge`] if it exceeds 131,072,
    /// [`GpuError::Cuda`] if the driver fails.
    pub fn prepare_quantize(
        &self,
        operation: &Operation<DeviceSpan>,
        input_type: HalfType,
        k: usize,
    ) -> Result<(), Error> {
        check_k(k)?;
        let _entered = self.context.enter()?;
        let (operation, element) = kind(operation, input_type);
        let rows = Rows {
            operation,
            element,
            m: 1,
            k: k as u32,
            has_residual: false,
            aligned: true,
            smooths: false,
        };
        self.kernels.quantize(rows.row().kernel)?;
        if let Some(launch) = (Rows { m: MOST_ROWS as u32, ..rows }).ring(self.multiprocessors()) {
            self.kernels.quantize(launch.kernel)?;
        }
        Ok(())
    }

    /// Quantizes rows of activations to int8, after an operation, on `stream`, and returns at once.
    ///
    /// The codes and scales have the bits that [`cpu::quantize`](crate::cpu::quantize) computes,
    /// also for values that are not finite.
    /// With `m = 0` it only checks the operands.
    /// The call allocates nothing and waits for nothing, so a CUDA graph can capture it.
    /// Only the first call with each kernel cannot be captured, because it compiles the kernel.
    ///
    /// # Errors
    /// - [`Error::EmptyDimension`] if `k` is 0, [`Error::KTooLarge`] if it exceeds 131,072.
    /// - [`Error::StrideTooShort`] or [`Error::RowStrideTooShort`] if rows overlap.
    /// - [`Error::InvalidEpsilon`] or [`Error::InvalidStaticScale`] for such a value.
    /// - [`Error::UnexpectedResidual`] for a residual without a norm, or with gathered rows.
    /// - [`GpuError::Misaligned`] or [`GpuError::BufferTooSmall`] for an unsuitable span.
    /// - [`GpuError::OutOfRange`] for more than 2²⁸ rows, or 2³² − 1 rows of the input.
    /// - [`GpuError::Cuda`] if the driver fails.
    ///
    /// # Safety
    /// Until the launch has finished on `stream`:
    /// 1. the operands' spans stay allocated;
    /// 2. nothing else writes to memory that the kernel reads, or accesses memory that it writes.
    ///
    /// The codes, the scales and the residual overlap neither each other nor what is read,
    /// and the operands and the stream belong to this GPU's context.
    /// The previous launch on the stream does not write the norm's weight,
    /// because the kernel reads it while that launch may still run (programmatic dependent launch).
    pub unsafe fn quantize(
        &self,
        operands: &QuantizeOperands,
        stream: impl Into<StreamHandle>,
    ) -> Result<(), Error> {
        operands.check()?;
        if operands.source.m == 0 {
            return Ok(());
        }
        let plan = operands.rows().launch(self.multiprocessors());
        let _entered = self.context.enter()?;
        let kernel = self.kernels.quantize(plan.kernel)?;
        let mut arguments = operands.arguments(plan.ring);
        let mut parameters: [*mut c_void; 1] = [(&raw mut arguments).cast()];
        let launch = Launch {
            function: kernel.function(),
            blocks: plan.blocks,
            cluster: plan.row_blocks,
            threads: plan.threads,
            shared_bytes: plan.shared_bytes,
            stream: stream.into().stream(),
        };
        // SAFETY: the parameter is the kernel's, and the caller vouches for the memory behind it.
        // Until the previous launch has ended, the kernel reads only the norm's weight,
        // which that launch does not write.
        unsafe { launch.overlapping_previous(self.launch_kernel, &mut parameters) }
            .during("launching the quantization")?;
        Ok(())
    }
}
