//! Output types and the epilogue that turns an exact int32 accumulator into them.
//!
//! There is one epilogue formula, here for the CPU and mirrored by the kernels, and every step of it is one
//! rounded f32 operation; that is what makes both backends agree bit for bit.

use std::fmt;

use half::{bf16, f16};

/// The element types that a product can be written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OutputType {
    /// bfloat16, 2 bytes.
    Bf16,
    /// IEEE half precision, 2 bytes.
    F16,
    /// IEEE single precision, 4 bytes.
    F32,
    /// The raw accumulator without scales, 4 bytes.
    I32,
}

impl OutputType {
    /// Every output type.
    pub const ALL: [OutputType; 4] = [OutputType::Bf16, OutputType::F16, OutputType::F32, OutputType::I32];

    /// Bytes of one element.
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

/// An element type that a product can be written in: [`bf16`], [`half::f16`], [`f32`] or [`i32`].
pub trait Output: bytemuck::Pod + Send + Sync + PartialEq + fmt::Debug + sealed::Sealed {
    /// The same type as a value.
    const TYPE: OutputType;

    /// The epilogue: `y = rn(rn(f32(acc) · channel_scale) · token_scale)`, then `+ bias`, then one rounding to
    /// `Self`. Each step is one f32 operation rounded to nearest even, never a fused multiply-add.
    ///
    /// What is beyond the range of f32, or in the end of `Self`, becomes infinite with its sign, as IEEE 754 has it: in f16 from 65,520 on, in f32
    /// and bf16 from about 3.4 · 10³⁸. A product that overflows to infinity before the token's scale takes it back stays infinite.
    ///
    /// For `i32` it is the accumulator itself; scales and bias are ignored there.
    fn from_accumulator(acc: i32, channel_scale: f32, token_scale: f32, bias: Option<f32>) -> Self;
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for half::bf16 {}
    impl Sealed for half::f16 {}
    impl Sealed for f32 {}
    impl Sealed for i32 {}
}

/// The epilogue before its last rounding. Rust never contracts these into an FMA.
#[inline(always)]
fn scaled(acc: i32, channel_scale: f32, token_scale: f32, bias: Option<f32>) -> f32 {
    let y = acc as f32 * channel_scale * token_scale;
    match bias {
        Some(bias) => y + bias,
        None => y,
    }
}

impl Output for bf16 {
    const TYPE: OutputType = OutputType::Bf16;

    #[inline]
    fn from_accumulator(acc: i32, channel_scale: f32, token_scale: f32, bias: Option<f32>) -> Self {
        bf16::from_f32(scaled(acc, channel_scale, token_scale, bias))
    }
}

impl Output for f16 {
    const TYPE: OutputType = OutputType::F16;

    #[inline]
    fn from_accumulator(acc: i32, channel_scale: f32, token_scale: f32, bias: Option<f32>) -> Self {
        f16::from_f32(scaled(acc, channel_scale, token_scale, bias))
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
