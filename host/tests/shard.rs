//! Tests of shards: cut and joined weights are the same weights, and products of shards make the whole product.
//!
//! They test `src/shard.rs` on the CPU backend.

use std::ops::Range;

use liquidgemm::{Error, Group, PackedWeights, QuantizedActivations, cpu};
use proptest::prelude::*;

fn values(count: usize, step: f32) -> Vec<f32> {
    (0..count).map(|i| (i as f32 * step).sin() * (1.0 + (i % 7) as f32)).collect()
}

fn weights(n: usize, k: usize, group: Group) -> PackedWeights {
    PackedWeights::quantize(&values(n * k, 0.37), n, k, group).unwrap()
}

/// The consecutive ranges between the cuts that lie inside of `0..length`.
fn ranges(cuts: &[usize], length: usize) -> Vec<Range<usize>> {
    let mut ends: Vec<usize> = cuts.iter().copied().filter(|&cut| cut > 0 && cut < length).collect();
    ends.push(length);
    ends.sort_unstable();
    ends.dedup();
    let starts = std::iter::once(0).chain(ends.clone());
    starts.zip(ends).map(|(start, end)| start..end).collect()
}

/// The inputs of some columns, with the scales of the whole.
fn columns(x: &QuantizedActivations, inputs: Range<usize>) -> QuantizedActivations {
    let codes: Vec<i8> = (0..x.m()).flat_map(|token| x.row(token)[inputs.clone()].to_vec()).collect();
    QuantizedActivations::from_parts(&codes, x.scales().to_vec(), x.m(), inputs.len()).unwrap()
}

fn group() -> impl Strategy<Value = Group> {
    prop_oneof![Just(Group::K(64)), Just(Group::K(128)), Just(Group::K(192)), Just(Group::Channel)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn channel_shards_join_to_the_whole_and_give_its_columns(
        n in 1usize..200,
        k in 1usize..300,
        group in group(),
        cuts in prop::collection::vec(0usize..200, 0..4),
    ) {
        let whole = weights(n, k, group);
        let ranges = ranges(&cuts, n);
        let shards: Vec<_> =
            ranges.iter().map(|range| whole.channel_shard(range.clone()).unwrap()).collect();
        prop_assert_eq!(&PackedWeights::join_channels(&shards).unwrap(), &whole);

        let m = 3;
        let x = QuantizedActivations::quantize(&values(m * k, 0.11), m, k).unwrap();
        let mut y = vec![0f32; m * n];
        cpu::gemm(&whole, &x, None, &mut y).unwrap();
        for (range, shard) in ranges.into_iter().zip(&shards) {
            let mut part = vec![0f32; m * range.len()];
            cpu::gemm(shard, &x, None, &mut part).unwrap();
            for token in 0..m {
                let columns = &y[token * n..][range.clone()];
                prop_assert_eq!(&part[token * range.len()..][..range.len()], columns);
            }
        }
    }

    #[test]
    fn input_shards_join_to_the_whole_and_their_int32_products_add_up(
        n in 1usize..150,
        k in 1usize..700,
        group in group(),
        cuts in prop::collection::vec(0usize..11, 0..4),
        anywhere in 1usize..64,
    ) {
        let whole = weights(n, k, group);
        let unit = if let Group::K(group) = group { group } else { anywhere };
        let cuts: Vec<usize> = cuts.into_iter().map(|cut| cut * unit).collect();
        let ranges = ranges(&cuts, k);
        let shards: Vec<_> = ranges.iter().map(|range| whole.input_shard(range.clone()).unwrap()).collect();
        prop_assert_eq!(&PackedWeights::join_inputs(&shards).unwrap(), &whole);

        let m = 3;
        let x = QuantizedActivations::quantize(&values(m * k, 0.11), m, k).unwrap();
        let mut expected = vec![0i32; m * n];
        cpu::gemm(&whole, &x, None, &mut expected).unwrap();
        let mut sum = vec![0i32; m * n];
        for (range, shard) in ranges.into_iter().zip(&shards) {
            let mut partial = vec![0i32; m * n];
            cpu::gemm(shard, &columns(&x, range), None, &mut partial).unwrap();
            sum.iter_mut().zip(partial).for_each(|(sum, partial)| *sum += partial);
        }
        prop_assert_eq!(sum, expected);
    }
}

#[test]
fn different_matrices_with_the_same_inputs_are_stacked() {
    let (q, k, v) =
        (weights(100, 128, Group::K(64)), weights(30, 128, Group::K(64)), weights(64, 128, Group::K(64)));
    let stacked = PackedWeights::join_channels(&[q.clone(), k.clone(), v.clone()]).unwrap();
    assert_eq!((stacked.n(), stacked.k()), (194, 128));
    assert_eq!(stacked.channel_shard(100..130).unwrap(), k);
    assert_eq!(stacked.channel_shard(130..194).unwrap(), v);
    assert_eq!(stacked.channel_shard(0..100).unwrap(), q);
}

#[test]
fn cuts_that_are_empty_beyond_the_end_or_through_a_group_are_refused() {
    let whole = weights(100, 300, Group::K(128));
    #[expect(clippy::reversed_empty_ranges, reason = "a range that runs backwards is bad input, too")]
    for range in [5..5, 7..3, 0..101, 100..101, usize::MAX - 1..usize::MAX] {
        let error = whole.channel_shard(range.clone()).unwrap_err();
        assert!(matches!(error, Error::BadCut { what: "channels", multiple: 1, .. }), "{range:?}: {error}");
    }
    for range in [64..128, 0..64, 128..200, 0..301, 256..256] {
        let error = whole.input_shard(range.clone()).unwrap_err();
        assert!(error.to_string().contains("multiple of 128"), "{range:?}: {error}");
    }
    assert!(whole.input_shard(256..300).is_ok());
    assert!(weights(10, 100, Group::Channel).input_shard(3..17).is_ok());
}

#[test]
fn shards_that_do_not_belong_together_are_refused_by_name() {
    let join = PackedWeights::join_channels;
    assert!(matches!(join(&[]), Err(Error::NoShards)));
    assert!(matches!(PackedWeights::join_inputs(&[]), Err(Error::NoShards)));
    let a = weights(64, 128, Group::K(64));
    let text = |result: Result<PackedWeights, Error>| result.unwrap_err().to_string();
    let other_k = text(join(&[a.clone(), weights(64, 129, Group::K(64))]));
    assert!(other_k.contains("shard 1") && other_k.contains("k is 129, not 128"), "{other_k}");
    let other_group = text(join(&[a.clone(), weights(64, 128, Group::Channel)]));
    assert!(other_group.contains("group is channel, not 64"), "{other_group}");

    let join = PackedWeights::join_inputs;
    let other_n = text(join(&[a.clone(), weights(65, 128, Group::K(64))]));
    assert!(other_n.contains("n is 65, not 64"), "{other_n}");
    let other_scale = text(join(&[a.clone(), weights(64, 64, Group::K(64))]));
    assert!(other_scale.contains("channel scale"), "{other_scale}");
    // The first shard ends inside of a group.
    let whole = weights(5, 200, Group::K(128));
    let tail = whole.input_shard(128..200).unwrap();
    let inside = text(join(&[tail, whole.input_shard(0..128).unwrap()]));
    assert!(inside.contains("inputs 0..72"), "{inside}");
}
