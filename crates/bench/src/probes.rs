//! Launches the speed-of-light probes. The device twin is `kernels-gpu/src/probes.rs`.

use std::ffi::c_void;
use std::ptr;

use cust::sys::{self, CUfunction};
use liquidgemm_format::probe::{
    MMA_ROUND_PRODUCTS, MMA_TILE_BYTES, MMA_WARPGROUPS, STREAM_PIECE_BYTES, STREAM_SHARED_BYTES,
};

use crate::Error;
use crate::gpu::error::During;
use crate::gpu::{DeviceSpan, Gpu, StreamHandle};

impl Gpu {
    /// Launches a kernel that pulls the whole of `source` from memory and does nothing else: the least time for a
    /// kernel that reads as much. The last piece of less than 16 KiB is left out.
    ///
    /// # Errors
    /// If `source` is misaligned or the driver fails.
    ///
    /// # Safety
    /// `source` stays allocated until the launch has finished on `stream`.
    pub unsafe fn probe_stream(
        &self,
        source: DeviceSpan,
        stream: impl Into<StreamHandle>,
    ) -> Result<(), Error> {
        source.check("probe's source", STREAM_PIECE_BYTES as usize, 16)?;
        let _entered = self.context.enter()?;
        let mut address = source.address();
        let mut pieces = (source.bytes() / STREAM_PIECE_BYTES as usize).min(u32::MAX as usize) as u32;
        let mut parameters = [(&raw mut address).cast(), (&raw mut pieces).cast()];
        let function = self.kernels.probe_stream()?.function();
        // SAFETY: the parameters are the kernel's two; the caller vouches for the memory.
        unsafe { self.launch_probe(function, 32, STREAM_SHARED_BYTES, stream.into(), &mut parameters) }
    }

    /// Launches a kernel that does at least `products` multiply-adds on the tensor cores and nothing else: the
    /// least time for a kernel that does as many.
    ///
    /// # Errors
    /// If `sink` is too small or the driver fails.
    ///
    /// # Safety
    /// `sink` has 1 KiB a multiprocessor, stays allocated until the launch has finished on `stream`, and is
    /// overwritten.
    pub unsafe fn probe_mma(
        &self,
        products: u64,
        sink: DeviceSpan,
        stream: impl Into<StreamHandle>,
    ) -> Result<(), Error> {
        let blocks = self.multiprocessors() as u64;
        let threads = MMA_WARPGROUPS * 128;
        sink.check("probe's sink", (blocks * threads as u64 * 4) as usize, 4)?;
        let _entered = self.context.enter()?;
        let mut address = sink.address();
        let mut rounds = products.div_ceil(blocks * MMA_ROUND_PRODUCTS).clamp(1, u32::MAX as u64) as u32;
        let mut parameters = [(&raw mut address).cast(), (&raw mut rounds).cast()];
        let function = self.kernels.probe_mma()?.function();
        // SAFETY: the parameters are the kernel's two; the caller vouches for the memory.
        unsafe { self.launch_probe(function, threads, MMA_TILE_BYTES, stream.into(), &mut parameters) }
    }

    unsafe fn launch_probe(
        &self,
        function: CUfunction,
        threads: u32,
        shared_bytes: u32,
        stream: StreamHandle,
        parameters: &mut [*mut c_void; 2],
    ) -> Result<(), Error> {
        let (blocks, parameters) = (self.multiprocessors(), parameters.as_mut_ptr());
        // SAFETY: the caller vouches for the parameters, which the driver copies.
        unsafe {
            sys::cuLaunchKernel(
                function,
                blocks,
                1,
                1,
                threads,
                1,
                1,
                shared_bytes,
                stream.as_raw(),
                parameters,
                ptr::null_mut(),
            )
        }
        .during("launching a probe")?;
        Ok(())
    }
}
