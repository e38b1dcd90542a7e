//! The CPU backend: the exact integer GEMM and its epilogue, on all cores.
//!
//! It is the default where there is no GPU and the oracle for every GPU test, so it does nothing but what the
//! format's definition says: dequantize to int8, multiply, add in int32, scale.

use liquidgemm_format::brick::{BRICK_CHANNELS, BRICK_K};
use rayon::prelude::*;

use crate::error::{check_finite, check_length, checked_elements};
use crate::{ActivationsView, Error, Output, OutputType, PackedWeights};

/// `out[m, n] = epilogue(Σₖ x[m, k] · level1[n, k])`, row-major, exact before the epilogue.
///
/// `bias` is `[n]`; `out` has exactly `m · n` elements and is written only if everything was in order.
///
/// # Errors
/// K of weights and activations that differ, an `out` or `bias` of another length, a bias that is not finite,
/// a bias with `i32` output.
pub fn gemm<'a, T: Output>(
    weights: &PackedWeights,
    x: impl Into<ActivationsView<'a>>,
    bias: Option<&[f32]>,
    out: &mut [T],
) -> Result<(), Error> {
    let x = x.into();
    check_call::<T>(weights, &x, bias, out.len())?;
    let (n, k) = (weights.n(), weights.k());
    let columns: Vec<Vec<i32>> = (0..weights.strips())
        .into_par_iter()
        .flat_map_iter(|strip| {
            let channels = strip * BRICK_CHANNELS..n.min((strip + 1) * BRICK_CHANNELS);
            channels.map(|channel| {
                let row: Vec<i8> = (0..k).map(|k| weights.level1(channel, k)).collect();
                (0..x.m())
                    .map(|token| x.row(token).iter().zip(&row).map(|(&x, &w)| x as i32 * w as i32).sum())
                    .collect()
            })
        })
        .collect();
    let _ = BRICK_K;
    for (token, row) in out.chunks_exact_mut(n).enumerate() {
        for (channel, y) in row.iter_mut().enumerate() {
            let bias = bias.map(|bias| bias[channel]);
            let channel_scale = weights.channel_scales()[channel];
            *y = T::from_accumulator(columns[channel][token], channel_scale, x.scales()[token], bias);
        }
    }
    Ok(())
}

/// Everything that must hold before a product of these operands may be written to `out_length` elements.
pub(crate) fn check_call<T: Output>(
    weights: &PackedWeights,
    x: &ActivationsView<'_>,
    bias: Option<&[f32]>,
    out_length: usize,
) -> Result<(), Error> {
    if weights.k() != x.k() {
        return Err(Error::KMismatch { weights: weights.k(), activations: x.k() });
    }
    check_length("output", "[m, n]", checked_elements("output matrix", x.m(), weights.n())?, out_length)?;
    if let Some(bias) = bias {
        if T::TYPE == OutputType::I32 {
            return Err(Error::BiasWithRawOutput);
        }
        check_length("bias", "[n]", weights.n(), bias.len())?;
        check_finite("bias", bias)?;
    }
    Ok(())
}
