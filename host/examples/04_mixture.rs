//! A mixture-of-experts layer on the CPU: rows sorted by expert, one grouped GEMM, and the combine.
//! On a GPU, `Gpu::grouped_gemm` and `Gpu::combine` give the same bits.
//!
//! `cargo run --release -p liquidgemm --example 04_mixture`

use half::bf16;
use liquidgemm::cpu::{self, RowIndex};
use liquidgemm::{Group, PackedWeights, QuantizedActivations};

fn main() -> Result<(), liquidgemm::Error> {
    let (experts, tokens, top_k, n, k) = (8, 5, 2, 192, 256);
    let wave = |i: usize, step: f32| (i as f32 * step).sin();
    let packed: Vec<PackedWeights> = (0..experts)
        .map(|expert| {
            let weights: Vec<f32> = (0..n * k).map(|i| wave(i + expert * 7919, 0.71)).collect();
            PackedWeights::quantize(&weights, n, k, Group::default())
        })
        .collect::<Result<_, _>>()?;
    let x: Vec<f32> = (0..tokens * k).map(|i| wave(i, 0.13)).collect();

    // The router: which experts each token goes to, and with which weights.
    let chosen = |token: usize, j: usize| (token * 3 + j * 5) % experts;
    let weights: Vec<f32> = (0..tokens * top_k).map(|i| 0.25 + 0.5 * (i % 2) as f32).collect();

    // Sort the choices by expert. An expert may have no rows.
    let mut choices: Vec<(usize, usize)> =
        (0..tokens).flat_map(|token| (0..top_k).map(move |j| (token, j))).collect();
    choices.sort_by_key(|&(token, j)| chosen(token, j));
    let mut offsets = vec![0i32; experts + 1];
    let mut positions = vec![-1i32; tokens * top_k];
    let mut rows = Vec::new();
    for (row, &(token, j)) in choices.iter().enumerate() {
        offsets[chosen(token, j) + 1..].iter_mut().for_each(|end| *end = row as i32 + 1);
        positions[token * top_k + j] = row as i32;
        rows.extend_from_slice(&x[token * k..][..k]);
    }

    let quantized = QuantizedActivations::quantize(&rows, choices.len(), k)?;
    let mut products = vec![bf16::ZERO; choices.len() * n];
    cpu::grouped_gemm(&packed, &quantized, RowIndex::Offsets(&offsets), None, &mut products)?;
    let mut y = vec![bf16::ZERO; tokens * n];
    cpu::combine(&products, &positions, &weights, [n, top_k], &mut y)?;

    // A row has the bits of a product of its own.
    let (token, j) = (3, 1);
    let alone = QuantizedActivations::quantize(&x[token * k..][..k], 1, k)?;
    let mut expected = vec![bf16::ZERO; n];
    cpu::gemm(&packed[chosen(token, j)], &alone, None, &mut expected)?;
    let row = positions[token * top_k + j] as usize;
    assert_eq!(products[row * n..][..n], expected);
    println!("[{tokens}, {n}] bf16 from {} rows of {experts} experts, offsets {offsets:?}", choices.len());
    Ok(())
}
