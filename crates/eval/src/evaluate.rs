//! Runs a model in float and with other layers over the same text, and compares what comes out.

use candle_core::Tensor;
use rayon::prelude::*;
use serde::Serialize;

use crate::layers::{Comparison, FloatLayers};
use crate::model::{Causal, Encoder, Layers, LinearWeights, Model, Network};
use crate::moments::{Calibration, Recorder};
use crate::{Error, Progress};

/// How much of a model's result other layers keep.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Score {
    /// Of sentence embeddings.
    Embedding {
        /// The number of sentences.
        sentences: usize,
        /// The mean cosine between float and other embeddings.
        cosine: f64,
        /// The smallest cosine.
        least_cosine: f64,
    },
    /// Of a causal language model.
    Language {
        /// The number of predicted tokens.
        tokens: usize,
        /// exp of the mean negative log-likelihood, in float.
        float_perplexity: f64,
        /// The same with the other layers.
        perplexity: f64,
        /// How much larger the perplexity is, in percent.
        increase_percent: f64,
        /// The share of positions where both runs have the same most likely token.
        agreement: f64,
        /// The mean Kullback-Leibler divergence from the float distribution of the next token, in nats, to within 1e-6.
        divergence: f64,
    },
}

/// What a model is measured on.
#[derive(Clone, Debug)]
pub enum Task {
    /// Sentences, as tokens.
    Sentences(Vec<Vec<u32>>),
    /// A text, cut into windows of tokens. Each window is a forward pass of its own.
    Windows(Vec<Vec<u32>>),
}

impl Task {
    /// Makes the task of a model from a text: its lines for an encoder, windows for a language model.
    ///
    /// `limit` is the number of tokens after which the text ends, or of lines for an encoder; `window` the tokens of a window.
    ///
    /// # Errors
    /// [`Error::TextTooShort`] for a text with fewer than two tokens, [`Error::TooManyTokens`] for a window that the
    /// model has no positions for, and [`Error::Tokenizer`].
    pub fn new(model: &Model, text: &str, window: usize, limit: Option<usize>) -> Result<Self, Error> {
        let limit = limit.unwrap_or(usize::MAX);
        match &model.network {
            Network::Encoder(encoder) => {
                let lines = text.lines().map(str::trim).filter(|line| !line.is_empty()).take(limit);
                let sentences = lines.map(|line| {
                    let mut tokens = model.tokens(line)?;
                    tokens.truncate(encoder.positions());
                    Ok(tokens)
                });
                let sentences = sentences.collect::<Result<Vec<_>, Error>>()?;
                if sentences.is_empty() {
                    return Err(Error::TextTooShort { what: "the text".into(), found: 0, needed: 1 });
                }
                Ok(Task::Sentences(sentences))
            }
            Network::Causal(causal) => {
                if window > causal.positions() {
                    return Err(Error::TooManyTokens { tokens: window, positions: causal.positions() });
                }
                let mut tokens = model.tokens(text)?;
                tokens.truncate(limit);
                if tokens.len() < 2 {
                    return Err(Error::TextTooShort {
                        what: "the text".into(),
                        found: tokens.len(),
                        needed: 2,
                    });
                }
                // The last window may be shorter, but one token predicts nothing.
                let windows = tokens.chunks(window.max(2)).filter(|window| window.len() > 1);
                Ok(Task::Windows(windows.map(<[u32]>::to_vec).collect()))
            }
        }
    }

    /// Returns the pieces of text, each for one forward pass.
    pub fn pieces(&self) -> &[Vec<u32>] {
        let (Task::Sentences(pieces) | Task::Windows(pieces)) = self;
        pieces
    }

    /// Returns the number of tokens.
    pub fn tokens(&self) -> usize {
        self.pieces().iter().map(Vec::len).sum()
    }

    /// Returns the first pieces that together have at least `tokens` tokens, or all.
    pub fn first(&self, tokens: usize) -> &[Vec<u32>] {
        let mut sum = 0;
        let enough = self.pieces().iter().position(|piece| {
            sum += piece.len();
            sum >= tokens
        });
        &self.pieces()[..enough.map_or(self.pieces().len(), |index| index + 1)]
    }
}

/// Scores each of `variants` on the task. The float run happens once.
///
/// # Errors
/// [`Error::NotFinite`] if a run gives NaN or infinity; and whatever the layers return.
pub fn score(
    model: &Model,
    task: &Task,
    variants: &[&dyn Layers],
    progress: &dyn Progress,
) -> Result<Vec<Score>, Error> {
    progress.begin("evaluating", task.pieces().len() * (variants.len() + 1));
    match &model.network {
        Network::Encoder(encoder) => score_encoder(encoder, &model.layers, task, variants, progress),
        Network::Causal(causal) => score_causal(causal, &model.layers, task, variants, progress),
    }
}

fn score_encoder(
    encoder: &Encoder,
    layers: &[LinearWeights],
    task: &Task,
    variants: &[&dyn Layers],
    progress: &dyn Progress,
) -> Result<Vec<Score>, Error> {
    let mut cosines = vec![Vec::new(); variants.len()];
    for sentence in task.pieces() {
        let float = encoder.embed(sentence, &FloatLayers(layers))?;
        progress.step();
        for (layers, cosines) in variants.iter().zip(&mut cosines) {
            let embedding = encoder.embed(sentence, *layers)?;
            cosines
                .push(float.iter().zip(&embedding).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>());
            progress.step();
        }
    }
    let score = |cosines: Vec<f64>| Score::Embedding {
        sentences: cosines.len(),
        cosine: cosines.iter().sum::<f64>() / cosines.len() as f64,
        least_cosine: cosines.iter().copied().fold(f64::INFINITY, f64::min),
    };
    Ok(cosines.into_iter().map(score).collect())
}

/// Sums over positions.
#[derive(Clone, Copy, Default)]
struct Sums {
    positions: usize,
    float_loss: f64,
    loss: f64,
    divergence: f64,
    agreements: usize,
}

fn score_causal(
    causal: &Causal,
    layers: &[LinearWeights],
    task: &Task,
    variants: &[&dyn Layers],
    progress: &dyn Progress,
) -> Result<Vec<Score>, Error> {
    let mut sums = vec![Sums::default(); variants.len()];
    for window in task.pieces() {
        // The last position predicts a token that the window does not have.
        let predicting = window.len() - 1;
        let logits = |layers: &dyn Layers| {
            let hidden = causal.hidden(window, layers)?;
            causal.logits(&hidden.narrow(0, 0, predicting)?)
        };
        let float = distributions(&logits(&FloatLayers(layers))?, &window[1..])?;
        progress.step();
        for (layers, sums) in variants.iter().zip(&mut sums) {
            add_positions(sums, &float, &logits(*layers)?, &window[1..])?;
            progress.step();
        }
    }
    sums.into_iter().map(finish_language).collect()
}

fn finish_language(sums: Sums) -> Result<Score, Error> {
    let count = sums.positions as f64;
    let [float_perplexity, perplexity] = [sums.float_loss, sums.loss].map(|loss| (loss / count).exp());
    for (what, perplexity) in [("the float run", float_perplexity), ("the quantized run", perplexity)] {
        if !perplexity.is_finite() {
            return Err(Error::NotFinite { what: what.into() });
        }
    }
    Ok(Score::Language {
        tokens: sums.positions,
        float_perplexity,
        perplexity,
        increase_percent: (perplexity / float_perplexity - 1.0) * 100.0,
        agreement: sums.agreements as f64 / count,
        divergence: sums.divergence / count,
    })
}

/// A distribution of the next token, by the float run.
#[derive(Debug)]
struct Distribution {
    /// Of each token.
    probabilities: Vec<f32>,
    /// The most likely token.
    best: usize,
    /// Σ p · ln p.
    negative_entropy: f64,
    /// −ln p of the token that came next.
    loss: f64,
}

impl Distribution {
    fn new(logits: &[f32], next: u32) -> Self {
        let sum = log_sum(logits);
        let mut negative_entropy = 0.0;
        let probability = |&logit: &f32| {
            let logarithm = f64::from(logit) - sum;
            let probability = logarithm.exp();
            negative_entropy += probability * logarithm;
            probability as f32
        };
        let probabilities = logits.iter().map(probability).collect();
        let loss = sum - f64::from(logits[next as usize]);
        Self { probabilities, best: best(logits), negative_entropy, loss }
    }
}

/// Returns the distributions of logits, `[positions, vocabulary]`, with the tokens that came next.
fn distributions(logits: &Tensor, next: &[u32]) -> Result<Vec<Distribution>, Error> {
    let vocabulary = logits.dim(1)?;
    let logits = logits.flatten_all()?.to_vec1::<f32>()?;
    let rows = logits.par_chunks_exact(vocabulary).zip(next);
    Ok(rows.map(|(row, &next)| Distribution::new(row, next)).collect())
}

/// Adds the positions of another run's logits, `[positions, vocabulary]`, with the tokens that came next.
fn add_positions(sums: &mut Sums, float: &[Distribution], other: &Tensor, next: &[u32]) -> Result<(), Error> {
    let vocabulary = other.dim(1)?;
    let other = other.flatten_all()?.to_vec1::<f32>()?;
    let rows = float.par_iter().zip(other.par_chunks_exact(vocabulary)).zip(next);
    let rows: Vec<Position> =
        rows.map(|((float, other), &next)| compare_position(float, other, next)).collect();
    // Add up in order, so that the number of threads changes nothing.
    for (row, float) in rows.iter().zip(float) {
        sums.positions += 1;
        sums.float_loss += float.loss;
        sums.loss += row.loss;
        sums.divergence += row.divergence;
        sums.agreements += usize::from(row.agrees);
    }
    Ok(())
}

/// The comparison of two distributions of the next token.
#[derive(Debug)]
struct Position {
    loss: f64,
    divergence: f64,
    agrees: bool,
}

/// Compares a distribution with another run's logits.
fn compare_position(float: &Distribution, other: &[f32], next: u32) -> Position {
    let sum = log_sum(other);
    // Σ p · (ln p − ln q).
    let cross = float.probabilities.iter().zip(other);
    let cross: f64 =
        cross.map(|(&probability, &logit)| f64::from(probability) * (f64::from(logit) - sum)).sum();
    Position {
        loss: sum - f64::from(other[next as usize]),
        divergence: float.negative_entropy - cross,
        agrees: float.best == best(other),
    }
}

/// Returns the index of the largest value, the first of several.
fn best(values: &[f32]) -> usize {
    values.iter().enumerate().fold(0, |best, (index, value)| if *value > values[best] { index } else { best })
}

/// Returns `ln Σ e^x`.
fn log_sum(values: &[f32]) -> f64 {
    let max = f64::from(values.iter().fold(f32::NEG_INFINITY, |max, &x| max.max(x)));
    max + values.iter().map(|&x| (f64::from(x) - max).exp()).sum::<f64>().ln()
}

/// A layer's error on the inputs of the float run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LayerError {
    /// The layer's name.
    pub layer: String,
    /// `‖Y − Y_float‖ / ‖Y_float‖`.
    pub relative_error: f64,
}

/// Returns the error of every layer on the inputs that it has in the float run, the largest first.
///
/// # Errors
/// Whatever the layers return.
pub fn layer_errors(
    model: &Model,
    pieces: &[Vec<u32>],
    others: &dyn Layers,
    progress: &dyn Progress,
) -> Result<Vec<LayerError>, Error> {
    progress.begin("layer errors", pieces.len());
    let comparison = Comparison::new(&model.layers, others);
    for piece in pieces {
        model.run(piece, &comparison)?;
        progress.step();
    }
    let mut errors: Vec<LayerError> = model
        .layers
        .iter()
        .zip(comparison.errors())
        .map(|(layer, relative_error)| LayerError { layer: layer.name.clone(), relative_error })
        .collect();
    errors.sort_by(|a, b| b.relative_error.total_cmp(&a.relative_error));
    Ok(errors)
}

/// Runs the model in float over a text, and returns the second moments of its layers' inputs.
///
/// With `hessian` also their full matrices, which `gptq` needs.
///
/// # Errors
/// [`Error::NotFinite`] if an input is not finite.
pub fn calibrate(
    model: &Model,
    task: &Task,
    hessian: bool,
    progress: &dyn Progress,
) -> Result<Calibration, Error> {
    progress.begin("calibrating", task.pieces().len());
    let recorder = Recorder::new(&model.layers, hessian);
    for piece in task.pieces() {
        model.run(piece, &recorder)?;
        progress.step();
    }
    recorder.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_distributions_agree_and_do_not_diverge() {
        let logits = [0.5f32, -1.0, 2.0, 0.0];
        let shifted = logits.map(|x| x + 3.0);
        let float = Distribution::new(&logits, 1);
        let position = compare_position(&float, &shifted, 1);
        assert!(position.agrees && position.divergence.abs() < 1e-6, "{position:?}");
        assert!((float.loss - position.loss).abs() < 1e-6, "{position:?}");
    }

    #[test]
    fn losses_and_divergence_are_those_of_the_definitions() {
        // p = (1/4, 3/4), q = (1/2, 1/2).
        let float = Distribution::new(&[0.0, 3f32.ln()], 0);
        let position = compare_position(&float, &[0.0, 0.0], 0);
        assert!((float.loss - 4f64.ln()).abs() < 1e-6);
        assert!((position.loss - 2f64.ln()).abs() < 1e-6);
        let divergence = 0.25 * 0.5f64.ln() + 0.75 * 1.5f64.ln();
        assert!((position.divergence - divergence).abs() < 1e-6);
        assert!(!position.agrees);
    }
}
