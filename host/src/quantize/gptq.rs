//! GPTQ (arXiv 2210.17323) onto the two-level grid: columns are quantized one after another, and the error of each
//! is fed back to the columns that follow, in the proportions that the Hessian of the inputs gives.
//!
//! The columns of a group are taken in the order of their inputs' second moments, the largest first:
//! errors of early columns find the most columns that can make up for them.
//! Groups stay where they are, so this order is no concern of the product.
//! The pair of a group is searched when its turn comes, on the weights as the feedback has left them.
//! An error in column `j` costs `1 / U[j, j]²`, where `U` is the factor of the inverse Hessian; the search weighs errors so.
//! If a channel has one group only, its scale and its pair are searched before the first column.
//!
//! A strip of 64 channels is one task. Its weights lie `[k, 64]`, so that a column is contiguous.

use std::ops::Range;

use liquidgemm_format::brick::{BRICK_CHANNELS, BRICK_K};
use ndarray::linalg::general_mat_mul;
use ndarray::s;

use super::hessian::{view, view_mut};
use super::search::{PairSearch, nearest_code};
use super::{Hessian, ZERO, check_weights, rtn};
use crate::check::{check_length, checked_elements};
use crate::packed::Packer;
use crate::{Error, Float, Group, PackedWeights};

/// Columns whose errors are fed back to the columns behind them together, by one matrix product.
const BLOCK: usize = 64;

/// Options of [`PackedWeights::quantize_gptq`].
#[derive(Clone, Copy, Debug)]
pub struct GptqOptions {
    /// How many weights share a pair.
    pub group: Group,
    /// What is added to the Hessian's diagonal, as a fraction of its mean. Default: 0.01.
    pub damping: f32,
}

impl Default for GptqOptions {
    fn default() -> Self {
        Self { group: Group::default(), damping: 0.01 }
    }
}

impl PackedWeights {
    /// Quantizes and packs row-major `[n, k]` weights by GPTQ (arXiv 2210.17323), for inputs with the given Hessian.
    ///
    /// It minimizes the expected error of the outputs, not that of the weights.
    /// Time grows with `n · k² + k³`, memory with `16 · k²` bytes beside the weights, of which the Hessian is `4 · k²`.
    /// The result does not depend on the number of threads.
    /// An input channel that is always 0 may get any weight: the damping alone decides.
    ///
    /// # Errors
    /// As [`quantize`](Self::quantize), and
    /// - [`Error::ShapeMismatch`] if the Hessian is not `[k, k]`.
    /// - [`Error::InvalidDamping`] if the damping is negative or not finite.
    /// - [`Error::HessianNotPositive`] if the damped Hessian has no Cholesky factor.
    pub fn quantize_gptq<T: Float>(
        weights: &[T],
        n: usize,
        k: usize,
        hessian: &Hessian,
        options: &GptqOptions,
    ) -> Result<Self, Error> {
        let &GptqOptions { group, damping } = options;
        check_weights(weights, n, k, group)?;
        check_length("Hessian", "[k, k]", checked_elements("Hessian", k, k)?, hessian.values().len())?;
        if !(damping.is_finite() && damping >= 0.0) {
            return Err(Error::InvalidDamping { value: damping });
        }
        let order = Order::new(&hessian.second_moments(), group.blocks(k)? * BRICK_K);
        let factor = hessian.inverse_factor(&order.columns, damping)?;
        let feedback = Feedback::new(factor, order);

        let mut packer = Packer::new(n, k, group)?;
        packer.for_each_strip(|channels, mut strip| {
            let rows = &weights[channels.start * k..channels.end * k];
            let quantized = feedback.quantize_strip(rows);
            let groups = feedback.order.groups.len();
            for row in 0..channels.len() {
                let (codes, pairs) =
                    (&quantized.codes[row * k..][..k], &quantized.pairs[row * groups..][..groups]);
                strip.write_channel(row, quantized.scales[row], codes, pairs);
            }
        });
        Ok(packer.finish())
    }
}

/// The order in which columns are quantized.
struct Order {
    /// The original column at each place.
    columns: Vec<usize>,
    /// The places of each group.
    groups: Vec<Range<usize>>,
}

impl Order {
    /// Sorts the columns of each group by their moments, the largest first.
    fn new(moments: &[f32], group_k: usize) -> Self {
        let k = moments.len();
        let mut columns: Vec<usize> = (0..k).collect();
        for group in columns.chunks_mut(group_k) {
            group.sort_by(|&one, &other| moments[other].total_cmp(&moments[one]));
        }
        let groups = (0..k).step_by(group_k).map(|first| first..(first + group_k).min(k)).collect();
        Self { columns, groups }
    }
}

/// What all strips share.
struct Feedback {
    order: Order,
    /// The upper triangular factor of the inverse Hessian, `[k, k]`, in the order of the columns.
    factor: Vec<f32>,
    /// What a squared error of each place adds to the loss, `1 / U[j, j]²`: `[k]`.
    losses: Vec<f32>,
}

/// A quantized strip.
struct QuantizedStrip {
    /// `[channels, k]`.
    codes: Vec<u8>,
    /// `[channels, groups]`.
    pairs: Vec<(u8, u8)>,
    /// `[channels]`.
    scales: Vec<f32>,
}

impl Feedback {
    fn new(factor: Vec<f32>, order: Order) -> Self {
        let losses = factor.iter().step_by(order.columns.len() + 1).map(|u| 1.0 / (u * u)).collect();
        Self { order, factor, losses }
    }

    /// Quantizes up to 64 channels, row-major `[channels, k]`.
    fn quantize_strip<T: Float>(&self, rows: &[T]) -> QuantizedStrip {
        let (k, groups) = (self.order.columns.len(), self.order.groups.len());
        let channels = rows.len() / k;
        let mut search = PairSearch::default();
        // Weights in units of their channel's scale. Missing channels of the last strip stay 0.
        let mut targets = vec![0f32; k * BRICK_CHANNELS];
        let mut scales = [0f32; BRICK_CHANNELS];
        let mut pairs = [(1i32, ZERO); BRICK_CHANNELS];
        let mut row = vec![0f32; k];
        for channel in 0..channels {
            for (to, &column) in row.iter_mut().zip(&self.order.columns) {
                *to = rows[channel * k + column].to_f32();
            }
            scales[channel] = rtn::channel_scale(&row);
            if groups == 1 {
                let (scale, found) = search.scale_and_pair(&row, scales[channel], Some(&self.losses));
                (scales[channel], pairs[channel]) = (scale, (found.s, found.a));
            }
            if scales[channel] > 0.0 {
                for (place, &weight) in row.iter().enumerate() {
                    targets[place * BRICK_CHANNELS + channel] = weight / scales[channel];
                }
            }
        }

        let mut quantized = QuantizedStrip {
            codes: vec![0; channels * k],
            pairs: vec![(0, 0); channels * groups],
            scales: scales[..channels].to_vec(),
        };
        let mut errors = [0f32; BLOCK * BRICK_CHANNELS];
        for (group, places) in self.order.groups.iter().enumerate() {
            for (channel, pair) in pairs.iter_mut().enumerate().take(channels) {
                if groups > 1 {
                    let of_channel = targets[places.start * BRICK_CHANNELS..places.end * BRICK_CHANNELS]
                        .iter()
                        .skip(channel)
                        .step_by(BRICK_CHANNELS)
                        .copied();
                    let found = search.group(of_channel, 1.0, Some(&self.losses[places.clone()]));
                    *pair = (found.s, found.a);
                }
                quantized.pairs[channel * groups + group] = (pair.0 as u8, pair.1 as u8);
            }
            let mut first = places.start;
            while first < places.end {
                let end = (first + BLOCK).min(places.end);
                let (block, behind) =
                    targets[first * BRICK_CHANNELS..].split_at_mut((end - first) * BRICK_CHANNELS);
                for place in first..end {
                    let (column, later) =
                        block[(place - first) * BRICK_CHANNELS..].split_at_mut(BRICK_CHANNELS);
                    let factor = &self.factor[place * k..][..end];
                    let error: &mut [f32; BRICK_CHANNELS] = &mut errors.as_chunks_mut().0[place - first];
                    for channel in 0..channels {
                        let (s, a) = pairs[channel];
                        let code = nearest_code(column[channel], s, a);
                        quantized.codes[channel * k + self.order.columns[place]] = code;
                        let back = (i32::from(code) * s + a - ZERO) as f32;
                        error[channel] = (column[channel] - back) / factor[place];
                    }
                    for (later, &factor) in
                        later.as_chunks_mut::<BRICK_CHANNELS>().0.iter_mut().zip(&factor[place + 1..])
                    {
                        for (later, error) in later.iter_mut().zip(&*error) {
                            *later -= factor * error;
                        }
                    }
                }
                if end < k {
                    let factor = view(&self.factor, k, k);
                    let factor = factor.slice(s![first..end, end..]);
                    let errors = &errors[..(end - first) * BRICK_CHANNELS];
                    let errors = view(errors, end - first, BRICK_CHANNELS);
                    let mut behind = view_mut(behind, k - end, BRICK_CHANNELS);
                    general_mat_mul(-1.0, &factor.t(), &errors, 1.0, &mut behind);
                }
                first = end;
            }
        }
        quantized
    }
}
