//! Multiplies on the GPU if there is one, otherwise on the CPU. Both give the same bits.
//!
//! `cargo run --release -p liquidgemm --example 02_backend`

use half::bf16;
use liquidgemm::{Backend, Group, PackedWeights, QuantizedActivations};

fn main() -> Result<(), liquidgemm::Error> {
    let (m, n, k) = (33, 1000, 1024);
    let weights: Vec<f32> = (0..n * k).map(|i| (i as f32 * 0.71).sin()).collect();
    let activations: Vec<f32> = (0..m * k).map(|i| (i as f32 * 0.13).cos()).collect();
    let packed = PackedWeights::quantize(&weights, n, k, Group::K(128))?;
    let quantized = QuantizedActivations::quantize(&activations, m, k)?;

    let backend = Backend::auto();
    println!("{backend}, because {}", backend.reason());
    let y = backend.multiply::<bf16>(&packed, &quantized, None)?;
    let on_cpu = Backend::cpu().multiply::<bf16>(&packed, &quantized, None)?;
    assert_eq!(y, on_cpu);

    // A token's result does not depend on its batch: alone it has the same bits.
    let first = QuantizedActivations::quantize(&activations[..k], 1, k)?;
    assert_eq!(backend.multiply::<bf16>(&packed, &first, None)?, y[..n]);
    println!("[{m}, {n}] bf16, the same bits on the CPU and for a single token");
    Ok(())
}
