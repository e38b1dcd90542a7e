//! The GPU, and what lives on it: weights, layers, experts, workspaces and plans.

use std::ffi::{CString, c_char, c_void};
use std::ptr;

use liquidgemm::gpu::{DeviceExperts, DeviceLinear, DeviceWeights, Gpu, Workspace};
use liquidgemm::{Plan, Problem};

use crate::arguments::*;
use crate::layers::{lg_experts, lg_linear};
use crate::status::{Failure, guard, lg_status};
use crate::weights::lg_weights;

/// A Hopper GPU with its context, compiled kernels and plans. Any number of threads may use it at the same time.
#[derive(Debug)]
pub struct lg_gpu {
    pub(crate) gpu: Gpu,
    name: CString,
}

/// Packed weights in device memory. They may outlive their `lg_gpu`.
#[derive(Debug)]
pub struct lg_gpu_weights(pub(crate) DeviceWeights);

/// A linear layer in device memory. It may outlive its `lg_gpu`.
#[derive(Debug)]
pub struct lg_gpu_linear(pub(crate) DeviceLinear);

/// The weights of experts in device memory. They may outlive their `lg_gpu`.
#[derive(Debug)]
pub struct lg_gpu_experts(pub(crate) DeviceExperts);

/// Device memory for partial sums. Launches on one stream may share a workspace;
/// launches that may run at the same time need one each.
#[derive(Debug)]
pub struct lg_gpu_workspace(pub(crate) Workspace);

/// How a GPU computes a product.
#[derive(Debug)]
pub struct lg_plan {
    pub(crate) plan: Plan,
    text: CString,
}

/// What a GPU is.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct lg_gpu_info {
    /// `sizeof(lg_gpu_info)`, set by the caller.
    pub struct_size: usize,
    /// The name, such as `NVIDIA H100 80GB HBM3`. It lives as long as the `lg_gpu`.
    pub name: *const c_char,
    /// Number of SMs.
    pub multiprocessors: u32,
    /// Bytes of a workspace.
    pub workspace_bytes: usize,
}

// SAFETY: numbers and a pointer, the size first.
unsafe impl Versioned for lg_gpu_info {
    const NAME: &str = "lg_gpu_info";
}

fn new(gpu: Gpu) -> lg_gpu {
    let name = CString::new(gpu.name()).unwrap_or_default();
    lg_gpu { gpu, name }
}

/// Opens a GPU by its number, and retains its primary context, which the CUDA runtime and other frameworks share.
/// −1 takes the GPU that the environment variable `LIQUIDGEMM_DEVICE` names, or else the first one that fits.
///
/// # Safety
/// `out` is valid for a write. `lg_gpu_free` frees the result.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lg_gpu_open(device: i32, out: *mut *mut lg_gpu) -> lg_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointer.
        unsafe {
            give(out, || match u32::try_from(device) {
                Ok(device) => Ok(new(Gpu::with_device(device)?)),
                Err(_) if device == -1 => Ok(new(Gpu::new()?)),
                Err(_) => {
                    Err(Failure::argument(format!("device is {device}; use −1 or the number of a GPU")))
                }
            })
        }
    })
}

/// Opens the GPU whose primary context is current on this thread.
///
/// # Safety
/// `out` is valid for a write. `lg_gpu_free` frees the result.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lg_gpu_from_current_context(out: *mut *mut lg_gpu) -> lg_status {
    // SAFETY: the caller vouches for the pointer.
    guard(|| unsafe { give(out, || Ok(new(Gpu::from_current_context()?))) })
}

/// Opens the GPU of any context, a `CUcontext`.
///
/// # Safety
/// The context outlives the result and everything that is made with it.
/// `out` is valid for a write. `lg_gpu_free` frees the result.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lg_gpu_from_context(context: *mut c_void, out: *mut *mut lg_gpu) -> lg_status {
    // SAFETY: the caller vouches for the pointers.
    guard(|| unsafe { give(out, || Ok(new(Gpu::from_context(context)?))) })
}

/// Writes what the GPU is. The caller sets `info->struct_size`.
///
/// # Safety
/// `gpu` is a live handle; `info` points to a structure of the size that it says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lg_gpu_get_info(gpu: *const lg_gpu, info: *mut lg_gpu_info) -> lg_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            let gpu = handle("gpu", gpu)?;
            let struct_size = read(info)?.struct_size;
            let found = lg_gpu_info {
                struct_size,
                name: gpu.name.as_ptr(),
                multiprocessors: gpu.gpu.multiprocessors(),
                workspace_bytes: gpu.gpu.workspace_bytes(),
            };
            put("info", info, found)
        }
    })
}

/// Frees a GPU. Null is allowed. What was made with it stays valid.
///
/// # Safety
/// `gpu` is null, or a handle that is not used any more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lg_gpu_free(gpu: *mut lg_gpu) {
    // SAFETY: the caller vouches for the handle.
    unsafe { free(gpu) }
}

/// Copies weights to device memory that the library allocates, and waits for the copy.
///
/// # Safety
/// The handles are live; `out` is valid for a write. `lg_gpu_weights_free` frees the result.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lg_gpu_upload(
    gpu: *const lg_gpu,
    weights: *const lg_weights,
    out: *mut *mut lg_gpu_weights,
) -> lg_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            let (gpu, weights) = (handle("gpu", gpu)?, handle("weights", weights)?);
            give(out, || Ok(lg_gpu_weights(gpu.gpu.upload(&weights.0)?)))
        }
    })
}

/// Copies weights to device memory of the caller, and waits for the copy.
///
/// The memory has `lg_weights_info.device_bytes` bytes, at a multiple of 256 bytes.
///
/// # Safety
/// The handles are live; `out` is valid for a write. `lg_gpu_weights_free` frees the result, and not the memory.
/// The memory stays allocated, and nobody writes it, as long as the result and its launches live.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lg_gpu_upload_to(
    gpu: *const lg_gpu,
    weights: *const lg_weights,
    memory: *mut c_void,
    memory_bytes: usize,
    out: *mut *mut lg_gpu_weights,
) -> lg_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            let (gpu, weights) = (handle("gpu", gpu)?, handle("weights", weights)?);
            check_pointer("memory", memory)?;
            give(out, || {
                Ok(lg_gpu_weights(gpu.gpu.upload_to(&weights.0, device_bytes(memory, memory_bytes))?))
            })
        }
    })
}

/// Takes weights that are in device memory of the caller already, as `lg_weights_device_bytes` writes them.
///
/// # Safety
/// As for `lg_gpu_upload_to`, and the memory holds such bytes of weights with this shape and group.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lg_gpu_weights_in(
    gpu: *const lg_gpu,
    memory: *const c_void,
    memory_bytes: usize,
    n: usize,
    k: usize,
    group: usize,
    out: *mut *mut lg_gpu_weights,
) -> lg_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            let gpu = handle("gpu", gpu)?;
            check_pointer("memory", memory)?;
            give(out, || {
                let memory = device_bytes(memory, memory_bytes);
                Ok(lg_gpu_weights(gpu.gpu.weights_in(memory, [n, k], group_of(group))?))
            })
        }
    })
}

/// Copies weights back to the host, and waits for the copy.
///
/// # Safety
/// `weights` is a live handle; `out` is valid for a write. `lg_weights_free` frees the result.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lg_gpu_download(
    weights: *const lg_gpu_weights,
    out: *mut *mut lg_weights,
) -> lg_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            let weights = handle("weights", weights)?;
            give(out, || Ok(lg_weights(weights.0.download()?.into())))
        }
    })
}

/// Frees weights in device memory. Null is allowed.
///
/// # Safety
/// `weights` is null, or a handle that is not used any more, and no launch uses it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lg_gpu_weights_free(weights: *mut lg_gpu_weights) {
    // SAFETY: the caller vouches for the handle.
    unsafe { free(weights) }
}

/// Copies a linear layer to device memory that the library allocates, and waits for the copy.
///
/// # Safety
/// The handles are live; `out` is valid for a write. `lg_gpu_linear_free` frees the result.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lg_gpu_upload_linear(
    gpu: *const lg_gpu,
    linear: *const lg_linear,
    out: *mut *mut lg_gpu_linear,
) -> lg_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            let (gpu, linear) = (handle("gpu", gpu)?, handle("linear", linear)?);
            give(out, || Ok(lg_gpu_linear(gpu.gpu.upload_linear(&linear.0)?)))
        }
    })
}

/// Makes a linear layer of weights, bias and smoothing vector that are in device memory of the caller already.
///
/// `bias` is f32 `[n]` or null, `smoothing` f32 `[k]` or null. The call touches no device memory.
///
/// # Safety
/// As for `lg_gpu_weights_in`; the same holds for bias and smoothing vector.
/// The smoothing factors are finite and positive. `lg_gpu_linear_free` frees the result, and not the memory.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lg_gpu_linear_in(
    gpu: *const lg_gpu,
    memory: *const c_void,
    memory_bytes: usize,
    n: usize,
    k: usize,
    group: usize,
    bias: *const f32,
    smoothing: *const f32,
    out: *mut *mut lg_gpu_linear,
) -> lg_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            let gpu = handle("gpu", gpu)?;
            check_pointer("memory", memory)?;
            give(out, || {
                let memory = device_bytes(memory, memory_bytes);
                let weights = gpu.gpu.weights_in(memory, [n, k], group_of(group))?;
                let (bias, smoothing) = (device_or_none(bias), device_or_none(smoothing));
                Ok(lg_gpu_linear(gpu.gpu.linear_of(weights, bias, smoothing)?))
            })
        }
    })
}

/// Frees a linear layer in device memory. Null is allowed.
///
/// # Safety
/// `linear` is null, or a handle that is not used any more, and no launch uses it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lg_gpu_linear_free(linear: *mut lg_gpu_linear) {
    // SAFETY: the caller vouches for the handle.
    unsafe { free(linear) }
}

/// Copies experts to device memory that the library allocates, and waits for the copy.
///
/// # Safety
/// The handles are live; `out` is valid for a write. `lg_gpu_experts_free` frees the result.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lg_gpu_upload_experts(
    gpu: *const lg_gpu,
    experts: *const lg_experts,
    out: *mut *mut lg_gpu_experts,
) -> lg_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            let (gpu, experts) = (handle("gpu", gpu)?, handle("experts", experts)?);
            give(out, || Ok(lg_gpu_experts(gpu.gpu.upload_experts(&experts.0)?)))
        }
    })
}

/// Takes experts that are in device memory of the caller already, as `lg_experts_device_bytes` writes them.
///
/// The memory has `lg_experts_device_size` bytes, at a multiple of 256 bytes. The call touches no device memory.
///
/// # Safety
/// `gpu` is a live handle; `out` is valid for a write. `lg_gpu_experts_free` frees the result, and not the memory.
/// The memory holds such bytes of experts with this shape and group.
/// It stays allocated, and nobody writes it, as long as the result and its launches live.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lg_gpu_experts_in(
    gpu: *const lg_gpu,
    memory: *const c_void,
    memory_bytes: usize,
    experts: usize,
    n: usize,
    k: usize,
    group: usize,
    out: *mut *mut lg_gpu_experts,
) -> lg_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            let gpu = handle("gpu", gpu)?;
            check_pointer("memory", memory)?;
            give(out, || {
                let memory = device_bytes(memory, memory_bytes);
                Ok(lg_gpu_experts(gpu.gpu.experts_in(memory, experts, [n, k], group_of(group))?))
            })
        }
    })
}

/// Frees experts in device memory. Null is allowed.
///
/// # Safety
/// `experts` is null, or a handle that is not used any more, and no launch uses it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lg_gpu_experts_free(experts: *mut lg_gpu_experts) {
    // SAFETY: the caller vouches for the handle.
    unsafe { free(experts) }
}

/// Makes a workspace that is large enough for every plan on this GPU.
///
/// With `memory` null the library allocates it. Otherwise it lies in device memory of the caller,
/// of `lg_gpu_info.workspace_bytes` bytes at a multiple of 256, and the call waits until it is initialized.
///
/// # Safety
/// `gpu` is a live handle; `out` is valid for a write. `lg_gpu_workspace_free` frees the result.
/// Memory of the caller stays allocated, and nobody else writes it, as long as the workspace and its launches live.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lg_gpu_workspace_new(
    gpu: *const lg_gpu,
    memory: *mut c_void,
    memory_bytes: usize,
    out: *mut *mut lg_gpu_workspace,
) -> lg_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            let gpu = &handle("gpu", gpu)?.gpu;
            give(out, || {
                Ok(lg_gpu_workspace(match memory.is_null() {
                    true => gpu.workspace()?,
                    false => gpu.workspace_in(device_bytes(memory, memory_bytes))?,
                }))
            })
        }
    })
}

/// Frees a workspace. Null is allowed.
///
/// # Safety
/// `workspace` is null, or a handle that is not used any more, and no launch uses it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lg_gpu_workspace_free(workspace: *mut lg_gpu_workspace) {
    // SAFETY: the caller vouches for the handle.
    unsafe { free(workspace) }
}

/// Makes every plan for weights `[n, k]` and m from `first_m` to `last_m`, and compiles every kernel that they use.
/// GEMMs then compile nothing, in traffic or in a graph capture.
///
/// # Safety
/// `gpu` is a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lg_gpu_prepare(
    gpu: *const lg_gpu,
    n: usize,
    k: usize,
    first_m: usize,
    last_m: usize,
) -> lg_status {
    guard(|| {
        // SAFETY: the caller vouches for the handle.
        let gpu = unsafe { handle("gpu", gpu)? };
        Ok(gpu.gpu.prepare(&[[n, k]], first_m..=last_m)?)
    })
}

/// Compiles the kernels that quantize rows of `k` elements after an operation, `LG_OPERATION_…`.
///
/// # Safety
/// `gpu` is a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lg_gpu_prepare_quantize(
    gpu: *const lg_gpu,
    operation: lg_operation,
    input_type: lg_type,
    k: usize,
) -> lg_status {
    guard(|| {
        // SAFETY: the caller vouches for the handle.
        let gpu = unsafe { handle("gpu", gpu)? };
        let input_type = half_type("input_type", input_type)?;
        Ok(gpu.gpu.prepare_quantize(&lg_input::kind(operation)?, input_type, k)?)
    })
}

/// Compiles the kernels of grouped GEMMs and of the combine.
///
/// # Safety
/// `gpu` is a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lg_gpu_prepare_grouped(gpu: *const lg_gpu) -> lg_status {
    guard(|| {
        // SAFETY: the caller vouches for the handle.
        let gpu = unsafe { handle("gpu", gpu)? };
        Ok(gpu.gpu.prepare_grouped()?)
    })
}

/// Makes the plan that the GPU uses for a product `[m, n]` over k.
///
/// # Safety
/// `gpu` is a live handle; `out` is valid for a write. `lg_plan_free` frees the result.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lg_gpu_plan(
    gpu: *const lg_gpu,
    m: usize,
    n: usize,
    k: usize,
    out: *mut *mut lg_plan,
) -> lg_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            let gpu = handle("gpu", gpu)?;
            give(out, || {
                let plan = gpu.gpu.plan(Problem::new(m, n, k))?;
                let text = CString::new(plan.to_string()).unwrap_or_default();
                Ok(lg_plan { plan, text })
            })
        }
    })
}

/// Returns a plan as text, or null for a null handle. It lives as long as the plan.
///
/// # Safety
/// `plan` is null or a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lg_plan_text(plan: *const lg_plan) -> *const c_char {
    // SAFETY: the caller vouches for the handle.
    unsafe { plan.as_ref() }.map_or(ptr::null(), |plan| plan.text.as_ptr())
}

/// Frees a plan. Null is allowed.
///
/// # Safety
/// `plan` is null, or a handle that is not used any more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lg_plan_free(plan: *mut lg_plan) {
    // SAFETY: the caller vouches for the handle.
    unsafe { free(plan) }
}
