//! `setmaxnreg`: moving registers from the producer to the consumers.

use core::arch::asm;

/// Gives registers back: this warpgroup keeps `COUNT` a thread.
///
/// # Safety
/// Every warp of the warpgroup calls it, and the kernel has launch bounds.
#[inline(always)]
pub unsafe fn decrease<const COUNT: u32>() {
    // SAFETY: the caller vouches for the warpgroup.
    unsafe { asm!("setmaxnreg.dec.sync.aligned.u32 {};", const COUNT, options(nostack)) }
}

/// Takes registers: this warpgroup has `COUNT` a thread from here on.
///
/// # Safety
/// Every warp of the warpgroup calls it, and the kernel has launch bounds.
#[inline(always)]
pub unsafe fn increase<const COUNT: u32>() {
    // SAFETY: the caller vouches for the warpgroup.
    unsafe { asm!("setmaxnreg.inc.sync.aligned.u32 {};", const COUNT, options(nostack)) }
}
