//! One thin wrapper for each PTX instruction that the kernels use and that neither `core` nor `cuda_std` has.
//!
//! Shared-memory addresses are `u32` in the shared window, global ones `u64`. Every wrapper is `unsafe` for the
//! same reason: it is the caller who knows that the addresses are valid and that the threads which the
//! instruction is meant for are there.

pub mod copy;
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
