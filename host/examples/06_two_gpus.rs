//! Shows exact tensor parallelism: a linear layer in two shards, by output channels and by input channels,
//! on two GPUs if there are two and NCCL, otherwise on one device in turn.
//!
//! Shards by output channels need no communication.
//! Of shards by input channels, the int32 sums are added before one epilogue, so the bits are those of one device.
//!
//! `cargo run --release -p liquidgemm --example 06_two_gpus`

use cust::memory::{CopyDestination, DeviceBuffer};
use cust::stream::{Stream, StreamFlags};
use half::bf16;
use liquidgemm::cpu::{self, QuantizeInput};
use liquidgemm::gpu::{
    Communicator, Gpu, LinearInput, LinearOutput, RowParallelCall, RowParallelLinear, Workspace, nccl_version,
};
use liquidgemm::{Group, HalfType, Linear, OutputType, PackedWeights, QuantizedActivations};

const M: usize = 7;
const N: usize = 256;
const K: usize = 1024;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let weights: Vec<f32> = (0..N * K).map(|i| (i as f32 * 0.71).sin()).collect();
    let bias = (0..N).map(|i| (i as f32 * 0.3).cos()).collect();
    let layer = Linear::new(PackedWeights::quantize(&weights, N, K, Group::default())?).with_bias(bias)?;
    let x: Vec<bf16> = (0..M * K).map(|i| bf16::from_f32((i as f32 * 0.13).cos())).collect();
    let input = QuantizeInput::new(&x, M, K);
    let whole: Vec<bf16> = layer.forward(&input, None)?;

    let gpus: Vec<Gpu> = (0..2).map_while(|number| Gpu::with_device(number).ok()).collect();

    // Column parallelism: each device computes half of the output channels from the whole input.
    let halves = [layer.channel_shard(0..N / 2)?, layer.channel_shard(N / 2..N)?];
    let parts = on_devices(&gpus, &halves, &layer.quantize(&input, None)?)?;
    for token in 0..M {
        let row: Vec<bf16> = parts.iter().flat_map(|part| part[token * N / 2..][..N / 2].to_vec()).collect();
        assert_eq!(row, whole[token * N..][..N]);
    }

    // Row parallelism: each device has half of the input channels, of the weights and of each token.
    let halves = [layer.input_shard(0..K / 2)?, layer.input_shard(K / 2..K)?];
    let rows = [0, K / 2].map(|first| -> Vec<bf16> {
        x.chunks(K).flat_map(|row| row[first..first + K / 2].to_vec()).collect()
    });
    let inputs = [0, 1].map(|shard| QuantizeInput::new(&rows[shard], M, K / 2));
    let in_turn: Vec<bf16> = cpu::row_parallel(&halves, &inputs)?;
    assert_eq!(in_turn, whole);

    let devices = match (&gpus[..], nccl_version()) {
        ([first, second], Ok(version)) => {
            for output in with_nccl([first, second], &halves, &rows)? {
                assert_eq!(output, whole);
            }
            format!("{} and {} with NCCL {version}", first.name(), second.name())
        }
        ([_, _], Err(error)) => format!("the CPU in turn, because {error}"),
        _ => "the CPU in turn, because there are no two GPUs".to_owned(),
    };
    println!("two shards by output channels: bit for bit the whole layer");
    println!("two shards by input channels, on {devices}: bit for bit the whole layer");
    Ok(())
}

/// Multiplies two shards, each on a GPU and a thread of its own if there are two GPUs.
fn on_devices(
    gpus: &[Gpu],
    shards: &[Linear; 2],
    activations: &QuantizedActivations,
) -> Result<Vec<Vec<bf16>>, liquidgemm::Error> {
    std::thread::scope(|scope| {
        let threads = [0, 1].map(|index| {
            let (gpu, shard) = (gpus.get(index).or(gpus.first()), &shards[index]);
            scope.spawn(move || match gpu {
                Some(gpu) => gpu.multiply(shard.weights(), activations, shard.bias()),
                None => shard.forward_quantized(activations),
            })
        });
        threads.map(|thread| thread.join().expect("the thread does not panic")).into_iter().collect()
    })
}

/// What a rank needs on its GPU.
struct Rank {
    layer: RowParallelLinear,
    input: DeviceBuffer<u16>,
    output: DeviceBuffer<u16>,
    scratch: DeviceBuffer<u8>,
    workspace: Workspace,
    stream: Stream,
}

/// Computes the layer on two GPUs, both on this thread, and returns the output of each.
///
/// A server with a process for each GPU makes its communicators with `Communicator::new`,
/// and calls `forward` in each process.
fn with_nccl(
    gpus: [&Gpu; 2],
    shards: &[Linear; 2],
    rows: &[Vec<bf16>; 2],
) -> Result<Vec<Vec<bf16>>, Box<dyn std::error::Error>> {
    let communicators = Communicator::of_process(&gpus)?;
    let mut ranks = Vec::new();
    for (rank, gpu) in gpus.into_iter().enumerate() {
        gpu.make_current()?;
        let layer = RowParallelLinear::new(gpu.upload_linear(&shards[rank])?);
        ranks.push(Rank {
            input: DeviceBuffer::from_slice(bytemuck::cast_slice(&rows[rank]))?,
            output: DeviceBuffer::zeroed(M * N)?,
            scratch: DeviceBuffer::zeroed(layer.scratch_bytes(M)?)?,
            workspace: gpu.workspace()?,
            stream: Stream::new(StreamFlags::NON_BLOCKING, None)?,
            layer,
        });
    }
    let calls: Vec<_> = (0..2)
        .map(|number| {
            let rank = &ranks[number];
            RowParallelCall {
                gpu: gpus[number],
                layer: &rank.layer,
                communicator: &communicators[number],
                input: LinearInput::new((&rank.input).into(), HalfType::Bf16, M, K / 2),
                output: LinearOutput {
                    output: (&rank.output).into(),
                    output_stride: N,
                    output_type: OutputType::Bf16,
                },
                scratch: (&rank.scratch).into(),
                workspace: &rank.workspace,
                stream: (&rank.stream).into(),
            }
        })
        .collect();
    // SAFETY: the ranks outlive their launches, and each stream orders those of its rank.
    unsafe { RowParallelCall::forward_all(&calls) }?;
    let mut outputs = Vec::new();
    for (rank, gpu) in ranks.into_iter().zip(gpus) {
        // The buffers are copied and freed in their GPU's context.
        gpu.make_current()?;
        rank.stream.synchronize()?;
        let mut output = vec![0u16; M * N];
        rank.output.copy_to(&mut output)?;
        outputs.push(bytemuck::cast_slice(&output).to_vec());
    }
    Ok(outputs)
}
