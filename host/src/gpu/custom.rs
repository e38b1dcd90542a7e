//! Compiles and launches kernels of another crate in the library's context.
//! The bench uses this for its probes, and for its ablation kernels, which take the parameters of a GEMM.

use std::ffi::c_void;

use crate::check::check_length;
use crate::error::gpu::{During, GpuError};
use crate::gpu::gemm::Block;
use crate::gpu::kernels::Kernel;
use crate::gpu::launch::Launch;
use crate::gpu::{DeviceWeights, Gpu, Operands, StreamHandle, Workspace};
use crate::{Algorithm, Error, PackedWeights, Plan};

/// A kernel of another crate, compiled by the driver, with its thread block's size and shared memory.
#[derive(Debug)]
pub struct CustomKernel {
    kernel: Kernel,
    threads: u32,
    shared_bytes: u32,
}

impl CustomKernel {
    fn block(&self) -> Block {
        Block { function: self.kernel.function(), threads: self.threads, shared_bytes: self.shared_bytes }
    }
}

impl Gpu {
    /// Compiles the kernel `entry` of a PTX module.
    ///
    /// Its thread blocks have `threads` threads and `shared_bytes` bytes of dynamic shared memory.
    ///
    /// # Errors
    /// [`GpuError::Cuda`] if the driver refuses the module, or if the module does not contain the kernel.
    pub fn load_kernel(
        &self,
        ptx: &str,
        entry: &str,
        threads: u32,
        shared_bytes: u32,
    ) -> Result<CustomKernel, Error> {
        let kernel = Kernel::load(&self.context, ptx.into(), entry, shared_bytes)?;
        Ok(CustomKernel { kernel, threads, shared_bytes })
    }

    /// Launches a one-dimensional grid of `blocks` thread blocks, without clusters, and returns at once.
    ///
    /// # Errors
    /// [`GpuError::OtherContext`] for a kernel of another context, [`GpuError::Cuda`] if the driver fails.
    ///
    /// # Safety
    /// 1. `parameters` are those of the kernel, in their order.
    /// 2. Device memory that they point to stays valid until the launch has finished on `stream`.
    /// 3. The stream belongs to this GPU's context.
    pub unsafe fn launch_kernel(
        &self,
        kernel: &CustomKernel,
        blocks: u32,
        parameters: &mut [*mut c_void],
        stream: impl Into<StreamHandle>,
    ) -> Result<(), Error> {
        self.check_context("kernel", kernel.kernel.context())?;
        let _entered = self.context.enter()?;
        let Block { function, threads, shared_bytes } = kernel.block();
        let stream = stream.into().stream();
        let launch = Launch { function, blocks, cluster: 1, threads, shared_bytes, stream };
        // SAFETY: the caller vouches for the parameters, which the driver copies.
        unsafe { launch.after_previous(self.launch_kernel, parameters) }.during("launching a kernel")?;
        Ok(())
    }

    /// Like [`Gpu::gemm_with_plan`], with `kernel` in place of the tile shape's own.
    ///
    /// # Errors
    /// As [`Gpu::gemm_with_plan`].
    /// Also [`GpuError::NotOneTiledLaunch`] for a plan that is not a single tiled launch.
    ///
    /// # Safety
    /// As for [`Gpu::gemm_with_plan`].
    /// The kernel must take the parameters of the tile shape's own kernel and compute the same tiles.
    pub unsafe fn gemm_with_kernel(
        &self,
        kernel: &CustomKernel,
        weights: &DeviceWeights,
        operands: &Operands,
        plan: &Plan,
        workspace: &Workspace,
        stream: impl Into<StreamHandle>,
    ) -> Result<(), Error> {
        self.check_context("kernel", kernel.kernel.context())?;
        let Some(_entered) = self.check_gemm(weights, operands, plan, workspace)? else { return Ok(()) };
        let Algorithm::Tiled(tiled) = plan.algorithm() else {
            return Err(GpuError::NotOneTiledLaunch.into());
        };
        let launch =
            self.prepare_tiled(kernel.block(), weights, operands, 0..weights.n(), tiled, workspace)?;
        // SAFETY: the operands and the plan are checked; the caller vouches for the kernel and the memory.
        unsafe { self.launch_tiled(launch, stream.into()) }?;
        Ok(())
    }

    /// Like [`Gpu::upload`], with `pairs` in place of the weights' own.
    ///
    /// They have the layout and length of [`PackedWeights::pairs`].
    /// Custom kernels may interpret their bytes differently.
    ///
    /// # Errors
    /// As [`Gpu::upload`], and [`Error::ShapeMismatch`] for another length.
    pub fn upload_with_pairs(&self, weights: &PackedWeights, pairs: &[u8]) -> Result<DeviceWeights, Error> {
        check_length("pairs", "those of the weights", weights.pairs().len(), pairs.len())?;
        DeviceWeights::upload_as(&self.context, weights, pairs)
    }
}
