//! The C interface of `liquidgemm`. `include/liquidgemm.h` is generated from this crate.
//!
//! | file | what it has |
//! |---|---|
//! | `status.rs` | status codes, the message of a thread's last error, and the guard around every function |
//! | `arguments.rs` | the structures that callers fill, and how they are read |
//! | `weights.rs` | packed weights in host memory, and files |
//! | `layers.rs` | linear layers and experts in host memory |
//! | `cpu.rs` | the operations on host memory |
//! | `gpu.rs` | the GPU, and what lives on it |
//! | `launch.rs` | the operations on device memory |
//! | `torch/` | the ops of `liquidgemm.torch` on CUDA tensors, which torch's dispatcher calls without Python |
//!
//! Each function returns a status. It checks its arguments before it writes any output.
//! A panic becomes the status `LG_ERROR_INTERNAL` and never reaches the caller.

// The names are those of the header.
#![allow(non_camel_case_types)]

mod arguments;
mod cpu;
mod gpu;
mod launch;
mod layers;
mod status;
mod torch;
mod weights;

pub use arguments::*;
pub use cpu::*;
pub use gpu::*;
pub use launch::*;
pub use layers::*;
pub use status::*;
pub use torch::*;
pub use weights::*;

use std::ffi::{CStr, CString, c_char};
use std::sync::OnceLock;

/// The version of this interface, which `lg_abi_version` returns.
///
/// It changes if a function or a structure changes in a way that breaks programs built with an older header.
/// New functions, and new fields at the end of structures, leave it as it is.
pub const LG_ABI_VERSION: u32 = 1;

/// Returns the version of the library's interface. Programs compare it with `LG_ABI_VERSION` of their header.
#[unsafe(no_mangle)]
pub extern "C" fn lg_abi_version() -> u32 {
    LG_ABI_VERSION
}

/// Returns the version of the library, such as `0.1.0`. The text is static.
#[unsafe(no_mangle)]
pub extern "C" fn lg_version() -> *const c_char {
    const VERSION: &CStr =
        match CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
            Ok(version) => version,
            Err(_) => c"",
        };
    VERSION.as_ptr()
}

/// Returns the hash of the device sources that the embedded GPU kernels were built from, or `unknown`. The text is static.
#[unsafe(no_mangle)]
pub extern "C" fn lg_kernels_hash() -> *const c_char {
    static HASH: OnceLock<CString> = OnceLock::new();
    HASH.get_or_init(|| CString::new(liquidgemm::gpu::ptx_hash()).unwrap_or_default()).as_ptr()
}
