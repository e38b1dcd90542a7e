//! A fake CUDA driver for tests. `tests/fake_driver.rs` compiles it at run time.
//!
//! It exports a few driver functions. They write their arguments to memory that the test can read.

use std::ffi::{c_char, c_int, c_uint, c_void};

#[unsafe(no_mangle)]
extern "C" fn cuInit(flags: c_uint) -> c_int {
    // Return 1 for other flags, so that the test can see that its argument arrived.
    if flags == 0 { 0 } else { 1 }
}

#[unsafe(no_mangle)]
extern "C" fn cuDriverGetVersion(version: *mut c_int) -> c_int {
    unsafe { *version = 12_090 };
    0
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetCount(count: *mut c_int) -> c_int {
    unsafe { *count = 7 };
    0
}

/// Describes all statuses except negative ones.
#[unsafe(no_mangle)]
extern "C" fn cuGetErrorString(status: c_int, text: *mut *const c_char) -> c_int {
    let known = match status {
        912 => Some(c"invalid cluster size"),
        0.. => Some(c"some other status"),
        _ => None,
    };
    unsafe { *text = known.map_or(std::ptr::null(), std::ffi::CStr::as_ptr) };
    if known.is_some() { 0 } else { 1 }
}

/// Takes eleven integers and pointers, which is more than any calling convention passes in registers.
#[unsafe(no_mangle)]
extern "C" fn cuLaunchKernel(
    function: *mut c_void,
    grid_x: c_uint,
    grid_y: c_uint,
    grid_z: c_uint,
    block_x: c_uint,
    block_y: c_uint,
    block_z: c_uint,
    shared_bytes: c_uint,
    stream: *mut c_void,
    parameters: *mut *mut c_void,
    extra: *mut *mut c_void,
) -> c_int {
    let seen = [
        function as u64,
        grid_x.into(),
        grid_y.into(),
        grid_z.into(),
        block_x.into(),
        block_y.into(),
        block_z.into(),
        shared_bytes.into(),
        stream as u64,
        parameters as u64,
    ];
    unsafe { extra.cast::<[u64; 10]>().write(seen) };
    700
}

/// Takes floats, which calling conventions pass in separate registers.
#[unsafe(no_mangle)]
extern "C" fn cuTexRefSetMipmapLevelClamp(texture: *mut c_void, low: f32, high: f32) -> c_int {
    unsafe { texture.cast::<[f32; 2]>().write([low, high]) };
    0
}

/// A 64-byte structure, which calling conventions pass by value on the stack.
#[repr(C)]
pub struct IpcHandle {
    bytes: [c_char; 64],
}

#[unsafe(no_mangle)]
extern "C" fn cuIpcOpenMemHandle_v2(pointer: *mut u64, handle: IpcHandle, flags: c_uint) -> c_int {
    let sum: u64 = (1u64..).zip(handle.bytes).map(|(i, byte)| i * byte as u64).sum();
    unsafe { *pointer = sum };
    flags as c_int
}

/// A function that cust does not declare.
#[unsafe(no_mangle)]
extern "C" fn cuTensorMapEncodeTiled(rank: c_uint) -> c_int {
    rank as c_int + 1
}
