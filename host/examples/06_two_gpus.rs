//! Shows exact tensor parallelism: a layer in two shards, by channels and along K, on two GPUs if there are two,
//! otherwise on one device in turn.
//!
//! Shards by channels need no communication.
//! Of shards along K, the int32 products are added before one epilogue, so the bits are those of one device.
//!
//! `cargo run --release -p liquidgemm --example 06_two_gpus`

use half::bf16;
use liquidgemm::gpu::Gpu;
use liquidgemm::{Error, Group, Output, PackedWeights, QuantizedActivations, cpu};

fn main() -> Result<(), Error> {
    let (m, n, k) = (7, 256, 1024);
    let weights: Vec<f32> = (0..n * k).map(|i| (i as f32 * 0.71).sin()).collect();
    let x: Vec<f32> = (0..m * k).map(|i| (i as f32 * 0.13).cos()).collect();
    let packed = PackedWeights::quantize(&weights, n, k, Group::default())?;
    let activations = QuantizedActivations::quantize(&x, m, k)?;
    let mut whole = vec![bf16::ZERO; m * n];
    cpu::gemm(&packed, &activations, None, &mut whole)?;

    let gpus: Vec<Gpu> = (0..2).map_while(|number| Gpu::with_device(number).ok()).collect();

    // Column parallelism: each device computes half of the channels.
    let halves = [packed.channel_shard(0..n / 2)?, packed.channel_shard(n / 2..n)?];
    let parts: Vec<Vec<bf16>> = on_devices(&gpus, &halves, [&activations, &activations])?;
    for token in 0..m {
        let row: Vec<bf16> = parts.iter().flat_map(|part| part[token * n / 2..][..n / 2].to_vec()).collect();
        assert_eq!(row, whole[token * n..][..n]);
    }

    // Row parallelism: each device multiplies half of K. Every shard keeps the whole token's scale.
    let halves = [packed.input_shard(0..k / 2)?, packed.input_shard(k / 2..k)?];
    let shard = |first: usize| {
        let codes: Vec<i8> =
            (0..m).flat_map(|token| activations.row(token)[first..first + k / 2].to_vec()).collect();
        QuantizedActivations::from_parts(&codes, activations.scales().to_vec(), m, k / 2)
    };
    let parts: Vec<Vec<i32>> = on_devices(&gpus, &halves, [&shard(0)?, &shard(k / 2)?])?;
    let (channel_scales, token_scales) = (packed.channel_scales(), activations.scales());
    let sums = parts[0].iter().zip(&parts[1]).enumerate().map(|(index, (first, second))| {
        let (token, channel) = (index / n, index % n);
        bf16::from_accumulator(first + second, channel_scales[channel], token_scales[token], None)
    });
    assert_eq!(sums.collect::<Vec<_>>(), whole);

    let where_ = match gpus.len() {
        0 => "the CPU, in turn".to_owned(),
        1 => format!("{}, in turn", gpus[0].name()),
        _ => format!("{} and {}", gpus[0].name(), gpus[1].name()),
    };
    println!("two shards by channels and two along K on {where_}: bit for bit the whole layer");
    Ok(())
}

/// Multiplies two shards, each on a device and a thread of its own if there are two GPUs.
fn on_devices<T: Output>(
    gpus: &[Gpu],
    shards: &[PackedWeights; 2],
    activations: [&QuantizedActivations; 2],
) -> Result<Vec<Vec<T>>, Error> {
    std::thread::scope(|scope| {
        let threads = [0, 1].map(|index| {
            let gpu = gpus.get(index).or(gpus.first());
            let (shard, activations) = (&shards[index], activations[index]);
            scope.spawn(move || match gpu {
                Some(gpu) => gpu.multiply(shard, activations, None),
                None => {
                    let mut product = vec![T::zeroed(); activations.m() * shard.n()];
                    cpu::gemm(shard, activations, None, &mut product)?;
                    Ok(product)
                }
            })
        });
        threads.map(|thread| thread.join().expect("the thread does not panic")).into_iter().collect()
    })
}
