//! A driver for tests without a GPU: a library that reports whatever machine the environment asks for. Device memory is
//! only numbers: what is copied there is dropped. `tests/driver.rs` compiles it at run time.
//!
//! | variable | what it sets | otherwise |
//! |---|---|---|
//! | `FAKE_CUDA_VERSION` | what `cuDriverGetVersion` reports | 12080 |
//! | `FAKE_CUDA_INIT` | the status of `cuInit` | 0 |
//! | `FAKE_CUDA_DEVICES` | how many GPUs there are | 1 |
//! | `FAKE_CUDA_CAPABILITY` | ten times their compute capability | 90 |

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering};

/// `CUDA_ERROR_INVALID_CLUSTER_SIZE`, which `cust` has no name for: what every launch returns.
const INVALID_CLUSTER_SIZE: c_int = 912;

/// Modules loaded so far.
static LOADS: AtomicU32 = AtomicU32::new(0);

fn setting(name: &str, otherwise: c_int) -> c_int {
    std::env::var(name).map_or(otherwise, |text| text.parse().expect("a number"))
}

#[unsafe(no_mangle)]
extern "C" fn cuDriverGetVersion(version: *mut c_int) -> c_int {
    unsafe { *version = setting("FAKE_CUDA_VERSION", 12_080) };
    0
}

#[unsafe(no_mangle)]
extern "C" fn cuInit(_flags: c_uint) -> c_int {
    setting("FAKE_CUDA_INIT", 0)
}

#[unsafe(no_mangle)]
extern "C" fn cuGetErrorString(status: c_int, text: *mut *const c_char) -> c_int {
    let known = if status == INVALID_CLUSTER_SIZE { c"invalid cluster size" } else { c"another status" };
    unsafe { *text = known.as_ptr() };
    0
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetCount(count: *mut c_int) -> c_int {
    unsafe { *count = setting("FAKE_CUDA_DEVICES", 1) };
    0
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGet(device: *mut c_int, ordinal: c_int) -> c_int {
    unsafe { *device = ordinal };
    0
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetName(name: *mut c_char, length: c_int, _device: c_int) -> c_int {
    let text = c"Fake GPU".to_bytes_with_nul();
    assert!(text.len() <= length as usize);
    unsafe { name.copy_from_nonoverlapping(text.as_ptr().cast(), text.len()) };
    0
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetAttribute(value: *mut c_int, attribute: c_int, _device: c_int) -> c_int {
    let capability = setting("FAKE_CUDA_CAPABILITY", 90);
    let answer = match attribute {
        13 => 1_980_000, // SM clock, kHz
        16 => 132, // multiprocessors
        36 => 2_619_000, // memory clock, kHz
        37 => 5120, // bits of the memory bus
        75 => capability / 10,
        76 => capability % 10,
        other => panic!("attribute {other} is not expected"),
    };
    unsafe { *value = answer };
    0
}

/// The context of every device.
const CONTEXT: *mut c_void = 0x1000 as *mut c_void;
static CURRENT: AtomicPtr<c_void> = AtomicPtr::new(std::ptr::null_mut());

#[unsafe(no_mangle)]
extern "C" fn cuDevicePrimaryCtxRetain(context: *mut *mut c_void, _device: c_int) -> c_int {
    unsafe { *context = CONTEXT };
    0
}

#[unsafe(no_mangle)]
extern "C" fn cuDevicePrimaryCtxRelease_v2(_device: c_int) -> c_int {
    0
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxSetCurrent(context: *mut c_void) -> c_int {
    CURRENT.store(context, Ordering::Relaxed);
    0
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxGetCurrent(context: *mut *mut c_void) -> c_int {
    unsafe { *context = CURRENT.load(Ordering::Relaxed) };
    0
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxGetDevice(device: *mut c_int) -> c_int {
    unsafe { *device = 0 };
    0
}

#[unsafe(no_mangle)]
extern "C" fn cuMemAlloc_v2(address: *mut u64, bytes: usize) -> c_int {
    static NEXT: AtomicU64 = AtomicU64::new(1 << 32);
    let bytes = bytes.next_multiple_of(256) as u64;
    unsafe { *address = NEXT.fetch_add(bytes, Ordering::Relaxed) };
    0
}

#[unsafe(no_mangle)]
extern "C" fn cuMemFree_v2(_address: u64) -> c_int {
    0
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyHtoD_v2(_to: u64, _from: *const c_void, _bytes: usize) -> c_int {
    0
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamSynchronize(_stream: *mut c_void) -> c_int {
    0
}

#[unsafe(no_mangle)]
extern "C" fn cuModuleLoadDataEx(
    module: *mut *mut c_void,
    _image: *const c_void,
    _options: c_uint,
    _names: *mut c_int,
    _values: *mut *mut c_void,
) -> c_int {
    LOADS.fetch_add(1, Ordering::Relaxed);
    unsafe { *module = 0x2000 as *mut c_void };
    0
}

/// How many modules have been loaded; no driver has this function.
#[unsafe(no_mangle)]
extern "C" fn fakeModuleLoads() -> c_uint {
    LOADS.load(Ordering::Relaxed)
}

#[unsafe(no_mangle)]
extern "C" fn cuModuleUnload(_module: *mut c_void) -> c_int {
    0
}

#[unsafe(no_mangle)]
extern "C" fn cuModuleGetFunction(
    function: *mut *mut c_void,
    _module: *mut c_void,
    _name: *const c_char,
) -> c_int {
    unsafe { *function = 0x3000 as *mut c_void };
    0
}

#[unsafe(no_mangle)]
extern "C" fn cuFuncSetAttribute(_function: *mut c_void, _attribute: c_int, _value: c_int) -> c_int {
    0
}

/// The arguments are not looked at.
#[unsafe(no_mangle)]
extern "C" fn cuTensorMapEncodeTiled() -> c_int {
    0
}

/// The arguments are not looked at.
#[cfg(not(without_launch_kernel_ex))]
#[unsafe(no_mangle)]
extern "C" fn cuLaunchKernelEx() -> c_int {
    INVALID_CLUSTER_SIZE
}
