//! The device-side standard library for kernels written in Rust.
//!
//! It has `#[kernel]` functions, indices and barriers ([`thread`], [`warp`], [`cluster`])
//! and [`shared`] memory.
//! Names and signatures follow rust-cuda's crate of the same name, but the backend is rustc's own for NVPTX.
//! `cuda_builder` compiles a crate that uses it.
//! The builder also adds to the PTX text the directives for which rustc has no attribute.
//!
//! On targets other than `nvptx64`, the crate contains only the macros and [`TensorMap`].
//! A workspace with device code therefore builds, and generates its documentation, everywhere.

#![no_std]
#![cfg_attr(target_arch = "nvptx64", feature(asm_experimental_arch, stdarch_nvptx))]

pub use cuda_std_macros::kernel;

#[cfg(target_arch = "nvptx64")]
pub mod cluster;
#[cfg(target_arch = "nvptx64")]
pub mod shared;
#[cfg(target_arch = "nvptx64")]
pub mod thread;
#[cfg(target_arch = "nvptx64")]
pub mod warp;

mod tensor_map;
pub use tensor_map::TensorMap;

#[cfg(target_arch = "nvptx64")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    // SAFETY: `trap` stops the grid with a launch error, so nothing runs after it.
    unsafe { core::arch::nvptx::trap() }
}
