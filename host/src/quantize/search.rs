//! Search: the pair of each group, and its codes, with the smallest squared error.
//!
//! Weights are compared as real numbers in units of the channel scale, not as rounded int8 weights.
//! For a pair `(s, a)` the best code of each weight is the nearest one, so only pairs are searched:
//! 1. `s` starts where the 16 codes just cover the group, goes up while that helps, then down while that helps.
//!    A smaller `s` clips the group's ends, but is finer between them.
//! 2. For each `s`, every `a` at which both the lowest and the highest code can be of use is tried.
//!
//! [`ErrorSum`] does most of the work. Its sums have a fixed order, so the result is the same on every CPU.

use std::ops::RangeInclusive;

use super::rtn::{self, channel_scale};
use super::{MAX_CODE, ZERO};
use liquidgemm_format::rounding::{ROUNDING_SHIFT, round_clamped};

/// The largest `s` that leaves room for the code 15.
const MAX_S: i32 = 255 / MAX_CODE;

/// Factors on the channel scale that are tried if the whole channel shares a pair. The step between codes is
/// `s · channel_scale`, and `s` alone changes it by 6 % or more at a time.
const SCALE_FACTORS: [f32; 6] = [0.955, 0.97, 0.985, 1.015, 1.03, 1.045];

/// Length from which the error of a group hardly jumps between neighbouring `a`, so that not every `a` needs a trial.
const LONG_GROUP: usize = 64;

/// Smallest weight of an error, relative to the group's largest.
/// It decides between pairs that differ only in weights whose inputs are always 0.
const MOMENT_FLOOR: f32 = 1e-7;

/// A pair and the sum of squared errors that it leaves, in units of the channel scale.
#[derive(Clone, Copy, Debug)]
pub(super) struct Found {
    pub(super) s: i32,
    pub(super) a: i32,
    pub(super) error: f32,
}

/// Searches pairs of groups. It holds buffers, so that a group allocates nothing.
#[derive(Default)]
pub(super) struct PairSearch {
    /// Weights of a group in units of the channel scale. Padded with zeros to whole vectors.
    target: Vec<f32>,
    /// `target / s`.
    scaled: Vec<f32>,
    /// What each squared error is multiplied with; 0 for the padding.
    importance: Vec<f32>,
}

/// Quantizes one channel in groups of `group_k`: writes its codes and its pairs, and returns its scale.
pub(super) fn quantize_channel(
    row: &[f32],
    moments: Option<&[f32]>,
    group_k: usize,
    search: &mut PairSearch,
    codes: &mut [u8],
    pairs: &mut Vec<(u8, u8)>,
) -> f32 {
    let scale = search.channel(row, moments, group_k, pairs);
    for ((codes, row), &(s, a)) in codes.chunks_mut(group_k).zip(row.chunks(group_k)).zip(&*pairs) {
        for (code, &weight) in codes.iter_mut().zip(row) {
            *code = nearest_code(weight / scale, s.into(), a.into());
        }
    }
    scale
}

/// Returns the code nearest to a weight in units of the channel scale. NaN, which is 0 / 0, counts as 0.
pub(super) fn nearest_code(target: f32, s: i32, a: i32) -> u8 {
    let target = if target.is_nan() { 0.0 } else { target };
    // Codes are 0 to 15, so round them from ±8 around 8.
    (8 + round_clamped((target - (a - ZERO) as f32) / s as f32 - 8.0, 8.0)).min(MAX_CODE) as u8
}

impl PairSearch {
    /// Finds the pairs of one channel in groups of `group_k`, and returns the channel's scale.
    pub(super) fn channel(
        &mut self,
        row: &[f32],
        moments: Option<&[f32]>,
        group_k: usize,
        pairs: &mut Vec<(u8, u8)>,
    ) -> f32 {
        let scale = channel_scale(row);
        if row.len() <= group_k {
            let (scale, Found { s, a, .. }) = self.scale_and_pair(row, scale, moments);
            pairs.push((s as u8, a as u8));
            return scale;
        }
        for (index, group) in row.chunks(group_k).enumerate() {
            let moments = moments.map(|moments| &moments[index * group_k..][..group.len()]);
            let Found { s, a, .. } = self.group(group.iter().copied(), scale, moments);
            pairs.push((s as u8, a as u8));
        }
        scale
    }

    /// Finds the scale, near the given one, and the pair of a channel that has one pair only.
    pub(super) fn scale_and_pair(
        &mut self,
        row: &[f32],
        scale: f32,
        moments: Option<&[f32]>,
    ) -> (f32, Found) {
        let first = self.group(row.iter().copied(), scale, moments);
        let mut best = (scale, first);
        for factor in SCALE_FACTORS {
            let changed = scale * factor;
            if !changed.is_normal() {
                continue;
            }
            self.set_group(row.iter().copied(), changed, moments);
            // The same lowest code, in units of the changed scale.
            let a = ZERO + ((first.a - ZERO) as f32 / factor).round_ties_even() as i32;
            let limit = 255 - MAX_CODE * first.s;
            let mut found = Found { error: f32::INFINITY, ..first };
            self.try_offsets(first.s, (a - 2).clamp(0, limit)..=(a + 2).clamp(0, limit), 1, &mut found);
            // Compare in units of the first scale.
            found.error *= factor * factor;
            if found.error < best.1.error {
                best = (changed, found);
            }
        }
        best
    }

    /// Finds the pair of one group of weights. `moments` weighs their squared errors.
    pub(super) fn group(
        &mut self,
        weights: impl Iterator<Item = f32>,
        scale: f32,
        moments: Option<&[f32]>,
    ) -> Found {
        let [min, max] = self.set_group(weights, scale, moments);
        self.pair(min, max)
    }

    /// Takes the weights of a group and what their errors count. Returns the least and the largest target.
    fn set_group(
        &mut self,
        weights: impl Iterator<Item = f32>,
        scale: f32,
        moments: Option<&[f32]>,
    ) -> [f32; 2] {
        self.target.clear();
        self.target.extend(weights.map(|weight| if scale > 0.0 { weight / scale } else { 0.0 }));
        let length = self.target.len();
        let largest = moments.map_or(0.0, |moments| moments.iter().copied().fold(0.0, f32::max));
        self.importance.clear();
        match moments {
            // If no input matters, all count the same.
            Some(moments) if largest > 0.0 => {
                self.importance.extend(moments.iter().map(|moment| (moment / largest).max(MOMENT_FLOOR)));
            }
            _ => self.importance.resize(length, 1.0),
        }
        let extremes =
            self.target.iter().fold([f32::MAX, f32::MIN], |[min, max], &w| [min.min(w), max.max(w)]);
        let padded = length.next_multiple_of(LANES);
        self.target.resize(padded, 0.0);
        self.importance.resize(padded, 0.0);
        self.scaled.resize(padded, 0.0);
        extremes
    }

    /// Finds the pair for `target` and `importance`.
    fn pair(&mut self, min: f32, max: f32) -> Found {
        // The paper's pair comes first: no result is worse than it.
        let (s, a) = rtn::pair(min.round_ties_even() as i32, max.round_ties_even() as i32);
        let mut best = Found { s, a, error: f32::INFINITY };
        self.try_offsets(s, a..=a, 1, &mut best);
        let start = (((max - min) / MAX_CODE as f32).ceil() as i32).clamp(1, MAX_S);
        for (down, patience) in [(false, 1), (true, 2)] {
            let mut failures = 0;
            let mut s = if down { start - 1 } else { start };
            while (1..=MAX_S).contains(&s) && failures < patience {
                let before = best.error;
                let step = if self.target.len() < LONG_GROUP { 1 } else { (s / 4).max(1) };
                let offsets = useful_offsets(min, max, s);
                let mut found = Found { s, a: *offsets.start(), error: f32::INFINITY };
                self.try_offsets(s, offsets.clone(), step, &mut found);
                if step > 1 {
                    let near = found.a - step + 1..=found.a + step - 1;
                    let near = (*near.start()).max(*offsets.start())..=(*near.end()).min(*offsets.end());
                    self.try_offsets(s, near, 1, &mut found);
                }
                best = best.better(found);
                failures = if best.error < before { 0 } else { failures + 1 };
                s += if down { -1 } else { 1 };
            }
        }
        best
    }

    /// Tries every `step`th of the offsets with one `s`.
    fn try_offsets(&mut self, s: i32, offsets: RangeInclusive<i32>, step: i32, best: &mut Found) {
        let inverse = 1.0 / s as f32;
        for (scaled, target) in self.scaled.iter_mut().zip(&self.target) {
            *scaled = target * inverse;
        }
        let sum = ErrorSum::detect();
        for a in offsets.step_by(step as usize) {
            let lowest = (a - ZERO) as f32 * inverse;
            let error = sum.compute(&self.scaled, &self.importance, lowest) * (s * s) as f32;
            *best = best.better(Found { s, a, error });
        }
    }
}

impl Found {
    /// Returns the pair with the smaller error. Of equals, one that represents 0 is better: pruned weights stay 0.
    fn better(self, other: Found) -> Found {
        let other_is_better =
            other.error < self.error || other.error == self.error && other.has_zero() && !self.has_zero();
        if other_is_better { other } else { self }
    }

    /// Returns whether a code represents the weight 0.
    fn has_zero(self) -> bool {
        (ZERO - self.a) % self.s == 0 && (0..=MAX_CODE).contains(&((ZERO - self.a) / self.s))
    }
}

/// Returns the offsets `a` worth trying for weights from `min` to `max`, in units of the channel scale.
///
/// If all weights are more than `s/2` above the lowest code, that code is of no use,
/// and the offset `a + s` is at least as good as `a`. The same holds at the other end.
/// If the codes cover the weights, offsets that differ by `s` are equally good.
fn useful_offsets(min: f32, max: f32, s: i32) -> RangeInclusive<i32> {
    let (bottom, top) = (min, max - (MAX_CODE * s) as f32);
    let half = 0.5 * s as f32;
    let limit = 255 - MAX_CODE * s;
    if bottom > top {
        let first = (0.5 * (bottom + top) - half).floor() as i32 + ZERO;
        if first >= 0 && first + s <= limit {
            return first..=first + s;
        }
    }
    let clamp = |a: f32| (a as i32 + ZERO).clamp(0, limit);
    clamp((bottom.min(top) - half).ceil())..=clamp((bottom.max(top) + half).floor())
}

/// Parallel sums of [`ErrorSum`]: two vectors of AVX2.
const LANES: usize = 16;

/// Computes sums of squared errors, with AVX2 where the CPU has it.
#[derive(Clone, Copy)]
struct ErrorSum {
    #[cfg(target_arch = "x86_64")]
    avx2: bool,
}

impl ErrorSum {
    fn detect() -> Self {
        Self {
            #[cfg(target_arch = "x86_64")]
            avx2: is_x86_feature_detected!("avx2"),
        }
    }

    /// Returns `Σ importance · (x − clamp(round(x), 0, 15))²` over `x = scaled − lowest`.
    fn compute(self, scaled: &[f32], importance: &[f32], lowest: f32) -> f32 {
        let mut sums = [0.0; LANES];
        #[cfg(target_arch = "x86_64")]
        if self.avx2 {
            // SAFETY: the CPU has AVX2.
            unsafe { add_errors_avx2(scaled, importance, lowest, &mut sums) };
            return sums.iter().sum();
        }
        add_errors(scaled, importance, lowest, &mut sums);
        sums.iter().sum()
    }
}

/// [`add_errors`], compiled for AVX2. It has the same bits, because nothing in it becomes a fused multiply-add.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn add_errors_avx2(scaled: &[f32], importance: &[f32], lowest: f32, sums: &mut [f32; LANES]) {
    add_errors(scaled, importance, lowest, sums);
}

/// Adds the error of element `i` to sum `i mod LANES`.
#[inline(always)]
fn add_errors(scaled: &[f32], importance: &[f32], lowest: f32, sums: &mut [f32; LANES]) {
    let (scaled, importance) = (scaled.as_chunks::<LANES>().0, importance.as_chunks::<LANES>().0);
    for (scaled, importance) in scaled.iter().zip(importance) {
        for lane in 0..LANES {
            let x = scaled[lane] - lowest;
            let clamped = if x > 0.0 { x } else { 0.0 };
            let clamped = if clamped < MAX_CODE as f32 { clamped } else { MAX_CODE as f32 };
            let error = x - ((clamped + ROUNDING_SHIFT) - ROUNDING_SHIFT);
            sums[lane] += importance[lane] * (error * error);
        }
    }
}
