//! The grouped GEMM on the CPU: for each expert the GEMM of its rows, so with the same bits.

use std::borrow::Borrow;
use std::ops::Range;

use rayon::prelude::*;

use super::{Kernel, multiply};
use crate::check::{check_bias, check_experts, check_length, checked_elements};
use crate::{ActivationsView, Error, Output, PackedWeights};

/// Where the rows of each expert lie.
#[derive(Clone, Copy, Debug)]
pub enum RowIndex<'a> {
    /// `[experts + 1]`: expert e has the rows from offset e up to offset e + 1 (contiguous).
    ///
    /// Offsets never descend, and none exceeds the number of rows.
    /// Rows before the first offset or behind the last belong to no expert.
    Offsets(&'a [i32]),
    /// `[experts]`: expert e has count e rows, from row e · capacity on (masked).
    ///
    /// The capacity is the number of rows divided by the number of experts. No count exceeds it.
    Counts(&'a [i32]),
}

impl RowIndex<'_> {
    /// Returns the rows of each of `experts` experts among `rows` rows.
    ///
    /// # Errors
    /// - [`Error::ShapeMismatch`] if the index does not have an entry for each expert,
    ///   or if counts are given and the rows do not divide evenly among the experts.
    /// - [`Error::BadRowIndex`] if an expert's rows are out of range or out of order.
    pub(crate) fn rows(self, experts: usize, rows: usize) -> Result<Vec<Range<usize>>, Error> {
        let bad = |expert, begin, end, limit| Error::BadRowIndex { expert, begin, end, limit };
        match self {
            Self::Offsets(offsets) => {
                check_length("row offsets", "[experts + 1]", experts + 1, offsets.len())?;
                let range = |(expert, pair): (usize, &[i32])| match (pair[0], pair[1]) {
                    (begin, end) if 0 <= begin && begin <= end && end as usize <= rows => {
                        Ok(begin as usize..end as usize)
                    }
                    (begin, end) => Err(bad(expert, begin.into(), end.into(), rows)),
                };
                offsets.windows(2).enumerate().map(range).collect()
            }
            Self::Counts(counts) => {
                check_length("row counts", "[experts]", experts, counts.len())?;
                let capacity = rows / experts;
                check_length("activations", "experts · capacity rows", experts * capacity, rows)?;
                let range = |(expert, &count): (usize, &i32)| {
                    let begin = expert * capacity;
                    match usize::try_from(count) {
                        Ok(rows) if rows <= capacity => Ok(begin..begin + rows),
                        _ => Err(bad(expert, 0, count.into(), capacity)),
                    }
                };
                counts.iter().enumerate().map(range).collect()
            }
        }
    }
}

/// Computes, for each expert, `out[rows, n] = epilogue(x[rows, k] · int8_weights[n, k]ᵀ)` of its rows.
///
/// All experts have the same `[n, k]` and the same group. `x` has the rows of all experts, `[rows, k]`,
/// and `out` is `[rows, n]`; `index` says which rows are whose. An expert may have no rows.
/// Rows of `out` that belong to no expert are left as they are.
/// `bias` is `[experts, n]`. The result of each expert has the bits of [`gemm`](super::gemm) of its rows.
/// `out` is written only if all checks pass.
///
/// # Errors
/// - [`Error::NoExperts`] without experts, [`Error::ExpertsDiffer`] if one differs from the first in shape or group.
/// - [`Error::BadRowIndex`] or [`Error::ShapeMismatch`] for an index that does not fit the rows.
/// - Those of [`gemm`](super::gemm) for the other arguments.
pub fn grouped_gemm<'a, T: Output, E: Borrow<PackedWeights> + Sync>(
    experts: &[E],
    x: impl Into<ActivationsView<'a>>,
    index: RowIndex<'_>,
    bias: Option<&[f32]>,
    out: &mut [T],
) -> Result<(), Error> {
    let x = x.into();
    let first = check_experts(experts)?;
    let (n, k) = (first.n(), first.k());
    if k != x.k() {
        return Err(Error::KMismatch { weights: k, activations: x.k() });
    }
    check_length("output", "[rows, n]", checked_elements("output matrix", x.m(), n)?, out.len())?;
    check_bias::<T>(bias, "[experts, n]", checked_elements("bias", experts.len(), n)?)?;
    let rows = index.rows(experts.len(), x.m())?;

    let mut tasks = Vec::new();
    let (mut rest, mut passed) = (out, 0);
    for (expert, rows) in rows.into_iter().enumerate().filter(|(_, rows)| !rows.is_empty()) {
        let behind = rest.split_at_mut((rows.start - passed) * n).1;
        let (out, behind) = behind.split_at_mut(rows.len() * n);
        (rest, passed) = (behind, rows.end);
        tasks.push((expert, rows, out));
    }
    tasks.into_par_iter().for_each(|(expert, rows, out)| {
        let bias = bias.map(|bias| &bias[expert * n..][..n]);
        multiply(Kernel::best(), experts[expert].borrow(), &x.rows(rows), bias, out);
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Group, QuantizedActivations, cpu};

    fn experts(count: usize, n: usize, k: usize) -> Vec<PackedWeights> {
        (0..count)
            .map(|expert| {
                let weights: Vec<f32> =
                    (0..n * k).map(|i| ((i * 7 + expert * 131) as f32 * 0.37).sin()).collect();
                PackedWeights::quantize(&weights, n, k, Group::default()).unwrap()
            })
            .collect()
    }

    fn activations(m: usize, k: usize) -> QuantizedActivations {
        let x: Vec<f32> = (0..m * k).map(|i| (i as f32 * 0.11).cos()).collect();
        QuantizedActivations::quantize(&x, m, k).unwrap()
    }

    #[test]
    fn each_expert_gets_the_bits_of_a_gemm_of_its_rows() {
        let (n, k, rows) = (70, 130, 40);
        let (experts, x) = (experts(5, n, k), activations(rows, k));
        let bias: Vec<f32> = (0..5 * n).map(|i| i as f32 * 0.25 - 3.0).collect();
        let offsets = [2, 2, 3, 30, 30, 38];
        let mut out = vec![-7.0f32; rows * n];
        grouped_gemm(&experts, &x, RowIndex::Offsets(&offsets), Some(&bias), &mut out).unwrap();
        let mut expected = vec![-7.0f32; rows * n];
        for (expert, pair) in offsets.windows(2).enumerate() {
            let rows = pair[0] as usize..pair[1] as usize;
            let bias = Some(&bias[expert * n..][..n]);
            let out = &mut expected[rows.start * n..rows.end * n];
            cpu::gemm(&experts[expert], x.view().rows(rows), bias, out).unwrap();
        }
        assert_eq!(out, expected);

        // The same rows in places of 8 each.
        let counts = [0, 1, 8, 3, 5];
        let mut masked = vec![-7.0f32; rows * n];
        grouped_gemm(&experts, &x, RowIndex::Counts(&counts), None, &mut masked).unwrap();
        for (expert, &count) in counts.iter().enumerate() {
            let mut own = vec![-7.0f32; 8 * n];
            let rows = expert * 8..expert * 8 + count as usize;
            cpu::gemm(&experts[expert], x.view().rows(rows), None, &mut own[..count as usize * n]).unwrap();
            assert_eq!(masked[expert * 8 * n..][..8 * n], own);
        }
    }

    #[test]
    fn bad_arguments_are_refused_before_anything_is_written() {
        let (n, k, rows) = (3, 64, 8);
        let (experts, x) = (experts(2, n, k), activations(rows, k));
        let refused = |experts: &[PackedWeights], index: RowIndex<'_>, bias: Option<&[f32]>| {
            let mut out = vec![5i32; rows * n];
            let error = grouped_gemm(experts, &x, index, bias, &mut out).unwrap_err();
            assert_eq!(out, vec![5; rows * n]);
            error
        };
        for offsets in [[0, 5, 4], [-1, 2, 3], [0, 2, 9], [i32::MIN, i32::MAX, 0]] {
            let error = refused(&experts, RowIndex::Offsets(&offsets), None);
            assert!(matches!(error, Error::BadRowIndex { .. }), "{error}");
        }
        for counts in [[5, 0], [0, -1], [i32::MAX, i32::MIN]] {
            let error = refused(&experts, RowIndex::Counts(&counts), None);
            assert!(matches!(error, Error::BadRowIndex { limit: 4, .. }), "{error}");
        }
        for index in [RowIndex::Offsets(&[0, 8]), RowIndex::Counts(&[1, 2, 3])] {
            assert!(matches!(refused(&experts, index, None), Error::ShapeMismatch { .. }));
        }
        assert!(matches!(refused(&[], RowIndex::Offsets(&[0]), None), Error::NoExperts));
        assert!(matches!(
            refused(&experts, RowIndex::Offsets(&[0, 4, 8]), Some(&[0.0; 6])),
            Error::BiasWithRawOutput
        ));
        let mixed = [experts[0].clone(), super::tests::experts(1, n, 2 * k).remove(0)];
        let error = refused(&mixed, RowIndex::Offsets(&[0, 4, 8]), None);
        assert!(matches!(error, Error::ExpertsDiffer { expert: 1, what: "k", .. }), "{error}");
        // Three places for eight rows.
        let three: Vec<_> = [&experts[0]; 3].map(Clone::clone).into();
        assert!(matches!(refused(&three, RowIndex::Counts(&[1, 1, 1]), None), Error::ShapeMismatch { .. }));
    }
}
