//! `cp.async`: asynchronous copies from global to shared memory by the threads themselves.
//!
//! A thread's copies form groups. A thread can wait until at most so many of its latest groups are pending.
//! Other threads of its warp see the copied data after a warp barrier.

use core::arch::asm;

/// Copies 16 bytes from `source` to `destination` if `valid`, bypassing the L1 cache.
///
/// # Safety
/// If `valid`, both addresses are valid and 16-byte aligned,
/// and nothing reads or writes the destination before the copy is done.
#[inline(always)]
pub unsafe fn copy_16_if(valid: bool, destination: u32, source: u64) {
    // SAFETY: the caller guarantees that the addresses are valid.
    unsafe {
        asm!(
            "{{",
            ".reg .pred valid;",
            "setp.ne.u32 valid, {2}, 0;",
            "@valid cp.async.cg.shared.global [{0}], [{1}], 16;",
            "}}",
            in(reg32) destination,
            in(reg64) source,
            in(reg32) valid as u32,
            options(nostack)
        );
    }
}

/// Copies 4 bytes from `source` to `destination` if `valid`.
///
/// # Safety
/// If `valid`, both addresses are valid and 4-byte aligned,
/// and nothing reads or writes the destination before the copy is done.
#[inline(always)]
pub unsafe fn copy_4_if(valid: bool, destination: u32, source: u64) {
    // SAFETY: the caller guarantees that the addresses are valid.
    unsafe {
        asm!(
            "{{",
            ".reg .pred valid;",
            "setp.ne.u32 valid, {2}, 0;",
            "@valid cp.async.ca.shared.global [{0}], [{1}], 4;",
            "}}",
            in(reg32) destination,
            in(reg64) source,
            in(reg32) valid as u32,
            options(nostack)
        );
    }
}

/// Closes a group: all copies of this thread since the last group.
#[inline(always)]
pub fn end_group() {
    // SAFETY: the instruction accesses no memory of its own.
    unsafe { asm!("cp.async.commit_group;", options(nostack)) }
}

/// Waits until at most `PENDING` of this thread's latest groups are pending.
#[inline(always)]
pub fn await_groups<const PENDING: u32>() {
    // SAFETY: the instruction accesses no memory of its own.
    unsafe { asm!("cp.async.wait_group {};", const PENDING, options(nostack)) }
}
