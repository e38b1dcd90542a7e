//! The device memory of a run: allocated and filled once, large enough for every problem in it. Matrices of
//! baselines are slices of random memory, so only our own weights, which must be valid bricks, are made anew for
//! each matrix.

use anyhow::ensure;
use cust::context::CurrentContext;
use cust::memory::DeviceBuffer;
use cust::sys;
use liquidgemm_format::probe::STREAM_PIECE_BYTES;

use super::data::{POOL_ELEMENTS, Pool, element_bytes, random_scales};
use super::record::{Baseline, moved_bytes};
use super::shapes::Case;
use crate::Group;
use crate::gpu::{DeviceSpan, During};

/// Weights rotate through more than this, four times the L2, so that none are still there from the launch before.
pub(super) const ROTATION_BYTES: usize = 220_000_000;
/// Copies of tiny matrices, which would need thousands.
const MAX_COPIES: usize = 512;
/// Matrices begin at multiples of this.
const ALIGNMENT: usize = 256;
/// cuBLASLt has no int8 product for fewer tokens on some versions; then it gets so many.
pub(super) const MAX_PADDED_TOKENS: usize = 32;
/// Where activations begin in the random pool, so that they are not the weights' numbers again.
const ACTIVATIONS_FIRST: usize = POOL_ELEMENTS / 2;
/// What the driver, the kernels and the packed weights' own overhead may take beside the arena.
const RESERVE_BYTES: usize = 1 << 30;

/// Copies of a matrix of so many bytes.
pub(super) fn copies(bytes: usize) -> usize {
    ROTATION_BYTES.div_ceil(bytes.max(1)).clamp(2, MAX_COPIES)
}

/// Operands of one type, with the random numbers that they hold.
pub(super) struct Operands {
    pub(super) pool: Pool,
    baseline: Baseline,
    weights: Option<DeviceBuffer<u8>>,
    activations: DeviceBuffer<u8>,
}

/// A baseline's weights and activations for one problem.
pub(super) struct Slices {
    pub(super) first_weights: u64,
    /// From one copy of the weights to the next.
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

    /// The slices of an `[n, k]` matrix. `None` if the run has no weights of this type.
    pub(super) fn slices(&self, n: usize, k: usize) -> Option<Slices> {
        let bytes = n * k * element_bytes(self.baseline);
        Some(Slices {
            first_weights: self.weights.as_ref()?.as_device_ptr().as_raw(),
            stride: bytes.next_multiple_of(ALIGNMENT) as u64,
            copies: copies(bytes),
            activations: self.activations.as_device_ptr().as_raw(),
        })
    }

    /// The activations.
    pub(super) fn activations(&self) -> DeviceSpan {
        (&self.activations).into()
    }

    /// An element of the first copy of the weights `[n, k]`.
    pub(super) fn weight(&self, k: usize, channel: usize, at: usize) -> f64 {
        self.pool.value(channel * k + at)
    }

    /// An element of the activations `[m, k]`.
    pub(super) fn activation(&self, k: usize, token: usize, at: usize) -> f64 {
        self.pool.value(ACTIVATIONS_FIRST + token * k + at)
    }

    /// One token's int8 codes.
    pub(super) fn codes(&self, k: usize, token: usize) -> impl Iterator<Item = i8> + '_ {
        self.pool.codes(ACTIVATIONS_FIRST + token * k, k)
    }
}

/// Everything but our own weights.
pub(super) struct Arena {
    /// int8, which also holds our activations, and the baselines' others.
    operands: Vec<Operands>,
    /// Token scales, on the host and on the device.
    pub(super) token_scales: Vec<f32>,
    pub(super) token_scales_device: DeviceBuffer<f32>,
    /// Our output, bf16.
    pub(super) output: DeviceBuffer<u8>,
    /// The baselines' output, up to 4 bytes an element.
    pub(super) baseline_output: DeviceBuffer<u8>,
    /// What the `stream` probe reads.
    pub(super) source: DeviceBuffer<u8>,
    /// What the `mma` probe writes.
    pub(super) sink: DeviceBuffer<u8>,
}

/// The largest of anything over all problems.
fn largest(cases: &[Case], bytes: impl Fn(usize, usize, usize) -> usize) -> usize {
    let problems = cases.iter().flat_map(|case| {
        case.tokens.iter().map(|&m| (m.max(MAX_PADDED_TOKENS), case.matrix.n, case.matrix.k))
    });
    problems.map(|(m, n, k)| bytes(m, n, k)).max().unwrap_or(0).max(ALIGNMENT)
}

impl Arena {
    /// Allocates and fills memory for every case and for these baselines.
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

    /// A baseline's operands, if it is one of the run's.
    pub(super) fn operands(&self, baseline: Baseline) -> Option<&Operands> {
        self.operands.iter().find(|operands| operands.baseline == baseline)
    }
}

/// Waits for everything on the GPU. Copies inside device memory only begin when they are called for, and the bench's
/// own stream doesn't wait for them.
pub(super) fn wait() -> anyhow::Result<()> {
    Ok(CurrentContext::synchronize().during("waiting for the GPU")?)
}

/// Fills memory with a byte.
pub(super) fn set_bytes(memory: &DeviceBuffer<u8>, byte: u8) -> anyhow::Result<()> {
    // SAFETY: exactly the buffer is written.
    unsafe { sys::cuMemsetD8_v2(memory.as_device_ptr().as_raw(), byte, memory.len()) }
        .during("clearing memory of the GPU")?;
    wait()
}

/// Copies values from the device.
pub(super) fn download<T: bytemuck::Pod>(
    memory: &DeviceBuffer<u8>,
    first: usize,
    count: usize,
) -> anyhow::Result<Vec<T>> {
    let mut values = vec![T::zeroed(); count];
    let (offset, bytes) = (first * size_of::<T>(), count * size_of::<T>());
    ensure!(offset + bytes <= memory.len(), "reading beyond a buffer");
    let source = memory.as_device_ptr().as_raw() + offset as u64;
    // SAFETY: source and target have the bytes, and any bytes make a `T`.
    unsafe { sys::cuMemcpyDtoH_v2(values.as_mut_ptr().cast(), source, bytes) }
        .during("copying results from the GPU")?;
    Ok(values)
}

/// Device memory with whatever was in it.
fn uninitialized(bytes: usize) -> anyhow::Result<DeviceBuffer<u8>> {
    // SAFETY: any bytes are valid, and what is read has been written by then.
    Ok(unsafe { DeviceBuffer::uninitialized(bytes.max(ALIGNMENT)) }.during("allocating memory of the GPU")?)
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
