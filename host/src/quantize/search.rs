//! Search: the pair of each group, and its codes, with the smallest squared error.
//!
//! Weights are compared as real numbers in units of the channel scale, not as rounded int8 weights.
//! For a pair `(s, a)` the best code of each weight is the nearest one, so only pairs are searched:
//! 1. `s` starts where the 16 codes just cover the group, goes up while that helps, then down while that helps.
//!    A smaller `s` clips the group's ends, but is finer between them.
//! 2. For each `s`, the offsets `a` are tried at which both the lowest and the highest code can be of use:
//!    first at intervals of `s/4`, then all that are near the best of these.
//!
//! Groups shorter than 64, which are the ends of channels, are searched exhaustively.
//! Of pairs with the same error, one that represents 0 wins.
//!
//! [`ErrorSum`] does most of the work. Its sums have a fixed order, so the result is the same on every CPU.

use std::ops::RangeInclusive;

use super::rtn::{self, channel_scale};
use super::{INT8_LIMIT, MAX_CODE, ZERO};
use liquidgemm_format::rounding::{ROUNDING_SHIFT, round_clamped};

/// The largest `s` that leaves room for the code 15.
const MAX_S: i32 = 255 / MAX_CODE;

/// Factors on the channel scale that are tried if the whole channel shares a pair. The step between codes is
/// `s · channel_scale`, and `s` alone changes it by 6 % or more at a time.
const SCALE_FACTORS: [f32; 6] = [0.955, 0.97, 0.985, 1.015, 1.03, 1.045];

/// Length from which not every pair is tried. The error of long groups changes little between neighbouring pairs,
/// so a coarse search of `a` finds all but 0.1 % of what an exhaustive one would gain.
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
            *code = nearest_code(in_units(weight, scale), s.into(), a.into());
        }
    }
    scale
}

/// Returns a weight in units of the channel scale. A scale of 0 means that all weights are 0.
fn in_units(weight: f32, scale: f32) -> f32 {
    if scale > 0.0 { weight / scale } else { 0.0 }
}

/// Returns the code nearest to a weight in units of the channel scale.
pub(super) fn nearest_code(target: f32, s: i32, a: i32) -> u8 {
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
        self.target.extend(weights.map(|weight| in_units(weight, scale)));
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
        // The paper's pair comes first: no result is worse than it. GPTQ's feedback can take targets beyond int8 weights.
        let [first_min, first_max] = [min, max].map(|target| round_clamped(target, INT8_LIMIT));
        let (s, a) = rtn::pair(first_min, first_max);
        let mut best = Found { s, a, error: f32::INFINITY };
        self.try_offsets(s, a..=a, 1, &mut best);
        let start = (((max - min) / MAX_CODE as f32).ceil() as i32).clamp(1, MAX_S);
        let long = self.target.len() >= LONG_GROUP;
        let patience = if long { [1, 2] } else { [MAX_S; 2] };
        for (down, patience) in [false, true].into_iter().zip(patience) {
            let mut failures = 0;
            let mut s = if down { start - 1 } else { start };
            while (1..=MAX_S).contains(&s) && failures < patience {
                let before = best.error;
                let step = if long { (s / 4).max(1) } else { 1 };
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

#[cfg(test)]
mod tests {
    use super::*;
    use liquidgemm_format::dequant::is_valid_pair;
    use proptest::prelude::*;

    /// Returns the least weighted squared error of any pair, in f64.
    fn least_error(target: &[f32], importance: &[f32]) -> f64 {
        let pairs = (1..=MAX_S).flat_map(|s| (0..=255 - MAX_CODE * s).map(move |a| (s, a)));
        pairs.map(|(s, a)| error_of(target, importance, s, a)).fold(f64::INFINITY, f64::min)
    }

    fn error_of(target: &[f32], importance: &[f32], s: i32, a: i32) -> f64 {
        let nearest = |&w: &f32| {
            let errors = (0..=MAX_CODE).map(|q| f64::from(w) - f64::from(q * s + a - ZERO));
            errors.map(|error| error * error).fold(f64::INFINITY, f64::min)
        };
        target.iter().zip(importance).map(|(w, &m)| f64::from(m) * nearest(w)).sum()
    }

    fn normal(count: usize, seed: u64) -> Vec<f32> {
        let mut state = seed;
        let mut uniform = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1u64 << 24) as f32
        };
        (0..count).map(|_| (0..12).map(|_| uniform()).sum::<f32>() - 6.0).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]

        #[test]
        fn short_groups_get_a_pair_with_the_least_error_of_all_pairs(
            elements in proptest::collection::vec((-119f32..=119.0, 0.01f32..=1.0), 1..20),
            scale in prop_oneof![Just(1.0f32), Just(0.3), Just(0.02), Just(2.0)],
        ) {
            let (weights, moments): (Vec<f32>, Vec<f32>) =
                elements.into_iter().map(|(w, m)| (w * scale, m)).unzip();
            let found = PairSearch::default().group(weights.iter().copied(), 1.0, Some(&moments));
            prop_assert!(is_valid_pair(found.s as u8, found.a as u8));
            let (error, least) =
                (error_of(&weights, &moments, found.s, found.a), least_error(&weights, &moments));
            prop_assert!(error <= least * (1.0 + 1e-4) + 1e-6, "{found:?}: {error}, but {least} is possible");
        }

        #[test]
        fn nearest_codes_are_nearest(w in -150f32..150.0, s in 1i32..=17, a_seed: u8) {
            let a = i32::from(a_seed) % (256 - MAX_CODE * s);
            let error = |q: i32| (w - (q * s + a - ZERO) as f32).abs();
            let code = i32::from(nearest_code(w, s, a));
            prop_assert!((0..=MAX_CODE).contains(&code));
            prop_assert!((0..=MAX_CODE).all(|q| error(code) <= error(q) + 1e-4), "w {w}, s {s}, a {a}: {code}");
        }
    }

    #[test]
    fn long_groups_get_a_pair_near_the_least_error_of_all_pairs() {
        let (mut found_sum, mut least_sum) = (0.0, 0.0);
        for seed in 0..40 {
            let weights: Vec<f32> = normal(64, seed).iter().map(|w| w * 30.0).collect();
            let moments: Vec<f32> = normal(64, seed + 100).iter().map(|m| m * m + 0.01).collect();
            let largest = moments.iter().copied().fold(0.0, f32::max);
            let moments: Vec<f32> = moments.iter().map(|m| m / largest).collect();
            let found = PairSearch::default().group(weights.iter().copied(), 1.0, Some(&moments));
            let (error, least) =
                (error_of(&weights, &moments, found.s, found.a), least_error(&weights, &moments));
            assert!(error <= least * 1.1, "seed {seed}: {error}, but {least} is possible");
            assert!((error - f64::from(found.error)).abs() <= error * 1e-4);
            (found_sum, least_sum) = (found_sum + error, least_sum + least);
        }
        assert!(found_sum <= least_sum * 1.01, "{found_sum}, but {least_sum} is possible");
    }

    #[test]
    fn the_sums_of_errors_have_the_same_bits_with_and_without_avx2() {
        let (scaled, importance) = (normal(256, 1), normal(256, 2));
        for step in -20..20 {
            let lowest = step as f32 * 0.3;
            let mut portable = [0.0; LANES];
            add_errors(&scaled, &importance, lowest, &mut portable);
            let sum = ErrorSum::detect().compute(&scaled, &importance, lowest);
            assert_eq!(sum.to_bits(), portable.iter().sum::<f32>().to_bits());
        }
    }

    #[test]
    fn of_pairs_with_equal_errors_one_that_represents_zero_is_taken() {
        // 30 levels apart: every pair with s = 15, or a divisor of it that reaches both, is exact.
        let found = PairSearch::default().group([0.0, 30.0, 0.0, 15.0].into_iter(), 1.0, None);
        assert!(found.error == 0.0 && found.has_zero(), "{found:?}");
    }
}
