//! Device-side standard library for kernels in Rust, on rustc's NVPTX backend.
