//! The number formats that are compared: bytes of their operands, and the kernel that stands for each.

use liquidgemm::Group;
use liquidgemm_format::brick;
use serde::{Deserialize, Serialize};

use crate::gpus::Gpu;

/// A number format of weights and activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Scheme {
    /// 4-bit weights in groups of 64, int8 activations: this library.
    W4A8,
    /// int8 weights and activations: cuBLASLt int8.
    W8A8,
    /// fp8 (e4m3) weights and activations: cuBLASLt fp8.
    #[serde(rename = "FP8")]
    Fp8,
    /// 4-bit weights with one scale a channel, 16-bit activations: Marlin.
    W4A16,
    /// bf16 weights and activations: cuBLASLt bf16. Times of fp16 are the same.
    #[serde(rename = "BF16")]
    Bf16,
}

impl Scheme {
    /// Every format, in the order of the tables.
    pub const ALL: [Self; 5] = [Self::W4A8, Self::W8A8, Self::Fp8, Self::W4A16, Self::Bf16];

    /// Returns the name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::W4A8 => "W4A8",
            Self::W8A8 => "W8A8",
            Self::Fp8 => "FP8",
            Self::W4A16 => "W4A16",
            Self::Bf16 => "BF16",
        }
    }

    /// Returns the kernel whose measurements stand for the format.
    pub const fn kernel(self) -> &'static str {
        match self {
            Self::W4A8 => "LiquidGEMM, groups of 64",
            Self::W8A8 => "cuBLASLt int8",
            Self::Fp8 => "cuBLASLt fp8; experts: torch's grouped GEMM",
            Self::W4A16 => "Marlin, one scale a channel",
            Self::Bf16 => "cuBLASLt bf16; experts: torch's grouped GEMM",
        }
    }

    /// Returns the bytes of one matrix `[n, k]` with its scales.
    pub fn weight_bytes(self, n: u64, k: u64) -> f64 {
        let elements = n as f64 * k as f64;
        match self {
            // Whole bricks of 64 × 64, and one f32 scale a channel.
            Self::W4A8 => packed_bytes(n, k) + 4.0 * n as f64,
            Self::W8A8 => elements + 4.0 * n as f64,
            Self::Fp8 => elements + 4.0,
            Self::W4A16 => elements / 2.0 + 2.0 * n as f64,
            Self::Bf16 => 2.0 * elements,
        }
    }

    /// Returns the bytes of an activation.
    pub const fn activation_bytes(self) -> f64 {
        match self {
            Self::W4A8 | Self::W8A8 | Self::Fp8 => 1.0,
            Self::W4A16 | Self::Bf16 => 2.0,
        }
    }

    /// Returns the bytes of an output. cuBLASLt's int8 product is int32.
    pub const fn output_bytes(self) -> f64 {
        match self {
            Self::W8A8 => 4.0,
            Self::W4A8 | Self::Fp8 | Self::W4A16 | Self::Bf16 => 2.0,
        }
    }

    /// Returns the tensor cores' operations per microsecond.
    pub fn tensor_speed(self, gpu: &Gpu) -> f64 {
        1e6 * match self {
            Self::W4A8 | Self::W8A8 => gpu.int8_tops,
            Self::Fp8 => gpu.fp8_tflops,
            Self::W4A16 | Self::Bf16 => gpu.bf16_tflops,
        }
    }
}

/// Bytes of packed weights `[n, k]`, codes and pairs.
fn packed_bytes(n: u64, k: u64) -> f64 {
    let exact = || {
        let [n, k] = [usize::try_from(n).ok()?, usize::try_from(k).ok()?];
        let codes = brick::codes_bytes(n, k)?;
        codes.checked_add(brick::pairs_bytes(n, Group::default().count(k).ok()?)?)
    };
    // K beyond the library's limit has no packed form. Its bytes would be these.
    exact().map_or(n as f64 * k as f64 * 17.0 / 32.0, |bytes| bytes as f64)
}
