//! `setmaxnreg`: moves registers from the producer warpgroup to the consumers.
//!
//! `liquidgemm_format::tile` has the register counts.

use core::arch::asm;

use crate::shape::Shape;

/// Releases registers of this warpgroup down to those of a producer of tiles of shape `S`.
///
/// # Safety
/// Every warp of the warpgroup calls it, and the kernel has launch bounds.
#[inline(always)]
pub unsafe fn decrease<S: Shape>() {
    // SAFETY: the caller guarantees the warpgroup.
    unsafe {
        asm!(
            "setmaxnreg.dec.sync.aligned.u32 {};",
            const S::SHAPE.producer_registers(),
            options(nostack)
        );
    }
}

/// Takes registers for this warpgroup up to those of a consumer of tiles of shape `S`.
///
/// # Safety
/// Every warp of the warpgroup calls it, and the kernel has launch bounds.
#[inline(always)]
pub unsafe fn increase<S: Shape>() {
    // SAFETY: the caller guarantees the warpgroup.
    unsafe {
        asm!(
            "setmaxnreg.inc.sync.aligned.u32 {};",
            const S::SHAPE.consumer_registers(),
            options(nostack)
        );
    }
}

/// Releases registers of this warpgroup down to `COUNT` per thread.
///
/// # Safety
/// As for [`decrease`].
#[inline(always)]
pub unsafe fn decrease_to<const COUNT: u32>() {
    // SAFETY: the caller guarantees the warpgroup.
    unsafe { asm!("setmaxnreg.dec.sync.aligned.u32 {};", const COUNT, options(nostack)) }
}

/// Takes registers for this warpgroup up to `COUNT` per thread.
///
/// # Safety
/// As for [`increase`]. The thread block's warpgroups together have no more registers than it started with.
#[inline(always)]
pub unsafe fn increase_to<const COUNT: u32>() {
    // SAFETY: the caller guarantees the warpgroup.
    unsafe { asm!("setmaxnreg.inc.sync.aligned.u32 {};", const COUNT, options(nostack)) }
}
