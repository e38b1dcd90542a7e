//! Random operands. Every contender gets the same normal distribution in its own type, because what the numbers
//! look like decides how much power the multipliers draw, and zeros would draw little.
//!
//! Device memory is filled by repeating one random pool, so that gigabytes take no time and any element can still
//! be told from its position.

use cust::memory::DeviceBuffer;
use cust::sys;
use half::bf16;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;
use rayon::prelude::*;

use super::record::Baseline;
use crate::gpu::During;
use crate::packed::PackedSizes;
use crate::{Error, Group, PackedWeights};

/// Elements of a pool: no power of two, so that rows of matrices don't repeat.
pub(super) const POOL_ELEMENTS: usize = 257 << 16;
/// Elements that one task generates.
const CHUNK: usize = 1 << 16;
/// int8 codes of one standard deviation: about what per-token quantization makes of normal activations.
const INT8_DEVIATION: f32 = 32.0;

/// Random numbers in one type.
pub(super) struct Pool {
    baseline: Baseline,
    bytes: Vec<u8>,
}

/// Bytes of an element of a baseline's operands.
pub(super) fn element_bytes(baseline: Baseline) -> usize {
    match baseline {
        Baseline::Int8 | Baseline::Fp8 => 1,
        Baseline::Bf16 => 2,
    }
}

impl Pool {
    pub(super) fn new(baseline: Baseline) -> Self {
        let size = element_bytes(baseline);
        let mut bytes = vec![0; POOL_ELEMENTS * size];
        bytes.par_chunks_mut(CHUNK * size).enumerate().for_each(|(chunk, bytes)| {
            let mut rng = generator(chunk);
            for element in bytes.chunks_exact_mut(size) {
                let x: f32 = rng.sample(StandardNormal);
                match baseline {
                    Baseline::Int8 => {
                        element[0] = (x * INT8_DEVIATION).round().clamp(-127.0, 127.0) as i8 as u8;
                    }
                    Baseline::Fp8 => element[0] = to_e4m3(x),
                    Baseline::Bf16 => element.copy_from_slice(&bf16::from_f32(x).to_le_bytes()),
                }
            }
        });
        Self { baseline, bytes }
    }

    /// The number at a position, counted in elements, of memory that [`fill`](Self::fill) filled.
    pub(super) fn value(&self, position: usize) -> f64 {
        let position = position % POOL_ELEMENTS;
        match self.baseline {
            Baseline::Int8 => f64::from(self.bytes[position] as i8),
            Baseline::Fp8 => f64::from(from_e4m3(self.bytes[position])),
            Baseline::Bf16 => {
                bf16::from_le_bytes([self.bytes[2 * position], self.bytes[2 * position + 1]]).to_f64()
            }
        }
    }

    /// `count` int8 codes from a position on.
    pub(super) fn codes(&self, position: usize, count: usize) -> impl Iterator<Item = i8> + '_ {
        (position..position + count).map(|position| self.bytes[position % POOL_ELEMENTS] as i8)
    }

    /// Fills device memory with the pool, again and again, beginning at position `first`.
    pub(super) fn fill(&self, memory: &DeviceBuffer<u8>, first: usize) -> anyhow::Result<()> {
        let (start, bytes) = (memory.as_device_ptr().as_raw(), memory.len());
        let split = first % POOL_ELEMENTS * element_bytes(self.baseline);
        let mut filled = 0;
        for part in [&self.bytes[split..], &self.bytes[..split]] {
            let part = &part[..part.len().min(bytes - filled)];
            // SAFETY: the part fits behind what is filled already.
            unsafe { sys::cuMemcpyHtoD_v2(start + filled as u64, part.as_ptr().cast(), part.len()) }
                .during("copying random data to the GPU")?;
            filled += part.len();
        }
        // From here on what is filled is a whole number of pools and doubles.
        while filled < bytes {
            let count = filled.min(bytes - filled);
            // SAFETY: source and target lie in the buffer and don't overlap.
            unsafe { sys::cuMemcpyDtoD_v2(start + filled as u64, start, count) }
                .during("spreading random data")?;
            filled += count;
        }
        super::arena::wait()
    }
}

/// Channels that are drawn and quantized; a wider matrix repeats their strips.
const DRAWN_CHANNELS: usize = 1024;

/// Normal weights, quantized like any others.
pub(super) fn random_weights(n: usize, k: usize, group: Group) -> Result<PackedWeights, Error> {
    let sizes = PackedSizes::new(n, k, group)?;
    let drawn = n.min(DRAWN_CHANNELS);
    let mut weights = vec![0.0f32; drawn * k];
    weights.par_chunks_mut(k).enumerate().for_each(|(channel, row)| {
        let mut rng = generator(channel);
        row.fill_with(|| rng.sample(StandardNormal));
    });
    let drawn = PackedWeights::quantize(&weights, drawn, k, group)?;
    let repeated = |strips: &[u8], bytes: usize| {
        let mut all = strips.repeat(bytes.div_ceil(strips.len()));
        all.truncate(bytes);
        all
    };
    let (codes, pairs) = (repeated(drawn.codes(), sizes.codes), repeated(drawn.pairs(), sizes.pairs));
    PackedWeights::from_parts(codes, pairs, random_scales(n), n, k, group)
}

/// Scales between 0.001 and 0.002.
pub(super) fn random_scales(count: usize) -> Vec<f32> {
    let mut rng = generator(usize::MAX);
    (0..count).map(|_| rng.random_range(1e-3..2e-3)).collect()
}

/// The generator of one chunk: any thread may fill any chunk, and the numbers are the same on every machine.
fn generator(chunk: usize) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(0x11_90_1d);
    rng.set_stream(chunk as u64);
    rng
}

/// The nearest e4m3 number, ties to even, at most 448 in magnitude.
fn to_e4m3(x: f32) -> u8 {
    let sign = if x.is_sign_negative() { 0x80 } else { 0 };
    // The smallest exponent of normal numbers is -6; below it lie multiples of 2⁻⁹.
    let magnitude = x.abs().min(448.0);
    let exponent = ((magnitude.to_bits() >> 23) as i32 - 127).max(-6);
    let steps = (magnitude * 2f32.powi(3 - exponent)).round_ties_even() as i32;
    // 8 to 15 steps at the least exponent are normal already, and 16 carry into the next: both add up.
    sign | ((exponent + 6) * 8 + steps) as u8
}

fn from_e4m3(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    let magnitude = if exponent == 0 { mantissa } else { (8.0 + mantissa) * 2f32.powi(exponent - 1) };
    magnitude * 2f32.powi(-9) * if code & 0x80 == 0 { 1.0 } else { -1.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn e4m3_codes_survive_the_round_trip_and_numbers_go_to_the_nearest() {
        for code in 0..=255u8 {
            // 0x7F is NaN.
            if code & 0x7F != 0x7F {
                assert_eq!(to_e4m3(from_e4m3(code)), code, "{code:#x}");
            }
        }
        assert_eq!(from_e4m3(0x38), 1.0);
        assert_eq!(from_e4m3(0x7E), 448.0);
        assert_eq!(from_e4m3(1), 2f32.powi(-9));
        assert_eq!(from_e4m3(to_e4m3(1e9)), 448.0);
        assert_eq!(from_e4m3(to_e4m3(-1.06)), -1.0);
        // Half-way between 1 and 1.125: to the even one.
        assert_eq!(from_e4m3(to_e4m3(1.0625)), 1.0);
        assert_eq!(from_e4m3(to_e4m3(15.9)), 16.0);
    }

    #[test]
    fn pools_are_normal_and_never_nan_or_minus_128() {
        for baseline in Baseline::ALL {
            let pool = Pool::new(baseline);
            let scale = if matches!(baseline, Baseline::Int8) { f64::from(INT8_DEVIATION) } else { 1.0 };
            let values: Vec<f64> = (0..100_000).map(|i| pool.value(i * 61) / scale).collect();
            let mean = values.iter().sum::<f64>() / 1e5;
            let square = values.iter().map(|x| x * x).sum::<f64>() / 1e5;
            assert!(mean.abs() < 0.02 && (square - 1.0).abs() < 0.03, "{baseline:?}: {mean}, {square}");
            assert_eq!(pool.value(5), pool.value(5 + POOL_ELEMENTS));
        }
        assert!(!Pool::new(Baseline::Int8).bytes.contains(&0x80));
    }

    #[test]
    fn random_weights_are_normal_up_to_quantization() {
        let (n, k) = (DRAWN_CHANNELS + 130, 200);
        let weights = random_weights(n, k, Group::default()).unwrap();
        assert_eq!((weights.n(), weights.k()), (n, k));
        // The second repetition of the first channels.
        for channel in [0, DRAWN_CHANNELS + 129] {
            let values: Vec<f64> = (0..k).map(|k| f64::from(weights.level1(channel, k))).collect();
            let mean = values.iter().sum::<f64>() / k as f64;
            let deviation = (values.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / k as f64).sqrt();
            // The largest of 200 normal numbers, which becomes 119, is about 2.7 deviations away.
            assert!((30.0..60.0).contains(&deviation), "channel {channel}: {deviation}");
        }
        assert_eq!(weights.level1(3, 5), weights.level1(DRAWN_CHANNELS + 3, 5));
    }
}
