//! Compares every kernel with a plain triple loop in 64-bit integers over the dequantized weights.

use half::{bf16, f16};
use proptest::prelude::*;

use super::*;
use crate::{Group, QuantizedActivations};

/// A minimal random generator: splitmix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }
}

/// Returns random weights of the format, with pairs from the whole range of the invariant.
fn any_weights(n: usize, k: usize, group: Group, random: &mut Random) -> PackedWeights {
    let groups = group.count(k).unwrap();
    let codes: Vec<u8> = (0..n * k).map(|_| random.below(16) as u8).collect();
    let pairs: Vec<(u8, u8)> = (0..n * groups)
        .map(|_| {
            let s = 1 + random.below(17);
            (s as u8, random.below(256 - 15 * s) as u8)
        })
        .collect();
    let scales = (0..n).map(|_| random.below(1000) as f32 * 1e-5).collect();
    PackedWeights::pack(&codes, &pairs, scales, n, k, group).unwrap()
}

fn any_activations(m: usize, k: usize, random: &mut Random) -> QuantizedActivations {
    let codes: Vec<i8> = (0..m * k).map(|_| (random.below(256) as i32 - 128) as i8).collect();
    let scales = (0..m).map(|_| random.below(1000) as f32 * 1e-4).collect();
    QuantizedActivations::from_parts(&codes, scales, m, k).unwrap()
}

/// Computes the product by its definition: unpacked, in 64 bits, on one thread.
fn triple_loop(weights: &PackedWeights, x: &QuantizedActivations) -> Vec<i64> {
    let unpacked = weights.unpack();
    let (n, k) = (weights.n(), weights.k());
    let groups = unpacked.pairs.len() / n;
    let group_k = weights.group().blocks(k).unwrap() * BRICK_K;
    let mut products = vec![0i64; x.m() * n];
    for token in 0..x.m() {
        for channel in 0..n {
            for i in 0..k {
                let (s, a) = unpacked.pairs[channel * groups + i / group_k];
                let weight = unpacked.codes[channel * k + i] as i64 * s as i64 + a as i64 - 128;
                products[token * n + channel] += weight * x.data()[token * x.stride() + i] as i64;
            }
        }
    }
    products
}

fn check_every_kernel(n: usize, k: usize, m: usize, group: Group, seed: u64) {
    let mut random = Random(seed);
    let weights = any_weights(n, k, group, &mut random);
    let x = any_activations(m, k, &mut random);
    let exact = triple_loop(&weights, &x);
    for kernel in Kernel::available() {
        let mut out = vec![i32::MIN; m * n];
        multiply(kernel, &weights, &x.view(), None, &mut out);
        let wrong = out.iter().zip(&exact).position(|(&got, &exact)| i64::from(got) != exact);
        if let Some(index) = wrong {
            panic!(
                "{kernel}: [{m}, {n}, {k}] group {group}: token {}, channel {}: {} instead of {}",
                index / n,
                index % n,
                out[index],
                exact[index]
            );
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn every_kernel_gives_the_exact_integers_of_a_plain_triple_loop(
        n in 1usize..200,
        k in 1usize..700,
        m in 1usize..40,
        group in prop_oneof![
            Just(Group::K(64)), Just(Group::K(128)), Just(Group::K(256)), Just(Group::Channel)
        ],
        seed: u64,
    ) {
        check_every_kernel(n, k, m, group, seed);
    }
}

#[test]
fn every_k_tail_and_every_channel_tail_is_exact() {
    for tail in 1..=64 {
        check_every_kernel(3, 256 + tail, 3, Group::default(), tail as u64);
        check_every_kernel(64 + tail, 5, 3, Group::default(), tail as u64);
    }
}

#[test]
fn every_count_of_tokens_around_the_block_sizes_is_exact() {
    for m in (1..=20).chain([63, 64, 65, 255, 256, 257, 1023, 1024, 1025]) {
        check_every_kernel(70, 70, m, Group::default(), m as u64);
    }
    // Enough strips for the long token block.
    check_every_kernel(64 * 4 * rayon::current_num_threads(), 3, 300, Group::default(), 9);
}

#[test]
fn the_largest_k_with_every_product_at_its_limit_does_not_wrap() {
    let k = 131_072;
    // Code 0 with a = 0 represents −128, the largest magnitude of the format.
    let weights = PackedWeights::pack(&vec![0; k], &[(1, 0)], vec![1.0], 1, k, Group::Channel).unwrap();
    for code in [-127i8, 127] {
        let x = QuantizedActivations::from_parts(&vec![code; k], vec![1.0], 1, k).unwrap();
        for kernel in Kernel::available() {
            let mut out = [0i32];
            multiply(kernel, &weights, &x.view(), None, &mut out);
            assert_eq!(i64::from(out[0]), -128 * i64::from(code) * k as i64, "{kernel}");
        }
    }
}

#[test]
fn the_only_sum_that_wraps_does_so_in_every_kernel() {
    let k = 131_072;
    let weights = PackedWeights::pack(&vec![0; k], &[(1, 0)], vec![1.0], 1, k, Group::Channel).unwrap();
    // The sum is 2³¹ at the largest K, which int32 cannot hold. One product less fits.
    for (least, sum) in [(k, i32::MIN), (k - 1, i32::MAX - 16_383)] {
        let mut codes = vec![0i8; k];
        codes[..least].fill(i8::MIN);
        let x = QuantizedActivations::from_parts(&codes, vec![1.0], 1, k).unwrap();
        for kernel in Kernel::available() {
            let mut out = [0i32];
            multiply(kernel, &weights, &x.view(), None, &mut out);
            assert_eq!(out[0], sum, "{kernel}");
        }
    }
}

#[test]
fn no_tokens_are_no_work() {
    let weights = PackedWeights::quantize(&[1.0f32; 6], 2, 3, Group::default()).unwrap();
    let none = QuantizedActivations::quantize::<f32>(&[], 0, 3).unwrap();
    gemm::<f32>(&weights, &none, None, &mut []).unwrap();
    assert!(matches!(gemm(&weights, &none, None, &mut [0f32]), Err(Error::ShapeMismatch { .. })));
}

#[test]
fn the_epilogue_rounds_each_step_once_for_every_output_type() {
    let mut random = Random(7);
    let (n, k, m) = (70, 200, 9);
    let weights = any_weights(n, k, Group::default(), &mut random);
    let x = any_activations(m, k, &mut random);
    let bias: Vec<f32> = (0..n).map(|_| random.below(2000) as f32 * 1e-3 - 1.0).collect();
    let exact = triple_loop(&weights, &x);

    // Each step in f64, then rounded to f32.
    // That is exact for one operation on f32 operands, and it excludes an FMA.
    let reference = |index: usize, bias: Option<&[f32]>| {
        let (token, channel) = (index / n, index % n);
        let acc = exact[index] as f32;
        let scaled = (f64::from(acc) * f64::from(weights.channel_scales()[channel])) as f32;
        let y = (f64::from(scaled) * f64::from(x.scales()[token])) as f32;
        bias.map_or(y, |bias| (f64::from(y) + f64::from(bias[channel])) as f32)
    };
    fn check<T: Output>(
        weights: &PackedWeights,
        x: &QuantizedActivations,
        bias: Option<&[f32]>,
        expected: impl Fn(usize) -> T,
    ) {
        let mut out = vec![T::zeroed(); x.m() * weights.n()];
        gemm(weights, x, bias, &mut out).unwrap();
        for (index, y) in out.into_iter().enumerate() {
            assert_eq!(y, expected(index), "{} at {index}", T::TYPE);
        }
    }
    for bias in [None, Some(&bias[..])] {
        check::<f32>(&weights, &x, bias, |index| reference(index, bias));
        check::<bf16>(&weights, &x, bias, |index| bf16::from_f32(reference(index, bias)));
        check::<f16>(&weights, &x, bias, |index| f16::from_f32(reference(index, bias)));
    }
    check::<i32>(&weights, &x, None, |index| exact[index] as i32);
}

/// Bytes between two inaccessible pages. They begin right after the first, or end right before the second.
struct Guarded {
    memory: region::Allocation,
    offset: usize,
    length: usize,
}

impl Guarded {
    fn new(bytes: &[u8], at_the_end: bool) -> Self {
        let page = region::page::size();
        let room = bytes.len().next_multiple_of(page);
        let mut memory = region::alloc(room + 2 * page, region::Protection::READ_WRITE).unwrap();
        let offset = if at_the_end { page + room - bytes.len() } else { page };
        let start = memory.as_mut_ptr::<u8>();
        // SAFETY: the offset and the bytes lie in the allocation; the guards are separate pages of it.
        unsafe {
            start.add(offset).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
            region::protect(start, page, region::Protection::NONE).unwrap();
            region::protect(start.add(page + room), page, region::Protection::NONE).unwrap();
        }
        Self { memory, offset, length: bytes.len() }
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: these bytes were written and lie outside the guard pages.
        unsafe { std::slice::from_raw_parts(self.memory.as_ptr::<u8>().add(self.offset), self.length) }
    }
}

#[test]
fn no_kernel_reads_beyond_its_operands() {
    let mut random = Random(11);
    for (m, k) in [1, 2, 3, 7, 8, 9, 17].into_iter().flat_map(|m| [1, 63, 64, 65, 200, 256].map(|k| (m, k))) {
        let weights = any_weights(64, k, Group::default(), &mut random);
        let x = any_activations(m, k, &mut random);
        let codes: Vec<u8> = (0..m).flat_map(|token| x.row(token)).map(|&code| code as u8).collect();
        let exact = triple_loop(&weights, &x);
        for at_the_end in [false, true] {
            let guard = |bytes: &[u8]| Guarded::new(bytes, at_the_end);
            let bricks: Vec<[Guarded; 2]> = (0..weights.k_blocks())
                .map(|block| weights.brick(0, block))
                .map(|brick| [guard(brick.codes), guard(brick.pairs)])
                .collect();
            let bricks: Vec<Brick<'_>> = bricks
                .iter()
                .map(|[codes, pairs]| Brick {
                    codes: codes.bytes().try_into().unwrap(),
                    pairs: pairs.bytes().try_into().unwrap(),
                })
                .collect();
            let codes = guard(&codes);
            let view =
                ActivationsView::new(bytemuck::cast_slice(codes.bytes()), k, x.scales(), m, k).unwrap();
            for kernel in Kernel::available() {
                let mut task = Task { accumulators: vec![[0; BRICK_CHANNELS]; m], ..Task::default() };
                let tokens = TokenBlock { x: &view, first: 0, count: m };
                kernel.accumulate(&bricks, &tokens, 0, &mut task);
                let sums = task.accumulators.as_flattened().iter().map(|&sum| i64::from(sum));
                assert!(sums.eq(exact.iter().copied()), "{kernel}: m = {m}, k = {k}");
            }
        }
    }
}

#[test]
fn no_kernel_writes_beyond_the_output() {
    let mut random = Random(12);
    let (n, k) = (70, 100);
    let weights = any_weights(n, k, Group::default(), &mut random);
    for m in [1, 3, 64, 65] {
        let x = any_activations(m, k, &mut random);
        let exact = triple_loop(&weights, &x);
        for at_the_end in [false, true] {
            let mut out = Guarded::new(&vec![0xFF; m * n * 4], at_the_end);
            let start = out.memory.as_mut_ptr::<u8>();
            // SAFETY: these bytes were written, lie outside the guard pages, are 4-byte aligned,
            // and are borrowed nowhere else.
            let out = unsafe { std::slice::from_raw_parts_mut(start.add(out.offset).cast::<i32>(), m * n) };
            for kernel in Kernel::available() {
                out.fill(i32::MIN);
                multiply(kernel, &weights, &x.view(), None, out);
                assert!(out.iter().map(|&sum| i64::from(sum)).eq(exact.iter().copied()), "{kernel}: m = {m}");
            }
        }
    }
}
