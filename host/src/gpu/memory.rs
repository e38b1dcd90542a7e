//! What lies in device memory: spans that the caller owns, packed weights, and the kernels' workspace.

use std::ptr;

use cust::memory::{CopyDestination, DeviceBuffer, DeviceCopy};
use cust::sys;
use liquidgemm_format::arguments::WeightsArguments;
use liquidgemm_format::brick::BRICK_CHANNELS;
use liquidgemm_format::tile::{TILE_SHAPES, TileShape};

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
    stream: DeviceBuffer<u8>,
    channel_scales: DeviceBuffer<f32>,
}

/// Copies to a new buffer, and waits until all of it is there, so that launches on any stream may use it: `cust`'s copy
/// returns while its last piece may still be under way on the default stream, and other streams need not wait for that.
pub(crate) fn copy_to_device<T: DeviceCopy>(
    values: &[T],
    action: &'static str,
) -> Result<DeviceBuffer<T>, GpuError> {
    let buffer = DeviceBuffer::from_slice(values).during(action)?;
    // SAFETY: null is the default stream, which always exists.
    unsafe { sys::cuStreamSynchronize(ptr::null_mut()) }.during(action)?;
    Ok(buffer)
}

impl DeviceWeights {
    pub(crate) fn upload(weights: &PackedWeights) -> Result<Self, Error> {
        Self::upload_as(weights, weights.pairs())
    }

    /// Uploads `pairs` in the place of the weights' own.
    pub(super) fn upload_as(weights: &PackedWeights, pairs: &[u8]) -> Result<Self, Error> {
        let (n, k, group) = (weights.n(), weights.k(), weights.group());
        let layout = StreamLayout::new(n, k, group)?;
        let merged = layout.merge(weights.codes(), pairs);
        Ok(Self {
            n,
            k,
            group,
            layout,
            stream: copy_to_device(&merged, "copying the weights to the GPU")?,
            channel_scales: copy_to_device(
                weights.channel_scales(),
                "copying the channel scales to the GPU",
            )?,
        })
    }

    /// Copies the weights back to the host.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn download(&self) -> Result<PackedWeights, Error> {
        let mut merged = vec![0; self.stream.len()];
        let mut channel_scales = vec![0.0; self.channel_scales.len()];
        self.stream.copy_to(&mut merged[..]).during("copying the weights from the GPU")?;
        self.channel_scales.copy_to(&mut channel_scales[..]).during("copying the scales from the GPU")?;
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
        self.stream.len() + self.channel_scales.len() * size_of::<f32>()
    }

    /// The weights from a strip on, as the kernels find them.
    pub(crate) fn arguments_from(&self, strip: usize) -> WeightsArguments {
        let stream = self.layout.stream();
        let scales = self.channel_scales.as_device_ptr().as_raw();
        WeightsArguments {
            strips: self.stream.as_device_ptr().as_raw() + strip as u64 * u64::from(stream.strip_bytes),
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
    partials: DeviceBuffer<u8>,
    flags: DeviceBuffer<u32>,
}

impl Workspace {
    pub(crate) fn new(multiprocessors: u32) -> Result<Self, GpuError> {
        let most = |of: fn(TileShape) -> u32| TILE_SHAPES.map(of).into_iter().max().unwrap_or(0) as usize;
        let blocks = multiprocessors as usize;
        let partials = blocks * most(TileShape::partial_bytes);
        let flags = blocks * most(TileShape::consumers);
        Ok(Self {
            // SAFETY: the kernels write a slot before they read it.
            partials: unsafe { DeviceBuffer::uninitialized(partials) }.during("allocating the workspace")?,
            flags: copy_to_device(&vec![0; flags], "allocating the workspace's flags")?,
        })
    }

    /// Device memory that the workspace takes, in bytes.
    pub fn bytes(&self) -> usize {
        self.partials.len() + self.flags.len() * size_of::<u32>()
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
        let room = if blocks * tiled.shape().consumers() as usize <= self.flags.len() {
            self.partials.len()
        } else {
            0
        };
        if needed > room {
            return Err(GpuError::BufferTooSmall { what: "workspace", needed, actual: room });
        }
        Ok(())
    }

    pub(crate) fn partials(&self) -> u64 {
        self.partials.as_device_ptr().as_raw()
    }

    pub(crate) fn flags(&self) -> u64 {
        self.flags.as_device_ptr().as_raw()
    }
}
