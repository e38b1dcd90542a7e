//! Hints to the assembler that compiles the PTX.

use core::arch::asm;

/// In the first block of a loop: keeps the loop as short as it is written.
#[inline(always)]
pub fn no_unroll() {
    // SAFETY: a directive, no instruction.
    unsafe { asm!(".pragma \"nounroll\";", options(nomem, nostack)) }
}
