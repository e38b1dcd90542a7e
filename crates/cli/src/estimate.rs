//! `liquidgemm estimate`: what a model would need, how fast it would be and what it would cost with W4A8 and with other formats.
//! The model of the costs is in `liquidgemm-estimate`.
//!
//! Exit codes: 0 for an estimate, also of a model that does not fit; 1 for a model, a record or a file that can't be used;
//! 2 for invalid arguments.

use std::fmt::Write;
use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::value_parser;
use liquidgemm_bench::shapes;
use liquidgemm_estimate::gpus::{GPUS, Gpu};
use liquidgemm_estimate::measurements::Measurements;
use liquidgemm_estimate::report::{
    CACHE_BITS, MOST_BATCH, MOST_GPUS, MOST_LENGTH, MOST_PRICE, Settings, report,
};
use liquidgemm_estimate::{models, page, table};
use serde_json::{Value, json};

use super::Report;
use super::models::{EXIT_CODES, json_report};

/// Estimate memory, speed and cost of serving a model in W4A8, W8A8, FP8, W4A16 and BF16
///
/// Times are the bench's measurements where it has the layer on this GPU, else predictions of a cost model whose formulas,
/// assumptions and errors are printed with them.
#[derive(clap::Args)]
#[command(after_help = EXIT_CODES)]
pub(super) struct Arguments {
    /// Folder with a config.json, such a file, or a built-in model (see --list)
    #[arg(required_unless_present = "list")]
    model: Option<String>,

    /// List the built-in models and the GPUs
    #[arg(long, conflicts_with_all = [
        "model", "batch", "input", "output", "gpu", "gpus", "price", "memory", "kv_bits", "measurements", "html",
    ])]
    list: bool,

    /// Sequences decoded together: a list, or powers of two in a range
    #[arg(long, value_name = "LIST", value_parser = parse_batches, default_value = "1..1024")]
    batch: Batches,

    /// Tokens of a prompt
    #[arg(long, value_name = "TOKENS", default_value_t = 1024, value_parser = value_parser!(u64).range(1..=MOST_LENGTH))]
    input: u64,

    /// Tokens of an answer
    #[arg(long, value_name = "TOKENS", default_value_t = 512, value_parser = value_parser!(u64).range(1..=MOST_LENGTH))]
    output: u64,

    /// The GPU (see --list)
    #[arg(long, value_parser = parse_gpu, default_value = "h100-sxm")]
    gpu: &'static Gpu,

    /// Number of GPUs that share every layer (tensor parallelism)
    #[arg(long, value_name = "NUMBER", default_value_t = 1, value_parser = value_parser!(u64).range(1..=MOST_GPUS))]
    gpus: u64,

    /// Price of a GPU-hour, in any currency
    #[arg(long, value_parser = parse_price)]
    price: Option<f64>,

    /// Part of the GPUs' memory that may be used
    #[arg(long, value_name = "FRACTION", default_value_t = 0.9, value_parser = parse_fraction)]
    memory: f64,

    /// Bits of an element of the KV cache
    #[arg(long, value_name = "BITS", default_value_t = 16, value_parser = parse_bits)]
    kv_bits: u32,

    /// Records of `liquidgemm bench --json` in place of the committed ones
    #[arg(long, value_name = "FILE", value_delimiter = ',')]
    measurements: Vec<PathBuf>,

    /// Print the estimate as JSON
    #[arg(long)]
    json: bool,

    /// Write a self-contained HTML page with plots as well
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

/// Batch sizes from one argument.
#[derive(Clone)]
struct Batches(Vec<usize>);

fn parse_batches(text: &str) -> anyhow::Result<Batches> {
    let mut batches = shapes::parse_tokens(text)?;
    batches.sort_unstable();
    batches.dedup();
    if let Some(largest) = batches.last().filter(|largest| **largest > MOST_BATCH) {
        bail!("the batch size {largest} exceeds {MOST_BATCH}");
    }
    Ok(Batches(batches))
}

fn parse_bits(text: &str) -> anyhow::Result<u32> {
    let bits = text.parse().ok().filter(|bits| CACHE_BITS.contains(bits));
    bits.context("an element of the KV cache has 4, 8 or 16 bits")
}

fn parse_price(text: &str) -> anyhow::Result<f64> {
    let price = text.parse().ok().filter(|price| (0.0..=MOST_PRICE).contains(price));
    price.with_context(|| format!("a price is a number from 0 to {MOST_PRICE}"))
}

fn parse_fraction(text: &str) -> anyhow::Result<f64> {
    let fraction = text.parse().ok().filter(|fraction| *fraction > 0.0 && *fraction <= 1.0);
    fraction.context("a fraction of the memory is a number above 0 and at most 1")
}

fn parse_gpu(text: &str) -> anyhow::Result<&'static Gpu> {
    Gpu::find(text).with_context(|| {
        let keys: Vec<&str> = GPUS.iter().map(|gpu| gpu.key).collect();
        format!("unknown GPU; known are {}", keys.join(", "))
    })
}

pub(super) fn run(arguments: &Arguments) -> anyhow::Result<Report> {
    if arguments.list {
        if arguments.json {
            return Ok(json_report(&list_json()?, true));
        }
        return Ok(Report { text: list()?, success: true });
    }
    let Some(model) = &arguments.model else { bail!("no model was given") };
    let model = models::find(model)?;
    let measurements = match arguments.measurements.as_slice() {
        [] => Measurements::committed()?,
        paths => Measurements::load(paths)?,
    };
    let settings = Settings {
        batches: arguments.batch.0.clone(),
        input: arguments.input,
        output: arguments.output,
        gpus: arguments.gpus,
        price: arguments.price,
        memory_fraction: arguments.memory,
        cache_bits: arguments.kv_bits,
    };
    let report = report(&model, arguments.gpu, &settings, &measurements)?;
    if let Some(path) = &arguments.html {
        liquidgemm_bench::record::write_file(path, page::html(&report)?.as_bytes())?;
    }
    let text =
        if arguments.json { serde_json::to_string_pretty(&report)? + "\n" } else { table::text(&report) };
    Ok(Report { text, success: true })
}

fn list_json() -> anyhow::Result<Value> {
    let mut known = Vec::new();
    for model in models::built_in() {
        known.push(json!({"name": model.name, "parameters": model.model()?.parameters()}));
    }
    Ok(json!({"models": known, "gpus": GPUS}))
}

fn list() -> anyhow::Result<String> {
    let mut text = String::from("models, billions of parameters\n");
    for model in models::built_in() {
        writeln!(
            text,
            "  {:<14} {:>6}",
            model.name,
            table::digits(model.model()?.parameters() as f64 / 1e9)
        )?;
    }
    text.push_str("GPUs: GB, GB/s, dense int8 TOPS, fp8 and bf16 TFLOPS, SMs, GHz, link GB/s\n");
    for gpu in &GPUS {
        writeln!(
            text,
            "  {:<12} {:>4} {:>5.0} {:>5} {:>5} {:>6} {:>4} {:>6} {:>4}  {}",
            gpu.key,
            gpu.memory_gb,
            gpu.figures.memory_bytes_per_second as f64 / 1e9,
            gpu.int8_tops,
            gpu.fp8_tflops,
            gpu.bf16_tflops,
            gpu.figures.multiprocessors,
            gpu.figures.clock_hz as f64 / 1e9,
            gpu.link_gb_per_second,
            gpu.source
        )?;
    }
    Ok(text)
}
