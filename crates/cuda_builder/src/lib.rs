//! Builds a Rust device crate to PTX, with rust-cuda's names and shape, on rustc's own NVPTX backend.
//!
//! [`CudaBuilder`] finds a compiler together with the library source of exactly that compiler ([`Toolchain`]),
//! runs cargo for `nvptx64-nvidia-cuda`, and writes into the PTX text what rustc has no attribute for: launch
//! bounds, cluster shapes, aligned parameters. The notes that it reads for that come from `cuda_std_macros`.
//!
//! | module | purpose |
//! |---|---|
//! | [`toolchain`] | where a usable compiler may be, and in which order to look |
//! | `debian` | Debian's packages, unpacked without root |
//! | `compile` | cargo's command line and environment |
//! | [`finish`] | compiler output to one finished PTX text per kernel |
//! | `hash` | which sources a PTX was built from |
//!
//! ```no_run
//! use cuda_builder::{CudaBuilder, NvvmArch};
//!
//! let kernels = CudaBuilder::new("kernels-gpu")
//!     .path_dependency("crates/cuda_std")
//!     .arch(NvvmArch::Compute90a)
//!     .copy_to("host/ptx")
//!     .build()?;
//! for kernel in kernels {
//!     println!("{}: {} bytes", kernel.entry, kernel.text.len());
//! }
//! # Ok::<(), cuda_builder::Error>(())
//! ```

mod builder;
mod compile;
mod debian;
mod error;
pub mod finish;
mod hash;
pub mod toolchain;

pub use builder::{CudaBuilder, NvvmArch, PtxFile, SOURCES_KEY};
pub use error::Error;
pub use toolchain::Toolchain;
