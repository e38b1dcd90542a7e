//! Hints to the assembler that compiles the PTX.

use core::arch::asm;

/// Keeps the assembler from unrolling the loop in whose first basic block it stands.
#[inline(always)]
pub fn no_unroll() {
    // SAFETY: a directive, no instruction.
    unsafe { asm!(".pragma \"nounroll\";", options(nomem, nostack)) }
}

/// Returns the thread's index in its thread block, read again from its special register.
///
/// The compiler then keeps no earlier values that derive from the index in registers.
#[inline(always)]
pub fn thread_idx_anew() -> u32 {
    let index;
    // SAFETY: the instruction reads a special register.
    unsafe { asm!("mov.u32 {}, %tid.x;", out(reg32) index, options(nomem, nostack, preserves_flags)) };
    index
}
