//! Stand-in for the build helper of `cust` and `cust_raw`.
//!
//! The original searches for an installed CUDA toolkit, stops the build when there is none, and links
//! `libcuda`. This one does neither: the workspace's `cuda_driver` crate defines the driver's entry points
//! and resolves them at run time.

/// Called by the build scripts of `cust` and `cust_raw`. Emits nothing.
pub fn include_cuda() {}
