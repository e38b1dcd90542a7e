//! Tests of `src/quantize/int4.rs`: int4 weights of other quantizers against their own dequantization.

use liquidgemm::{Error, Group, ImportKind, Int4Import, Int4Weights, Method, PackedWeights};
use proptest::prelude::*;

/// Codes `[n, k]` that cover 0 to 15 in every group.
fn codes(n: usize, k: usize) -> Vec<u8> {
    (0..n * k).map(|i| ((i * 7 + i / k * 3) % 16) as u8).collect()
}

/// Weights `[n, k]` with scales and zeros by (channel, group).
fn source(
    [n, k, group]: [usize; 3],
    scale: impl Fn(usize, usize) -> f32,
    zero: impl Fn(usize, usize) -> f32,
) -> Int4Weights {
    let groups = k.div_ceil(group);
    let all = || (0..n).flat_map(|channel| (0..groups).map(move |group| (channel, group)));
    let scales = all().map(|(channel, group)| scale(channel, group)).collect();
    let zeros = all().map(|(channel, group)| zero(channel, group)).collect();
    Int4Weights::new(codes(n, k), scales, Some(zeros), [n, k], group).unwrap()
}

fn take(source: &Int4Weights, group: Group) -> Int4Import {
    let taken = PackedWeights::from_int4(source, group, Method::Search).unwrap();
    assert_eq!((taken.weights.n(), taken.weights.k()), (source.n(), source.k()));
    assert_eq!(taken.weights.group(), group);
    let measured = relative_error(source, &taken.weights);
    assert!((taken.error - measured).abs() <= 1e-12 * measured, "{} {measured}", taken.error);
    taken
}

fn relative_error(source: &Int4Weights, packed: &PackedWeights) -> f64 {
    let (mut squares, mut errors) = (0.0, 0.0);
    for (&expected, found) in source.dequantize().iter().zip(packed.dequantize()) {
        squares += f64::from(expected).powi(2);
        errors += (f64::from(found) - f64::from(expected)).powi(2);
    }
    if errors == 0.0 { 0.0 } else { (errors / squares).sqrt() }
}

#[test]
fn dequantization_is_code_minus_zero_times_the_scale_of_its_group_also_in_a_shorter_last_group() {
    let weights =
        source([3, 200, 96], |channel, group| (channel + 10 * group + 1) as f32, |_, group| group as f32);
    let codes = codes(3, 200);
    let values = weights.dequantize();
    for (i, &value) in values.iter().enumerate() {
        let (channel, group) = (i / 200, i % 200 / 96);
        let expected = (f32::from(codes[i]) - group as f32) * (channel + 10 * group + 1) as f32;
        assert_eq!(value, expected);
    }
    assert_eq!(weights.groups(), 3);
    assert_eq!(weights.dequantize_channels(1..9).collect::<Vec<_>>().concat(), values[200..]);
    // Without zeros they are 8.
    let symmetric = Int4Weights::new(codes.clone(), vec![1.0; 3], None, [3, 200], 200).unwrap();
    let expected: Vec<f32> = codes.iter().map(|&code| f32::from(code) - 8.0).collect();
    assert_eq!(symmetric.dequantize(), expected);
}

#[test]
fn one_scale_a_channel_with_integer_zeros_is_exact_in_every_group_of_the_format() {
    for k in [64, 200, 320] {
        let weights =
            source([70, k, k], |channel, _| 0.013 * channel as f32, |channel, _| (channel % 17) as f32);
        for group in [Group::Channel, Group::K(64), Group::K(128), Group::K(1024)] {
            let taken = take(&weights, group);
            assert_eq!((taken.kind, taken.error), (ImportKind::Exact, 0.0), "{k} {group}");
            assert_eq!(taken.weights.dequantize(), weights.dequantize());
        }
    }
}

#[test]
fn scales_that_are_multiples_of_one_number_are_exact_also_in_finer_groups_and_with_a_shorter_last_one() {
    let scale =
        |channel: usize, group: usize| 0.0625 * (channel + 1) as f32 * ((channel + group) % 8 + 1) as f32;
    let weights = source([70, 448, 128], scale, |channel, group| ((channel * 3 + group) % 5 + 6) as f32);
    for group in [Group::K(128), Group::K(64)] {
        let taken = take(&weights, group);
        assert_eq!((taken.kind, taken.error), (ImportKind::Exact, 0.0), "{group}");
    }
}

#[test]
fn other_scales_are_snapped_with_an_error_below_that_of_requantizing() {
    let scale = |channel: usize, group: usize| 0.01 * (1.0 + 0.37 * ((channel * 7 + group * 3) as f32).sin());
    let weights = source([70, 512, 128], scale, |_, _| 8.0);
    let taken = take(&weights, Group::K(128));
    assert_eq!(taken.kind, ImportKind::Snapped);
    let again = PackedWeights::quantize(&weights.dequantize(), 70, 512, Group::K(128)).unwrap();
    assert!(taken.error < 0.03 && taken.error < relative_error(&weights, &again), "{}", taken.error);
    // Symmetric codes need no shift, so they stay.
    assert_eq!(taken.weights.unpack().codes, codes(70, 512));
}

#[test]
fn weights_that_the_format_cannot_snap_are_requantized_by_the_method() {
    let coarse = source([70, 256, 128], |_, group| 1.0 + group as f32, |_, _| 8.0);
    let fine = source([70, 256, 32], |_, group| 1.0 + 0.1 * group as f32, |_, _| 8.0);
    let negative = source([70, 256, 128], |channel, _| channel as f32 - 30.0, |_, _| 8.0);
    for (weights, group) in [(coarse, Group::Channel), (fine, Group::K(64)), (negative, Group::K(128))] {
        for method in [Method::Rtn, Method::Search] {
            let taken = PackedWeights::from_int4(&weights, group, method).unwrap();
            let options = liquidgemm::QuantizeOptions { method, group, second_moments: None };
            let expected = PackedWeights::quantize_with(&weights.dequantize(), 70, 256, &options).unwrap();
            assert_eq!(taken.kind, ImportKind::Requantized);
            assert!(taken.weights == expected && taken.error < 0.2, "{method} {}", taken.error);
        }
    }
}

#[test]
fn groups_that_are_0_whatever_their_codes_are_taken_over() {
    let nothing = source([2, 128, 64], |_, _| 0.0, |_, _| 7.5);
    let taken = take(&nothing, Group::K(64));
    assert_eq!((taken.kind, taken.error), (ImportKind::Exact, 0.0));
    assert_eq!(taken.weights.dequantize(), vec![0.0; 256]);
    let some = source([2, 128, 64], |_, group| group as f32, |_, _| 8.0);
    assert!(take(&some, Group::K(64)).error < 0.1);
}

#[test]
fn wrong_input_is_an_error_that_names_the_value() {
    let new = |codes: Vec<u8>, scales: Vec<f32>, zeros: Option<Vec<f32>>, shape: [usize; 2], group: usize| {
        Int4Weights::new(codes, scales, zeros, shape, group).unwrap_err()
    };
    let (codes, scales) = (codes(2, 100), vec![1.0f32; 4]);
    let changed = |index: usize, value: f32| {
        let mut scales = scales.clone();
        scales[index] = value;
        scales
    };
    for (shape, group, dimension) in [([0, 100], 64, "n"), ([2, 0], 64, "k"), ([2, 100], 0, "group")] {
        let error = new(codes.clone(), scales.clone(), None, shape, group);
        assert!(matches!(error, Error::EmptyDimension { dimension: found } if found == dimension), "{error}");
    }
    let error = new(codes.clone(), scales.clone(), None, [2, usize::MAX / 2 + 1], 1);
    assert!(matches!(error, Error::TooLarge { .. }), "{error}");
    for (what, error) in [
        ("codes", new(codes[1..].to_vec(), scales.clone(), None, [2, 100], 64)),
        ("scales", new(codes.clone(), scales.clone(), None, [2, 100], 100)),
        ("zeros", new(codes.clone(), scales.clone(), Some(vec![8.0; 3]), [2, 100], 64)),
    ] {
        assert!(matches!(error, Error::ShapeMismatch { what: found, .. } if found == what), "{error}");
    }
    let mut large = codes.clone();
    large[103] = 16;
    let error = new(large, scales.clone(), None, [2, 100], 64);
    assert!(matches!(error, Error::CodeOutOfRange { channel: 1, k: 3, code: 16 }), "{error}");
    for value in [f32::NAN, f32::INFINITY] {
        let error = new(codes.clone(), changed(2, value), None, [2, 100], 64);
        assert!(matches!(error, Error::NonFiniteParameter { what: "scale", index: 2, .. }), "{error}");
        let error = new(codes.clone(), scales.clone(), Some(changed(3, value)), [2, 100], 64);
        assert!(matches!(error, Error::NonFiniteParameter { what: "zero", index: 3, .. }), "{error}");
    }
    let error = new(codes.clone(), changed(1, f32::MAX), None, [2, 100], 64);
    assert!(matches!(error, Error::NonFiniteWeight { channel: 0, k: 64.., .. }), "{error}");

    let weights = Int4Weights::new(codes, scales, None, [2, 100], 64).unwrap();
    let error = PackedWeights::from_int4(&weights, Group::K(65), Method::Search).unwrap_err();
    assert!(matches!(error, Error::InvalidGroup { group: 65 }), "{error}");
    let long = Int4Weights::new(vec![0; 131_073], vec![1.0], None, [1, 131_073], 131_073).unwrap();
    let error = PackedWeights::from_int4(&long, Group::Channel, Method::Search).unwrap_err();
    assert!(matches!(error, Error::KTooLarge { k: 131_073 }), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn any_finite_source_gives_weights_no_worse_than_requantizing(
        n in 1usize..6,
        k in 1usize..300,
        group in prop_oneof![Just(64usize), Just(128), Just(96), Just(300)],
        packed in prop_oneof![Just(Group::K(64)), Just(Group::K(128)), Just(Group::Channel)],
        scales in proptest::collection::vec(
            prop_oneof![4 => 0.1f32..1.0, 1 => -1f32..1.0, 1 => Just(0.0), 1 => 1e-44f32..1e-40, 1 => 1e30f32..1e36], 30,
        ),
        zeros in proptest::collection::vec(
            prop_oneof![4 => (0u8..=16).prop_map(f32::from), 1 => -300f32..300.0, 1 => Just(100.0)], 30,
        ),
        codes in proptest::collection::vec(0u8..16, 1500),
    ) {
        let groups = n * k.div_ceil(group);
        let (scales, zeros) = (scales[..groups].to_vec(), zeros[..groups].to_vec());
        let weights = Int4Weights::new(codes[..n * k].to_vec(), scales, Some(zeros), [n, k], group).unwrap();
        let taken = PackedWeights::from_int4(&weights, packed, Method::Search).unwrap();
        let values = weights.dequantize();
        let again = PackedWeights::quantize(&values, n, k, packed).unwrap();
        let (found, other) = (relative_error(&weights, &taken.weights), relative_error(&weights, &again));
        prop_assert!(found == taken.error || (found - taken.error).abs() <= 1e-12 * found);
        // An exact result has the rounding of f32.
        let rounding = if taken.kind == ImportKind::Exact { 1e-6 } else { 0.0 };
        prop_assert!(found <= other + rounding, "{:?} {found} {other}", taken.kind);
        if taken.kind == ImportKind::Requantized {
            prop_assert!(taken.weights == again);
        }
    }
}
