//! The ops of `liquidgemm.torch` on CUDA tensors, as kernels that torch's dispatcher calls through its stable C interface,
//! so that a call runs no Python.
//!
//! The library is not linked with torch. `lg_torch_attach` receives the addresses of torch's functions.
//! `tensor.rs` has torch's tensors and arguments, and `ops.rs` the ops.

mod ops;
mod tensor;

use std::collections::HashMap;
use std::ffi::{CStr, c_void};
use std::sync::{LazyLock, Mutex, OnceLock, PoisonError, RwLock};

use liquidgemm::gpu::{Gpu, Workspace};

use crate::arguments::*;
use crate::gpu::{lg_gpu, lg_gpu_workspace};
use crate::launch::lg_stream;
use crate::status::{Failure, LG_OK, guard, lg_last_error_message, lg_status};
use ops::Outputs;
use tensor::{Arguments, Device, Torch};

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
    pub aoti_torch_zero_: *const c_void,
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

static TORCH: OnceLock<Torch> = OnceLock::new();

/// What the launches on one stream share.
struct Lane {
    gpu: &'static Gpu,
    workspace: &'static Workspace,
    /// Who holds it launches with the workspace's scratch memory: the second launch of a call reads what the first
    /// has written, so the calls of several threads take turns.
    turn: Mutex<()>,
}

/// The streams of all devices. They are kept, because captured graphs use their memory.
static LANES: LazyLock<RwLock<HashMap<(i32, usize), &'static Lane>>> = LazyLock::new(RwLock::default);

impl Lane {
    /// Returns that of torch's current stream, after it is made if this is the first call on the stream.
    fn current(torch: &Torch, device: Device) -> Result<(&'static Self, lg_stream), Failure> {
        let stream = torch.current_stream(device)?;
        let find = || {
            let lanes = LANES.read().unwrap_or_else(PoisonError::into_inner);
            lanes.get(&(device.index, stream.addr())).copied()
        };
        if let Some(lane) = find() {
            return Ok((lane, stream));
        }
        let mut message = [0_u8; MESSAGE_BYTES];
        // SAFETY: the message has place for that many bytes.
        let status =
            unsafe { (torch.make_stream)(device.index, stream, message.as_mut_ptr().cast(), MESSAGE_BYTES) };
        let lane = find().filter(|_| status == LG_OK).ok_or_else(|| {
            let text = CStr::from_bytes_until_nul(&message).unwrap_or_default();
            Failure::argument(text.to_string_lossy())
        });
        Ok((lane?, stream))
    }
}

/// Takes torch's functions, before the kernels below are registered. Later calls change nothing.
///
/// # Safety
/// The addresses are those of the functions that their names say, and stay so.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lg_torch_attach(functions: *const lg_torch_functions) -> lg_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointer and the addresses.
        let torch = unsafe { Torch::new(&read(functions)?)? };
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
            let (gpu, workspace) = (&handle("gpu", gpu)?.gpu, &handle("workspace", workspace)?.0);
            Lane { gpu, workspace, turn: Mutex::new(()) }
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
    unsafe { call(c"liquidgemm::linear", stack, [inputs, outputs], [8, 1], ops::linear) }
}

/// The kernel of the op `fused_linear`, as `lg_torch_linear`.
///
/// # Safety
/// As for `lg_torch_linear`.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn lg_torch_fused_linear(stack: *mut u64, inputs: u64, outputs: u64) {
    // SAFETY: as above.
    unsafe { call(c"liquidgemm::fused_linear", stack, [inputs, outputs], [14, 1], ops::fused_linear) }
}

/// The kernel of the op `quantize`, as `lg_torch_linear`.
///
/// # Safety
/// As for `lg_torch_linear`.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn lg_torch_quantize(stack: *mut u64, inputs: u64, outputs: u64) {
    // SAFETY: as above.
    unsafe { call(c"liquidgemm::quantize", stack, [inputs, outputs], [2, 2], ops::quantize) }
}

/// The kernel of the op `gemm`, as `lg_torch_linear`.
///
/// # Safety
/// As for `lg_torch_linear`.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn lg_torch_gemm(stack: *mut u64, inputs: u64, outputs: u64) {
    // SAFETY: as above.
    unsafe { call(c"liquidgemm::gemm", stack, [inputs, outputs], [8, 1], ops::gemm) }
}

/// The kernel of the op `grouped_linear`, as `lg_torch_linear`.
///
/// # Safety
/// As for `lg_torch_linear`.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn lg_torch_grouped_linear(stack: *mut u64, inputs: u64, outputs: u64) {
    // SAFETY: as above.
    unsafe { call(c"liquidgemm::grouped_linear", stack, [inputs, outputs], [11, 1], ops::grouped_linear) }
}

/// The kernel of the op `combine`, as `lg_torch_linear`.
///
/// # Safety
/// As for `lg_torch_linear`.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn lg_torch_combine(stack: *mut u64, inputs: u64, outputs: u64) {
    // SAFETY: as above.
    unsafe { call(c"liquidgemm::combine", stack, [inputs, outputs], [3, 1], ops::combine) }
}

/// An op: reads its arguments, all of which it owns then, and computes.
type Op = unsafe fn(&mut Arguments) -> Result<Outputs, Failure>;

/// Runs an op, or throws a C++ exception, which torch turns into a `RuntimeError`.
///
/// The frames from here to torch's may be unwound, and must have nothing to drop:
/// the library may be linked with an unwinder of its own, which C++'s exceptions do not pass through.
///
/// # Safety
/// The stack holds what `op` reads, and has place for the outputs.
unsafe fn call(name: &'static CStr, stack: *mut u64, found: [u64; 2], expected: [u64; 2], op: Op) {
    // SAFETY: the caller vouches for the stack.
    if unsafe { run(stack, found, expected, op) } != LG_OK
        && let Some(torch) = TORCH.get()
    {
        // SAFETY: all are texts, and the function copies them. Nothing in this frame waits to be dropped.
        unsafe { (torch.check_fail)(name.as_ptr(), c"liquidgemm".as_ptr(), 0, lg_last_error_message()) }
    }
}

/// Runs an op, and writes the outputs in the place of the arguments.
///
/// # Safety
/// As for [`call`].
#[inline(never)]
unsafe fn run(stack: *mut u64, found: [u64; 2], expected: [u64; 2], op: Op) -> lg_status {
    guard(|| {
        let torch = TORCH.get().ok_or_else(|| Failure::argument("lg_torch_attach was not called"))?;
        if found != expected {
            return Err(Failure::argument(format!(
                "the op has {found:?} arguments and results; the library's has {expected:?}; install both again"
            )));
        }
        // SAFETY: the caller vouches for the stack.
        unsafe {
            for (index, output) in
                op(&mut Arguments { torch, next: stack })?.into_iter().flatten().enumerate()
            {
                stack.add(index).write(output.into_value());
            }
        }
        Ok(())
    })
}
