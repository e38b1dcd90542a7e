//! The position of a thread in its warp, and the collective operations of a warp's lanes.
//!
//! These wrap PTX instructions.

use core::arch::asm;

/// Threads per warp.
pub const WARP_SIZE: u32 = 32;

/// Returns the lane of the thread in its warp.
#[inline(always)]
pub fn lane_id() -> u32 {
    let lane;
    // SAFETY: only reads a special register.
    unsafe { asm!("mov.u32 {}, %laneid;", out(reg32) lane, options(pure, nomem, nostack)) }
    lane
}

/// Returns lane 0's `value` in every lane.
///
/// It also tells the compiler that the value is the same across the warp.
#[inline(always)]
pub fn broadcast(value: u32) -> u32 {
    let uniform;
    // SAFETY: the mask names every lane of the warp.
    // All of them take part, because kernels call this before they diverge.
    unsafe {
        asm!("shfl.sync.idx.b32 {}, {}, 0, 31, -1;", out(reg32) uniform, in(reg32) value, options(nomem, nostack))
    }
    uniform
}

/// Returns the `value` of the lane whose number differs in the bits of `MASK`.
///
/// Every lane of the warp calls it.
#[inline(always)]
pub fn shuffle_xor<const MASK: u32>(value: f32) -> f32 {
    let other;
    // SAFETY: the mask names every lane of the warp, and all of them take part.
    unsafe {
        asm!("shfl.sync.bfly.b32 {}, {}, {}, 31, -1;", out(reg32) other, in(reg32) value, const MASK, options(nomem, nostack))
    }
    other
}

/// Returns the largest `value` of the warp's lanes in every lane.
///
/// Every lane of the warp calls it.
#[inline(always)]
pub fn reduce_max(value: u32) -> u32 {
    let max;
    // SAFETY: the mask names every lane of the warp, and all of them take part.
    unsafe {
        asm!("redux.sync.max.u32 {}, {}, -1;", out(reg32) max, in(reg32) value, options(nomem, nostack))
    }
    max
}

/// Waits for every lane of the warp.
/// Their earlier memory accesses are visible afterwards.
#[inline(always)]
pub fn sync_warp() {
    // SAFETY: the barrier itself accesses no memory.
    unsafe { asm!("bar.warp.sync -1;", options(nostack)) }
}
