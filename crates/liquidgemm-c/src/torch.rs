//! The ops `linear` and `fused_linear` of `liquidgemm.torch` on CUDA tensors: kernels that torch's dispatcher calls
//! through its stable C interface, so that a call runs no Python.
//!
//! The library is not linked with torch. `lg_torch_attach` receives the addresses of torch's functions.

use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_void};
use std::sync::{LazyLock, Mutex, OnceLock, PoisonError, RwLock};
use std::{mem, ptr, slice};

use liquidgemm::gpu::{DeviceSpan, DeviceWeights, Gpu, QuantizedSpan, StreamHandle, Workspace};

use crate::arguments::*;
use crate::gpu::{lg_gpu, lg_gpu_workspace};
use crate::launch::lg_stream;
use crate::status::{Failure, LG_OK, guard, lg_last_error_message, lg_status};

/// Among the types, which are the `LG_TYPE_…` constants otherwise: bytes.
const BYTES: lg_type = u32::MAX;
/// As above: a type that neither inputs nor outputs have.
const NO_TYPE: lg_type = u32::MAX - 1;
/// Bytes for the message of `lg_torch_functions.make_stream`.
const MESSAGE_BYTES: usize = 1024;

/// What the ops need of torch: addresses of functions under their names there, and the numbers of types.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct lg_torch_functions {
    /// `sizeof(lg_torch_functions)`.
    pub struct_size: usize,
    /// From libtorch.
    pub aoti_torch_get_data_ptr: *const c_void,
    /// From libtorch.
    pub aoti_torch_get_dim: *const c_void,
    /// From libtorch.
    pub aoti_torch_get_sizes: *const c_void,
    /// From libtorch.
    pub aoti_torch_get_numel: *const c_void,
    /// From libtorch.
    pub aoti_torch_get_dtype: *const c_void,
    /// From libtorch.
    pub aoti_torch_get_device_type: *const c_void,
    /// From libtorch.
    pub aoti_torch_get_device_index: *const c_void,
    /// From libtorch.
    pub aoti_torch_is_contiguous: *const c_void,
    /// From libtorch.
    pub aoti_torch_empty_strided: *const c_void,
    /// From libtorch.
    pub aoti_torch_delete_tensor_object: *const c_void,
    /// From libtorch.
    pub aoti_torch_get_current_cuda_stream: *const c_void,
    /// C++'s `operator delete(void *)`.
    pub operator_delete: *const c_void,
    /// `c10::detail::torchCheckFail(char const *, char const *, unsigned, char const *)`, which throws.
    pub torch_check_fail: *const c_void,
    /// `lg_status make_stream(int32_t device, lg_stream stream, char *message, size_t message_bytes)`:
    /// calls `lg_torch_add_stream` for a stream that a call is the first on, or writes why it can't.
    pub make_stream: *const c_void,
    /// What `aoti_torch_dtype_bfloat16` returns.
    pub dtype_bf16: i32,
    /// What `aoti_torch_dtype_float16` returns.
    pub dtype_f16: i32,
    /// What `aoti_torch_dtype_float32` returns.
    pub dtype_f32: i32,
    /// What `aoti_torch_dtype_int32` returns.
    pub dtype_i32: i32,
    /// What `aoti_torch_dtype_uint8` returns.
    pub dtype_u8: i32,
    /// What `aoti_torch_dtype_int8` returns.
    pub dtype_i8: i32,
    /// What `aoti_torch_dtype_int64` returns.
    pub dtype_i64: i32,
    /// What `aoti_torch_dtype_float64` returns.
    pub dtype_f64: i32,
}

// SAFETY: numbers and pointers, the size first.
unsafe impl Versioned for lg_torch_functions {
    const NAME: &str = "lg_torch_functions";
}

/// A tensor's address in torch. `AtenTensorHandle`.
type Handle = *mut c_void;
/// A function that writes a property of a tensor, and returns 0.
type Property<T> = unsafe extern "C" fn(Handle, *mut T) -> i32;

type EmptyStrided = unsafe extern "C" fn(i64, *const i64, *const i64, i32, i32, i32, *mut Handle) -> i32;
type MakeStream = unsafe extern "C" fn(i32, lg_stream, *mut c_char, usize) -> lg_status;
type CheckFail = unsafe extern "C-unwind" fn(*const c_char, *const c_char, u32, *const c_char) -> !;

/// torch's functions with their types.
struct Torch {
    data: Property<*const c_void>,
    dimensions: Property<i64>,
    sizes: Property<*const i64>,
    elements: Property<i64>,
    dtype: Property<i32>,
    device_type: Property<i32>,
    device_index: Property<i32>,
    is_contiguous: Property<bool>,
    empty_strided: EmptyStrided,
    delete_tensor: unsafe extern "C" fn(Handle) -> i32,
    current_stream: unsafe extern "C" fn(i32, *mut lg_stream) -> i32,
    delete: unsafe extern "C" fn(*mut c_void),
    check_fail: CheckFail,
    make_stream: MakeStream,
    /// torch's number of each type, its name in Python, and our number.
    types: [(i32, &'static str, lg_type); 8],
}

static TORCH: OnceLock<Torch> = OnceLock::new();

/// What the launches on one stream share. The second launch of a call reads the scratch memory that the first has
/// written, so the calls of several threads take turns.
struct Lane {
    gpu: &'static Gpu,
    workspace: &'static Workspace,
    /// Who holds it launches with the workspace's scratch memory.
    turn: Mutex<()>,
}

/// The streams of all devices. They are kept, because captured graphs use their memory.
static LANES: LazyLock<RwLock<HashMap<(i32, usize), &'static Lane>>> = LazyLock::new(RwLock::default);

/// Takes torch's functions, before the kernels below are registered. Later calls change nothing.
///
/// # Safety
/// The addresses are those of the functions that their names say, and stay so.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lg_torch_attach(functions: *const lg_torch_functions) -> lg_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointer.
        let from = unsafe { read(functions)? };
        /// # Safety
        /// The address is that of a function with the type `F`.
        unsafe fn function<F: Copy>(name: &str, address: *const c_void) -> Result<F, Failure> {
            const { assert!(size_of::<F>() == size_of::<*const c_void>()) };
            check_pointer(name, address.cast::<u8>())?;
            // SAFETY: a function's address, by the caller's word.
            Ok(unsafe { mem::transmute_copy(&address) })
        }
        // SAFETY: the caller vouches for the addresses.
        let torch = unsafe {
            Torch {
                data: function("aoti_torch_get_data_ptr", from.aoti_torch_get_data_ptr)?,
                dimensions: function("aoti_torch_get_dim", from.aoti_torch_get_dim)?,
                sizes: function("aoti_torch_get_sizes", from.aoti_torch_get_sizes)?,
                elements: function("aoti_torch_get_numel", from.aoti_torch_get_numel)?,
                dtype: function("aoti_torch_get_dtype", from.aoti_torch_get_dtype)?,
                device_type: function("aoti_torch_get_device_type", from.aoti_torch_get_device_type)?,
                device_index: function("aoti_torch_get_device_index", from.aoti_torch_get_device_index)?,
                is_contiguous: function("aoti_torch_is_contiguous", from.aoti_torch_is_contiguous)?,
                empty_strided: function("aoti_torch_empty_strided", from.aoti_torch_empty_strided)?,
                delete_tensor: function(
                    "aoti_torch_delete_tensor_object",
                    from.aoti_torch_delete_tensor_object,
                )?,
                current_stream: function(
                    "aoti_torch_get_current_cuda_stream",
                    from.aoti_torch_get_current_cuda_stream,
                )?,
                delete: function("operator_delete", from.operator_delete)?,
                check_fail: function("torch_check_fail", from.torch_check_fail)?,
                make_stream: function("make_stream", from.make_stream)?,
                types: [
                    (from.dtype_bf16, "torch.bfloat16", LG_TYPE_BF16),
                    (from.dtype_f16, "torch.float16", LG_TYPE_F16),
                    (from.dtype_f32, "torch.float32", LG_TYPE_F32),
                    (from.dtype_i32, "torch.int32", LG_TYPE_I32),
                    (from.dtype_u8, "torch.uint8", BYTES),
                    (from.dtype_i8, "torch.int8", NO_TYPE),
                    (from.dtype_i64, "torch.int64", NO_TYPE),
                    (from.dtype_f64, "torch.float64", NO_TYPE),
                ],
            }
        };
        let _ = TORCH.set(torch);
        Ok(())
    })
}

/// Sets what the ops use on a stream of a device: the GPU, and a workspace.
///
/// # Safety
/// The handles live as long as the program. Only launches on this stream use the workspace, which belongs to the
/// GPU's context.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lg_torch_add_stream(
    device: i32,
    stream: lg_stream,
    gpu: *const lg_gpu,
    workspace: *const lg_gpu_workspace,
) -> lg_status {
    guard(|| {
        // SAFETY: the caller vouches for the handles.
        let lane = unsafe {
            Lane {
                gpu: &handle("gpu", gpu)?.gpu,
                workspace: &handle("workspace", workspace)?.0,
                turn: Mutex::new(()),
            }
        };
        let mut lanes = LANES.write().unwrap_or_else(PoisonError::into_inner);
        lanes.insert((device, stream.addr()), Box::leak(Box::new(lane)));
        Ok(())
    })
}

/// The kernel of the op `linear`, for `torch_library_impl`. It throws a C++ exception for wrong arguments.
///
/// # Safety
/// Only torch's dispatcher calls it, for the schema of `liquidgemm.torch`, after `lg_torch_attach`.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn lg_torch_linear(stack: *mut u64, inputs: u64, outputs: u64) {
    // SAFETY: the dispatcher's arguments are those of the schema.
    if unsafe { run(stack, [inputs, outputs], [8, 1], Call::linear) } != LG_OK {
        // SAFETY: nothing in this frame waits to be dropped.
        unsafe { throw(c"liquidgemm::linear") }
    }
}

/// The kernel of the op `fused_linear`, for `torch_library_impl`. It throws a C++ exception for wrong arguments.
///
/// # Safety
/// As for `lg_torch_linear`.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn lg_torch_fused_linear(stack: *mut u64, inputs: u64, outputs: u64) {
    // SAFETY: as above.
    if unsafe { run(stack, [inputs, outputs], [14, 1], Call::fused_linear) } != LG_OK {
        // SAFETY: as above.
        unsafe { throw(c"liquidgemm::fused_linear") }
    }
}

/// Throws the last error of this thread as a C++ exception, which torch turns into a `RuntimeError`.
///
/// # Safety
/// The frames from here to torch's may be unwound, and drop nothing then:
/// the library may be linked with an unwinder of its own, which C++'s exceptions do not pass through.
#[inline(never)]
unsafe fn throw(name: &'static CStr) {
    if let Some(torch) = TORCH.get() {
        // SAFETY: all are texts, and the function copies them.
        unsafe { (torch.check_fail)(name.as_ptr(), c"liquidgemm".as_ptr(), 0, lg_last_error_message()) }
    }
}

/// Reads the arguments of a call, computes it, and writes the output in their place.
///
/// # Safety
/// The stack holds what `read` reads, and has place for the output.
#[inline(never)]
unsafe fn run(
    stack: *mut u64,
    found: [u64; 2],
    expected: [u64; 2],
    read: unsafe fn(&mut Arguments) -> Call<'static>,
) -> lg_status {
    guard(|| {
        let torch = TORCH.get().ok_or_else(|| Failure::argument("lg_torch_attach was not called"))?;
        if found != expected {
            return Err(Failure::argument(format!(
                "the op has {found:?} arguments and results; the library's has {expected:?}; install both again"
            )));
        }
        // SAFETY: the caller vouches for the stack.
        unsafe {
            let call = read(&mut Arguments { torch, next: stack });
            let output = call.forward(torch)?;
            stack.write(output.into_handle() as u64);
        }
        Ok(())
    })
}

/// The arguments on a dispatcher's stack, which the callee owns.
struct Arguments {
    torch: &'static Torch,
    next: *const u64,
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
    unsafe fn tensor(&mut self) -> Tensor<'static> {
        // SAFETY: the caller vouches for it.
        Tensor::new(self.torch, unsafe { self.value() })
    }

    /// # Safety
    /// The next value is a tensor that may be absent.
    unsafe fn optional_tensor(&mut self) -> Option<Tensor<'static>> {
        // SAFETY: the caller vouches for it.
        unsafe { self.optional() }.map(|value| Tensor::new(self.torch, value))
    }

    /// # Safety
    /// The next value is an integer.
    unsafe fn integer(&mut self) -> i64 {
        // SAFETY: the caller vouches for it.
        unsafe { self.value() }.cast_signed()
    }

    /// # Safety
    /// The next value is a type that may be absent.
    unsafe fn optional_dtype(&mut self) -> Option<i32> {
        // SAFETY: the caller vouches for it.
        unsafe { self.optional() }.map(|value| value as i32)
    }
}

/// A reference to a tensor.
struct Tensor<'a> {
    torch: &'a Torch,
    handle: Handle,
}

impl Drop for Tensor<'_> {
    fn drop(&mut self) {
        // An error cannot be handled here.
        // SAFETY: the handle is owned.
        let _ = unsafe { (self.torch.delete_tensor)(self.handle) };
    }
}

impl<'a> Tensor<'a> {
    fn new(torch: &'a Torch, value: u64) -> Self {
        Self { torch, handle: ptr::with_exposed_provenance_mut(value as usize) }
    }

    /// Allocates a tensor whose elements lie behind one another.
    fn empty(torch: &'a Torch, sizes: &[i64], dtype: i32, device: Device) -> Result<Self, Failure> {
        let mut strides = vec![1; sizes.len()];
        for i in (1..sizes.len()).rev() {
            strides[i - 1] = strides[i] * sizes[i].max(1);
        }
        let mut handle = ptr::null_mut();
        let dimensions = sizes.len() as i64;
        // SAFETY: the arrays have that many elements.
        let status = unsafe {
            let (sizes, strides) = (sizes.as_ptr(), strides.as_ptr());
            (torch.empty_strided)(dimensions, sizes, strides, dtype, device.kind, device.index, &mut handle)
        };
        if status != 0 {
            return Err(Failure::argument(format!(
                "torch cannot allocate a tensor of {sizes:?}; stderr has its message"
            )));
        }
        Ok(Self { torch, handle })
    }

    /// Returns the handle, which the caller owns then.
    fn into_handle(self) -> usize {
        mem::ManuallyDrop::new(self).handle.expose_provenance()
    }

    fn property<T: Copy>(&self, property: Property<T>, none: T) -> Result<T, Failure> {
        let mut value = none;
        // SAFETY: the handle is a tensor, and the function writes this type.
        match unsafe { property(self.handle, &mut value) } {
            0 => Ok(value),
            _ => Err(Failure::argument("torch does not tell a tensor's properties; stderr has its message")),
        }
    }

    fn data(&self) -> Result<*const c_void, Failure> {
        self.property(self.torch.data, ptr::null())
    }

    fn dtype(&self) -> Result<i32, Failure> {
        self.property(self.torch.dtype, 0)
    }

    fn elements(&self) -> Result<usize, Failure> {
        Ok(usize::try_from(self.property(self.torch.elements, 0)?).unwrap_or_default())
    }

    fn is_contiguous(&self) -> Result<bool, Failure> {
        self.property(self.torch.is_contiguous, false)
    }

    fn device(&self) -> Result<Device, Failure> {
        let kind = self.property(self.torch.device_type, 0)?;
        Ok(Device { kind, index: self.property(self.torch.device_index, 0)? })
    }

    fn sizes(&self) -> Result<&[i64], Failure> {
        let dimensions = self.property(self.torch.dimensions, 0)?;
        let sizes = self.property(self.torch.sizes, ptr::null())?;
        // SAFETY: the tensor has this many sizes, and keeps them as long as it lives.
        Ok(unsafe { if dimensions == 0 { &[] } else { slice::from_raw_parts(sizes, dimensions as usize) } })
    }

    /// Fails unless the tensor has this type, this device, this many elements, and they lie behind one another.
    fn check(&self, what: &str, dtype: i32, device: Device, elements: usize) -> Result<(), Failure> {
        let torch = self.torch;
        let refuse = |message: String| Err(Failure::argument(message));
        if self.dtype()? != dtype {
            let (found, needed) = (torch.type_name(self.dtype()?), torch.type_name(dtype));
            return refuse(format!("{what} has the type {found}; it must be {needed}"));
        }
        if self.device()? != device {
            let found = self.device()?;
            return refuse(format!("{what} is on {found}, but the input is on {device}; move one of them"));
        }
        if self.elements()? != elements {
            return refuse(format!("{what} has {} elements; it must have {elements}", self.elements()?));
        }
        if !self.is_contiguous()? {
            return refuse(format!("{what} is not contiguous; call .contiguous()"));
        }
        Ok(())
    }
}

/// A device by torch's numbers.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Device {
    kind: i32,
    index: i32,
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.kind {
            0 => f.write_str("cpu"),
            1 => write!(f, "cuda:{}", self.index),
            other => write!(f, "a device of type {other}"),
        }
    }
}

impl Torch {
    /// Returns the name of a type in Python.
    fn type_name(&self, dtype: i32) -> String {
        let known = self.types.iter().find(|(number, ..)| *number == dtype);
        known.map_or_else(|| format!("number {dtype}"), |(_, name, _)| (*name).to_owned())
    }

    /// Returns torch's number of a type, by ours. `BYTES` stands for bytes.
    fn number(&self, ours: lg_type) -> i32 {
        self.types.iter().find(|(.., known)| *known == ours).map_or(-1, |(number, ..)| *number)
    }

    /// Returns our number of a type that inputs or outputs have.
    fn element_type(&self, dtype: i32) -> Option<lg_type> {
        let known = self.types.iter().find(|(number, _, ours)| *number == dtype && *ours < NO_TYPE);
        known.map(|(.., ours)| *ours)
    }

    /// Returns what a stream's launches share, after it is made if this is the first call on the stream.
    fn lane(&self, device: i32, stream: lg_stream) -> Result<&'static Lane, Failure> {
        let find = || {
            let lanes = LANES.read().unwrap_or_else(PoisonError::into_inner);
            lanes.get(&(device, stream.addr())).copied()
        };
        if let Some(lane) = find() {
            return Ok(lane);
        }
        let mut message = [0_u8; MESSAGE_BYTES];
        // SAFETY: the message has place for that many bytes.
        let status =
            unsafe { (self.make_stream)(device, stream, message.as_mut_ptr().cast(), MESSAGE_BYTES) };
        find().filter(|_| status == LG_OK).ok_or_else(|| {
            let text = CStr::from_bytes_until_nul(&message).unwrap_or_default();
            Failure::argument(text.to_string_lossy())
        })
    }
}

/// A call of an op.
struct Call<'a> {
    x: Tensor<'a>,
    packed: Tensor<'a>,
    bias: Option<Tensor<'a>>,
    smoothing: Option<Tensor<'a>>,
    shape: [i64; 3],
    operation: i64,
    norm_weight: Option<Tensor<'a>>,
    norm_bias: Option<Tensor<'a>>,
    epsilon: f64,
    interleaved: bool,
    residual: Option<Tensor<'a>>,
    dtype: Option<i32>,
}

impl Call<'static> {
    /// Reads the arguments of `linear`.
    ///
    /// # Safety
    /// They are on the stack.
    unsafe fn linear(arguments: &mut Arguments) -> Self {
        // SAFETY: the arguments have these types in this order.
        unsafe {
            Self {
                x: arguments.tensor(),
                packed: arguments.tensor(),
                bias: arguments.optional_tensor(),
                smoothing: arguments.optional_tensor(),
                shape: [arguments.integer(), arguments.integer(), arguments.integer()],
                operation: LG_OPERATION_PLAIN.into(),
                norm_weight: None,
                norm_bias: None,
                epsilon: 0.0,
                interleaved: false,
                residual: None,
                dtype: arguments.optional_dtype(),
            }
        }
    }

    /// Reads the arguments of `fused_linear`.
    ///
    /// # Safety
    /// They are on the stack.
    unsafe fn fused_linear(arguments: &mut Arguments) -> Self {
        // SAFETY: the arguments have these types in this order.
        unsafe {
            Self {
                x: arguments.tensor(),
                packed: arguments.tensor(),
                bias: arguments.optional_tensor(),
                smoothing: arguments.optional_tensor(),
                shape: [arguments.integer(), arguments.integer(), arguments.integer()],
                operation: arguments.integer(),
                norm_weight: arguments.optional_tensor(),
                norm_bias: arguments.optional_tensor(),
                epsilon: f64::from_bits(arguments.value()),
                interleaved: arguments.value() as u8 != 0,
                residual: arguments.optional_tensor(),
                dtype: arguments.optional_dtype(),
            }
        }
    }
}

impl<'a> Call<'a> {
    /// Checks the call, launches it on torch's current stream, and returns the output.
    fn forward(&self, torch: &'a Torch) -> Result<Tensor<'a>, Failure> {
        let refuse = |message: String| Err(Failure::argument(message));
        let x = &self.x;
        let (dtype, device, sizes) = (x.dtype()?, x.device()?, x.sizes()?);
        let input_type = match torch.element_type(dtype) {
            Some(half @ (LG_TYPE_BF16 | LG_TYPE_F16)) => half,
            _ => {
                let found = torch.type_name(dtype);
                return refuse(format!(
                    "the input has the type {found}; use torch.bfloat16 or torch.float16"
                ));
            }
        };
        let Some((&columns, outer)) = sizes.split_last() else {
            return refuse("the input has no dimensions; it must be [..., k]".to_owned());
        };
        if !x.is_contiguous()? {
            return refuse(format!("the input, {sizes:?}, is not contiguous; call .contiguous()"));
        }
        let operation = lg_operation::try_from(self.operation).unwrap_or(lg_operation::MAX);
        self.check_operation(operation, columns as usize, dtype, device)?;
        if self.shape.iter().any(|&value| value < 0) {
            let [n, k, group] = self.shape;
            return refuse(format!("n, k and group are {n}, {k} and {group}; none of them may be negative"));
        }
        let [n, k, group] = self.shape.map(|value| value as usize);
        let needed = match operation {
            LG_OPERATION_SILU_MUL | LG_OPERATION_GELU_TANH_MUL => k.saturating_mul(2),
            _ => k,
        };
        if columns as usize != needed {
            return refuse(format!(
                "the input, {sizes:?}, has {columns} columns; with k = {k} it must have {needed}"
            ));
        }
        let packed_bytes = DeviceWeights::bytes_for(n, k, group_of(group))?;
        self.packed.check("packed", torch.number(BYTES), device, packed_bytes)?;
        let vector = |what, tensor: &Option<Tensor>, length| -> Result<Option<DeviceSpan>, Failure> {
            let Some(tensor) = tensor else { return Ok(None) };
            tensor.check(what, torch.number(LG_TYPE_F32), device, length)?;
            Ok(device_or_none(tensor.data()?))
        };
        let bias = vector("bias", &self.bias, n)?;
        let smoothing = vector("smoothing", &self.smoothing, k)?;
        let output_dtype = self.dtype.unwrap_or(dtype);
        let Some(output_type) = torch.element_type(output_dtype) else {
            let found = torch.type_name(output_dtype);
            return refuse(format!(
                "the output's type is {found}; use torch.bfloat16, torch.float16, torch.float32 or torch.int32"
            ));
        };
        let m = x.elements()? / needed.max(1);
        let output_sizes: Vec<i64> = outer.iter().copied().chain([n as i64]).collect();
        let output = Tensor::empty(torch, &output_sizes, output_dtype, device)?;
        if m == 0 {
            return Ok(output);
        }
        let address = |tensor: &Option<Tensor>| tensor.as_ref().map_or(Ok(ptr::null()), Tensor::data);
        let input = lg_input {
            struct_size: size_of::<lg_input>(),
            m,
            k,
            operation,
            input_type,
            input: x.data()?,
            input_stride: 0,
            residual: address(&self.residual)?.cast_mut(),
            residual_stride: 0,
            norm_weight: address(&self.norm_weight)?,
            norm_bias: address(&self.norm_bias)?,
            epsilon: self.epsilon as f32,
            gate_order: self.interleaved.into(),
            gather: ptr::null(),
            gather_input_rows: 0,
            smoothing: ptr::null(),
            scaling: LG_SCALING_PER_TOKEN,
            static_scale: 0.0,
            given_scales: ptr::null(),
        };
        let result = lg_output {
            struct_size: size_of::<lg_output>(),
            output: output.data()?.cast_mut(),
            output_stride: 0,
            output_type,
        };
        let mut stream = ptr::null_mut();
        // SAFETY: the argument is valid for a write.
        if unsafe { (torch.current_stream)(device.index, &mut stream) } != 0 {
            return refuse(format!("torch does not tell the current stream of {device}"));
        }
        let lane = torch.lane(device.index, stream)?;
        let scratch_bytes = QuantizedSpan::bytes(m, k)?;
        // The workspace's, until both launches of the call are on the stream,
        // or memory that torch gives to later launches on this stream only.
        let (_turn, own);
        let scratch = if scratch_bytes <= lane.workspace.scratch().bytes() {
            _turn = lane.turn.lock().unwrap_or_else(PoisonError::into_inner);
            lane.workspace.scratch()
        } else {
            own = Tensor::empty(torch, &[scratch_bytes as i64], torch.number(BYTES), device)?;
            device_bytes(own.data()?, scratch_bytes)
        };
        // SAFETY: the tensors live until the launches are on the stream, after which torch orders what uses their
        // memory behind them. The sizes, types and devices are checked. The lane's parts live as long as the program.
        unsafe {
            let memory = device_bytes(self.packed.data()?, packed_bytes);
            let weights = lane.gpu.weights_in(memory, [n, k], group_of(group))?;
            let linear = lane.gpu.linear_of(weights, bias, smoothing)?;
            let stream = StreamHandle::from_raw(stream);
            linear.forward(
                lane.gpu,
                &input.on_device()?,
                &result.on_device(m, n)?,
                scratch,
                lane.workspace,
                stream,
            )?;
        }
        Ok(output)
    }

    /// Fails unless the operands of an operation are there, and no others.
    fn check_operation(
        &self,
        operation: lg_operation,
        columns: usize,
        dtype: i32,
        device: Device,
    ) -> Result<(), Failure> {
        let refuse = |message: &str| Err(Failure::argument(message));
        let vectors = [("norm_weight", &self.norm_weight), ("norm_bias", &self.norm_bias)];
        match operation {
            LG_OPERATION_RMS_NORM | LG_OPERATION_LAYER_NORM => {
                if self.norm_weight.is_none() {
                    return refuse("a norm needs norm_weight");
                }
                for (what, vector) in vectors {
                    vector.as_ref().map_or(Ok(()), |vector| vector.check(what, dtype, device, columns))?;
                }
            }
            LG_OPERATION_PLAIN | LG_OPERATION_SILU_MUL | LG_OPERATION_GELU_TANH_MUL => {
                if vectors.iter().any(|(_, vector)| vector.is_some()) || self.residual.is_some() {
                    return refuse("norm_weight, norm_bias and residual go with a norm; leave them out");
                }
            }
            _ => {
                let found = self.operation;
                return refuse(&format!("operation is {found}; use liquidgemm.torch.OPERATIONS"));
            }
        }
        let elements = self.x.elements()?;
        self.residual.as_ref().map_or(Ok(()), |residual| residual.check("residual", dtype, device, elements))
    }
}
