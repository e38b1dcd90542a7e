//! Search: the pair of each group, and its codes, with the smallest squared error.

use super::rtn::channel_scale;
use super::{MAX_CODE, ZERO};

/// Quantizes one channel in groups of `group_k`: writes its codes and its pairs, and returns its scale.
pub(super) fn quantize_channel(
    row: &[f32],
    moments: Option<&[f32]>,
    group_k: usize,
    codes: &mut [u8],
    pairs: &mut Vec<(u8, u8)>,
) -> f32 {
    let scale = channel_scale(row);
    let ones = vec![1.0; row.len()];
    let moments = moments.unwrap_or(&ones);
    let mut target = vec![0.0; row.len()];
    if scale > 0.0 {
        for (target, weight) in target.iter_mut().zip(row) {
            *target = weight / scale;
        }
    }
    for ((target, moments), codes) in
        target.chunks(group_k).zip(moments.chunks(group_k)).zip(codes.chunks_mut(group_k))
    {
        let (s, a) = best_pair(target, moments);
        for (code, &w) in codes.iter_mut().zip(target) {
            *code = code_of(w, s, a) as u8;
        }
        pairs.push((s as u8, a as u8));
    }
    scale
}

fn code_of(w: f32, s: i32, a: i32) -> i32 {
    ((w + (ZERO - a) as f32) / s as f32).round_ties_even().clamp(0.0, MAX_CODE as f32) as i32
}

fn best_pair(target: &[f32], moments: &[f32]) -> (i32, i32) {
    let (min, max) = target.iter().fold((f32::MAX, f32::MIN), |(min, max), &w| (min.min(w), max.max(w)));
    let full = (max - min) / MAX_CODE as f32;
    let first = ((full * 0.6) as i32).clamp(1, 17);
    let last = ((full * 1.05).ceil() as i32).clamp(1, 17);
    let mut best = (f32::INFINITY, (1, ZERO));
    for s in first..=last {
        let lowest = min.floor() as i32 + ZERO - s;
        let highest = max.ceil() as i32 + ZERO - MAX_CODE * s + s;
        let limit = 255 - MAX_CODE * s;
        for a in lowest.min(highest).clamp(0, limit)..=lowest.max(highest).clamp(0, limit) {
            let error: f32 = target
                .iter()
                .zip(moments)
                .map(|(&w, m)| {
                    let d = w - (code_of(w, s, a) * s + a - ZERO) as f32;
                    m * d * d
                })
                .sum();
            if error < best.0 {
                best = (error, (s, a));
            }
        }
    }
    best.1
}
