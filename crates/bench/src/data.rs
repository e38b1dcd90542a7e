//! Random operands. Every measured kernel gets the same normal distribution in its own type,
//! because the values decide how much power the multipliers draw; zeros would draw little.
//!
//! Device memory is filled by repeating one random pool.
//! Filling gigabytes is then fast, and the host can compute any element from its position.

use cust::memory::DeviceBuffer;
use cust::sys;
use half::bf16;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;
use rayon::prelude::*;

use super::driver::{During, wait};
use super::record::{Baseline, packed_bytes};
use liquidgemm::{Error, Group, PackedWeights};

/// Elements of a pool. It is not a power of two, so that the rows of a matrix differ.
pub(super) const POOL_ELEMENTS: usize = 257 << 16;
/// Elements that one task generates.
const CHUNK: usize = 1 << 16;
/// One standard deviation in int8 steps, about the result of per-token quantization of normal activations.
const INT8_DEVIATION: f32 = 32.0;

/// Random numbers of one type.
pub(super) struct Pool {
    baseline: Baseline,
    bytes: Vec<u8>,
}

/// Bytes per element of a baseline's operands.
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

    /// The number at `position`, counted in elements, of memory that [`fill`](Self::fill) filled from 0 on.
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

    /// `count` int8 values, beginning at `position`.
    pub(super) fn codes(&self, position: usize, count: usize) -> impl Iterator<Item = i8> + '_ {
        (position..position + count).map(|position| self.bytes[position % POOL_ELEMENTS] as i8)
    }

    /// Fills device memory with repetitions of the pool, beginning at position `first` of the pool.
    pub(super) fn fill(&self, memory: &DeviceBuffer<u8>, first: usize) -> anyhow::Result<()> {
        let (start, bytes) = (memory.as_device_ptr().as_raw(), memory.len());
        let split = first % POOL_ELEMENTS * element_bytes(self.baseline);
        let mut filled = 0;
        for part in [&self.bytes[split..], &self.bytes[..split]] {
            let part = &part[..part.len().min(bytes - filled)];
            // SAFETY: the part is no longer than the rest of the buffer behind `filled`.
            unsafe { sys::cuMemcpyHtoD_v2(start + filled as u64, part.as_ptr().cast(), part.len()) }
                .during("copying random data to the GPU")?;
            filled += part.len();
        }
        // The filled part is now a whole pool; each pass doubles it, so it stays a whole number of pools.
        while filled < bytes {
            let count = filled.min(bytes - filled);
            // SAFETY: source and target lie within the buffer.
            // They don't overlap, because `count` is at most `filled`.
            unsafe { sys::cuMemcpyDtoD_v2(start + filled as u64, start, count) }
                .during("repeating random data on the GPU")?;
            filled += count;
        }
        wait()
    }
}

/// Channels that are drawn and quantized; a matrix with more channels repeats their strips.
const DRAWN_CHANNELS: usize = 1024;

/// Draws normally distributed weights `[n, k]` and quantizes them as usual.
pub(super) fn random_weights(n: usize, k: usize, group: Group) -> Result<PackedWeights, Error> {
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
    let [codes, pairs] = packed_bytes(n, k, group)?;
    let (codes, pairs) = (repeated(drawn.codes(), codes), repeated(drawn.pairs(), pairs));
    PackedWeights::from_parts(codes, pairs, random_scales(n), n, k, group)
}

/// Draws scales between 0.001 and 0.002.
pub(super) fn random_scales(count: usize) -> Vec<f32> {
    let mut rng = generator(usize::MAX);
    (0..count).map(|_| rng.random_range(1e-3..2e-3)).collect()
}

/// The random generator of one chunk.
/// Each chunk has its own stream, so neither the machine nor the order of the threads changes the numbers.
fn generator(chunk: usize) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(0x11_90_1d);
    rng.set_stream(chunk as u64);
    rng
}

/// Rounds to the nearest e4m3 number, ties to even; magnitudes above 448 become 448.
fn to_e4m3(x: f32) -> u8 {
    let sign = if x.is_sign_negative() { 0x80 } else { 0 };
    // The smallest exponent of normal numbers is -6; subnormal numbers are multiples of 2⁻⁹.
    let magnitude = x.abs().min(448.0);
    let exponent = ((magnitude.to_bits() >> 23) as i32 - 127).max(-6);
    let steps = (magnitude * 2f32.powi(3 - exponent)).round_ties_even() as i32;
    // The sum is the right code in every case.
    // The leading bit of 8 to 15 steps increments the exponent field; 16 steps carry into the next exponent.
    // Fewer than 8 steps occur at the smallest exponent only: they are subnormal, with exponent field 0.
    sign | ((exponent + 6) * 8 + steps) as u8
}

/// The value of an e4m3 code.
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
        // Half-way between 1 and 1.125: rounds to the even code, which is 1.
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
        // The first channel, and one among the repeated channels.
        for channel in [0, DRAWN_CHANNELS + 129] {
            let values: Vec<f64> = (0..k).map(|k| f64::from(weights.int8_weight(channel, k))).collect();
            let mean = values.iter().sum::<f64>() / k as f64;
            let deviation = (values.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / k as f64).sqrt();
            // The largest of 200 normal numbers is about 2.7 standard deviations and becomes 119.
            assert!((30.0..60.0).contains(&deviation), "channel {channel}: {deviation}");
        }
        assert_eq!(weights.int8_weight(3, 5), weights.int8_weight(DRAWN_CHANNELS + 3, 5));
    }
}
