//! The combine of a mixture of experts on the CPU: each token's weighted sum of its experts' rows.
//! The kernel repeats it operation by operation (`kernels-gpu/src/combine.rs`).

use half::{bf16, f16};
use rayon::prelude::*;

use crate::Error;
use crate::check::{check_length, checked_elements};

/// An element type that can be combined: [`bf16`] or [`half::f16`]. The trait is sealed.
pub trait Combined: crate::Output + Into<f32> {
    /// Rounds a sum to the type, to nearest even.
    fn round(sum: f32) -> Self;
}

impl Combined for bf16 {
    fn round(sum: f32) -> Self {
        Self::from_f32(sum)
    }
}

impl Combined for f16 {
    fn round(sum: f32) -> Self {
        Self::from_f32(sum)
    }
}

/// Computes `out[t] = Σⱼ weights[t, j] · rows[positions[t, j]]` for each token t, j ascending.
///
/// `rows` is `[rows, n]`, `positions` and `weights` are `[tokens, top_k]`, and `out` is `[tokens, n]`.
/// A choice whose position is −1, or any other value outside the rows, is skipped.
/// The sum starts at +0.0. Each product and each sum is one rounded f32 operation,
/// never a fused multiply-add, and the last sum is rounded once to `T`.
/// A token without choices gets zeros.
///
/// Weights and rows that are not finite are not refused: they follow IEEE 754.
/// A result is then infinite or NaN, in the elements that they reach and in no others.
/// Which NaN it is may differ from the GPU. All other results have the same bits there.
///
/// # Errors
/// - [`Error::EmptyDimension`] if `n` or `top_k` is 0.
/// - [`Error::ShapeMismatch`] if `rows` has no whole number of rows,
///   or if `positions`, `weights` and `out` do not have the same number of tokens.
/// - [`Error::TooLarge`] if a shape exceeds the address space.
pub fn combine<T: Combined>(
    rows: &[T],
    positions: &[i32],
    weights: &[f32],
    [n, top_k]: [usize; 2],
    out: &mut [T],
) -> Result<(), Error> {
    crate::check::check_dimension("n", n)?;
    crate::check::check_dimension("top_k", top_k)?;
    let (row_count, tokens) = (rows.len() / n, positions.len() / top_k);
    check_length("rows", "[rows, n]", row_count * n, rows.len())?;
    check_length("positions", "[tokens, top_k]", tokens * top_k, positions.len())?;
    check_length("weights", "[tokens, top_k]", positions.len(), weights.len())?;
    check_length("output", "[tokens, n]", checked_elements("output matrix", tokens, n)?, out.len())?;
    let choices = positions.par_chunks_exact(top_k).zip(weights.par_chunks_exact(top_k));
    out.par_chunks_exact_mut(n).zip(choices).for_each_init(Vec::new, |sums, (out, (positions, weights))| {
        sums.clear();
        sums.resize(n, 0.0f32);
        for (&position, &weight) in positions.iter().zip(weights) {
            let row = usize::try_from(position).ok().filter(|&row| row < row_count);
            let Some(row) = row.map(|row| &rows[row * n..][..n]) else { continue };
            for (sum, &value) in sums.iter_mut().zip(row) {
                // Rust never contracts these into a fused multiply-add.
                let product = weight * value.into();
                *sum += product;
            }
        }
        for (out, &sum) in out.iter_mut().zip(&*sums) {
            *out = T::round(sum);
        }
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_are_added_in_order_and_those_outside_are_skipped() {
        let rows: Vec<bf16> = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0].map(bf16::from_f32).into();
        let positions = [2, 0, 7, -1, i32::MIN, 1, 1, 1];
        let weights = [0.5, 2.0, 9.0, 9.0, 9.0, 0.25, 0.25, 0.25];
        let mut out = vec![bf16::from_f32(-1.0); 4];
        combine(&rows, &positions, &weights, [2, 4], &mut out).unwrap();
        let out: Vec<f32> = out.into_iter().map(f32::from).collect();
        assert_eq!(out, [2.5 + 2.0, 3.0 + 4.0, 0.75 + 0.75 + 0.75, 3.0]);
    }

    #[test]
    fn products_and_sums_are_rounded_one_by_one() {
        // Fused, the second choice would leave the low bits of its product, 2⁻³⁰.
        let (a, b) = (1.0 + 2.0f32.powi(-7), 1.0 + 2.0f32.powi(-23));
        let rows = [bf16::ONE, bf16::from_f32(a)];
        let mut out = [bf16::ONE];
        combine(&rows, &[0, 1], &[-(a * b), b], [1, 2], &mut out).unwrap();
        assert_eq!(out, [bf16::ZERO]);
        assert_eq!(b.mul_add(a, -(a * b)), 2.0f32.powi(-30));
    }

    #[test]
    fn a_token_without_choices_gets_zeros_and_infinities_stay_in_their_elements() {
        let rows = [bf16::INFINITY, bf16::ONE];
        let mut out = [bf16::ONE; 4];
        combine(&rows, &[-1, 0], &[1.0, -1.0], [2, 1], &mut out).unwrap();
        assert_eq!(out, [bf16::ZERO, bf16::ZERO, bf16::NEG_INFINITY, bf16::NEG_ONE]);
        combine(&rows, &[0, 0], &[0.0, f32::NAN], [2, 1], &mut out).unwrap();
        assert!(out[0].is_nan() && out[1] == bf16::ZERO && out[2].is_nan() && out[3].is_nan());
    }

    #[test]
    fn wrong_shapes_are_refused_before_anything_is_written() {
        let rows = [bf16::ONE; 6];
        let refused = |rows: &[bf16], positions: &[i32], weights: &[f32], shape, length| {
            let mut out = vec![bf16::ONE; length];
            assert!(combine(rows, positions, weights, shape, &mut out).is_err());
            assert!(out.iter().all(|&value| value == bf16::ONE));
        };
        refused(&rows, &[0, 1], &[1.0, 1.0], [0, 2], 0);
        refused(&rows, &[0, 1], &[1.0, 1.0], [2, 0], 2);
        refused(&rows[..5], &[0, 1], &[1.0, 1.0], [2, 2], 2);
        refused(&rows, &[0, 1, 2], &[1.0, 1.0], [2, 2], 2);
        refused(&rows, &[0, 1], &[1.0], [2, 2], 2);
        refused(&rows, &[0, 1], &[1.0, 1.0], [2, 2], 4);
    }
}
