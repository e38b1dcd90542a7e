//! The device memory of a run: allocated and filled once, and large enough for every problem of the run.
//! The operands of the baselines are slices of random memory from `data`.
//! Our own weights must be valid bricks, so only they are made anew for each matrix.

use anyhow::ensure;
use cust::memory::DeviceBuffer;
use cust::sys;
use liquidgemm_format::probe::STREAM_PIECE_BYTES;

use super::data::{POOL_ELEMENTS, Pool, element_bytes, random_scales};
use super::driver::{During, wait};
use super::record::{Baseline, moved_bytes};
use super::shapes::Case;
use liquidgemm::Group;
use liquidgemm::gpu::DeviceSpan;

/// The copies of a matrix together take at least this many bytes, more than four times the 50 MB of L2 cache.
/// No launch then finds its weights still in the cache from an earlier launch.
pub(super) const ROTATION_BYTES: usize = 220_000_000;
/// Largest number of copies: a tiny matrix would need thousands to reach [`ROTATION_BYTES`].
const MAX_COPIES: usize = 512;
/// Alignment of the copies of a matrix, in bytes.
const ALIGNMENT: usize = 256;
/// Some versions of cuBLASLt have no int8 algorithm for few tokens.
/// The baseline is then measured with more tokens, up to this many.
pub(super) const MAX_PADDED_TOKENS: usize = 32;
/// Position in the random pool of the first activation, so that activations differ from weights.
const ACTIVATIONS_FIRST: usize = POOL_ELEMENTS / 2;
/// Memory left to the driver, to the kernels and to the padding of the packed weights, in bytes.
const RESERVE_BYTES: usize = 1 << 30;

/// Returns the number of copies of a matrix of `bytes` bytes.
pub(super) fn copies(bytes: usize) -> usize {
    ROTATION_BYTES.div_ceil(bytes.max(1)).clamp(2, MAX_COPIES)
}

/// The weights and activations of one type on the device, and the random numbers that they were filled with.
pub(super) struct Operands {
    pub(super) pool: Pool,
    baseline: Baseline,
    weights: Option<DeviceBuffer<u8>>,
    activations: DeviceBuffer<u8>,
}

/// The device addresses of a baseline's weights and activations for one problem.
pub(super) struct Slices {
    pub(super) first_weights: u64,
    /// Bytes from one copy of the weights to the next.
    pub(super) stride: u64,
    pub(super) copies: usize,
    pub(super) activations: u64,
}

impl Operands {
    fn new(baseline: Baseline, weights: usize, activations: usize) -> anyhow::Result<Self> {
        let pool = Pool::new(baseline);
        let filled = |bytes: usize, first| {
            let memory = uninitialized(bytes)?;
            pool.fill(&memory, first)?;
            anyhow::Ok(memory)
        };
        Ok(Self {
            baseline,
            weights: if weights > 0 { Some(filled(weights, 0)?) } else { None },
            activations: filled(activations, ACTIVATIONS_FIRST)?,
            pool,
        })
    }

    /// The operands of an `[n, k]` weight matrix. `None` if the run has no weights of this type.
    pub(super) fn slices(&self, n: usize, k: usize) -> Option<Slices> {
        let bytes = n * k * element_bytes(self.baseline);
        Some(Slices {
            first_weights: self.weights.as_ref()?.as_device_ptr().as_raw(),
            stride: bytes.next_multiple_of(ALIGNMENT) as u64,
            copies: copies(bytes),
            activations: self.activations.as_device_ptr().as_raw(),
        })
    }

    /// The activations, row-major `[m, k]` without padding.
    pub(super) fn activations(&self) -> DeviceSpan {
        (&self.activations).into()
    }

    /// Element `at` of a channel in the first copy of the weights `[n, k]`.
    pub(super) fn weight(&self, k: usize, channel: usize, at: usize) -> f64 {
        self.pool.value(channel * k + at)
    }

    /// Element `at` of a token in the activations `[m, k]`.
    pub(super) fn activation(&self, k: usize, token: usize, at: usize) -> f64 {
        self.pool.value(ACTIVATIONS_FIRST + token * k + at)
    }

    /// The int8 activations of one token.
    pub(super) fn codes(&self, k: usize, token: usize) -> impl Iterator<Item = i8> + '_ {
        self.pool.codes(ACTIVATIONS_FIRST + token * k, k)
    }
}

/// All device memory of a run except our own weights.
pub(super) struct Arena {
    /// First int8, whose activations our kernel reads too, then those of the other baselines.
    operands: Vec<Operands>,
    /// Token scales, first on the host, then on the device.
    pub(super) token_scales: Vec<f32>,
    pub(super) token_scales_device: DeviceBuffer<f32>,
    /// Output of our kernel, bf16.
    pub(super) output: DeviceBuffer<u8>,
    /// Output of the baselines, up to 4 bytes an element.
    pub(super) baseline_output: DeviceBuffer<u8>,
    /// Memory that the `stream` probe reads.
    pub(super) source: DeviceBuffer<u8>,
    /// Memory that the `mma` probe writes.
    pub(super) sink: DeviceBuffer<u8>,
}

/// The largest value of `bytes(m, n, k)` over all problems.
fn largest(cases: &[Case], bytes: impl Fn(usize, usize, usize) -> usize) -> usize {
    let problems = cases.iter().flat_map(|case| {
        case.tokens.iter().map(|&m| (m.max(MAX_PADDED_TOKENS), case.matrix.n, case.matrix.k))
    });
    problems.map(|(m, n, k)| bytes(m, n, k)).max().unwrap_or(0).max(ALIGNMENT)
}

impl Arena {
    /// Allocates and fills memory for all cases and for these baselines.
    pub(super) fn new(cases: &[Case], baselines: &[Baseline], multiprocessors: u32) -> anyhow::Result<Self> {
        let weights = |baseline| {
            let size = element_bytes(baseline);
            let bytes =
                |n: usize, k: usize| (n * k * size).next_multiple_of(ALIGNMENT) * copies(n * k * size);
            if baselines.contains(&baseline) { largest(cases, |_, n, k| bytes(n, k)) } else { 0 }
        };
        let activations = |baseline| largest(cases, |m, _, k| m * k * element_bytes(baseline));
        let output = largest(cases, |m, n, _| m * n * 2);
        let baseline_output = if baselines.is_empty() { ALIGNMENT } else { 2 * output };
        let source = largest(cases, |m, n, k| moved_bytes(m, n, k, Group::default()))
            .max(2 * ROTATION_BYTES)
            .next_multiple_of(STREAM_PIECE_BYTES as usize);
        let packed = largest(cases, |_, n, k| {
            let bytes = super::record::weight_bytes(n, k, Group::default());
            bytes.saturating_mul(copies(bytes))
        });
        let operands: Vec<(Baseline, usize, usize)> = Baseline::ALL
            .into_iter()
            .filter(|baseline| *baseline == Baseline::Int8 || baselines.contains(baseline))
            .map(|baseline| (baseline, weights(baseline), activations(baseline)))
            .collect();
        let needed = operands.iter().map(|(_, weights, activations)| weights + activations).sum::<usize>()
            + output
            + baseline_output
            + source
            + packed
            + RESERVE_BYTES;
        let (free, _) = cust::memory::mem_get_info()?;
        ensure!(
            needed <= free,
            "these shapes need {:.1} GB of GPU memory, but only {:.1} GB are free; measure fewer or smaller ones",
            needed as f64 / 1e9,
            free as f64 / 1e9
        );

        let token_scales = random_scales(largest(cases, |m, _, _| m));
        let operands = operands
            .into_iter()
            .map(|(baseline, weights, activations)| Operands::new(baseline, weights, activations))
            .collect::<anyhow::Result<Vec<_>>>()?;
        let source = uninitialized(source)?;
        operands[0].pool.fill(&source, 0)?;
        Ok(Self {
            operands,
            token_scales_device: DeviceBuffer::from_slice(&token_scales)?,
            token_scales,
            output: uninitialized(output)?,
            baseline_output: uninitialized(baseline_output)?,
            source,
            sink: uninitialized(multiprocessors as usize * 4096)?,
        })
    }

    /// The operands of our kernel and of the int8 baseline.
    pub(super) fn int8(&self) -> &Operands {
        &self.operands[0]
    }

    /// A baseline's operands, if it is part of the run.
    pub(super) fn operands(&self, baseline: Baseline) -> Option<&Operands> {
        self.operands.iter().find(|operands| operands.baseline == baseline)
    }
}

/// Sets every byte of a buffer to `byte`.
pub(super) fn set_bytes(memory: &DeviceBuffer<u8>, byte: u8) -> anyhow::Result<()> {
    // SAFETY: the call writes exactly the buffer's bytes.
    unsafe { sys::cuMemsetD8_v2(memory.as_device_ptr().as_raw(), byte, memory.len()) }
        .during("filling GPU memory")?;
    wait()
}

/// Copies `count` values to the host, beginning with value `first` of the buffer.
pub(super) fn download<T: bytemuck::Pod>(
    memory: &DeviceBuffer<u8>,
    first: usize,
    count: usize,
) -> anyhow::Result<Vec<T>> {
    let mut values = vec![T::zeroed(); count];
    let (offset, bytes) = (first * size_of::<T>(), count * size_of::<T>());
    ensure!(offset + bytes <= memory.len(), "a copy would read beyond the end of a device buffer");
    let source = memory.as_device_ptr().as_raw() + offset as u64;
    // SAFETY: source and target both have `bytes` bytes, and any bytes are a valid `T`.
    unsafe { sys::cuMemcpyDtoH_v2(values.as_mut_ptr().cast(), source, bytes) }
        .during("copying results from the GPU")?;
    Ok(values)
}

/// Allocates device memory without initializing it.
pub(super) fn uninitialized(bytes: usize) -> anyhow::Result<DeviceBuffer<u8>> {
    // SAFETY: any bytes are a valid `u8`, and the bench writes memory before it reads it.
    unsafe { DeviceBuffer::uninitialized(bytes.max(ALIGNMENT)) }.during("allocating GPU memory")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_rotate_through_more_than_200_megabytes() {
        for bytes in [1 << 21, 8_912_896, 119_537_664, 939_524_096] {
            assert!(copies(bytes) * bytes > 200_000_000 && copies(bytes) >= 2);
        }
        assert_eq!(copies(1), MAX_COPIES);
    }
}
