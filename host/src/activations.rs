//! int8 activations: symmetric quantization per token, and a borrowed view of existing codes.
//!
//! Shapes are `[m, k]`, one row per token.
//! [`QuantizedActivations`] pads rows with zeros to a stride that is a multiple of 16 bytes.
//! TMA requires that alignment, so the buffer can be copied to a GPU as it is.

use std::fmt;
use std::ops::Range;

use liquidgemm_format::activations::{CODE_ALIGNMENT, RowScale};
use rayon::prelude::*;

use crate::check::{check_finite, check_k, check_length, checked_elements};
use crate::cpu::arithmetic::{Host, max_magnitude, with_fma, write_codes};
use crate::packed::PackedSizes;
use crate::{Error, Float, Group};

/// int8 activations `[m, k]` with one f32 scale per token.
///
/// The activation of (`token`, `k`) is `code · scales[token]`.
#[derive(Clone, PartialEq)]
pub struct QuantizedActivations {
    data: Vec<i8>,
    stride: usize,
    scales: Vec<f32>,
    m: usize,
    k: usize,
}

impl QuantizedActivations {
    /// Quantizes row-major `[m, k]` activations.
    ///
    /// For each token:
    /// - `scale = max|x| / 127` in f32.
    ///   A subnormal quotient may be rounded down so far that the largest value would be clipped;
    ///   the scale is then the next larger f32.
    /// - `code = clamp(rne(x · rn(1 / scale)), −127, 127)`, where `rne` rounds the exact product to nearest, ties to even.
    /// - A token of zeros has scale 0 and codes 0.
    ///
    /// `m` may be 0.
    ///
    /// # Errors
    /// - [`Error::EmptyDimension`] if `k` is 0, [`Error::KTooLarge`] if it exceeds 131,072.
    /// - [`Error::ShapeMismatch`] if the slice does not have `m · k` elements.
    /// - [`Error::TooLarge`] if the activations exceed the address space.
    /// - [`Error::NonFiniteActivation`] with the position of the first activation that is NaN or infinite.
    pub fn quantize<T: Float>(activations: &[T], m: usize, k: usize) -> Result<Self, Error> {
        check_input(activations.len(), m, k)?;
        quantize_rows(activations, m, k, |x, _| x)
    }

    /// Like [`quantize`](Self::quantize), but first divides column `j` by `smoothing[j]`.
    ///
    /// `smoothing` is `[k]`.
    /// The product is unchanged if [`smooth_weights`] multiplied column `j` of the weights by the same factor
    /// before they were quantized. This is the transformation of SmoothQuant (arXiv 2211.10438).
    ///
    /// # Errors
    /// As [`quantize`](Self::quantize), also for an activation that overflows in the division.
    /// - [`Error::ShapeMismatch`] if `smoothing` does not have `k` elements.
    /// - [`Error::InvalidSmoothing`] if a factor is not finite and positive.
    pub fn with_smoothing<T: Float>(
        activations: &[T],
        m: usize,
        k: usize,
        smoothing: &[f32],
    ) -> Result<Self, Error> {
        check_input(activations.len(), m, k)?;
        check_smoothing(smoothing, k)?;
        quantize_rows(activations, m, k, |x, j| x / smoothing[j])
    }

    /// Takes the codes and scales of another quantizer.
    ///
    /// `codes` is row-major `[m, k]` without padding, and `scales` is `[m]`.
    ///
    /// # Errors
    /// - [`Error::EmptyDimension`] if `k` is 0, [`Error::KTooLarge`] if it exceeds 131,072.
    /// - [`Error::ShapeMismatch`] if a slice has the wrong length.
    /// - [`Error::TooLarge`] if the activations exceed the address space.
    /// - [`Error::NonFiniteParameter`] if a scale is not finite.
    pub fn from_parts(codes: &[i8], scales: Vec<f32>, m: usize, k: usize) -> Result<Self, Error> {
        check_input(codes.len(), m, k)?;
        ActivationsView::new(codes, k, &scales, m, k)?;
        let (mut data, stride) = Self::padded(m, k)?;
        for (row, codes) in data.chunks_exact_mut(stride).zip(codes.chunks_exact(k)) {
            row[..k].copy_from_slice(codes);
        }
        Ok(Self { data, stride, scales, m, k })
    }

    /// Returns zeroed rows for `[m, k]` codes, and their stride in bytes.
    pub(crate) fn padded(m: usize, k: usize) -> Result<(Vec<i8>, usize), Error> {
        let stride = k.next_multiple_of(CODE_ALIGNMENT as usize);
        Ok((vec![0; checked_elements("activation matrix", m, stride)?], stride))
    }

    /// Takes padded codes, and scales that may be NaN.
    pub(crate) fn from_checked(data: Vec<i8>, stride: usize, scales: Vec<f32>, m: usize, k: usize) -> Self {
        Self { data, stride, scales, m, k }
    }

    /// Returns the codes: `m` rows of [`stride`](Self::stride) bytes, each with `k` codes and then zeros.
    pub fn data(&self) -> &[i8] {
        &self.data
    }

    /// Returns the bytes from one row to the next: `k` rounded up to a multiple of 16.
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// Returns the scales, one per token: `[m]`.
    pub fn scales(&self) -> &[f32] {
        &self.scales
    }

    /// Returns the number of tokens (rows).
    pub fn m(&self) -> usize {
        self.m
    }

    /// Returns the number of elements per token (columns).
    pub fn k(&self) -> usize {
        self.k
    }

    /// Returns the `k` codes of one token.
    ///
    /// # Panics
    /// If `token` is not below `m`.
    pub fn row(&self, token: usize) -> &[i8] {
        &self.data[token * self.stride..][..self.k]
    }

    /// Borrows the activations.
    pub fn view(&self) -> ActivationsView<'_> {
        // The constructor has checked everything. Another check would read all scales.
        ActivationsView { data: &self.data, stride: self.stride, scales: &self.scales, m: self.m, k: self.k }
    }

    /// Returns the represented values, `code · scale`, row-major `[m, k]`.
    pub fn dequantize(&self) -> Vec<f32> {
        let mut values = Vec::with_capacity(self.m * self.k);
        for (token, &scale) in self.scales.iter().enumerate() {
            values.extend(self.row(token).iter().map(|&code| code as f32 * scale));
        }
        values
    }
}

impl fmt::Debug for QuantizedActivations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("QuantizedActivations")
            .field("m", &self.m)
            .field("k", &self.k)
            .field("stride", &self.stride)
            .finish_non_exhaustive()
    }
}

/// Borrowed int8 activations `[m, k]` with any row stride of at least `k`.
///
/// The GEMM functions take this view or anything that converts to it.
#[derive(Clone, Copy, Debug)]
pub struct ActivationsView<'a> {
    data: &'a [i8],
    stride: usize,
    scales: &'a [f32],
    m: usize,
    k: usize,
}

impl<'a> ActivationsView<'a> {
    /// Checks and wraps existing codes.
    ///
    /// Row `i` is `data[i · stride ..][.. k]` with the scale `scales[i]`.
    /// `stride` is in elements, which are bytes. Elements between rows are never read.
    /// The last row needs no padding, so `data` has at least `(m − 1) · stride + k` elements.
    ///
    /// # Errors
    /// - [`Error::EmptyDimension`] if `k` is 0, [`Error::KTooLarge`] if it exceeds 131,072.
    /// - [`Error::StrideTooShort`] if `stride < k`.
    /// - [`Error::ShapeMismatch`] if `data` is too short or `scales` is not `[m]`.
    /// - [`Error::TooLarge`] if the rows exceed the address space.
    /// - [`Error::NonFiniteParameter`] if a scale is not finite.
    pub fn new(data: &'a [i8], stride: usize, scales: &'a [f32], m: usize, k: usize) -> Result<Self, Error> {
        check_k(k)?;
        if stride < k {
            return Err(Error::StrideTooShort { stride, k });
        }
        // The last row needs no padding after it.
        let needed = match m.checked_sub(1) {
            None => 0,
            Some(others) => checked_elements("activation matrix", others, stride)?
                .checked_add(k)
                .ok_or(Error::TooLarge { what: "activation matrix", rows: m, columns: stride })?,
        };
        if data.len() < needed {
            let shape = "(m - 1) · stride + k at the least";
            return Err(Error::ShapeMismatch {
                what: "activations",
                expected: needed,
                actual: data.len(),
                shape,
            });
        }
        check_length("token scales", "[m]", m, scales.len())?;
        check_finite("token scale", scales)?;
        Ok(Self { data, stride, scales, m, k })
    }

    /// Returns the codes. Row `i` begins at `i · stride`.
    pub fn data(&self) -> &'a [i8] {
        self.data
    }

    /// Returns the bytes from one row to the next.
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// Returns the scales, one per token: `[m]`.
    pub fn scales(&self) -> &'a [f32] {
        self.scales
    }

    /// Returns the number of tokens (rows).
    pub fn m(&self) -> usize {
        self.m
    }

    /// Returns the number of elements per token (columns).
    pub fn k(&self) -> usize {
        self.k
    }

    /// Returns the view of a range of tokens, which exist.
    pub(crate) fn rows(&self, tokens: Range<usize>) -> Self {
        // The last row of the view may end before its stride does.
        let first = (tokens.start * self.stride).min(self.data.len());
        Self { data: &self.data[first..], scales: &self.scales[tokens.clone()], m: tokens.len(), ..*self }
    }

    /// Returns the `k` codes of one token.
    ///
    /// # Panics
    /// If `token` is not below `m`.
    pub fn row(&self, token: usize) -> &'a [i8] {
        &self.data[token * self.stride..][..self.k]
    }
}

impl<'a> From<&'a QuantizedActivations> for ActivationsView<'a> {
    fn from(activations: &'a QuantizedActivations) -> Self {
        activations.view()
    }
}

/// Multiplies column `j` of row-major `[n, k]` weights by `smoothing[j]`, and returns them as f32 `[n, k]`.
///
/// This is the offline half of smoothing; [`QuantizedActivations::with_smoothing`] is the other half.
/// Pass the result to [`PackedWeights::quantize`](crate::PackedWeights::quantize).
/// A product that overflows f32 is reported there, with its position.
///
/// # Errors
/// - [`Error::EmptyDimension`] if `n` or `k` is 0, [`Error::KTooLarge`] if `k` exceeds 131,072.
/// - [`Error::ShapeMismatch`] if `weights` is not `[n, k]` or `smoothing` is not `[k]`.
/// - [`Error::TooLarge`] if the weights exceed the address space.
/// - [`Error::InvalidSmoothing`] if a factor is not finite and positive.
pub fn smooth_weights<T: Float>(
    weights: &[T],
    n: usize,
    k: usize,
    smoothing: &[f32],
) -> Result<Vec<f32>, Error> {
    PackedSizes::new(n, k, Group::default())?;
    check_length("weights", "[n, k]", checked_elements("weight matrix", n, k)?, weights.len())?;
    check_smoothing(smoothing, k)?;
    Ok(weights
        .par_chunks_exact(k)
        .flat_map_iter(|row| row.iter().zip(smoothing).map(|(weight, factor)| weight.to_f32() * factor))
        .collect())
}

fn check_input(length: usize, m: usize, k: usize) -> Result<(), Error> {
    check_k(k)?;
    check_length("activations", "[m, k]", checked_elements("activation matrix", m, k)?, length)
}

pub(crate) fn check_smoothing(smoothing: &[f32], k: usize) -> Result<(), Error> {
    check_length("smoothing vector", "[k]", k, smoothing.len())?;
    match smoothing.iter().position(|factor| !(factor.is_finite() && *factor > 0.0)) {
        Some(k) => Err(Error::InvalidSmoothing { k, value: smoothing[k] }),
        None => Ok(()),
    }
}

/// Quantizes row by row, after `smooth(x, column)` on every element. The caller has checked the shapes.
fn quantize_rows<T: Float>(
    activations: &[T],
    m: usize,
    k: usize,
    smooth: impl Fn(f32, usize) -> f32 + Sync,
) -> Result<QuantizedActivations, Error> {
    let (mut data, stride) = QuantizedActivations::padded(m, k)?;
    let rows: Vec<Result<f32, Error>> = data
        .par_chunks_exact_mut(stride)
        .zip(activations.par_chunks_exact(k))
        .enumerate()
        .map_init(Vec::new, |values: &mut Vec<f32>, (token, (codes, row))| {
            values.clear();
            values.extend(row.iter().enumerate().map(|(column, x)| smooth(x.to_f32(), column)));
            if let Some(k) = values.iter().position(|x| !x.is_finite()) {
                return Err(Error::NonFiniteActivation { token, k, value: values[k] });
            }
            Ok(quantize_row(values, &mut codes[..k]))
        })
        .collect();
    // Reports the first failing token, whichever thread failed first.
    let scales = rows.into_iter().collect::<Result<_, _>>()?;
    Ok(QuantizedActivations { data, stride, scales, m, k })
}

/// Quantizes one token and returns its scale.
fn quantize_row(values: &[f32], codes: &mut [i8]) -> f32 {
    with_fma(|| {
        let scale = RowScale::new::<Host>(max_magnitude(values), None, None);
        write_codes(scale, values, codes);
        scale.get()
    })
}
