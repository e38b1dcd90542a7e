//! Where a thread stands in its warp, and what the lanes of a warp do together.

use core::arch::asm;

/// The threads of a warp.
pub const WARP_SIZE: u32 = 32;

/// The thread's lane in its warp.
#[inline(always)]
pub fn lane_id() -> u32 {
    let lane;
    // SAFETY: reads a special register.
    unsafe { asm!("mov.u32 {}, %laneid;", out(reg32) lane, options(pure, nomem, nostack)) }
    lane
}

/// Lane 0's `value`, in every lane: tells the compiler that a value is the same across the warp.
#[inline(always)]
pub fn broadcast(value: u32) -> u32 {
    let uniform;
    // SAFETY: every lane of the warp takes part, as kernels call it before they diverge.
    unsafe {
        asm!("shfl.sync.idx.b32 {}, {}, 0, 31, -1;", out(reg32) uniform, in(reg32) value, options(nomem, nostack))
    }
    uniform
}

/// Waits for every lane of the warp; their earlier memory accesses are visible afterwards.
#[inline(always)]
pub fn sync_warp() {
    // SAFETY: the barrier touches no memory of its own.
    unsafe { asm!("bar.warp.sync -1;", options(nostack)) }
}
