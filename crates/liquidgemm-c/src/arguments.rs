//! The structures that callers fill, and how they are read: checked, and turned into the library's types.

use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::{ptr, slice};

use liquidgemm::cpu::{QuantizeInput, Residual};
use liquidgemm::gpu::{DeviceSpan, LinearInput, LinearOutput};
use liquidgemm::{Gate, GateOrder, Gather, Group, Half, HalfType, Operation, OutputType, Scaling};

use crate::status::Failure;

/// An element type: one of the `LG_TYPE_…` constants.
pub type lg_type = u32;
/// bfloat16, 2 bytes.
pub const LG_TYPE_BF16: lg_type = 1;
/// IEEE half precision, 2 bytes.
pub const LG_TYPE_F16: lg_type = 2;
/// IEEE single precision, 4 bytes.
pub const LG_TYPE_F32: lg_type = 3;
/// int32, 4 bytes: the accumulator itself, without scales.
pub const LG_TYPE_I32: lg_type = 4;

/// What happens to a row of activations before it is quantized: one of the `LG_OPERATION_…` constants.
pub type lg_operation = u32;
/// Nothing.
pub const LG_OPERATION_PLAIN: lg_operation = 0;
/// RMSNorm: `(x / sqrt(mean(x²) + epsilon)) · norm_weight`.
pub const LG_OPERATION_RMS_NORM: lg_operation = 1;
/// LayerNorm: `((x − mean) / sqrt(variance + epsilon)) · norm_weight + norm_bias`.
pub const LG_OPERATION_LAYER_NORM: lg_operation = 2;
/// `silu(gate) · up`. A row of the input has k gates and k ups.
pub const LG_OPERATION_SILU_MUL: lg_operation = 3;
/// `gelu(gate) · up` with the tanh approximation. A row of the input has k gates and k ups.
pub const LG_OPERATION_GELU_TANH_MUL: lg_operation = 4;

/// The order of gates and ups in a row: one of the `LG_GATE_…` constants.
pub type lg_gate_order = u32;
/// k gates, then k ups.
pub const LG_GATE_HALVES: lg_gate_order = 0;
/// A gate, its up, the next gate, and so on.
pub const LG_GATE_INTERLEAVED: lg_gate_order = 1;

/// Where the scales of quantized rows come from: one of the `LG_SCALING_…` constants.
pub type lg_scaling = u32;
/// Each row has its own: its largest magnitude / 127.
pub const LG_SCALING_PER_TOKEN: lg_scaling = 0;
/// `static_scale` for all rows.
pub const LG_SCALING_STATIC: lg_scaling = 1;
/// `given_scales`, one for each row.
pub const LG_SCALING_GIVEN: lg_scaling = 2;

/// The group that stands for one pair of a whole channel. Other groups are positive multiples of 64.
pub const LG_GROUP_CHANNEL: usize = 0;

/// Rows of activations to quantize.
///
/// The pointers are host memory in `lg_cpu_…` functions, and device memory in `lg_gpu_…` functions.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct lg_input {
    /// `sizeof(lg_input)`.
    pub struct_size: usize,
    /// Rows (tokens). May be 0.
    pub m: usize,
    /// Elements of a row after the operation.
    pub k: usize,
    /// What happens to a row before it is quantized.
    pub operation: lg_operation,
    /// The element type of input, residual and norm: `LG_TYPE_BF16` or `LG_TYPE_F16`.
    pub input_type: lg_type,
    /// Rows of k elements, or of 2k for a gated activation function.
    pub input: *const c_void,
    /// Elements from one row of the input to the next. 0 stands for rows behind one another.
    pub input_stride: usize,
    /// `[m, k]`, or null. The input is added to it, rounded, before a norm; the norm is that of the sum.
    pub residual: *mut c_void,
    /// Elements from one row of the residual to the next. 0 stands for rows behind one another.
    pub residual_stride: usize,
    /// `[k]`, of a norm.
    pub norm_weight: *const c_void,
    /// `[k]`, of LayerNorm, or null.
    pub norm_bias: *const c_void,
    /// Of a norm: finite and not negative.
    pub epsilon: f32,
    /// Of a gated activation function.
    pub gate_order: lg_gate_order,
    /// u32 `[m]`: the row of the input from which each row is made, or null for the first m in order.
    pub gather: *const u32,
    /// Rows of the input, if they are gathered.
    pub gather_input_rows: usize,
    /// f32 `[k]`, by which values are divided after the operation, or null.
    /// Linear layers have a vector of their own, so there it is null.
    pub smoothing: *const f32,
    /// Where the scales come from.
    pub scaling: lg_scaling,
    /// The scale of `LG_SCALING_STATIC`.
    pub static_scale: f32,
    /// f32 `[m]`, the scales of `LG_SCALING_GIVEN`.
    pub given_scales: *const f32,
}

/// Quantized activations `[m, k]`. Quantization writes them, and GEMMs read them.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct lg_quantized {
    /// `sizeof(lg_quantized)`.
    pub struct_size: usize,
    /// Rows (tokens). May be 0.
    pub m: usize,
    /// Elements of a row.
    pub k: usize,
    /// int8 `[m, k]`. On the GPU the address is a multiple of 16,
    /// and quantization writes zeros behind each row up to a multiple of 16 bytes.
    pub codes: *mut i8,
    /// Bytes from one row of the codes to the next: at least k, on the GPU a multiple of 16, better of 64.
    pub code_stride: usize,
    /// f32 `[m]`, the scale of each row.
    pub scales: *mut f32,
}

/// A product `[m, n]`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct lg_output {
    /// `sizeof(lg_output)`.
    pub struct_size: usize,
    /// `[m, n]` of `output_type`, row-major. The address is a multiple of the element's size.
    pub output: *mut c_void,
    /// Elements from one row to the next. 0 stands for n. On the GPU a multiple of 8 makes 16-bit stores fast.
    pub output_stride: usize,
    /// The element type.
    pub output_type: lg_type,
}

/// A structure that grows by fields at its end.
///
/// # Safety
/// The first field is the `usize` `struct_size`, and all fields may be zero bytes or any other bytes.
pub(crate) unsafe trait Versioned: Copy {
    /// The name in C.
    const NAME: &str;
    /// The bytes of its first version.
    const FIRST_BYTES: usize = size_of::<Self>();
}

// SAFETY: numbers and pointers, the size first.
unsafe impl Versioned for lg_input {
    const NAME: &str = "lg_input";
}

// SAFETY: as above.
unsafe impl Versioned for lg_quantized {
    const NAME: &str = "lg_quantized";
}

// SAFETY: as above.
unsafe impl Versioned for lg_output {
    const NAME: &str = "lg_output";
}

/// Reads a structure of an older, the same or a newer version of the header.
///
/// Fields that an older one lacks are zero. Fields that this version does not know must be zero.
///
/// # Safety
/// `structure` is null, or points to as many readable bytes as its first field says.
pub(crate) unsafe fn read<T: Versioned>(structure: *const T) -> Result<T, Failure> {
    let name = T::NAME;
    check_pointer(name, structure)?;
    // SAFETY: the structure begins with its size.
    let bytes = unsafe { structure.cast::<usize>().read() };
    if bytes < T::FIRST_BYTES || bytes > 1 << 16 {
        return Err(Failure::argument(format!(
            "{name}.struct_size is {bytes}; set it to sizeof({name}), which is {} here",
            size_of::<T>()
        )));
    }
    let known = bytes.min(size_of::<T>());
    // SAFETY: the caller vouches for the bytes that the structure says it has.
    let unknown = unsafe { slice::from_raw_parts(structure.cast::<u8>().add(known), bytes - known) };
    if unknown.iter().any(|&byte| byte != 0) {
        return Err(Failure::argument(format!(
            "{name} has fields that this version of the library does not know; \
             leave them zero, or use a newer library"
        )));
    }
    let mut copy = MaybeUninit::<T>::zeroed();
    // SAFETY: both have these bytes, and any bytes are valid for the type.
    unsafe {
        ptr::copy_nonoverlapping(structure.cast::<u8>(), copy.as_mut_ptr().cast::<u8>(), known);
        Ok(copy.assume_init())
    }
}

/// Fails for a null pointer, or one that is not aligned for its type.
pub(crate) fn check_pointer<T>(what: &str, pointer: *const T) -> Result<(), Failure> {
    if pointer.is_null() {
        return Err(Failure::argument(format!("{what} is a null pointer")));
    }
    if !pointer.is_aligned() {
        return Err(Failure::argument(format!(
            "{what} is at {pointer:p}, which is no multiple of {} bytes",
            align_of::<T>()
        )));
    }
    Ok(())
}

/// Fails for a pointer that is not aligned for its type. Null is allowed.
pub(crate) fn check_optional<T>(what: &str, pointer: *const T) -> Result<(), Failure> {
    if pointer.is_null() { Ok(()) } else { check_pointer(what, pointer) }
}

/// Borrows what a handle points to.
///
/// # Safety
/// The pointer is null, or a handle that lives as long as the call.
pub(crate) unsafe fn handle<'a, T>(what: &str, pointer: *const T) -> Result<&'a T, Failure> {
    check_pointer(what, pointer)?;
    // SAFETY: the caller vouches for it.
    Ok(unsafe { &*pointer })
}

/// Writes a new handle for a value.
///
/// # Safety
/// `out` is null or valid for a write.
pub(crate) unsafe fn give<T>(
    out: *mut *mut T,
    value: impl FnOnce() -> Result<T, Failure>,
) -> Result<(), Failure> {
    check_pointer("the pointer for the new handle", out)?;
    let value = Box::into_raw(Box::new(value()?));
    // SAFETY: the caller vouches for it.
    unsafe { out.write(value) };
    Ok(())
}

/// Writes a result.
///
/// # Safety
/// `out` is null or valid for a write.
pub(crate) unsafe fn put<T>(what: &str, out: *mut T, value: T) -> Result<(), Failure> {
    check_pointer(what, out)?;
    // SAFETY: the caller vouches for it.
    unsafe { out.write(value) };
    Ok(())
}

/// Drops what a handle points to. Null is allowed.
///
/// # Safety
/// The pointer is null, or a handle of `give` that nobody uses any more.
pub(crate) unsafe fn free<T>(pointer: *mut T) {
    if !pointer.is_null() {
        // A panic of a destructor must not reach the caller.
        let _ = crate::status::guard(|| {
            // SAFETY: the caller vouches for it.
            drop(unsafe { Box::from_raw(pointer) });
            Ok(())
        });
    }
}

/// Multiplies the parts of a size.
pub(crate) fn elements(what: &str, parts: [usize; 2]) -> Result<usize, Failure> {
    let [rows, columns] = parts;
    rows.checked_mul(columns).ok_or_else(|| {
        Failure::argument(format!("{what}: [{rows}, {columns}] does not fit the address space"))
    })
}

/// Borrows `length` elements of host memory. Without elements the pointer may be null.
///
/// # Safety
/// The elements can be read, and nobody writes them, as long as the slice lives.
pub(crate) unsafe fn host<'a, T>(what: &str, pointer: *const T, length: usize) -> Result<&'a [T], Failure> {
    if length == 0 {
        return Ok(&[]);
    }
    check_host(what, pointer, length)?;
    // SAFETY: the caller vouches for it.
    Ok(unsafe { slice::from_raw_parts(pointer, length) })
}

/// Borrows `length` elements of host memory to write them. Without elements the pointer may be null.
///
/// # Safety
/// The elements can be written, and nobody else uses them, as long as the slice lives.
pub(crate) unsafe fn host_mut<'a, T>(
    what: &str,
    pointer: *mut T,
    length: usize,
) -> Result<&'a mut [T], Failure> {
    if length == 0 {
        return Ok(&mut []);
    }
    check_host(what, pointer, length)?;
    // SAFETY: the caller vouches for it.
    Ok(unsafe { slice::from_raw_parts_mut(pointer, length) })
}

fn check_host<T>(what: &str, pointer: *const T, length: usize) -> Result<(), Failure> {
    check_pointer(what, pointer)?;
    match length.checked_mul(size_of::<T>()) {
        Some(bytes) if bytes <= isize::MAX as usize => Ok(()),
        _ => Err(Failure::argument(format!("{what}: {length} elements do not fit the address space"))),
    }
}

/// Describes device memory whose length the caller vouches for.
pub(crate) fn device<T>(pointer: *const T) -> DeviceSpan {
    device_bytes(pointer, isize::MAX as usize)
}

/// Describes device memory of a given length.
pub(crate) fn device_bytes<T>(pointer: *const T, bytes: usize) -> DeviceSpan {
    // SAFETY: the callers of the functions that use it vouch for the memory.
    unsafe { DeviceSpan::from_raw(pointer.addr() as u64, bytes) }
}

/// Describes device memory, or `None` for null.
pub(crate) fn device_or_none<T>(pointer: *const T) -> Option<DeviceSpan> {
    (!pointer.is_null()).then(|| device(pointer))
}

/// Describes device memory of `rows` rows. Null is allowed without rows only.
pub(crate) fn device_rows<T>(what: &str, pointer: *const T, rows: usize) -> Result<DeviceSpan, Failure> {
    if rows > 0 && pointer.is_null() {
        return Err(Failure::argument(format!("{what} is a null pointer")));
    }
    Ok(device(pointer))
}

pub(crate) fn group_of(group: usize) -> Group {
    if group == LG_GROUP_CHANNEL { Group::Channel } else { Group::K(group) }
}

pub(crate) fn group_code(group: Group) -> usize {
    match group {
        Group::K(group) => group,
        Group::Channel => LG_GROUP_CHANNEL,
    }
}

pub(crate) fn half_type(what: &str, value: lg_type) -> Result<HalfType, Failure> {
    match value {
        LG_TYPE_BF16 => Ok(HalfType::Bf16),
        LG_TYPE_F16 => Ok(HalfType::F16),
        _ => Err(Failure::argument(format!("{what} is {value}; use LG_TYPE_BF16 or LG_TYPE_F16"))),
    }
}

pub(crate) fn output_type(value: lg_type) -> Result<OutputType, Failure> {
    match value {
        LG_TYPE_BF16 => Ok(OutputType::Bf16),
        LG_TYPE_F16 => Ok(OutputType::F16),
        LG_TYPE_F32 => Ok(OutputType::F32),
        LG_TYPE_I32 => Ok(OutputType::I32),
        _ => Err(Failure::argument(format!(
            "output_type is {value}; use LG_TYPE_BF16, LG_TYPE_F16, LG_TYPE_F32 or LG_TYPE_I32"
        ))),
    }
}

/// Returns a stride, for which 0 stands for rows behind one another.
pub(crate) fn stride_of(stride: usize, row: usize) -> usize {
    if stride == 0 { row } else { stride }
}

impl lg_input {
    /// Returns the elements of a row of the input.
    fn row(&self) -> Result<usize, Failure> {
        match self.operation {
            LG_OPERATION_SILU_MUL | LG_OPERATION_GELU_TANH_MUL => elements("input", [2, self.k]),
            _ => Ok(self.k),
        }
    }

    /// Returns the operation, with vectors that `vector` makes of their pointers.
    fn operation<V>(
        &self,
        mut vector: impl FnMut(&str, *const c_void) -> Result<V, Failure>,
    ) -> Result<Operation<V>, Failure> {
        let gate = match self.operation {
            LG_OPERATION_PLAIN => return Ok(Operation::Plain),
            LG_OPERATION_RMS_NORM => {
                let weight = vector("norm_weight", self.norm_weight)?;
                return Ok(Operation::RmsNorm { weight, epsilon: self.epsilon });
            }
            LG_OPERATION_LAYER_NORM => {
                let weight = vector("norm_weight", self.norm_weight)?;
                let bias = (!self.norm_bias.is_null()).then(|| vector("norm_bias", self.norm_bias));
                return Ok(Operation::LayerNorm { weight, bias: bias.transpose()?, epsilon: self.epsilon });
            }
            LG_OPERATION_SILU_MUL => Gate::Silu,
            LG_OPERATION_GELU_TANH_MUL => Gate::GeluTanh,
            other => {
                return Err(Failure::argument(format!(
                    "operation is {other}; use an LG_OPERATION_… constant"
                )));
            }
        };
        let order = match self.gate_order {
            LG_GATE_HALVES => GateOrder::Halves,
            LG_GATE_INTERLEAVED => GateOrder::Interleaved,
            other => {
                return Err(Failure::argument(format!("gate_order is {other}; use an LG_GATE_… constant")));
            }
        };
        Ok(Operation::Gated { gate, order })
    }

    fn scaling<V>(&self, given: impl FnOnce() -> Result<V, Failure>) -> Result<Scaling<V>, Failure> {
        match self.scaling {
            LG_SCALING_PER_TOKEN => Ok(Scaling::PerToken),
            LG_SCALING_STATIC => Ok(Scaling::Static(self.static_scale)),
            LG_SCALING_GIVEN => given().map(Scaling::Given),
            other => Err(Failure::argument(format!("scaling is {other}; use an LG_SCALING_… constant"))),
        }
    }

    /// Returns the rows that the input has.
    fn input_rows(&self) -> usize {
        if self.gather.is_null() { self.m } else { self.gather_input_rows }
    }

    /// Borrows everything as host memory.
    ///
    /// # Safety
    /// The pointers are valid for what the structure says.
    pub(crate) unsafe fn on_host<'a, T: Half>(
        &self,
    ) -> Result<(QuantizeInput<'a, T>, Option<Residual<'a, T>>), Failure> {
        let row = self.row()?;
        let input_stride = stride_of(self.input_stride, row);
        let length = spanned("input", self.input_rows(), input_stride, row)?;
        // SAFETY: the caller vouches for all pointers.
        let input = unsafe {
            QuantizeInput {
                m: self.m,
                k: self.k,
                operation: self.operation(|what, pointer| {
                    check_pointer(what, pointer).and_then(|()| host(what, pointer.cast(), self.k))
                })?,
                input: host("input", self.input.cast(), length)?,
                input_stride,
                gather: if self.gather.is_null() {
                    None
                } else {
                    Some(Gather {
                        rows: host("gather", self.gather, self.m)?,
                        input_rows: self.gather_input_rows,
                    })
                },
                smoothing: if self.smoothing.is_null() {
                    None
                } else {
                    Some(host("smoothing", self.smoothing, self.k)?)
                },
                scaling: self.scaling(|| host("given_scales", self.given_scales, self.m))?,
            }
        };
        if self.residual.is_null() {
            return Ok((input, None));
        }
        let stride = stride_of(self.residual_stride, self.k);
        let length = spanned("residual", self.m, stride, self.k)?;
        // SAFETY: as above.
        let data = unsafe { host_mut("residual", self.residual.cast(), length) }?;
        Ok((input, Some(Residual { data, stride })))
    }

    /// Describes everything as device memory.
    pub(crate) fn on_device(&self) -> Result<LinearInput, Failure> {
        let present = |what: &str, pointer: *const c_void| {
            if pointer.is_null() {
                return Err(Failure::argument(format!("{what} is a null pointer")));
            }
            Ok(device(pointer))
        };
        Ok(LinearInput {
            m: self.m,
            operation: self.operation(present)?,
            input_type: half_type("input_type", self.input_type)?,
            input: device_rows("input", self.input, if self.m == 0 { 0 } else { self.input_rows() })?,
            input_stride: stride_of(self.input_stride, self.row()?),
            gather: device_or_none(self.gather)
                .map(|rows| Gather { rows, input_rows: self.gather_input_rows }),
            residual: device_or_none(self.residual.cast_const()),
            residual_stride: stride_of(self.residual_stride, self.k),
            scaling: self.scaling(|| device_rows("given_scales", self.given_scales, self.m))?,
        })
    }

    /// Returns the operation on device memory, for preparing it. It may lack its vectors.
    pub(crate) fn kind(operation: lg_operation) -> Result<Operation<DeviceSpan>, Failure> {
        // SAFETY: numbers and pointers may be zero.
        let zero = unsafe { MaybeUninit::<Self>::zeroed().assume_init() };
        Self { operation, ..zero }.operation(|_, pointer| Ok(device(pointer)))
    }
}

impl lg_output {
    /// Describes the output as device memory.
    pub(crate) fn on_device(&self, m: usize, n: usize) -> Result<LinearOutput, Failure> {
        Ok(LinearOutput {
            output: device_rows("output", self.output.cast_const(), m)?,
            output_stride: stride_of(self.output_stride, n),
            output_type: output_type(self.output_type)?,
        })
    }
}

/// Returns the elements that `rows` rows of `row` elements span, `stride` elements apart.
pub(crate) fn spanned(what: &str, rows: usize, stride: usize, row: usize) -> Result<usize, Failure> {
    if stride < row {
        return Err(Failure::argument(format!(
            "the {what}'s row stride of {stride} elements is shorter than a row of {row}; it must be at least that"
        )));
    }
    let Some(others) = rows.checked_sub(1) else { return Ok(0) };
    elements(what, [others, stride])?.checked_add(row).ok_or_else(|| {
        Failure::argument(format!("{what}: [{rows}, {stride}] does not fit the address space"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A newer version of `lg_output`.
    #[repr(C)]
    #[derive(Clone, Copy)]
    struct Newer {
        old: lg_output,
        new: u64,
    }

    /// A structure that has grown.
    #[repr(C)]
    #[derive(Clone, Copy)]
    struct Grown {
        struct_size: usize,
        old: u64,
        new: u64,
    }

    // SAFETY: numbers, the size first.
    unsafe impl Versioned for Grown {
        const NAME: &str = "grown";
        const FIRST_BYTES: usize = 16;
    }

    #[test]
    fn unknown_fields_must_be_zero_and_missing_ones_read_as_zero() {
        let old = lg_output {
            struct_size: size_of::<Newer>(),
            output: ptr::null_mut(),
            output_stride: 7,
            output_type: LG_TYPE_F32,
        };
        let mut newer = Newer { old, new: 0 };
        // SAFETY: the structure has the bytes that it says.
        assert_eq!(unsafe { read((&raw const newer).cast::<lg_output>()) }.unwrap().output_stride, 7);
        newer.new = 1;
        // SAFETY: as above.
        assert!(unsafe { read((&raw const newer).cast::<lg_output>()) }.is_err());

        let older = [16usize, 5];
        // SAFETY: as above.
        let grown = unsafe { read(older.as_ptr().cast::<Grown>()) }.unwrap();
        assert_eq!((grown.old, grown.new), (5, 0));
        let too_short = [8usize, 5];
        // SAFETY: only the size is read.
        assert!(unsafe { read(too_short.as_ptr().cast::<Grown>()) }.is_err());
        // SAFETY: null is allowed.
        assert!(unsafe { read(ptr::null::<Grown>()) }.is_err());
    }
}
