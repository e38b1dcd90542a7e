//! What happens to a row before it is quantized: nothing, a norm, or a gated activation function.

use liquidgemm_format::activations::{Arithmetic, Gate, QuantizeArguments, VECTOR, activate};

use super::element::{Element, each, unpack};
use crate::ptx::float::{approximate_reciprocal, multiply_add, square_root};
use crate::ptx::integer::merge_bytes;

/// The device's [`Arithmetic`].
pub struct Device;

impl Arithmetic for Device {
    #[inline(always)]
    fn multiply_add(a: f32, b: f32, c: f32) -> f32 {
        multiply_add(a, b, c)
    }

    #[inline(always)]
    fn square_root(x: f32) -> f32 {
        square_root(x)
    }

    /// One step of Newton's method, in which only the last rounding counts,
    /// makes the hardware's approximation correctly rounded (P. Markstein, IBM J. Res. Dev. 34, 1990).
    /// The GPU tests compare it with the CPU's division for every 16-bit gate.
    #[inline(always)]
    fn reciprocal(x: f32) -> f32 {
        let near = approximate_reciprocal(x);
        multiply_add(near, multiply_add(-x, near, 1.0), near)
    }
}

/// The words of a vector: those of one array, or of two.
pub type Words = [[u32; 4]; 2];

/// What happens to a row before it is quantized.
pub trait Operation {
    /// Whether the operation is a norm.
    const NORM: bool = false;
    /// Whether the norm subtracts the row's mean, and may add a bias.
    const CENTERED: bool = false;
    /// Whether the row has a gate and an up for each element of the result.
    const GATED: bool = false;

    /// Returns a vector's values. For norms, these are the values before the norm.
    ///
    /// The second words are those of the ups, for a gated activation function.
    #[inline(always)]
    fn values<T: Element>(_: &QuantizeArguments, [words, _]: Words) -> [f32; VECTOR] {
        unpack::<T>(words)
    }

    /// Multiplies a vector's values by the words of its weights. If the norm is centered, multiplies them by `inverse`
    /// before, and adds the words of its biases after if `biased`.
    #[inline(always)]
    fn finish<T: Element>(values: [f32; VECTOR], _: Words, _biased: bool, _inverse: f32) -> [f32; VECTOR] {
        values
    }
}

/// Subtracts the mean from the first `length` elements of a vector.
#[inline(always)]
pub fn center(values: [f32; VECTOR], length: u32, mean: f32) -> [f32; VECTOR] {
    each(|i| if (i as u32) < length { values[i] - mean } else { values[i] })
}

/// No operation.
pub struct Plain;

impl Operation for Plain {}

/// `SiLU(gate) · up`.
pub type Silu = Gated<{ Gate::Silu as u32 }>;

/// `GELU(gate) · up`, with GELU in the tanh form.
pub type GeluTanh = Gated<{ Gate::GeluTanh as u32 }>;

/// A gated activation function: `activate(gate) · up`.
pub struct Gated<const GATE: u32>;

impl<const GATE: u32> Operation for Gated<GATE> {
    const GATED: bool = true;

    #[inline(always)]
    fn values<T: Element>(arguments: &QuantizeArguments, words: Words) -> [f32; VECTOR] {
        let [[a, b, c, d], [e, f, g, h]] = words;
        let [gates, ups] = if arguments.interleaved == 0 {
            words
        } else {
            [
                [lows(a, b), lows(c, d), lows(e, f), lows(g, h)],
                [highs(a, b), highs(c, d), highs(e, f), highs(g, h)],
            ]
        };
        let (gates, ups) = (unpack::<T>(gates), unpack::<T>(ups));
        let gate = if GATE == Gate::Silu as u32 { Gate::Silu } else { Gate::GeluTanh };
        each(|i| activate::<Device>(gate, gates[i]) * ups[i])
    }
}

/// Returns the lower halves of two words.
#[inline(always)]
fn lows(first: u32, second: u32) -> u32 {
    merge_bytes::<0x5410>(first, second)
}

/// Returns the upper halves of two words.
#[inline(always)]
fn highs(first: u32, second: u32) -> u32 {
    merge_bytes::<0x7632>(first, second)
}

/// RMSNorm: `x · weight`. What this is divided by goes into the scale.
pub type RmsNorm = Norm<false>;

/// LayerNorm: `(x − mean) / √(variance + epsilon) · weight`, plus a bias.
pub type LayerNorm = Norm<true>;

/// RMSNorm, or LayerNorm if `CENTERED`.
pub struct Norm<const CENTERED: bool>;

impl<const CENTERED: bool> Operation for Norm<CENTERED> {
    const NORM: bool = true;
    const CENTERED: bool = CENTERED;

    #[inline(always)]
    fn finish<T: Element>(
        values: [f32; VECTOR],
        [weights, biases]: Words,
        biased: bool,
        inverse: f32,
    ) -> [f32; VECTOR] {
        let weights = unpack::<T>(weights);
        if !CENTERED {
            return each(|i| values[i] * weights[i]);
        }
        let scaled = each(|i| values[i] * inverse * weights[i]);
        if !biased {
            return scaled;
        }
        let biases = unpack::<T>(biases);
        each(|i| scaled[i] + biases[i])
    }
}
