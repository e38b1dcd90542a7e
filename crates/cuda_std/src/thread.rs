//! Where a thread stands in its block and grid, and the barriers of a block.

use core::arch::{asm, nvptx};

/// The thread's x index in its block.
#[inline(always)]
pub fn thread_idx_x() -> u32 {
    // SAFETY: reads a special register.
    unsafe { nvptx::_thread_idx_x() as u32 }
}

/// The block's x index in the grid.
#[inline(always)]
pub fn block_idx_x() -> u32 {
    // SAFETY: reads a special register.
    unsafe { nvptx::_block_idx_x() as u32 }
}

/// The number of threads in a block along x.
#[inline(always)]
pub fn block_dim_x() -> u32 {
    // SAFETY: reads a special register.
    unsafe { nvptx::_block_dim_x() as u32 }
}

/// The number of blocks in the grid along x.
#[inline(always)]
pub fn grid_dim_x() -> u32 {
    // SAFETY: reads a special register.
    unsafe { nvptx::_grid_dim_x() as u32 }
}

/// Waits for every thread of the block; their earlier memory accesses are visible afterwards.
#[inline(always)]
pub fn sync_threads() {
    // SAFETY: the barrier touches no memory of its own.
    unsafe { nvptx::_syncthreads() }
}

/// Waits at named barrier `ID` until `THREADS` threads, whole warps, have come to it.
///
/// Barrier 0 is the one of [`sync_threads`].
#[inline(always)]
pub fn sync_named<const THREADS: u32>(id: u32) {
    // SAFETY: as for `sync_threads`.
    unsafe { asm!("bar.sync {}, {};", in(reg32) id, const THREADS, options(nostack)) }
}

/// The multiprocessor's clock, in cycles.
#[inline(always)]
pub fn clock64() -> u64 {
    let cycles;
    // SAFETY: reads a special register.
    unsafe { asm!("mov.u64 {}, %clock64;", out(reg64) cycles, options(nomem, nostack)) }
    cycles
}

/// Stops the grid with a launch error.
#[inline(always)]
pub fn trap() -> ! {
    // SAFETY: nothing runs after it.
    unsafe { nvptx::trap() }
}
