//! A fake NCCL for tests without a GPU. `tests/driver.rs` compiles it at run time.
//!
//! It reduces nothing. It counts communicators and reductions, and refuses calls that would never end:
//! a reduction of one of several ranks in this process without a group.
//!
//! | variable | sets | default |
//! |---|---|---|
//! | `FAKE_NCCL_VERSION` | the version from `ncclGetVersion` | 22705 |
//! | `FAKE_NCCL_REDUCE` | the status of every all-reduce | 0 |

use std::ffi::{c_char, c_int, c_void};
use std::sync::atomic::{AtomicI64, Ordering::SeqCst};

const INVALID_ARGUMENT: c_int = 4;
const INVALID_USAGE: c_int = 5;

/// Groups that have begun and not ended.
static DEPTH: AtomicI64 = AtomicI64::new(0);
/// Live communicators.
static ALIVE: AtomicI64 = AtomicI64::new(0);
/// Ranks of the world.
static RANKS: AtomicI64 = AtomicI64::new(0);
/// All-reduces so far, and a number made of their element types and operations.
static REDUCTIONS: AtomicI64 = AtomicI64::new(0);
static KINDS: AtomicI64 = AtomicI64::new(0);

fn setting(name: &str, otherwise: c_int) -> c_int {
    std::env::var(name).map_or(otherwise, |text| text.parse().expect("a number"))
}

/// Returns the number of live communicators.
#[unsafe(no_mangle)]
extern "C" fn fakeNcclAlive() -> i64 {
    ALIVE.load(SeqCst)
}

/// Returns the number of all-reduces.
#[unsafe(no_mangle)]
extern "C" fn fakeNcclReductions() -> i64 {
    REDUCTIONS.load(SeqCst)
}

/// Returns, and forgets, a decimal digit pair for each all-reduce: element type and operation.
#[unsafe(no_mangle)]
extern "C" fn fakeNcclTakeKinds() -> i64 {
    KINDS.swap(0, SeqCst)
}

#[unsafe(no_mangle)]
extern "C" fn ncclGetVersion(version: *mut c_int) -> c_int {
    unsafe { *version = setting("FAKE_NCCL_VERSION", 22_705) };
    0
}

#[repr(C)]
struct Id([u8; 128]);

#[unsafe(no_mangle)]
extern "C" fn ncclGetUniqueId(id: *mut Id) -> c_int {
    unsafe { (*id).0 = [7; 128] };
    0
}

#[unsafe(no_mangle)]
extern "C" fn ncclCommInitRank(handle: *mut *mut c_void, ranks: c_int, id: Id, rank: c_int) -> c_int {
    if rank < 0 || rank >= ranks || id.0 != [7; 128] {
        return INVALID_ARGUMENT;
    }
    ALIVE.fetch_add(1, SeqCst);
    RANKS.store(ranks.into(), SeqCst);
    unsafe { *handle = (0x100 + rank as usize) as *mut c_void };
    0
}

#[unsafe(no_mangle)]
extern "C" fn ncclCommDestroy(_handle: *mut c_void) -> c_int {
    ALIVE.fetch_sub(1, SeqCst);
    0
}

#[unsafe(no_mangle)]
extern "C" fn ncclCommAbort(handle: *mut c_void) -> c_int {
    ncclCommDestroy(handle)
}

#[unsafe(no_mangle)]
extern "C" fn ncclCommGetAsyncError(_handle: *mut c_void, status: *mut c_int) -> c_int {
    unsafe { *status = setting("FAKE_NCCL_REDUCE", 0) };
    0
}

#[unsafe(no_mangle)]
extern "C" fn ncclCommCount(_handle: *mut c_void, count: *mut c_int) -> c_int {
    unsafe { *count = RANKS.load(SeqCst) as c_int };
    0
}

#[unsafe(no_mangle)]
extern "C" fn ncclCommUserRank(handle: *mut c_void, rank: *mut c_int) -> c_int {
    unsafe { *rank = (handle as usize - 0x100) as c_int };
    0
}

#[unsafe(no_mangle)]
extern "C" fn ncclGetErrorString(status: c_int) -> *const c_char {
    match status {
        0 => c"no error".as_ptr(),
        INVALID_USAGE => c"invalid usage".as_ptr(),
        _ => c"remote process exited".as_ptr(),
    }
}

#[unsafe(no_mangle)]
extern "C" fn ncclGetLastError(_handle: *mut c_void) -> *const c_char {
    c"the fake's\ndetail".as_ptr()
}

#[unsafe(no_mangle)]
extern "C" fn ncclGroupStart() -> c_int {
    DEPTH.fetch_add(1, SeqCst);
    0
}

#[unsafe(no_mangle)]
extern "C" fn ncclGroupEnd() -> c_int {
    if DEPTH.fetch_sub(1, SeqCst) <= 0 { INVALID_USAGE } else { 0 }
}

#[unsafe(no_mangle)]
extern "C" fn ncclAllReduce(
    from: *const c_void,
    to: *mut c_void,
    count: usize,
    data_type: c_int,
    operation: c_int,
    handle: *mut c_void,
    _stream: *mut c_void,
) -> c_int {
    if from != to.cast_const() || count == 0 || handle.is_null() {
        return INVALID_ARGUMENT;
    }
    if ALIVE.load(SeqCst) > 1 && DEPTH.load(SeqCst) == 0 {
        return INVALID_USAGE;
    }
    REDUCTIONS.fetch_add(1, SeqCst);
    KINDS.store(KINDS.load(SeqCst) * 100 + i64::from(data_type * 10 + operation), SeqCst);
    setting("FAKE_NCCL_REDUCE", 0)
}
