//! Launches with cluster dimensions and programmatic dependent launch, through `cuLaunchKernelEx`.
//! `cust` lacks that function, so its types are declared here.

use std::ffi::c_void;
use std::ptr;

use cust::sys::{CUfunction, CUstream};

use crate::error::gpu::{During, GpuError, Status};

/// The driver's `CUlaunchAttribute`: an identifier and 64 bytes of value.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
struct Attribute {
    id: u32,
    padding: u32,
    value: [u32; 16],
}

const CLUSTER_DIMENSION: u32 = 4;
const PROGRAMMATIC_STREAM_SERIALIZATION: u32 = 6;

impl Attribute {
    fn new(id: u32, leading: [u32; 3]) -> Self {
        let mut value = [0; 16];
        value[..3].copy_from_slice(&leading);
        Self { id, padding: 0, value }
    }
}

/// The driver's `CUlaunchConfig`.
#[repr(C)]
pub(crate) struct Configuration {
    grid: [u32; 3],
    block: [u32; 3],
    shared_bytes: u32,
    stream: CUstream,
    attributes: *const Attribute,
    attribute_count: u32,
}

/// `cuLaunchKernelEx`.
pub(crate) type LaunchKernel = unsafe extern "C" fn(
    configuration: *const Configuration,
    function: CUfunction,
    parameters: *mut *mut c_void,
    extra: *mut *mut c_void,
) -> Status;

/// Looks up `cuLaunchKernelEx`.
pub(crate) fn launcher(driver: &cuda_driver::Driver) -> Result<LaunchKernel, GpuError> {
    const NAME: &str = "cuLaunchKernelEx";
    // SAFETY: the type is the function's.
    unsafe { driver.symbol::<LaunchKernel>(NAME) }.ok_or(GpuError::MissingFunction { name: NAME })
}

/// `cuOccupancyMaxActiveClusters`.
type MaxActiveClusters = unsafe extern "C" fn(
    clusters: *mut i32,
    function: CUfunction,
    configuration: *const Configuration,
) -> Status;

/// Computes how many clusters of a kernel run at a time.
pub(crate) struct Occupancy(MaxActiveClusters);

impl Occupancy {
    /// Looks up `cuOccupancyMaxActiveClusters`. Returns `None` if the driver lacks it.
    pub(crate) fn of_driver(driver: &cuda_driver::Driver) -> Option<Self> {
        // SAFETY: the type is the function's.
        unsafe { driver.symbol::<MaxActiveClusters>("cuOccupancyMaxActiveClusters") }.map(Self)
    }

    /// Returns how many clusters of `cluster` thread blocks run at a time, or `None` if the call fails.
    ///
    /// Each thread block has `threads` threads and `shared_bytes` bytes of dynamic shared memory.
    pub(crate) fn clusters(
        &self,
        function: CUfunction,
        cluster: u32,
        threads: u32,
        shared_bytes: u32,
    ) -> Option<u32> {
        let attributes = [Attribute::new(CLUSTER_DIMENSION, [cluster, 1, 1])];
        let configuration = Configuration {
            grid: [cluster, 1, 1],
            block: [threads, 1, 1],
            shared_bytes,
            stream: ptr::null_mut(),
            attributes: attributes.as_ptr(),
            attribute_count: 1,
        };
        let mut clusters = 0;
        // SAFETY: the configuration and its attributes outlive the call.
        // The first argument is valid for a write.
        let status = unsafe { self.0(&mut clusters, function, &configuration) };
        status.during("asking for the clusters that fit").ok()?;
        u32::try_from(clusters).ok().filter(|&clusters| clusters > 0)
    }
}

/// A launch of a one-dimensional grid.
pub(crate) struct Launch {
    pub(crate) function: CUfunction,
    pub(crate) blocks: u32,
    pub(crate) cluster: u32,
    pub(crate) threads: u32,
    pub(crate) shared_bytes: u32,
    pub(crate) stream: CUstream,
}

impl Launch {
    /// Launches so that the kernel may begin while the previous one on the stream still runs.
    ///
    /// # Safety
    /// 1. The parameters are those of the function.
    /// 2. The kernel itself waits for the previous one (`griddepcontrol.wait`)
    ///    before it touches memory that the previous one may write, or writes memory that it may touch.
    pub(crate) unsafe fn overlapping_previous(
        &self,
        launch: LaunchKernel,
        parameters: &mut [*mut c_void],
    ) -> Status {
        let attributes = [
            Attribute::new(PROGRAMMATIC_STREAM_SERIALIZATION, [1, 0, 0]),
            Attribute::new(CLUSTER_DIMENSION, [self.cluster, 1, 1]),
        ];
        // A cluster of one thread block needs no attribute.
        let count = if self.cluster > 1 { 2 } else { 1 };
        // SAFETY: the caller upholds the contract.
        unsafe { self.with_attributes(launch, parameters, &attributes[..count]) }
    }

    /// Launches without clusters, after the previous launch on the stream has ended.
    ///
    /// # Safety
    /// The parameters are those of the function.
    pub(crate) unsafe fn after_previous(
        &self,
        launch: LaunchKernel,
        parameters: &mut [*mut c_void],
    ) -> Status {
        // SAFETY: the caller upholds the contract.
        unsafe { self.with_attributes(launch, parameters, &[]) }
    }

    unsafe fn with_attributes(
        &self,
        launch: LaunchKernel,
        parameters: &mut [*mut c_void],
        attributes: &[Attribute],
    ) -> Status {
        let configuration = Configuration {
            grid: [self.blocks, 1, 1],
            block: [self.threads, 1, 1],
            shared_bytes: self.shared_bytes,
            stream: self.stream,
            attributes: attributes.as_ptr(),
            attribute_count: attributes.len() as u32,
        };
        // SAFETY: the configuration and its attributes outlive the call; the caller vouches for the rest.
        unsafe { launch(&configuration, self.function, parameters.as_mut_ptr(), ptr::null_mut()) }
    }
}
