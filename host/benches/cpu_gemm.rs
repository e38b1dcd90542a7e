//! Benchmarks the CPU backend against plain triple loops, on a decoding shape and on a prefill shape.
//!
//! * `gemm` is `liquidgemm::cpu::gemm` on all cores, from packed weights to f32 output.
//! * `packed triple loop` implements the format's definition directly, on one thread.
//!   For each token, channel and k it looks up the code and the pair in the packed weights.
//!   It dequantizes this one weight, multiplies and adds. Its epilogue is that of `gemm`.
//! * `unpacked triple loop` reads weights that were unpacked to int8 beforehand (one byte a weight),
//!   on one thread.
//!   The compiler may vectorize its inner loop for the target's baseline.
//!
//! Times are for a whole product. The throughput counts multiply-adds.

// Criterion's macros generate functions without documentation.
#![allow(missing_docs)]

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use liquidgemm::{Group, Output, PackedWeights, QuantizedActivations, cpu};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// `(m, n, k)`.
const SHAPES: [(usize, usize, usize); 2] = [(1, 4096, 4096), (256, 1024, 1024)];

fn packed_triple_loop(weights: &PackedWeights, x: &QuantizedActivations, out: &mut [f32]) {
    let n = weights.n();
    for token in 0..x.m() {
        let row = x.row(token);
        for channel in 0..n {
            let mut acc = 0i32;
            for (k, &x) in row.iter().enumerate() {
                acc += i32::from(x) * i32::from(weights.int8_weight(channel, k));
            }
            let channel_scale = weights.channel_scales()[channel];
            out[token * n + channel] = f32::from_accumulator(acc, channel_scale, x.scales()[token], None);
        }
    }
}

fn unpacked_triple_loop(unpacked: &[i8], weights: &PackedWeights, x: &QuantizedActivations, out: &mut [f32]) {
    let (n, k) = (weights.n(), weights.k());
    for token in 0..x.m() {
        let row = x.row(token);
        for channel in 0..n {
            let mut acc = 0i32;
            for (&x, &weight) in row.iter().zip(&unpacked[channel * k..][..k]) {
                acc += i32::from(x) * i32::from(weight);
            }
            let channel_scale = weights.channel_scales()[channel];
            out[token * n + channel] = f32::from_accumulator(acc, channel_scale, x.scales()[token], None);
        }
    }
}

fn cpu_gemm(criterion: &mut Criterion) {
    println!("kernel: {}, {} threads", cpu::Kernel::best(), rayon::current_num_threads());
    for (m, n, k) in SHAPES {
        let mut random = StdRng::seed_from_u64(1);
        let weights: Vec<f32> = (0..n * k).map(|_| random.random_range(-1.0..1.0)).collect();
        let weights = PackedWeights::quantize(&weights, n, k, Group::default()).unwrap();
        let x: Vec<f32> = (0..m * k).map(|_| random.random_range(-1.0..1.0)).collect();
        let x = QuantizedActivations::quantize(&x, m, k).unwrap();
        let unpacked: Vec<i8> = (0..n)
            .flat_map(|channel| (0..k).map(move |i| (channel, i)))
            .map(|(c, i)| weights.int8_weight(c, i))
            .collect();

        let mut expected = vec![0.0; m * n];
        packed_triple_loop(&weights, &x, &mut expected);
        let mut out = vec![f32::NAN; m * n];
        cpu::gemm(&weights, &x, None, &mut out).unwrap();
        assert_eq!(out, expected);
        unpacked_triple_loop(&unpacked, &weights, &x, &mut out);
        assert_eq!(out, expected);

        let mut group = criterion.benchmark_group("cpu_gemm");
        group.sample_size(10).throughput(Throughput::Elements((m * n * k) as u64));
        let shape = format!("{m}x{n}x{k}");
        group.bench_function(BenchmarkId::new("gemm", &shape), |bencher| {
            bencher.iter(|| cpu::gemm(black_box(&weights), black_box(&x), None, &mut out).unwrap());
        });
        group.bench_function(BenchmarkId::new("unpacked triple loop", &shape), |bencher| {
            bencher.iter(|| {
                unpacked_triple_loop(black_box(&unpacked), black_box(&weights), black_box(&x), &mut out);
            });
        });
        group.bench_function(BenchmarkId::new("packed triple loop", &shape), |bencher| {
            bencher.iter(|| packed_triple_loop(black_box(&weights), black_box(&x), &mut out));
        });
        group.finish();
    }
}

criterion_group!(benches, cpu_gemm);
criterion_main!(benches);
