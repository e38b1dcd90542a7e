//! Thin wrappers, one for each PTX instruction that the kernels use and neither `core` nor `cuda_std` has.
//!
//! Shared-memory addresses are `u32` in the shared window, global addresses `u64`.
//! A wrapper is `unsafe` if only its caller can know that addresses are valid
//! and that the threads for which the instruction is meant execute it.

pub mod copy;
pub mod float;
pub mod grid;
pub mod hint;
pub mod integer;
pub mod matrix;
pub mod mbarrier;
pub mod memory;
pub mod mma;
pub mod registers;
pub mod tma;
pub mod wgmma;
