//! TMA: asynchronous bulk copies between global and shared memory.
//!
//! A whole warp, converged, calls these functions, and the hardware elects the lane that issues the copy.
//! If a lane were selected by a comparison,
//! the compiler could not see that it is alone, and would make a loop over the lanes of each copy.

use core::arch::asm;
use cuda_std::TensorMap;

/// How long the L2 cache keeps the data that a copy reads.
#[derive(Clone, Copy)]
pub struct Policy(u64);

impl Policy {
    /// Returns the policy for data that is read once.
    #[inline(always)]
    pub fn evict_first() -> Self {
        let policy;
        // SAFETY: the instruction only computes a number.
        unsafe {
            asm!("createpolicy.fractional.L2::evict_first.b64 {}, 1.0;", out(reg64) policy, options(pure, nomem, nostack));
        }
        Self(policy)
    }

    /// Returns the policy for data without preference.
    #[inline(always)]
    pub fn evict_normal() -> Self {
        let policy;
        // SAFETY: the instruction only computes a number.
        unsafe {
            asm!("createpolicy.fractional.L2::evict_normal.b64 {}, 1.0;", out(reg64) policy, options(pure, nomem, nostack));
        }
        Self(policy)
    }
}

/// Prefetches a tensor map.
///
/// # Safety
/// `map` points into the kernel's parameters.
#[inline(always)]
pub unsafe fn prefetch_map(map: *const TensorMap) {
    // SAFETY: the caller guarantees the map.
    unsafe { asm!("prefetch.tensormap [{}];", in(reg64) map, options(nostack)) }
}

/// Copies the box at `(x, y)` of a two-dimensional tensor to `destination`.
/// The bytes count on `barrier`.
///
/// # Safety
/// The box fits at `destination`, aligned as the map's swizzle requires; `barrier` expects the bytes.
#[inline(always)]
pub unsafe fn load_2d(destination: u32, map: *const TensorMap, x: u32, y: u32, barrier: u32) {
    // SAFETY: the caller guarantees that the addresses are valid.
    unsafe {
        asm!(
            "{{",
            ".reg .pred elected;",
            "elect.sync _|elected, -1;",
            "@elected cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [{}], [{}, {{{}, {}}}], [{}];",
            "}}",
            in(reg32) destination, in(reg64) map, in(reg32) x, in(reg32) y, in(reg32) barrier,
            options(nostack)
        );
    }
}

/// As [`load_2d`], to the same place in every thread block of the cluster that has a bit in `blocks`.
///
/// Each of them counts the bytes on its own barrier.
///
/// # Safety
/// As for [`load_2d`], in each of the thread blocks.
#[inline(always)]
pub unsafe fn load_2d_multicast(
    destination: u32,
    map: *const TensorMap,
    x: u32,
    y: u32,
    barrier: u32,
    blocks: u32,
) {
    // SAFETY: the caller guarantees that the addresses are valid.
    unsafe {
        asm!(
            "{{",
            ".reg .pred elected;",
            ".reg .b16 blocks;",
            "cvt.u16.u32 blocks, {5};",
            "elect.sync _|elected, -1;",
            "@elected cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [{0}], [{1}, {{{2}, {3}}}], [{4}], blocks;",
            "}}",
            in(reg32) destination, in(reg64) map, in(reg32) x, in(reg32) y, in(reg32) barrier, in(reg32) blocks,
            options(nostack)
        );
    }
}

/// Copies `bytes` bytes from `source` to `destination`, and counts them on `barrier`.
///
/// The L2 cache keeps them as `policy` says.
///
/// # Safety
/// Both addresses are 16-byte aligned and valid for `bytes`, a multiple of 16; `barrier` expects the bytes.
#[inline(always)]
pub unsafe fn load_bulk(destination: u32, source: u64, bytes: u32, barrier: u32, policy: Policy) {
    // SAFETY: the caller guarantees that the addresses are valid.
    unsafe {
        asm!(
            "{{",
            ".reg .pred elected;",
            "elect.sync _|elected, -1;",
            "@elected cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [{}], [{}], {}, [{}], {};",
            "}}",
            in(reg32) destination, in(reg64) source, in(reg32) bytes, in(reg32) barrier, in(reg64) policy.0,
            options(nostack)
        );
    }
}

/// Copies `source` to the box at `(x, y)` of a two-dimensional tensor, as a group of its own.
///
/// Elements of the box outside the tensor are not written.
///
/// # Safety
/// The box lies at `source`, aligned as the map's swizzle requires.
/// `mbarrier::fence_async` and a barrier have made its stores visible,
/// and it stays there until [`await_stores`]. The tensor is writable.
#[inline(always)]
pub unsafe fn store_2d(map: *const TensorMap, x: u32, y: u32, source: u32) {
    // SAFETY: the caller guarantees that the addresses are valid.
    unsafe {
        asm!(
            "{{",
            ".reg .pred elected;",
            "elect.sync _|elected, -1;",
            "@elected cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [{}, {{{}, {}}}], [{}];",
            "@elected cp.async.bulk.commit_group;",
            "}}",
            in(reg64) map, in(reg32) x, in(reg32) y, in(reg32) source,
            options(nostack)
        );
    }
}

/// Waits until at most `PENDING` of this thread's groups of stores have not read their source yet.
///
/// The hardware elects the same lane every time, so the warp that stores must be the warp that waits.
#[inline(always)]
pub fn await_stores<const PENDING: u32>() {
    // SAFETY: the instruction only waits.
    unsafe { asm!("cp.async.bulk.wait_group.read {};", const PENDING, options(nostack)) }
}
