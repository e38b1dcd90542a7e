//! Argument checks that the public functions share. They run before anything is written.

use std::borrow::Borrow;

use liquidgemm_format::brick::MAX_K;

use crate::{ActivationsView, Error, Output, OutputType, PackedWeights};

/// Fails if `value` is 0.
pub(crate) fn check_dimension(dimension: &'static str, value: usize) -> Result<(), Error> {
    if value == 0 { Err(Error::EmptyDimension { dimension }) } else { Ok(()) }
}

/// Fails if K is 0 or too large for exact int32 accumulation.
pub(crate) fn check_k(k: usize) -> Result<(), Error> {
    check_dimension("k", k)?;
    if k > MAX_K { Err(Error::KTooLarge { k }) } else { Ok(()) }
}

/// Returns `rows · columns`, or an error if `usize` cannot hold it.
pub(crate) fn checked_elements(what: &'static str, rows: usize, columns: usize) -> Result<usize, Error> {
    rows.checked_mul(columns).ok_or(Error::TooLarge { what, rows, columns })
}

/// Fails unless a slice has the length that its shape requires.
pub(crate) fn check_length(
    what: &'static str,
    shape: &'static str,
    expected: usize,
    actual: usize,
) -> Result<(), Error> {
    if expected == actual { Ok(()) } else { Err(Error::ShapeMismatch { what, expected, actual, shape }) }
}

/// Fails unless a slice of `length` elements has `rows` rows of `row` elements, `stride` elements apart.
///
/// The last row needs no padding after it.
pub(crate) fn check_rows(
    what: &'static str,
    length: usize,
    rows: usize,
    stride: usize,
    row: usize,
) -> Result<(), Error> {
    let expected = spanned_elements(what, rows, stride, row)?;
    if length < expected {
        let shape = "(rows - 1) · stride + row at the least";
        return Err(Error::ShapeMismatch { what, expected, actual: length, shape });
    }
    Ok(())
}

/// Returns the elements that `rows` rows of `row` elements span, `stride` elements apart.
///
/// The last row needs no padding after it.
pub(crate) fn spanned_elements(
    what: &'static str,
    rows: usize,
    stride: usize,
    row: usize,
) -> Result<usize, Error> {
    if stride < row {
        return Err(Error::RowStrideTooShort { what, stride, row });
    }
    let Some(others) = rows.checked_sub(1) else { return Ok(0) };
    checked_elements(what, others, stride)?.checked_add(row).ok_or(Error::TooLarge {
        what,
        rows,
        columns: stride,
    })
}

/// Fails unless all values are finite. `what` names one of them: a scale or a bias.
pub(crate) fn check_finite(what: &'static str, values: &[f32]) -> Result<(), Error> {
    match values.iter().position(|value| !value.is_finite()) {
        Some(index) => Err(Error::NonFiniteParameter { what, index, value: values[index] }),
        None => Ok(()),
    }
}

/// Checks all operands of a product with weights `[n, k]` that writes `out_length` elements of `T`.
pub(crate) fn check_call<T: Output>(
    [n, k]: [usize; 2],
    x: &ActivationsView<'_>,
    bias: Option<&[f32]>,
    out_length: usize,
) -> Result<(), Error> {
    if k != x.k() {
        return Err(Error::KMismatch { weights: k, activations: x.k() });
    }
    check_length("output", "[m, n]", checked_elements("output matrix", x.m(), n)?, out_length)?;
    check_bias::<T>(bias, "[n]", n)
}

/// Checks a bias of `expected` elements, the product of `shape`, for an output of `T`.
pub(crate) fn check_bias<T: Output>(
    bias: Option<&[f32]>,
    shape: &'static str,
    expected: usize,
) -> Result<(), Error> {
    if let Some(bias) = bias {
        if T::TYPE == OutputType::I32 {
            return Err(Error::BiasWithRawOutput);
        }
        check_length("bias", shape, expected, bias.len())?;
        check_finite("bias", bias)?;
    }
    Ok(())
}

/// Fails unless there are experts, all with the same shape and group. Returns the first one.
pub(crate) fn check_experts<E: Borrow<PackedWeights>>(experts: &[E]) -> Result<&PackedWeights, Error> {
    let [first, others @ ..] = experts else { return Err(Error::NoExperts) };
    let first = first.borrow();
    for (index, other) in others.iter().map(E::borrow).enumerate() {
        let parts = [
            ("n", first.n().to_string(), other.n().to_string()),
            ("k", first.k().to_string(), other.k().to_string()),
            ("group", first.group().to_string(), other.group().to_string()),
        ];
        if let Some((what, expected, found)) = parts.into_iter().find(|(_, one, other)| one != other) {
            return Err(Error::ExpertsDiffer { expert: index + 1, what, expected, found });
        }
    }
    Ok(first)
}
