//! The GPU backend, for Hopper GPUs. The driver compiles its kernels from PTX that the library embeds.
//!
//! | level | task | file |
//! |---|---|---|
//! | [`Gpu::multiply`] | takes and returns host memory, waits for the result | `mod.rs` |
//! | [`Gpu::gemm`] | device memory, the caller's stream, returns at once | `gemm.rs` |
//! | [`DeviceLinear::forward`] | a linear layer with bf16 or f16 activations | `linear.rs` |
//! | [`RowParallelCall::forward`] | a linear layer whose input channels are divided among GPUs | `row_parallel.rs` |
//! | `Communicator` (feature `nccl`), [`AllReduce`] | the reductions over these GPUs | `nccl`, `all_reduce.rs` |
//! | [`Gpu::quantize`] | quantization of activations in device memory, with norms and gates | `activations.rs` |
//! | [`Gpu::grouped_gemm`], [`DeviceExperts`] | the rows of many experts in one launch | `grouped.rs`, `experts.rs` |
//! | [`Gpu::combine`] | the weighted sum of the experts' rows of each token | `combine.rs` |
//! | [`Gpu::scale_sums`] | the epilogue of int32 sums | `scale_sums.rs` |
//! | [`DeviceWeights`], [`DeviceSpan`], [`Workspace`] | device memory | `memory.rs` |
//! | [`CustomKernel`] | kernels of another crate | `custom.rs` |
//!
//! It needs the NVIDIA driver but no CUDA toolkit. Without a driver [`Gpu::new`] returns an error.

mod activations;
mod all_reduce;
mod combine;
mod context;
mod custom;
mod experts;
mod gemm;
mod grouped;
mod kernels;
mod launch;
mod linear;
mod memory;
#[cfg(feature = "nccl")]
mod nccl;
mod plans;
mod row_parallel;
mod scale_sums;
mod skinny;
mod stream;
mod tensor_map;

use std::ffi::c_void;
use std::mem;
use std::ops::RangeInclusive;
use std::sync::{Mutex, PoisonError};

use cust::device::{Device, DeviceAttribute};
use cust::stream::{Stream, StreamFlags};
use liquidgemm_format::tile::MAX_SHARED_BYTES;

pub use crate::error::{DriverStatus, GpuError};
pub use activations::{LinearInput, QuantizeOperands};
pub use all_reduce::{AllReduce, Reduction};
pub use combine::CombineOperands;
pub use cuda_driver::{CudaVersion, LoadError};
pub use custom::CustomKernel;
pub use experts::DeviceExperts;
pub use gemm::{Operands, StreamHandle};
pub use grouped::{DeviceRowIndex, GroupedOperands};
pub use kernels::ptx_hash;
pub use linear::{DeviceLinear, LinearOutput, QuantizedSpan};
pub use memory::{DeviceSpan, DeviceWeights, Workspace};
#[cfg(feature = "nccl")]
pub use nccl::{Communicator, NCCL_VARIABLE, UNIQUE_ID_BYTES, UniqueId, nccl_version};
pub use row_parallel::{Partials, RowParallelCall, RowParallelLinear};
pub use scale_sums::SumsOperands;

use crate::check::{check_call, checked_elements};
use crate::error::gpu::During;
use crate::{ActivationsView, Algorithm, DeviceFigures, Error, Group, Output, PackedWeights, Plan, Problem};
use context::ContextHandle;
use memory::DeviceMemory;

/// The environment variable that selects the GPU for [`Gpu::new`] by its number, counted from 0.
pub const DEVICE_VARIABLE: &str = "LIQUIDGEMM_DEVICE";

/// The lowest CUDA version that can compile the kernels' PTX (ISA 8.1).
const NEEDED_CUDA: cuda_driver::CudaVersion = cuda_driver::CudaVersion { major: 12, minor: 1 };

/// A Hopper GPU with its context, compiled kernels and plans.
///
/// All methods take `&self`, so threads can share one value.
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
    /// Stream and workspace of the blocking calls, created on first use.
    own: Mutex<Option<Own>>,
}

/// The stream and the workspace of the blocking calls.
#[derive(Debug)]
struct Own {
    stream: Stream,
    workspace: Workspace,
}

// SAFETY: contexts, streams and device memory are driver handles, which any thread may use.
// Every call makes the context current on its thread first.
unsafe impl Send for Gpu {}
// SAFETY: as above; fields that change after construction are behind a lock.
unsafe impl Sync for Gpu {}

impl Gpu {
    /// Opens the GPU whose number [`DEVICE_VARIABLE`] holds, or else the first usable GPU.
    ///
    /// It retains the GPU's primary context, which the CUDA runtime and other frameworks share.
    ///
    /// # Errors
    /// - [`GpuError::BadDevice`] if the variable does not hold a number.
    /// - The errors of [`Gpu::with_device`]. If no GPU is usable, it is the error of GPU 0.
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

    /// Opens the GPU with this number, counted from 0, and retains its primary context.
    ///
    /// # Errors
    /// - [`GpuError::NoDriver`] or [`GpuError::DriverTooOld`] if no suitable driver is installed.
    /// - [`GpuError::NoDevice`] or [`GpuError::NoSuchDevice`] if there is no such GPU.
    /// - [`GpuError::WrongDevice`] if it is not a Hopper GPU.
    /// - [`GpuError::MissingFunction`] or [`GpuError::Cuda`] if the driver fails.
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
        // Check before creating the context, which takes hundreds of megabytes.
        check_device(device)?;
        Self::assemble(device, ContextHandle::primary(device.as_raw())?)
    }

    /// Opens the GPU whose primary context is current on this thread.
    ///
    /// It is current after the CUDA runtime or another framework has used the GPU on this thread.
    ///
    /// # Errors
    /// - [`GpuError::NoContext`] if no context is current.
    /// - [`GpuError::NotPrimary`] if another context of the GPU is current.
    /// - The errors of [`Gpu::with_device`].
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

    /// Opens the GPU of any context, a raw `CUcontext`.
    ///
    /// # Errors
    /// [`GpuError::NoContext`] if the context is null, and the errors of [`Gpu::with_device`].
    ///
    /// # Safety
    /// The context outlives the returned value and everything that is created with it.
    pub unsafe fn from_context(context: *mut c_void) -> Result<Self, Error> {
        Self::load_driver()?;
        if context.is_null() {
            return Err(GpuError::NoContext.into());
        }
        // SAFETY: the caller vouches for the context.
        let context = unsafe { ContextHandle::foreign(context.cast()) };
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
            kernels: kernels::KernelCache::new(context.clone()),
            context,
            plans: plans::PlanCache::default(),
            encode_tensor_map: tensor_map::encoder(driver)?,
            launch_kernel: launch::launcher(driver)?,
            own: Mutex::new(None),
        };
        gpu.figures.clusters = gpu.resident_clusters(driver)?;
        Ok(gpu)
    }

    /// Returns how many clusters of 1, 2, 4 and 8 thread blocks run at a time, with one thread block per SM.
    ///
    /// It asks the driver, and estimates what the driver does not say.
    fn resident_clusters(&self, driver: &cuda_driver::Driver) -> Result<[u32; 4], GpuError> {
        let _entered = self.context.enter()?;
        let mut clusters = DeviceFigures::cautious_clusters(self.figures.multiprocessors);
        if let Some(occupancy) = launch::Occupancy::of_driver(driver)
            && let Ok(kernel) = self.kernels.occupancy()
        {
            for (power, fit) in clusters.iter_mut().enumerate() {
                let asked = occupancy.clusters(kernel.function(), 1 << power, 32, MAX_SHARED_BYTES);
                *fit = asked.unwrap_or(*fit);
            }
        }
        Ok(clusters)
    }

    /// Returns the GPU's name, such as `NVIDIA H100 80GB HBM3`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the number of SMs.
    pub fn multiprocessors(&self) -> u32 {
        self.figures.multiprocessors
    }

    /// Returns the figures that plans depend on: SMs, clusters, memory speed and clock.
    pub fn figures(&self) -> &DeviceFigures {
        &self.figures
    }

    /// Returns the GPU's name, its number of SMs and the driver's CUDA version on one line.
    pub fn description(&self) -> String {
        format!("{}, {} SMs, driver for CUDA {}", self.name, self.multiprocessors(), self.driver)
    }

    /// Makes this GPU's context current on this thread, and leaves it so.
    ///
    /// Callers need this for their own driver calls, for example through `cust`.
    /// No other method of the library needs it or leaves the current context changed.
    ///
    /// # Errors
    /// [`GpuError::Cuda`] if the driver fails.
    pub fn make_current(&self) -> Result<(), Error> {
        Ok(self.context.make_current()?)
    }

    /// Copies packed weights to device memory that the caller owns, and waits for the copy.
    ///
    /// The memory has [`DeviceWeights::bytes_for`] bytes, at a multiple of 256 bytes.
    ///
    /// # Errors
    /// [`GpuError::BufferTooSmall`] or [`GpuError::Misaligned`] for unsuitable memory,
    /// [`GpuError::Cuda`] if the driver fails.
    ///
    /// # Safety
    /// The memory stays allocated, and nobody writes it, as long as the weights and their launches live.
    /// No launch uses it now.
    pub unsafe fn upload_to(
        &self,
        weights: &PackedWeights,
        memory: DeviceSpan,
    ) -> Result<DeviceWeights, Error> {
        // SAFETY: the caller vouches for the memory.
        unsafe { DeviceWeights::upload_to(&self.context, weights, memory) }
    }

    /// Takes weights `[n, k]` that are in device memory already, as [`PackedWeights::device_bytes`] returns them.
    ///
    /// # Errors
    /// - [`Error::EmptyDimension`], [`Error::KTooLarge`], [`Error::InvalidGroup`] or [`Error::TooLarge`]
    ///   for impossible weights.
    /// - [`GpuError::BufferTooSmall`] or [`GpuError::Misaligned`] for unsuitable memory.
    ///
    /// # Safety
    /// The memory holds such bytes of weights with this shape and group.
    /// It stays allocated, and nobody writes it, as long as the weights and their launches live.
    pub unsafe fn weights_in(
        &self,
        memory: DeviceSpan,
        [n, k]: [usize; 2],
        group: Group,
    ) -> Result<DeviceWeights, Error> {
        DeviceWeights::borrowed(&self.context, memory, [n, k], group)
    }

    /// Copies packed weights to the GPU and waits for the copy.
    ///
    /// # Errors
    /// [`GpuError::Cuda`] if device memory runs out or the driver fails.
    pub fn upload(&self, weights: &PackedWeights) -> Result<DeviceWeights, Error> {
        DeviceWeights::upload(&self.context, weights)
    }

    /// Allocates a workspace that is large enough for every plan on this GPU.
    ///
    /// Each stream that launches GEMMs needs one.
    ///
    /// # Errors
    /// [`GpuError::Cuda`] if device memory runs out or the driver fails.
    pub fn workspace(&self) -> Result<Workspace, Error> {
        Ok(Workspace::new(&self.context, self.multiprocessors())?)
    }

    /// Returns the bytes of a workspace on this GPU.
    pub fn workspace_bytes(&self) -> usize {
        Workspace::bytes_for(self.multiprocessors())
    }

    /// Makes a workspace in device memory that the caller owns, and waits until it is initialized.
    ///
    /// The memory has [`workspace_bytes`](Self::workspace_bytes) bytes, at a multiple of 256 bytes.
    ///
    /// # Errors
    /// [`GpuError::BufferTooSmall`] or [`GpuError::Misaligned`] for unsuitable memory,
    /// [`GpuError::Cuda`] if the driver fails.
    ///
    /// # Safety
    /// The memory stays allocated, and nobody else writes it, as long as the workspace and its launches live.
    pub unsafe fn workspace_in(&self, memory: DeviceSpan) -> Result<Workspace, Error> {
        Ok(Workspace::borrowed(&self.context, self.multiprocessors(), memory)?)
    }

    /// Returns the plan for a problem on this GPU.
    ///
    /// About 16,000 plans are cached. A cached plan takes one lookup, which does not wait for other threads.
    ///
    /// # Errors
    /// As [`Plan::new`].
    pub fn plan(&self, problem: Problem) -> Result<Plan, Error> {
        self.plans.plan(problem, &self.figures)
    }

    /// Prepares for GEMMs of `m` tokens with weights of these `shapes`, each `[n, k]`.
    ///
    /// It makes every plan, and the driver compiles every kernel that the plans use.
    /// [`Gpu::gemm`] then compiles nothing, in traffic or in a graph capture.
    ///
    /// A plan takes about 10 µs. The library has about 60 kernels.
    /// The driver needs half a second for each one that it compiles for the first time,
    /// and later takes it from its cache on disk. It compiles one kernel at a time.
    ///
    /// # Errors
    /// As [`Plan::new`], and [`GpuError::Cuda`] if the driver fails.
    /// Plans and kernels that were ready before the error stay ready.
    pub fn prepare(&self, shapes: &[[usize; 2]], m: RangeInclusive<usize>) -> Result<(), Error> {
        let _entered = self.context.enter()?;
        for &[n, k] in shapes {
            for m in m.clone() {
                self.load_kernels(&self.plan(Problem { m, n, k })?)?;
            }
        }
        Ok(())
    }

    /// Compiles a plan's kernels, unless they are compiled already.
    fn load_kernels(&self, plan: &Plan) -> Result<(), Error> {
        if let Algorithm::Skinny(skinny) = plan.algorithm() {
            self.kernels.skinny(skinny.shape())?;
        }
        for (_, tiled) in plan.tiled_launches() {
            self.kernels.gemm(tiled.shape())?;
        }
        Ok(())
    }

    /// Computes `Y[m, n] = X[m, k] · W[n, k]ᵀ`, plus `bias[n]` in each row, and returns it row-major.
    ///
    /// The call copies everything from host memory, waits, and copies the result back.
    /// That suits a single multiplication or a test.
    /// A server uploads its weights once and calls [`Gpu::gemm`].
    ///
    /// # Errors
    /// As [`cpu::gemm`](crate::cpu::gemm).
    /// Also [`GpuError::Cuda`] if device memory runs out or the driver fails.
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

    /// Like [`Gpu::multiply`], with weights that are already on the GPU.
    ///
    /// # Errors
    /// As [`Gpu::multiply`], and [`GpuError::OtherContext`] for weights of another context.
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

    /// Computes a product of `elements` elements.
    ///
    /// The caller has checked the operands and the weights' context.
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
        // The kernel writes every element before the host reads it.
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
        // SAFETY: everything lives until the stream has been synchronized, and the lock excludes other users.
        let launched = unsafe { self.gemm(weights, &operands, &own.workspace, &own.stream) };
        // Synchronize after an error too: of two launches, the first may be running.
        let finished = own.stream.synchronize().during("running the GEMM");
        if let Err(error) = finished {
            // The launches may still run. Leak everything that they use, and do not use it in another call.
            weights.keep_forever();
            mem::forget((codes, scales, bias, output, lock.take()));
            return Err(launched.err().unwrap_or(error.into()));
        }
        launched?;
        output.copy_to(&mut product, "copying the result from the GPU")?;
        Ok(product)
    }

    /// Fails unless an object belongs to this GPU's context.
    fn check_context(&self, what: &'static str, context: &ContextHandle) -> Result<(), GpuError> {
        if self.context.is(context) { Ok(()) } else { Err(GpuError::OtherContext { what }) }
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // The stream is destroyed in the current context. An error cannot be handled here.
        let _entered = self.context.enter_to_free();
        *self.own.get_mut().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// Fails unless the device is a Hopper GPU.
fn check_device(device: Device) -> Result<(), GpuError> {
    let capability = |attribute| device.get_attribute(attribute).during("asking for the compute capability");
    let major = capability(DeviceAttribute::ComputeCapabilityMajor)?;
    let minor = capability(DeviceAttribute::ComputeCapabilityMinor)?;
    // The kernels are for sm_90a. No later generation has its instructions.
    if (major, minor) == (9, 0) {
        Ok(())
    } else {
        let name = device.name().during("asking for the GPU's name")?;
        Err(GpuError::WrongDevice { name, major, minor })
    }
}

/// Returns the row stride of the GPU's copy of the activations, in bytes. TMA reads multiples of 64 fast.
fn padded_stride(activations: &ActivationsView<'_>) -> usize {
    activations.k().next_multiple_of(64)
}

/// Copies the rows to that stride.
fn padded_rows(activations: &ActivationsView<'_>) -> Vec<i8> {
    let stride = padded_stride(activations);
    let mut padded = vec![0; activations.m() * stride];
    for (token, row) in padded.chunks_exact_mut(stride).enumerate() {
        row[..activations.k()].copy_from_slice(activations.row(token));
    }
    padded
}
