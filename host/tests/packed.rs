//! Tests of `PackedWeights`: codes and pairs round-trip for every shape,
//! and invalid weights cannot be packed.
//!
//! They test `src/packed.rs`; the brick layout is in `crates/format/src/brick.rs`.

use liquidgemm::{Error, Group, PackedWeights};
use proptest::prelude::*;

/// Returns random `(codes, pairs)` for `[n, k]` that satisfy the invariant.
fn codes_and_pairs(n: usize, groups: usize, k: usize, seed: u64) -> (Vec<u8>, Vec<(u8, u8)>) {
    let mut state = seed | 1;
    let mut below = move |bound: u64| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) % bound
    };
    let codes = (0..n * k).map(|_| below(16) as u8).collect();
    let pairs = (0..n * groups)
        .map(|_| {
            let s = 1 + below(17);
            (s as u8, below(256 - 15 * s) as u8)
        })
        .collect();
    (codes, pairs)
}

fn check_round_trip(n: usize, k: usize, group: Group, seed: u64) {
    let groups = group.count(k).unwrap();
    let (codes, pairs) = codes_and_pairs(n, groups, k, seed);
    let scales: Vec<f32> = (0..n).map(|channel| channel as f32 * 0.25).collect();
    let packed = PackedWeights::pack(&codes, &pairs, scales.clone(), n, k, group).unwrap();

    let unpacked = packed.unpack();
    assert_eq!((&unpacked.codes, &unpacked.pairs), (&codes, &pairs));
    assert_eq!(packed.channel_scales(), scales);
    assert_eq!(packed.codes().len(), n.div_ceil(64) * k.div_ceil(64) * 2048);
    assert_eq!(packed.pairs().len(), n.div_ceil(64) * groups * 128);
    assert_eq!(packed.bytes(), packed.codes().len() + packed.pairs().len() + 4 * n);
    assert_eq!(packed.padded_channel_scales().len(), n.div_ceil(64) * 64);
    assert!(packed.padded_channel_scales()[n..].iter().all(|&scale| scale == 0.0));

    // The stored parts give the same weights.
    let (stored_codes, stored_pairs) = (packed.codes().to_vec(), packed.pairs().to_vec());
    let again = PackedWeights::from_parts(stored_codes, stored_pairs, scales.clone(), n, k, group).unwrap();
    assert_eq!(again, packed);

    let group_k = if let Group::K(group) = group { group } else { k };
    let values = packed.dequantize();
    for channel in 0..n {
        for i in 0..k {
            let (s, a) = pairs[channel * groups + i / group_k];
            let int8_weight = codes[channel * k + i] as i32 * s as i32 + a as i32 - 128;
            assert_eq!(i32::from(packed.int8_weight(channel, i)), int8_weight);
            assert_eq!(values[channel * k + i], int8_weight as f32 * scales[channel]);
        }
    }
}

#[test]
fn packed_bricks_round_trip_for_every_k_tail() {
    for k in 1..=130 {
        check_round_trip(3, k, Group::default(), k as u64);
        check_round_trip(3, k, Group::Channel, k as u64);
    }
}

#[test]
fn packed_bricks_round_trip_for_every_channel_tail() {
    for n in 1..=130 {
        check_round_trip(n, 70, Group::default(), n as u64);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn packed_bricks_round_trip_for_any_shape_and_group(
        n in 1usize..150,
        k in 1usize..700,
        group in prop_oneof![
            Just(Group::K(64)), Just(Group::K(128)), Just(Group::K(256)),
            Just(Group::K(1 << 40)), Just(Group::Channel)
        ],
        seed: u64,
    ) {
        check_round_trip(n, k, group, seed);
    }
}

#[test]
fn padded_channels_stand_for_zero() {
    let (codes, pairs) = codes_and_pairs(1, 1, 64, 3);
    let packed = PackedWeights::pack(&codes, &pairs, vec![1.0], 1, 64, Group::default()).unwrap();
    for row in 1..64 {
        let pair = 4 * (row / 16 * 8 + row % 8) + row / 8 % 2 * 2;
        assert_eq!(packed.pairs()[pair..pair + 2], [1, 128], "row {row}");
    }
    let real_codes = codes.iter().map(|&code| u32::from(code)).sum::<u32>();
    let stored: u32 = packed.codes().iter().map(|&byte| u32::from(byte & 15) + u32::from(byte >> 4)).sum();
    assert_eq!(real_codes, stored, "codes of padded channels must be 0");
}

#[test]
fn codes_above_fifteen_are_rejected_with_their_position() {
    let mut codes = vec![0; 3 * 70];
    codes[70 + 65] = 16;
    let result = PackedWeights::pack(&codes, &[(1, 128); 6], vec![1.0; 3], 3, 70, Group::default());
    assert!(matches!(result, Err(Error::CodeOutOfRange { channel: 1, k: 65, code: 16 })), "{result:?}");
}

#[test]
fn pairs_beyond_the_invariant_are_rejected_with_their_position_and_values() {
    for bad in [(0, 0), (0, 255), (1, 241), (17, 1), (18, 0), (255, 255)] {
        let mut pairs = [(1, 128); 6];
        pairs[3] = bad;
        let result = PackedWeights::pack(&[0; 3 * 70], &pairs, vec![1.0; 3], 3, 70, Group::default());
        match result {
            Err(Error::InvariantBroken { channel: 1, k_block: 1, s, a }) => assert_eq!((s, a), bad),
            other => panic!("{other:?}"),
        }
    }
    for good in [(1, 240), (17, 0), (16, 15)] {
        assert!(PackedWeights::pack(&[0], &[good], vec![1.0], 1, 1, Group::default()).is_ok());
    }
}

#[test]
fn a_group_stores_its_pairs_once() {
    let bits_a_weight = |group| {
        let packed = PackedWeights::quantize(&vec![1.0f32; 128 * 4096], 128, 4096, group).unwrap();
        (packed.codes().len() + packed.pairs().len()) as f64 * 8.0 / (128.0 * 4096.0)
    };
    assert_eq!(bits_a_weight(Group::K(64)), 4.25);
    assert_eq!(bits_a_weight(Group::K(128)), 4.125);
    assert_eq!(bits_a_weight(Group::Channel), 4.0 + 16.0 / 4096.0);
}

#[test]
fn wrong_lengths_are_named() {
    let pack = |codes: usize, pairs: usize, scales: usize| {
        let result = PackedWeights::pack(
            &vec![0; codes],
            &vec![(1, 128); pairs],
            vec![1.0; scales],
            2,
            70,
            Group::default(),
        );
        result.map(|_| ()).map_err(|error| error.to_string())
    };
    assert_eq!(pack(140, 4, 2), Ok(()));
    assert!(pack(139, 4, 2).unwrap_err().contains("codes must have 140"));
    assert!(pack(140, 5, 2).unwrap_err().contains("pairs must have 4"));
    assert!(pack(140, 4, 1).unwrap_err().contains("channel scales must have 2"));
    let from_parts = |codes: usize, pairs: usize| {
        PackedWeights::from_parts(vec![0; codes], vec![1; pairs], vec![1.0], 1, 65, Group::default())
    };
    assert!(from_parts(4096, 256).is_ok());
    let result = from_parts(4095, 256);
    assert!(matches!(result, Err(Error::ShapeMismatch { what: "packed codes", expected: 4096, .. })));
    let result = from_parts(4096, 128);
    assert!(matches!(result, Err(Error::ShapeMismatch { what: "packed pairs", expected: 256, .. })));
}

#[test]
fn impossible_shapes_are_errors_and_never_wrap() {
    let from_parts =
        |n, k| PackedWeights::from_parts(vec![], vec![], vec![], n, k, Group::default()).unwrap_err();
    assert!(matches!(from_parts(0, 1), Error::EmptyDimension { dimension: "n" }));
    assert!(matches!(from_parts(1, 0), Error::EmptyDimension { dimension: "k" }));
    assert!(matches!(from_parts(1, 131_073), Error::KTooLarge { k: 131_073 }));
    assert!(matches!(from_parts(1, usize::MAX), Error::KTooLarge { .. }));
    assert!(matches!(from_parts(usize::MAX, 1), Error::TooLarge { .. }));
    assert!(matches!(from_parts(usize::MAX, 131_072), Error::TooLarge { .. }));
    assert!(matches!(from_parts(usize::MAX / 2, 131_072), Error::TooLarge { .. }));
    let pack = PackedWeights::pack(&[], &[], vec![], usize::MAX / 4, 64, Group::default());
    assert!(matches!(pack, Err(Error::TooLarge { .. } | Error::ShapeMismatch { .. })));
}

#[test]
fn groups_that_are_no_multiple_of_64_are_rejected() {
    for group in [0, 1, 63, 65, 100] {
        let result = PackedWeights::quantize(&[1.0f32], 1, 1, Group::K(group));
        assert!(matches!(result, Err(Error::InvalidGroup { .. })), "{group}");
    }
}

#[test]
fn groups_read_as_they_are_written() {
    for group in [Group::K(64), Group::K(128), Group::K(4096), Group::Channel] {
        assert_eq!(group.to_string().parse::<Group>().unwrap(), group);
    }
    for text in ["", "64x", "-64", "Channel", "65", "0"] {
        assert!(text.parse::<Group>().is_err(), "{text:?}");
    }
}
