//! The position of a thread block in its cluster, and the cluster's barrier.
//!
//! These wrap the PTX special registers of clusters and `barrier.cluster`.

use core::arch::asm;

/// Returns the rank of the thread block in its cluster.
#[inline(always)]
pub fn block_rank() -> u32 {
    let rank;
    // SAFETY: only reads a special register.
    unsafe { asm!("mov.u32 {}, %cluster_ctarank;", out(reg32) rank, options(pure, nomem, nostack)) }
    rank
}

/// Returns the x index of the cluster in the grid.
#[inline(always)]
pub fn cluster_idx_x() -> u32 {
    let index;
    // SAFETY: only reads a special register.
    unsafe { asm!("mov.u32 {}, %clusterid.x;", out(reg32) index, options(pure, nomem, nostack)) }
    index
}

/// Returns the number of thread blocks in the cluster; 1 if the launch has no cluster dimension.
#[inline(always)]
pub fn blocks() -> u32 {
    let count;
    // SAFETY: only reads a special register.
    unsafe { asm!("mov.u32 {}, %cluster_nctarank;", out(reg32) count, options(pure, nomem, nostack)) }
    count
}

/// Arrives at the cluster's barrier without waiting. A [`wait`] must follow.
/// It orders no memory accesses.
#[inline(always)]
pub fn arrive_relaxed() {
    // SAFETY: the barrier itself accesses no memory.
    unsafe { asm!("barrier.cluster.arrive.relaxed.aligned;", options(nostack)) }
}

/// Waits until every thread of every thread block of the cluster has arrived.
#[inline(always)]
pub fn wait() {
    // SAFETY: the barrier itself accesses no memory.
    unsafe { asm!("barrier.cluster.wait.aligned;", options(nostack)) }
}

/// Waits for every thread of every thread block of the cluster.
///
/// It orders no memory accesses: data for other threads needs its own fence.
#[inline(always)]
pub fn sync_cluster_relaxed() {
    arrive_relaxed();
    wait();
}

/// Waits for every thread of every thread block of the cluster.
/// Their earlier memory accesses are visible afterwards, also those to one another's shared memory.
#[inline(always)]
pub fn sync_cluster() {
    // SAFETY: the barrier itself accesses no memory.
    unsafe {
        asm!(
            "barrier.cluster.arrive.release.aligned;",
            "barrier.cluster.wait.acquire.aligned;",
            options(nostack)
        )
    }
}
