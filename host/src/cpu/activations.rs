//! Quantization of activations, with the operation before it: the same bits as on the GPU.
//!
//! `liquidgemm_format::activations` defines the arithmetic; the kernels are in `kernels-gpu/src/activations`.

use liquidgemm_format::activations::{
    Gate, LANES, RowScale, VECTOR, activate, inverse_deviation, sum_of_squares, sum_of_vector, variance,
};
use rayon::prelude::*;

use super::arithmetic::{Host, max_magnitude, with_fma, write_codes};
use crate::check::{check_k, check_length, check_rows};
use crate::operation::{GateOrder, Gather, Half, Operation, Scaling};
use crate::{Error, QuantizedActivations};

/// Rows of activations to quantize, on the host.
#[derive(Clone, Copy, Debug)]
pub struct QuantizeInput<'a, T> {
    /// Rows to make. May be 0.
    pub m: usize,
    /// Elements of a row after the operation.
    pub k: usize,
    /// What happens to a row before it is quantized.
    pub operation: Operation<&'a [T]>,
    /// Rows of k elements, or of 2k for a gated activation function.
    pub input: &'a [T],
    /// Elements from one row of the input to the next.
    pub input_stride: usize,
    /// The rows of the input to take, or `None` for the first m in order.
    pub gather: Option<Gather<&'a [u32]>>,
    /// f32 `[k]`, by which values are divided after the operation.
    pub smoothing: Option<&'a [f32]>,
    /// Where the scales come from.
    pub scaling: Scaling<&'a [f32]>,
}

impl<'a, T> QuantizeInput<'a, T> {
    /// Returns the input of a plain quantization of `[m, k]`, with a scale for each token.
    pub fn new(input: &'a [T], m: usize, k: usize) -> Self {
        Self {
            m,
            k,
            operation: Operation::Plain,
            input,
            input_stride: k,
            gather: None,
            smoothing: None,
            scaling: Scaling::PerToken,
        }
    }
}

/// A residual `[m, k]` on the host. The input is added to it, rounded, before a norm.
#[derive(Debug)]
pub struct Residual<'a, T> {
    /// The rows.
    pub data: &'a mut [T],
    /// Elements from one row to the next.
    pub stride: usize,
}

/// Quantizes rows of activations to int8, after an operation.
///
/// A row's own scale and the codes of its values are those of [`QuantizedActivations::quantize`].
/// After RMSNorm, `(x · weight) / √(mean(x²) + epsilon)`, the codes are those of the dividends `x · weight`,
/// and the scale is theirs, divided by the divisor, which the row's values have in common.
///
/// A row with a NaN or infinite value, before or after the operation, gets the scale NaN and codes 0,
/// so that its products are NaN and those of other rows are not affected.
/// The same holds for a row whose sum of squares overflows, and for a given scale that is not finite.
///
/// # Errors
/// - [`Error::EmptyDimension`] if `k` is 0, [`Error::KTooLarge`] if it exceeds 131,072.
/// - [`Error::RowStrideTooShort`] if rows of the input or of the residual overlap.
/// - [`Error::ShapeMismatch`] if a slice is too short, or a parameter does not have its length.
/// - [`Error::TooLarge`] if the rows exceed the address space.
/// - [`Error::InvalidEpsilon`] or [`Error::InvalidStaticScale`] for such a value.
/// - [`Error::InvalidSmoothing`] if a factor is not finite and positive.
/// - [`Error::UnexpectedResidual`] for a residual without a norm, or with gathered rows.
pub fn quantize<T: Half>(
    input: &QuantizeInput<'_, T>,
    residual: Option<Residual<'_, T>>,
) -> Result<QuantizedActivations, Error> {
    let QuantizeInput { m, k, .. } = *input;
    check(input, residual.as_ref())?;
    let (mut data, stride) = QuantizedActivations::padded(m, k)?;
    let mut scales = vec![0.0; m];
    let rows = data.par_chunks_exact_mut(stride).zip(scales.par_iter_mut()).enumerate();
    let quantize_row = |values: &mut Vec<f32>, row, residual: Option<&mut [T]>, codes: &mut [i8]| {
        with_fma(|| {
            let scale = operate(input, row, residual, values);
            write_codes(scale, values, &mut codes[..k]);
            scale.get()
        })
    };
    match residual {
        None => rows.for_each_init(Vec::new, |values, (row, (codes, scale))| {
            *scale = quantize_row(values, row, None, codes);
        }),
        Some(residual) => {
            rows.zip(residual.data.par_chunks_mut(residual.stride)).for_each_init(
                Vec::new,
                |values, ((row, (codes, scale)), residual)| {
                    *scale = quantize_row(values, row, Some(&mut residual[..k]), codes);
                },
            );
        }
    }
    Ok(QuantizedActivations::from_checked(data, stride, scales, m, k))
}

fn check<T: Half>(input: &QuantizeInput<'_, T>, residual: Option<&Residual<'_, T>>) -> Result<(), Error> {
    let QuantizeInput { m, k, .. } = *input;
    check_k(k)?;
    input.operation.check()?;
    input.scaling.check()?;
    let input_rows = input.gather.map_or(m, |gather| gather.input_rows);
    let row = input.operation.input_elements(k);
    check_rows("input", input.input.len(), input_rows, input.input_stride, row)?;
    if let Some(gather) = input.gather {
        check_length("row indices", "[m]", m, gather.rows.len())?;
    }
    match input.operation {
        Operation::RmsNorm { weight, .. } => check_length("norm weight", "[k]", k, weight.len())?,
        Operation::LayerNorm { weight, bias, .. } => {
            check_length("norm weight", "[k]", k, weight.len())?;
            check_length("norm bias", "[k]", k, bias.map_or(k, <[T]>::len))?;
        }
        Operation::Plain | Operation::Gated { .. } => {}
    }
    if let Scaling::Given(scales) = input.scaling {
        check_length("token scales", "[m]", m, scales.len())?;
    }
    if let Some(smoothing) = input.smoothing {
        crate::activations::check_smoothing(smoothing, k)?;
    }
    if let Some(residual) = residual {
        if !input.operation.is_norm() || input.gather.is_some() {
            return Err(Error::UnexpectedResidual);
        }
        check_rows("residual", residual.data.len(), m, residual.stride, k)?;
    }
    Ok(())
}

/// Writes the values of row `row` before rounding to `values`, and returns how they become codes.
#[inline(always)]
fn operate<T: Half>(
    input: &QuantizeInput<'_, T>,
    row: usize,
    residual: Option<&mut [T]>,
    values: &mut Vec<f32>,
) -> RowScale {
    let k = input.k;
    values.clear();
    let source = input.gather.map_or(row, |gather| gather.rows[row] as usize);
    if source >= input.gather.map_or(input.m, |gather| gather.input_rows) {
        // A row that does not exist.
        values.resize(k, 0.0);
        return RowScale::new::<Host>(f32::NAN.to_bits(), None, None);
    }
    let elements = &input.input[source * input.input_stride..][..input.operation.input_elements(k)];
    let variance = match input.operation {
        Operation::Gated { gate, order } => {
            activate_row(gate, order, elements, values);
            None
        }
        _ => {
            match residual {
                None => values.extend(elements.iter().map(|element| element.to_f32())),
                Some(residual) => values.extend(elements.iter().zip(residual).map(|(element, residual)| {
                    *residual = T::round(element.to_f32() + residual.to_f32());
                    residual.to_f32()
                })),
            }
            normalize(&input.operation, values)
        }
    };
    if let Some(smoothing) = input.smoothing {
        values.iter_mut().zip(smoothing).for_each(|(value, factor)| *value /= factor);
    }
    let given = match input.scaling {
        Scaling::PerToken => None,
        Scaling::Static(scale) => Some(scale),
        Scaling::Given(scales) => Some(scales[row]),
    };
    RowScale::new::<Host>(max_magnitude(values), variance, given)
}

/// Writes a row's activated gates times its ups to `values`.
#[inline(always)]
fn activate_row<T: Half>(gate: Gate, order: GateOrder, elements: &[T], values: &mut Vec<f32>) {
    let activated = |gate_element: T, up: T| activate::<Host>(gate, gate_element.to_f32()) * up.to_f32();
    match order {
        GateOrder::Halves => {
            let (gates, ups) = elements.split_at(elements.len() / 2);
            values.extend(gates.iter().zip(ups).map(|(&gate, &up)| activated(gate, up)));
        }
        GateOrder::Interleaved => {
            values.extend(elements.chunks_exact(2).map(|pair| activated(pair[0], pair[1])));
        }
    }
}

/// Applies a norm to a row. For RMSNorm, returns the variance whose root the values are still to be divided by.
#[inline(always)]
fn normalize<T: Half>(operation: &Operation<&[T]>, values: &mut [f32]) -> Option<f32> {
    let inverse_k = 1.0 / values.len() as f32;
    match *operation {
        Operation::Plain | Operation::Gated { .. } => None,
        Operation::RmsNorm { weight, epsilon } => {
            let squares = sum_of_row(values, sum_of_squares::<Host>);
            values.iter_mut().zip(weight).for_each(|(x, weight)| *x *= weight.to_f32());
            Some(variance(squares, inverse_k, epsilon))
        }
        Operation::LayerNorm { weight, bias, epsilon } => {
            let mean = sum_of_row(values, sum_of_vector) * inverse_k;
            values.iter_mut().for_each(|x| *x -= mean);
            let squares = sum_of_row(values, sum_of_squares::<Host>);
            let inverse = inverse_deviation::<Host>(variance(squares, inverse_k, epsilon));
            values.iter_mut().zip(weight).for_each(|(x, weight)| *x = *x * inverse * weight.to_f32());
            if let Some(bias) = bias {
                values.iter_mut().zip(bias).for_each(|(x, bias)| *x += bias.to_f32());
            }
            None
        }
    }
}

/// Returns the sum of `of` all vectors, in the order that `liquidgemm_format::activations` fixes.
#[inline(always)]
fn sum_of_row(values: &[f32], of: impl Fn([f32; VECTOR]) -> f32) -> f32 {
    let mut lanes = [0.0; LANES];
    let mut vectors = values.chunks_exact(VECTOR);
    let mut lane = 0;
    let mut add = |vector: [f32; VECTOR]| {
        lanes[lane] += of(vector);
        lane = (lane + 1) % LANES;
    };
    for vector in &mut vectors {
        add(std::array::from_fn(|i| vector[i]));
    }
    let rest = vectors.remainder();
    if !rest.is_empty() {
        add(std::array::from_fn(|i| rest.get(i).copied().unwrap_or(0.0)));
    }
    let mut width = LANES;
    while width > 1 {
        width /= 2;
        for i in 0..width {
            lanes[i] = lanes[2 * i] + lanes[2 * i + 1];
        }
    }
    lanes[0]
}
