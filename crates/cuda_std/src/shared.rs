//! The dynamic shared memory of a thread block, as 32-bit addresses of the shared window.
//!
//! The launch sets its size.

use core::arch::{asm, global_asm};

global_asm!(".extern .shared .align 1024 .b8 cuda_std_dynamic_shared[];");

/// Returns the address, in the shared window, of the dynamic shared memory.
///
/// The address is a multiple of 1,024, as the swizzled layouts of TMA and wgmma require.
#[inline(always)]
pub fn dynamic_shared_mem() -> u32 {
    let address;
    // SAFETY: only takes the address of a symbol that this module defines.
    unsafe { asm!("mov.u32 {}, cuda_std_dynamic_shared;", out(reg32) address, options(pure, nomem, nostack)) }
    address
}
