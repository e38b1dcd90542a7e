//! Encodes tensor maps, which describe the activations and the output to TMA.
//! The driver's function is declared here because `cust` lacks it.

use std::ffi::c_void;

use crate::error::gpu::{During, GpuError, Status};

/// The driver's encoding of a tensor. Kernels take it by value.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub(crate) struct TensorMap {
    opaque: [u64; 16],
}

/// The type of `cuTensorMapEncodeTiled`. Its enumerations are C ints.
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
const DATA_TYPE_UINT16: u32 = 1;
const INTERLEAVE_NONE: u32 = 0;
const SWIZZLE_128B: u32 = 3;
const L2_PROMOTION_256B: u32 = 3;
/// Elements outside the tensor read as zeros.
const FILL_ZERO: u32 = 0;

/// Looks up `cuTensorMapEncodeTiled`.
pub(crate) fn encoder(driver: &cuda_driver::Driver) -> Result<EncodeTiled, GpuError> {
    const NAME: &str = "cuTensorMapEncodeTiled";
    // SAFETY: the type is the function's.
    unsafe { driver.symbol::<EncodeTiled>(NAME) }.ok_or(GpuError::MissingFunction { name: NAME })
}

/// A row-major matrix in device memory that TMA copies in boxes, with the 128-byte swizzle.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Boxes {
    pub(crate) address: u64,
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    /// Bytes from one row to the next, a multiple of 16.
    pub(crate) stride_bytes: usize,
    pub(crate) box_rows: u32,
    pub(crate) box_columns: u32,
}

impl TensorMap {
    /// Encodes a matrix of int8 elements.
    pub(crate) fn of_bytes(encode: EncodeTiled, boxes: Boxes) -> Result<Self, GpuError> {
        Self::encode(encode, DATA_TYPE_UINT8, boxes, "encoding the activations' tensor map")
    }

    /// Encodes a matrix of 16-bit elements.
    pub(crate) fn of_halves(encode: EncodeTiled, boxes: Boxes) -> Result<Self, GpuError> {
        Self::encode(encode, DATA_TYPE_UINT16, boxes, "encoding the output's tensor map")
    }

    fn encode(
        encode: EncodeTiled,
        data_type: u32,
        boxes: Boxes,
        action: &'static str,
    ) -> Result<Self, GpuError> {
        let mut map = Self { opaque: [0; 16] };
        let dimensions = [boxes.columns as u64, boxes.rows as u64];
        let strides = [boxes.stride_bytes as u64];
        let box_extents = [boxes.box_columns, boxes.box_rows];
        let element_strides = [1, 1];
        // SAFETY: the arrays have as many elements as the rank requires, strides one fewer.
        // The map is valid for a write.
        let status = unsafe {
            encode(
                &mut map,
                data_type,
                2,
                boxes.address,
                dimensions.as_ptr(),
                strides.as_ptr(),
                box_extents.as_ptr(),
                element_strides.as_ptr(),
                INTERLEAVE_NONE,
                SWIZZLE_128B,
                L2_PROMOTION_256B,
                FILL_ZERO,
            )
        };
        status.during(action)?;
        Ok(map)
    }

    /// Returns the address of the encoding as a kernel parameter.
    pub(crate) fn as_argument(&mut self) -> *mut c_void {
        (&raw mut self.opaque).cast()
    }
}
