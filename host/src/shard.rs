//! Shards of packed weights for tensor parallelism: cut out by channels or along K, and joined again.
//!
//! Cutting and joining move codes, pairs and scales unchanged, so every product has the bits
//! that it has without cutting: the columns of a channel shard are columns of the whole product,
//! and the int32 products of shards along K add up to the whole int32 product.

use std::borrow::Borrow;
use std::ops::Range;

use liquidgemm_format::brick::BRICK_K;

use crate::packed::Packer;
use crate::{Error, Group, PackedWeights};

impl PackedWeights {
    /// Returns the weights of some output channels, `[channels.len(), k]`: a shard for column parallelism.
    ///
    /// The channels may begin and end anywhere. If they begin and end at multiples of 64, no shard has padding.
    ///
    /// # Errors
    /// [`Error::BadCut`] if the range is empty or ends beyond `n`.
    pub fn channel_shard(&self, channels: Range<usize>) -> Result<Self, Error> {
        check_cut("channels", &channels, self.n(), 1)?;
        let scales = self.channel_scales()[channels.clone()].to_vec();
        packed([channels.len(), self.k()], self.group(), scales, |channel, codes, pairs| {
            self.append_channel(channels.start + channel, 0..self.k(), codes, pairs);
        })
    }

    /// Returns the weights of some input channels, `[n, inputs.len()]`: a shard for row parallelism.
    ///
    /// Every shard keeps the channel scales, so the sum of the shards' int32 products is the int32 product of the
    /// whole weights, and one epilogue after the sum gives the bits of a single GPU.
    /// For that, the activations of all shards have the whole token's scale.
    /// With groups along K the range begins at a multiple of the group, and ends at one or at `k`.
    /// With [`Group::Channel`] it begins and ends anywhere.
    ///
    /// # Errors
    /// [`Error::BadCut`] if the range is empty, ends beyond `k`, or cuts through a group.
    pub fn input_shard(&self, inputs: Range<usize>) -> Result<Self, Error> {
        check_cut("inputs", &inputs, self.k(), self.group_elements())?;
        let scales = self.channel_scales().to_vec();
        packed([self.n(), inputs.len()], self.group(), scales, |channel, codes, pairs| {
            self.append_channel(channel, inputs.clone(), codes, pairs);
        })
    }

    /// Joins shards by channels: the inverse of [`channel_shard`](Self::channel_shard) over consecutive ranges.
    ///
    /// It also stacks different matrices with the same inputs, such as Q, K and V, into one.
    ///
    /// # Errors
    /// - [`Error::NoShards`] for an empty list.
    /// - [`Error::ShardsDiffer`] if `k` or the group is not the same in all shards.
    /// - [`Error::TooLarge`] if the result exceeds the address space.
    pub fn join_channels<S: Borrow<Self>>(shards: &[S]) -> Result<Self, Error> {
        let shards: Vec<&Self> = shards.iter().map(S::borrow).collect();
        let first = shards.first().ok_or(Error::NoShards)?;
        let (k, group) = (first.k(), first.group());
        for (shard, other) in shards.iter().enumerate() {
            check_same(shard, "k", k, other.k())?;
            check_same(shard, "group", group, other.group())?;
        }
        let n = shards.iter().try_fold(0usize, |n, shard| n.checked_add(shard.n()));
        let n = n.ok_or(Error::TooLarge { what: "weight matrix", rows: usize::MAX, columns: k })?;
        // The channel after each shard's last.
        let ends: Vec<usize> = shards
            .iter()
            .scan(0, |end, shard| {
                *end += shard.n();
                Some(*end)
            })
            .collect();
        let scales = shards.iter().flat_map(|shard| shard.channel_scales()).copied().collect();
        packed([n, k], group, scales, |channel, codes, pairs| {
            let index = ends.partition_point(|&end| end <= channel);
            let shard = &shards[index];
            shard.append_channel(channel - (ends[index] - shard.n()), 0..k, codes, pairs);
        })
    }

    /// Joins shards along K: the inverse of [`input_shard`](Self::input_shard) over consecutive ranges.
    ///
    /// # Errors
    /// - [`Error::NoShards`] for an empty list.
    /// - [`Error::ShardsDiffer`] if `n`, the group or a channel scale is not the same in all shards,
    ///   with [`Group::Channel`] also if a pair is not.
    /// - [`Error::BadCut`] if the `k` of a shard before the last is not a multiple of the group.
    /// - [`Error::KTooLarge`] if the `k` of all shards together exceeds 131,072.
    pub fn join_inputs(shards: &[Self]) -> Result<Self, Error> {
        let first = shards.first().ok_or(Error::NoShards)?;
        let (n, group) = (first.n(), first.group());
        let k = shards.iter().fold(0usize, |k, shard| k.saturating_add(shard.k()));
        let mut begin = 0;
        for (shard, other) in shards.iter().enumerate() {
            check_same(shard, "n", n, other.n())?;
            check_same(shard, "group", group, other.group())?;
            check_cut("inputs", &(begin..begin + other.k()), k, first.group_elements())?;
            begin += other.k();
            for channel in 0..n {
                let scales = [first, other].map(|weights| weights.channel_scales()[channel]);
                check_same(shard, "channel scale", scales[0], scales[1])?;
                if group == Group::Channel {
                    let pairs = [first, other].map(|weights| weights.pair(channel, 0));
                    check_same(shard, "pair's s", pairs[0].0, pairs[1].0)?;
                    check_same(shard, "pair's a", pairs[0].1, pairs[1].1)?;
                }
            }
        }
        packed([n, k], group, first.channel_scales().to_vec(), |channel, codes, pairs| {
            for shard in shards {
                shard.append_channel(channel, 0..shard.k(), codes, pairs);
            }
        })
    }

    /// The elements along K between which a cut may lie.
    fn group_elements(&self) -> usize {
        match self.group() {
            Group::K(group) => group,
            Group::Channel => 1,
        }
    }

    /// Appends the codes of a channel's inputs, and the pair of each of their groups.
    fn append_channel(
        &self,
        channel: usize,
        inputs: Range<usize>,
        codes: &mut Vec<u8>,
        pairs: &mut Vec<(u8, u8)>,
    ) {
        let group = self.group_blocks() * BRICK_K;
        pairs.extend(inputs.clone().step_by(group).map(|k| self.pair(channel, k / BRICK_K)));
        codes.extend(inputs.map(|k| self.code(channel, k)));
    }
}

/// Packs `[n, k]` weights whose channels `append` gives, each as its codes and the pairs of its groups.
fn packed(
    [n, k]: [usize; 2],
    group: Group,
    channel_scales: Vec<f32>,
    append: impl Fn(usize, &mut Vec<u8>, &mut Vec<(u8, u8)>) + Sync,
) -> Result<PackedWeights, Error> {
    let mut packer = Packer::new(n, k, group)?;
    packer.for_each_strip(|channels, mut strip| {
        let (mut codes, mut pairs) = (Vec::with_capacity(k), Vec::new());
        for (row, channel) in channels.enumerate() {
            codes.clear();
            pairs.clear();
            append(channel, &mut codes, &mut pairs);
            strip.write_channel(row, channel_scales[channel], &codes, &pairs);
        }
    });
    Ok(packer.finish())
}

/// Checks that a range is not empty, and that it begins and ends at multiples or at the end.
fn check_cut(what: &'static str, range: &Range<usize>, length: usize, multiple: usize) -> Result<(), Error> {
    let fits = range.start < range.end && range.end <= length;
    let ends_well = range.end.is_multiple_of(multiple) || range.end == length;
    if fits && range.start.is_multiple_of(multiple) && ends_well {
        return Ok(());
    }
    Err(Error::BadCut { what, start: range.start, end: range.end, length, multiple })
}

fn check_same<T: PartialEq + ToString>(
    shard: usize,
    what: &'static str,
    expected: T,
    found: T,
) -> Result<(), Error> {
    if expected == found {
        return Ok(());
    }
    Err(Error::ShardsDiffer { shard, what, expected: expected.to_string(), found: found.to_string() })
}
