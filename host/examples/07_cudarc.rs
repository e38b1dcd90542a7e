//! Shows how a program with `cudarc` calls the library: context, stream and all device memory are `cudarc`'s.
//!
//! Both retain the GPU's primary context, so addresses and streams of one are valid for the other.
//!
//! `cargo run --release -p liquidgemm --example 07_cudarc`

use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr};
use half::bf16;
use liquidgemm::cpu::QuantizeInput;
use liquidgemm::gpu::{DeviceSpan, Gpu, LinearInput, LinearOutput, StreamHandle};
use liquidgemm::{Group, HalfType, Linear, Operation, OutputType, PackedWeights};

/// The GPU that both libraries open.
const ORDINAL: u32 = 0;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // First, because `cudarc` panics on a machine without the driver.
    let gpu = match Gpu::with_device(ORDINAL) {
        Ok(gpu) => gpu,
        Err(error) => {
            println!("skipped: {error}");
            return Ok(());
        }
    };
    let context = CudaContext::new(ORDINAL as usize)?;
    let stream = context.new_stream()?;

    let (m, n, k) = (16, 4096, 4096);
    let weights: Vec<f32> = (0..n * k).map(|i| (i as f32 * 0.71).sin()).collect();
    let layer = Linear::new(PackedWeights::quantize(&weights, n, k, Group::default())?);

    // Once, at startup. Weights and workspace lie in slices of `cudarc`.
    let weight_memory = stream.clone_htod(&layer.weights().device_bytes()?)?;
    let workspace_memory = stream.alloc_zeros::<u8>(gpu.workspace_bytes())?;
    stream.synchronize()?;
    // SAFETY: the slices are declared before what borrows them, so they are dropped after it,
    // and nothing else writes them.
    let (on_device, workspace) = unsafe {
        let weights = gpu.weights_in(span(&weight_memory, &stream), [n, k], layer.weights().group())?;
        (gpu.linear_of(weights, None, None)?, gpu.workspace_in(span(&workspace_memory, &stream))?)
    };
    on_device.prepare(&gpu, &Operation::Plain, HalfType::Bf16, m..=m)?;

    // For each step of the model: bf16 in, bf16 out, on the stream of `cudarc`.
    let input: Vec<bf16> = (0..m * k).map(|i| bf16::from_f32((i as f32 * 0.13).cos())).collect();
    let device_input = stream.clone_htod(bytemuck::cast_slice::<bf16, u16>(&input))?;
    let scratch = stream.alloc_zeros::<u8>(on_device.scratch_bytes(m)?)?;
    let output = stream.alloc_zeros::<u16>(m * n)?;
    let call = LinearInput::new(span(&device_input, &stream), HalfType::Bf16, m, k);
    let target =
        LinearOutput { output: span(&output, &stream), output_stride: n, output_type: OutputType::Bf16 };
    // SAFETY: the stream lives until the copy below has waited for it, and so do the slices, which nothing else uses.
    unsafe {
        let handle = StreamHandle::from_raw(stream.cu_stream().cast());
        on_device.forward(&gpu, &call, &target, span(&scratch, &stream), &workspace, handle)?;
    }
    let y = stream.clone_dtoh(&output)?;

    let expected: Vec<bf16> = layer.forward(&QuantizeInput::new(&input, m, k), None)?;
    assert_eq!(y, bytemuck::cast_slice::<bf16, u16>(&expected));
    println!("{}: {m} tokens through cudarc's stream, bit for bit the CPU's result", gpu.description());
    Ok(())
}

/// Returns the address and the length of a slice, for launches on the same stream.
fn span<T>(slice: &CudaSlice<T>, stream: &CudaStream) -> DeviceSpan {
    // The guard records when launches are done, for programs that use the slice on other streams too.
    let (address, _guard) = slice.device_ptr(stream);
    // SAFETY: the slice has that many bytes there. It outlives the span in `main`.
    unsafe { DeviceSpan::from_raw(address, slice.num_bytes()) }
}
