//! Estimates what a model would need and cost with this library's W4A8 kernel, and with other number formats:
//! memory, time per layer and step, tokens per second, cost, and where W4A8 pays.
//!
//! | file | purpose |
//! |---|---|
//! | [`architecture`], [`models`] | a model's shape from `config.json`; the built-in models |
//! | [`layers`] | the matrices of a block on each GPU |
//! | [`gpus`] | data-sheet figures of GPUs |
//! | [`scheme`] | the number formats |
//! | [`gemm`] | the time of a product: the paper's cost model |
//! | [`measurements`] | the bench's records, which replace predictions |
//! | [`serving`] | the time of a step: products, attention, operations, all-reduces; memory |
//! | [`report`] | all of it for a list of batch sizes, as JSON |
//! | [`table`], [`page`], `chart` | the report as text and as an HTML page |
//!
//! ```
//! use liquidgemm_estimate::{gpus::Gpu, measurements::Measurements, models, report};
//!
//! # fn main() -> anyhow::Result<()> {
//! let model = models::find("LLaMA-3-8B")?;
//! let gpu = Gpu::find("h100-sxm").unwrap();
//! let settings = report::Settings { batches: vec![64], ..report::Settings::default() };
//! let report = report::report(&model, gpu, &settings, &Measurements::committed()?)?;
//! let [ours, .., bf16] = report.schemes.as_slice() else { unreachable!() };
//! assert!(ours.weights_gb < bf16.weights_gb / 2.0);
//! assert!(ours.points[0].tokens_per_second > bf16.points[0].tokens_per_second);
//! # Ok(())
//! # }
//! ```

pub mod architecture;
mod chart;
pub mod gemm;
pub mod gpus;
pub mod layers;
pub mod measurements;
pub mod models;
pub mod page;
pub mod report;
pub mod scheme;
pub mod serving;
pub mod table;
