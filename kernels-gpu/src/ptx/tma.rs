//! Asynchronous copies from global to shared memory by the copy engine.

use core::arch::asm;
use cuda_std::TensorMap;

/// Fetches a tensor map ahead of its first use.
///
/// # Safety
/// `map` points into the kernel's parameters.
#[inline(always)]
pub unsafe fn prefetch_map(map: *const TensorMap) {
    // SAFETY: the caller vouches for the map.
    unsafe { asm!("prefetch.tensormap [{}];", in(reg64) map, options(nostack)) }
}

/// Copies the box at `(x, y)` of a two-dimensional tensor to `destination`, and counts its bytes on `barrier`.
///
/// # Safety
/// The box fits at `destination`, aligned as the map's swizzle wants; `barrier` expects the bytes.
#[inline(always)]
pub unsafe fn load_2d(destination: u32, map: *const TensorMap, x: u32, y: u32, barrier: u32) {
    // SAFETY: the caller vouches for the addresses.
    unsafe {
        asm!(
            "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [{}], [{}, {{{}, {}}}], [{}];",
            in(reg32) destination, in(reg64) map, in(reg32) x, in(reg32) y, in(reg32) barrier,
            options(nostack)
        );
    }
}

/// Copies `bytes` from `source` to `destination`, and counts them on `barrier`.
///
/// # Safety
/// Both are 16-byte aligned and valid for `bytes`, a multiple of 16; `barrier` expects the bytes.
#[inline(always)]
pub unsafe fn load_bulk(destination: u32, source: u64, bytes: u32, barrier: u32) {
    // SAFETY: the caller vouches for the addresses.
    unsafe {
        asm!(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [{}], [{}], {}, [{}];",
            in(reg32) destination, in(reg64) source, in(reg32) bytes, in(reg32) barrier,
            options(nostack)
        );
    }
}
