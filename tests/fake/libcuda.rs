//! A fake CUDA driver for tests without a GPU. `tests/driver.rs` compiles it at run time.
//!
//! It reports the machine that the environment describes.
//! Device memory has addresses but no contents: copies to it are dropped, and copies from it give zeros.
//!
//! | variable | sets | default |
//! |---|---|---|
//! | `FAKE_CUDA_VERSION` | the version from `cuDriverGetVersion` | 12080 |
//! | `FAKE_CUDA_INIT` | the status of `cuInit` | 0 |
//! | `FAKE_CUDA_DEVICES` | the number of GPUs | 1 |
//! | `FAKE_CUDA_CAPABILITY` | ten times the compute capability, of several GPUs with commas between | 90 |
//! | `FAKE_CUDA_LAUNCH` | the status of every launch | 912 |
//!
//! It tracks allocations, contexts and launches.
//! The `fake…` functions, which no real driver has, make one chosen call fail and report what was tracked.

use std::cell::Cell;
use std::collections::HashMap;
use std::ffi::{c_char, c_int, c_uint, c_void};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, AtomicU64, Ordering::SeqCst};
use std::sync::{LazyLock, Mutex, MutexGuard};

/// `CUDA_ERROR_INVALID_CLUSTER_SIZE`, the default status of launches. `cust` has no name for it.
const INVALID_CLUSTER_SIZE: c_int = 912;
/// `CUDA_ERROR_UNKNOWN`, the status of a call that is made to fail.
const UNKNOWN: c_int = 999;
/// `CUDA_ERROR_INVALID_CONTEXT`, the status of calls that need a current context and have none.
const INVALID_CONTEXT: c_int = 201;

/// The number of modules loaded so far.
static LOADS: AtomicU32 = AtomicU32::new(0);
/// The number of calls that pass before one fails; below 0, none fails.
static UNTIL_FAILURE: AtomicI64 = AtomicI64::new(-1);
/// Whether a launch may still run, because nothing has waited for it.
static BUSY: AtomicBool = AtomicBool::new(false);
/// The number of calls that could corrupt memory on a real driver.
///
/// These are frees of unknown memory, in another context, or during a launch,
/// and releases of a context that is not retained.
static VIOLATIONS: AtomicU32 = AtomicU32::new(0);
/// Whether the failed call was to make a context current.
static COULD_NOT_ENTER: AtomicBool = AtomicBool::new(false);
/// The live allocations: address to context.
static ALLOCATIONS: LazyLock<Mutex<HashMap<u64, usize>>> = LazyLock::new(Mutex::default);
/// The retain count of each device's primary context.
static RETAINED: [AtomicI64; 8] = [const { AtomicI64::new(0) }; 8];

thread_local! {
    /// The current context: its device's number plus `CONTEXT`, or 0 for none.
    static CURRENT: Cell<usize> = const { Cell::new(0) };
}

/// The context of device 0.
const CONTEXT: usize = 0x1000;

fn setting(name: &str, otherwise: c_int) -> c_int {
    std::env::var(name).map_or(otherwise, |text| text.parse().expect("a number"))
}

fn allocations() -> MutexGuard<'static, HashMap<u64, usize>> {
    ALLOCATIONS.lock().expect("nothing panics in here")
}

/// Counts a call and returns whether it is the one that fails.
fn fails() -> bool {
    UNTIL_FAILURE.load(SeqCst) >= 0 && UNTIL_FAILURE.fetch_sub(1, SeqCst) == 0
}

/// Returns an error from the calling function if it is the call that fails.
macro_rules! may_fail {
    () => {
        if fails() {
            return UNKNOWN;
        }
    };
}

/// Returns an error from the calling function if it is the call that fails, or if no live context is current.
macro_rules! needs_context {
    () => {
        may_fail!();
        let current = CURRENT.get();
        if current == 0 || RETAINED[current - CONTEXT].load(SeqCst) == 0 {
            return INVALID_CONTEXT;
        }
    };
}

/// Lets `calls` calls pass and makes the next one fail; below 0, none fails.
#[unsafe(no_mangle)]
extern "C" fn fakeFailAfter(calls: i64) {
    UNTIL_FAILURE.store(calls, SeqCst);
}

/// Returns whether that call is still to come.
#[unsafe(no_mangle)]
extern "C" fn fakeFailurePending() -> c_int {
    (UNTIL_FAILURE.load(SeqCst) >= 0).into()
}

/// Returns whether making a context current has failed since the last call of this.
#[unsafe(no_mangle)]
extern "C" fn fakeTakeCouldNotEnter() -> c_int {
    COULD_NOT_ENTER.swap(false, SeqCst).into()
}

/// Returns the number of live allocations.
#[unsafe(no_mangle)]
extern "C" fn fakeAllocations() -> c_uint {
    allocations().len() as c_uint
}

/// Returns `VIOLATIONS`.
#[unsafe(no_mangle)]
extern "C" fn fakeViolations() -> c_uint {
    VIOLATIONS.load(SeqCst)
}

/// Returns whether a launch may still run, and marks it as finished.
#[unsafe(no_mangle)]
extern "C" fn fakeTakeBusy() -> c_int {
    BUSY.swap(false, SeqCst).into()
}

/// Returns the retain count of a device's primary context.
#[unsafe(no_mangle)]
extern "C" fn fakeRetained(device: c_int) -> i64 {
    RETAINED[device as usize].load(SeqCst)
}

/// Returns the number of modules loaded so far.
#[unsafe(no_mangle)]
extern "C" fn fakeModuleLoads() -> c_uint {
    LOADS.load(SeqCst)
}

#[unsafe(no_mangle)]
extern "C" fn cuDriverGetVersion(version: *mut c_int) -> c_int {
    may_fail!();
    unsafe { *version = setting("FAKE_CUDA_VERSION", 12_080) };
    0
}

#[unsafe(no_mangle)]
extern "C" fn cuInit(_flags: c_uint) -> c_int {
    may_fail!();
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
    may_fail!();
    unsafe { *count = setting("FAKE_CUDA_DEVICES", 1) };
    0
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGet(device: *mut c_int, ordinal: c_int) -> c_int {
    may_fail!();
    unsafe { *device = ordinal };
    0
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetName(name: *mut c_char, length: c_int, _device: c_int) -> c_int {
    may_fail!();
    let text = c"Fake GPU".to_bytes_with_nul();
    assert!(text.len() <= length as usize);
    unsafe { name.copy_from_nonoverlapping(text.as_ptr().cast(), text.len()) };
    0
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetAttribute(value: *mut c_int, attribute: c_int, device: c_int) -> c_int {
    may_fail!();
    let capabilities = std::env::var("FAKE_CUDA_CAPABILITY").unwrap_or_else(|_| "90".to_owned());
    let capabilities: Vec<c_int> = capabilities.split(',').map(|text| text.parse().expect("a number")).collect();
    let capability = capabilities[device as usize % capabilities.len()];
    let answer = match attribute {
        13 => 1_980_000, // SM clock, kHz
        16 => 132,       // SMs
        36 => 2_619_000, // memory clock, kHz
        37 => 5120,      // memory bus width, bits
        75 => capability / 10,
        76 => capability % 10,
        other => panic!("attribute {other} is not expected"),
    };
    unsafe { *value = answer };
    0
}

#[unsafe(no_mangle)]
extern "C" fn cuDevicePrimaryCtxRetain(context: *mut *mut c_void, device: c_int) -> c_int {
    may_fail!();
    RETAINED[device as usize].fetch_add(1, SeqCst);
    unsafe { *context = (CONTEXT + device as usize) as *mut c_void };
    0
}

/// Counts the release even if the call fails: the caller must not release it again.
#[unsafe(no_mangle)]
extern "C" fn cuDevicePrimaryCtxRelease_v2(device: c_int) -> c_int {
    if RETAINED[device as usize].fetch_sub(1, SeqCst) <= 0 {
        VIOLATIONS.fetch_add(1, SeqCst);
    }
    may_fail!();
    0
}

#[unsafe(no_mangle)]
extern "C" fn cuDevicePrimaryCtxGetState(device: c_int, flags: *mut c_uint, active: *mut c_int) -> c_int {
    may_fail!();
    unsafe {
        *flags = 0;
        *active = (RETAINED[device as usize].load(SeqCst) > 0).into();
    }
    0
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxSetCurrent(context: *mut c_void) -> c_int {
    if fails() {
        COULD_NOT_ENTER.store(true, SeqCst);
        return UNKNOWN;
    }
    CURRENT.set(context as usize);
    0
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxGetCurrent(context: *mut *mut c_void) -> c_int {
    may_fail!();
    unsafe { *context = CURRENT.get() as *mut c_void };
    0
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxGetDevice(device: *mut c_int) -> c_int {
    needs_context!();
    unsafe { *device = (CURRENT.get() - CONTEXT) as c_int };
    0
}

#[unsafe(no_mangle)]
extern "C" fn cuMemAlloc_v2(address: *mut u64, bytes: usize) -> c_int {
    static NEXT: AtomicU64 = AtomicU64::new(1 << 32);
    needs_context!();
    let address_of_this = NEXT.fetch_add(bytes.next_multiple_of(256) as u64, SeqCst);
    allocations().insert(address_of_this, CURRENT.get());
    unsafe { *address = address_of_this };
    0
}

/// Counts the free even if the call fails: the caller must not free it again.
#[unsafe(no_mangle)]
extern "C" fn cuMemFree_v2(address: u64) -> c_int {
    let context = allocations().remove(&address);
    if context != Some(CURRENT.get()) || BUSY.load(SeqCst) {
        VIOLATIONS.fetch_add(1, SeqCst);
    }
    may_fail!();
    0
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyHtoD_v2(_to: u64, _from: *const c_void, _bytes: usize) -> c_int {
    needs_context!();
    0
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyDtoH_v2(to: *mut c_void, _from: u64, bytes: usize) -> c_int {
    needs_context!();
    unsafe { to.cast::<u8>().write_bytes(0, bytes) };
    0
}

/// Ignores its arguments.
#[unsafe(no_mangle)]
extern "C" fn cuMemcpy2DAsync_v2() -> c_int {
    needs_context!();
    0
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamCreate(stream: *mut *mut c_void, _flags: c_uint) -> c_int {
    needs_context!();
    unsafe { *stream = 0x4000 as *mut c_void };
    0
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamCreateWithPriority(stream: *mut *mut c_void, flags: c_uint, _priority: c_int) -> c_int {
    cuStreamCreate(stream, flags)
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamDestroy_v2(_stream: *mut c_void) -> c_int {
    may_fail!();
    0
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamSynchronize(_stream: *mut c_void) -> c_int {
    needs_context!();
    BUSY.store(false, SeqCst);
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
    needs_context!();
    LOADS.fetch_add(1, SeqCst);
    unsafe { *module = 0x2000 as *mut c_void };
    0
}

#[unsafe(no_mangle)]
extern "C" fn cuModuleUnload(_module: *mut c_void) -> c_int {
    may_fail!();
    0
}

#[unsafe(no_mangle)]
extern "C" fn cuModuleGetFunction(
    function: *mut *mut c_void,
    _module: *mut c_void,
    _name: *const c_char,
) -> c_int {
    may_fail!();
    unsafe { *function = 0x3000 as *mut c_void };
    0
}

#[unsafe(no_mangle)]
extern "C" fn cuFuncSetAttribute(_function: *mut c_void, _attribute: c_int, _value: c_int) -> c_int {
    may_fail!();
    0
}

/// Ignores its arguments.
#[unsafe(no_mangle)]
extern "C" fn cuTensorMapEncodeTiled() -> c_int {
    may_fail!();
    0
}

/// Ignores its arguments.
#[cfg(not(without_launch_kernel_ex))]
#[unsafe(no_mangle)]
extern "C" fn cuLaunchKernelEx() -> c_int {
    needs_context!();
    let status = setting("FAKE_CUDA_LAUNCH", INVALID_CLUSTER_SIZE);
    if status == 0 {
        BUSY.store(true, SeqCst);
    }
    status
}
