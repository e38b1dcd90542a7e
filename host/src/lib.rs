//! W4A8 GEMM for NVIDIA Hopper: 4-bit weights, 8-bit activations, exact integer accumulation.
//!
//! `Y[m, n] = X[m, k] · W[n, k]ᵀ`, where [`PackedWeights`] holds W at 4.25 bits a weight and
//! [`QuantizedActivations`] holds X as int8 with one scale a token. Every scale inside the sum over K is an
//! integer, so the int32 accumulator is exact: the result has the same bits on the CPU and on the GPU, however
//! the work is split.
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
//! Functions check all of their input before they write any output, and answer bad input with an [`Error`].

mod activations;
mod backend;
#[cfg(feature = "bench")]
pub mod bench;
pub mod cpu;
mod error;
mod figures;
mod file;
mod float;
pub mod gpu;
mod output;
mod packed;
mod plan;
mod quantize;

pub use activations::{ActivationsView, QuantizedActivations, smooth_weights};
pub use backend::Backend;
pub use error::{Error, FileError};
pub use figures::DeviceFigures;
pub use float::Float;
pub use output::{Output, OutputType};
pub use packed::{Group, PackedWeights, UnpackedCodes};
pub use plan::{Cut, Divided, Method, Plan, Skinny, Tiled};

/// Compiles and runs the examples in the README.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;
