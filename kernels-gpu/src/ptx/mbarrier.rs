//! `mbarrier`: the transaction barriers on which producer and consumers meet.

use core::arch::asm;
use cuda_std::thread;

/// Cycles after which a wait is taken for a deadlock and ends the kernel with an error: about ten seconds.
const DEADLOCK_CYCLES: u64 = 20_000_000_000;

/// Makes the 8 bytes at `address` a barrier whose phase ends after `arrivals` arrivals.
///
/// # Safety
/// One thread calls it, and no thread uses the barrier before [`fence_init`] and a block barrier.
#[inline(always)]
pub unsafe fn init(address: u32, arrivals: u32) {
    // SAFETY: the caller vouches for the address.
    unsafe {
        asm!("mbarrier.init.shared::cta.b64 [{}], {};", in(reg32) address, in(reg32) arrivals, options(nostack));
    }
}

/// Makes initialised barriers visible to the copy engine and to the cluster.
///
/// # Safety
/// None beyond being called by the thread that initialised them.
#[inline(always)]
pub unsafe fn fence_init() {
    // SAFETY: a fence.
    unsafe { asm!("fence.mbarrier_init.release.cluster;", options(nostack)) }
}

/// Makes this thread's earlier stores to shared memory visible to the tensor cores and the copy engine.
///
/// # Safety
/// None; a barrier must follow before others rely on it.
#[inline(always)]
pub unsafe fn fence_async() {
    // SAFETY: a fence.
    unsafe { asm!("fence.proxy.async.shared::cta;", options(nostack)) }
}

/// Arrives once for the warp, and lets the phase wait for `bytes` more of asynchronous copies.
///
/// # Safety
/// `address` is an initialised barrier; the whole warp calls it, converged.
#[inline(always)]
pub unsafe fn arrive_expect(address: u32, bytes: u32) {
    // SAFETY: the caller vouches for the address.
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

/// Arrives.
///
/// # Safety
/// `address` is an initialised barrier.
#[inline(always)]
pub unsafe fn arrive(address: u32) {
    // SAFETY: the caller vouches for the address.
    unsafe { asm!("mbarrier.arrive.shared::cta.b64 _, [{}];", in(reg32) address, options(nostack)) }
}

/// Arrives by `instruction` at the barrier that lies at `address` in the shared memory of the cluster's block `rank`.
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

/// Arrives at the barrier that lies at `address` in the shared memory of the cluster's block `rank`. Loads from shared memory whose values
/// have not been used yet may come after.
///
/// # Safety
/// `address` is an initialised barrier there, and that block has not ended.
#[inline(always)]
pub unsafe fn arrive_remote(address: u32, rank: u32) {
    // SAFETY: the caller vouches for the address.
    unsafe { arrive_remote!("mbarrier.arrive.shared::cluster.b64", address, rank) }
}

/// As [`arrive_remote`], after all that this thread has read and written before, as seen by the whole cluster. It takes as long as a fence.
///
/// # Safety
/// As for [`arrive_remote`].
#[inline(always)]
pub unsafe fn arrive_remote_in_order(address: u32, rank: u32) {
    // SAFETY: the caller vouches for the address.
    unsafe { arrive_remote!("mbarrier.arrive.release.cluster.shared::cluster.b64", address, rank) }
}

/// Whether the phase of this parity has ended.
///
/// # Safety
/// `address` is an initialised barrier.
#[inline(always)]
pub unsafe fn test(address: u32, parity: u32) -> bool {
    let done: u32;
    // SAFETY: the caller vouches for the address.
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

/// Whether the phase of this parity has ended; suspends the thread for a while if not.
#[inline(always)]
unsafe fn try_wait(address: u32, parity: u32) -> bool {
    let done: u32;
    // SAFETY: the caller vouches for the address.
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
/// `address` is an initialised barrier.
#[inline(always)]
pub unsafe fn wait(address: u32, parity: u32) {
    // SAFETY: the caller vouches for the address.
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
