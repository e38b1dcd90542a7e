//! The packed weights of many experts in device memory, one behind the other.

use std::borrow::Borrow;

use liquidgemm_format::arguments::WeightsArguments;

use crate::check::{check_experts, checked_elements};
use crate::gpu::context::ContextHandle;
use crate::gpu::memory::{BORROWED_ALIGNMENT, DeviceMemory, DeviceSpan, DeviceWeights};
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

    /// Returns the bytes of device memory that experts `[experts, n, k]` take in memory that the caller owns.
    ///
    /// # Errors
    /// [`Error::NoExperts`] without experts. As [`DeviceWeights::bytes_for`] for impossible weights,
    /// and [`Error::TooLarge`] if all together exceed the address space.
    pub fn bytes_for(experts: usize, [n, k]: [usize; 2], group: Group) -> Result<usize, Error> {
        let offset = Self::scales_offset(experts, [n, k], group)?;
        let scales = checked_elements("expert list", experts, n * size_of::<f32>())?;
        offset.checked_add(scales).ok_or(Error::TooLarge {
            what: "expert list",
            rows: experts,
            columns: offset,
        })
    }

    /// Returns the offset of the channel scales in memory that the caller owns.
    fn scales_offset(experts: usize, [n, k]: [usize; 2], group: Group) -> Result<usize, Error> {
        if experts == 0 {
            return Err(Error::NoExperts);
        }
        DeviceWeights::bytes_for(n, k, group)?;
        let each = StreamLayout::new(n, k, group)?.bytes();
        let bytes = checked_elements("expert list", experts, each)?;
        let aligned = bytes.checked_next_multiple_of(BORROWED_ALIGNMENT as usize);
        aligned.ok_or(Error::TooLarge { what: "expert list", rows: experts, columns: each })
    }

    /// Wraps experts in memory that the caller owns.
    pub(super) fn borrowed(
        context: &ContextHandle,
        memory: DeviceSpan,
        experts: usize,
        [n, k]: [usize; 2],
        group: Group,
    ) -> Result<Self, Error> {
        let offset = Self::scales_offset(experts, [n, k], group)?;
        memory.check("experts", Self::bytes_for(experts, [n, k], group)?, BORROWED_ALIGNMENT)?;
        let layout = StreamLayout::new(n, k, group)?;
        let part = |offset: usize, bytes| {
            // SAFETY: the part lies inside the caller's memory.
            let span = unsafe { DeviceSpan::from_raw(memory.address() + offset as u64, bytes) };
            DeviceMemory::borrowed(context, span)
        };
        let stream = part(0, experts * layout.bytes());
        let channel_scales = part(offset, experts * n * size_of::<f32>());
        Ok(Self { experts, n, k, group, layout, stream, channel_scales })
    }

    /// Returns the bytes that these experts take in memory that the caller owns.
    ///
    /// # Errors
    /// As [`device_bytes`](Self::device_bytes).
    pub fn device_size<E: Borrow<PackedWeights>>(experts: &[E]) -> Result<usize, Error> {
        let first = check_experts(experts)?;
        Self::bytes_for(experts.len(), [first.n(), first.k()], first.group())
    }

    /// Returns experts as they lie in device memory that the caller owns:
    /// the strips of all experts, zeros up to a multiple of 256 bytes, and all channel scales.
    ///
    /// [`Gpu::experts_in`](crate::gpu::Gpu::experts_in) takes such memory.
    ///
    /// # Errors
    /// [`Error::NoExperts`] without experts, [`Error::ExpertsDiffer`] if one differs from the first,
    /// [`Error::TooLarge`] if all together exceed the address space.
    pub fn device_bytes<E: Borrow<PackedWeights>>(experts: &[E]) -> Result<Vec<u8>, Error> {
        let first = check_experts(experts)?;
        let (shape, group) = ([first.n(), first.k()], first.group());
        let layout = StreamLayout::new(first.n(), first.k(), group)?;
        let mut bytes = Vec::with_capacity(Self::device_size(experts)?);
        for expert in experts.iter().map(E::borrow) {
            bytes.extend(layout.merge(expert.codes(), expert.pairs()));
        }
        bytes.resize(Self::scales_offset(experts.len(), shape, group)?, 0);
        for expert in experts.iter().map(E::borrow) {
            bytes.extend_from_slice(bytemuck::cast_slice(expert.channel_scales()));
        }
        Ok(bytes)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn experts_in_memory_of_the_caller_are_strips_and_then_scales() {
        let (n, k) = (70, 130);
        let expert = |seed: usize| {
            let values: Vec<f32> = (0..n * k).map(|i| ((i + seed) as f32 * 0.37).sin()).collect();
            PackedWeights::quantize(&values, n, k, Group::default()).unwrap()
        };
        let experts = [expert(0), expert(500)];
        let bytes = DeviceExperts::device_bytes(&experts).unwrap();
        assert_eq!(bytes.len(), DeviceExperts::bytes_for(2, [n, k], Group::default()).unwrap());
        let each = StreamLayout::new(n, k, Group::default()).unwrap().bytes();
        let scales = bytes.len() - 2 * n * 4;
        assert!(scales.is_multiple_of(256));
        for (index, expert) in experts.iter().enumerate() {
            let own = expert.device_bytes().unwrap();
            assert_eq!(bytes[index * each..][..each], own[..each]);
            assert_eq!(bytes[scales + index * n * 4..][..n * 4], own[own.len() - n * 4..]);
        }
        assert!(matches!(DeviceExperts::device_bytes::<PackedWeights>(&[]), Err(Error::NoExperts)));
        assert!(matches!(DeviceExperts::bytes_for(0, [n, k], Group::default()), Err(Error::NoExperts)));
        assert!(matches!(
            DeviceExperts::bytes_for(usize::MAX, [n, k], Group::default()),
            Err(Error::TooLarge { .. })
        ));
    }
}
