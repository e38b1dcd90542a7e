//! The Hessian of a layer's output error, `E[x xᵀ]` of its inputs: accumulated over batches, and factorized.
//!
//! Matrix products are ndarray's. Each runs on one thread, on blocks whose sizes do not depend on the number of threads,
//! so the results do not depend on it either.

use ndarray::linalg::general_mat_mul;
use ndarray::{Array2, ArrayView2, ArrayViewMut2, s};
use rayon::prelude::*;

use crate::activations::check_smoothing;
use crate::check::{check_k, check_length, checked_elements};
use crate::{Error, Float, rotate};

/// Rows and columns of a block of a factorization.
const BLOCK: usize = 128;

/// Tokens that are converted to f64 at a time.
const TOKENS: usize = 256;

/// `E[x xᵀ]` of a layer's inputs: a symmetric `[k, k]` matrix.
///
/// The expected squared error of an output is `d H dᵀ`, where `d` is the error of its weights.
#[derive(Clone, Debug, PartialEq)]
pub struct Hessian {
    values: Vec<f32>,
    k: usize,
}

impl Hessian {
    /// Takes a row-major symmetric `[k, k]` matrix. Its scale does not matter to the quantizer.
    ///
    /// # Errors
    /// - [`Error::EmptyDimension`] if `k` is 0, [`Error::KTooLarge`] if it exceeds 131,072.
    /// - [`Error::ShapeMismatch`] if the vector does not have `k²` elements.
    /// - [`Error::InvalidHessian`] if an element is not finite, or differs from its mirror image.
    /// - [`Error::InvalidMoment`] if an element of the diagonal is negative.
    pub fn new(values: Vec<f32>, k: usize) -> Result<Self, Error> {
        check_k(k)?;
        check_length("Hessian", "[k, k]", checked_elements("Hessian", k, k)?, values.len())?;
        let failure = values.par_chunks_exact(k).enumerate().find_map_first(|(row, of_row)| {
            if of_row[row] < 0.0 {
                return Some(Error::InvalidMoment { k: row, value: of_row[row] });
            }
            let bad =
                |column: &usize| !of_row[*column].is_finite() || of_row[*column] != values[column * k + row];
            (0..=row).find(bad).map(|column| Error::InvalidHessian { row, column, value: of_row[column] })
        });
        failure.map_or(Ok(Self { values, k }), Err)
    }

    /// Returns the number of input channels.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Returns the matrix, row-major `[k, k]`.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// Returns its diagonal, E\[x²\] of each input channel: `[k]`.
    pub fn second_moments(&self) -> Vec<f32> {
        self.values.iter().step_by(self.k + 1).copied().collect()
    }

    /// Returns the Hessian of the inputs divided by a smoothing vector, `[k]`.
    ///
    /// # Errors
    /// - [`Error::ShapeMismatch`] for another length, [`Error::InvalidSmoothing`] for a factor
    ///   that is not finite and positive.
    /// - [`Error::InvalidHessian`] if an element exceeds f32.
    pub fn smoothed(&self, smoothing: &[f32]) -> Result<Self, Error> {
        check_smoothing(smoothing, self.k)?;
        let mut values = self.values.clone();
        values.par_chunks_exact_mut(self.k).zip(smoothing).for_each(|(row, &of_row)| {
            for (value, &of_column) in row.iter_mut().zip(smoothing) {
                // Rounded once, so that the matrix stays symmetric.
                *value = (f64::from(*value) / (f64::from(of_row) * f64::from(of_column))) as f32;
            }
        });
        Self::new(values, self.k)
    }

    /// Returns the Hessian of the inputs rotated in blocks of `block` ([`rotate`](crate::rotate)).
    ///
    /// # Errors
    /// - [`Error::InvalidRotation`] if the block is no power of two or does not divide k.
    /// - [`Error::InvalidHessian`] if an element exceeds f32.
    pub fn rotated(&self, block: usize) -> Result<Self, Error> {
        let k = self.k;
        let mut half = self.values.clone();
        rotate(&mut half, k, block)?;
        let mut values = vec![0f32; k * k];
        values.par_chunks_exact_mut(k).enumerate().for_each(|(row, to)| {
            for (to, half) in to.iter_mut().zip(half.iter().skip(row).step_by(k)) {
                *to = *half;
            }
        });
        rotate(&mut values, k, block)?;
        // The two halves differ by rounding; the lower one counts.
        for row in 0..k {
            for column in 0..row {
                values[column * k + row] = values[row * k + column];
            }
            // The diagonal is a mean of squares.
            values[row * k + row] = values[row * k + row].max(0.0);
        }
        Self::new(values, k)
    }

    /// Returns `Σ d H dᵀ` over the rows `d` of `[rows, k]`.
    pub(super) fn expected_square(&self, rows: &[f32]) -> f64 {
        let rows = view(rows, rows.len() / self.k, self.k);
        let products = rows.dot(&view(&self.values, self.k, self.k));
        rows.iter().zip(&products).map(|(&d, &product)| f64::from(d) * f64::from(product)).sum()
    }

    /// Returns the upper triangular `U` with `UᵀU = H⁻¹`, row-major `[k, k]`, of the damped Hessian
    /// whose rows and columns are in the given order.
    ///
    /// `damping` times the mean of the diagonal is added to the diagonal. A Hessian of zeros counts as the identity.
    ///
    /// # Errors
    /// [`Error::HessianNotPositive`] if the damped matrix has no Cholesky factor.
    pub(super) fn inverse_factor(&self, order: &[usize], damping: f32) -> Result<Vec<f32>, Error> {
        let k = self.k;
        let diagonal = self.second_moments();
        let mean = diagonal.iter().map(|&value| f64::from(value)).sum::<f64>() / k as f64;
        // With rows and columns reversed, H = L Lᵀ. Then H⁻¹ = L⁻ᵀ L⁻¹, and the reversed L⁻¹ is U.
        let mut matrix = vec![0f64; k * k];
        matrix.par_chunks_exact_mut(k).enumerate().for_each(|(row, to)| {
            let from = &self.values[order[k - 1 - row] * k..][..k];
            for (column, to) in to[..=row].iter_mut().enumerate() {
                *to = if mean > 0.0 { f64::from(from[order[k - 1 - column]]) / mean } else { 0.0 };
            }
            to[row] += if mean > 0.0 { f64::from(damping) } else { 1.0 };
        });
        cholesky(&mut matrix, k)
            .map_err(|row| Error::HessianNotPositive { k: order[k - 1 - row], damping })?;
        invert_lower(&mut matrix, k);
        let mut factor = vec![0f32; k * k];
        factor.par_chunks_exact_mut(k).enumerate().for_each(|(row, to)| {
            let from = &matrix[(k - 1 - row) * k..][..k];
            for (to, from) in to[row..].iter_mut().zip(from[..k - row].iter().rev()) {
                *to = *from as f32;
            }
        });
        Ok(factor)
    }
}

/// Accumulates a [`Hessian`] batch by batch.
#[derive(Clone, Debug)]
pub struct HessianBuilder {
    tokens: u64,
    /// `[k, k]`; the lower triangle, and part of the upper.
    sum: Vec<f64>,
    k: usize,
}

impl HessianBuilder {
    /// Starts with no tokens, for inputs of `k` channels.
    ///
    /// # Errors
    /// - [`Error::EmptyDimension`] if `k` is 0, [`Error::KTooLarge`] if it exceeds 131,072.
    /// - [`Error::TooLarge`] if the matrix exceeds the address space.
    pub fn new(k: usize) -> Result<Self, Error> {
        check_k(k)?;
        Ok(Self { tokens: 0, sum: vec![0.0; checked_elements("Hessian", k, k)?], k })
    }

    /// Adds the inputs of `m` tokens, row-major `[m, k]`.
    ///
    /// # Errors
    /// - [`Error::ShapeMismatch`] if the slice does not have `m · k` elements.
    /// - [`Error::NonFiniteActivation`] with the position of the first value that is NaN or infinite.
    ///   The Hessian is then as it was.
    pub fn add<T: Float>(&mut self, inputs: &[T], m: usize) -> Result<(), Error> {
        let k = self.k;
        super::statistics::check_inputs(inputs, m, k)?;
        for inputs in inputs.chunks(TOKENS * k) {
            let x: Vec<f64> = inputs.iter().map(|x| f64::from(x.to_f32())).collect();
            let x = view(&x, inputs.len() / k, k);
            self.sum.par_chunks_mut(BLOCK * k).enumerate().for_each(|(block, sum)| {
                let rows = sum.len() / k;
                let (first, end) = (block * BLOCK, block * BLOCK + rows);
                let mut sum = view_mut(sum, rows, k);
                let mut sum = sum.slice_mut(s![.., ..end]);
                general_mat_mul(
                    1.0,
                    &x.slice(s![.., first..end]).t(),
                    &x.slice(s![.., ..end]),
                    1.0,
                    &mut sum,
                );
            });
        }
        self.tokens += m as u64;
        Ok(())
    }

    /// Returns the mean over all tokens.
    ///
    /// # Errors
    /// - [`Error::NoTokens`] if none was added.
    /// - [`Error::InvalidHessian`] if an element exceeds f32.
    pub fn finish(self) -> Result<Hessian, Error> {
        if self.tokens == 0 {
            return Err(Error::NoTokens);
        }
        let (k, tokens, sum) = (self.k, self.tokens as f64, &self.sum);
        let mut values = vec![0f32; k * k];
        values.par_chunks_exact_mut(k).enumerate().for_each(|(row, values)| {
            for (column, value) in values.iter_mut().enumerate() {
                *value = (sum[row.max(column) * k + row.min(column)] / tokens) as f32;
            }
        });
        Hessian::new(values, k)
    }
}

/// Overwrites the lower triangle of a symmetric row-major `[k, k]` matrix with its Cholesky factor `L`.
/// The upper triangle is not read, and left with anything. Fails with the row whose pivot is not positive.
fn cholesky(matrix: &mut [f64], k: usize) -> Result<(), usize> {
    for first in (0..k).step_by(BLOCK) {
        let end = (first + BLOCK).min(k);
        let width = end - first;
        let (above, below) = matrix.split_at_mut(end * k);
        let mut diagonal = Array2::zeros((width, width));
        for row in 0..width {
            for column in 0..=row {
                let mut value = above[(first + row) * k + first + column];
                for i in 0..column {
                    value -= diagonal[[row, i]] * diagonal[[column, i]];
                }
                if row > column {
                    value /= diagonal[[column, column]];
                } else if value > 0.0 && value.is_finite() {
                    value = value.sqrt();
                } else {
                    return Err(first + row);
                }
                diagonal[[row, column]] = value;
                above[(first + row) * k + first + column] = value;
            }
        }
        if end == k {
            break;
        }
        // The panel below becomes A · L⁻ᵀ, in place; then what is behind it loses panel · panelᵀ.
        let inverse = inverse_of_block(diagonal.view());
        let panel: Vec<f64> = below
            .par_chunks_mut(BLOCK * k)
            .flat_map_iter(|rows| {
                let mut rows = view_mut_of(rows, k);
                let panel = rows.slice(s![.., first..end]).dot(&inverse.t());
                rows.slice_mut(s![.., first..end]).assign(&panel);
                panel.into_raw_vec_and_offset().0
            })
            .collect();
        let panel = view(&panel, k - end, width);
        below.par_chunks_mut(BLOCK * k).enumerate().for_each(|(block, rows)| {
            let mut rows = view_mut_of(rows, k);
            let top = block * BLOCK;
            let bottom = top + rows.nrows();
            let mut behind = rows.slice_mut(s![.., end..end + bottom]);
            let (left, right) = (panel.slice(s![top..bottom, ..]), panel.slice(s![..bottom, ..]));
            general_mat_mul(-1.0, &left, &right.t(), 1.0, &mut behind);
        });
    }
    Ok(())
}

/// Overwrites the lower triangle of a row-major `[k, k]` matrix, which is `L`, with that of `L⁻¹`.
/// The upper triangle is not read, and left with anything.
fn invert_lower(matrix: &mut [f64], k: usize) {
    for first in (0..k).step_by(BLOCK) {
        let end = (first + BLOCK).min(k);
        let (above, rows) = matrix.split_at_mut(first * k);
        let mut rows = view_mut_of(&mut rows[..(end - first) * k], k);
        let inverse = inverse_of_block(rows.slice(s![.., first..end]));
        let above = view(above, first, k);
        // Row block i of L⁻¹ is −L[i, i]⁻¹ · L[i, ..i] · L⁻¹[..i, ..].
        let columns: Vec<usize> = (0..first).step_by(BLOCK).collect();
        let blocks: Vec<Array2<f64>> = columns
            .par_iter()
            .map(|&column| {
                let left = rows.slice(s![.., column..first]);
                let sum = left.dot(&above.slice(s![column..first, column..column + BLOCK]));
                -inverse.dot(&sum)
            })
            .collect();
        for (column, block) in columns.into_iter().zip(blocks) {
            rows.slice_mut(s![.., column..column + BLOCK]).assign(&block);
        }
        // The zeros above the diagonal count in the products of later blocks.
        rows.slice_mut(s![.., first..end]).assign(&inverse);
    }
}

/// Returns the inverse of a small lower triangular matrix. Its upper triangle is not read; the result's is zero.
fn inverse_of_block(lower: ArrayView2<'_, f64>) -> Array2<f64> {
    let size = lower.nrows();
    let mut inverse = Array2::zeros((size, size));
    for column in 0..size {
        inverse[[column, column]] = 1.0 / lower[[column, column]];
        for row in column + 1..size {
            let sum: f64 = (column..row).map(|i| lower[[row, i]] * inverse[[i, column]]).sum();
            inverse[[row, column]] = -sum / lower[[row, row]];
        }
    }
    inverse
}

/// Views a slice of `rows · columns` elements as a matrix.
pub(super) fn view<T>(values: &[T], rows: usize, columns: usize) -> ArrayView2<'_, T> {
    ArrayView2::from_shape((rows, columns), values).expect("the caller gives rows · columns elements")
}

/// Views a slice of `rows · columns` elements as a matrix.
pub(super) fn view_mut<T>(values: &mut [T], rows: usize, columns: usize) -> ArrayViewMut2<'_, T> {
    ArrayViewMut2::from_shape((rows, columns), values).expect("the caller gives rows · columns elements")
}

/// Views whole rows of `k` elements as a matrix.
fn view_mut_of(values: &mut [f64], k: usize) -> ArrayViewMut2<'_, f64> {
    let rows = values.len() / k;
    view_mut(values, rows, k)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Inputs `[m, k]` that are correlated, with channels of different sizes.
    fn inputs(m: usize, k: usize) -> Vec<f32> {
        let mut state = 7u64;
        let mut uniform = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        let mut x = vec![0f32; m * k];
        for row in x.chunks_exact_mut(k) {
            let common = uniform();
            for (j, x) in row.iter_mut().enumerate() {
                *x = (uniform() + common) * (1.0 + (j % 5) as f32);
            }
        }
        x
    }

    #[test]
    fn the_mean_of_outer_products_does_not_depend_on_how_tokens_are_batched() {
        let (m, k) = (300, 150);
        let x = inputs(m, k);
        let mut whole = HessianBuilder::new(k).unwrap();
        whole.add(&x, m).unwrap();
        let mut parts = HessianBuilder::new(k).unwrap();
        parts.add(&x[..100 * k], 100).unwrap();
        parts.add(&x[100 * k..], 200).unwrap();
        let (whole, parts) = (whole.finish().unwrap(), parts.finish().unwrap());
        for i in 0..k {
            for j in 0..k {
                let sum: f64 = x.chunks(k).map(|x| f64::from(x[i]) * f64::from(x[j])).sum();
                for hessian in [&whole, &parts] {
                    let error = (f64::from(hessian.values()[i * k + j]) - sum / m as f64).abs();
                    assert!(error < 1e-4, "({i}, {j}): {error}");
                }
            }
        }
    }

    #[test]
    fn the_factor_is_upper_triangular_and_its_square_is_the_inverse_for_every_number_of_blocks() {
        for k in [1, 2, 100, 128, 129, 300] {
            let mut builder = HessianBuilder::new(k).unwrap();
            builder.add(&inputs(2 * k, k), 2 * k).unwrap();
            let hessian = builder.finish().unwrap();
            let order: Vec<usize> = (0..k).map(|i| (i * 7 + 3) % k).collect();
            let order = if k % 7 == 0 { (0..k).collect() } else { order };
            let factor = hessian.inverse_factor(&order, 0.01).unwrap();
            let diagonal = hessian.second_moments();
            let mean = diagonal.iter().sum::<f32>() / k as f32;
            let u = view(&factor, k, k);
            assert!((0..k).all(|row| (0..row).all(|column| u[[row, column]] == 0.0)));
            // H · UᵀU is the identity, up to the scale by the mean.
            let damped = Array2::from_shape_fn((k, k), |(i, j)| {
                let value = hessian.values()[order[i] * k + order[j]] / mean;
                if i == j { value + 0.01 } else { value }
            });
            let identity = damped.dot(&u.t().dot(&u));
            for ((i, j), value) in identity.indexed_iter() {
                let expected = if i == j { 1.0 } else { 0.0 };
                assert!((value - expected).abs() < 2e-3, "k = {k}, ({i}, {j}): {value}");
            }
        }
    }

    #[test]
    fn a_matrix_that_is_not_positive_definite_is_refused_at_its_first_bad_channel() {
        let values = vec![1.0, 2.0, 2.0, 1.0];
        let error = Hessian::new(values, 2).unwrap().inverse_factor(&[0, 1], 0.01).unwrap_err();
        assert!(matches!(error, Error::HessianNotPositive { k: 0, damping: 0.01 }), "{error}");
    }
}
