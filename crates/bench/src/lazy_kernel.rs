//! A kernel that this crate carries as PTX, compiled when it is first launched.

use std::sync::OnceLock;

use liquidgemm::Error;
use liquidgemm::gpu::{CustomKernel, Gpu};

/// A kernel of one GPU.
#[derive(Debug)]
pub(crate) struct LazyKernel {
    entry: &'static str,
    ptx: &'static str,
    kernel: OnceLock<CustomKernel>,
}

impl LazyKernel {
    /// The kernel `entry` of a PTX module, not yet compiled.
    pub(crate) const fn new(entry: &'static str, ptx: &'static str) -> Self {
        Self { entry, ptx, kernel: OnceLock::new() }
    }

    /// Returns the kernel, compiled for thread blocks of `threads` threads with `shared_bytes` of dynamic shared
    /// memory. Each call passes the same GPU and sizes.
    ///
    /// # Errors
    /// If the driver fails.
    pub(crate) fn get(&self, gpu: &Gpu, threads: u32, shared_bytes: u32) -> Result<&CustomKernel, Error> {
        if let Some(kernel) = self.kernel.get() {
            return Ok(kernel);
        }
        let kernel = gpu.load_kernel(self.ptx, self.entry, threads, shared_bytes)?;
        Ok(self.kernel.get_or_init(|| kernel))
    }
}
