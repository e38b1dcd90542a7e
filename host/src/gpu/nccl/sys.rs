//! NCCL's raw interface, with the functions that the library uses. Its header `nccl.h` declares them.

use std::ffi::{c_char, c_int, c_void};

use libloading::Library;

/// `ncclResult_t`. It is a number, because newer versions return values that older ones do not name.
pub(super) type Status = c_int;
/// `ncclComm_t`.
pub(super) type Handle = *mut c_void;

/// `ncclUniqueId`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct RawId(pub(super) [u8; super::UNIQUE_ID_BYTES]);

/// Values of `ncclDataType_t`.
pub(super) mod data_type {
    use std::ffi::c_int;

    pub const INT32: c_int = 2;
    pub const FLOAT16: c_int = 6;
    /// From NCCL 2.10 on.
    pub const BFLOAT16: c_int = 9;
}

/// Values of `ncclRedOp_t`.
pub(super) mod operation {
    use std::ffi::c_int;

    pub const SUM: c_int = 0;
    pub const MAX: c_int = 2;
}

macro_rules! functions {
    ($($field:ident: $symbol:literal, fn($($argument:ty),*) -> $result:ty;)*) => {
        /// The library's functions.
        pub(super) struct Functions {
            $(pub(super) $field: unsafe extern "C" fn($($argument),*) -> $result,)*
            /// `ncclGetLastError`, from NCCL 2.13 on.
            pub(super) last_error: Option<unsafe extern "C" fn(Handle) -> *const c_char>,
            /// Keeps the functions alive.
            _library: Library,
        }

        impl Functions {
            /// Looks up all functions. The error is the name of one that the library lacks.
            ///
            /// # Safety
            /// The library is NCCL.
            pub(super) unsafe fn load(library: Library) -> Result<Self, &'static str> {
                // SAFETY: the types are those that NCCL declares.
                unsafe {
                    Ok(Self {
                        $($field: *library.get($symbol).map_err(|_| $symbol)?,)*
                        last_error: library.get("ncclGetLastError").ok().map(|symbol| *symbol),
                        _library: library,
                    })
                }
            }
        }
    };
}

functions! {
    version: "ncclGetVersion", fn(*mut c_int) -> Status;
    unique_id: "ncclGetUniqueId", fn(*mut RawId) -> Status;
    init_rank: "ncclCommInitRank", fn(*mut Handle, c_int, RawId, c_int) -> Status;
    destroy: "ncclCommDestroy", fn(Handle) -> Status;
    abort: "ncclCommAbort", fn(Handle) -> Status;
    async_error: "ncclCommGetAsyncError", fn(Handle, *mut Status) -> Status;
    count: "ncclCommCount", fn(Handle, *mut c_int) -> Status;
    user_rank: "ncclCommUserRank", fn(Handle, *mut c_int) -> Status;
    error_string: "ncclGetErrorString", fn(Status) -> *const c_char;
    group_start: "ncclGroupStart", fn() -> Status;
    group_end: "ncclGroupEnd", fn() -> Status;
    all_reduce: "ncclAllReduce",
        fn(*const c_void, *mut c_void, usize, c_int, c_int, Handle, *mut c_void) -> Status;
}
