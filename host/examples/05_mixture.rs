//! A whole mixture-of-experts layer on the CPU: gather and quantize, gate and up of each expert,
//! SiLU · mul and quantize, down, and the weighted sum of each token's experts.
//! On a GPU, `Gpu::quantize`, `Gpu::grouped_gemm` and `Gpu::combine` give the same bits.
//!
//! `cargo run --release -p liquidgemm --example 05_mixture`

use half::bf16;
use liquidgemm::cpu::{self, QuantizeInput, RowIndex};
use liquidgemm::{Gate, GateOrder, Gather, Group, Linear, Operation, PackedWeights};

const EXPERTS: usize = 8;
const TOKENS: usize = 5;
const TOP_K: usize = 2;
const HIDDEN: usize = 256;
const INNER: usize = 192;

fn main() -> Result<(), liquidgemm::Error> {
    let wave = |i: usize, step: f32| (i as f32 * step).sin();
    let experts = |n: usize, k: usize, step: f32| {
        let of_expert = |expert: usize| {
            let weights: Vec<f32> = (0..n * k).map(|i| wave(i + expert * 7919, step)).collect();
            PackedWeights::quantize(&weights, n, k, Group::default())
        };
        (0..EXPERTS).map(of_expert).collect::<Result<Vec<_>, _>>()
    };
    let (gate_up, down) = (experts(2 * INNER, HIDDEN, 0.71)?, experts(HIDDEN, INNER, 0.37)?);
    let x: Vec<bf16> = (0..TOKENS * HIDDEN).map(|i| bf16::from_f32(wave(i, 0.13))).collect();

    // The router: which experts each token goes to, and with which weights.
    let chosen = |token: usize, j: usize| (token * 3 + j * 5) % EXPERTS;
    let weights: Vec<f32> = (0..TOKENS * TOP_K).map(|i| 0.25 + 0.5 * (i % 2) as f32).collect();

    // Sort the choices by expert. An expert may have no rows.
    let mut choices: Vec<(usize, usize)> =
        (0..TOKENS).flat_map(|token| (0..TOP_K).map(move |j| (token, j))).collect();
    choices.sort_by_key(|&(token, j)| chosen(token, j));
    let mut offsets = vec![0i32; EXPERTS + 1];
    let mut positions = vec![-1i32; TOKENS * TOP_K];
    for (row, &(token, j)) in choices.iter().enumerate() {
        offsets[chosen(token, j) + 1..].iter_mut().for_each(|end| *end = row as i32 + 1);
        positions[token * TOP_K + j] = row as i32;
    }
    let sources: Vec<u32> = choices.iter().map(|&(token, _)| token as u32).collect();
    let (rows, index) = (choices.len(), RowIndex::Offsets(&offsets));

    let gather = Some(Gather { rows: &sources[..], input_rows: TOKENS });
    let gathered = QuantizeInput { gather, ..QuantizeInput::new(&x, rows, HIDDEN) };
    let mut inner = vec![bf16::ZERO; rows * 2 * INNER];
    cpu::grouped_gemm(&gate_up, &cpu::quantize(&gathered, None)?, index, None, &mut inner)?;
    let operation = Operation::Gated { gate: Gate::Silu, order: GateOrder::Halves };
    let activated =
        QuantizeInput { operation, input_stride: 2 * INNER, ..QuantizeInput::new(&inner, rows, INNER) };
    let mut products = vec![bf16::ZERO; rows * HIDDEN];
    cpu::grouped_gemm(&down, &cpu::quantize(&activated, None)?, index, None, &mut products)?;
    let mut y = vec![bf16::ZERO; TOKENS * HIDDEN];
    cpu::combine(&products, &positions, &weights, [HIDDEN, TOP_K], &mut y)?;

    // A row has the bits of layers of its own.
    let (token, j) = (3, 1);
    let expert = chosen(token, j);
    let alone = QuantizeInput::new(&x[token * HIDDEN..][..HIDDEN], 1, HIDDEN);
    let inner: Vec<bf16> = Linear::new(gate_up[expert].clone()).forward(&alone, None)?;
    let alone = QuantizeInput { operation, input_stride: 2 * INNER, ..QuantizeInput::new(&inner, 1, INNER) };
    let expected: Vec<bf16> = Linear::new(down[expert].clone()).forward(&alone, None)?;
    let row = positions[token * TOP_K + j] as usize;
    assert_eq!(products[row * HIDDEN..][..HIDDEN], expected);
    println!("[{TOKENS}, {HIDDEN}] bf16 from {rows} rows of {EXPERTS} experts, offsets {offsets:?}");
    Ok(())
}
