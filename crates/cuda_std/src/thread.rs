//! The position of a thread in its thread block and grid, and the barriers of a thread block.
//!
//! These wrap the intrinsics of `core::arch::nvptx` and a few PTX instructions.

use core::arch::{asm, nvptx};

/// Returns the x index of the thread in its thread block.
#[inline(always)]
pub fn thread_idx_x() -> u32 {
    // SAFETY: only reads a special register.
    unsafe { nvptx::_thread_idx_x() as u32 }
}

/// Returns the x index of the thread block in the grid.
#[inline(always)]
pub fn block_idx_x() -> u32 {
    // SAFETY: only reads a special register.
    unsafe { nvptx::_block_idx_x() as u32 }
}

/// Returns the number of threads in a thread block along x.
#[inline(always)]
pub fn block_dim_x() -> u32 {
    // SAFETY: only reads a special register.
    unsafe { nvptx::_block_dim_x() as u32 }
}

/// Returns the number of thread blocks in the grid along x.
#[inline(always)]
pub fn grid_dim_x() -> u32 {
    // SAFETY: only reads a special register.
    unsafe { nvptx::_grid_dim_x() as u32 }
}

/// Waits for every thread of the thread block.
/// Their earlier memory accesses are visible afterwards.
#[inline(always)]
pub fn sync_threads() {
    // SAFETY: the barrier itself accesses no memory.
    unsafe { nvptx::_syncthreads() }
}

/// As [`sync_threads`]; returns whether `condition` holds for any thread.
#[inline(always)]
pub fn sync_threads_or(condition: bool) -> bool {
    let any: u32;
    // SAFETY: as for `sync_threads`.
    unsafe {
        asm!(
            "{{",
            ".reg .pred holds, any;",
            "setp.ne.u32 holds, {1}, 0;",
            "bar.red.or.pred any, 0, holds;",
            "selp.u32 {0}, 1, 0, any;",
            "}}",
            out(reg32) any,
            in(reg32) condition as u32,
            options(nostack)
        )
    }
    any != 0
}

/// Waits at the named barrier `id` until `THREADS` threads, in whole warps, have arrived there.
///
/// Barrier 0 is that of [`sync_threads`].
#[inline(always)]
pub fn sync_named<const THREADS: u32>(id: u32) {
    // SAFETY: as for `sync_threads`.
    unsafe { asm!("bar.sync {}, {};", in(reg32) id, const THREADS, options(nostack)) }
}

/// Returns the clock of the SM, in cycles.
#[inline(always)]
pub fn clock64() -> u64 {
    let cycles;
    // SAFETY: only reads a special register.
    unsafe { asm!("mov.u64 {}, %clock64;", out(reg64) cycles, options(nomem, nostack)) }
    cycles
}

/// Stops the grid with a launch error.
#[inline(always)]
pub fn trap() -> ! {
    // SAFETY: it stops the grid, so nothing runs after it.
    unsafe { nvptx::trap() }
}
