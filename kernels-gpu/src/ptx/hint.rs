//! Hints to the assembler that compiles the PTX.

use core::arch::asm;

/// In the first block of a loop: keeps the loop as short as it is written.
#[inline(always)]
pub fn no_unroll() {
    // SAFETY: a directive, no instruction.
    unsafe { asm!(".pragma \"nounroll\";", options(nomem, nostack)) }
}

/// The thread's index in its block, read anew: what is derived from it is then not kept in registers from an earlier time.
#[inline(always)]
pub fn thread_idx_anew() -> u32 {
    let index;
    // SAFETY: it reads a special register.
    unsafe { asm!("mov.u32 {}, %tid.x;", out(reg32) index, options(nomem, nostack, preserves_flags)) };
    index
}
