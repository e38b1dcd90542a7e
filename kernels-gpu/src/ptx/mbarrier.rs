//! `mbarrier`: transaction barriers in shared memory, which synchronize producers and consumers.

use core::arch::asm;
use cuda_std::thread;

use super::memory::DEADLOCK_CYCLES;

/// Initializes the 8 bytes at `address` as a barrier whose phase ends after `arrivals` arrivals.
///
/// # Safety
/// One thread calls it.
/// No thread uses the barrier before [`fence_init`] and a barrier of the thread block.
#[inline(always)]
pub unsafe fn init(address: u32, arrivals: u32) {
    // SAFETY: the caller guarantees that the address is valid.
    unsafe {
        asm!("mbarrier.init.shared::cta.b64 [{}], {};", in(reg32) address, in(reg32) arrivals, options(nostack));
    }
}

/// Makes initialized barriers visible to TMA and to the cluster.
///
/// # Safety
/// The thread that initialized the barriers calls it.
#[inline(always)]
pub unsafe fn fence_init() {
    // SAFETY: a fence.
    unsafe { asm!("fence.mbarrier_init.release.cluster;", options(nostack)) }
}

/// Makes this thread's earlier stores to shared memory visible to the tensor cores and TMA.
///
/// # Safety
/// No requirements. A barrier must follow before other threads rely on it.
#[inline(always)]
pub unsafe fn fence_async() {
    // SAFETY: a fence.
    unsafe { asm!("fence.proxy.async.shared::cta;", options(nostack)) }
}

/// Arrives once for the warp, and makes the phase wait for `bytes` more of asynchronous copies.
///
/// # Safety
/// `address` is an initialized barrier; the whole warp calls it, converged.
#[inline(always)]
pub unsafe fn arrive_expect(address: u32, bytes: u32) {
    // SAFETY: the caller guarantees that the address is valid.
    unsafe {
        asm!(
            "{{",
            ".reg .pred elected;",
            "elect.sync _|elected, -1;",
            "@elected mbarrier.arrive.expect_tx.shared::cta.b64 _, [{}], {};",
            "}}",
            in(reg32) address,
            in(reg32) bytes,
            options(nostack)
        );
    }
}

/// Arrives at the barrier.
///
/// # Safety
/// `address` is an initialized barrier.
#[inline(always)]
pub unsafe fn arrive(address: u32) {
    // SAFETY: the caller guarantees that the address is valid.
    unsafe { asm!("mbarrier.arrive.shared::cta.b64 _, [{}];", in(reg32) address, options(nostack)) }
}

/// Arrives by `$instruction` at the barrier at `$address` in the cluster's thread block `$rank`.
macro_rules! arrive_remote {
    ($instruction:literal, $address:expr, $rank:expr) => {
        asm!(
            "{{",
            ".reg .b32 remote;",
            "mapa.shared::cluster.u32 remote, {}, {};",
            concat!($instruction, " _, [remote];"),
            "}}",
            in(reg32) $address,
            in(reg32) $rank,
            options(nostack)
        )
    };
}

/// Arrives at the barrier at `address` in the shared memory of the cluster's thread block `rank`.
///
/// Earlier loads from shared memory may complete after the arrival if their values have not been used yet.
///
/// # Safety
/// `address` is an initialized barrier there, and that thread block has not ended.
#[inline(always)]
pub unsafe fn arrive_remote(address: u32, rank: u32) {
    // SAFETY: the caller guarantees the barrier and its thread block.
    unsafe { arrive_remote!("mbarrier.arrive.shared::cluster.b64", address, rank) }
}

/// As [`arrive_remote`], but ordered for the whole cluster after all reads and writes of this thread.
///
/// It takes as long as a fence.
///
/// # Safety
/// As for [`arrive_remote`].
#[inline(always)]
pub unsafe fn arrive_remote_in_order(address: u32, rank: u32) {
    // SAFETY: the caller guarantees the barrier and its thread block.
    unsafe { arrive_remote!("mbarrier.arrive.release.cluster.shared::cluster.b64", address, rank) }
}

/// Returns whether the phase of this parity has ended.
///
/// # Safety
/// `address` is an initialized barrier.
#[inline(always)]
pub unsafe fn test(address: u32, parity: u32) -> bool {
    let done: u32;
    // SAFETY: the caller guarantees that the address is valid.
    unsafe {
        asm!(
            "{{",
            ".reg .pred complete;",
            "mbarrier.test_wait.parity.shared::cta.b64 complete, [{1}], {2};",
            "selp.u32 {0}, 1, 0, complete;",
            "}}",
            out(reg32) done,
            in(reg32) address,
            in(reg32) parity,
            options(nostack)
        );
    }
    done != 0
}

/// Returns whether the phase of this parity has ended. If not, it first suspends the thread for a while.
///
/// # Safety
/// `address` is an initialized barrier.
#[inline(always)]
unsafe fn try_wait(address: u32, parity: u32) -> bool {
    let done: u32;
    // SAFETY: the caller guarantees that the address is valid.
    unsafe {
        asm!(
            "{{",
            ".reg .pred complete;",
            "mbarrier.try_wait.parity.shared::cta.b64 complete, [{1}], {2};",
            "selp.u32 {0}, 1, 0, complete;",
            "}}",
            out(reg32) done,
            in(reg32) address,
            in(reg32) parity,
            options(nostack)
        );
    }
    done != 0
}

/// Waits until the phase of this parity has ended.
///
/// # Safety
/// `address` is an initialized barrier.
#[inline(always)]
pub unsafe fn wait(address: u32, parity: u32) {
    // SAFETY: the caller guarantees that the address is valid.
    if unsafe { try_wait(address, parity) } {
        return;
    }
    let start = thread::clock64();
    // SAFETY: as above.
    while !unsafe { try_wait(address, parity) } {
        if thread::clock64().wrapping_sub(start) > DEADLOCK_CYCLES {
            thread::trap();
        }
    }
}
