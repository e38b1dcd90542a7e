//! The report: memory, speed and cost of every number format over a list of batch sizes. Its JSON is what
//! `liquidgemm estimate --json` prints; the table and the page are made from it as well.

use anyhow::{Context, ensure};
use serde::Serialize;

use crate::architecture::Model;
use crate::gemm::Efficiency;
use crate::gpus::Gpu;
use crate::measurements::{Check, Measurements};
use crate::scheme::Scheme;
use crate::serving::{self, Server, Step};

/// Version of the JSON's layout. It grows when a key changes its meaning or goes.
pub const SCHEMA_VERSION: u32 = 1;

/// The largest batch size. This limit and the next ones keep all results finite.
pub const MOST_BATCH: usize = 1 << 20;
/// The most tokens of a prompt or of an answer.
pub const MOST_LENGTH: u64 = 1 << 24;
/// The most GPUs.
pub const MOST_GPUS: u64 = 1024;
/// The highest price of a GPU-hour.
pub const MOST_PRICE: f64 = 1e6;
/// The possible bits of an element of the KV cache.
pub const CACHE_BITS: [u32; 3] = [4, 8, 16];

/// What to estimate for.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Settings {
    /// Batch sizes: sequences that are decoded together.
    pub batches: Vec<usize>,
    /// Tokens of a prompt.
    pub input: u64,
    /// Tokens of an answer.
    pub output: u64,
    /// Number of GPUs (tensor parallelism).
    pub gpus: u64,
    /// Price of a GPU-hour, in any currency.
    pub price: Option<f64>,
    /// The part of the GPUs' memory that may be used.
    pub memory_fraction: f64,
    /// Bits of an element of the KV cache.
    pub cache_bits: u32,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            batches: (0..=10).map(|power| 1 << power).collect(),
            input: 1024,
            output: 512,
            gpus: 1,
            price: None,
            memory_fraction: 0.9,
            cache_bits: 16,
        }
    }
}

impl Settings {
    fn check(&self) -> anyhow::Result<()> {
        ensure!(!self.batches.is_empty(), "there is no batch size");
        for &batch in &self.batches {
            ensure!(
                (1..=MOST_BATCH).contains(&batch),
                "the batch size {batch} is not between 1 and {MOST_BATCH}"
            );
        }
        for (what, length) in [("prompt", self.input), ("answer", self.output)] {
            ensure!(
                (1..=MOST_LENGTH).contains(&length),
                "{length} tokens of the {what} are not between 1 and {MOST_LENGTH}"
            );
        }
        ensure!((1..=MOST_GPUS).contains(&self.gpus), "{} GPUs are not between 1 and {MOST_GPUS}", self.gpus);
        if let Some(price) = self.price {
            ensure!(
                (0.0..=MOST_PRICE).contains(&price),
                "the price {price} is not between 0 and {MOST_PRICE}"
            );
        }
        let fraction = self.memory_fraction;
        ensure!(
            fraction > 0.0 && fraction <= 1.0,
            "the memory fraction {fraction} is not above 0 and at most 1"
        );
        ensure!(
            CACHE_BITS.contains(&self.cache_bits),
            "the KV cache has 4, 8 or 16 bits an element, not {}",
            self.cache_bits
        );
        Ok(())
    }
}

/// The estimates for one model on one kind of GPU.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// The model.
    pub model: ModelFacts,
    /// The GPU.
    pub gpu: Gpu,
    /// The settings.
    pub settings: Settings,
    /// The formats, W4A8 first.
    pub schemes: Vec<SchemeReport>,
    /// What W4A8 gains against each other format.
    pub break_even: Vec<BreakEven>,
    /// How well the formulas predict the records.
    pub accuracy: Vec<Accuracy>,
    /// The records that are used.
    pub measurements: Vec<String>,
    /// The formulas and assumptions.
    pub assumptions: Vec<String>,
}

/// The figures of a model.
#[derive(Clone, Debug, Serialize)]
pub struct ModelFacts {
    /// The name.
    pub name: String,
    /// `model_type` of its configuration.
    pub model_type: String,
    /// Number of parameters.
    pub parameters: f64,
    /// Parameters that a token passes through.
    pub active_parameters: f64,
    /// Parameters that are quantized.
    pub quantized_parameters: f64,
    /// Number of decoder blocks.
    pub blocks: u64,
}

/// The estimates for one format.
#[derive(Clone, Debug, Serialize)]
pub struct SchemeReport {
    /// The format.
    pub scheme: Scheme,
    /// The kernel whose times it has.
    pub kernel: &'static str,
    /// GB of weights on each GPU.
    pub weights_gb: f64,
    /// GB of KV cache of one sequence, prompt and answer, on each GPU.
    pub cache_gb_per_sequence: f64,
    /// The largest batch that fits. 0 if not even the weights and one sequence do.
    pub largest_batch: usize,
    /// The least number of GPUs (a power of two) on which the model fits with one sequence.
    pub least_gpus: Option<u64>,
    /// Factors of the dense kernel.
    pub efficiency: Efficiency,
    /// The batch sizes.
    pub points: Vec<Point>,
    /// The largest batch, as one more point.
    pub best: Option<Point>,
}

/// The estimates for one format and batch size.
#[derive(Clone, Debug, Serialize)]
pub struct Point {
    /// Sequences.
    pub batch: usize,
    /// Whether it fits.
    pub fits: bool,
    /// GB on each GPU.
    pub memory_gb: f64,
    /// Milliseconds to prefill all prompts of the batch.
    pub prefill_ms: f64,
    /// Milliseconds to prefill the prompts and decode the answers of a batch.
    pub total_ms: f64,
    /// Answer tokens per second, of all sequences, with the prefill counted.
    pub tokens_per_second: f64,
    /// GPU-hours for a million answer tokens.
    pub gpu_hours_per_million: f64,
    /// Price of a million answer tokens.
    pub cost_per_million: Option<f64>,
    /// A decoding step with prompt and half of the answer as context.
    pub step: Step,
}

/// What W4A8 gains against another format.
#[derive(Clone, Debug, Serialize)]
pub struct BreakEven {
    /// The other format.
    pub scheme: Scheme,
    /// The smallest batch size of the list at which the other format has at least as many tokens per second.
    /// `None` if there is none among those that fit it.
    pub overtaken_at_batch: Option<usize>,
    /// W4A8's tokens per second over the other's, each at its best batch size. `None` if one of them doesn't fit.
    pub best_ratio: Option<f64>,
    /// The GPU-hour's price up to which W4A8 costs less per token than the other at the given price.
    pub break_even_price: Option<f64>,
}

/// How well the formulas predict the records of one format.
#[derive(Clone, Debug, Serialize)]
pub struct Accuracy {
    /// The format.
    pub scheme: Scheme,
    /// Whether these are products of experts.
    pub is_grouped: bool,
    /// Number of measured points.
    pub points: usize,
    /// Median of the error's absolute value, as a fraction.
    pub median_error: f64,
    /// A tenth of the points have a larger error.
    pub error_of_nine_tenths: f64,
}

/// Estimates all formats.
///
/// # Errors
/// If a setting is out of its range, or the model can't be divided among the GPUs.
pub fn report(
    model: &Model,
    gpu: &Gpu,
    settings: &Settings,
    measurements: &Measurements,
) -> anyhow::Result<Report> {
    settings.check()?;
    model.check_gpus(settings.gpus)?;
    let server = Server {
        model,
        gpu,
        gpus: settings.gpus,
        cache_bytes: f64::from(settings.cache_bits) / 8.0,
        measurements,
    };
    let schemes: Vec<SchemeReport> =
        Scheme::ALL.into_iter().map(|scheme| scheme_report(&server, settings, scheme)).collect();
    let (ours, others) = schemes.split_first().context("there are no formats")?;
    let break_even = others.iter().map(|other| break_even(ours, other, settings.price)).collect();
    Ok(Report {
        schema_version: SCHEMA_VERSION,
        model: ModelFacts {
            name: model.name.clone(),
            model_type: model.model_type.clone(),
            parameters: model.parameters() as f64,
            active_parameters: model.active_parameters() as f64,
            quantized_parameters: model.quantized_parameters() as f64,
            blocks: model.blocks,
        },
        gpu: *gpu,
        settings: settings.clone(),
        break_even,
        schemes,
        accuracy: accuracy(&measurements.checks()),
        measurements: measurements.files.clone(),
        assumptions: assumptions(gpu, measurements),
    })
}

fn memory_bytes(server: &Server<'_>, settings: &Settings, scheme: Scheme, batch: f64) -> f64 {
    let length = (settings.input + settings.output) as f64;
    server.weight_bytes(scheme)
        + batch * server.cache_bytes_of(length)
        + server.workspace_bytes(batch, settings.input as f64)
}

fn usable_bytes(server: &Server<'_>, settings: &Settings) -> f64 {
    server.gpu.memory_gb * 1e9 * settings.memory_fraction
}

/// The largest batch size whose memory fits, at most [`MOST_BATCH`]. Memory grows with the batch.
fn largest_batch(server: &Server<'_>, settings: &Settings, scheme: Scheme) -> usize {
    let fits =
        |batch: usize| memory_bytes(server, settings, scheme, batch as f64) <= usable_bytes(server, settings);
    let (mut fitting, mut failing) = (0, MOST_BATCH + 1);
    while failing - fitting > 1 {
        let middle = fitting + (failing - fitting) / 2;
        if fits(middle) {
            fitting = middle;
        } else {
            failing = middle;
        }
    }
    fitting
}

fn least_gpus(server: &Server<'_>, settings: &Settings, scheme: Scheme) -> Option<u64> {
    (0..=10).map(|power| 1 << power).find(|&gpus| {
        let server = Server { gpus, ..*server };
        server.model.check_gpus(gpus).is_ok()
            && memory_bytes(&server, settings, scheme, 1.0) <= usable_bytes(&server, settings)
    })
}

fn scheme_report(server: &Server<'_>, settings: &Settings, scheme: Scheme) -> SchemeReport {
    let largest_batch = largest_batch(server, settings, scheme);
    let at = |batch: usize| point(server, settings, scheme, batch, batch <= largest_batch);
    SchemeReport {
        scheme,
        kernel: scheme.kernel(),
        weights_gb: server.weight_bytes(scheme) / 1e9,
        cache_gb_per_sequence: server.cache_bytes_of((settings.input + settings.output) as f64) / 1e9,
        largest_batch,
        least_gpus: least_gpus(server, settings, scheme),
        efficiency: Efficiency::dense(scheme),
        points: settings.batches.iter().map(|&batch| at(batch)).collect(),
        best: (largest_batch > 0).then(|| at(largest_batch)),
    }
}

fn point(server: &Server<'_>, settings: &Settings, scheme: Scheme, batch: usize, fits: bool) -> Point {
    let [sequences, input, output] = [batch as f64, settings.input as f64, settings.output as f64];
    // The context grows during the answer; its mean stands for all steps.
    let step = server.decode(scheme, sequences, input + output / 2.0);
    let prefill_us = server.prefill(scheme, sequences, input);
    let total_us = prefill_us + output * step.us;
    let tokens_per_second = sequences * output / total_us * 1e6;
    let gpu_hours_per_million = settings.gpus as f64 * 1e6 / tokens_per_second / 3600.0;
    Point {
        batch,
        fits,
        memory_gb: memory_bytes(server, settings, scheme, sequences) / 1e9,
        prefill_ms: prefill_us / 1e3,
        total_ms: total_us / 1e3,
        tokens_per_second,
        gpu_hours_per_million,
        cost_per_million: settings.price.map(|price| price * gpu_hours_per_million),
        step,
    }
}

fn best_speed(report: &SchemeReport) -> Option<f64> {
    let fitting = report.points.iter().filter(|point| point.fits).chain(&report.best);
    fitting.map(|point| point.tokens_per_second).max_by(f64::total_cmp)
}

fn break_even(ours: &SchemeReport, other: &SchemeReport, price: Option<f64>) -> BreakEven {
    let pairs = ours.points.iter().zip(&other.points);
    let overtaken =
        pairs.filter(|(ours, other)| other.fits && other.tokens_per_second >= ours.tokens_per_second);
    let best_ratio = best_speed(ours).zip(best_speed(other)).map(|(ours, other)| ours / other);
    BreakEven {
        scheme: other.scheme,
        overtaken_at_batch: overtaken.map(|(ours, _)| ours.batch).min(),
        best_ratio,
        break_even_price: best_ratio.zip(price).map(|(ratio, price)| ratio * price),
    }
}

/// Summarizes checks by format, dense layers first.
pub fn accuracy(checks: &[Check]) -> Vec<Accuracy> {
    let kinds = [false, true].into_iter().flat_map(|grouped| Scheme::ALL.map(|scheme| (scheme, grouped)));
    kinds
        .filter_map(|(scheme, is_grouped)| {
            let of_kind = |check: &&Check| (check.scheme, check.product.is_grouped) == (scheme, is_grouped);
            let mut errors: Vec<f64> =
                checks.iter().filter(of_kind).map(|check| check.error().abs()).collect();
            errors.sort_by(f64::total_cmp);
            let last = errors.len().checked_sub(1)?;
            Some(Accuracy {
                scheme,
                is_grouped,
                points: errors.len(),
                median_error: errors[last / 2],
                error_of_nine_tenths: errors[last * 9 / 10],
            })
        })
        .collect()
}

/// The formulas and assumptions as sentences.
fn assumptions(gpu: &Gpu, measurements: &Measurements) -> Vec<String> {
    let mut all = vec![
        "Product: T = T_launch + cbrt(T_load^3 + T_dequant^3 + T_mma^3), a smooth form of max(T_load, T_dequant, T_mma) of the \
         LiquidGEMM paper (arXiv 2509.01229). T_launch and the efficiencies of loading and of the tensor cores are fitted to \
         records of an H100 SXM and taken over to other GPUs."
            .to_owned(),
        "W4A8 on dense layers: the estimate of the library's planner (Plan::estimate_us), which knows tiles and waves."
            .to_owned(),
        "Times marked measured are records of the bench; interpolated ones are predictions corrected by the error at the \
         neighbouring numbers of tokens; all others are predictions."
            .to_owned(),
        "W4A16 is Marlin with one scale a channel: its recorded ratio to cuBLASLt fp8 times the recorded fp8 time. \
         Experts in W8A8 and W4A16 have no record: their factors are assumed."
            .to_owned(),
        "Experts get equally many tokens in expectation: E (1 - (1 - k/E)^tokens) of E experts are read.".to_owned(),
        "Embeddings, router and DeepSeek's absorbed matrix stay bf16 in every format.".to_owned(),
        format!(
            "Attention (assumed): KV bytes at {ATTENTION_LOAD} of memory speed or operations at {ATTENTION_MMA} of bf16 \
             throughput, the longer, and {ATTENTION_LAUNCH_US} µs.",
            ATTENTION_LOAD = serving::ATTENTION_LOAD,
            ATTENTION_MMA = serving::ATTENTION_MMA,
            ATTENTION_LAUNCH_US = serving::ATTENTION_LAUNCH_US,
        ),
        format!(
            "Norms, gates, quantization, rotary positions: {} µs each and their bytes at {} of memory speed, fitted to \
             docs/benchmarks/activations.json.",
            serving::OPERATION_LAUNCH_US,
            serving::OPERATION_LOAD
        ),
        format!(
            "All-reduces (assumed): {} µs each and their bytes at {} of link speed, not overlapped.",
            serving::ALL_REDUCE_US,
            serving::ALL_REDUCE_LINK
        ),
        format!(
            "Prompts are prefilled {} tokens at a time, not overlapped with decoding; sampling and the host cost nothing.",
            serving::PREFILL_TOKENS
        ),
        "Memory: weights, KV cache of prompt and answer, and activations in flight, in GB of 10^9 bytes.".to_owned(),
        format!("GPU: {}.", gpu.source),
    ];
    if measurements.files.is_empty() {
        all.push("No record was read.".to_owned());
    } else if gpu.recorded_as.is_none() {
        all.push("There is no record of this GPU: every time is predicted, and no prediction was ever checked on it.".to_owned());
    }
    all
}
