//! Behaviour of a program that uses `cust` while no driver is loaded.
//!
//! That this test starts at all shows that linking and starting need no `libcuda`.
//! It never loads a driver, so it tests the same on machines that have one.

use std::ffi::{CStr, c_char, c_int};
use std::ptr;

use cuda_driver as _;
use cust::error::CudaError;
use cust::sys;

const STUB_LIBRARY: c_int = 34;

#[test]
fn cust_returns_errors_that_can_be_printed() {
    let errors = [
        cust::init(cust::CudaFlags::empty()).unwrap_err(),
        cust::quick_init().map(drop).unwrap_err(),
        cust::device::Device::get_device(0).map(drop).unwrap_err(),
        cust::memory::DeviceBuffer::<u8>::zeroed(16).map(drop).unwrap_err(),
        cust::module::Module::from_ptx(".version 8.0", &[]).map(drop).unwrap_err(),
    ];
    for error in errors {
        assert_eq!(error, CudaError::UnknownError);
        assert_eq!(error.to_string(), "\"the NVIDIA driver is not loaded\"");
    }
}

#[test]
fn entry_points_return_stub_library() {
    // SAFETY: without a driver the calls ignore their arguments and dereference no pointer.
    unsafe {
        assert_eq!(raw(sys::cuInit(0)), STUB_LIBRARY);
        assert_eq!(raw(sys::cuCtxSynchronize()), STUB_LIBRARY);
        assert_eq!(raw(sys::cuMemFree_v2(0)), STUB_LIBRARY);
        let function = ptr::null_mut();
        let launch = sys::cuLaunchKernel(
            function,
            1,
            1,
            1,
            1,
            1,
            1,
            0,
            ptr::null_mut(),
            ptr::null_mut(),
            ptr::null_mut(),
        );
        assert_eq!(raw(launch), STUB_LIBRARY);
    }
}

#[test]
fn error_names_are_available_without_a_driver() {
    let mut name: *const c_char = ptr::null();
    // SAFETY: the pointer is valid for a write, and the call writes a C string there that is never freed.
    let name = unsafe {
        assert_eq!(raw(sys::cuGetErrorName(sys::cudaError_enum::CUDA_ERROR_NO_DEVICE, &mut name)), 0);
        assert_eq!(raw(sys::cuGetErrorString(sys::cudaError_enum::CUDA_ERROR_NO_DEVICE, ptr::null_mut())), 0);
        CStr::from_ptr(name)
    };
    assert_eq!(name, c"the NVIDIA driver is not loaded");
}

#[test]
fn any_status_is_described_without_a_driver() {
    for status in [0, 100, 912, -1, i32::MAX] {
        assert_eq!(cuda_driver::describe_status(status).unwrap(), "the NVIDIA driver is not loaded");
    }
}

#[test]
fn a_missing_library_is_named_with_the_remedy() {
    // SAFETY: there is no such library, so no code of it runs.
    let error = unsafe { cuda_driver::load_from("libcuda-absent.so.1") }.unwrap_err();
    assert!(matches!(error, cuda_driver::LoadError::NotFound { .. }));
    let text = error.to_string();
    assert!(text.starts_with("no NVIDIA driver: libcuda-absent.so.1 not found"), "{text}");
    assert!(text.contains("install") && !text.contains('\n'), "{text}");
}

#[test]
fn a_file_that_is_no_library_is_not_reported_as_missing() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "not a shared object").unwrap();
    // SAFETY: the loader refuses the file before any code of it runs.
    let error = unsafe { cuda_driver::load_from(file.path()) }.unwrap_err();
    assert!(matches!(error, cuda_driver::LoadError::NotADriver { .. }), "{error}");
}

#[test]
#[cfg(target_os = "linux")]
fn the_process_has_not_loaded_libcuda() {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    assert!(!maps.contains("libcuda.so"), "{maps}");
}

fn raw(status: sys::CUresult) -> c_int {
    status as c_int
}
