//! `setmaxnreg`: moving registers from the producer to the consumers.

use core::arch::asm;

use liquidgemm_format::tile::TileShape;

/// The counts depend on the consumers alone.
const fn shape(strips: u32, halves: u32) -> TileShape {
    TileShape { strips, tokens: 256, halves, split: 1, stages: 1 }
}

/// Gives registers back: this warpgroup keeps what a producer beside `STRIPS` × `HALVES` consumers needs.
///
/// # Safety
/// Every warp of the warpgroup calls it, and the kernel has launch bounds.
#[inline(always)]
pub unsafe fn decrease<const STRIPS: u32, const HALVES: u32>() {
    // SAFETY: the caller vouches for the warpgroup.
    unsafe {
        asm!(
            "setmaxnreg.dec.sync.aligned.u32 {};",
            const shape(STRIPS, HALVES).producer_registers(),
            options(nostack)
        );
    }
}

/// Takes registers: this warpgroup has its share of what a block of `STRIPS` × `HALVES` consumers can have.
///
/// # Safety
/// Every warp of the warpgroup calls it, and the kernel has launch bounds.
#[inline(always)]
pub unsafe fn increase<const STRIPS: u32, const HALVES: u32>() {
    // SAFETY: the caller vouches for the warpgroup.
    unsafe {
        asm!(
            "setmaxnreg.inc.sync.aligned.u32 {};",
            const shape(STRIPS, HALVES).consumer_registers(),
            options(nostack)
        );
    }
}

/// Gives registers back: this warpgroup keeps `COUNT` a thread.
///
/// # Safety
/// As for [`decrease`].
#[inline(always)]
pub unsafe fn decrease_to<const COUNT: u32>() {
    // SAFETY: the caller vouches for the warpgroup.
    unsafe { asm!("setmaxnreg.dec.sync.aligned.u32 {};", const COUNT, options(nostack)) }
}

/// Takes registers: this warpgroup has `COUNT` a thread.
///
/// # Safety
/// As for [`increase`]; the block's warpgroups together have no more than it started with.
#[inline(always)]
pub unsafe fn increase_to<const COUNT: u32>() {
    // SAFETY: the caller vouches for the warpgroup.
    unsafe { asm!("setmaxnreg.inc.sync.aligned.u32 {};", const COUNT, options(nostack)) }
}
