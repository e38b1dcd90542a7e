//! Errors of the GPU backend, and their conversion from driver statuses.

use std::fmt;

use cust::error::CudaError;
use cust::sys::CUresult;

/// A status that the CUDA driver returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DriverStatus(
    /// The driver's number, a `CUresult`.
    pub u32,
);

impl fmt::Display for DriverStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = cuda_driver::describe_status(self.0.cast_signed());
        write!(f, "{} (CUDA status {})", text.as_deref().unwrap_or("unknown error"), self.0)
    }
}

/// An error of the GPU backend.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GpuError {
    /// No NVIDIA driver can be loaded.
    #[error(transparent)]
    NoDriver(#[from] cuda_driver::LoadError),

    /// The driver is too old to compile the kernels' PTX.
    #[error(
        "the NVIDIA driver supports CUDA {found}, but the kernels need {needed}; update the driver to 530 or newer"
    )]
    DriverTooOld {
        /// The CUDA version that the driver supports.
        found: cuda_driver::CudaVersion,
        /// The lowest CUDA version that can compile the kernels.
        needed: cuda_driver::CudaVersion,
    },

    /// The driver works, but no GPU is present or visible.
    #[error("the NVIDIA driver found no GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES")]
    NoDevice,

    /// No GPU has the requested number.
    #[error("there is no GPU {ordinal}; this machine has {count}")]
    NoSuchDevice {
        /// The number requested.
        ordinal: u32,
        /// The number of GPUs.
        count: u32,
    },

    /// The GPU is not a Hopper GPU.
    #[error(
        "{name} has compute capability {major}.{minor}, but the kernels need 9.0 (Hopper: H100, H200, GH200)"
    )]
    WrongDevice {
        /// The GPU's name.
        name: String,
        /// Its compute capability, major part.
        major: i32,
        /// Its compute capability, minor part.
        minor: i32,
    },

    /// No CUDA context is current on this thread, or the given context is null.
    #[error("no CUDA context is current on this thread; make one current first, or use Gpu::new")]
    NoContext,

    /// The environment variable [`DEVICE_VARIABLE`](crate::gpu::DEVICE_VARIABLE) does not hold a number.
    #[error("{DEVICE_VARIABLE} is {text:?}; it must be the number of a GPU, 0 for the first", DEVICE_VARIABLE = crate::gpu::DEVICE_VARIABLE)]
    BadDevice {
        /// The variable's value.
        text: String,
    },

    /// The current context is not the GPU's primary context, so nothing would keep it alive.
    #[error(
        "the current context is not the GPU's primary one; Gpu::from_context takes any context that its caller keeps alive"
    )]
    NotPrimary,

    /// An object on the device belongs to another context than the [`Gpu`](crate::gpu::Gpu) that uses it.
    #[error("another context holds the {what}; use what was made with the same Gpu")]
    OtherContext {
        /// The object: weights, a workspace or a kernel.
        what: &'static str,
    },

    /// A driver call failed.
    #[error("{action} failed: {status}")]
    Cuda {
        /// The purpose of the call.
        action: &'static str,
        /// The status that the driver returned.
        status: DriverStatus,
    },

    /// The driver lacks a function.
    #[error("the NVIDIA driver has no {name}; update it to 530 or newer")]
    MissingFunction {
        /// The function's name.
        name: &'static str,
    },

    /// A buffer is smaller than its contents.
    #[error("the {what} buffer has {actual} bytes, but {needed} are needed")]
    BufferTooSmall {
        /// The buffer.
        what: &'static str,
        /// Bytes needed.
        needed: usize,
        /// Bytes available.
        actual: usize,
    },

    /// An address or a stride is not aligned as TMA or the kernels require.
    #[error("the {what} is {value}, but must be a multiple of {multiple}; {fix}")]
    Misaligned {
        /// The misaligned quantity.
        what: &'static str,
        /// Its value: an address, or a stride in bytes.
        value: u64,
        /// The alignment that it needs.
        multiple: u64,
        /// The remedy.
        fix: &'static str,
    },

    /// The output's row stride is shorter than a row.
    #[error(
        "an output row stride of {stride} elements is shorter than a row of n = {n}; it must be at least n"
    )]
    OutputStrideTooShort {
        /// The row stride, in elements.
        stride: usize,
        /// Elements in a row.
        n: usize,
    },

    /// Elements that do not have 16 bits, where they must.
    #[error("{what} takes bf16 or f16, not {element_type}")]
    ElementType {
        /// What takes such elements only.
        what: &'static str,
        /// The element type requested.
        element_type: crate::OutputType,
    },

    /// A value does not fit the kernels' 32-bit arguments.
    #[error("{what} is {value}; the GPU kernels take at most {limit}")]
    OutOfRange {
        /// The value's name.
        what: &'static str,
        /// The value.
        value: usize,
        /// The largest value that fits.
        limit: usize,
    },

    /// The plan is not a single tiled launch, so one custom kernel cannot execute it.
    #[error("the plan is not a single tiled launch; Plan::with_config makes such a plan")]
    NotOneTiledLaunch,

    /// The embedded PTX of a kernel cannot be decompressed.
    #[error("the embedded kernel {entry} is damaged: build the library again")]
    DamagedKernel {
        /// The kernel's entry point.
        entry: &'static str,
    },

    /// A reduction over the GPUs failed. Implementations of [`AllReduce`](crate::gpu::AllReduce) return it.
    #[error("a reduction over the GPUs failed: {reason}")]
    AllReduce {
        /// What happened.
        reason: String,
    },

    /// NCCL cannot be loaded.
    #[cfg(feature = "nccl")]
    #[error(
        "NCCL not found; install the Python wheel nvidia-nccl-cu12 or nvidia-nccl-cu13, or NVIDIA's package libnccl2, \
         and add the folder of libnccl.so.2 to LD_LIBRARY_PATH or set {NCCL_VARIABLE} to it; tried {tried}",
        NCCL_VARIABLE = crate::gpu::NCCL_VARIABLE
    )]
    NcclNotFound {
        /// The names that were tried, each with the loader's reason.
        tried: String,
    },

    /// A library lacks a function that every NCCL has.
    #[cfg(feature = "nccl")]
    #[error("{path} has no {function}: it is not NCCL 2; set {NCCL_VARIABLE} to another file", NCCL_VARIABLE = crate::gpu::NCCL_VARIABLE)]
    NotNccl {
        /// The library's name or path.
        path: String,
        /// The function that it lacks.
        function: &'static str,
    },

    /// NCCL is too old.
    #[cfg(feature = "nccl")]
    #[error(
        "{path} is NCCL {found}, but {needed} is needed; install a newer nvidia-nccl-cu12 or nvidia-nccl-cu13"
    )]
    NcclTooOld {
        /// The library's name or path.
        path: String,
        /// Its version.
        found: String,
        /// The lowest version that has all functions.
        needed: String,
    },

    /// An NCCL call failed.
    #[cfg(feature = "nccl")]
    #[error("{action} failed: {message} (NCCL status {status})")]
    Nccl {
        /// The purpose of the call.
        action: &'static str,
        /// The status that NCCL returned, an `ncclResult_t`.
        status: i32,
        /// NCCL's message.
        message: String,
    },

    /// The plan was made for another problem.
    #[error("the plan is for {plan}, but the call is {call}")]
    PlanMismatch {
        /// The plan's problem.
        plan: String,
        /// The call's problem.
        call: String,
    },
}

/// Adds the purpose of a driver call to its error.
pub(crate) trait During<T> {
    /// Converts the driver's error to [`GpuError::Cuda`] with this purpose.
    fn during(self, action: &'static str) -> Result<T, GpuError>;
}

impl<T> During<T> for Result<T, CudaError> {
    fn during(self, action: &'static str) -> Result<T, GpuError> {
        self.map_err(|error| GpuError::Cuda { action, status: DriverStatus(error as u32) })
    }
}

impl During<()> for CUresult {
    fn during(self, action: &'static str) -> Result<(), GpuError> {
        Status(self as u32).during(action)
    }
}

/// The result of driver functions that `cust` lacks.
/// It is a number because newer functions return statuses that [`CUresult`] does not name.
#[repr(transparent)]
pub(crate) struct Status(u32);

impl During<()> for Status {
    fn during(self, action: &'static str) -> Result<(), GpuError> {
        match self.0 {
            0 => Ok(()),
            status => Err(GpuError::Cuda { action, status: DriverStatus(status) }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_number_is_a_status_that_can_be_printed() {
        for status in [1, 34, 912, 65_535, u32::MAX] {
            let text = DriverStatus(status).to_string();
            assert!(text.ends_with(&format!(" (CUDA status {status})")), "{text}");
        }
    }
}
