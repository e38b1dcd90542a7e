//! int8 activations: per-token symmetric quantization, and a borrowed view for codes that exist already.
//!
//! Shapes are `[m, k]`, one row a token. Rows of [`QuantizedActivations`] are padded with zeros to a stride
//! that is a multiple of 16 bytes, as TMA asks for, so the same buffer can be copied to a GPU as it is.

use std::fmt;

use rayon::prelude::*;

use crate::error::{check_finite, check_k, check_length, checked_elements};
use crate::float::{Float, round_clamped, scale_of};
use crate::packed::PackedSizes;
use crate::{Error, Group};

/// The largest magnitude of an activation code.
const CODE_LIMIT: f32 = 127.0;

/// Bytes that a row stride is padded to.
const STRIDE_ALIGNMENT: usize = 16;

/// int8 activations `[m, k]` with one f32 scale a token.
#[derive(Clone, PartialEq)]
pub struct QuantizedActivations {
    data: Vec<i8>,
    stride: usize,
    scales: Vec<f32>,
    m: usize,
    k: usize,
}

impl QuantizedActivations {
    /// Quantizes row-major `[m, k]` activations: per token `scale = max|x| / 127` in f32 (the next larger number where a
    /// subnormal scale was rounded down so far that the largest value would be clipped) and codes `clamp(rne(x / scale), −127, 127)`. An all-zero
    /// token has scale 0 and codes 0.
    ///
    /// # Errors
    /// Zero `k`, K above 131,072, a slice that is not `m · k` long, and NaN or infinite activations,
    /// named by their position.
    pub fn quantize<T: Float>(activations: &[T], m: usize, k: usize) -> Result<Self, Error> {
        check_input(activations.len(), m, k)?;
        quantize_rows(activations, m, k, |x, _| x)
    }

    /// Like [`quantize`](Self::quantize), after dividing column `j` by `smoothing[j]` (length `k`).
    ///
    /// The product stays the same if column `j` of the weights was multiplied by the same factor before their
    /// own quantization: [`smooth_weights`].
    ///
    /// # Errors
    /// As [`quantize`](Self::quantize); also a smoothing factor that is not finite and positive.
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

    /// Takes codes that another quantizer made: row-major `[m, k]` without padding, and one scale a token.
    ///
    /// # Errors
    /// Shapes that do not fit, a scale that is not finite.
    pub fn from_parts(codes: &[i8], scales: Vec<f32>, m: usize, k: usize) -> Result<Self, Error> {
        check_input(codes.len(), m, k)?;
        ActivationsView::new(codes, k, &scales, m, k)?;
        let (mut data, stride) = padded(m, k)?;
        for (row, codes) in data.chunks_exact_mut(stride).zip(codes.chunks_exact(k)) {
            row[..k].copy_from_slice(codes);
        }
        Ok(Self { data, stride, scales, m, k })
    }

    /// The codes, `m` rows of [`stride`](Self::stride) bytes, each row's first `k` in use and the rest 0.
    pub fn data(&self) -> &[i8] {
        &self.data
    }

    /// Bytes from one row to the next: `k` rounded up to a multiple of 16.
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// One scale a token, `[m]`.
    pub fn scales(&self) -> &[f32] {
        &self.scales
    }

    /// Tokens (rows).
    pub fn m(&self) -> usize {
        self.m
    }

    /// Elements a token.
    pub fn k(&self) -> usize {
        self.k
    }

    /// The `k` codes of one token.
    ///
    /// # Panics
    /// If `token` is not below `m`.
    pub fn row(&self, token: usize) -> &[i8] {
        &self.data[token * self.stride..][..self.k]
    }

    /// The same activations, borrowed.
    pub fn view(&self) -> ActivationsView<'_> {
        // Holds by construction; checking again would read all of the data.
        ActivationsView { data: &self.data, stride: self.stride, scales: &self.scales, m: self.m, k: self.k }
    }

    /// What the codes stand for, `code · scale`, row-major `[m, k]`.
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
#[derive(Clone, Copy, Debug)]
pub struct ActivationsView<'a> {
    data: &'a [i8],
    stride: usize,
    scales: &'a [f32],
    m: usize,
    k: usize,
}

impl<'a> ActivationsView<'a> {
    /// Checks and wraps codes that lie in someone else's memory: row `i` is `data[i · stride ..][.. k]`, its
    /// scale `scales[i]`. What lies between rows is never read.
    ///
    /// # Errors
    /// Zero `k`, K above 131,072, `stride < k`, too short `data`, scales that are not `[m]` or not finite.
    pub fn new(data: &'a [i8], stride: usize, scales: &'a [f32], m: usize, k: usize) -> Result<Self, Error> {
        check_k(k)?;
        if stride < k {
            return Err(Error::StrideTooShort { stride, k });
        }
        // The last row needs no padding behind it.
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

    /// The codes; row `i` begins at `i · stride`.
    pub fn data(&self) -> &'a [i8] {
        self.data
    }

    /// Bytes from one row to the next.
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// One scale a token, `[m]`.
    pub fn scales(&self) -> &'a [f32] {
        self.scales
    }

    /// Tokens (rows).
    pub fn m(&self) -> usize {
        self.m
    }

    /// Elements a token.
    pub fn k(&self) -> usize {
        self.k
    }

    /// The `k` codes of one token.
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

/// The offline half of smoothing: row-major `[n, k]` weights with column `j` multiplied by `smoothing[j]`, as
/// f32, ready for [`PackedWeights::quantize`](crate::PackedWeights::quantize).
///
/// # Errors
/// Zero `n` or `k`, K above 131,072, lengths that do not fit, a factor that is not finite and positive.
/// A product that overflows f32 is reported later, by the quantizer, with its position.
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

fn check_smoothing(smoothing: &[f32], k: usize) -> Result<(), Error> {
    check_length("smoothing vector", "[k]", k, smoothing.len())?;
    match smoothing.iter().position(|factor| !(factor.is_finite() && *factor > 0.0)) {
        Some(k) => Err(Error::InvalidSmoothing { k, value: smoothing[k] }),
        None => Ok(()),
    }
}

/// Zeroed rows for `[m, k]` codes, and their stride.
fn padded(m: usize, k: usize) -> Result<(Vec<i8>, usize), Error> {
    let stride = k.next_multiple_of(STRIDE_ALIGNMENT);
    Ok((vec![0; checked_elements("activation matrix", m, stride)?], stride))
}

/// Quantizes row by row; `smooth(x, column)` is applied to every element first. Shapes are checked already.
fn quantize_rows<T: Float>(
    activations: &[T],
    m: usize,
    k: usize,
    smooth: impl Fn(f32, usize) -> f32 + Sync,
) -> Result<QuantizedActivations, Error> {
    let (mut data, stride) = padded(m, k)?;
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
    // The first failing token is reported, whichever thread met its own first.
    let scales = rows.into_iter().collect::<Result<_, _>>()?;
    Ok(QuantizedActivations { data, stride, scales, m, k })
}

/// Quantizes one token and returns its scale.
fn quantize_row(values: &[f32], codes: &mut [i8]) -> f32 {
    let scale = scale_of(values.iter().fold(0.0f32, |max, x| max.max(x.abs())), CODE_LIMIT);
    if scale == 0.0 {
        codes.fill(0);
        return 0.0;
    }
    for (code, x) in codes.iter_mut().zip(values) {
        *code = round_clamped(x / scale, CODE_LIMIT) as i8;
    }
    scale
}
