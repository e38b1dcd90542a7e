//! Takes the 4-bit codes of other quantizers, with their scales and zeros, to packed weights.
//!
//! GPTQ, AWQ, compressed-tensors, QQQ and QServe all represent a weight by `(code − zero) · scale` of its group.
//! The packed format has `(q − z)·S` of a group exactly if `S = s·s1`, with an integer `s` and one `s1` for the channel,
//! if `z·s` is an integer, and if the pair `s`, `a = 128 − z·s` keeps the invariant. With one group a channel, `s = 1` and `s1 = S` always do.
//! Otherwise `s1` is chosen so that the scales lie near its multiples, and each scale becomes the nearest one.
//! If requantizing the weights gives a smaller error, that is taken.

use std::fmt;
use std::ops::Range;

use rayon::prelude::*;

use super::{MAX_CODE, QuantizeOptions, ZERO};
use crate::check::{check_dimension, check_finite, check_length, checked_elements};
use crate::packed::PackedSizes;
use crate::{Error, Group, Method, PackedWeights};

/// The largest `s` of a pair: `15·s + a ≤ 255`.
const MOST_S: i32 = 17;
/// The zero of symmetric codes.
const MIDDLE: f32 = 8.0;
/// The quotients of the largest scale and `s1` that are tried between two integers.
const STEPS: usize = 16;
/// A relative deviation of this much is the rounding of f32.
const ROUNDING: f64 = 1.0 / (1 << 22) as f64;
/// `z·s` this near to an integer is that integer: `z` is an f32, and `z·s` is below 256.
const OFFSET_ROUNDING: f64 = 1.0 / (1 << 13) as f64;
/// Larger offsets than this fit no pair.
const MOST_OFFSET: f64 = 65_536.0;

/// Weights `[n, k]` that another quantizer has quantized to four bits.
///
/// The weight of (`channel`, `column`) is `(code − zero) · scale`, with the zero and the scale of its group, in f32.
/// Signed codes from −8 to 7 become such codes by adding 8; their zero is then 8.
#[derive(Clone, PartialEq)]
pub struct Int4Weights {
    n: usize,
    k: usize,
    group: usize,
    /// `[n, k]`.
    codes: Vec<u8>,
    /// `[n, groups]`.
    scales: Vec<f32>,
    /// `[n, groups]`.
    zeros: Vec<f32>,
}

impl Int4Weights {
    /// Takes codes, scales and zeros, and checks them.
    ///
    /// - `codes`: row-major `[n, k]`, values 0 to 15.
    /// - `scales`: row-major `[n, groups]`, finite, with `groups = ⌈k / group⌉`.
    /// - `zeros`: row-major `[n, groups]`, finite. Most quantizers have integers from 0 to 16. Without them every zero is 8.
    /// - `group`: how many columns share a scale: any number from 1 on, not only those that packed weights have.
    ///   The last group of a channel may be shorter. With `k`, there is one group a channel.
    ///
    /// # Errors
    /// - [`Error::EmptyDimension`] if `n`, `k` or `group` is 0.
    /// - [`Error::TooLarge`] if the weights exceed the address space.
    /// - [`Error::ShapeMismatch`] if a vector has the wrong length.
    /// - [`Error::CodeOutOfRange`] for a code above 15.
    /// - [`Error::NonFiniteParameter`] if a scale or a zero is not finite.
    /// - [`Error::NonFiniteWeight`] if a weight is beyond f32.
    pub fn new(
        codes: Vec<u8>,
        scales: Vec<f32>,
        zeros: Option<Vec<f32>>,
        [n, k]: [usize; 2],
        group: usize,
    ) -> Result<Self, Error> {
        check_dimension("n", n)?;
        check_dimension("k", k)?;
        check_dimension("group", group)?;
        let groups = checked_elements("scale matrix", n, k.div_ceil(group))?;
        check_length("codes", "[n, k]", checked_elements("code matrix", n, k)?, codes.len())?;
        check_length("scales", "[n, groups]", groups, scales.len())?;
        if let Some(zeros) = &zeros {
            check_length("zeros", "[n, groups]", groups, zeros.len())?;
        }
        let zeros = zeros.unwrap_or_else(|| vec![MIDDLE; groups]);
        if let Some(index) = codes.par_iter().position_first(|&code| i32::from(code) > MAX_CODE) {
            return Err(Error::CodeOutOfRange { channel: index / k, k: index % k, code: codes[index] });
        }
        check_finite("scale", &scales)?;
        check_finite("zero", &zeros)?;
        let weights = Self { n, k, group, codes, scales, zeros };
        let beyond = (0..n).into_par_iter().find_map_first(|channel| {
            let mut values = (0..k).map(|column| weights.weight(channel, column));
            let column = values.position(|value| !value.is_finite())?;
            Some(Error::NonFiniteWeight { channel, k: column, value: weights.weight(channel, column) })
        });
        beyond.map_or(Ok(weights), Err)
    }

    /// Returns the number of output channels.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Returns the number of elements per channel.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Returns the columns in a group. The last group of a channel may be shorter.
    pub fn group(&self) -> usize {
        self.group
    }

    /// Returns the groups of a channel.
    pub fn groups(&self) -> usize {
        self.k.div_ceil(self.group)
    }

    /// Returns the weights of these channels one after another, each `[k]`. Channels that do not exist are left out.
    pub fn dequantize_channels(&self, channels: Range<usize>) -> impl Iterator<Item = Vec<f32>> {
        let channels = channels.start..channels.end.min(self.n);
        channels.map(|channel| (0..self.k).map(|column| self.weight(channel, column)).collect())
    }

    /// Returns the weights, row-major `[n, k]`.
    pub fn dequantize(&self) -> Vec<f32> {
        let weight = |index| self.weight(index / self.k, index % self.k);
        (0..self.n * self.k).into_par_iter().map(weight).collect()
    }

    fn weight(&self, channel: usize, column: usize) -> f32 {
        let group = channel * self.groups() + column / self.group;
        let code = f32::from(self.codes[channel * self.k + column]);
        (code - self.zeros[group]) * self.scales[group]
    }

    /// Returns the columns of a group.
    fn columns(&self, group: usize) -> Range<usize> {
        group * self.group..self.k.min((group + 1) * self.group)
    }
}

impl fmt::Debug for Int4Weights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Int4Weights")
            .field("n", &self.n)
            .field("k", &self.k)
            .field("group", &self.group)
            .finish_non_exhaustive()
    }
}

/// How [`PackedWeights::from_int4`] took weights over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ImportKind {
    /// Every weight is that of the source, up to the rounding of one f32 product.
    Exact,
    /// The codes are those of the source, the scales the nearest that the packed format has.
    Snapped,
    /// The weights were quantized again.
    Requantized,
}

impl fmt::Display for ImportKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            ImportKind::Exact => "exact",
            ImportKind::Snapped => "snapped",
            ImportKind::Requantized => "requantized",
        })
    }
}

/// What [`PackedWeights::from_int4`] returns.
#[derive(Clone, Debug, PartialEq)]
pub struct Int4Import {
    /// The packed weights.
    pub weights: PackedWeights,
    /// How they were taken over.
    pub kind: ImportKind,
    /// `‖packed − source‖ / ‖source‖` of the weights: 0 if they are the same, infinite if only the source is 0.
    pub error: f64,
}

impl PackedWeights {
    /// Packs weights that another quantizer has quantized to four bits, with pairs for each `group`.
    ///
    /// Where the packed format has the weights, the result is exact: always with one scale a channel and integer zeros,
    /// and also where the scales of a channel's groups are multiples of one number, by integers from 1 to 17 that keep the format's invariant.
    /// Otherwise the scales become the nearest that the format has, or the weights are quantized again by `method`, whichever has the smaller error.
    /// They are always quantized again if `group` neither is nor divides the source's group, or if a scale is negative.
    /// The result does not depend on the number of threads.
    ///
    /// # Errors
    /// - [`Error::KTooLarge`] if `k` exceeds 131,072, [`Error::TooLarge`] if the weights exceed the address space.
    /// - [`Error::InvalidGroup`] if the group is not a positive multiple of 64.
    pub fn from_int4(source: &Int4Weights, group: Group, method: Method) -> Result<Int4Import, Error> {
        let &Int4Weights { n, k, .. } = source;
        PackedSizes::new(n, k, group)?;
        let snapped = match snapped(source, group)? {
            Some((weights, is_exact)) => {
                let error = relative_error(source, &weights);
                if is_exact {
                    return Ok(Int4Import { weights, kind: ImportKind::Exact, error });
                }
                Some(Int4Import { weights, kind: ImportKind::Snapped, error })
            }
            None => None,
        };
        let options = QuantizeOptions { method, group, second_moments: None };
        let weights = Self::quantize_with(&source.dequantize(), n, k, &options)?;
        let error = relative_error(source, &weights);
        Ok(match snapped {
            Some(snapped) if snapped.error <= error => snapped,
            _ => Int4Import { weights, kind: ImportKind::Requantized, error },
        })
    }
}

/// Returns `‖packed − source‖ / ‖source‖`.
fn relative_error(source: &Int4Weights, packed: &PackedWeights) -> f64 {
    let values = packed.dequantize();
    let rows: Vec<[f64; 2]> = values
        .par_chunks_exact(source.k)
        .enumerate()
        .map(|(channel, values)| {
            values.iter().enumerate().fold([0.0; 2], |[squares, errors], (column, &value)| {
                let source = f64::from(source.weight(channel, column));
                let error = f64::from(value) - source;
                [squares + source * source, errors + error * error]
            })
        })
        .collect();
    // In the order of the channels, so that the sum does not depend on the number of threads.
    let [squares, errors] = rows.iter().fold([0.0; 2], |sums, row| [sums[0] + row[0], sums[1] + row[1]]);
    if errors == 0.0 { 0.0 } else { (errors / squares).sqrt() }
}

/// One group of a channel.
struct Part {
    scale: f64,
    zero: f64,
    /// The smallest and the largest code.
    range: (i32, i32),
    /// The number of codes.
    count: f64,
    /// Σ (code − zero).
    sum: f64,
    /// Σ (code − zero)².
    weight: f64,
}

impl Part {
    fn new(codes: &[u8], scale: f32, zero: f32) -> Self {
        let zero = f64::from(zero);
        let mut part = Self { scale: scale.into(), zero, range: (15, 0), count: 0.0, sum: 0.0, weight: 0.0 };
        for &code in codes {
            part.range = (part.range.0.min(code.into()), part.range.1.max(code.into()));
            let distance = f64::from(code) - zero;
            part.count += 1.0;
            part.sum += distance;
            part.weight += distance * distance;
        }
        part
    }

    /// Returns `zero·s` as an integer, and how far that is below `zero·s`.
    fn offset(&self, s: i32) -> (i32, f64) {
        let offset = (self.zero * f64::from(s)).clamp(-MOST_OFFSET, MOST_OFFSET);
        (offset.round() as i32, offset - offset.round())
    }

    /// Returns what is added to the codes so that the pair with this `s` keeps the invariant: the smallest such shift.
    fn shift(&self, s: i32) -> Option<i32> {
        let offset = self.offset(s).0;
        // 0 ≤ a = 128 − offset − shift·s ≤ 255 − 15·s, and all codes stay within 0 to 15.
        let least = (-self.range.0).max(-(127 + offset - 15 * s).div_euclid(s));
        let most = (15 - self.range.1).min((ZERO - offset).div_euclid(s));
        (least <= most).then(|| 0.clamp(least, most))
    }

    /// Returns the sums `Σ w·v` and `Σ v²` over the codes, where `w` is the weight and `v = code·s − offset` its integer.
    fn products(&self, s: i32) -> [f64; 2] {
        let (rest, s) = (self.offset(s).1, f64::from(s));
        [
            self.scale * (s * self.weight + rest * self.sum),
            s * s * self.weight + 2.0 * s * rest * self.sum + rest * rest * self.count,
        ]
    }

    /// Returns the squared error with this `s` and `s1`.
    fn error(&self, s: i32, base: f64) -> f64 {
        // An integer's weight is off by (code − zero)·of_scale + of_offset.
        let (of_scale, of_offset) = (f64::from(s) * base - self.scale, base * self.offset(s).1);
        of_scale * of_scale * self.weight
            + 2.0 * of_scale * of_offset * self.sum
            + of_offset * of_offset * self.count
    }

    /// Returns whether this `s` and `s1` give every weight.
    fn is_exact(&self, s: i32, base: f64) -> bool {
        let is_near = (base * f64::from(s) - self.scale).abs() <= self.scale * ROUNDING;
        self.weight == 0.0 || (is_near && self.offset(s).1.abs() <= OFFSET_ROUNDING)
    }

    /// Returns the valid `s` nearest to `ratio`.
    fn nearest(&self, ratio: f64) -> Option<i32> {
        let wanted = (ratio.round() as i32).clamp(1, MOST_S);
        (1..=wanted).rev().find(|&s| self.shift(s).is_some())
    }
}

/// A channel with snapped scales.
struct Snapped {
    codes: Vec<u8>,
    /// One for each group of the output.
    pairs: Vec<(u8, u8)>,
    /// `s1`.
    scale: f32,
    is_exact: bool,
}

/// Keeps the codes, and snaps the scales of each channel to multiples of one number.
/// Returns the weights and whether they are exact, or `None` if the format can't have the codes.
fn snapped(source: &Int4Weights, group: Group) -> Result<Option<(PackedWeights, bool)>, Error> {
    let &Int4Weights { n, k, group: columns, .. } = source;
    let groups = source.groups();
    // Groups of the output may be a part of the source's.
    let finer = match group {
        Group::Channel if groups == 1 => 1,
        Group::K(group) if groups == 1 => k.div_ceil(group),
        Group::K(group) if columns.is_multiple_of(group) => columns / group,
        _ => return Ok(None),
    };
    let out_groups = group.count(k)?;
    let channels: Option<Vec<Snapped>> = (0..n)
        .into_par_iter()
        .map(|channel| {
            let codes = &source.codes[channel * k..][..k];
            let parts: Vec<Part> = (0..groups)
                .map(|group| {
                    let at = channel * groups + group;
                    Part::new(&codes[source.columns(group)], source.scales[at], source.zeros[at])
                })
                .collect();
            let (scale, pairs) = snap_channel(&parts)?;
            // With a scale of 0 every weight is 0.
            let is_exact = scale == 0.0 || parts.iter().zip(&pairs).all(|(part, &s)| part.is_exact(s, scale));
            let mut shifted = codes.to_vec();
            let mut out_pairs = Vec::with_capacity(out_groups);
            for (group, (part, &s)) in parts.iter().zip(&pairs).enumerate() {
                let shift = part.shift(s)?;
                for code in &mut shifted[source.columns(group)] {
                    *code = (i32::from(*code) + shift) as u8;
                }
                let pair = (s as u8, (ZERO - part.offset(s).0 - shift * s) as u8);
                out_pairs.extend(std::iter::repeat_n(pair, finer.min(out_groups - out_pairs.len())));
            }
            Some(Snapped { codes: shifted, pairs: out_pairs, scale: scale as f32, is_exact })
        })
        .collect();
    let Some(channels) = channels else { return Ok(None) };
    let mut codes = Vec::with_capacity(n * k);
    let (mut pairs, mut scales, mut is_exact) = (Vec::new(), Vec::new(), true);
    for channel in channels {
        codes.extend(channel.codes);
        pairs.extend(channel.pairs);
        scales.push(channel.scale);
        is_exact &= channel.is_exact;
    }
    let weights = PackedWeights::pack(&codes, &pairs, scales, n, k, group)?;
    Ok(Some((weights, is_exact)))
}

/// Returns `s1`, an f32, and the `s` of each group, with the smallest error, or `None` if a scale is negative or no pair fits.
fn snap_channel(parts: &[Part]) -> Option<(f64, Vec<i32>)> {
    if parts.iter().any(|part| part.scale < 0.0) {
        return None;
    }
    // Groups without a weight other than 0 take any scale.
    let used = || parts.iter().filter(|part| part.weight > 0.0 && part.scale > 0.0);
    let largest = used().map(|part| part.scale).fold(0.0, f64::max);
    if largest == 0.0 {
        // A scale of 0 makes every weight 0, whatever the codes are.
        let pairs = parts.iter().map(|part| part.nearest(1.0)).collect::<Option<Vec<_>>>()?;
        return Some((0.0, pairs));
    }
    if parts.iter().any(|part| part.weight > 0.0 && part.scale == 0.0) {
        return None;
    }
    let mut best: Option<(f64, f64, Vec<i32>)> = None;
    for step in STEPS..=MOST_S as usize * STEPS {
        let base = largest * STEPS as f64 / step as f64;
        let choose = |part: &Part| part.nearest(if part.weight > 0.0 { part.scale / base } else { 1.0 });
        let pairs = parts.iter().map(choose).collect::<Option<Vec<_>>>()?;
        // The base with the least squares for these multiples.
        let products = parts.iter().zip(&pairs).map(|(part, &s)| part.products(s));
        let products = products.fold([0.0; 2], |sums, of| [sums[0] + of[0], sums[1] + of[1]]);
        let base = f64::from((products[0] / products[1]) as f32);
        // Every weight may round to 0.
        if !(base.is_finite() && base > 0.0) {
            continue;
        }
        let error: f64 = parts.iter().zip(&pairs).map(|(part, &s)| part.error(s, base)).sum();
        if best.as_ref().is_none_or(|(least, ..)| error < *least) {
            best = Some((error, base, pairs));
        }
    }
    best.map(|(_, base, pairs)| (base, pairs))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_group_of_int8_weights_with_a_scale_up_to_16_has_a_shift_that_keeps_the_invariant() {
        let mut broken = 0;
        for s in 1..=16 {
            // The offset is zero · s, also where zero is no integer.
            for offset in 0..=255 {
                for least in 0..=15u8 {
                    for most in least..=15u8 {
                        let weight = |code: u8| i32::from(code) * s - offset;
                        if weight(least) < -128 || weight(most) > 127 {
                            continue;
                        }
                        let part = Part::new(&[least, most], 1.0, offset as f32 / s as f32);
                        assert_eq!(part.offset(s).0, offset);
                        let shift = part.shift(s).unwrap_or_else(|| panic!("{s} {offset} {least} {most}"));
                        let a = ZERO - offset - shift * s;
                        assert!(a >= 0 && 15 * s + a <= 255 && part.is_exact(s, 1.0 / f64::from(s)));
                        let codes = [least, most].map(|code| i32::from(code) + shift);
                        assert!(codes.iter().all(|code| (0..=15).contains(code)));
                        broken += i32::from(shift != 0);
                    }
                }
            }
        }
        assert!(broken > 10_000, "{broken}");
    }
}
