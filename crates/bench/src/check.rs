//! Checks results, so that no time stands for a wrong or a skipped computation.
//! Our outputs must equal those of the CPU backend bit for bit.
//! The baselines' outputs must be close to float64 sums.

use anyhow::ensure;
use half::bf16;

use super::arena::{Arena, Operands, download};
use super::record::Baseline;
use liquidgemm::{ActivationsView, PackedWeights, cpu};

/// The outputs of some tokens, all channels of each, computed by the CPU backend.
pub(super) struct Reference {
    n: usize,
    tokens: Vec<usize>,
    outputs: Vec<bf16>,
}

impl Reference {
    /// Computes the outputs that check every one of these batch sizes: [`tokens_to_check`].
    pub(super) fn new(
        weights: &PackedWeights,
        operands: &Operands,
        token_scales: &[f32],
        batches: &[usize],
    ) -> anyhow::Result<Self> {
        let k = weights.k();
        let tokens = tokens_to_check(batches);
        let codes: Vec<i8> = tokens.iter().flat_map(|&token| operands.codes(k, token)).collect();
        let scales: Vec<f32> = tokens.iter().map(|&token| token_scales[token]).collect();
        let view = ActivationsView::new(&codes, k, &scales, tokens.len(), k)?;
        let mut outputs = vec![bf16::ZERO; tokens.len() * weights.n()];
        cpu::gemm(weights, view, None, &mut outputs)?;
        Ok(Self { n: weights.n(), tokens, outputs })
    }

    /// Compares the output of `m` tokens. Returns the number of compared tokens and the first difference.
    pub(super) fn compare(&self, arena: &Arena, m: usize) -> anyhow::Result<(usize, Option<String>)> {
        let mut compared = 0;
        for (&token, expected) in self.tokens.iter().zip(self.outputs.chunks(self.n)) {
            if token >= m {
                continue;
            }
            compared += 1;
            let actual: Vec<bf16> = download(&arena.output, token * self.n, self.n)?;
            let differs = |(a, b): &(&bf16, &bf16)| a.to_bits() != b.to_bits();
            let differences = actual.iter().zip(expected).filter(differs).count();
            if let Some(channel) = actual.iter().zip(expected).position(|pair| differs(&pair)) {
                return Ok((
                    compared,
                    Some(format!(
                        "token {token}, channel {channel} is {} instead of {}; {differences} of {} channels of the \
                         token differ",
                        actual[channel], expected[channel], self.n
                    )),
                ));
            }
        }
        Ok((compared, None))
    }
}

/// The first two tokens and, of each batch size, the last one and those at a third and at half of it.
fn tokens_to_check(batches: &[usize]) -> Vec<usize> {
    let mut tokens: Vec<usize> = batches.iter().flat_map(|&m| [0, 1, m / 2, m / 3, m - 1]).collect();
    let most = batches.iter().copied().max().unwrap_or(0);
    tokens.retain(|&token| token < most);
    tokens.sort_unstable();
    tokens.dedup();
    tokens
}

/// Compares a few outputs of a baseline with float64 sums, after a launch with its first copy of the weights.
pub(super) fn baseline_is_right(
    baseline: Baseline,
    arena: &Arena,
    operands: &Operands,
    [m, n, k]: [usize; 3],
) -> anyhow::Result<()> {
    for (token, channel) in [(0, 0), (m - 1, n - 1), (m / 2, n / 3), (m / 3, n / 2), (0, n - 1)] {
        let products = (0..k).map(|at| operands.weight(k, channel, at) * operands.activation(k, token, at));
        let expected: f64 = products.sum();
        let first = token * n + channel;
        let actual = match baseline {
            Baseline::Int8 => f64::from(download::<i32>(&arena.baseline_output, first, 1)?[0]),
            Baseline::Fp8 | Baseline::Bf16 => download::<bf16>(&arena.baseline_output, first, 1)?[0].to_f64(),
        };
        // A sum of k products of normal numbers is about √k, and so is the difference of two unrelated sums.
        // Fast fp8 accumulation truncates every partial sum to 14 bits.
        let size = (k as f64).sqrt();
        let tolerance = match baseline {
            Baseline::Int8 => 0.0,
            Baseline::Fp8 => 0.02 * expected.abs() + 0.25 * size,
            Baseline::Bf16 => 0.02 * expected.abs() + 0.04 * size,
        };
        ensure!(
            (actual - expected).abs() <= tolerance,
            "cuBLASLt's output of token {token}, channel {channel} is {actual} instead of {expected}"
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_checked_include_the_last_of_every_batch_size() {
        let tokens = tokens_to_check(&[1, 64, 100]);
        assert!([0, 1, 63, 99].iter().all(|token| tokens.contains(token)), "{tokens:?}");
        assert!(tokens.is_sorted() && tokens.iter().all(|&token| token < 100));
        assert_eq!(tokens_to_check(&[1]), [0]);
        assert!(tokens_to_check(&[]).is_empty());
    }
}
