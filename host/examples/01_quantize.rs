//! Quantizes a weight matrix, saves and loads it, and multiplies on the CPU.
//! Needs neither a GPU nor the feature `gpu`.
//!
//! `cargo run --release -p liquidgemm --example 01_quantize`

use liquidgemm::{Group, PackedWeights, QuantizedActivations, cpu};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let (m, n, k) = (4, 256, 512);
    // Row-major: weights [n, k], activations [m, k].
    let weights: Vec<f32> = (0..n * k).map(|i| (i as f32 * 0.37).sin()).collect();
    let activations: Vec<f32> = (0..m * k).map(|i| (i as f32 * 0.11).cos()).collect();

    // Offline: 4-bit codes, an (s, a) pair per 64 weights of a channel, and one f32 scale per channel.
    let packed = PackedWeights::quantize(&weights, n, k, Group::default())?;
    println!("{} bytes instead of {} in bf16", packed.bytes(), 2 * n * k);

    // The same weights give the same bytes every time.
    // `save` replaces a file in one step, or leaves it as it was.
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("layer.safetensors");
    packed.save(&path)?;
    let packed = PackedWeights::load(&path)?;

    // At run time: int8 activations with one f32 scale per token, then the product with a bias.
    let quantized = QuantizedActivations::quantize(&activations, m, k)?;
    let bias = vec![0.5; n];
    let mut y = vec![0f32; m * n];
    cpu::gemm(&packed, &quantized, Some(&bias), &mut y)?;

    let mut squares = [0.0; 2];
    for (token, y) in y.chunks(n).enumerate() {
        for (channel, &y) in y.iter().enumerate() {
            let row = |matrix: &[f32], index: usize| matrix[index * k..][..k].to_vec();
            let products = row(&activations, token).into_iter().zip(row(&weights, channel));
            let exact = products.map(|(x, w)| x * w).sum::<f32>() + 0.5;
            squares[0] += (y - exact).powi(2);
            squares[1] += exact.powi(2);
        }
    }
    let error = (squares[0] / squares[1]).sqrt();
    println!("relative error of the product: {:.1} %", error * 100.0);
    assert!(error < 0.2, "a wrong layout or scale would give about 100 %");
    Ok(())
}
