//! The floating-point types of weights and activations.

use half::{bf16, f16};

/// An input element type: [`f32`], [`half::f16`] or [`bf16`]. The trait is sealed.
///
/// All three convert to f32 without rounding.
pub trait Float: bytemuck::Pod + Send + Sync + sealed::Sealed {
    /// Converts to f32, exactly.
    fn to_f32(self) -> f32;
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::f16 {}
    impl Sealed for half::bf16 {}
}

impl Float for f32 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
}

impl Float for f16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }
}

impl Float for bf16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }
}
