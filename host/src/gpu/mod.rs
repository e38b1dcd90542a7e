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
mod context;
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

use std::mem;
use std::ops::RangeInclusive;
use std::sync::{Mutex, PoisonError};

use cust::device::{Device, DeviceAttribute};
use cust::stream::{Stream, StreamFlags};
use cust::sys::CUcontext;
use liquidgemm_format::tile::MAX_SHARED_BYTES;

pub(crate) use error::During;
pub use error::{DriverStatus, GpuError};
pub use gemm::{Operands, StreamHandle};
pub use kernels::ptx_hash;
pub use memory::{DeviceSpan, DeviceWeights, Workspace};

use crate::cpu::check_call;
use crate::error::checked_elements;
use crate::{ActivationsView, DeviceFigures, Error, Method, Output, PackedWeights, Plan};
use context::ContextHandle;
use memory::DeviceMemory;

/// The environment variable with the number of the GPU that [`Gpu::new`] takes.
pub const DEVICE_VARIABLE: &str = "LIQUIDGEMM_DEVICE";

/// The CUDA version that first understands the kernels' PTX (ISA 8.1).
const NEEDED_CUDA: cuda_driver::CudaVersion = cuda_driver::CudaVersion { major: 12, minor: 1 };

/// A Hopper GPU, ready to multiply.
#[derive(Debug)]
pub struct Gpu {
    name: String,
    driver: cuda_driver::CudaVersion,
    figures: DeviceFigures,
    context: ContextHandle,
    kernels: kernels::KernelCache,
    plans: plans::PlanCache,
    encode_tensor_map: tensor_map::EncodeTiled,
    launch_kernel: launch::LaunchKernel,
    /// Of the blocking calls.
    own: Mutex<Option<Own>>,
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
    /// The first GPU that can be used, or the one whose number [`DEVICE_VARIABLE`] holds, with its primary context, which the CUDA runtime and
    /// other frameworks share.
    ///
    /// # Errors
    /// [`GpuError`] if there is no driver, it is too old, or no GPU is a Hopper: then what is wrong with the first. [`GpuError::BadDevice`] if
    /// the variable holds no number.
    pub fn new() -> Result<Self, Error> {
        if let Some(text) = std::env::var_os(DEVICE_VARIABLE) {
            let text = text.to_string_lossy();
            let ordinal = text.trim().parse().map_err(|_| GpuError::BadDevice { text: text.to_string() })?;
            return Self::with_device(ordinal);
        }
        let first = match Self::with_device(0) {
            Err(error @ Error::Gpu(GpuError::WrongDevice { .. } | GpuError::Cuda { .. })) => error,
            outcome => return outcome,
        };
        let others = 1..Device::num_devices().during("counting the GPUs")?;
        others.map(Self::with_device).find_map(Result::ok).ok_or(first)
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
        Self::assemble(device, ContextHandle::primary(device.as_raw())?)
    }

    /// The GPU whose primary context is current on this thread, as it is where the CUDA runtime or another framework has been at work.
    ///
    /// # Errors
    /// As [`Gpu::new`], [`GpuError::NoContext`], and [`GpuError::NotPrimary`] for another context of the GPU.
    pub fn from_current_context() -> Result<Self, Error> {
        Self::load_driver()?;
        let current = ContextHandle::current()?;
        if current.is_null() {
            return Err(GpuError::NoContext.into());
        }
        let device = cust::context::CurrentContext::get_device().during("asking for the current GPU")?;
        check_device(device)?;
        let primary = ContextHandle::primary(device.as_raw())?;
        if primary.as_raw() != current {
            return Err(GpuError::NotPrimary.into());
        }
        Self::assemble(device, primary)
    }

    /// The GPU of any context.
    ///
    /// # Errors
    /// As [`Gpu::new`], and [`GpuError::NoContext`] for null.
    ///
    /// # Safety
    /// The context outlives the value and everything that is made with it.
    pub unsafe fn from_context(context: CUcontext) -> Result<Self, Error> {
        Self::load_driver()?;
        if context.is_null() {
            return Err(GpuError::NoContext.into());
        }
        // SAFETY: the caller vouches for the context.
        let context = unsafe { ContextHandle::foreign(context) };
        let device = {
            let _entered = context.enter()?;
            cust::context::CurrentContext::get_device().during("asking for the context's GPU")?
        };
        Self::assemble(device, context)
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

    fn assemble(device: Device, context: ContextHandle) -> Result<Self, Error> {
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
        };
        gpu.figures.clusters = gpu.resident_clusters(driver)?;
        Ok(gpu)
    }

    /// How many clusters of 1, 2, 4 and 8 blocks run at a time, one block an SM: as the driver says, or where it doesn't, cautiously.
    fn resident_clusters(&self, driver: &cuda_driver::Driver) -> Result<[u32; 4], GpuError> {
        let _entered = self.context.enter()?;
        let mut clusters = DeviceFigures::cautious_clusters(self.figures.multiprocessors);
        if let Some(occupancy) = launch::Occupancy::of_driver(driver)
            && let Ok(probe) = self.kernels.probe_stream()
        {
            for (power, fit) in clusters.iter_mut().enumerate() {
                let asked = occupancy.clusters(probe.function(), 1 << power, 32, MAX_SHARED_BYTES);
                *fit = asked.unwrap_or(*fit);
            }
        }
        Ok(clusters)
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

    /// Makes this GPU's context the current one of this thread, and leaves it so: for what a caller does with the driver itself. No other call
    /// needs it or changes what is current.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn make_current(&self) -> Result<(), Error> {
        Ok(self.context.make_current()?)
    }

    /// Copies packed weights to the GPU.
    ///
    /// # Errors
    /// If memory runs out or the driver fails.
    pub fn upload(&self, weights: &PackedWeights) -> Result<DeviceWeights, Error> {
        DeviceWeights::upload(&self.context, weights)
    }

    /// A workspace, large enough for every plan on this GPU. One for each stream that launches GEMMs.
    ///
    /// # Errors
    /// If memory runs out or the driver fails.
    pub fn workspace(&self) -> Result<Workspace, Error> {
        Ok(Workspace::new(&self.context, self.multiprocessors())?)
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
        let _entered = self.context.enter()?;
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
        let elements = checked_elements("output", activations.m(), weights.n())?;
        check_call::<T>([weights.n(), weights.k()], &activations, bias, elements)?;
        self.multiply_checked(&self.upload(weights)?, activations, bias, elements)
    }

    /// As [`Gpu::multiply`], with weights that are on the GPU already.
    ///
    /// # Errors
    /// As [`Gpu::multiply`], and [`GpuError::OtherContext`] for another GPU's weights.
    pub fn multiply_with<'a, T: Output>(
        &self,
        weights: &DeviceWeights,
        activations: impl Into<ActivationsView<'a>>,
        bias: Option<&[f32]>,
    ) -> Result<Vec<T>, Error> {
        let activations = activations.into();
        let elements = checked_elements("output", activations.m(), weights.n())?;
        check_call::<T>([weights.n(), weights.k()], &activations, bias, elements)?;
        self.check_context("weights", weights.context())?;
        self.multiply_checked(weights, activations, bias, elements)
    }

    /// The product, of so many elements; the operands fit and the weights are this GPU's.
    fn multiply_checked<T: Output>(
        &self,
        weights: &DeviceWeights,
        activations: ActivationsView<'_>,
        bias: Option<&[f32]>,
        elements: usize,
    ) -> Result<Vec<T>, Error> {
        if activations.m() == 0 {
            return Ok(Vec::new());
        }
        let mut product: Vec<T> = vec![bytemuck::Zeroable::zeroed(); elements];

        let codes = padded_rows(&activations);
        let copy = |bytes: &[u8], action| DeviceMemory::copy_of(&self.context, bytes, action);
        let codes = copy(bytemuck::cast_slice(&codes), "copying the activations to the GPU")?;
        let scales = copy(bytemuck::cast_slice(activations.scales()), "copying the token scales to the GPU")?;
        let bias =
            bias.map(|bias| copy(bytemuck::cast_slice(bias), "copying the bias to the GPU")).transpose()?;
        // The kernel writes every element before it is read.
        let output =
            DeviceMemory::uninitialized(&self.context, elements * size_of::<T>(), "allocating the output")?;

        let operands = Operands {
            m: activations.m(),
            activations: codes.span(),
            activation_stride: padded_stride(&activations),
            token_scales: scales.span(),
            bias: bias.as_ref().map(DeviceMemory::span),
            output: output.span(),
            output_stride: weights.n(),
            output_type: T::TYPE,
        };
        let mut lock = self.own.lock().unwrap_or_else(PoisonError::into_inner);
        let _entered = self.context.enter()?;
        let own = match &mut *lock {
            Some(own) => own,
            empty => empty.insert(Own {
                stream: Stream::new(StreamFlags::NON_BLOCKING, None).during("making a stream")?,
                workspace: self.workspace()?,
            }),
        };
        // SAFETY: everything lives until the stream has been waited for, and the lock keeps others out.
        let launched = unsafe { self.gemm(weights, &operands, &own.workspace, &own.stream) };
        // Also after a failure: of two launches the first may run.
        let finished = own.stream.synchronize().during("running the GEMM");
        if let Err(error) = finished {
            // Nobody knows whether the launches still run. What they use is never freed, nor used by another call.
            weights.keep_forever();
            mem::forget((codes, scales, bias, output, lock.take()));
            return Err(launched.err().unwrap_or(error.into()));
        }
        launched?;
        output.copy_to(&mut product, "copying the result from the GPU")?;
        Ok(product)
    }

    /// Fails unless something lives in this GPU's context.
    fn check_context(&self, what: &'static str, context: &ContextHandle) -> Result<(), GpuError> {
        if self.context.is(context) { Ok(()) } else { Err(GpuError::OtherContext { what }) }
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // A failure can't be helped. Modules and streams are freed in the current context.
        let _entered = self.context.enter_to_free();
        self.kernels = kernels::KernelCache::default();
        *self.own.get_mut().unwrap_or_else(PoisonError::into_inner) = None;
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
