//! A row-parallel linear layer on the CPU: the shards in turn, with the bits of the whole layer.
//! The twin on the GPU, with a shard on each, is `host/src/gpu/row_parallel.rs`.

use std::borrow::Borrow;

use liquidgemm_format::brick::MAX_K;
use rayon::prelude::*;

use crate::check::{check_length, checked_elements};
use crate::cpu::{QuantizeInput, gemm};
use crate::operation::{Half, Scaling};
use crate::{Error, Linear, Output, OutputType};

/// Computes a linear layer `[m, n]` from its shards along K, each with its part of the activations.
///
/// The shards are those of [`Linear::input_shard`] over consecutive ranges.
/// `inputs[i]` has the input channels of shard i for all tokens.
/// The result has the bits of [`Linear::forward`] of the whole layer, also for values that are not finite.
///
/// Each shard quantizes its part of a token; the largest of the scales is that of the whole token.
/// All shards quantize with it, multiply to int32, and their sums are added.
/// The epilogue follows once, with the bias of the first shard.
///
/// # Errors
/// - [`Error::NoShards`] for an empty list, [`Error::ShapeMismatch`] if there is not an input for each shard.
/// - [`Error::ShardsDiffer`] if n, the channel scales, the bias or the number of tokens is not the same in all shards.
/// - [`Error::KTooLarge`] if the `k` of all shards together exceeds 131,072.
/// - [`Error::NormOfShard`] for a norm, which needs the whole row.
/// - Those of [`Linear::forward`].
pub fn row_parallel<T: Half, O: Output, L: Borrow<Linear>>(
    shards: &[L],
    inputs: &[QuantizeInput<'_, T>],
) -> Result<Vec<O>, Error> {
    check_shards(shards, inputs)?;
    let (Some(first), Some(input)) = (shards.first().map(L::borrow), inputs.first()) else {
        return Err(Error::NoShards);
    };
    if first.bias().is_some() && O::TYPE == OutputType::I32 {
        return Err(Error::BiasWithRawOutput);
    }
    let (m, n) = (input.m, first.n());
    let elements = checked_elements("output matrix", m, n)?;

    let mut scales: Option<Vec<f32>> = None;
    for (shard, input) in shards.iter().zip(inputs) {
        let part = shard.borrow().quantize(input, None)?;
        match &mut scales {
            None => scales = Some(part.scales().to_vec()),
            Some(scales) => {
                for (scale, &other) in scales.iter_mut().zip(part.scales()) {
                    // As int32, bits have the order of the values, and NaN comes last.
                    if other.to_bits().cast_signed() > scale.to_bits().cast_signed() {
                        *scale = other;
                    }
                }
            }
        }
    }
    let scales = scales.unwrap_or_default();

    let (mut sums, mut part) = (vec![0i32; elements], vec![0i32; elements]);
    for (shard, input) in shards.iter().zip(inputs) {
        let shard = shard.borrow();
        let input = QuantizeInput { scaling: Scaling::Given(&scales), ..*input };
        gemm(shard.weights(), &shard.quantize(&input, None)?, None, &mut part)?;
        sums.par_iter_mut().zip(&part).for_each(|(sum, part)| *sum = sum.wrapping_add(*part));
    }

    let mut output = vec![O::zeroed(); elements];
    let (channel_scales, bias) = (first.weights().channel_scales(), first.bias());
    let rows = output.par_chunks_exact_mut(n).zip(sums.par_chunks_exact(n)).zip(&scales);
    rows.for_each(|((row, sums), &token_scale)| {
        for (channel, (y, &sum)) in row.iter_mut().zip(sums).enumerate() {
            let bias = bias.map(|bias| bias[channel]);
            *y = O::from_accumulator(sum, channel_scales[channel], token_scale, bias);
        }
    });
    Ok(output)
}

/// Fails unless shards and inputs belong together.
fn check_shards<T: Half, L: Borrow<Linear>>(
    shards: &[L],
    inputs: &[QuantizeInput<'_, T>],
) -> Result<(), Error> {
    check_length("inputs", "[shards]", shards.len(), inputs.len())?;
    let (Some(first), Some(first_input)) = (shards.first().map(L::borrow), inputs.first()) else {
        return Err(Error::NoShards);
    };
    let k = shards.iter().fold(0usize, |k, shard| k.saturating_add(shard.borrow().k()));
    if k > MAX_K {
        return Err(Error::KTooLarge { k });
    }
    for (index, (shard, input)) in shards.iter().map(L::borrow).zip(inputs).enumerate() {
        if input.operation.is_norm() {
            return Err(Error::NormOfShard);
        }
        let differs = |what, expected: &dyn ToString, found: &dyn ToString| Error::ShardsDiffer {
            shard: index,
            what,
            expected: expected.to_string(),
            found: found.to_string(),
        };
        if shard.n() != first.n() {
            return Err(differs("n", &first.n(), &shard.n()));
        }
        if input.m != first_input.m {
            return Err(differs("number of tokens", &first_input.m, &input.m));
        }
        let (scales, others) = (first.weights().channel_scales(), shard.weights().channel_scales());
        if let Some(at) = scales.iter().zip(others).position(|(scale, other)| scale != other) {
            return Err(differs("channel scale", &scales[at], &others[at]));
        }
        if shard.bias().is_some() != first.bias().is_some() {
            let has = |shard: &Linear| if shard.bias().is_some() { "there" } else { "missing" };
            return Err(differs("bias", &has(first), &has(shard)));
        }
        let (bias, others) = (first.bias().unwrap_or_default(), shard.bias().unwrap_or_default());
        if let Some(at) = bias.iter().zip(others).position(|(bias, other)| bias != other) {
            return Err(differs("bias", &bias[at], &others[at]));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};
    use proptest::prelude::*;

    use super::*;
    use crate::{Gate, GateOrder, Group, Operation, PackedWeights};

    /// Returns values from a linear congruential sequence, between −2 and 2.
    fn values(seed: u64, count: usize) -> impl Iterator<Item = f32> {
        let next = |state: &u64| Some(state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(99_991));
        std::iter::successors(next(&seed), next)
            .take(count)
            .map(|state| (state >> 40) as f32 / (1 << 22) as f32 - 2.0)
    }

    fn layer(n: usize, k: usize, group: Group, options: [bool; 2]) -> Linear {
        let weights: Vec<f32> = values(n as u64 * 7 + k as u64, n * k).collect();
        let mut layer = Linear::new(PackedWeights::quantize(&weights, n, k, group).unwrap());
        if options[0] {
            layer = layer.with_bias(values(5, n).collect()).unwrap();
        }
        if options[1] {
            layer = layer.with_smoothing(values(6, k).map(|value| value.abs() + 0.25).collect()).unwrap();
        }
        layer
    }

    /// Computes a layer whole and in shards that end at `cuts`, and returns both.
    fn both<T: Half, O: Output>(
        layer: &Linear,
        input: &QuantizeInput<'_, T>,
        cuts: &[usize],
    ) -> [Result<Vec<O>, Error>; 2] {
        let k = layer.k();
        let begins = || std::iter::once(0).chain(cuts.iter().copied());
        let ranges = || begins().zip(cuts.iter().copied().chain([k])).map(|(begin, end)| begin..end);
        let shards: Vec<Linear> = ranges().map(|range| layer.input_shard(range).unwrap()).collect();
        // Each shard gets rows of its own input channels only.
        let rows: Vec<Vec<T>> = ranges()
            .map(|range| {
                (0..input.m)
                    .flat_map(|row| {
                        let row = &input.input[row * input.input_stride..];
                        match input.operation {
                            Operation::Gated { order: GateOrder::Halves, .. } => {
                                [&row[range.clone()], &row[k..][range.clone()]].concat()
                            }
                            Operation::Gated { .. } => row[2 * range.start..2 * range.end].to_vec(),
                            _ => row[range.clone()].to_vec(),
                        }
                    })
                    .collect()
            })
            .collect();
        let inputs: Vec<QuantizeInput<'_, T>> = shards
            .iter()
            .zip(&rows)
            .map(|(shard, rows)| QuantizeInput {
                k: shard.k(),
                input: rows,
                input_stride: input.operation.input_elements(shard.k()),
                ..*input
            })
            .collect();
        [layer.forward(input, None), row_parallel(&shards, &inputs)]
    }

    fn bytes<O: Output>(values: &[O]) -> &[u8] {
        bytemuck::cast_slice(values)
    }

    fn expect_same_bits<T: Half, O: Output>(layer: &Linear, input: &QuantizeInput<'_, T>, cuts: &[usize]) {
        let [whole, parts] = both::<T, O>(layer, input, cuts);
        assert!(bytes(&whole.unwrap()) == bytes(&parts.unwrap()), "{cuts:?}, {:?}", input.operation);
    }

    const OPERATIONS: [Operation<&[bf16]>; 4] = [
        Operation::Plain,
        Operation::Gated { gate: Gate::Silu, order: GateOrder::Halves },
        Operation::Gated { gate: Gate::Silu, order: GateOrder::Interleaved },
        Operation::Gated { gate: Gate::GeluTanh, order: GateOrder::Halves },
    ];

    #[test]
    fn uneven_shards_with_tails_give_the_bits_of_the_whole_layer() {
        let cases: [(usize, usize, Group, &[usize]); 6] = [
            (65, 200, Group::K(64), &[64]),
            (3, 130, Group::K(64), &[64, 128]),
            (64, 512, Group::K(128), &[384]),
            (7, 100, Group::Channel, &[1, 50, 99]),
            (130, 321, Group::Channel, &[17]),
            (1, 64, Group::K(64), &[]),
        ];
        for (n, k, group, cuts) in cases {
            for (index, operation) in OPERATIONS.into_iter().enumerate() {
                let layer = layer(n, k, group, [index % 2 == 0, index / 2 == 0]);
                let m = 5;
                let stride = operation.input_elements(k) + index;
                let input: Vec<bf16> = values(9, m * stride).map(bf16::from_f32).collect();
                let input =
                    QuantizeInput { operation, input_stride: stride, ..QuantizeInput::new(&input, m, k) };
                expect_same_bits::<_, bf16>(&layer, &input, cuts);
                expect_same_bits::<_, f16>(&layer, &input, cuts);
                expect_same_bits::<_, f32>(&layer, &input, cuts);
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn random_shards_and_any_bits_give_the_bits_of_the_whole_layer(
            seed: u64,
            n in 1usize..80,
            blocks in 2usize..6,
            tail in 1usize..=64,
            first in 1usize..6,
            words in proptest::collection::vec(any::<u16>(), 4 * 6 * 64),
            ordinary in 0usize..4,
        ) {
            let k = (blocks - 1) * 64 + tail;
            let layer = layer(n, k, Group::K(64), [seed % 2 == 0, seed % 3 == 0]);
            // Three of four tokens get ordinary values, or all bits are random in few channels.
            let mut input: Vec<f16> = values(seed, 4 * k).map(f16::from_f32).collect();
            for token in ordinary..4 {
                for channel in 0..k.min(1 + token) {
                    let place = token * k + (channel * 37 + seed as usize % 64) % k;
                    input[place] = f16::from_bits(words[place]);
                }
            }
            let cut = (first % blocks).max(1) * 64;
            prop_assume!(cut < k);
            let input = QuantizeInput::new(&input, 4, k);
            let [whole, parts] = both::<f16, f32>(&layer, &input, &[cut]);
            let [whole, parts] = [whole.unwrap(), parts.unwrap()];
            prop_assert_eq!(bytes(&whole), bytes(&parts));
        }
    }

    #[test]
    fn a_value_that_is_not_finite_makes_its_token_nan_whichever_shard_has_it() {
        let (m, n, k) = (8, 66, 256);
        let layer = layer(n, k, Group::K(64), [false, false]);
        let mut input: Vec<bf16> = values(3, m * k).map(bf16::from_f32).collect();
        let bad = [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
        for (token, value) in bad.into_iter().enumerate() {
            input[token * k + token * 70] = bf16::from_f32(value);
        }
        // A token of zeros, and one with zeros in a shard.
        input[5 * k..6 * k].fill(bf16::ZERO);
        input[6 * k + 64..][..64].fill(bf16::ZERO);
        let given: Vec<f32> = (0..m).map(|row| [0.01, 0.0, -0.02, f32::NAN][row % 4]).collect();
        for scaling in [Scaling::PerToken, Scaling::Static(0.01), Scaling::Given(&given[..])] {
            let input = QuantizeInput { scaling, ..QuantizeInput::new(&input, m, k) };
            for cuts in [&[64, 128, 192][..], &[128], &[192]] {
                expect_same_bits::<_, bf16>(&layer, &input, cuts);
                expect_same_bits::<_, f32>(&layer, &input, cuts);
                // The raw sums of such a token are 0 in all shards, as in the whole layer.
                expect_same_bits::<_, i32>(&layer, &input, cuts);
            }
            let [_, parts] = both::<_, f32>(&layer, &input, &[64]);
            assert!(parts.unwrap()[..4 * n].iter().all(|y| y.is_nan()), "{scaling:?}");
        }
    }

    #[test]
    fn subnormal_scales_are_shared_like_all_others() {
        let (m, n, k) = (40, 3, 128);
        let layer = layer(n, k, Group::K(64), [false, true]);
        // Smoothing factors of up to 2.25 take the smallest values of bf16 below the smallest scale.
        let input: Vec<bf16> =
            (0..m * k).map(|i| bf16::from_bits((i / k * 3) as u16 + (i % k % 7) as u16)).collect();
        expect_same_bits::<_, f32>(&layer, &QuantizeInput::new(&input, m, k), &[64]);
    }

    #[test]
    fn no_tokens_give_no_output() {
        let layer = layer(10, 128, Group::K(64), [true, false]);
        let input: [bf16; 0] = [];
        expect_same_bits::<_, f32>(&layer, &QuantizeInput::new(&input, 0, 128), &[64]);
    }

    #[test]
    fn shards_that_do_not_belong_together_are_refused() {
        let whole = layer(10, 128, Group::K(64), [true, false]);
        let shards = [whole.input_shard(0..64).unwrap(), whole.input_shard(64..128).unwrap()];
        let x = vec![bf16::ONE; 2 * 64];
        let input = QuantizeInput::new(&x, 2, 64);
        let run = |shards: &[Linear], inputs: &[QuantizeInput<'_, bf16>]| {
            row_parallel::<_, f32, _>(shards, inputs).unwrap_err()
        };
        assert!(matches!(run(&[], &[]), Error::NoShards));
        assert!(matches!(run(&shards, &[input]), Error::ShapeMismatch { what: "inputs", .. }));
        let norm =
            QuantizeInput { operation: Operation::RmsNorm { weight: &x[..64], epsilon: 0.0 }, ..input };
        assert!(matches!(run(&shards, &[input, norm]), Error::NormOfShard));
        let fewer = QuantizeInput::new(&x[..64], 1, 64);
        assert!(matches!(
            run(&shards, &[input, fewer]),
            Error::ShardsDiffer { shard: 1, what: "number of tokens", .. }
        ));
        let unlike = |other: Linear| run(&[shards[0].clone(), other], &[input; 2]);
        let other = |n: usize| layer(n, 64, Group::K(64), [true, false]);
        assert!(matches!(unlike(other(9)), Error::ShardsDiffer { what: "n", .. }));
        assert!(matches!(unlike(other(10)), Error::ShardsDiffer { what: "channel scale", .. }));
        let without = Linear::new(shards[1].weights().clone());
        assert!(matches!(unlike(without.clone()), Error::ShardsDiffer { what: "bias", .. }));
        let another = without.with_bias(vec![9.0; 10]).unwrap();
        assert!(matches!(unlike(another), Error::ShardsDiffer { what: "bias", .. }));
        let raw = row_parallel::<_, i32, _>(&shards, &[input; 2]);
        assert!(matches!(raw, Err(Error::BiasWithRawOutput)));
        let long = layer(1, 65_600, Group::K(64), [false, false]);
        let x = vec![bf16::ONE; 65_600];
        let input = QuantizeInput::new(&x, 1, 65_600);
        let error = row_parallel::<_, f32, _>(&[&long, &long], &[input; 2]).unwrap_err();
        assert!(matches!(error, Error::KTooLarge { k: 131_200 }));
    }
}
