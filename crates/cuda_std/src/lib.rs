//! Device-side standard library for kernels written in Rust.
//!
//! The names and shapes follow rust-cuda's crate of the same name, on rustc's own NVPTX backend: `#[kernel]`
//! functions, [`thread`], [`warp`] and [`cluster`] indices and barriers, [`shared`] memory. `cuda_builder`
//! compiles a crate that uses it and finishes in the PTX text what rustc has no attribute for.
//!
//! On any other target than `nvptx64` the crate is empty but for the macros, so that a workspace which holds
//! device code still builds and documents itself everywhere.

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
    // SAFETY: `trap` stops the grid with a launch error; nothing runs after it.
    unsafe { core::arch::nvptx::trap() }
}
