//! Tensors and arguments of torch's stable C interface.

use std::ffi::{c_char, c_void};
use std::{fmt, mem, ptr, slice};

use liquidgemm::gpu::DeviceSpan;

use super::lg_torch_functions;
use crate::arguments::*;
use crate::launch::lg_stream;
use crate::status::{Failure, lg_status};

/// A tensor's address in torch. `AtenTensorHandle`.
type Handle = *mut c_void;
/// A function that writes a property of a tensor, and returns 0.
type Property<T> = unsafe extern "C" fn(Handle, *mut T) -> i32;

type EmptyStrided = unsafe extern "C" fn(i64, *const i64, *const i64, i32, i32, i32, *mut Handle) -> i32;
type MakeStream = unsafe extern "C" fn(i32, lg_stream, *mut c_char, usize) -> lg_status;
type CheckFail = unsafe extern "C-unwind" fn(*const c_char, *const c_char, u32, *const c_char) -> !;

/// An element type.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Type {
    Bf16,
    F16,
    F32,
    I32,
    U8,
    I8,
    I64,
    F64,
    /// Any other, by torch's number.
    Other(i32),
}

impl Type {
    /// All that have a name here.
    const NAMED: [Self; 8] =
        [Self::Bf16, Self::F16, Self::F32, Self::I32, Self::U8, Self::I8, Self::I64, Self::F64];

    /// Returns the number of a type that outputs have.
    pub(super) fn of_output(self) -> Result<lg_type, Failure> {
        match self {
            Self::Bf16 => Ok(LG_TYPE_BF16),
            Self::F16 => Ok(LG_TYPE_F16),
            Self::F32 => Ok(LG_TYPE_F32),
            Self::I32 => Ok(LG_TYPE_I32),
            _ => Err(Failure::argument(format!(
                "the output's type is {self}; use torch.bfloat16, torch.float16, torch.float32 or torch.int32"
            ))),
        }
    }
}

impl fmt::Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bf16 => "torch.bfloat16",
            Self::F16 => "torch.float16",
            Self::F32 => "torch.float32",
            Self::I32 => "torch.int32",
            Self::U8 => "torch.uint8",
            Self::I8 => "torch.int8",
            Self::I64 => "torch.int64",
            Self::F64 => "torch.float64",
            Self::Other(number) => return write!(f, "number {number} of torch's types"),
        })
    }
}

/// A device by torch's numbers.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Device {
    kind: i32,
    pub(super) index: i32,
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            0 => f.write_str("cpu"),
            1 => write!(f, "cuda:{}", self.index),
            other => write!(f, "a device of type {other}"),
        }
    }
}

/// torch's functions with their types.
pub(super) struct Torch {
    data: Property<*const c_void>,
    dimensions: Property<i64>,
    sizes: Property<*const i64>,
    elements: Property<i64>,
    dtype: Property<i32>,
    device_type: Property<i32>,
    device_index: Property<i32>,
    is_contiguous: Property<bool>,
    empty_strided: EmptyStrided,
    zero: unsafe extern "C" fn(Handle) -> i32,
    delete_tensor: unsafe extern "C" fn(Handle) -> i32,
    current_stream: unsafe extern "C" fn(i32, *mut lg_stream) -> i32,
    delete: unsafe extern "C" fn(*mut c_void),
    pub(super) check_fail: CheckFail,
    pub(super) make_stream: MakeStream,
    /// torch's numbers of [`Type::NAMED`].
    numbers: [i32; Type::NAMED.len()],
}

/// Returns a function by its address.
///
/// # Safety
/// The address is that of a function with the type `F`.
unsafe fn function<F: Copy>(name: &str, address: *const c_void) -> Result<F, Failure> {
    const { assert!(size_of::<F>() == size_of::<*const c_void>()) };
    check_pointer(name, address.cast::<u8>())?;
    // SAFETY: a function's address, by the caller's word.
    Ok(unsafe { mem::transmute_copy(&address) })
}

impl Torch {
    /// # Safety
    /// The addresses are those of the functions that their names say, and stay so.
    pub(super) unsafe fn new(from: &lg_torch_functions) -> Result<Self, Failure> {
        macro_rules! get {
            ($name:ident) => {
                function(stringify!($name), from.$name)?
            };
        }
        // SAFETY: the caller vouches for the addresses.
        unsafe {
            Ok(Self {
                data: get!(aoti_torch_get_data_ptr),
                dimensions: get!(aoti_torch_get_dim),
                sizes: get!(aoti_torch_get_sizes),
                elements: get!(aoti_torch_get_numel),
                dtype: get!(aoti_torch_get_dtype),
                device_type: get!(aoti_torch_get_device_type),
                device_index: get!(aoti_torch_get_device_index),
                is_contiguous: get!(aoti_torch_is_contiguous),
                empty_strided: get!(aoti_torch_empty_strided),
                zero: get!(aoti_torch_zero_),
                delete_tensor: get!(aoti_torch_delete_tensor_object),
                current_stream: get!(aoti_torch_get_current_cuda_stream),
                delete: get!(operator_delete),
                check_fail: get!(torch_check_fail),
                make_stream: get!(make_stream),
                numbers: [
                    from.dtype_bf16,
                    from.dtype_f16,
                    from.dtype_f32,
                    from.dtype_i32,
                    from.dtype_u8,
                    from.dtype_i8,
                    from.dtype_i64,
                    from.dtype_f64,
                ],
            })
        }
    }

    fn type_of(&self, number: i32) -> Type {
        let index = self.numbers.iter().position(|&known| known == number);
        index.map_or(Type::Other(number), |index| Type::NAMED[index])
    }

    fn number(&self, wanted: Type) -> i32 {
        match wanted {
            Type::Other(number) => number,
            named => self.numbers[Type::NAMED.iter().position(|&t| t == named).unwrap_or_default()],
        }
    }

    /// Returns torch's current stream of a device.
    pub(super) fn current_stream(&self, device: Device) -> Result<lg_stream, Failure> {
        let mut stream = ptr::null_mut();
        // SAFETY: the argument is valid for a write.
        match unsafe { (self.current_stream)(device.index, &mut stream) } {
            0 => Ok(stream),
            _ => Err(Failure::argument(format!("torch does not tell the current stream of {device}"))),
        }
    }
}

/// A reference to a tensor.
pub(super) struct Tensor {
    torch: &'static Torch,
    handle: Handle,
}

impl Drop for Tensor {
    fn drop(&mut self) {
        // An error cannot be handled here.
        // SAFETY: the handle is owned.
        let _ = unsafe { (self.torch.delete_tensor)(self.handle) };
    }
}

impl Tensor {
    fn new(torch: &'static Torch, value: u64) -> Self {
        Self { torch, handle: ptr::with_exposed_provenance_mut(value as usize) }
    }

    /// Allocates a tensor whose elements lie behind one another.
    pub(super) fn empty(
        torch: &'static Torch,
        sizes: &[usize],
        dtype: Type,
        device: Device,
    ) -> Result<Self, Failure> {
        let sizes: Vec<i64> = sizes.iter().map(|&size| size as i64).collect();
        let mut strides = vec![1_i64; sizes.len()];
        for i in (1..sizes.len()).rev() {
            strides[i - 1] = strides[i].saturating_mul(sizes[i].max(1));
        }
        let mut handle = ptr::null_mut();
        // SAFETY: the arrays have as many elements as the tensor has dimensions.
        let status = unsafe {
            (torch.empty_strided)(
                sizes.len() as i64,
                sizes.as_ptr(),
                strides.as_ptr(),
                torch.number(dtype),
                device.kind,
                device.index,
                &mut handle,
            )
        };
        if status != 0 {
            return Err(Failure::argument(format!(
                "torch cannot allocate a tensor {sizes:?} of {dtype} on {device}; stderr has its message"
            )));
        }
        Ok(Self { torch, handle })
    }

    /// Sets all elements to zero, on the current stream.
    pub(super) fn zero(&self) -> Result<(), Failure> {
        // SAFETY: the handle is a tensor.
        match unsafe { (self.torch.zero)(self.handle) } {
            0 => Ok(()),
            _ => Err(Failure::argument("torch cannot zero a tensor; stderr has its message")),
        }
    }

    /// Returns the handle as a value of the dispatcher's stack, which owns it then.
    pub(super) fn into_value(self) -> u64 {
        mem::ManuallyDrop::new(self).handle.expose_provenance() as u64
    }

    fn property<T: Copy>(&self, property: Property<T>, none: T) -> Result<T, Failure> {
        let mut value = none;
        // SAFETY: the handle is a tensor, and the function writes this type.
        match unsafe { property(self.handle, &mut value) } {
            0 => Ok(value),
            _ => Err(Failure::argument("torch does not tell a tensor's properties; stderr has its message")),
        }
    }

    pub(super) fn data(&self) -> Result<*mut c_void, Failure> {
        Ok(self.property(self.torch.data, ptr::null())?.cast_mut())
    }

    pub(super) fn dtype(&self) -> Result<Type, Failure> {
        Ok(self.torch.type_of(self.property(self.torch.dtype, 0)?))
    }

    pub(super) fn elements(&self) -> Result<usize, Failure> {
        Ok(usize::try_from(self.property(self.torch.elements, 0)?).unwrap_or_default())
    }

    pub(super) fn is_contiguous(&self) -> Result<bool, Failure> {
        self.property(self.torch.is_contiguous, false)
    }

    pub(super) fn device(&self) -> Result<Device, Failure> {
        let kind = self.property(self.torch.device_type, 0)?;
        Ok(Device { kind, index: self.property(self.torch.device_index, 0)? })
    }

    /// Returns the sizes, of which there may be none.
    pub(super) fn sizes(&self) -> Result<Vec<usize>, Failure> {
        let dimensions = self.property(self.torch.dimensions, 0)?;
        let sizes = self.property(self.torch.sizes, ptr::null())?;
        if dimensions == 0 {
            return Ok(Vec::new());
        }
        // SAFETY: the tensor has this many sizes, and keeps them as long as it lives.
        let sizes = unsafe { slice::from_raw_parts(sizes, dimensions as usize) };
        Ok(sizes.iter().map(|&size| size as usize).collect())
    }

    /// Fails unless the tensor has this type, this device, this many elements, and they lie behind one another.
    /// Returns its memory.
    pub(super) fn check(
        &self,
        what: &str,
        dtype: Type,
        device: Device,
        elements: usize,
    ) -> Result<*mut c_void, Failure> {
        let refuse = |message: String| Err(Failure::argument(message));
        let found = self.dtype()?;
        if found != dtype {
            return refuse(format!("{what} has the type {found}; it must be {dtype}"));
        }
        let found = self.device()?;
        if found != device {
            return refuse(format!("{what} is on {found}, but the input is on {device}; move one of them"));
        }
        let found = self.elements()?;
        if found != elements {
            return refuse(format!("{what} has {found} elements; it must have {elements}"));
        }
        if !self.is_contiguous()? {
            return refuse(format!("{what} is not contiguous; call .contiguous()"));
        }
        self.data()
    }
}

/// Checks a tensor if it is given, and returns its memory, or null.
pub(super) fn check_given(
    what: &str,
    tensor: &Option<Tensor>,
    dtype: Type,
    device: Device,
    elements: usize,
) -> Result<*mut c_void, Failure> {
    tensor.as_ref().map_or(Ok(ptr::null_mut()), |tensor| tensor.check(what, dtype, device, elements))
}

/// Returns the memory of a vector that may be absent.
pub(super) fn span(address: *mut c_void) -> Option<DeviceSpan> {
    device_or_none(address.cast_const())
}

/// The arguments on a dispatcher's stack, which the callee owns.
pub(super) struct Arguments {
    pub(super) torch: &'static Torch,
    pub(super) next: *const u64,
}

impl Arguments {
    /// # Safety
    /// The stack has one more value.
    unsafe fn value(&mut self) -> u64 {
        // SAFETY: the caller vouches for it.
        unsafe {
            let value = self.next.read();
            self.next = self.next.add(1);
            value
        }
    }

    /// Reads a value that may be absent: the address of a value that C++'s `new` has made, or null.
    ///
    /// # Safety
    /// The next value is such an address.
    unsafe fn optional(&mut self) -> Option<u64> {
        // SAFETY: the caller vouches for it.
        unsafe {
            let address = ptr::with_exposed_provenance_mut::<u64>(self.value() as usize);
            if address.is_null() {
                return None;
            }
            let value = address.read();
            (self.torch.delete)(address.cast());
            Some(value)
        }
    }

    /// # Safety
    /// The next value is a tensor.
    pub(super) unsafe fn tensor(&mut self) -> Tensor {
        // SAFETY: the caller vouches for it.
        Tensor::new(self.torch, unsafe { self.value() })
    }

    /// # Safety
    /// The next value is a tensor that may be absent.
    pub(super) unsafe fn optional_tensor(&mut self) -> Option<Tensor> {
        // SAFETY: the caller vouches for it.
        unsafe { self.optional() }.map(|value| Tensor::new(self.torch, value))
    }

    /// # Safety
    /// The next value is an integer.
    pub(super) unsafe fn integer(&mut self) -> i64 {
        // SAFETY: the caller vouches for it.
        unsafe { self.value() }.cast_signed()
    }

    /// # Safety
    /// The next value is a float.
    pub(super) unsafe fn float(&mut self) -> f64 {
        // SAFETY: the caller vouches for it.
        f64::from_bits(unsafe { self.value() })
    }

    /// # Safety
    /// The next value is a bool.
    pub(super) unsafe fn boolean(&mut self) -> bool {
        // SAFETY: the caller vouches for it.
        unsafe { self.value() as u8 != 0 }
    }

    /// # Safety
    /// The next value is a type.
    pub(super) unsafe fn dtype(&mut self) -> Type {
        // SAFETY: the caller vouches for it.
        self.torch.type_of(unsafe { self.value() } as i32)
    }

    /// # Safety
    /// The next value is a type that may be absent.
    pub(super) unsafe fn optional_dtype(&mut self) -> Option<Type> {
        // SAFETY: the caller vouches for it.
        unsafe { self.optional() }.map(|value| self.torch.type_of(value as i32))
    }
}
