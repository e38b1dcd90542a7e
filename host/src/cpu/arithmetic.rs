//! The CPU's arithmetic on activations, with its fused multiply-add if it has one.

use liquidgemm_format::activations::{Arithmetic, RowScale};

/// The CPU's [`Arithmetic`]. All operations of Rust's f32 are correctly rounded.
pub(crate) struct Host;

impl Arithmetic for Host {
    #[inline(always)]
    fn multiply_add(a: f32, b: f32, c: f32) -> f32 {
        a.mul_add(b, c)
    }

    #[inline(always)]
    fn square_root(x: f32) -> f32 {
        x.sqrt()
    }

    #[inline(always)]
    fn reciprocal(x: f32) -> f32 {
        1.0 / x
    }
}

/// Runs `work`, compiled for AVX2 and FMA if the CPU has both.
/// Without them, [`Host::multiply_add`] is a slow function with the same results.
#[inline(always)]
pub(crate) fn with_fma<R>(work: impl FnOnce() -> R) -> R {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2,fma")]
        fn inside<R>(work: impl FnOnce() -> R) -> R {
            work()
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: the CPU has both features.
            return unsafe { inside(work) };
        }
    }
    work()
}

/// Writes the codes of a row's values.
#[inline(always)]
pub(crate) fn write_codes(scale: RowScale, values: &[f32], codes: &mut [i8]) {
    let pairs = codes.iter_mut().zip(values);
    if scale.adjusts() {
        pairs.for_each(|(code, &value)| *code = scale.round::<Host>(scale.adjust(value)) as i8);
    } else {
        pairs.for_each(|(code, &value)| *code = scale.round::<Host>(value) as i8);
    }
}

/// Returns the bits of the largest magnitude, which are more than those of infinity if a value is NaN.
#[inline(always)]
pub(crate) fn max_magnitude(values: &[f32]) -> u32 {
    // The order of magnitudes is that of their bits, in which NaN comes last.
    values.iter().fold(0, |max, value| max.max(value.abs().to_bits()))
}
