//! The time of one product `Y[m, n] = X[m, k] · W[n, k]ᵀ`, by the cost model of the LiquidGEMM paper (arXiv 2509.01229).
//!
//! A GEMM loads its operands, dequantizes weights on CUDA cores and multiplies on tensor cores.
//! A pipeline overlaps these, so the slowest of them decides: `T = max(T_load, T_dequant, T_mma)`.
//! No kernel overlaps them entirely. Measured times follow the 3-norm of the terms, which lies at most
//! 44 % above the maximum of three equal terms and on it where one dominates, plus a launch:
//!
//! ```text
//! T         = T_launch + ∛(T_load³ + T_dequant³ + T_mma³)
//! T_load    = (bytes of weights + m·k·bytes of X + m·n·bytes of Y) / (e_load · memory speed)
//! T_dequant = n·k·⌈m / 256⌉ · instructions per weight / (SMs · 64 lanes · clock)
//! T_mma     = 2·m·n·k / (e_mma · tensor throughput of the data sheet)
//! ```
//!
//! `T_launch`, `e_load` and `e_mma` are fitted to the bench's records ([`Efficiency`]); a test fits them again.
//! For a mixture of experts, `m` is the number of all rows, and weights are those of the experts that get rows.
//!
//! W4A8 takes the estimate of the library's own planner instead, [`Plan::estimate_us`], which knows tiles and waves.
//! It is limited from below by data-sheet speeds, because the planner derives tensor throughput from SMs and clock,
//! and an H20 has less.

use liquidgemm::{DeviceFigures, Plan, Problem};
use serde::Serialize;

use crate::gpus::Gpu;
use crate::scheme::Scheme;

/// Factors of a kernel, fitted on an H100 SXM.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Efficiency {
    /// Microseconds of a launch in a CUDA graph.
    pub launch_us: f64,
    /// The part of memory's speed that a kernel reaches.
    pub load: f64,
    /// The part of the tensor cores' speed that a kernel reaches.
    pub mma: f64,
    /// Instructions that dequantize a weight, on CUDA cores.
    pub dequant: f64,
    /// Whether the factors are fitted to measurements of this format, or taken over from another.
    pub is_fitted: bool,
}

const fn fitted(launch_us: f64, load: f64, mma: f64) -> Efficiency {
    Efficiency { launch_us, load, mma, dequant: 0.0, is_fitted: true }
}

/// Tokens of the largest tile: weights are dequantized once for this many tokens.
const TILE_TOKENS: f64 = 256.0;
/// 32-bit integer instructions of an SM in a cycle.
const LANES: f64 = 64.0;

impl Efficiency {
    /// Returns the factors of a dense layer's kernel.
    pub const fn dense(scheme: Scheme) -> Self {
        match scheme {
            // Two instructions for four weights (the paper's equation 12).
            Scheme::W4A8 => Self { dequant: 0.5, ..fitted(2.73, 1.0, 0.837) },
            Scheme::W8A8 => fitted(4.60, 0.829, 0.723),
            Scheme::Fp8 => fitted(2.74, 0.858, 0.794),
            // Marlin's dequantization does not show by itself, so it is part of the other factors.
            Scheme::W4A16 => fitted(6.44, 0.890, 0.427),
            Scheme::Bf16 => fitted(3.68, 0.865, 0.830),
        }
    }

    /// Returns the factors of a grouped kernel for a mixture of experts.
    pub const fn grouped(scheme: Scheme) -> Self {
        match scheme {
            Scheme::W4A8 => Self { dequant: 0.5, ..fitted(4.46, 0.916, 0.700) },
            Scheme::Fp8 => fitted(26.6, 0.847, 0.495),
            Scheme::Bf16 => fitted(24.4, 0.839, 0.647),
            // There is no record. int8 is taken to be as good as fp8, and Marlin as good as on dense layers.
            Scheme::W8A8 => Self { is_fitted: false, ..Self::grouped(Scheme::Fp8) },
            Scheme::W4A16 => Self { is_fitted: false, ..Self::dense(Scheme::W4A16) },
        }
    }
}

/// A product: rows, and how many matrices `[n, k]` are read for them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Product {
    /// Rows of the activations, of all experts together.
    pub rows: f64,
    /// Output channels.
    pub n: u64,
    /// Elements per channel.
    pub k: u64,
    /// Number of matrices that are read: 1, or the experts that get rows.
    pub matrices: f64,
    /// Whether it is a grouped product of experts.
    pub is_grouped: bool,
}

/// The terms of a product's time, in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Terms {
    /// The launch.
    pub launch: f64,
    /// Loading operands and storing the result.
    pub load: f64,
    /// Dequantizing weights.
    pub dequant: f64,
    /// Multiplying.
    pub mma: f64,
}

impl Terms {
    /// Computes the terms of a product with given factors.
    pub fn with(efficiency: &Efficiency, product: &Product, scheme: Scheme, gpu: &Gpu) -> Self {
        let Product { rows, n, k, matrices, .. } = *product;
        let [wide, deep] = [n as f64, k as f64];
        let bytes = matrices * scheme.weight_bytes(n, k)
            + rows * (deep * scheme.activation_bytes() + wide * scheme.output_bytes());
        let DeviceFigures { multiprocessors, clock_hz, .. } = gpu.figures;
        let lanes = f64::from(multiprocessors) * LANES * clock_hz as f64 / 1e6;
        let tiles = (rows / matrices / TILE_TOKENS).ceil().max(1.0);
        Self {
            launch: efficiency.launch_us,
            load: bytes / (efficiency.load * gpu.memory_speed()),
            dequant: matrices * wide * deep * tiles * efficiency.dequant / lanes,
            mma: 2.0 * rows * wide * deep / (efficiency.mma * scheme.tensor_speed(gpu)),
        }
    }

    /// Computes the terms of a product.
    pub fn of(product: &Product, scheme: Scheme, gpu: &Gpu) -> Self {
        let efficiency =
            if product.is_grouped { Efficiency::grouped(scheme) } else { Efficiency::dense(scheme) };
        Self::with(&efficiency, product, scheme, gpu)
    }

    /// Returns the time by the closed formula, in microseconds.
    pub fn total(&self) -> f64 {
        let cubes = self.load.powi(3) + self.dequant.powi(3) + self.mma.powi(3);
        self.launch + cubes.cbrt()
    }
}

/// Predicts the time of a product, in microseconds.
pub fn predict(product: &Product, scheme: Scheme, gpu: &Gpu) -> f64 {
    let terms = Terms::of(product, scheme, gpu);
    if scheme != Scheme::W4A8 || product.is_grouped {
        return terms.total();
    }
    // Problems beyond the planner's limits have only the closed formula.
    let Some(planned) = planned_us(product, gpu) else { return terms.total() };
    let peak = Efficiency { launch_us: 0.0, load: 1.0, mma: 1.0, dequant: 0.0, is_fitted: false };
    let floor = Terms::with(&peak, product, scheme, gpu);
    planned.max(floor.mma)
}

/// The planner's estimate for a dense W4A8 product. `None` if the library can't compute such a product.
fn planned_us(product: &Product, gpu: &Gpu) -> Option<f64> {
    let m = product.rows.round();
    if !(1.0..=f64::from(i32::MAX)).contains(&m) {
        return None;
    }
    let problem =
        Problem { m: m as usize, n: usize::try_from(product.n).ok()?, k: usize::try_from(product.k).ok()? };
    Some(Plan::new(problem, &gpu.figures).ok()?.estimate_us(&gpu.figures))
}
