//! W4A8 GEMM for NVIDIA Hopper: 4-bit weights, 8-bit activations, exact integer accumulation.
//!
//! The library computes `Y[m, n] = X[m, k] · W[n, k]ᵀ`, with all matrices row-major.
//! [`PackedWeights`] holds W at 4.25 bits per weight (with the default group of 64),
//! and [`QuantizedActivations`] holds X as int8 with one f32 scale per token.
//! Every scale inside the sum over K is an integer, so the int32 accumulator is exact.
//! The result therefore has the same bits on the CPU and on the GPU, however the work is divided.
//!
//! | task | start at |
//! |---|---|
//! | quantize weights offline | [`PackedWeights::quantize`] |
//! | quantize them by another method, or with calibration data | [`PackedWeights::quantize_with`], `PackedWeights::quantize_gptq` |
//! | measure what quantization costs | [`PackedWeights::output_error`] |
//! | take int4 weights of another quantizer (GPTQ, AWQ and others) | [`PackedWeights::from_int4`] |
//! | pack codes and pairs that another program chose | [`PackedWeights::pack`] |
//! | save and load weights | [`PackedWeights::save`], [`PackedWeights::load`] |
//! | quantize activations at run time | [`QuantizedActivations::quantize`] |
//! | multiply, on the GPU if there is one | [`Backend::auto`] |
//! | multiply on the CPU | [`cpu::gemm`] |
//! | multiply the rows of many experts in one call | [`cpu::grouped_gemm`], `gpu::Gpu::grouped_gemm` |
//! | add up the experts' rows of each token | [`cpu::combine`], `gpu::Gpu::combine` |
//! | divide a linear layer among GPUs, exactly | [`cpu::row_parallel`], `gpu::RowParallelLinear` (feature `nccl` for NCCL) |
//! | launch on device memory and a stream of your own | `gpu::Gpu::gemm` (feature `gpu`) |
//! | inspect or choose how the GPU computes a product | [`Plan`] |
//!
//! ```
//! use liquidgemm::{Group, PackedWeights, QuantizedActivations, cpu};
//!
//! # fn main() -> Result<(), liquidgemm::Error> {
//! let (m, n, k) = (2, 3, 128);
//! let weights: Vec<f32> = (0..n * k).map(|i| (i as f32 * 0.37).sin()).collect();
//! let x: Vec<f32> = (0..m * k).map(|i| (i as f32 * 0.11).cos()).collect();
//!
//! // Offline: floating-point weights, row-major [n, k], to packed 4-bit ones.
//! let packed = PackedWeights::quantize(&weights, n, k, Group::default())?;
//! // At run time: activations, row-major [m, k], to int8, and the product.
//! let quantized = QuantizedActivations::quantize(&x, m, k)?;
//! let mut y = vec![0f32; m * n];
//! cpu::gemm(&packed, &quantized, None, &mut y)?;
//!
//! for (token, y) in y.chunks(n).enumerate() {
//!     for (channel, &y) in y.iter().enumerate() {
//!         let exact: f32 = (0..k).map(|i| x[token * k + i] * weights[channel * k + i]).sum();
//!         assert!((y - exact).abs() < 1.5, "{y} is not near {exact}");
//!     }
//! }
//! # Ok(())
//! # }
//! ```
//!
//! **Several GPUs.** Column parallelism is plain slicing: [`Linear::channel_shard`] on each GPU, the whole input, no communication.
//! Row parallelism takes [`Linear::input_shard`] and adds int32 sums over the GPUs before one epilogue, so the result has the bits of one GPU.
//! A column-parallel layer and the row-parallel layer behind it, such as gate-up and down, communicate once, after the second.
//!
//! Functions check all of their input before they write any output, and return an [`Error`] for bad input.

mod activations;
mod backend;
mod check;
pub mod cpu;
mod error;
mod figures;
#[cfg(feature = "files")]
mod file;
mod float;
#[cfg(feature = "gpu")]
pub mod gpu;
mod linear;
#[cfg(feature = "files")]
mod new_file;
mod operation;
mod output;
mod packed;
mod plan;
mod problem;
mod quantize;
mod shard;

pub use activations::{ActivationsView, QuantizedActivations, smooth_weights};
pub use backend::Backend;
#[cfg(feature = "files")]
pub use error::FileError;
pub use error::{Error, PlanError};
pub use figures::DeviceFigures;
pub use float::Float;
pub use linear::Linear;
#[cfg(feature = "files")]
pub use new_file::NewFile;
pub use operation::{GateOrder, Gather, Half, HalfType, Operation, Scaling};
pub use output::{Output, OutputType};
pub use packed::{Group, PackedWeights, UnpackedCodes};
pub use plan::{Algorithm, GroupedPlan, GroupedProblem, Plan, Skinny, TileConfig, Tiled, TwoLaunches};
pub use problem::Problem;
#[cfg(feature = "gptq")]
pub use quantize::{GptqOptions, Hessian, HessianBuilder};
pub use quantize::{ImportKind, Int4Import, Int4Weights};
pub use quantize::{
    InputStatistics, InputStatisticsBuilder, SMOOTHING_SAMPLE, rotate, smoothing_auto,
    smoothing_auto_of_sample, smoothing_vector,
};
pub use quantize::{Inputs, Method, OutputError, QuantizeOptions};

/// The activation function of a gated operation.
pub use liquidgemm_format::activations::Gate;

/// The parts of a [`Plan`], and the shapes for which the library has kernels.
pub use liquidgemm_format::{
    grouped::GROUPED_SHAPES,
    schedule::Schedule,
    skinny::{SKINNY_SHAPES, SkinnyShape, TileRuns},
    tile::{TILE_SHAPES, TileShape},
};

/// Compiles and runs the examples in the README.
#[cfg(all(doctest, feature = "files", feature = "gptq", feature = "gpu"))]
#[doc = include_str!("../../README.md")]
struct Readme;
