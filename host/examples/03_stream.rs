//! Shows how a server calls the library: weights stay on the GPU, launches go to the caller's stream.
//! A launch returns at once and allocates nothing.
//!
//! `cargo run --release -p liquidgemm --example 03_stream`

use std::ops::RangeInclusive;

use cust::memory::{CopyDestination, DeviceBuffer};
use cust::stream::{Stream, StreamFlags};
use liquidgemm::gpu::{Gpu, Operands};
use liquidgemm::{Group, OutputType, PackedWeights, QuantizedActivations, cpu};

/// The batch sizes that the server expects.
const BATCHES: RangeInclusive<usize> = 1..=16;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let gpu = match Gpu::new() {
        Ok(gpu) => gpu,
        Err(error) => {
            println!("skipped: {error}");
            return Ok(());
        }
    };
    let (n, k) = (4096, 4096);
    let weights: Vec<f32> = (0..n * k).map(|i| (i as f32 * 0.71).sin()).collect();
    let packed = PackedWeights::quantize(&weights, n, k, Group::default())?;

    // Once, at startup: upload the weights, allocate one workspace per stream,
    // make the plans and compile the kernels.
    let device_weights = gpu.upload(&packed)?;
    let workspace = gpu.workspace()?;
    gpu.prepare(&[[n, k]], BATCHES)?;
    // `cust` creates streams and buffers in the current context.
    gpu.make_current()?;
    let stream = Stream::new(StreamFlags::NON_BLOCKING, None)?;

    for m in BATCHES {
        let activations: Vec<f32> = (0..m * k).map(|i| ((i + m) as f32 * 0.13).cos()).collect();
        let quantized = QuantizedActivations::quantize(&activations, m, k)?;
        let codes = DeviceBuffer::from_slice(quantized.data())?;
        let scales = DeviceBuffer::from_slice(quantized.scales())?;
        let output = DeviceBuffer::<f32>::zeroed(m * n)?;
        let operands = Operands {
            m,
            activations: (&codes).into(),
            activation_stride: quantized.stride(),
            token_scales: (&scales).into(),
            bias: None,
            output: (&output).into(),
            output_stride: n,
            output_type: OutputType::F32,
        };
        // SAFETY: the buffers, weights and workspace live until the stream has been synchronized,
        // and nothing else uses them.
        unsafe { gpu.gemm(&device_weights, &operands, &workspace, &stream)? };
        stream.synchronize()?;

        let mut y = vec![0.0; m * n];
        output.copy_to(&mut y)?;
        let mut expected = vec![0.0; m * n];
        cpu::gemm(&packed, &quantized, None, &mut expected)?;
        assert_eq!(y, expected, "m = {m}");
    }
    println!("{}: m = {BATCHES:?}, bit for bit the CPU's results", gpu.description());
    Ok(())
}
