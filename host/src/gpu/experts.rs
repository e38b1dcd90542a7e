//! The packed weights of many experts in device memory, one behind the other.

use std::borrow::Borrow;

use liquidgemm_format::arguments::WeightsArguments;

use crate::check::{check_experts, checked_elements};
use crate::gpu::context::ContextHandle;
use crate::gpu::memory::DeviceMemory;
use crate::gpu::stream::StreamLayout;
use crate::{Error, Group, PackedWeights};

/// Packed weights of experts `[experts, n, k]` in device memory.
/// [`Gpu::upload_experts`](crate::gpu::Gpu::upload_experts) creates them.
#[derive(Debug)]
pub struct DeviceExperts {
    experts: usize,
    n: usize,
    k: usize,
    group: Group,
    layout: StreamLayout,
    /// The strips of all experts, in order.
    stream: DeviceMemory,
    /// f32 `[experts, n]`.
    channel_scales: DeviceMemory,
}

impl DeviceExperts {
    pub(super) fn upload<E: Borrow<PackedWeights>>(
        context: &ContextHandle,
        experts: &[E],
    ) -> Result<Self, Error> {
        let first = check_experts(experts)?;
        let (n, k, group) = (first.n(), first.k(), first.group());
        let layout = StreamLayout::new(n, k, group)?;
        let each = layout.bytes();
        let bytes = checked_elements("expert list", experts.len(), each)?;
        let stream = DeviceMemory::uninitialized(context, bytes, "allocating the experts' weights")?;
        for (index, expert) in experts.iter().map(E::borrow).enumerate() {
            let merged = layout.merge(expert.codes(), expert.pairs());
            stream.write(index * each, &merged, "copying an expert's weights to the GPU")?;
        }
        let scales: Vec<f32> =
            experts.iter().flat_map(|expert| expert.borrow().channel_scales()).copied().collect();
        let channel_scales =
            DeviceMemory::copy_of(context, &scales, "copying the channel scales to the GPU")?;
        Ok(Self { experts: experts.len(), n, k, group, layout, stream, channel_scales })
    }

    /// Returns the number of experts.
    pub fn experts(&self) -> usize {
        self.experts
    }

    /// Returns the number of output channels of each expert.
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

    /// Returns the context that the weights belong to.
    pub(super) fn context(&self) -> &ContextHandle {
        self.stream.context()
    }

    /// Returns the bytes from one expert's weights to the next one's.
    pub(super) fn expert_bytes(&self) -> u64 {
        self.layout.bytes() as u64
    }

    /// Returns the kernels' view of the first expert's weights.
    pub(super) fn arguments(&self) -> WeightsArguments {
        WeightsArguments {
            strips: self.stream.address(),
            channel_scales: self.channel_scales.address(),
            stream: self.layout.stream(),
        }
    }
}
