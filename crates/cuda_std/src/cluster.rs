//! Where a block stands in its thread-block cluster, and the cluster's barrier.

use core::arch::asm;

/// The block's rank in its cluster.
#[inline(always)]
pub fn block_rank() -> u32 {
    let rank;
    // SAFETY: reads a special register.
    unsafe { asm!("mov.u32 {}, %cluster_ctarank;", out(reg32) rank, options(pure, nomem, nostack)) }
    rank
}

/// The cluster's index in the grid along x.
#[inline(always)]
pub fn cluster_idx_x() -> u32 {
    let index;
    // SAFETY: reads a special register.
    unsafe { asm!("mov.u32 {}, %clusterid.x;", out(reg32) index, options(pure, nomem, nostack)) }
    index
}

/// The number of blocks in a cluster; 1 where the launch asked for none.
#[inline(always)]
pub fn blocks() -> u32 {
    let count;
    // SAFETY: reads a special register.
    unsafe { asm!("mov.u32 {}, %cluster_nctarank;", out(reg32) count, options(pure, nomem, nostack)) }
    count
}

/// Arrives at the cluster's barrier, without waiting; [`wait`] must follow. It orders no memory accesses.
#[inline(always)]
pub fn arrive_relaxed() {
    // SAFETY: the barrier touches no memory of its own.
    unsafe { asm!("barrier.cluster.arrive.relaxed.aligned;", options(nostack)) }
}

/// Waits until every thread of every block of the cluster has arrived.
#[inline(always)]
pub fn wait() {
    // SAFETY: the barrier touches no memory of its own.
    unsafe { asm!("barrier.cluster.wait.aligned;", options(nostack)) }
}

/// Waits for every thread of every block of the cluster. It orders no memory accesses: what others must see needs a fence
/// of its own.
#[inline(always)]
pub fn sync_cluster_relaxed() {
    arrive_relaxed();
    wait();
}
