//! Replaces the build helper of `cust` and `cust_raw`.
//!
//! The original searches for an installed CUDA toolkit,
//! stops the build if there is none, and links `libcuda`.
//! This one does nothing:
//! the workspace's `cuda_driver` crate defines the driver's entry points and resolves them at run time.

/// Does nothing. The build scripts of `cust` and `cust_raw` call it.
pub fn include_cuda() {}
