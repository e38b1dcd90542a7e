//! Turns failures of CUDA driver calls into the library's errors, which name the failed action.
//! The calls themselves go through `cust`.

use cust::context::CurrentContext;
use cust::error::CudaError;
use cust::sys::CUresult;
use liquidgemm::gpu::{DriverStatus, GpuError};

/// Adds the purpose of a driver call to its error.
pub(crate) trait During<T> {
    /// Replaces a driver error by one that names `action`.
    fn during(self, action: &'static str) -> anyhow::Result<T>;
}

impl<T> During<T> for Result<T, CudaError> {
    fn during(self, action: &'static str) -> anyhow::Result<T> {
        self.map_err(|error| failure(action, error as u32))
    }
}

impl During<()> for CUresult {
    fn during(self, action: &'static str) -> anyhow::Result<()> {
        match self as u32 {
            0 => Ok(()),
            status => Err(failure(action, status)),
        }
    }
}

fn failure(action: &'static str, status: u32) -> anyhow::Error {
    GpuError::Cuda { action, status: DriverStatus(status) }.into()
}

/// Waits until the GPU is idle.
/// Device-to-device copies return before they are done,
/// and the bench's non-blocking stream does not wait for them.
pub(crate) fn wait() -> anyhow::Result<()> {
    CurrentContext::synchronize().during("waiting for the GPU")
}
