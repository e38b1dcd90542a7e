//! f32 arithmetic whose rounding matters, and conversions from 16-bit floats.
//!
//! The host twins are in `liquidgemm_format::activations` and `host/src/cpu/activations.rs`.
//! Sums, products and quotients are Rust's operators, which the compiler never fuses.

use core::arch::asm;

/// Returns `rn(a · b + c)`.
#[inline(always)]
pub fn multiply_add(a: f32, b: f32, c: f32) -> f32 {
    let result;
    // SAFETY: register arithmetic.
    unsafe {
        asm!("fma.rn.f32 {}, {}, {}, {};", out(reg32) result, in(reg32) a, in(reg32) b, in(reg32) c, options(pure, nomem, nostack));
    }
    result
}

/// Returns `rn(√x)`.
#[inline(always)]
pub fn square_root(x: f32) -> f32 {
    let result;
    // SAFETY: register arithmetic.
    unsafe { asm!("sqrt.rn.f32 {}, {};", out(reg32) result, in(reg32) x, options(pure, nomem, nostack)) }
    result
}

/// Returns `1 / x` with an error of at most 1 ulp. Neither x nor the result is subnormal.
#[inline(always)]
pub fn approximate_reciprocal(x: f32) -> f32 {
    let result;
    // SAFETY: register arithmetic.
    unsafe {
        asm!("rcp.approx.ftz.f32 {}, {};", out(reg32) result, in(reg32) x, options(pure, nomem, nostack))
    }
    result
}

/// Returns the larger of `|x|` and `|y|`, or NaN if one of them is NaN.
#[inline(always)]
pub fn max_magnitude(x: f32, y: f32) -> f32 {
    let result;
    // SAFETY: register arithmetic.
    unsafe {
        asm!(
            "{{",
            ".reg .f32 x, y;",
            "abs.f32 x, {1};",
            "abs.f32 y, {2};",
            "max.NaN.f32 {0}, x, y;",
            "}}",
            out(reg32) result, in(reg32) x, in(reg32) y,
            options(pure, nomem, nostack)
        );
    }
    result
}

/// Returns the two f16 of a word as f32, that of the lower half first.
#[inline(always)]
pub fn unpack_f16(word: u32) -> [f32; 2] {
    let (low, high);
    // SAFETY: register arithmetic.
    unsafe {
        asm!(
            "{{",
            ".reg .b16 low, high;",
            "mov.b32 {{low, high}}, {2};",
            "cvt.f32.f16 {0}, low;",
            "cvt.f32.f16 {1}, high;",
            "}}",
            out(reg32) low, out(reg32) high, in(reg32) word,
            options(pure, nomem, nostack)
        );
    }
    [low, high]
}
