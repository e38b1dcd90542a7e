//! Measured times: the records of the bench, by format, matrix and number of tokens.
//! The committed records of an H100 SXM are part of this crate; other files of the bench can be read in their place.
//!
//! W4A16 is not in the bench's runs. Its times are Marlin's ratio to cuBLASLt fp8, from the page of peers
//! (`crates/bench/src/peers.json`), times the fp8 time of the record.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, bail};
use liquidgemm::Group;
use liquidgemm_bench::moe::{self, Mixtures};
use liquidgemm_bench::peers;
use liquidgemm_bench::record::{Baseline, Run};

use crate::gemm::{self, Product};
use crate::gpus::{GPUS, Gpu};
use crate::layers::{Experts, Layer};
use crate::scheme::Scheme;

/// The committed records.
const RUNS: [(&str, &str); 4] = [
    ("docs/benchmarks/h100-curve.json", include_str!("../../../docs/benchmarks/h100-curve.json")),
    ("docs/benchmarks/h100-between.json", include_str!("../../../docs/benchmarks/h100-between.json")),
    ("docs/benchmarks/h100-shards.json", include_str!("../../../docs/benchmarks/h100-shards.json")),
    // The last one counts where a point was measured several times. This one is the most thorough.
    ("docs/benchmarks/h100.json", include_str!("../../../docs/benchmarks/h100.json")),
];
const MIXTURES: (&str, &str) =
    ("docs/benchmarks/moe.json", include_str!("../../../docs/benchmarks/moe.json"));

/// The column of the page of peers that stands for W4A16.
const W4A16_PEER: &str = "Marlin W4A16 per channel";

/// What a time is: for the reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// The record has this very point.
    Measured,
    /// The record has the matrix at fewer and at more tokens, and the prediction is corrected by its error there.
    Interpolated,
    /// By the formulas alone.
    Predicted,
}

/// A matrix: experts and experts per token (0 and 0 for a dense layer), n, k.
type Key = (Scheme, [u64; 4]);

/// Measured times of one GPU's record in microseconds, by tokens.
#[derive(Clone, Debug, Default)]
pub struct Measurements {
    /// The files, for the reports.
    pub files: Vec<String>,
    by_gpu: BTreeMap<&'static str, BTreeMap<Key, BTreeMap<u64, f64>>>,
}

/// One measured point beside its prediction.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Check {
    /// The format.
    pub scheme: Scheme,
    /// The product.
    pub product: Product,
    /// The measured time in microseconds.
    pub measured: f64,
    /// The predicted time in microseconds.
    pub predicted: f64,
}

impl Check {
    /// Returns by how much the prediction is too long, as a fraction of the measured time.
    pub fn error(&self) -> f64 {
        self.predicted / self.measured - 1.0
    }
}

impl Measurements {
    /// Returns the committed records.
    ///
    /// # Errors
    /// None: a test reads them.
    pub fn committed() -> anyhow::Result<Self> {
        let mut all = Self::default();
        for (name, text) in RUNS {
            all.add_run(name, &Run::from_json(text.as_bytes(), name)?)?;
        }
        all.add_mixtures(MIXTURES.0, &Mixtures::from_json(MIXTURES.1.as_bytes(), MIXTURES.0)?)?;
        Ok(all)
    }

    /// Reads files that `liquidgemm bench --json` wrote, also with `--moe`.
    ///
    /// # Errors
    /// If a file can't be read, is no such record, or is of a GPU that is not in [`GPUS`].
    pub fn load<P: AsRef<Path>>(paths: &[P]) -> anyhow::Result<Self> {
        let mut all = Self::default();
        for path in paths {
            let path = path.as_ref();
            let name = path.display().to_string();
            let bytes = std::fs::read(path).with_context(|| format!("cannot read {name}"))?;
            match Mixtures::from_json(&bytes, &name) {
                Ok(mixtures) if !mixtures.points.is_empty() => all.add_mixtures(&name, &mixtures)?,
                _ => all.add_run(&name, &Run::from_json(&bytes, &name)?)?,
            }
        }
        Ok(all)
    }

    fn of_device(
        &mut self,
        name: &str,
        device: &str,
    ) -> anyhow::Result<&mut BTreeMap<Key, BTreeMap<u64, f64>>> {
        let known = GPUS.iter().find(|gpu| gpu.recorded_as.is_some_and(|start| device.starts_with(start)));
        let Some(gpu) = known else {
            bail!("{name} is a record of {device:?}; no GPU in the list of estimates has this name");
        };
        self.files.push(name.to_owned());
        Ok(self.by_gpu.entry(gpu.key).or_default())
    }

    fn add_run(&mut self, name: &str, run: &Run) -> anyhow::Result<()> {
        let times = self.of_device(name, &run.circumstances.device)?;
        let usable =
            run.points.iter().filter(|point| point.group == Group::default() && point.mismatch.is_none());
        for point in usable {
            let marlin = || {
                Some(
                    peers::relative(W4A16_PEER, point.m, point.n, point.k)?
                        * point.baseline(Baseline::Fp8)?.us,
                )
            };
            for scheme in Scheme::ALL {
                let us = match scheme {
                    Scheme::W4A8 => Some(point.ours.us),
                    Scheme::W8A8 => point.int8.map(|timing| timing.us),
                    Scheme::Fp8 => point.fp8.map(|timing| timing.us),
                    Scheme::W4A16 => marlin(),
                    Scheme::Bf16 => point.bf16.map(|timing| timing.us),
                };
                if let Some(us) = us {
                    let key = (scheme, [0, 0, point.n as u64, point.k as u64]);
                    times.entry(key).or_default().insert(point.m as u64, us);
                }
            }
        }
        Ok(())
    }

    fn add_mixtures(&mut self, name: &str, mixtures: &Mixtures) -> anyhow::Result<()> {
        let columns = &moe::page().columns;
        let column = |name: &str| columns.iter().position(|column| column == name);
        let [fp8, bf16] = [column("torch fp8"), column("torch bf16")];
        let times = self.of_device(name, &mixtures.circumstances.device)?;
        let group = Group::default().to_string();
        let usable = mixtures.points.iter().filter(|point| point.group == group && point.mismatch.is_none());
        for point in usable {
            let page = &point.page;
            let per_token = page.rows.checked_div(page.tokens).unwrap_or(0);
            let peer = |place: Option<usize>| page.us.get(place?).copied();
            for (scheme, us) in
                [(Scheme::W4A8, Some(point.ours.us)), (Scheme::Fp8, peer(fp8)), (Scheme::Bf16, peer(bf16))]
            {
                if let Some(us) = us.filter(|us| us.is_finite() && *us > 0.0) {
                    let matrix = [page.experts, per_token, page.n, page.k].map(|number| number as u64);
                    times.entry((scheme, matrix)).or_default().insert(page.tokens as u64, us);
                }
            }
        }
        Ok(())
    }

    /// Returns the time of a layer at a number of tokens in microseconds, the prediction alone, and what the time is.
    pub fn time(&self, layer: &Layer, tokens: f64, scheme: Scheme, gpu: &Gpu) -> (f64, f64, Source) {
        let scheme = if layer.quantized { scheme } else { Scheme::Bf16 };
        let predict = |tokens: f64| gemm::predict(&product(layer, tokens), scheme, gpu);
        let predicted = predict(tokens);
        let Experts { count, per_token } = layer.experts.unwrap_or(Experts { count: 0, per_token: 0 });
        let record = self.by_gpu.get(gpu.key);
        let Some(times) = record.and_then(|all| all.get(&(scheme, [count, per_token, layer.n, layer.k])))
        else {
            return (predicted, predicted, Source::Predicted);
        };
        let whole = tokens as u64;
        if let Some(us) = times.get(&whole).filter(|_| whole as f64 == tokens) {
            return (*us, predicted, Source::Measured);
        }
        let below = times.range(..=whole).next_back();
        let above = times.range(whole.saturating_add(1)..).next();
        let (Some((&below, &below_us)), Some((&above, &above_us))) = (below, above) else {
            return (predicted, predicted, Source::Predicted);
        };
        let [below, above] = [below as f64, above as f64];
        let share = (tokens / below).ln() / (above / below).ln();
        let [low, high] = [below_us / predict(below), above_us / predict(above)].map(f64::ln);
        (predicted * (low + (high - low) * share).exp(), predicted, Source::Interpolated)
    }

    /// Returns every measured point beside its prediction.
    pub fn checks(&self) -> Vec<Check> {
        let mut checks = Vec::new();
        for (gpu, times) in &self.by_gpu {
            let Some(gpu) = Gpu::find(gpu) else { continue };
            for (&(scheme, [count, per_token, n, k]), times) in times {
                let experts = (count > 0).then_some(Experts { count, per_token });
                let layer = Layer { name: "", n, k, experts, quantized: true };
                for (&tokens, &measured) in times {
                    let product = product(&layer, tokens as f64);
                    checks.push(Check {
                        scheme,
                        product,
                        measured,
                        predicted: gemm::predict(&product, scheme, gpu),
                    });
                }
            }
        }
        checks
    }
}

/// The product of a layer with this many tokens.
pub fn product(layer: &Layer, tokens: f64) -> Product {
    let [rows, matrices] = match layer.experts {
        Some(experts) => [tokens * experts.per_token as f64, experts.active(tokens)],
        None => [tokens, 1.0],
    };
    Product { rows, n: layer.n, k: layer.k, matrices, is_grouped: layer.experts.is_some() }
}
