//! Output types, and the epilogue that converts an exact int32 accumulator to them.
//! The kernels repeat this formula operation by operation (`kernels-gpu/src/epilogue/mod.rs`).
//! Each operation is one rounded f32 operation, so both backends agree bit for bit.

use std::fmt;

use half::{bf16, f16};

use crate::operation::Half;

/// The element types of a product, as values. [`Output`] has them as types.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OutputType {
    /// bfloat16, 2 bytes.
    Bf16,
    /// IEEE half precision, 2 bytes.
    F16,
    /// IEEE single precision, 4 bytes.
    F32,
    /// The int32 accumulator without scales, 4 bytes.
    I32,
}

impl OutputType {
    /// All output types.
    pub const ALL: [OutputType; 4] = [OutputType::Bf16, OutputType::F16, OutputType::F32, OutputType::I32];

    /// Returns the bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            OutputType::Bf16 | OutputType::F16 => 2,
            OutputType::F32 | OutputType::I32 => 4,
        }
    }
}

impl fmt::Display for OutputType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            OutputType::Bf16 => "bf16",
            OutputType::F16 => "f16",
            OutputType::F32 => "f32",
            OutputType::I32 => "i32",
        })
    }
}

/// An element type of a product: [`bf16`], [`half::f16`], [`f32`] or [`i32`]. The trait is sealed.
pub trait Output: bytemuck::Pod + Send + Sync + PartialEq + fmt::Debug + sealed::Sealed {
    /// This type as a value.
    const TYPE: OutputType;

    /// Converts an accumulator to an output element. This is the epilogue.
    ///
    /// `y = rn(rn(f32(acc) · channel_scale) · token_scale)`, then `+ bias`, then one rounding to `Self`.
    /// Each step is one f32 operation, rounded to nearest even, and never a fused multiply-add.
    /// `i32` returns the accumulator itself and ignores scales and bias.
    ///
    /// As in IEEE 754, values beyond the range of f32 or of `Self` become infinities of the same sign:
    /// from 65,520 on in f16, from about 3.4 · 10³⁸ on in f32 and bf16.
    /// If the product with the channel's scale overflows, the result stays infinite,
    /// even if the token's scale would bring it back into range.
    /// A token whose scale is NaN has results of NaN: 0x7FFF in 16 bits, 0x7FFFFFFF in f32, as GPUs return it.
    fn from_accumulator(acc: i32, channel_scale: f32, token_scale: f32, bias: Option<f32>) -> Self;
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for half::bf16 {}
    impl Sealed for half::f16 {}
    impl Sealed for f32 {}
    impl Sealed for i32 {}
}

/// The epilogue before its last rounding. Rust never contracts these operations into an FMA.
///
/// GPUs return one NaN only, and so does this.
#[inline(always)]
fn scaled(acc: i32, channel_scale: f32, token_scale: f32, bias: Option<f32>) -> f32 {
    let y = acc as f32 * channel_scale * token_scale;
    let y = match bias {
        Some(bias) => y + bias,
        None => y,
    };
    if y.is_nan() { f32::from_bits(0x7FFF_FFFF) } else { y }
}

impl Output for bf16 {
    const TYPE: OutputType = OutputType::Bf16;

    #[inline]
    fn from_accumulator(acc: i32, channel_scale: f32, token_scale: f32, bias: Option<f32>) -> Self {
        bf16::round(scaled(acc, channel_scale, token_scale, bias))
    }
}

impl Output for f16 {
    const TYPE: OutputType = OutputType::F16;

    #[inline]
    fn from_accumulator(acc: i32, channel_scale: f32, token_scale: f32, bias: Option<f32>) -> Self {
        f16::round(scaled(acc, channel_scale, token_scale, bias))
    }
}

impl Output for f32 {
    const TYPE: OutputType = OutputType::F32;

    #[inline]
    fn from_accumulator(acc: i32, channel_scale: f32, token_scale: f32, bias: Option<f32>) -> Self {
        scaled(acc, channel_scale, token_scale, bias)
    }
}

impl Output for i32 {
    const TYPE: OutputType = OutputType::I32;

    #[inline]
    fn from_accumulator(acc: i32, _: f32, _: f32, _: Option<f32>) -> Self {
        acc
    }
}
