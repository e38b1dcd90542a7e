//! The 128-byte descriptor of a tensor that the TMA unit copies from or to, as the driver encodes it.

/// An opaque tensor map, filled on the host by `cuTensorMapEncodeTiled` and given to a kernel by value.
///
/// In a kernel's signature it stands behind `#[grid_constant]`, and the body sees a `*const TensorMap` that
/// points into the parameter bank, where TMA instructions want it.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub struct TensorMap {
    /// The driver's encoding.
    pub opaque: [u64; 16],
}
