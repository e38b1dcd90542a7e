//! The block's dynamic shared memory, as the 32-bit addresses of the shared window.

use core::arch::{asm, global_asm};

global_asm!(".extern .shared .align 1024 .b8 cuda_std_dynamic_shared[];");

/// The address, in the shared window, of the dynamic shared memory that the launch asked for.
///
/// It is a multiple of 1,024, which the swizzled layouts of TMA and wgmma need.
#[inline(always)]
pub fn dynamic_shared_mem() -> u32 {
    let address;
    // SAFETY: takes the address of a symbol that this module defines.
    unsafe { asm!("mov.u32 {}, cuda_std_dynamic_shared;", out(reg32) address, options(pure, nomem, nostack)) }
    address
}
