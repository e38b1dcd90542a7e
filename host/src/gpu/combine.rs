//! Checks and launches the combine of a mixture of experts. The device twin is `kernels-gpu/src/combine.rs`.

use std::ffi::c_void;

use liquidgemm_format::arguments::CombineArguments;
use liquidgemm_format::divisor::Divisor;
use liquidgemm_format::grouped::{COMBINE_CHANNELS, COMBINE_THREADS};

use crate::check::check_dimension;
use crate::error::gpu::{During, GpuError};
use crate::gpu::Gpu;
use crate::gpu::gemm::{StreamHandle, output_code};
use crate::gpu::launch::Launch;
use crate::gpu::memory::DeviceSpan;
use crate::{Error, OutputType};

/// The operands of a combine in device memory.
#[derive(Clone, Copy, Debug)]
pub struct CombineOperands {
    /// Tokens. May be 0.
    pub tokens: usize,
    /// Choices of each token.
    pub top_k: usize,
    /// Number of rows to choose from. May be 0.
    pub row_count: usize,
    /// Elements of a row.
    pub n: usize,
    /// The element type of rows and output: [`OutputType::Bf16`] or [`OutputType::F16`].
    pub element_type: OutputType,
    /// `[row_count, n]`, row-major. The address is a multiple of 2, better of 16.
    pub rows: DeviceSpan,
    /// Elements from one row to the next: at least n, better a multiple of 8.
    pub rows_stride: usize,
    /// i32 `[tokens, top_k]`: the row of each choice. −1 and other values outside the rows are skipped.
    pub positions: DeviceSpan,
    /// f32 `[tokens, top_k]`: the weight of each choice.
    pub weights: DeviceSpan,
    /// `[tokens, n]`, row-major. The address is a multiple of 2, better of 16.
    pub output: DeviceSpan,
    /// Elements from one row of the output to the next: at least n, better a multiple of 8.
    pub output_stride: usize,
}

impl CombineOperands {
    /// Returns the thread blocks of each token, and of the launch.
    fn blocks(&self) -> (usize, usize) {
        let each = self.n.div_ceil((COMBINE_THREADS * COMBINE_CHANNELS) as usize);
        (each, each.saturating_mul(self.tokens))
    }

    /// Fails unless the operands fit one another and the kernel.
    fn check(&self) -> Result<(), Error> {
        check_dimension("n", self.n)?;
        check_dimension("top_k", self.top_k)?;
        if self.element_type.size() != 2 {
            return Err(GpuError::ElementType { what: "a combine", element_type: self.element_type }.into());
        }
        for stride in [self.rows_stride, self.output_stride] {
            if stride < self.n {
                return Err(GpuError::OutputStrideTooShort { stride, n: self.n }.into());
            }
        }
        let limit = i32::MAX as usize;
        for (what, value) in [
            ("the number of thread blocks of a combine", self.blocks().1),
            ("the number of choices of a token", self.top_k),
            ("the number of rows", self.row_count),
            ("the rows' stride", self.rows_stride),
            ("the output's row stride", self.output_stride),
        ] {
            if value > limit {
                return Err(GpuError::OutOfRange { what, value, limit }.into());
            }
        }
        // The last row needs no padding after it.
        let spanned_bytes = |rows: usize, stride: usize| match rows.checked_sub(1) {
            Some(others) => others.saturating_mul(stride).saturating_add(self.n).saturating_mul(2),
            None => 0,
        };
        let choices = self.tokens.saturating_mul(self.top_k).saturating_mul(4);
        self.rows.check("rows", spanned_bytes(self.row_count, self.rows_stride), 2)?;
        self.positions.check("positions", choices, 4)?;
        self.weights.check("weights", choices, 4)?;
        self.output.check("output", spanned_bytes(self.tokens, self.output_stride), 2)?;
        Ok(())
    }
}

impl Gpu {
    /// Launches `output[t] = Σⱼ weights[t, j] · rows[positions[t, j]]`, j ascending, and returns at once.
    ///
    /// The result has the bits of [`cpu::combine`](crate::cpu::combine), which says how sums are rounded
    /// and what becomes of values that are not finite. No atomic operation is involved.
    /// The call allocates nothing and waits for nothing, so a CUDA graph can capture it;
    /// only the first one cannot be captured, because it compiles the kernel
    /// (see [`Gpu::prepare_grouped`]). With `tokens = 0` it only checks the operands.
    ///
    /// # Errors
    /// - [`Error::EmptyDimension`] if `n` or `top_k` is 0.
    /// - [`GpuError::ElementType`] for an element type without 16 bits.
    /// - [`GpuError::OutputStrideTooShort`] if a stride is shorter than a row.
    /// - [`GpuError::OutOfRange`] if a size exceeds 2³¹ − 1.
    /// - [`GpuError::Misaligned`] or [`GpuError::BufferTooSmall`] for an unsuitable operand.
    /// - [`GpuError::Cuda`] if the driver fails.
    ///
    /// Nothing is launched after an error.
    ///
    /// # Safety
    /// Until the launch has finished on `stream`:
    /// 1. the operands' spans stay allocated;
    /// 2. nothing else writes to memory that the combine reads, and nothing else reads or writes its output.
    ///
    /// The operands and the stream belong to this GPU's context. The positions may hold any values.
    pub unsafe fn combine(
        &self,
        operands: &CombineOperands,
        stream: impl Into<StreamHandle>,
    ) -> Result<(), Error> {
        operands.check()?;
        if operands.tokens == 0 {
            return Ok(());
        }
        let _entered = self.context.enter()?;
        let (token_blocks, blocks) = operands.blocks();
        let is_aligned = [operands.rows.address(), operands.output.address()]
            .into_iter()
            .all(|address| address.is_multiple_of(16))
            && [operands.rows_stride, operands.output_stride]
                .into_iter()
                .all(|stride| stride.is_multiple_of(8));
        let mut arguments = CombineArguments {
            rows: operands.rows.address(),
            positions: operands.positions.address(),
            weights: operands.weights.address(),
            output: operands.output.address(),
            tokens: operands.tokens as u32,
            top_k: operands.top_k as u32,
            row_count: operands.row_count as u32,
            n: operands.n as u32,
            rows_stride: operands.rows_stride as u32,
            output_stride: operands.output_stride as u32,
            element_type: output_code(operands.element_type),
            is_aligned: is_aligned.into(),
            by_token_blocks: Divisor::new(token_blocks as u32),
        };
        let launch = Launch {
            function: self.kernels.combine()?.function(),
            blocks: blocks as u32,
            cluster: 1,
            threads: COMBINE_THREADS,
            shared_bytes: 0,
            stream: stream.into().stream(),
        };
        let mut parameters: [*mut c_void; 1] = [(&raw mut arguments).cast()];
        // SAFETY: the parameter is the kernel's one, and the caller vouches for the memory behind it.
        // The kernel waits for the previous launch before it reads or writes anything.
        unsafe { launch.overlapping_previous(self.launch_kernel, &mut parameters) }
            .during("launching the combine")?;
        Ok(())
    }
}
