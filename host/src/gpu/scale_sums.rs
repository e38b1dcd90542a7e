//! Checks and launches the epilogue of int32 sums in memory. The device twin is `kernels-gpu/src/scale_sums.rs`.

use std::ffi::c_void;

use liquidgemm_format::divisor::Divisor;
use liquidgemm_format::sums::{SCALE_SUMS_CHANNELS, SCALE_SUMS_THREADS, ScaleSumsArguments};

use crate::check::{check_dimension, checked_elements, spanned_elements};
use crate::error::gpu::{During, GpuError};
use crate::gpu::Gpu;
use crate::gpu::gemm::{StreamHandle, output_code};
use crate::gpu::launch::Launch;
use crate::gpu::memory::DeviceSpan;
use crate::{Error, OutputType};

/// The operands of the epilogue of int32 sums in device memory.
#[derive(Clone, Copy, Debug)]
pub struct SumsOperands {
    /// Tokens. May be 0.
    pub m: usize,
    /// Output channels.
    pub n: usize,
    /// i32 `[m, n]`, row-major. The address is a multiple of 4, better of 16.
    pub sums: DeviceSpan,
    /// Elements from one row of the sums to the next: at least n, better a multiple of 4.
    pub sums_stride: usize,
    /// f32 `[n]`. The address is a multiple of 4, better of 16.
    pub channel_scales: DeviceSpan,
    /// f32 `[m]`. The address is a multiple of 4.
    pub token_scales: DeviceSpan,
    /// f32 `[n]`, added to every row. The address is a multiple of 4, better of 16.
    /// Not allowed with [`OutputType::I32`].
    pub bias: Option<DeviceSpan>,
    /// `[m, n]` of `output_type`, row-major. The address is a multiple of the element's size, better of 16.
    pub output: DeviceSpan,
    /// Elements from one row of the output to the next: at least n, better a multiple of 8.
    pub output_stride: usize,
    /// The output's element type.
    pub output_type: OutputType,
}

impl SumsOperands {
    /// Returns the threads that each token takes, and those of the launch.
    fn pieces(&self) -> (usize, usize) {
        let each = self.n.div_ceil(SCALE_SUMS_CHANNELS as usize);
        (each, each.saturating_mul(self.m))
    }

    /// Fails unless the operands fit one another and the kernel.
    pub(super) fn check(&self) -> Result<(), Error> {
        let &Self { m, n, .. } = self;
        check_dimension("n", n)?;
        if self.bias.is_some() && self.output_type == OutputType::I32 {
            return Err(Error::BiasWithRawOutput);
        }
        let limit = i32::MAX as usize;
        for (what, value) in [("n", n), ("the number of pieces of eight sums", self.pieces().1)] {
            if value > limit {
                return Err(GpuError::OutOfRange { what, value, limit }.into());
            }
        }
        let check_rows = |what, span: DeviceSpan, stride, size: usize| {
            let bytes = spanned_elements(what, m, stride, n)?.saturating_mul(size);
            Ok::<_, Error>(span.check(what, bytes, size as u64)?)
        };
        let size = self.output_type.size();
        if m > 0 {
            check_rows("sums", self.sums, self.sums_stride, 4)?;
            check_rows("output", self.output, self.output_stride, size)?;
            self.token_scales.check("token scales", checked_elements("token scales", m, 4)?, 4)?;
        }
        self.channel_scales.check("channel scales", checked_elements("channel scales", n, 4)?, 4)?;
        self.bias.map_or(Ok(()), |bias| bias.check("bias", n * 4, 4))?;
        Ok(())
    }

    /// Returns whether every vector that the kernel reads or writes lies at a multiple of 16 bytes.
    fn is_aligned(&self) -> bool {
        let spans = [Some(self.sums), Some(self.output), Some(self.channel_scales), self.bias];
        let strides = [self.sums_stride * 4, self.output_stride * self.output_type.size()];
        spans.into_iter().flatten().all(|span| span.address().is_multiple_of(16))
            && strides.iter().all(|stride| stride.is_multiple_of(16))
    }
}

impl Gpu {
    /// Launches `output = epilogue(sums)` on `stream`, and returns at once.
    ///
    /// The epilogue is [`Output::from_accumulator`](crate::Output::from_accumulator), with the same bits.
    /// After a GEMM with [`OutputType::I32`], it gives the bits of a GEMM with `output_type`;
    /// in between, sums of several GPUs can be added.
    /// With `m = 0` it only checks the operands.
    /// The call allocates nothing and waits for nothing, so a CUDA graph can capture it;
    /// only the first one cannot be captured, because it compiles the kernel
    /// (see [`Gpu::prepare_scale_sums`]).
    ///
    /// # Errors
    /// - [`Error::EmptyDimension`] if `n` is 0.
    /// - [`Error::RowStrideTooShort`] if rows overlap.
    /// - [`Error::BiasWithRawOutput`] for a bias with [`OutputType::I32`].
    /// - [`GpuError::OutOfRange`] for n above 2³¹ − 1, or about 2³⁴ sums.
    /// - [`GpuError::Misaligned`] or [`GpuError::BufferTooSmall`] for an unsuitable operand.
    /// - [`GpuError::Cuda`] if the driver fails.
    ///
    /// Nothing is launched after an error.
    ///
    /// # Safety
    /// Until the launch has finished on `stream`:
    /// 1. the operands' spans stay allocated;
    /// 2. nothing else writes to memory that the kernel reads, and nothing else reads or writes its output.
    ///
    /// The output overlaps nothing that is read.
    /// The operands and the stream belong to this GPU's context.
    pub unsafe fn scale_sums(
        &self,
        operands: &SumsOperands,
        stream: impl Into<StreamHandle>,
    ) -> Result<(), Error> {
        operands.check()?;
        if operands.m == 0 {
            return Ok(());
        }
        let _entered = self.context.enter()?;
        let (token_pieces, pieces) = operands.pieces();
        let mut arguments = ScaleSumsArguments {
            sums: operands.sums.address(),
            sums_stride: operands.sums_stride as u64,
            channel_scales: operands.channel_scales.address(),
            token_scales: operands.token_scales.address(),
            bias: operands.bias.map_or(0, DeviceSpan::address),
            output: operands.output.address(),
            output_stride: operands.output_stride as u64,
            n: operands.n as u32,
            output_type: output_code(operands.output_type),
            is_aligned: operands.is_aligned().into(),
            pieces: pieces as u32,
            by_token_pieces: Divisor::new(token_pieces as u32),
        };
        let launch = Launch {
            function: self.kernels.scale_sums()?.function(),
            blocks: (pieces as u32).div_ceil(SCALE_SUMS_THREADS),
            cluster: 1,
            threads: SCALE_SUMS_THREADS,
            shared_bytes: 0,
            stream: stream.into().stream(),
        };
        let mut parameters: [*mut c_void; 1] = [(&raw mut arguments).cast()];
        // SAFETY: the parameter is the kernel's one, and the caller vouches for the memory behind it.
        // The kernel waits for the previous launch before it reads or writes anything.
        unsafe { launch.overlapping_previous(self.launch_kernel, &mut parameters) }
            .during("launching the epilogue of the sums")?;
        Ok(())
    }

    /// Compiles the kernel of [`Gpu::scale_sums`], unless it is compiled already.
    ///
    /// # Errors
    /// [`GpuError::Cuda`] if the driver fails.
    pub fn prepare_scale_sums(&self) -> Result<(), Error> {
        let _entered = self.context.enter()?;
        self.kernels.scale_sums()?;
        Ok(())
    }
}
