//! `mma` m16n8k32 on int8: a warp's matrix multiplication with all operands in registers.

use core::arch::asm;

/// Computes `sums += a · b` for int8 `a` of 16 × 32 and `b` of 32 × 8.
///
/// With `g = lane / 4` and `c = lane % 4`, a lane holds:
///
/// - of `a`, rows `g` and `g + 8` at k `4·c ..`, then both at k `16 + 4·c ..`;
/// - of `b`, column `g` at the same k;
/// - of the sums, row `g`, then row `g + 8`, each at columns `2·c` and `2·c + 1`.
///
/// # Safety
/// All lanes take part.
#[inline(always)]
pub unsafe fn multiply_accumulate(sums: &mut [i32; 4], a: [u32; 4], b: [u32; 2]) {
    let [d0, d1, d2, d3] = sums;
    // SAFETY: register arithmetic; the caller guarantees that all lanes take part.
    unsafe {
        asm!(
            "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {{{0}, {1}, {2}, {3}}}, {{{4}, {5}, {6}, {7}}}, {{{8}, {9}}}, {{{0}, {1}, {2}, {3}}};",
            inout(reg32) *d0, inout(reg32) *d1, inout(reg32) *d2, inout(reg32) *d3,
            in(reg32) a[0], in(reg32) a[1], in(reg32) a[2], in(reg32) a[3],
            in(reg32) b[0], in(reg32) b[1],
            options(nomem, nostack)
        );
    }
}
