//! What lies in device memory: spans that the caller owns, packed weights, and the kernels' workspace.

use std::sync::Arc;
use std::{mem, ptr};

use bytemuck::{AnyBitPattern, NoUninit};
use cust::memory::{DeviceBuffer, DeviceCopy};
use cust::sys;
use liquidgemm_format::arguments::WeightsArguments;
use liquidgemm_format::brick::BRICK_CHANNELS;
use liquidgemm_format::tile::{TILE_SHAPES, TileShape};

use crate::gpu::context::ContextHandle;
use crate::gpu::error::{During, GpuError};
use crate::gpu::stream::StreamLayout;
use crate::{Error, Group, PackedWeights, Plan, Tiled};

/// A span of device memory, wherever it comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceSpan {
    address: u64,
    bytes: usize,
}

impl DeviceSpan {
    /// A span from a raw device address, such as another framework's tensor has.
    ///
    /// # Safety
    /// `bytes` bytes of device memory are allocated at `address`, and stay so while calls that use the span run.
    pub const unsafe fn from_raw(address: u64, bytes: usize) -> Self {
        Self { address, bytes }
    }

    /// The device address.
    pub const fn address(self) -> u64 {
        self.address
    }

    /// The length in bytes.
    pub const fn bytes(self) -> usize {
        self.bytes
    }

    /// Fails unless the span holds `needed` bytes and starts at a multiple of `alignment`.
    pub(crate) fn check(self, what: &'static str, needed: usize, alignment: u64) -> Result<(), GpuError> {
        if self.bytes < needed {
            return Err(GpuError::BufferTooSmall { what, needed, actual: self.bytes });
        }
        if !self.address.is_multiple_of(alignment) {
            return Err(GpuError::Misaligned {
                what,
                value: self.address,
                multiple: alignment,
                fix: "take it from the start of an allocation, or copy it to an aligned one",
            });
        }
        Ok(())
    }
}

impl<T: DeviceCopy> From<&DeviceBuffer<T>> for DeviceSpan {
    fn from(buffer: &DeviceBuffer<T>) -> Self {
        Self { address: buffer.as_device_ptr().as_raw(), bytes: buffer.len() * size_of::<T>() }
    }
}

/// Packed weights in device memory, as [`Gpu::upload`](crate::gpu::Gpu::upload) puts them there.
#[derive(Debug)]
pub struct DeviceWeights {
    n: usize,
    k: usize,
    group: Group,
    layout: StreamLayout,
    stream: Arc<DeviceMemory>,
    /// f32 `[n]`.
    channel_scales: Arc<DeviceMemory>,
}

/// Device memory of our own. It knows its context, and is copied and freed there on any thread.
#[derive(Debug)]
pub(crate) struct DeviceMemory {
    context: ContextHandle,
    address: u64,
    bytes: usize,
}

impl DeviceMemory {
    /// Memory with anything in it.
    pub(crate) fn uninitialized(
        context: &ContextHandle,
        bytes: usize,
        action: &'static str,
    ) -> Result<Self, GpuError> {
        let _entered = context.enter()?;
        let mut address = 0;
        // The driver has no allocations without a byte.
        // SAFETY: the first argument is valid for a write.
        unsafe { sys::cuMemAlloc_v2(&mut address, bytes.max(1)) }.during(action)?;
        Ok(Self { context: context.clone(), address, bytes })
    }

    /// A copy of host memory. It waits until all of it is there, so that launches on any stream may use it: the driver's copy
    /// returns while its last piece may still be under way on the default stream, and other streams need not wait for that.
    pub(crate) fn copy_of<T: NoUninit>(
        context: &ContextHandle,
        values: &[T],
        action: &'static str,
    ) -> Result<Self, GpuError> {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let memory = Self::uninitialized(context, bytes.len(), action)?;
        if !bytes.is_empty() {
            let _entered = context.enter()?;
            // SAFETY: both places have so many bytes; null is the default stream, which always exists.
            unsafe {
                sys::cuMemcpyHtoD_v2(memory.address, bytes.as_ptr().cast(), bytes.len()).during(action)?;
                sys::cuStreamSynchronize(ptr::null_mut()).during(action)?;
            }
        }
        Ok(memory)
    }

    /// Copies the memory's first bytes to the host, and waits for them.
    pub(crate) fn copy_to<T: AnyBitPattern + NoUninit>(
        &self,
        values: &mut [T],
        action: &'static str,
    ) -> Result<(), GpuError> {
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(values);
        assert!(bytes.len() <= self.bytes, "{} bytes of {}", bytes.len(), self.bytes);
        if bytes.is_empty() {
            return Ok(());
        }
        let _entered = self.context.enter()?;
        // SAFETY: both places have so many bytes.
        unsafe { sys::cuMemcpyDtoH_v2(bytes.as_mut_ptr().cast(), self.address, bytes.len()) }.during(action)
    }

    /// The device address.
    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    /// The length in bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The context that it lives in.
    pub(crate) fn context(&self) -> &ContextHandle {
        &self.context
    }

    /// All of it, for a launch.
    pub(crate) fn span(&self) -> DeviceSpan {
        DeviceSpan { address: self.address, bytes: self.bytes }
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        // Failures can't be helped here.
        if let Ok(_entered) = self.context.enter_to_free() {
            // SAFETY: the memory was allocated in this context, and only here.
            let _ = unsafe { sys::cuMemFree_v2(self.address) };
        }
    }
}

impl DeviceWeights {
    pub(crate) fn upload(context: &ContextHandle, weights: &PackedWeights) -> Result<Self, Error> {
        Self::upload_as(context, weights, weights.pairs())
    }

    /// Uploads `pairs` in the place of the weights' own.
    pub(super) fn upload_as(
        context: &ContextHandle,
        weights: &PackedWeights,
        pairs: &[u8],
    ) -> Result<Self, Error> {
        let (n, k, group) = (weights.n(), weights.k(), weights.group());
        let layout = StreamLayout::new(n, k, group)?;
        let merged = layout.merge(weights.codes(), pairs);
        Ok(Self {
            n,
            k,
            group,
            layout,
            stream: Arc::new(DeviceMemory::copy_of(context, &merged, "copying the weights to the GPU")?),
            channel_scales: Arc::new(DeviceMemory::copy_of(
                context,
                weights.channel_scales(),
                "copying the channel scales to the GPU",
            )?),
        })
    }

    /// Copies the weights back to the host.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn download(&self) -> Result<PackedWeights, Error> {
        let mut merged = vec![0u8; self.stream.bytes()];
        let mut channel_scales = vec![0.0f32; self.n];
        self.stream.copy_to(&mut merged, "copying the weights from the GPU")?;
        self.channel_scales.copy_to(&mut channel_scales, "copying the scales from the GPU")?;
        let (codes, pairs) = self.layout.split(&merged);
        PackedWeights::from_parts(codes, pairs, channel_scales, self.n, self.k, self.group)
    }

    /// Output channels.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Elements a channel.
    pub fn k(&self) -> usize {
        self.k
    }

    /// How many weights share a pair.
    pub fn group(&self) -> Group {
        self.group
    }

    /// Device memory that the weights take, in bytes.
    pub fn bytes(&self) -> usize {
        self.stream.bytes() + self.channel_scales.bytes()
    }

    /// Keeps the weights' memory for good: a launch that nobody can wait for may still read them.
    pub(crate) fn keep_forever(&self) {
        mem::forget((self.stream.clone(), self.channel_scales.clone()));
    }

    /// The context that they live in.
    pub(crate) fn context(&self) -> &ContextHandle {
        self.stream.context()
    }

    /// The weights from a strip on, as the kernels find them.
    pub(crate) fn arguments_from(&self, strip: usize) -> WeightsArguments {
        let stream = self.layout.stream();
        let scales = self.channel_scales.address();
        WeightsArguments {
            strips: self.stream.address() + strip as u64 * u64::from(stream.strip_bytes),
            channel_scales: scales + (strip * BRICK_CHANNELS * size_of::<f32>()) as u64,
            stream,
        }
    }
}

/// Where the kernels keep partial sums when several thread blocks share a tile.
///
/// Launches on one stream may share a workspace; launches that may run at the same time need one each.
#[derive(Debug)]
pub struct Workspace {
    partials: DeviceMemory,
    /// u32 each.
    flags: DeviceMemory,
}

impl Workspace {
    pub(crate) fn new(context: &ContextHandle, multiprocessors: u32) -> Result<Self, GpuError> {
        let most = |of: fn(TileShape) -> u32| TILE_SHAPES.map(of).into_iter().max().unwrap_or(0) as usize;
        let blocks = multiprocessors as usize;
        let partials = blocks * most(TileShape::partial_bytes);
        let flags = blocks * most(TileShape::consumers);
        Ok(Self {
            // The kernels write a slot before they read it.
            partials: DeviceMemory::uninitialized(context, partials, "allocating the workspace")?,
            flags: DeviceMemory::copy_of(context, &vec![0u32; flags], "allocating the workspace's flags")?,
        })
    }

    /// The context that it lives in.
    pub(crate) fn context(&self) -> &ContextHandle {
        self.partials.context()
    }

    /// Device memory that the workspace takes, in bytes.
    pub fn bytes(&self) -> usize {
        self.partials.bytes() + self.flags.bytes()
    }

    /// Fails unless there is room for the plan's thread blocks, if they share tiles.
    pub(crate) fn check(&self, plan: &Plan) -> Result<(), GpuError> {
        plan.tiled_launches().try_for_each(|(_, tiled)| self.check_tiled(&tiled))
    }

    fn check_tiled(&self, tiled: &Tiled) -> Result<(), GpuError> {
        if tiled.schedule().streamed_tiles == 0 {
            return Ok(());
        }
        let blocks = tiled.blocks() as usize;
        let needed = blocks * tiled.shape().partial_bytes() as usize;
        let room = if blocks * tiled.shape().consumers() as usize * size_of::<u32>() <= self.flags.bytes() {
            self.partials.bytes()
        } else {
            0
        };
        if needed > room {
            return Err(GpuError::BufferTooSmall { what: "workspace", needed, actual: room });
        }
        Ok(())
    }

    pub(crate) fn partials(&self) -> u64 {
        self.partials.address()
    }

    pub(crate) fn flags(&self) -> u64 {
        self.flags.address()
    }
}
