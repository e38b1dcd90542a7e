//! Launches a GEMM of few tokens. The device twin is `kernels-gpu/src/skinny.rs`.

use std::ffi::c_void;

use liquidgemm_format::arguments::SkinnyArguments;
use liquidgemm_format::skinny::{STEP_K, THREADS};

use crate::gpu::Gpu;
use crate::gpu::error::{During, GpuError};
use crate::gpu::gemm::{Operands, StreamHandle, output_code};
use crate::gpu::launch::Launch;
use crate::gpu::memory::{DeviceSpan, DeviceWeights};
use crate::plan::Skinny;

impl Gpu {
    /// Launches a plan for few tokens.
    ///
    /// # Safety
    /// As for [`Gpu::gemm_with_plan`], which has checked the operands and the plan.
    pub(super) unsafe fn launch_skinny(
        &self,
        weights: &DeviceWeights,
        operands: &Operands,
        plan: &Skinny,
        stream: StreamHandle,
    ) -> Result<(), GpuError> {
        let shape = plan.shape();
        let kernel = self.kernels.skinny(shape)?;
        let [mut activations, _] = self.activation_maps(weights, operands, [shape.tokens, STEP_K])?;
        let mut arguments = SkinnyArguments {
            weights: weights.arguments_from(0),
            token_scales: operands.token_scales.address(),
            bias: operands.bias.map_or(0, DeviceSpan::address),
            output: operands.output.address(),
            m: operands.m as u32,
            n: weights.n() as u32,
            output_stride: operands.output_stride as u32,
            output_type: output_code(operands.output_type),
            shares: plan.shares(),
        };
        let mut parameters: [*mut c_void; 2] = [activations.as_argument(), (&raw mut arguments).cast()];
        let launch = Launch {
            function: kernel.function(),
            blocks: plan.blocks(),
            cluster: 1,
            threads: THREADS,
            shared_bytes: shape.shared_bytes(),
            stream: stream.as_raw(),
        };
        // SAFETY: the parameters are the kernel's two; the caller vouches for the memory behind them. The kernel reads
        // nothing but the weights, which nobody writes, before the launch ahead of it has ended.
        unsafe { launch.overlapping_previous(self.launch_kernel, &mut parameters) }
            .during("launching the GEMM")
    }
}
