//! The 128-byte descriptor of a tensor that TMA copies from or to, as the driver encodes it.
//!
//! The host encodes it in `host/src/gpu/tensor_map.rs`.

/// An opaque tensor map.
/// The host fills it by `cuTensorMapEncodeTiled` and passes it to a kernel by value.
///
/// In the signature of a kernel, the parameter has the attribute `#[grid_constant]`.
/// The kernel's body sees a `*const TensorMap` into the parameter bank, where TMA instructions need it.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub struct TensorMap {
    /// The driver's encoding.
    pub opaque: [u64; 16],
}
