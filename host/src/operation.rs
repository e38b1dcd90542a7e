//! What can happen to activations on their way to int8: norms, gated activation functions, smoothing, scales.
//!
//! The types name an operation for both backends.
//! A parameter `V` is the type of a vector: a slice for [`cpu::quantize`](crate::cpu::quantize),
//! a `DeviceSpan` for `Gpu::quantize`.
//! `liquidgemm_format::activations` defines the arithmetic of both.

use std::fmt;

use half::{bf16, f16};
use liquidgemm_format::activations::Gate;

use crate::{Error, Float};

/// The 16-bit element types of activations, as values. [`Half`] has them as types.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HalfType {
    /// bfloat16.
    Bf16,
    /// IEEE half precision.
    F16,
}

impl HalfType {
    /// Both types.
    pub const ALL: [HalfType; 2] = [HalfType::Bf16, HalfType::F16];
}

impl fmt::Display for HalfType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            HalfType::Bf16 => "bf16",
            HalfType::F16 => "f16",
        })
    }
}

/// A 16-bit element type of activations: [`bf16`] or [`half::f16`]. The trait is sealed, as [`Float`] is.
pub trait Half: Float + PartialEq + fmt::Debug {
    /// This type as a value.
    const HALF: HalfType;

    /// Rounds to the nearest value, ties to even. NaN becomes the one NaN that GPUs return, `0x7FFF`.
    fn round(value: f32) -> Self;
}

impl Half for bf16 {
    const HALF: HalfType = HalfType::Bf16;

    #[inline(always)]
    fn round(value: f32) -> Self {
        if value.is_nan() { bf16::from_bits(0x7FFF) } else { bf16::from_f32(value) }
    }
}

impl Half for f16 {
    const HALF: HalfType = HalfType::F16;

    #[inline(always)]
    fn round(value: f32) -> Self {
        if value.is_nan() { f16::from_bits(0x7FFF) } else { f16::from_f32(value) }
    }
}

/// What happens to a row of activations before it is quantized. All arithmetic is in f32.
///
/// Each operation is rounded once, in the order that the formulas give.
/// `rn(a · b + c)` is used nowhere except inside of e^x and of GELU's argument.
/// Sums over a row have a fixed order, which `liquidgemm_format::activations` describes.
/// So both backends give the same bits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Operation<V> {
    /// Nothing.
    Plain,
    /// RMSNorm: `(x · (1 / √(Σx² / k + epsilon))) · weight` (Zhang and Sennrich, arXiv 1910.07467).
    ///
    /// `x` is the input, or its sum with the residual, rounded to the input's type.
    RmsNorm {
        /// `[k]` of the input's type.
        weight: V,
        /// Added to the mean square. Finite and not negative.
        epsilon: f32,
    },
    /// LayerNorm: `((x − mean) · (1 / √(Σ(x − mean)² / k + epsilon))) · weight + bias` (Ba et al., arXiv 1607.06450).
    ///
    /// `x` is as for [`RmsNorm`](Self::RmsNorm), and `mean` is `Σx / k`.
    LayerNorm {
        /// `[k]` of the input's type.
        weight: V,
        /// `[k]` of the input's type.
        bias: Option<V>,
        /// Added to the variance. Finite and not negative.
        epsilon: f32,
    },
    /// A gated activation function: `gate(g) · u` (Shazeer, arXiv 2002.05202).
    ///
    /// A row of the input has 2k elements, a gate g and an up u for each element of the result.
    Gated {
        /// The activation function of the gate.
        gate: Gate,
        /// The order of gates and ups in a row.
        order: GateOrder,
    },
}

impl<V> Operation<V> {
    /// Returns the elements of the input's rows, for rows of `k` elements after the operation.
    pub(crate) fn input_elements(&self, k: usize) -> usize {
        if matches!(self, Operation::Gated { .. }) { 2 * k } else { k }
    }

    /// Returns whether the operation is a norm.
    pub(crate) fn is_norm(&self) -> bool {
        matches!(self, Operation::RmsNorm { .. } | Operation::LayerNorm { .. })
    }

    /// Fails unless epsilon is finite and not negative.
    pub(crate) fn check(&self) -> Result<(), Error> {
        match *self {
            Operation::RmsNorm { epsilon, .. } | Operation::LayerNorm { epsilon, .. }
                if !(epsilon.is_finite() && epsilon >= 0.0) =>
            {
                Err(Error::InvalidEpsilon { value: epsilon })
            }
            _ => Ok(()),
        }
    }
}

/// The order of gates and ups in a row of 2k elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GateOrder {
    /// k gates, then k ups.
    Halves,
    /// A gate, its up, the next gate, and so on.
    Interleaved,
}

impl GateOrder {
    /// Both orders.
    pub const ALL: [GateOrder; 2] = [GateOrder::Halves, GateOrder::Interleaved];
}

/// Where the scales of quantized rows come from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scaling<V> {
    /// Each row has its own: its largest magnitude / 127.
    PerToken,
    /// One scale for all rows, finite and greater than 0. Larger values are clipped to ±127.
    Static(f32),
    /// f32 `[m]`: a scale for each row. Larger values are clipped to ±127.
    Given(V),
}

impl<V> Scaling<V> {
    /// Fails unless a static scale is finite and greater than 0.
    pub(crate) fn check(&self) -> Result<(), Error> {
        match *self {
            Scaling::Static(value) if !(value.is_finite() && value > 0.0) => {
                Err(Error::InvalidStaticScale { value })
            }
            _ => Ok(()),
        }
    }
}

/// Rows of the input taken in another order, or several times, as a mixture of experts needs it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gather<V> {
    /// u32 `[m]`: the row of the input from which each row is made.
    ///
    /// A row whose index is not below `input_rows` gets the scale NaN and codes 0.
    pub rows: V,
    /// Rows of the input.
    pub input_rows: usize,
}
