//! Quantization of activations, with the operation before it: the same bits as on the GPU.
//!
//! `liquidgemm_format::activations` defines the arithmetic; the kernels are in `kernels-gpu/src/activations`.

use liquidgemm_format::activations::{
    Arithmetic, CODE_LIMIT, LANES, VECTOR, activate, inverse_deviation, sum_of_vector,
};
use liquidgemm_format::rounding::{round_clamped, scale_of};
use rayon::prelude::*;

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
/// A value y of a row gets the code `clamp(rne(y / scale), −127, 127)`.
/// A row's own scale is that of [`QuantizedActivations::quantize`].
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
    match residual {
        None => rows.for_each_init(Vec::new, |values, (row, (codes, scale))| {
            quantize_row(input, Row { row, residual: None, values, codes: &mut codes[..k], scale });
        }),
        Some(residual) => {
            rows.zip(residual.data.par_chunks_mut(residual.stride)).for_each_init(
                Vec::new,
                |values, ((row, (codes, scale)), residual)| {
                    let residual = Some(&mut residual[..k]);
                    quantize_row(input, Row { row, residual, values, codes: &mut codes[..k], scale });
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

/// A row to quantize, and the memory for the result.
struct Row<'a, T> {
    row: usize,
    /// The row of the residual.
    residual: Option<&'a mut [T]>,
    /// Scratch memory.
    values: &'a mut Vec<f32>,
    /// `[k]`.
    codes: &'a mut [i8],
    scale: &'a mut f32,
}

/// Quantizes a row, with the CPU's fused multiply-add if it has one.
fn quantize_row<T: Half>(input: &QuantizeInput<'_, T>, row: Row<'_, T>) {
    #[cfg(target_arch = "x86_64")]
    {
        /// [`quantize_row_in`], compiled for AVX2 and FMA.
        #[target_feature(enable = "avx2,fma")]
        fn with_fma<T: Half>(input: &QuantizeInput<'_, T>, row: Row<'_, T>) {
            quantize_row_in(input, row);
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: the CPU has both features.
            return unsafe { with_fma(input, row) };
        }
    }
    quantize_row_in(input, row);
}

/// Quantizes a row.
#[inline(always)]
fn quantize_row_in<T: Half>(input: &QuantizeInput<'_, T>, row: Row<'_, T>) {
    let Row { row, residual, values, codes, scale } = row;
    let k = input.k;
    let source = input.gather.map_or(row, |gather| gather.rows[row] as usize);
    let input_rows = input.gather.map_or(input.m, |gather| gather.input_rows);
    let mut is_finite = source < input_rows;
    if is_finite {
        let elements = &input.input[source * input.input_stride..][..input.operation.input_elements(k)];
        operate(&input.operation, elements, residual, values);
        if let Some(smoothing) = input.smoothing {
            values.iter_mut().zip(smoothing).for_each(|(value, factor)| *value /= factor);
        }
        // The order of magnitudes is that of their bits, in which NaN comes last.
        let max = values.iter().fold(0, |max: u32, value| max.max(value.abs().to_bits()));
        is_finite = max < f32::INFINITY.to_bits();
        *scale = match input.scaling {
            Scaling::PerToken => scale_of(f32::from_bits(max), CODE_LIMIT),
            Scaling::Static(scale) => scale,
            Scaling::Given(scales) => scales[row],
        };
        is_finite &= scale.is_finite();
    }
    if !is_finite {
        *scale = f32::NAN;
    }
    if !is_finite || *scale == 0.0 {
        codes.fill(0);
        return;
    }
    let scale = *scale;
    codes
        .iter_mut()
        .zip(&*values)
        .for_each(|(code, value)| *code = round_clamped(value / scale, CODE_LIMIT) as i8);
}

/// Writes the values of a row after the operation to `values`.
#[inline(always)]
fn operate<T: Half>(
    operation: &Operation<&[T]>,
    elements: &[T],
    residual: Option<&mut [T]>,
    values: &mut Vec<f32>,
) {
    values.clear();
    if let Operation::Gated { gate, order } = *operation {
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
        return;
    }
    match residual {
        None => values.extend(elements.iter().map(|element| element.to_f32())),
        Some(residual) => values.extend(elements.iter().zip(residual).map(|(element, residual)| {
            *residual = T::round(element.to_f32() + residual.to_f32());
            residual.to_f32()
        })),
    }
    let k = values.len() as u32;
    match *operation {
        Operation::Plain | Operation::Gated { .. } => {}
        Operation::RmsNorm { weight, epsilon } => {
            let inverse = inverse_deviation::<Host>(sum_of_row(values, |x| x * x), k, epsilon);
            values.iter_mut().zip(weight).for_each(|(x, weight)| *x = *x * inverse * weight.to_f32());
        }
        Operation::LayerNorm { weight, bias, epsilon } => {
            let mean = sum_of_row(values, |x| x) / k as f32;
            let squares = sum_of_row(values, |x| (x - mean) * (x - mean));
            let inverse = inverse_deviation::<Host>(squares, k, epsilon);
            values
                .iter_mut()
                .zip(weight)
                .for_each(|(x, weight)| *x = (*x - mean) * inverse * weight.to_f32());
            if let Some(bias) = bias {
                values.iter_mut().zip(bias).for_each(|(x, bias)| *x += bias.to_f32());
            }
        }
    }
}

/// Returns the sum of `of` all values, in the order that `liquidgemm_format::activations` fixes.
#[inline(always)]
fn sum_of_row(values: &[f32], of: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0; LANES];
    let mut vectors = values.chunks_exact(VECTOR);
    let mut lane = 0;
    let mut add = |vector: [f32; VECTOR]| {
        lanes[lane] += sum_of_vector(vector);
        lane = (lane + 1) % LANES;
    };
    for vector in &mut vectors {
        add(std::array::from_fn(|i| of(vector[i])));
    }
    let rest = vectors.remainder();
    if !rest.is_empty() {
        add(std::array::from_fn(|i| rest.get(i).map_or(0.0, |&value| of(value))));
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

/// The CPU's [`Arithmetic`]. All operations of Rust's f32 are correctly rounded.
struct Host;

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
