//! `stmatrix` and `ldmatrix`: 8×8 matrices between the registers of a warp and shared memory.
//!
//! Elements are 16 bits. For bytes, such a matrix is 8×16.

use core::arch::asm;

/// Stores four 8×8 matrices.
///
/// Lane `8·i + r` gives the address of row `r` of matrix `i`, 16 bytes.
/// Lane `4·r + c` holds bytes `4·c ..` of row `r` of each matrix.
///
/// # Safety
/// As for [`store_transposed_x4`].
#[inline(always)]
pub unsafe fn store_x4(address: u32, matrices: [u32; 4]) {
    let [a, b, c, d] = matrices;
    // SAFETY: the caller guarantees the lanes and their addresses.
    unsafe {
        asm!(
            "stmatrix.sync.aligned.m8n8.x4.shared.b16 [{}], {{{}, {}, {}, {}}};",
            in(reg32) address, in(reg32) a, in(reg32) b, in(reg32) c, in(reg32) d,
            options(nostack)
        );
    }
}

/// Stores four 8×8 matrices, transposed.
///
/// Lane `8·i + r` gives the address of row `r` of matrix `i`, 16 bytes.
///
/// # Safety
/// All lanes take part.
/// Each address is 16-byte aligned and has 16 bytes of the thread block's shared memory.
#[inline(always)]
pub unsafe fn store_transposed_x4(address: u32, matrices: [u32; 4]) {
    let [a, b, c, d] = matrices;
    // SAFETY: the caller guarantees the lanes and their addresses.
    unsafe {
        asm!(
            "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [{}], {{{}, {}, {}, {}}};",
            in(reg32) address, in(reg32) a, in(reg32) b, in(reg32) c, in(reg32) d,
            options(nostack)
        );
    }
}

/// Stores two 8×8 matrices, transposed.
///
/// Lane `8·i + r` of the lower half-warp gives the address of row `r` of matrix `i`, 16 bytes.
///
/// # Safety
/// As for [`store_transposed_x4`].
#[inline(always)]
pub unsafe fn store_transposed_x2(address: u32, matrices: [u32; 2]) {
    let [a, b] = matrices;
    // SAFETY: the caller guarantees the lanes and their addresses.
    unsafe {
        asm!(
            "stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [{}], {{{}, {}}};",
            in(reg32) address, in(reg32) a, in(reg32) b,
            options(nostack)
        );
    }
}

/// Loads four 8×8 matrices.
///
/// Lane `8·i + r` gives the address of row `r` of matrix `i`, 16 bytes.
/// Lane `4·r + c` receives bytes `4·c ..` of row `r` of each matrix.
///
/// # Safety
/// All lanes take part. Each address is 16-byte aligned in the thread block's shared memory.
#[inline(always)]
pub unsafe fn load_x4(address: u32) -> [u32; 4] {
    let (a, b, c, d);
    // SAFETY: the caller guarantees the lanes and their addresses.
    unsafe {
        asm!(
            "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{{}, {}, {}, {}}}, [{}];",
            out(reg32) a, out(reg32) b, out(reg32) c, out(reg32) d, in(reg32) address,
            options(nostack)
        );
    }
    [a, b, c, d]
}
