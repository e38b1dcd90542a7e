//! The part of cuBLASLt's C interface that the bench calls, resolved at run time.
//! Types and numbers are those of `cublasLt.h`; they are the same in CUDA 11.8, 12 and 13.
//!
//! The bindings are written by hand because the library may lie anywhere:
//! generated bindings search only where the system's loader does, and panic if they find nothing.

use std::ffi::{c_char, c_int, c_void};

use libloading::Library;

/// `cublasStatus_t`.
pub(super) type Status = c_int;
/// `cublasLtHandle_t`, `cublasLtMatmulDesc_t`, `cublasLtMatrixLayout_t`, `cublasLtMatmulPreference_t`.
pub(super) type Handle = *mut c_void;

/// `cublasComputeType_t`.
#[derive(Clone, Copy)]
#[repr(i32)]
pub(super) enum ComputeType {
    F32 = 68,
    I32 = 72,
}

/// `cudaDataType_t`.
#[derive(Clone, Copy)]
#[repr(i32)]
pub(super) enum DataType {
    F32 = 0,
    I8 = 3,
    I32 = 10,
    Bf16 = 14,
    E4m3 = 28,
}

/// `CUBLAS_OP_T`.
pub(super) const TRANSPOSE: i32 = 1;

/// `cublasLtMatmulDescAttributes_t`.
#[derive(Clone, Copy)]
#[repr(i32)]
pub(super) enum MatmulAttribute {
    TransposeA = 3,
    ScalePointerA = 17,
    ScalePointerB = 18,
    FastAccumulation = 25,
}

/// `CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES`.
pub(super) const PREFERENCE_MAX_WORKSPACE: c_int = 1;

/// `cublasLtMatmulAlgo_t`.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(super) struct Algorithm {
    data: [u64; 8],
}

/// `cublasLtMatmulHeuristicResult_t`.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(super) struct HeuristicResult {
    pub(super) algorithm: Algorithm,
    pub(super) workspace_bytes: usize,
    pub(super) state: Status,
    waves: f32,
    reserved: [c_int; 4],
}

macro_rules! functions {
    ($($field:ident = $symbol:literal: fn($($argument:ty),* $(,)?) -> $result:ty;)*) => {
        /// The functions of the library.
        pub(super) struct Functions {
            $(pub(super) $field: unsafe extern "C" fn($($argument),*) -> $result,)*
            /// Keeps the library loaded as long as the functions can be called.
            _library: Library,
        }

        impl Functions {
            /// Looks up every function.
            ///
            /// # Safety
            /// `library` must be cuBLASLt 11.8 or newer.
            pub(super) unsafe fn load(library: Library) -> Result<Self, libloading::Error> {
                Ok(Self {
                    // SAFETY: the caller guarantees cuBLASLt, so each symbol is a function
                    // with the signature of `cublasLt.h`.
                    $($field: unsafe { *library.get($symbol)? },)*
                    _library: library,
                })
            }
        }
    };
}

functions! {
    create = b"cublasLtCreate\0": fn(*mut Handle) -> Status;
    destroy = b"cublasLtDestroy\0": fn(Handle) -> Status;
    version = b"cublasLtGetVersion\0": fn() -> usize;
    status_name = b"cublasLtGetStatusName\0": fn(Status) -> *const c_char;
    matmul_create = b"cublasLtMatmulDescCreate\0": fn(*mut Handle, ComputeType, DataType) -> Status;
    matmul_destroy = b"cublasLtMatmulDescDestroy\0": fn(Handle) -> Status;
    matmul_set = b"cublasLtMatmulDescSetAttribute\0":
        fn(Handle, MatmulAttribute, *const c_void, usize) -> Status;
    layout_create = b"cublasLtMatrixLayoutCreate\0": fn(*mut Handle, DataType, u64, u64, i64) -> Status;
    layout_destroy = b"cublasLtMatrixLayoutDestroy\0": fn(Handle) -> Status;
    preference_create = b"cublasLtMatmulPreferenceCreate\0": fn(*mut Handle) -> Status;
    preference_destroy = b"cublasLtMatmulPreferenceDestroy\0": fn(Handle) -> Status;
    preference_set = b"cublasLtMatmulPreferenceSetAttribute\0":
        fn(Handle, c_int, *const c_void, usize) -> Status;
    heuristic = b"cublasLtMatmulAlgoGetHeuristic\0": fn(
        Handle, Handle, Handle, Handle, Handle, Handle, Handle, c_int, *mut HeuristicResult, *mut c_int,
    ) -> Status;
    matmul = b"cublasLtMatmul\0": fn(
        Handle, Handle,
        *const c_void, *const c_void, Handle, *const c_void, Handle,
        *const c_void, *const c_void, Handle, *mut c_void, Handle,
        *const Algorithm, *mut c_void, usize, *mut c_void,
    ) -> Status;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_have_the_sizes_of_the_header() {
        assert_eq!(size_of::<Algorithm>(), 64);
        assert_eq!(size_of::<HeuristicResult>(), 64 + 8 + 4 + 4 + 16);
    }
}
