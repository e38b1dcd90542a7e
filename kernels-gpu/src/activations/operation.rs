//! What happens to a row before it is quantized: nothing, a norm, or a gated activation function.

use liquidgemm_format::activations::{Arithmetic, Gate, QuantizeArguments, VECTOR, activate, sum_of_vector};

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

/// The two numbers by which a norm changes a row.
#[derive(Clone, Copy)]
pub struct Statistics {
    /// The mean, subtracted by LayerNorm.
    pub mean: f32,
    /// 1 / √(variance + epsilon).
    pub inverse: f32,
}

/// The words of a vector: those of one array, or of two.
pub type Words = [[u32; 4]; 2];

/// What happens to a row before it is quantized.
pub trait Operation {
    /// Sums that are formed of the row: of squares for RMSNorm; of elements, then of squares for LayerNorm.
    const SUMS: u32 = 0;
    /// Whether the row has a gate and an up for each element of the result.
    const GATED: bool = false;

    /// Returns a vector's values. For norms, these are the values before the norm.
    ///
    /// The second words are those of the ups, for a gated activation function.
    #[inline(always)]
    fn values<T: Element>(_: &QuantizeArguments, [words, _]: Words) -> [f32; VECTOR] {
        unpack::<T>(words)
    }

    /// Returns the sum of a vector's elements, for the row's sum with this number, from 0.
    ///
    /// `length` of the elements exist; the others are zeros.
    #[inline(always)]
    fn part_of_sum(_number: u32, _values: [f32; VECTOR], _length: u32, _mean: f32) -> f32 {
        0.0
    }

    /// Applies the norm to a vector's values, with the words of its weights, and of its biases if `biased`.
    #[inline(always)]
    fn finish<T: Element>(
        values: [f32; VECTOR],
        _length: u32,
        _parameters: Words,
        _biased: bool,
        _statistics: Statistics,
    ) -> [f32; VECTOR] {
        values
    }
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

/// RMSNorm: `(x / √(mean(x²) + epsilon)) · weight`.
pub type RmsNorm = Norm<false>;

/// LayerNorm: RMSNorm of x minus its mean, plus a bias.
pub type LayerNorm = Norm<true>;

/// RMSNorm, or LayerNorm if `CENTERED`.
pub struct Norm<const CENTERED: bool>;

impl<const CENTERED: bool> Operation for Norm<CENTERED> {
    const SUMS: u32 = if CENTERED { 2 } else { 1 };

    #[inline(always)]
    fn part_of_sum(number: u32, values: [f32; VECTOR], length: u32, mean: f32) -> f32 {
        if CENTERED && number == 0 {
            return sum_of_vector(values);
        }
        sum_of_vector(each(|i| {
            let value = if CENTERED { difference(values, length, mean, i) } else { values[i] };
            value * value
        }))
    }

    #[inline(always)]
    fn finish<T: Element>(
        values: [f32; VECTOR],
        length: u32,
        [weights, biases]: Words,
        biased: bool,
        Statistics { mean, inverse }: Statistics,
    ) -> [f32; VECTOR] {
        let weights = unpack::<T>(weights);
        if !CENTERED {
            return each(|i| values[i] * inverse * weights[i]);
        }
        let scaled = each(|i| difference(values, length, mean, i) * inverse * weights[i]);
        if !biased {
            return scaled;
        }
        let biases = unpack::<T>(biases);
        each(|i| scaled[i] + biases[i])
    }
}

/// Returns an element minus the mean; 0 if the element does not exist.
#[inline(always)]
fn difference(values: [f32; VECTOR], length: u32, mean: f32, index: usize) -> f32 {
    if (index as u32) < length { values[index] - mean } else { 0.0 }
}
