//! Launches a GEMM of few tokens. The device twin is `kernels-gpu/src/skinny/mod.rs`.

use std::ffi::c_void;

use liquidgemm_format::arguments::SkinnyArguments;
use liquidgemm_format::skinny::THREADS;
use liquidgemm_format::tile::K_TILE;

use crate::Error;
use crate::error::gpu::During;
use crate::gpu::Gpu;
use crate::gpu::gemm::{Operands, StreamHandle, output_code};
use crate::gpu::launch::Launch;
use crate::gpu::memory::{DeviceSpan, DeviceWeights};
use crate::plan::Skinny;

impl Gpu {
    /// Launches a skinny plan.
    ///
    /// # Safety
    /// As for [`Gpu::gemm_with_plan`], which has checked the operands and the plan.
    pub(super) unsafe fn launch_skinny(
        &self,
        weights: &DeviceWeights,
        operands: &Operands,
        plan: &Skinny,
        stream: StreamHandle,
    ) -> Result<(), Error> {
        let shape = plan.shape();
        let kernel = self.kernels.skinny(shape)?;
        let [mut activations, _] = self.activation_maps(weights, operands, [shape.tokens, K_TILE])?;
        let mut arguments = SkinnyArguments {
            weights: weights.arguments_from(0),
            token_scales: operands.token_scales.address(),
            bias: operands.bias.map_or(0, DeviceSpan::address),
            output: operands.output.address(),
            m: operands.m as u32,
            n: weights.n() as u32,
            output_stride: operands.output_stride as u32,
            output_type: output_code(operands.output_type),
            runs: plan.runs(),
        };
        let mut parameters: [*mut c_void; 2] = [activations.as_argument(), (&raw mut arguments).cast()];
        let launch = Launch {
            function: kernel.function(),
            blocks: plan.blocks(),
            cluster: 1,
            threads: THREADS,
            shared_bytes: shape.shared_bytes(),
            stream: stream.stream(),
        };
        // SAFETY: the parameters are the kernel's two, and the caller vouches for the memory behind them.
        // Until the previous launch has ended, the kernel reads only the weights, which nobody writes.
        unsafe { launch.overlapping_previous(self.launch_kernel, &mut parameters) }
            .during("launching the GEMM")?;
        Ok(())
    }
}
