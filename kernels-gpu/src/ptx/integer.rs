//! Integer and conversion instructions whose exact form matters, for speed or for rounding.
//!
//! The host computes the same in `liquidgemm_format::dequant` and `host/src/output.rs`.

use core::arch::asm;

/// Returns `(nibbles · s + a4) XOR 0x80808080`, LiquidQuant's dequantization of four codes.
///
/// It takes one IMAD and one LOP3.
#[inline(always)]
pub fn multiply_add_flip(nibbles: u32, s: u32, a4: u32) -> u32 {
    let weights;
    // SAFETY: register arithmetic.
    unsafe {
        asm!(
            "mad.lo.u32 {0}, {1}, {2}, {3};",
            "xor.b32 {0}, {0}, 0x80808080;",
            out(reg32) weights,
            in(reg32) nibbles,
            in(reg32) s,
            in(reg32) a4,
            // Not `pure`, so that it stays where it is written, between the MMAs.
            // Moved elsewhere it would increase register pressure.
            options(nomem, nostack)
        );
    }
    weights
}

/// Returns `nibbles · s − z4`, byte by byte: QServe's dequantization of four codes.
///
/// Hopper has no instruction for the byte-wise subtraction `vsub4`; the assembler emits several.
#[inline(always)]
pub fn multiply_subtract_bytes(nibbles: u32, s: u32, z4: u32) -> u32 {
    let weights;
    // SAFETY: register arithmetic.
    unsafe {
        asm!(
            "{{",
            ".reg .b32 product, unused;",
            "mul.lo.u32 product, {1}, {2};",
            "mov.u32 unused, 0;",
            "vsub4.u32.u32.u32 {0}, product, {3}, unused;",
            "}}",
            out(reg32) weights,
            in(reg32) nibbles,
            in(reg32) s,
            in(reg32) z4,
            // Not `pure`, for the same reason as `multiply_add_flip`.
            options(nomem, nostack)
        );
    }
    weights
}

/// Returns the bytes of `value` that the four hex digits of `SELECTOR` select, lowest digit first.
///
/// Digits from 4 to 7 select zero bytes.
#[inline(always)]
pub fn permute_bytes<const SELECTOR: u32>(value: u32) -> u32 {
    let permuted;
    // SAFETY: register arithmetic.
    unsafe {
        asm!("prmt.b32 {}, {}, 0, {};", out(reg32) permuted, in(reg32) value, const SELECTOR, options(pure, nomem, nostack));
    }
    permuted
}

/// Returns the bytes of `low` and `high` that the four hex digits of `SELECTOR` select, lowest digit first.
///
/// Digits 0 to 3 are the bytes of `low`, digits 4 to 7 those of `high`.
#[inline(always)]
pub fn merge_bytes<const SELECTOR: u32>(low: u32, high: u32) -> u32 {
    let merged;
    // SAFETY: register arithmetic.
    unsafe {
        asm!("prmt.b32 {}, {}, {}, {};", out(reg32) merged, in(reg32) low, in(reg32) high, const SELECTOR, options(pure, nomem, nostack));
    }
    merged
}

/// Returns two f32 rounded to bf16, `low` in the lower half.
#[inline(always)]
pub fn pack_bf16(low: f32, high: f32) -> u32 {
    let packed;
    // SAFETY: register arithmetic.
    unsafe {
        asm!("cvt.rn.bf16x2.f32 {}, {}, {};", out(reg32) packed, in(reg32) high, in(reg32) low, options(pure, nomem, nostack));
    }
    packed
}

/// Returns two f32 rounded to f16, `low` in the lower half.
#[inline(always)]
pub fn pack_f16(low: f32, high: f32) -> u32 {
    let packed;
    // SAFETY: register arithmetic.
    unsafe {
        asm!("cvt.rn.f16x2.f32 {}, {}, {};", out(reg32) packed, in(reg32) high, in(reg32) low, options(pure, nomem, nostack));
    }
    packed
}

/// Returns `rn(rn(f32(accumulator) · channel_scale) · token_scale)`, three rounded operations.
#[inline(always)]
pub fn scale(accumulator: i32, channel_scale: f32, token_scale: f32) -> f32 {
    let result;
    // SAFETY: register arithmetic.
    unsafe {
        asm!(
            "cvt.rn.f32.s32 {0}, {1};",
            "mul.rn.f32 {0}, {0}, {2};",
            "mul.rn.f32 {0}, {0}, {3};",
            out(reg32) result,
            in(reg32) accumulator,
            in(reg32) channel_scale,
            in(reg32) token_scale,
            options(pure, nomem, nostack)
        );
    }
    result
}

/// Returns `rn(scaled + bias)`, never fused with the product before it.
///
/// A bias of −0.0 changes nothing, not even the sign of a zero.
#[inline(always)]
pub fn add_bias(scaled: f32, bias: f32) -> f32 {
    let result;
    // SAFETY: register arithmetic.
    unsafe {
        asm!("add.rn.f32 {}, {}, {};", out(reg32) result, in(reg32) scaled, in(reg32) bias, options(pure, nomem, nostack));
    }
    result
}

/// Returns `rn(a · b)`, never fused with a sum that follows.
#[inline(always)]
pub fn multiply(a: f32, b: f32) -> f32 {
    let product;
    // SAFETY: register arithmetic.
    unsafe {
        asm!("mul.rn.f32 {}, {}, {};", out(reg32) product, in(reg32) a, in(reg32) b, options(pure, nomem, nostack));
    }
    product
}

/// Returns the f16 in the lower half of `word` as f32, which is exact.
#[inline(always)]
pub fn f16_to_f32(word: u32) -> f32 {
    let value;
    // SAFETY: register arithmetic.
    unsafe {
        asm!(
            "{{",
            ".reg .b16 half, unused;",
            "mov.b32 {{half, unused}}, {1};",
            "cvt.f32.f16 {0}, half;",
            "}}",
            out(reg32) value,
            in(reg32) word,
            options(pure, nomem, nostack)
        );
    }
    value
}
