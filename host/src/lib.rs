//! W4A8 GEMM for NVIDIA Hopper: 4-bit weights, 8-bit activations, exact integer accumulation.

mod activations;
pub mod cpu;
mod error;
mod float;
mod output;
mod packed;
mod quantize;

pub use activations::{ActivationsView, QuantizedActivations, smooth_weights};
pub use error::{Error, FileError};
pub use float::Float;
pub use output::{Output, OutputType};
pub use packed::{Group, PackedWeights, UnpackedCodes};
