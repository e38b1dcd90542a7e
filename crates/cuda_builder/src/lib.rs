//! Builds a Rust device crate to PTX with rustc's own NVPTX backend.
//! Its interface follows rust-cuda's crate of this name.
//!
//! [`CudaBuilder`] finds a compiler and the library source of exactly that compiler ([`Toolchain`]).
//! It then runs cargo for `nvptx64-nvidia-cuda`.
//! Last, it adds directives that rustc has no attribute for:
//! launch bounds, cluster shapes and aligned parameters.
//! `cuda_std_macros` leaves notes about these in the PTX.
//!
//! | module | purpose |
//! |---|---|
//! | [`toolchain`] | finds a usable compiler |
//! | `debian` | fetches Debian's packages of the compiler and unpacks them without root |
//! | `compile` | runs cargo with the right arguments and environment |
//! | [`finish`] | turns the compiler's output into one finished PTX text per kernel |
//! | `hash` | computes the hash of the sources that a PTX was built from |
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
