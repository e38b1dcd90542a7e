//! Packed weight layout, dequantization arithmetic and work schedule, shared by host and device.
//!
//! Everything that the two sides of a launch must agree on is defined here once.
//! The crate is unit-tested on the CPU and compiled into the PTX.
//! It allocates nothing, uses no `unsafe` and has no dependencies.

#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

pub mod ablation;
pub mod activations;
pub mod arguments;
pub mod brick;
pub mod dequant;
pub mod divisor;
pub mod grouped;
pub mod probe;
pub mod ring;
pub mod rounding;
pub mod schedule;
pub mod skinny;
pub mod stream;
pub mod sums;
pub mod tile;
