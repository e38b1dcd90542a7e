//! Checks a result in two ways: bit for bit against an oracle, and by its distance to the product of the
//! floating-point originals.
//!
//! Both checks cover whole tokens.
//! If all tokens would take too long, the checks cover evenly spaced ones and report how many.

use half::f16;
use liquidgemm::{Backend, Error, Output, PackedWeights, QuantizedActivations};
use rayon::prelude::*;

use super::layer::Layer;
use super::progress::Progress;

/// Most multiply-adds of the scalar loops and of the floating-point product: about a second on two cores.
const SLOW_BUDGET: usize = 8_000_000_000;

/// Most multiply-adds of the CPU backend as the oracle of the GPU: 8192³ is compared in full.
const FAST_BUDGET: usize = 600_000_000_000;

/// The outcome of the comparison with the oracle.
pub(super) struct Exactness {
    /// Name of the oracle, which computes the product independently.
    pub(super) oracle: &'static str,
    /// Number of compared outputs.
    pub(super) compared: usize,
    /// Number of compared outputs that differ in any bit.
    pub(super) different: usize,
}

/// Computes the product again with an independent oracle and compares every bit.
/// The oracle of a GPU is the CPU backend; that of the CPU backend is plain loops over unpacked codes.
pub(super) fn exactness<T: Output>(
    backend: &Backend,
    result: &[T],
    weights: &PackedWeights,
    activations: &QuantizedActivations,
    bias: Option<&[f32]>,
) -> Result<Exactness, Error> {
    let (m, n, k) = (activations.m(), weights.n(), weights.k());
    let budget = if backend.as_gpu().is_some() { FAST_BUDGET } else { SLOW_BUDGET };
    let tokens = sample(m, budget / (n * k));
    let mut codes = Vec::with_capacity(tokens.len() * k);
    tokens.iter().for_each(|&token| codes.extend_from_slice(activations.row(token)));
    let scales = tokens.iter().map(|&token| activations.scales()[token]).collect();
    let chosen = QuantizedActivations::from_parts(&codes, scales, tokens.len(), k)?;

    let (oracle, expected) = if backend.as_gpu().is_some() {
        let _progress = Progress::spinner("verifying");
        ("the CPU backend", Backend::cpu().multiply::<T>(weights, &chosen, bias)?)
    } else {
        ("plain scalar loops", scalar_product::<T>(weights, &chosen, bias))
    };
    let different = tokens
        .iter()
        .zip(expected.chunks_exact(n))
        .flat_map(|(&token, expected)| result[token * n..][..n].iter().zip(expected))
        // Compare bytes, because for floats `==` makes 0 equal to -0 and NaN different from itself.
        .filter(|(a, b)| bytemuck::bytes_of(*a) != bytemuck::bytes_of(*b))
        .count();
    Ok(Exactness { oracle, compared: expected.len(), different })
}

/// The product by definition: three loops over plain codes, with one i64 accumulator per output.
/// It shares the arithmetic of one output element with the backends, but not layout, order or vectorization.
fn scalar_product<T: Output>(
    weights: &PackedWeights,
    activations: &QuantizedActivations,
    bias: Option<&[f32]>,
) -> Vec<T> {
    let (m, n, k) = (activations.m(), weights.n(), weights.k());
    let unpacked = weights.unpack();
    let groups = unpacked.pairs.len() / n;
    let group_k = match weights.group() {
        liquidgemm::Group::K(group) => group,
        liquidgemm::Group::Channel => k,
    };
    let progress = Progress::bar("verifying", n);
    let columns: Vec<Vec<T>> = (0..n)
        .into_par_iter()
        .map(|channel| {
            let row: Vec<i32> = (0..k)
                .map(|k_| {
                    let (s, a) = unpacked.pairs[channel * groups + k_ / group_k];
                    i32::from(unpacked.codes[channel * k + k_]) * i32::from(s) + i32::from(a) - 128
                })
                .collect();
            let column = (0..m)
                .map(|token| {
                    let products =
                        row.iter().zip(activations.row(token)).map(|(&w, &x)| i64::from(w * i32::from(x)));
                    let sum = products.sum::<i64>();
                    let sum = i32::try_from(sum).expect("k is limited so that sums fit 32 bits");
                    let bias = bias.map(|bias| bias[channel]);
                    T::from_accumulator(
                        sum,
                        weights.channel_scales()[channel],
                        activations.scales()[token],
                        bias,
                    )
                })
                .collect();
            progress.step();
            column
        })
        .collect();
    (0..m).flat_map(|token| columns.iter().map(move |column| column[token])).collect()
}

/// The distance between the result and the product of the floating-point originals.
pub(super) struct Accuracy {
    /// ‖result − (product + bias)‖ / ‖product‖ in Frobenius norms.
    /// The denominator leaves out the bias, which would make the error look smaller.
    pub(super) relative_frobenius: f64,
    /// The largest |result − (product + bias)|.
    pub(super) largest: f64,
    /// Number of tokens that were compared.
    pub(super) tokens: usize,
}

impl Accuracy {
    /// The relative error as a signal-to-noise ratio in dB.
    pub(super) fn decibels(&self) -> f64 {
        -20.0 * self.relative_frobenius.log10()
    }
}

/// Compares `result(token, channel)` with the product of the floating-point weights and activations.
pub(super) fn accuracy(
    problem: &Layer,
    with_bias: bool,
    result: impl Fn(usize, usize) -> f32 + Sync,
) -> Accuracy {
    let Layer { m, n, k, .. } = *problem;
    let tokens = sample(m, SLOW_BUDGET / (n * k));
    let widen = |row: &[f16]| row.iter().map(|x| x.to_f32()).collect::<Vec<f32>>();
    let chosen: Vec<Vec<f32>> =
        tokens.iter().map(|&token| widen(&problem.activations[token * k..][..k])).collect();
    let progress = Progress::bar("comparing", n);
    let (error, signal, largest) = (0..n)
        .into_par_iter()
        .map(|channel| {
            let weights = widen(&problem.weights[channel * k..][..k]);
            let bias = if with_bias { f64::from(problem.bias[channel]) } else { 0.0 };
            let mut sums = (0.0, 0.0, 0.0);
            for (&token, x) in tokens.iter().zip(&chosen) {
                let product = dot(&weights, x);
                let difference = f64::from(result(token, channel)) - (product + bias);
                sums = add(sums, (difference * difference, product * product, difference.abs()));
            }
            progress.step();
            sums
        })
        .reduce(|| (0.0, 0.0, 0.0), add);
    Accuracy { relative_frobenius: (error / signal).sqrt(), largest, tokens: tokens.len() }
}

fn add(a: (f64, f64, f64), b: (f64, f64, f64)) -> (f64, f64, f64) {
    (a.0 + b.0, a.1 + b.1, a.2.max(b.2))
}

/// The dot product of two rows.
/// It adds blocks of 256 products in 16 f32 lanes, which vectorizes, and adds the blocks in f64.
/// This is accurate enough for any length.
fn dot(a: &[f32], b: &[f32]) -> f64 {
    let blocks = a.chunks(256).zip(b.chunks(256));
    blocks
        .map(|(a, b)| {
            let mut lanes = [0.0_f32; 16];
            let (a_whole, a_rest) = a.as_chunks::<16>();
            let (b_whole, b_rest) = b.as_chunks::<16>();
            for (a, b) in a_whole.iter().zip(b_whole) {
                for lane in 0..16 {
                    lanes[lane] += a[lane] * b[lane];
                }
            }
            let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
            f64::from(lanes.iter().sum::<f32>() + rest)
        })
        .sum()
}

/// At most `most` and at least one of the `m` tokens, evenly spaced from the first to the last.
/// A single one is the last token.
fn sample(m: usize, most: usize) -> Vec<usize> {
    let count = most.clamp(1, m);
    if count == 1 {
        return vec![m - 1];
    }
    (0..count).map(|i| i * (m - 1) / (count - 1)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use liquidgemm::Group;

    #[test]
    fn samples_are_distinct_tokens_and_all_of_them_where_possible() {
        for (m, most) in [(1, 0), (1, 5), (7, 7), (7, 100), (100, 7), (5000, 2), (5000, 4999), (9, 0)] {
            let tokens = sample(m, most);
            assert_eq!(tokens.len(), most.clamp(1, m));
            assert!(tokens.windows(2).all(|pair| pair[0] < pair[1]));
            assert_eq!(*tokens.last().unwrap(), m - 1);
        }
    }

    #[test]
    fn one_flipped_bit_is_found() {
        let problem = Layer::generate(3, 70, 130, 1);
        let weights = PackedWeights::quantize(&problem.weights, 70, 130, Group::K(64)).unwrap();
        let activations = QuantizedActivations::quantize(&problem.activations, 3, 130).unwrap();
        let backend = Backend::cpu();
        let bias = Some(&problem.bias[..]);
        let mut result = backend.multiply::<f32>(&weights, &activations, bias).unwrap();
        let check = |result: &[f32]| exactness(&backend, result, &weights, &activations, bias).unwrap();
        let good = check(&result);
        assert_eq!((good.compared, good.different), (3 * 70, 0));
        result[2 * 70 + 69] = f32::from_bits(result[2 * 70 + 69].to_bits() ^ 1);
        assert_eq!(check(&result).different, 1);
    }

    #[test]
    fn accuracy_measures_a_known_error() {
        let problem = Layer::generate(4, 33, 100, 2);
        let product = |token: usize, channel: usize| {
            let row = |all: &[f16], index: usize| all[index * 100..][..100].to_vec();
            let (w, x) = (row(&problem.weights, channel), row(&problem.activations, token));
            w.iter().zip(&x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum::<f64>()
        };
        let biased = |token, channel: usize| product(token, channel) + f64::from(problem.bias[channel]);
        let same = accuracy(&problem, true, |token, channel| biased(token, channel) as f32);
        assert!(same.relative_frobenius < 1e-6 && same.largest < 1e-5);
        assert_eq!(same.tokens, 4);
        let off = accuracy(&problem, false, |token, channel| (product(token, channel) * 1.01) as f32);
        assert!((off.relative_frobenius - 0.01).abs() < 1e-5, "{}", off.relative_frobenius);
        assert!((off.decibels() - 40.0).abs() < 0.01);
    }
}
