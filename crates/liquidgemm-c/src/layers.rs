//! Linear layers and experts in host memory.

use std::ffi::c_void;
use std::sync::Arc;

use liquidgemm::gpu::DeviceExperts;
use liquidgemm::{Linear, PackedWeights};

use crate::arguments::*;
use crate::status::{guard, lg_status};
use crate::weights::{copy_bytes, handles, lg_weights};

/// A linear layer in host memory: weights `[n, k]`, a bias and a smoothing vector.
/// Any number of threads may use it at the same time.
#[derive(Debug)]
pub struct lg_linear(pub(crate) Linear);

/// The weights of experts `[experts, n, k]` in host memory. Any number of threads may use them at the same time.
#[derive(Debug)]
pub struct lg_experts(pub(crate) Vec<Arc<PackedWeights>>);

/// Makes a linear layer of weights, which it copies, a bias and a smoothing vector.
///
/// # Safety
/// `weights` is a live handle; `bias` is null or has n elements, `smoothing` is null or has k;
/// `out` is valid for a write. `lg_linear_free` frees the result.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lg_linear_new(
    weights: *const lg_weights,
    bias: *const f32,
    smoothing: *const f32,
    out: *mut *mut lg_linear,
) -> lg_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            let weights = &handle("weights", weights)?.0;
            let (n, k) = (weights.n(), weights.k());
            give(out, || {
                let mut linear = Linear::new(PackedWeights::clone(weights));
                if !bias.is_null() {
                    linear = linear.with_bias(host("bias", bias, n)?.to_vec())?;
                }
                if !smoothing.is_null() {
                    linear = linear.with_smoothing(host("smoothing", smoothing, k)?.to_vec())?;
                }
                Ok(lg_linear(linear))
            })
        }
    })
}

/// Frees a linear layer. Null is allowed.
///
/// # Safety
/// `linear` is null, or a handle that is not used any more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lg_linear_free(linear: *mut lg_linear) {
    // SAFETY: the caller vouches for the handle.
    unsafe { free(linear) }
}

/// Makes experts of weights with the same shape and group. They share the weights, whose handles may be freed.
///
/// # Safety
/// `weights` has `count` live handles; `out` is valid for a write. `lg_experts_free` frees the result.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lg_experts_new(
    weights: *const *const lg_weights,
    count: usize,
    out: *mut *mut lg_experts,
) -> lg_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            let experts = handles("weights", weights, count)?;
            give(out, || {
                // It fails unless they belong together.
                DeviceExperts::device_size(&experts)?;
                Ok(lg_experts(experts))
            })
        }
    })
}

/// Writes the bytes that experts take in device memory of the caller.
///
/// # Safety
/// `bytes` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lg_experts_device_size(
    experts: usize,
    n: usize,
    k: usize,
    group: usize,
    bytes: *mut usize,
) -> lg_status {
    guard(|| {
        let needed = DeviceExperts::bytes_for(experts, [n, k], group_of(group))?;
        // SAFETY: the caller vouches for the pointer.
        unsafe { put("bytes", bytes, needed) }
    })
}

/// Writes the experts as they lie in device memory of the caller, to host memory.
/// Copy them to the GPU, and `lg_gpu_experts_in` takes them there.
///
/// # Safety
/// `experts` is a live handle; `bytes` has `length` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lg_experts_device_bytes(
    experts: *const lg_experts,
    bytes: *mut c_void,
    length: usize,
) -> lg_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            let found = DeviceExperts::device_bytes(&handle("experts", experts)?.0)?;
            copy_bytes(&found, bytes, length)
        }
    })
}

/// Frees experts. Null is allowed.
///
/// # Safety
/// `experts` is null, or a handle that is not used any more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lg_experts_free(experts: *mut lg_experts) {
    // SAFETY: the caller vouches for the handle.
    unsafe { free(experts) }
}
