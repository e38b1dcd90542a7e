//! Turns failures of CUDA driver calls into errors that name the failed action.
//! The calls themselves go through `cust`, and the status names come from `liquidgemm`.

use anyhow::anyhow;
use cust::context::CurrentContext;
use cust::error::CudaError;
use cust::sys::CUresult;
use liquidgemm::gpu::DriverStatus;

/// Adds the purpose of a driver call to its error.
pub(crate) trait During<T> {
    /// Replaces a driver error by one that names `action`.
    fn during(self, action: &str) -> anyhow::Result<T>;
}

impl<T> During<T> for Result<T, CudaError> {
    fn during(self, action: &str) -> anyhow::Result<T> {
        self.map_err(|error| anyhow!("{action} failed: {}", DriverStatus(error as u32)))
    }
}

impl During<()> for CUresult {
    fn during(self, action: &str) -> anyhow::Result<()> {
        match self as u32 {
            0 => Ok(()),
            status => Err(anyhow!("{action} failed: {}", DriverStatus(status))),
        }
    }
}

/// Waits until the GPU is idle.
/// Device-to-device copies return before they are done,
/// and the bench's non-blocking stream does not wait for them.
pub(crate) fn wait() -> anyhow::Result<()> {
    CurrentContext::synchronize().during("waiting for the GPU")
}
