//! What can go wrong between this crate and the GPU.

use std::fmt;

use cust::error::CudaError;
use cust::sys::CUresult;
use liquidgemm_format::brick::BRICK_CHANNELS;

/// A status that the driver returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DriverStatus(
    /// The driver's number for it.
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
    /// The machine has no usable NVIDIA driver.
    #[error(transparent)]
    NoDriver(#[from] cuda_driver::LoadError),

    /// The driver can't compile the kernels' PTX.
    #[error(
        "the NVIDIA driver supports CUDA {found}, but the kernels need {needed}; update the driver to 530 or newer"
    )]
    DriverTooOld {
        /// What the driver supports.
        found: cuda_driver::CudaVersion,
        /// The least that is needed.
        needed: cuda_driver::CudaVersion,
    },

    /// The driver works but there is no GPU, or none is visible.
    #[error("the NVIDIA driver found no GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES")]
    NoDevice,

    /// The GPU's number is beyond what there is.
    #[error("there is no GPU {ordinal}; this machine has {count}")]
    NoSuchDevice {
        /// What was asked for.
        ordinal: u32,
        /// How many there are.
        count: u32,
    },

    /// The GPU isn't a Hopper.
    #[error(
        "{name} has compute capability {major}.{minor}, but the kernels need 9.0 (Hopper: H100, H200, GH200)"
    )]
    WrongDevice {
        /// The device's name.
        name: String,
        /// Its compute capability, before the dot.
        major: i32,
        /// And after.
        minor: i32,
    },

    /// No context is current on this thread.
    #[error("no CUDA context is current on this thread; make one current first, or use Gpu::new")]
    NoContext,

    /// The variable that chooses a GPU holds something else.
    #[error("{DEVICE_VARIABLE} is {text:?}; it must be the number of a GPU, 0 for the first", DEVICE_VARIABLE = super::DEVICE_VARIABLE)]
    BadDevice {
        /// What it holds.
        text: String,
    },

    /// The current context isn't the GPU's primary one, so nothing keeps it alive.
    #[error(
        "the current context is not the GPU's primary one; Gpu::from_context takes any context that its caller keeps alive"
    )]
    NotPrimary,

    /// Something on the device lives in another context than that of the GPU that it is used with.
    #[error(
        "the {what} live in another context than the GPU that they are used with; make them with the same Gpu"
    )]
    OtherContext {
        /// What.
        what: &'static str,
    },

    /// A call of the driver failed.
    #[error("{action} failed: {status}")]
    Cuda {
        /// What was being done.
        action: &'static str,
        /// The driver's answer.
        status: DriverStatus,
    },

    /// The driver lacks a function.
    #[error("the NVIDIA driver has no {name}; update it to 530 or newer")]
    MissingFunction {
        /// The function's name.
        name: &'static str,
    },

    /// A buffer is smaller than what lies in it.
    #[error("the {what} buffer has {actual} bytes, but {needed} are needed")]
    BufferTooSmall {
        /// Which buffer.
        what: &'static str,
        /// Bytes that are needed.
        needed: usize,
        /// Bytes that it has.
        actual: usize,
    },

    /// An address or a stride that the copy engine can't work with.
    #[error("the {what} is {value}, but must be a multiple of {multiple}; {fix}")]
    Misaligned {
        /// What is misaligned.
        what: &'static str,
        /// Its value.
        value: u64,
        /// What it must be a multiple of.
        multiple: u64,
        /// What to do.
        fix: &'static str,
    },

    /// Rows of the output that would overlap.
    #[error(
        "an output row stride of {stride} elements is shorter than a row of n = {n}; it must be at least n"
    )]
    OutputStrideTooShort {
        /// The stride, in elements.
        stride: usize,
        /// Elements in a row.
        n: usize,
    },

    /// A value that doesn't fit the kernel's 32-bit arguments.
    #[error("{what} is {value}; the GPU kernels take at most {limit}")]
    OutOfRange {
        /// What is too large.
        what: &'static str,
        /// Its value.
        value: usize,
        /// The largest value that is taken.
        limit: usize,
    },

    /// A problem divided where it can't be.
    #[error(
        "{n} channels can't be divided behind the first {boundary}; take a multiple of 64 between 0 and {n}"
    )]
    NoSuchBoundary {
        /// Where it was to be divided.
        boundary: usize,
        /// The problem's channels.
        n: usize,
    },

    /// A shape for few tokens that has no kernel.
    #[error(
        "there is no kernel for passes of {} channels x {} tokens; \
         liquidgemm_format::skinny::SKINNY_SHAPES lists those that there are",
        shape.channels(), shape.tokens
    )]
    UnknownSkinnyShape {
        /// What was asked for.
        shape: liquidgemm_format::skinny::SkinnyShape,
    },

    /// A tile shape that has no kernel.
    #[error(
        "there is no kernel for tiles of {} channels x {} tokens with {} consumers a strip and K shared by {} blocks; \
         liquidgemm_format::tile::TILE_SHAPES lists those that there are",
        u64::from(shape.strips) * BRICK_CHANNELS as u64, shape.tokens, shape.halves, shape.split
    )]
    UnknownTile {
        /// What was asked for.
        shape: liquidgemm_format::tile::TileShape,
    },

    /// What the ablation's kernels can't do.
    #[cfg(feature = "bench")]
    #[error("the ablation has no kernel for {what}")]
    NotInAblation {
        /// What was asked for.
        what: &'static str,
    },

    /// The PTX that the library carries can't be decompressed.
    #[error("the embedded kernel {entry} is damaged: build the library again")]
    DamagedKernel {
        /// The kernel's entry point.
        entry: &'static str,
    },

    /// A plan that was made for another problem or another GPU.
    #[error("the plan is for {plan}, but the call is {call}")]
    PlanMismatch {
        /// What the plan is for.
        plan: String,
        /// What the call has.
        call: String,
    },
}

/// Names what a driver call was for.
pub(crate) trait During<T> {
    /// Turns the driver's error into a [`GpuError`] that says `action`.
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

/// What a driver function that `cust` lacks returns: newer ones have statuses that [`CUresult`] has no name for.
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
