//! The operands of `demo`: a built-in layer of all-MiniLM-L6-v2, or a generated problem of any size.
//! `assets/minilm/README.md` says where the layer comes from.

use anyhow::{Context, bail};
use half::f16;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;
use rayon::prelude::*;
use safetensors::{Dtype, SafeTensors};

use super::progress::Progress;
use super::units::bytes;

/// Floating-point weights, activations and bias of one product.
pub(super) struct Layer {
    pub(super) description: String,
    pub(super) m: usize,
    pub(super) n: usize,
    pub(super) k: usize,
    /// `[n, k]`.
    pub(super) weights: Vec<f16>,
    /// `[m, k]`.
    pub(super) activations: Vec<f16>,
    /// `[n]`.
    pub(super) bias: Vec<f32>,
}

/// One in this many channels of a generated problem is an outlier.
/// Outliers are what makes language models hard to quantize, and plain Gaussian noise has none.
const OUTLIER_EVERY: usize = 128;

/// Factor by which an outlier channel is larger than the others.
const OUTLIER_FACTOR: f32 = 8.0;

impl Layer {
    /// Loads the built-in layer: a feed-forward matrix of all-MiniLM-L6-v2 and its inputs for five sentences.
    pub(super) fn minilm() -> anyhow::Result<Self> {
        let weights = SafeTensors::deserialize(include_bytes!("../assets/minilm/weights.safetensors"))?;
        let activations =
            SafeTensors::deserialize(include_bytes!("../assets/minilm/activations.safetensors"))?;
        let ([n, k], weight) = matrix(&weights, "weight")?;
        let ([m, activations_k], activations) = matrix(&activations, "activations")?;
        if activations_k != k {
            bail!("the built-in activations have k = {activations_k}, the weights k = {k}");
        }
        let bias = weights.tensor("bias")?;
        if bias.dtype() != Dtype::F32 || bias.shape() != [n] {
            bail!("the built-in bias is not f32 [{n}]");
        }
        Ok(Self {
            description: "all-MiniLM-L6-v2, layer 2, first feed-forward matrix; activations of 5 sentences"
                .into(),
            m,
            n,
            k,
            weights: weight,
            activations,
            bias: bias.data().as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect(),
        })
    }

    /// Generates Gaussian weights, activations and bias with a few outlier channels.
    /// The outliers are output channels of the weights and input channels of the activations.
    /// The same seed gives the same problem on every machine.
    pub(super) fn generate(m: usize, n: usize, k: usize, seed: u64) -> Self {
        let progress = Progress::bar("generating", n + m);
        // With this standard deviation, outputs are about as large as activations and fit in f16 at any k.
        let deviation = (k as f32).sqrt().recip();
        let outlier =
            |index: usize| if index % OUTLIER_EVERY == OUTLIER_EVERY / 2 { OUTLIER_FACTOR } else { 1.0 };

        let mut weights = vec![f16::ZERO; n * k];
        weights.par_chunks_exact_mut(k).enumerate().for_each(|(channel, row)| {
            let size = deviation * outlier(channel);
            fill(row, Stream::Weights, channel, seed, |_, x| f16::from_f32(x * size));
            progress.step();
        });
        let mut activations = vec![f16::ZERO; m * k];
        activations.par_chunks_exact_mut(k).enumerate().for_each(|(token, row)| {
            fill(row, Stream::Activations, token, seed, |k, x| f16::from_f32(x * outlier(k)));
            progress.step();
        });
        let mut bias = vec![0.0; n];
        fill(&mut bias, Stream::Bias, 0, seed, |_, x| x);
        Self { description: format!("generated, seed {seed}"), m, n, k, weights, activations, bias }
    }
}

/// What random numbers are drawn for. Each purpose and each row has its own random stream.
#[derive(Clone, Copy)]
enum Stream {
    Weights,
    Activations,
    Bias,
}

/// Fills one row from its own random stream, so that rows can be filled in any order.
fn fill<T>(row: &mut [T], stream: Stream, index: usize, seed: u64, value: impl Fn(usize, f32) -> T) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream((index as u64) << 2 | stream as u64);
    for (position, element) in row.iter_mut().enumerate() {
        *element = value(position, rng.sample(StandardNormal));
    }
}

/// Reads an f16 matrix from a safetensors file, with its shape.
fn matrix(file: &SafeTensors<'_>, name: &str) -> anyhow::Result<([usize; 2], Vec<f16>)> {
    let tensor = file.tensor(name)?;
    let shape: [usize; 2] = tensor.shape().try_into().with_context(|| format!("{name} is not a matrix"))?;
    if tensor.dtype() != Dtype::F16 {
        bail!("{name} is {:?}, not f16", tensor.dtype());
    }
    Ok((shape, tensor.data().as_chunks().0.iter().map(|&bytes| f16::from_le_bytes(bytes)).collect()))
}

/// Refuses a problem that does not fit in memory, before anything is allocated.
pub(super) fn check_memory(m: usize, n: usize, k: usize) -> anyhow::Result<()> {
    let [m_, n_, k_] = [m, n, k].map(|dimension| dimension as f64);
    // f16 and packed weights; f16 and int8 activations; the output and the oracle's output.
    let padded = |dimension: usize, multiple: usize| dimension.div_ceil(multiple) as f64 * multiple as f64;
    let packed = padded(n, 64) * padded(k, 64) * 2176.0 / 4096.0;
    let quantized = m_ * padded(k, 16);
    let needed = n_ * k_ * 2.0 + packed + m_ * k_ * 2.0 + quantized + m_ * n_ * (4.0 + 4.0);
    // If the available memory is unknown, only sizes that overflow the address space are refused.
    let available = available_memory().unwrap_or(isize::MAX as u64) as f64;
    if needed > available {
        bail!(
            "m = {m}, n = {n}, k = {k} needs about {} of memory, but only {} are available",
            bytes(needed),
            bytes(available),
        );
    }
    Ok(())
}

/// Bytes that this process can still allocate: the machine's available memory or the remainder of its control
/// group's limit, whichever is less. `None` if the system does not report either; only Linux does.
fn available_memory() -> Option<u64> {
    let read = |path: &str| std::fs::read_to_string(path).ok();
    let machine = read("/proc/meminfo").and_then(|text| {
        let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
        Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
    });
    let number = |path| read(path)?.trim().parse::<u64>().ok();
    let group = number("/sys/fs/cgroup/memory.max")
        .zip(number("/sys/fs/cgroup/memory.current"))
        .map(|(limit, used)| limit.saturating_sub(used));
    machine.into_iter().chain(group).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn built_in_layer_has_its_shape_and_plausible_values() {
        let problem = Layer::minilm().unwrap();
        assert_eq!((problem.m, problem.n, problem.k), (106, 1536, 384));
        assert_eq!(problem.weights.len(), 1536 * 384);
        assert_eq!(problem.activations.len(), 106 * 384);
        assert_eq!(problem.bias.len(), 1536);
        // Trained weights are finite, vary, and have the magnitude of this layer.
        let mean_square =
            problem.weights.iter().map(|w| f64::from(*w).powi(2)).sum::<f64>() / (1536.0 * 384.0);
        assert!((0.02..0.2).contains(&mean_square.sqrt()), "{}", mean_square.sqrt());
        assert!(problem.bias.iter().all(|b| b.is_finite()));
    }

    #[test]
    fn generated_problem_depends_on_the_seed_alone() {
        let (a, b, c) =
            (Layer::generate(3, 200, 70, 7), Layer::generate(3, 200, 70, 7), Layer::generate(3, 200, 70, 8));
        assert_eq!(a.weights, b.weights);
        assert_eq!(a.activations, b.activations);
        assert_ne!(a.weights, c.weights);
        // Rows and matrices draw from different streams.
        assert_ne!(a.weights[..70], a.weights[70..140]);
        assert_ne!(a.weights[..3], a.activations[..3]);
    }

    #[test]
    fn outlier_channel_is_larger_than_its_neighbours() {
        let problem = Layer::generate(1, 128, 512, 1);
        let norm = |channel: usize| {
            problem.weights[channel * 512..][..512].iter().map(|w| f32::from(*w).powi(2)).sum::<f32>().sqrt()
        };
        assert!(norm(64) > 5.0 * norm(63) && norm(64) > 5.0 * norm(65));
    }

    #[test]
    fn a_problem_larger_than_any_memory_is_refused_with_its_size() {
        let text = check_memory(4_000_000_000, 4_000_000_000, 64).unwrap_err().to_string();
        assert!(text.contains("m = 4000000000, n = 4000000000, k = 64"), "{text}");
        check_memory(1, 1, 1).unwrap();
    }
}
