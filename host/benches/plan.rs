//! Benchmarks `Plan::new`, which a GEMM pays once for each new batch size.
//!
//! Most batch sizes lie between round numbers.
//! The last two problems are among the slowest of about 6,600 tested ones.
//!
//! `cargo bench -p liquidgemm --bench plan`

// Criterion's macros generate functions without documentation.
#![allow(missing_docs)]

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use liquidgemm::{DeviceFigures, Plan, Problem};

/// `[m, n, k]`. The last two are the slow ones.
const PROBLEMS: [[usize; 3]; 8] = [
    [1, 4096, 4096],
    [17, 12_288, 4096],
    [100, 8192, 8192],
    [333, 28_672, 4096],
    [700, 57_344, 8192],
    [4000, 22_016, 4096],
    [1104, 10_240, 5000],
    [2544, 5120, 14_336],
];

fn plan(criterion: &mut Criterion) {
    let figures = DeviceFigures::H100_SXM;
    let mut group = criterion.benchmark_group("plan");
    for [m, n, k] in PROBLEMS {
        let id = BenchmarkId::from_parameter(format!("{m}x{n}x{k}"));
        group.bench_function(id, |bencher| bencher.iter(|| Plan::new(Problem { m, n, k }, &figures)));
    }
    group.finish();
}

criterion_group!(benches, plan);
criterion_main!(benches);
