//! A Rust program that links libcuda itself, beside this library. `c_program.rs` compiles and runs it with `fake_cuda.c`.
//!
//! Its calls must reach the libcuda that it links, before and after the library has loaded the driver.

use std::ffi::{c_int, c_uint};
use std::ptr;

#[link(name = "cuda")]
unsafe extern "C" {
    fn cuInit(flags: c_uint) -> c_int;
    fn fakeCalls() -> c_int;
}

fn main() {
    // SAFETY: the functions have these signatures; the pointer is valid for a write.
    unsafe {
        assert_eq!((cuInit(0), fakeCalls()), (42, 1));
        let mut gpu = ptr::null_mut();
        assert_eq!(liquidgemm_c::lg_gpu_open(0, &mut gpu), liquidgemm_c::LG_ERROR_DRIVER);
        assert_eq!(fakeCalls(), 2);
        assert_eq!((cuInit(0), fakeCalls()), (42, 3));
    }
    println!("all passed");
}
