//! The GPU backend: Hopper only, kernels compiled from the PTX that this crate carries.
//!
//! | level | what it does | where |
//! |---|---|---|
//! | [`Gpu::multiply`] | host memory in, host memory out, waits | here |
//! | [`Gpu::gemm`] | device memory, a caller's stream, returns at once | [`gemm`] |
//! | [`DeviceWeights`], [`DeviceSpan`], [`Workspace`] | what lies on the device | [`memory`] |
//! | `Gpu::ablation` | the GEMM without one of its ideas, for the bench | `ablation` |
//!
//! Only the driver is needed, no CUDA toolkit; without a driver [`Gpu::new`] says so.

#[cfg(feature = "bench")]
pub mod ablation;
mod error;
pub mod gemm;
mod kernels;
mod launch;
pub mod memory;
mod plans;
pub mod probes;
mod skinny;
mod stream;
mod tensor_map;

use std::ops::RangeInclusive;
use std::sync::{Mutex, PoisonError};

use cust::context::Context;
use cust::device::{Device, DeviceAttribute};
use cust::memory::{CopyDestination, DeviceBuffer};
use cust::stream::{Stream, StreamFlags};
use cust::sys::{self, CUcontext};
use liquidgemm_format::tile::MAX_SHARED_BYTES;

pub(crate) use error::During;
pub use error::{DriverStatus, GpuError};
pub use gemm::{Operands, StreamHandle};
pub use kernels::ptx_hash;
pub use memory::{DeviceSpan, DeviceWeights, Workspace};

use crate::{ActivationsView, DeviceFigures, Error, Method, Output, PackedWeights, Plan};
use memory::copy_to_device;

/// The CUDA version that first understands the kernels' PTX (ISA 8.1).
const NEEDED_CUDA: cuda_driver::CudaVersion = cuda_driver::CudaVersion { major: 12, minor: 1 };

/// A Hopper GPU, ready to multiply.
#[derive(Debug)]
pub struct Gpu {
    name: String,
    driver: cuda_driver::CudaVersion,
    figures: DeviceFigures,
    context: CUcontext,
    kernels: kernels::KernelCache,
    plans: plans::PlanCache,
    encode_tensor_map: tensor_map::EncodeTiled,
    launch_kernel: launch::LaunchKernel,
    /// Of the blocking calls.
    own: Mutex<Option<Own>>,
    /// Keeps the primary context alive, where this is one of our own; last, because all the above lives in it.
    _primary: Option<Context>,
}

/// What the blocking calls launch with.
#[derive(Debug)]
struct Own {
    stream: Stream,
    workspace: Workspace,
}

// SAFETY: a context, a stream and device memory are handles that the driver lets any thread use; every call makes
// the context current on its thread first.
unsafe impl Send for Gpu {}
// SAFETY: as above; what changes after construction is behind a lock.
unsafe impl Sync for Gpu {}

impl Gpu {
    /// The first GPU, with its primary context, which the CUDA runtime and other frameworks share.
    ///
    /// # Errors
    /// [`GpuError`] if there is no driver, it is too old, or the GPU isn't a Hopper.
    pub fn new() -> Result<Self, Error> {
        Self::with_device(0)
    }

    /// The GPU of this number, with its primary context.
    ///
    /// # Errors
    /// As [`Gpu::new`].
    pub fn with_device(ordinal: u32) -> Result<Self, Error> {
        Self::load_driver()?;
        let count = match Device::num_devices() {
            Ok(count) => count,
            Err(cust::error::CudaError::NoDevice) => 0,
            Err(error) => Err(error).during("counting the GPUs")?,
        };
        if count == 0 {
            return Err(GpuError::NoDevice.into());
        }
        if ordinal >= count {
            return Err(GpuError::NoSuchDevice { ordinal, count }.into());
        }
        let device = Device::get_device(ordinal).during("opening the GPU")?;
        // Before the context, which takes hundreds of megabytes.
        check_device(device)?;
        let primary = Context::new(device).during("making the GPU's primary context current")?;
        Self::assemble(device, primary.as_raw(), Some(primary))
    }

    /// The GPU and context that are current on this thread. The context must outlive the value.
    ///
    /// # Errors
    /// As [`Gpu::new`], and [`GpuError::NoContext`].
    pub fn from_current_context() -> Result<Self, Error> {
        Self::load_driver()?;
        let mut context = std::ptr::null_mut();
        // SAFETY: the argument is valid for a write.
        unsafe { sys::cuCtxGetCurrent(&mut context) }.during("asking for the current context")?;
        if context.is_null() {
            return Err(GpuError::NoContext.into());
        }
        let device = cust::context::CurrentContext::get_device().during("asking for the current GPU")?;
        Self::assemble(device, context, None)
    }

    fn load_driver() -> Result<&'static cuda_driver::Driver, GpuError> {
        let driver = cuda_driver::load()?;
        if driver.version() < NEEDED_CUDA {
            return Err(GpuError::DriverTooOld { found: driver.version(), needed: NEEDED_CUDA });
        }
        match cust::init(cust::CudaFlags::empty()) {
            Ok(()) => Ok(driver),
            Err(cust::error::CudaError::NoDevice) => Err(GpuError::NoDevice),
            Err(error) => Err(error).during("starting the NVIDIA driver"),
        }
    }

    fn assemble(device: Device, context: CUcontext, primary: Option<Context>) -> Result<Self, Error> {
        let driver = Self::load_driver()?;
        check_device(device)?;
        let attribute = |attribute| device.get_attribute(attribute).during("asking for the GPU's figures");
        let figures = DeviceFigures::from_attributes(
            attribute(DeviceAttribute::MultiprocessorCount)?,
            attribute(DeviceAttribute::MemoryClockRate)?,
            attribute(DeviceAttribute::GlobalMemoryBusWidth)?,
            attribute(DeviceAttribute::ClockRate)?,
        );
        let mut gpu = Self {
            name: device.name().during("asking for the GPU's name")?,
            driver: driver.version(),
            figures,
            context,
            kernels: kernels::KernelCache::default(),
            plans: plans::PlanCache::default(),
            encode_tensor_map: tensor_map::encoder(driver)?,
            launch_kernel: launch::launcher(driver)?,
            own: Mutex::new(None),
            _primary: primary,
        };
        gpu.figures.clusters = gpu.resident_clusters(driver);
        Ok(gpu)
    }

    /// How many clusters of 1, 2, 4 and 8 blocks run at a time, one block an SM: as the driver says, or where it doesn't, cautiously.
    fn resident_clusters(&self, driver: &cuda_driver::Driver) -> [u32; 4] {
        let mut clusters = DeviceFigures::cautious_clusters(self.figures.multiprocessors);
        if let Some(occupancy) = launch::Occupancy::of_driver(driver)
            && let Ok(probe) = self.kernels.probe_stream()
        {
            for (power, fit) in clusters.iter_mut().enumerate() {
                let asked = occupancy.clusters(probe.function(), 1 << power, 32, MAX_SHARED_BYTES);
                *fit = asked.unwrap_or(*fit);
            }
        }
        clusters
    }

    /// The GPU's name, such as `NVIDIA H100 80GB HBM3`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Multiprocessors of the GPU.
    pub fn multiprocessors(&self) -> u32 {
        self.figures.multiprocessors
    }

    /// What plans depend on: the GPU's SMs, clusters, memory speed and clock.
    pub fn figures(&self) -> &DeviceFigures {
        &self.figures
    }

    /// Name, size and driver in one line.
    pub fn description(&self) -> String {
        format!("{}, {} multiprocessors, driver for CUDA {}", self.name, self.multiprocessors(), self.driver)
    }

    /// Makes this GPU's context the current one of this thread.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn make_current(&self) -> Result<(), Error> {
        // SAFETY: the context lives as long as this value, by the constructors.
        unsafe { sys::cuCtxSetCurrent(self.context) }.during("making the GPU's context current")?;
        Ok(())
    }

    /// Copies packed weights to the GPU.
    ///
    /// # Errors
    /// If memory runs out or the driver fails.
    pub fn upload(&self, weights: &PackedWeights) -> Result<DeviceWeights, Error> {
        self.make_current()?;
        DeviceWeights::upload(weights)
    }

    /// A workspace, large enough for every plan on this GPU. One for each stream that launches GEMMs.
    ///
    /// # Errors
    /// If memory runs out or the driver fails.
    pub fn workspace(&self) -> Result<Workspace, Error> {
        self.make_current()?;
        Ok(Workspace::new(self.multiprocessors())?)
    }

    /// The plan for `Y[m, n] = X[m, k] · W[n, k]ᵀ` on this GPU.
    ///
    /// Plans are kept, some 16,000 of them: asked for again, one is only looked up, without waiting for other threads.
    ///
    /// # Errors
    /// If a dimension is 0 or too large.
    pub fn plan(&self, m: usize, n: usize, k: usize) -> Result<Plan, Error> {
        self.plans.plan([m, n, k], &self.figures)
    }

    /// Makes ready for GEMMs of `m` tokens with weights of these `shapes`, `[n, k]` each: makes every plan, and has the driver compile every
    /// kernel that one of them names, so that [`Gpu::gemm`] compiles nothing later, in traffic or in a graph capture.
    ///
    /// It takes some 10 µs for each m and shape, and half a second for each kernel, of which there are 60, the first time that the driver
    /// sees it; after that the driver has it in its cache on disk. The driver compiles one kernel at a time.
    ///
    /// # Errors
    /// If a dimension is 0 or too large, or the driver fails. What was made ready before stays so.
    pub fn prepare(&self, shapes: &[[usize; 2]], m: RangeInclusive<usize>) -> Result<(), Error> {
        self.make_current()?;
        for &[n, k] in shapes {
            for m in m.clone() {
                self.load_kernels(&self.plan(m, n, k)?)?;
            }
        }
        Ok(())
    }

    /// Compiles a plan's kernels, if that has not been done.
    fn load_kernels(&self, plan: &Plan) -> Result<(), GpuError> {
        if let Method::Skinny(skinny) = plan.method() {
            self.kernels.skinny(skinny.shape())?;
        }
        for (_, tiled) in plan.tiled_launches() {
            self.kernels.gemm(tiled.shape())?;
        }
        Ok(())
    }

    /// `[m, n]` of `T`, row-major: everything from host memory and back, waiting for the result.
    ///
    /// For one multiplication or a test. A server uploads its weights once and calls [`Gpu::gemm`].
    ///
    /// # Errors
    /// As `cpu::gemm`, and whatever the driver says.
    pub fn multiply<'a, T: Output>(
        &self,
        weights: &PackedWeights,
        activations: impl Into<ActivationsView<'a>>,
        bias: Option<&[f32]>,
    ) -> Result<Vec<T>, Error> {
        let activations = activations.into();
        let device_weights = self.upload(weights)?;
        let plan = self.plan(activations.m(), weights.n(), weights.k())?;
        self.multiply_with::<T>(weights, &device_weights, activations, bias, &plan)
    }

    /// As [`Gpu::multiply`], with weights that are on the GPU already and a plan of the caller's choice.
    ///
    /// # Errors
    /// As [`Gpu::multiply`].
    pub fn multiply_with<'a, T: Output>(
        &self,
        weights: &PackedWeights,
        device_weights: &DeviceWeights,
        activations: impl Into<ActivationsView<'a>>,
        bias: Option<&[f32]>,
        plan: &Plan,
    ) -> Result<Vec<T>, Error> {
        let activations = activations.into();
        let elements = crate::error::checked_elements("output", activations.m(), weights.n())?;
        crate::cpu::check_call::<T>(weights, &activations, bias, elements)?;
        self.make_current()?;

        let codes = padded_rows(&activations);
        let codes = copy_to_device(&codes, "copying the activations to the GPU")?;
        let scales = copy_to_device(activations.scales(), "copying the token scales to the GPU")?;
        let bias = bias.map(|bias| copy_to_device(bias, "copying the bias to the GPU")).transpose()?;
        // SAFETY: the kernel writes every element before it is read.
        let output = unsafe { DeviceBuffer::<u8>::uninitialized(elements * size_of::<T>()) }
            .during("allocating the output")?;

        let operands = Operands {
            m: activations.m(),
            activations: (&codes).into(),
            activation_stride: padded_stride(&activations),
            token_scales: (&scales).into(),
            bias: bias.as_ref().map(DeviceSpan::from),
            output: (&output).into(),
            output_stride: weights.n(),
            output_type: T::TYPE,
        };
        let mut own = self.own.lock().unwrap_or_else(PoisonError::into_inner);
        let own = match &mut *own {
            Some(own) => own,
            empty => empty.insert(Own {
                stream: Stream::new(StreamFlags::NON_BLOCKING, None).during("making a stream")?,
                workspace: self.workspace()?,
            }),
        };
        // SAFETY: everything lives until the stream has been waited for, and the lock keeps others out.
        unsafe { self.gemm_with_plan(device_weights, &operands, plan, &own.workspace, &own.stream) }?;
        own.stream.synchronize().during("running the GEMM")?;

        let mut bytes: Vec<T> = vec![bytemuck::Zeroable::zeroed(); elements];
        output
            .copy_to(bytemuck::cast_slice_mut::<T, u8>(&mut bytes))
            .during("copying the result from the GPU")?;
        Ok(bytes)
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // Modules, streams and buffers are freed in the current context. A failure here can't be helped.
        let _ = self.make_current();
    }
}

/// Fails unless the device is a Hopper.
fn check_device(device: Device) -> Result<(), GpuError> {
    let capability = |attribute| device.get_attribute(attribute).during("asking for the compute capability");
    let major = capability(DeviceAttribute::ComputeCapabilityMajor)?;
    let minor = capability(DeviceAttribute::ComputeCapabilityMinor)?;
    // The kernels are for sm_90a, whose instructions no later generation has.
    if (major, minor) == (9, 0) {
        Ok(())
    } else {
        let name = device.name().during("asking for the GPU's name")?;
        Err(GpuError::WrongDevice { name, major, minor })
    }
}

/// Bytes from one row of a GPU's copy of the activations to the next: what TMA accepts and reads fast.
fn padded_stride(activations: &ActivationsView<'_>) -> usize {
    activations.k().next_multiple_of(64)
}

/// The rows with that stride.
fn padded_rows(activations: &ActivationsView<'_>) -> Vec<i8> {
    let stride = padded_stride(activations);
    let mut padded = vec![0; activations.m() * stride];
    for (token, row) in padded.chunks_exact_mut(stride).enumerate() {
        row[..activations.k()].copy_from_slice(activations.row(token));
    }
    padded
}
