//! Launches the speed-of-light probes, whose times are the floor of a problem.
//! The device twin is `kernels-gpu/src/probes.rs`; both sides take sizes from `liquidgemm_format::probe`.

use std::ffi::c_void;

use anyhow::ensure;
use liquidgemm::gpu::{DeviceSpan, Gpu, StreamHandle};
use liquidgemm_format::probe::{
    MMA_ROUND_PRODUCTS, MMA_TILE_BYTES, MMA_WARPGROUPS, STREAM_PIECE_BYTES, STREAM_SHARED_BYTES,
};

use super::lazy_kernel::LazyKernel;

/// Threads per thread block of the memory probe.
const STREAM_THREADS: u32 = 32;
/// Threads per thread block of the tensor-core probe.
const MMA_THREADS: u32 = MMA_WARPGROUPS * 128;

/// The compiled probes of one GPU.
#[derive(Debug)]
pub struct Probes<'a> {
    gpu: &'a Gpu,
    stream: LazyKernel,
    mma: LazyKernel,
}

impl<'a> Probes<'a> {
    /// Returns the probes of a GPU. Each is compiled when it is first launched.
    pub fn new(gpu: &'a Gpu) -> Self {
        Self {
            gpu,
            stream: LazyKernel::new("probe_stream", include_str!("../ptx/probe_stream.ptx")),
            mma: LazyKernel::new("probe_mma", include_str!("../ptx/probe_mma.ptx")),
        }
    }

    /// Launches a kernel that reads `source` from memory and does nothing else.
    /// No kernel that reads as many bytes can be faster.
    /// The kernel reads whole pieces of [`STREAM_PIECE_BYTES`] and leaves out an incomplete last piece.
    ///
    /// # Errors
    /// If `source` is misaligned or too small, or the driver fails.
    ///
    /// # Safety
    /// `source` must stay allocated until the launch has finished on `stream`.
    pub unsafe fn stream(&self, source: DeviceSpan, stream: impl Into<StreamHandle>) -> anyhow::Result<()> {
        ensure!(
            source.bytes() >= STREAM_PIECE_BYTES as usize && source.address().is_multiple_of(16),
            "the stream probe needs at least {STREAM_PIECE_BYTES} bytes at an address that is a multiple of 16"
        );
        let mut address = source.address();
        let mut pieces = (source.bytes() / STREAM_PIECE_BYTES as usize).min(u32::MAX as usize) as u32;
        let mut parameters: [*mut c_void; 2] = [(&raw mut address).cast(), (&raw mut pieces).cast()];
        let blocks = self.gpu.multiprocessors();
        let kernel = self.stream.get(self.gpu, STREAM_THREADS, STREAM_SHARED_BYTES)?;
        // SAFETY: these are the kernel's two parameters; the caller guarantees that the memory is valid.
        unsafe { self.gpu.launch_kernel(kernel, blocks, &mut parameters, stream) }?;
        Ok(())
    }

    /// Launches a kernel that does at least `products` multiply-adds on the tensor cores and nothing else.
    /// No kernel that does as many can be faster.
    ///
    /// # Errors
    /// If `sink` is too small or the driver fails.
    ///
    /// # Safety
    /// `sink` must have 4 bytes for each thread of one thread block per SM, which the kernel overwrites.
    /// It must stay allocated until the launch has finished on `stream`.
    pub unsafe fn mma(
        &self,
        products: u64,
        sink: DeviceSpan,
        stream: impl Into<StreamHandle>,
    ) -> anyhow::Result<()> {
        let blocks = self.gpu.multiprocessors();
        ensure!(
            sink.bytes() >= blocks as usize * MMA_THREADS as usize * 4 && sink.address().is_multiple_of(4),
            "the mma probe writes 4 bytes for each of {MMA_THREADS} threads on {blocks} SMs"
        );
        let mut address = sink.address();
        let rounds = products.div_ceil(u64::from(blocks) * MMA_ROUND_PRODUCTS);
        let mut rounds = rounds.clamp(1, u64::from(u32::MAX)) as u32;
        let mut parameters: [*mut c_void; 2] = [(&raw mut address).cast(), (&raw mut rounds).cast()];
        let kernel = self.mma.get(self.gpu, MMA_THREADS, MMA_TILE_BYTES)?;
        // SAFETY: these are the kernel's two parameters; the caller guarantees that the memory is valid.
        unsafe { self.gpu.launch_kernel(kernel, blocks, &mut parameters, stream) }?;
        Ok(())
    }
}
