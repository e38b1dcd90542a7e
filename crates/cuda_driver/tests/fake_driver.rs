//! Calls through the entry points after a driver is loaded.
//!
//! The driver is a library that this test compiles from `fake/libcuda.rs`.
//! One test function holds all checks, because loading changes the whole process.

use std::ffi::{c_int, c_uint, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::ptr;

use cust::sys;

/// Compiles a library for this host and returns its path.
fn compile(source: &Path, into: &Path) -> PathBuf {
    let library =
        into.join(format!("{}fake_cuda{}", std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX));
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let output = Command::new(rustc)
        .args(["--edition=2024", "--crate-type=cdylib", "--crate-name=fake_cuda", "-O", "-o"])
        .arg(&library)
        .arg(source)
        .output()
        .expect("rustc runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    library
}

#[test]
fn loaded_entry_points_pass_every_argument_to_the_driver() {
    let folder = tempfile::tempdir().unwrap();

    // A library without driver functions is refused, and no entry point is connected to it.
    let empty = folder.path().join("empty.rs");
    std::fs::write(&empty, "").unwrap();
    let not_a_driver = compile(&empty, folder.path());
    // SAFETY: the library is the empty one compiled above.
    let error = unsafe { cuda_driver::load_from(&not_a_driver) }.unwrap_err();
    assert!(matches!(error, cuda_driver::LoadError::NotADriver { .. }), "{error}");
    assert!(error.to_string().contains("cuDriverGetVersion"), "{error}");

    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fake/libcuda.rs");
    let folder = tempfile::tempdir().unwrap();
    let library = compile(&source, folder.path());
    // SAFETY: the library is the one in `fake/`, whose functions have the driver's signatures.
    let driver = unsafe { cuda_driver::load_from(&library) }.unwrap();
    assert_eq!(driver.version().to_string(), "12.9");

    // A process loads one driver: later calls return the first one.
    assert!(ptr::eq(driver, cuda_driver::load().unwrap()));

    // SAFETY: the fake driver accepts any value here, and writes only through pointers to locals.
    unsafe {
        assert_eq!(sys::cuInit(0) as c_int, 0);
        assert_eq!(sys::cuInit(5) as c_int, 1);

        let mut seen = [0_u64; 10];
        let status = sys::cuLaunchKernel(
            0x1111_2222_3333_4444_u64 as sys::CUfunction,
            2,
            3,
            4,
            5,
            6,
            7,
            0xFFFF_FFF8,
            0x5555_6666_7777_8888_u64 as sys::CUstream,
            0x9999_AAAA_BBBB_CCCC_u64 as *mut *mut c_void,
            (&raw mut seen).cast(),
        );
        assert_eq!(status as c_int, 700);
        let expected = [
            0x1111_2222_3333_4444,
            2,
            3,
            4,
            5,
            6,
            7,
            0xFFFF_FFF8,
            0x5555_6666_7777_8888,
            0x9999_AAAA_BBBB_CCCC,
        ];
        assert_eq!(seen, expected);

        let mut clamp = [0_f32; 2];
        sys::cuTexRefSetMipmapLevelClamp((&raw mut clamp).cast(), 0.25, -1e30);
        assert_eq!(clamp, [0.25, -1e30]);

        let mut handle = sys::CUipcMemHandle { reserved: [0; 64] };
        for (i, byte) in handle.reserved.iter_mut().enumerate() {
            *byte = i as _;
        }
        let mut sum = 0_u64;
        assert_eq!(sys::cuIpcOpenMemHandle_v2(&mut sum, handle, 1) as c_int, 1);
        assert_eq!(sum, (0..64).map(|i| i * (i + 1)).sum::<u64>());
    }

    // cust's safe calls reach the driver, too.
    assert_eq!(cust::device::Device::num_devices().unwrap(), 7);

    // Functions that the driver lacks still return the stub error.
    assert!(driver.missing().contains(&"cuMemGetInfo_v2"));
    assert!(!driver.missing().contains(&"cuLaunchKernel"));
    assert_eq!(cust::memory::mem_get_info().unwrap_err(), cust::error::CudaError::UnknownError);

    // The driver describes statuses, including those that cust has no name for.
    assert_eq!(cuda_driver::describe_status(912).unwrap(), "invalid cluster size");
    assert_eq!(cuda_driver::describe_status(-5), None);

    // Functions unknown to cust are found by name.
    type Encode = unsafe extern "C" fn(c_uint) -> c_int;
    // SAFETY: the fake's function has this signature.
    let encode = unsafe { driver.symbol::<Encode>("cuTensorMapEncodeTiled") }.unwrap();
    // SAFETY: the fake's function has no requirements.
    assert_eq!(unsafe { encode(4) }, 5);
    assert_eq!(driver.lookup("cuTensorMapEncodeTiled"), Some(encode as *const c_void));
    assert_eq!(driver.lookup("cuNoSuchFunction"), None);
}
