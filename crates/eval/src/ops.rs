//! Operations of a forward pass that are no matrix products: norms, rotary positions, attention.
//!
//! Activations are f32 tensors `[tokens, channels]` on the CPU. Rows are computed in parallel, each by one thread,
//! so results do not depend on the number of threads.

use candle_core::{Device, Tensor};
use rayon::prelude::*;

use crate::Error;

/// Applies `f(index, row)` to a copy of each row.
pub(crate) fn map_rows(x: &Tensor, f: impl Fn(usize, &mut [f32]) + Sync) -> Result<Tensor, Error> {
    let columns = x.dim(candle_core::D::Minus1)?;
    let mut values = x.flatten_all()?.to_vec1::<f32>()?;
    values.par_chunks_exact_mut(columns).enumerate().for_each(|(index, row)| f(index, row));
    Ok(Tensor::from_vec(values, x.shape(), &Device::Cpu)?)
}

/// RMSNorm: `x / √(mean(x²) + epsilon) · weight` (Zhang and Sennrich, arXiv 1910.07467).
pub(crate) fn rms_norm(x: &Tensor, weight: &[f32], epsilon: f64) -> Result<Tensor, Error> {
    map_rows(x, |_, row| {
        let squares: f64 = row.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
        let factor = (1.0 / (squares / row.len() as f64 + epsilon).sqrt()) as f32;
        for (x, weight) in row.iter_mut().zip(weight) {
            *x = *x * factor * weight;
        }
    })
}

/// LayerNorm: `(x − mean) / √(variance + epsilon) · weight + bias` (Ba et al., arXiv 1607.06450).
pub(crate) fn layer_norm(x: &Tensor, weight: &[f32], bias: &[f32], epsilon: f64) -> Result<Tensor, Error> {
    map_rows(x, |_, row| {
        let count = row.len() as f64;
        let mean = row.iter().map(|&x| f64::from(x)).sum::<f64>() / count;
        let variance = row.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / count;
        let factor = 1.0 / (variance + epsilon).sqrt();
        for ((x, weight), bias) in row.iter_mut().zip(weight).zip(bias) {
            *x = ((f64::from(*x) - mean) * factor) as f32 * weight + bias;
        }
    })
}

/// Rotary position embedding (Su et al., arXiv 2104.09864): turns channels `i` and `i + d/2` of each head
/// by `position · frequencies[i]`.
///
/// `x` is `[tokens, heads · d]` and begins at position 0; `frequencies` is `[d/2]`.
pub(crate) fn rotate(x: &Tensor, frequencies: &[f64]) -> Result<Tensor, Error> {
    let half = frequencies.len();
    map_rows(x, |position, row| {
        let turns: Vec<(f32, f32)> = frequencies
            .iter()
            .map(|frequency| (position as f64 * frequency).sin_cos())
            .map(|(sin, cos)| (sin as f32, cos as f32))
            .collect();
        for head in row.chunks_exact_mut(2 * half) {
            for (i, &(sin, cos)) in turns.iter().enumerate() {
                let (a, b) = (head[i], head[i + half]);
                head[i] = a * cos - b * sin;
                head[i + half] = b * cos + a * sin;
            }
        }
    })
}

/// Attention (Vaswani et al., arXiv 1706.03762), with as many query heads for each of the key-value heads as fit.
///
/// `q` is `[tokens, heads · d]`, `k` and `v` are `[tokens, kv_heads · d]`. Returns `[tokens, heads · d]`.
/// With `causal` a token sees itself and earlier ones, otherwise all.
pub(crate) fn attention(
    [q, k, v]: [&Tensor; 3],
    [heads, kv_heads]: [usize; 2],
    causal: bool,
) -> Result<Tensor, Error> {
    let (tokens, columns) = q.dims2()?;
    let d = columns / heads;
    let by_head = |x: &Tensor, heads: usize| x.reshape((tokens, heads, d))?.transpose(0, 1)?.contiguous();
    let repeated = |x: &Tensor| {
        let shape = (kv_heads, heads / kv_heads, tokens, d);
        by_head(x, kv_heads)?.unsqueeze(1)?.broadcast_as(shape)?.reshape((heads, tokens, d))?.contiguous()
    };
    let (q, k, v) = (by_head(q, heads)?, repeated(k)?, repeated(v)?);
    let scores = q.matmul(&k.t()?)?;
    let scale = 1.0 / (d as f32).sqrt();
    let weights = map_rows(&scores, |index, row| {
        let visible = if causal { index % tokens + 1 } else { tokens };
        let (row, hidden) = row.split_at_mut(visible);
        softmax(row, scale);
        hidden.fill(0.0);
    })?;
    Ok(weights.matmul(&v)?.transpose(0, 1)?.reshape((tokens, columns))?)
}

/// Replaces a row by the softmax of `scale · row`.
fn softmax(row: &mut [f32], scale: f32) {
    let max = row.iter().fold(f32::NEG_INFINITY, |max, &x| max.max(x));
    let mut sum = 0.0f64;
    for x in &mut *row {
        *x = ((*x - max) * scale).exp();
        sum += f64::from(*x);
    }
    let factor = (1.0 / sum) as f32;
    for x in row {
        *x *= factor;
    }
}

/// `silu(gate) · up`, both `[tokens, channels]`.
pub(crate) fn silu_times(gate: &Tensor, up: &Tensor) -> Result<Tensor, Error> {
    let columns = up.dim(1)?;
    let up = up.flatten_all()?.to_vec1::<f32>()?;
    map_rows(gate, |index, row| {
        for (gate, up) in row.iter_mut().zip(&up[index * columns..]) {
            *gate = *gate / (1.0 + (-*gate).exp()) * up;
        }
    })
}
