//! Tensor maps: how the copy engine is told the shape of the activations.

use std::ffi::c_void;

use crate::gpu::error::{During, GpuError, Status};

/// The driver's encoding of a tensor, passed to kernels by value.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub(crate) struct TensorMap {
    opaque: [u64; 16],
}

/// `cuTensorMapEncodeTiled`; enumerations are C ints.
pub(crate) type EncodeTiled = unsafe extern "C" fn(
    map: *mut TensorMap,
    data_type: u32,
    rank: u32,
    address: u64,
    dimensions: *const u64,
    strides: *const u64,
    boxes: *const u32,
    element_strides: *const u32,
    interleave: u32,
    swizzle: u32,
    l2_promotion: u32,
    fill: u32,
) -> Status;

const DATA_TYPE_UINT8: u32 = 0;
const INTERLEAVE_NONE: u32 = 0;
const SWIZZLE_128B: u32 = 3;
const L2_PROMOTION_256B: u32 = 3;
/// Elements outside the tensor read as zeros.
const FILL_ZERO: u32 = 0;

/// The entry point, which `cust` doesn't know.
pub(crate) fn encoder(driver: &cuda_driver::Driver) -> Result<EncodeTiled, GpuError> {
    const NAME: &str = "cuTensorMapEncodeTiled";
    // SAFETY: the type is the function's.
    unsafe { driver.symbol::<EncodeTiled>(NAME) }.ok_or(GpuError::MissingFunction { name: NAME })
}

impl TensorMap {
    /// The map of a row-major int8 matrix `[rows, columns]` whose rows lie `stride` bytes apart, read in swizzled
    /// boxes of `box_rows` × `box_columns`.
    pub(crate) fn of_bytes(
        encode: EncodeTiled,
        address: u64,
        [rows, columns]: [usize; 2],
        stride: usize,
        [box_rows, box_columns]: [u32; 2],
    ) -> Result<Self, GpuError> {
        let mut map = Self { opaque: [0; 16] };
        let dimensions = [columns as u64, rows as u64];
        let strides = [stride as u64];
        let boxes = [box_columns, box_rows];
        let element_strides = [1, 1];
        // SAFETY: the arrays have as many elements as the rank says (strides one fewer), and the map is writable.
        let status = unsafe {
            encode(
                &mut map,
                DATA_TYPE_UINT8,
                2,
                address,
                dimensions.as_ptr(),
                strides.as_ptr(),
                boxes.as_ptr(),
                element_strides.as_ptr(),
                INTERLEAVE_NONE,
                SWIZZLE_128B,
                L2_PROMOTION_256B,
                FILL_ZERO,
            )
        };
        status.during("encoding the activations' tensor map")?;
        Ok(map)
    }

    /// The address of the encoding, as a kernel argument.
    pub(crate) fn as_argument(&mut self) -> *mut c_void {
        (&raw mut self.opaque).cast()
    }
}
