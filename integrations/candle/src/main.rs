//! A linear layer of the library as an operation of candle: bf16 tensors in and out, on the CPU or on the GPU.
//!
//! - `cargo run --release` runs it on the CPU.
//! - `cargo run --release --features cuda` runs it on the GPU, and compares it with the CPU. Building it needs nvcc,
//!   for candle's own kernels.

mod layer;

use candle_core::{DType, Device, Tensor};
use liquidgemm::{Group, Linear, PackedWeights};

use crate::layer::LiquidLinear;

fn main() -> anyhow::Result<()> {
    let (m, n, k) = (16, 1024, 1024);
    let weights: Vec<f32> = (0..n * k).map(|i| (i as f32 * 0.71).sin()).collect();
    let linear = || anyhow::Ok(Linear::new(PackedWeights::quantize(&weights, n, k, Group::default())?));
    let input: Vec<f32> = (0..m * k).map(|i| (i as f32 * 0.13).cos()).collect();

    let on = |device: &Device| {
        let layer = LiquidLinear::new(linear()?, device)?;
        let x = Tensor::from_slice(&input, (m, k), device)?.to_dtype(DType::BF16)?;
        anyhow::Ok(layer.forward(&x)?.to_dtype(DType::F32)?.to_vec2::<f32>()?)
    };
    let on_cpu = on(&Device::Cpu)?;
    println!("CPU: y[0][..4] = {:?}", &on_cpu[0][..4]);
    if cfg!(feature = "cuda") {
        anyhow::ensure!(on(&Device::new_cuda(0)?)? == on_cpu, "the GPU's bits differ from the CPU's");
        println!("GPU: the same bits");
    }
    Ok(())
}
