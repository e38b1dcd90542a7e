//! Device memory: spans that the caller owns, packed weights, and the kernels' workspace.
//! Memory of the library knows its context, and is copied and freed there on any thread.

use std::sync::Arc;
use std::{mem, ptr};

use bytemuck::{AnyBitPattern, NoUninit};
use cust::memory::{DeviceBuffer, DeviceCopy};
use cust::sys;
use liquidgemm_format::arguments::WeightsArguments;
use liquidgemm_format::brick::BRICK_CHANNELS;
use liquidgemm_format::tile::{TILE_SHAPES, TileShape};

use crate::error::gpu::{During, GpuError};
use crate::gpu::context::ContextHandle;
use crate::gpu::stream::StreamLayout;
use crate::packed::PackedSizes;
use crate::{Error, Group, PackedWeights, Plan, Tiled};

/// Alignment of memory that the caller owns, in bytes.
pub(super) const BORROWED_ALIGNMENT: u64 = 256;

/// A range of device memory: an address and a length in bytes. It does not own the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceSpan {
    address: u64,
    bytes: usize,
}

impl DeviceSpan {
    /// Makes a span from a raw device address, for example of another framework's tensor.
    ///
    /// # Safety
    /// `bytes` bytes of device memory at `address` are allocated, and stay so while calls use the span.
    pub const unsafe fn from_raw(address: u64, bytes: usize) -> Self {
        Self { address, bytes }
    }

    /// Returns the device address.
    pub const fn address(self) -> u64 {
        self.address
    }

    /// Returns the length in bytes.
    pub const fn bytes(self) -> usize {
        self.bytes
    }

    /// Fails unless the span has `needed` bytes and its address is a multiple of `alignment`.
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

/// Packed weights `[n, k]` in device memory. [`Gpu::upload`](crate::gpu::Gpu::upload) creates them.
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

/// Device memory that the library uses. Any thread can copy and free it, because it knows its context.
#[derive(Debug)]
pub(crate) struct DeviceMemory {
    context: ContextHandle,
    address: u64,
    bytes: usize,
    /// Whether the caller of the library owns the memory.
    is_borrowed: bool,
}

impl DeviceMemory {
    /// Wraps memory that the caller owns.
    pub(crate) fn borrowed(context: &ContextHandle, span: DeviceSpan) -> Self {
        Self { context: context.clone(), address: span.address, bytes: span.bytes, is_borrowed: true }
    }

    /// Allocates memory with undefined contents.
    pub(crate) fn uninitialized(
        context: &ContextHandle,
        bytes: usize,
        action: &'static str,
    ) -> Result<Self, GpuError> {
        let _entered = context.enter()?;
        let mut address = 0;
        // The driver refuses allocations of 0 bytes.
        // SAFETY: the first argument is valid for a write.
        unsafe { sys::cuMemAlloc_v2(&mut address, bytes.max(1)) }.during(action)?;
        Ok(Self { context: context.clone(), address, bytes, is_borrowed: false })
    }

    /// Copies host memory to the device, and waits until launches on any stream can use it.
    ///
    /// The driver's copy may return while its last piece is still in flight on the default stream,
    /// and other streams do not wait for that stream.
    pub(crate) fn copy_of<T: NoUninit>(
        context: &ContextHandle,
        values: &[T],
        action: &'static str,
    ) -> Result<Self, GpuError> {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let memory = Self::uninitialized(context, bytes.len(), action)?;
        memory.write(0, bytes, action)?;
        Ok(memory)
    }

    /// Copies host memory to the bytes from `offset` on, and waits as [`copy_of`](Self::copy_of) does.
    pub(crate) fn write(&self, offset: usize, bytes: &[u8], action: &'static str) -> Result<(), GpuError> {
        assert!(
            self.bytes.checked_sub(offset).is_some_and(|room| bytes.len() <= room),
            "{} bytes at {offset} of {}",
            bytes.len(),
            self.bytes
        );
        if bytes.is_empty() {
            return Ok(());
        }
        let _entered = self.context.enter()?;
        // SAFETY: source and destination have this many bytes.
        // Null is the default stream, which always exists.
        unsafe {
            sys::cuMemcpyHtoD_v2(self.address + offset as u64, bytes.as_ptr().cast(), bytes.len())
                .during(action)?;
            sys::cuStreamSynchronize(ptr::null_mut()).during(action)
        }
    }

    /// Copies the first bytes to the host, and waits for them.
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
        // SAFETY: source and destination have this many bytes.
        unsafe { sys::cuMemcpyDtoH_v2(bytes.as_mut_ptr().cast(), self.address, bytes.len()) }.during(action)
    }

    /// Returns the device address.
    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    /// Returns the length in bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Returns the context that the memory belongs to.
    pub(crate) fn context(&self) -> &ContextHandle {
        &self.context
    }

    /// Returns the whole memory as a launch's operand.
    pub(crate) fn span(&self) -> DeviceSpan {
        DeviceSpan { address: self.address, bytes: self.bytes }
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        if self.is_borrowed {
            return;
        }
        // An error cannot be handled here.
        if let Ok(_entered) = self.context.enter_to_free() {
            // SAFETY: the memory was allocated in this context, and is freed only here.
            let _ = unsafe { sys::cuMemFree_v2(self.address) };
        }
    }
}

impl DeviceWeights {
    pub(crate) fn upload(context: &ContextHandle, weights: &PackedWeights) -> Result<Self, Error> {
        Self::upload_as(context, weights, weights.pairs())
    }

    /// Uploads the weights with `pairs` in place of their own.
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

    /// Returns the bytes of device memory that weights `[n, k]` take in memory that the caller owns.
    ///
    /// # Errors
    /// [`Error::EmptyDimension`], [`Error::KTooLarge`], [`Error::InvalidGroup`] or [`Error::TooLarge`]
    /// for impossible weights.
    pub fn bytes_for(n: usize, k: usize, group: Group) -> Result<usize, Error> {
        Ok(Self::scales_offset(n, k, group)? + n * size_of::<f32>())
    }

    /// Returns the offset of the channel scales in memory that the caller owns.
    fn scales_offset(n: usize, k: usize, group: Group) -> Result<usize, Error> {
        PackedSizes::new(n, k, group)?;
        Ok(StreamLayout::new(n, k, group)?.bytes().next_multiple_of(BORROWED_ALIGNMENT as usize))
    }

    /// Wraps weights in memory that the caller owns.
    pub(super) fn borrowed(
        context: &ContextHandle,
        memory: DeviceSpan,
        [n, k]: [usize; 2],
        group: Group,
    ) -> Result<Self, Error> {
        let offset = Self::scales_offset(n, k, group)?;
        memory.check("weights", Self::bytes_for(n, k, group)?, BORROWED_ALIGNMENT)?;
        let layout = StreamLayout::new(n, k, group)?;
        let part = |offset: usize, bytes| {
            let span = DeviceSpan { address: memory.address + offset as u64, bytes };
            Arc::new(DeviceMemory::borrowed(context, span))
        };
        Ok(Self {
            n,
            k,
            group,
            layout,
            stream: part(0, layout.bytes()),
            channel_scales: part(offset, n * size_of::<f32>()),
        })
    }

    /// Copies weights to memory that the caller owns.
    ///
    /// # Safety
    /// The memory is allocated.
    pub(super) unsafe fn upload_to(
        context: &ContextHandle,
        weights: &PackedWeights,
        memory: DeviceSpan,
    ) -> Result<Self, Error> {
        let this = Self::borrowed(context, memory, [weights.n(), weights.k()], weights.group())?;
        let merged = this.layout.merge(weights.codes(), weights.pairs());
        this.stream.write(0, &merged, "copying the weights to the GPU")?;
        this.channel_scales.write(
            0,
            bytemuck::cast_slice(weights.channel_scales()),
            "copying the channel scales to the GPU",
        )?;
        Ok(this)
    }

    /// Copies the weights back to the host.
    ///
    /// # Errors
    /// [`GpuError::Cuda`] if the driver fails.
    pub fn download(&self) -> Result<PackedWeights, Error> {
        let mut merged = vec![0u8; self.stream.bytes()];
        let mut channel_scales = vec![0.0f32; self.n];
        self.stream.copy_to(&mut merged, "copying the weights from the GPU")?;
        self.channel_scales.copy_to(&mut channel_scales, "copying the scales from the GPU")?;
        let (codes, pairs) = self.layout.split(&merged);
        PackedWeights::from_parts(codes, pairs, channel_scales, self.n, self.k, self.group)
    }

    /// Returns the number of output channels.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Returns the number of elements per channel.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Returns the group: how many weights share a pair.
    pub fn group(&self) -> Group {
        self.group
    }

    /// Returns the bytes of device memory that the weights take.
    pub fn bytes(&self) -> usize {
        self.stream.bytes() + self.channel_scales.bytes()
    }

    /// Leaks the weights' memory, because a launch that nobody can wait for may still read it.
    pub(crate) fn keep_forever(&self) {
        mem::forget((self.stream.clone(), self.channel_scales.clone()));
    }

    /// Returns the context that the weights belong to.
    pub(crate) fn context(&self) -> &ContextHandle {
        self.stream.context()
    }

    /// Returns the channel scales, f32 `[n]`.
    pub(super) fn channel_scales(&self) -> DeviceSpan {
        self.channel_scales.span()
    }

    /// Returns the kernels' view of the weights, beginning with this strip.
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

/// Device memory for stream-K: partial tiles, and the flags that announce them. It also has some [scratch memory](Self::scratch).
///
/// Launches on one stream may share a workspace. Launches that may run at the same time need one each.
#[derive(Debug)]
pub struct Workspace {
    partials: DeviceMemory,
    /// u32 each, zero between launches.
    flags: DeviceMemory,
    scratch: DeviceMemory,
}

/// Bytes of a workspace's scratch memory: 32 tokens of 28,672 elements and their scales, and a little more.
const SCRATCH_BYTES: usize = 1 << 20;

impl Workspace {
    pub(crate) fn new(context: &ContextHandle, multiprocessors: u32) -> Result<Self, GpuError> {
        let (partials, flags) = (Self::partial_bytes(multiprocessors), Self::flag_bytes(multiprocessors));
        Ok(Self {
            // The kernels write each slot before they read it.
            partials: DeviceMemory::uninitialized(context, partials, "allocating the workspace")?,
            flags: DeviceMemory::copy_of(context, &vec![0u8; flags], "allocating the workspace's flags")?,
            scratch: DeviceMemory::uninitialized(
                context,
                SCRATCH_BYTES,
                "allocating the workspace's scratch memory",
            )?,
        })
    }

    /// Returns the bytes of the flags on a GPU with this many SMs.
    fn flag_bytes(multiprocessors: u32) -> usize {
        let most = TILE_SHAPES.map(TileShape::consumers).into_iter().max().unwrap_or(0);
        multiprocessors as usize * most as usize * size_of::<u32>()
    }

    /// Returns the bytes of the partial tiles on a GPU with this many SMs.
    fn partial_bytes(multiprocessors: u32) -> usize {
        let most = TILE_SHAPES.map(TileShape::partial_bytes).into_iter().max().unwrap_or(0);
        multiprocessors as usize * most as usize
    }

    /// Returns the bytes of a workspace in memory that the caller owns.
    pub(crate) fn bytes_for(multiprocessors: u32) -> usize {
        Self::partial_bytes(multiprocessors) + SCRATCH_BYTES + Self::flag_bytes(multiprocessors)
    }

    /// Makes a workspace in memory that the caller owns: the partial tiles, the scratch memory, and behind them the flags.
    pub(crate) fn borrowed(
        context: &ContextHandle,
        multiprocessors: u32,
        memory: DeviceSpan,
    ) -> Result<Self, GpuError> {
        memory.check("workspace", Self::bytes_for(multiprocessors), BORROWED_ALIGNMENT)?;
        let (partials, flags) = (Self::partial_bytes(multiprocessors), Self::flag_bytes(multiprocessors));
        let part = |offset: usize, bytes| {
            DeviceMemory::borrowed(context, DeviceSpan { address: memory.address + offset as u64, bytes })
        };
        let flags = part(partials + SCRATCH_BYTES, flags);
        flags.write(0, &vec![0u8; flags.bytes()], "initializing the workspace's flags")?;
        Ok(Self { partials: part(0, partials), flags, scratch: part(partials, SCRATCH_BYTES) })
    }

    /// Returns 1 MiB of memory that no GEMM uses: [scratch memory](crate::gpu::DeviceLinear::forward) for layers with
    /// few tokens. Like the workspace, it is for launches on one stream.
    ///
    /// The launches of one call use it together, so calls of several threads on that stream take turns.
    pub fn scratch(&self) -> DeviceSpan {
        self.scratch.span()
    }

    /// Returns the context that the workspace belongs to.
    pub(crate) fn context(&self) -> &ContextHandle {
        self.partials.context()
    }

    /// Returns the bytes of device memory that the workspace takes.
    pub fn bytes(&self) -> usize {
        self.partials.bytes() + self.scratch.bytes() + self.flags.bytes()
    }

    /// Fails if the plan uses stream-K and the workspace is too small for its thread blocks.
    pub(crate) fn check(&self, plan: &Plan) -> Result<(), GpuError> {
        plan.tiled_launches().try_for_each(|(_, tiled)| self.check_tiled(&tiled))
    }

    fn check_tiled(&self, tiled: &Tiled) -> Result<(), GpuError> {
        if tiled.schedule().stream_k_tiles == 0 {
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
