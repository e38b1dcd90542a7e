//! The CUDA driver's entry points, resolved from libcuda at run time.
