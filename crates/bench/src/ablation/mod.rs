//! The ablation measures the value of each idea of the kernel and reproduces figure 13 of the paper.
//! Every variant computes the same product with the same tile and the same schedule.
//! Its result is compared bit for bit with that of the CPU backend.
//! The kernels of the variants are in `variants`, the page about them is in `page`.

mod page;
mod variants;

use std::path::Path;

use anyhow::{Context, ensure};
use liquidgemm_format::ablation::{TOKENS, tile};
use serde::{Deserialize, Serialize};

use super::arena::copies;
use super::check::Reference;
use super::circumstances::Circumstances;
use super::data;
use super::matrix::{Matrix, distinct};
use super::record::{read_json, write_json};
use super::replay::{Contender, Pace};
use super::run::{Observer, Stage};
use super::shapes::Case;
use super::statistics::Timing;
use liquidgemm::gpu::Gpu;
use liquidgemm::{Group, Plan, Problem};

pub use page::write as write_page;
pub use variants::{Variant, VariantWeights, Variants};

/// An ablation run over all problems.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Ablation {
    /// GPU, driver, date and command.
    #[serde(flatten)]
    pub circumstances: Circumstances,
    /// False while points are still missing.
    pub complete: bool,
    /// The points, in the order of measurement.
    pub points: Vec<Point>,
}

/// The times of one problem in every variant.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// Tokens.
    pub m: usize,
    /// Output channels.
    pub n: usize,
    /// Elements per channel.
    pub k: usize,
    /// Tokens of the tile.
    pub tile: u32,
    /// The plan that all variants share, as text.
    pub plan: String,
    /// The variants' times, in the order of [`Variant::ALL`].
    pub variants: Vec<VariantTime>,
    /// Number of tokens whose outputs were compared in every variant, all channels of each.
    pub tokens_checked: usize,
}

/// The time of one variant.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VariantTime {
    /// The variant.
    pub variant: Variant,
    /// Microseconds per launch.
    pub timing: Timing,
    /// The first difference from the CPU backend's result, if there is one.
    pub mismatch: Option<String>,
}

impl Point {
    /// The size of the weight matrix.
    pub fn matrix(&self) -> Matrix {
        Matrix { n: self.n, k: self.k }
    }

    /// The time of a variant in microseconds.
    pub fn us(&self, variant: Variant) -> Option<f64> {
        Some(self.variants.iter().find(|time| time.variant == variant)?.timing.us)
    }

    /// The baseline's time divided by a variant's.
    pub fn speedup(&self, variant: Variant) -> Option<f64> {
        Some(self.us(Variant::Baseline)? / self.us(variant)?)
    }

    /// Formats the point as a line under [`heading`].
    pub fn row(&self) -> String {
        let mut text = format!("{:>5} {:>12} {:>5}", self.m, self.matrix().to_string(), self.tile);
        for time in &self.variants {
            let speedup = self.speedup(time.variant).unwrap_or(f64::NAN);
            text += &format!(" {:>9.2} {speedup:>6.2}", time.timing.us);
        }
        for time in &self.variants {
            if let Some(mismatch) = &time.mismatch {
                text += &format!("  WRONG in {}: {mismatch}", time.variant);
            }
        }
        text
    }
}

/// The column headings of [`Point::row`].
/// Each variant has its time in microseconds and its speed relative to the baseline.
pub fn heading() -> String {
    let variants: String = Variant::ALL.iter().map(|variant| format!(" {:>16}", variant.name())).collect();
    format!("{:>5} {:>12} {:>5}{variants}", "M", "N x K", "tile")
}

impl Ablation {
    /// Writes the run to `path` and replaces the file in one step.
    ///
    /// # Errors
    /// If the file can't be written.
    pub fn save(&self, path: &Path) -> anyhow::Result<()> {
        write_json(path, self)
    }

    /// Reads a run from a file.
    ///
    /// # Errors
    /// If the file can't be read or is not an ablation, or if a dimension or a time is impossible.
    pub fn load(path: &Path) -> anyhow::Result<Self> {
        let run: Self = read_json(path, "ablation")?;
        let plausible = run.points.iter().all(|point| {
            point.m.min(point.n).min(point.k) > 0
                && point.variants.iter().all(|variant| variant.timing.is_plausible())
        });
        ensure!(plausible, "{} has a dimension of 0 or an impossible time", path.display());
        Ok(run)
    }

    /// The distinct matrices, in the order of their first occurrence.
    pub fn matrices(&self) -> Vec<Matrix> {
        distinct(self.points.iter().map(Point::matrix))
    }

    /// Number of wrong results.
    pub fn mismatches(&self) -> usize {
        self.points.iter().flat_map(|point| &point.variants).filter(|time| time.mismatch.is_some()).count()
    }
}

/// Measures every problem in every variant and passes the run to `measured` after each point.
///
/// A wrong result is recorded and does not end the run.
///
/// # Errors
/// If the GPU or a kernel fails, or `measured` returns an error.
pub fn run(
    gpu: &Gpu,
    cases: &[Case],
    observer: &mut dyn Observer,
    mut measured: impl FnMut(&Ablation) -> anyhow::Result<()>,
) -> anyhow::Result<Ablation> {
    let mut run = Ablation { circumstances: Circumstances::of(gpu), ..Ablation::default() };
    let stage = Stage::new(gpu, cases, None, &[])?;
    let variants = Variants::new(gpu);
    for case in cases {
        let fixture = Fixture::new(&variants, &stage, case)?;
        for &m in &case.tokens {
            observer.starts(m, case.matrix);
            let point = fixture
                .point(&stage, m)
                .with_context(|| format!("measuring M = {m}, N×K = {}", case.matrix))?;
            run.points.push(point);
            measured(&run)?;
        }
    }
    run.complete = true;
    Ok(run)
}

/// Copies of the weights of one matrix, and the expected outputs.
struct Fixture<'a> {
    variants: &'a Variants<'a>,
    weights: Vec<VariantWeights>,
    reference: Reference,
}

impl<'a> Fixture<'a> {
    fn new(variants: &'a Variants<'a>, stage: &Stage<'_>, case: &Case) -> anyhow::Result<Self> {
        let weights = data::random_weights(case.matrix.n, case.matrix.k, Group::default())?;
        let copies = copies(weights.bytes());
        let uploads = (0..copies).map(|_| VariantWeights::upload(stage.gpu, &weights));
        Ok(Self {
            variants,
            weights: uploads.collect::<Result<_, _>>()?,
            reference: stage.reference(&weights, case)?,
        })
    }

    fn point(&self, stage: &Stage<'_>, m: usize) -> anyhow::Result<Point> {
        let (n, k) = (self.weights[0].n(), self.weights[0].k());
        let plan = plan(m, n, k, stage.gpu.figures())?;
        let contenders = Variant::ALL.map(|variant| self.contender(stage, variant, &plan));
        let mut mismatches = Vec::new();
        let mut tokens_checked = 0;
        for contender in &contenders {
            stage.clear_output()?;
            (contender.launch)(0)?;
            stage.stream.synchronize()?;
            let (checked, mismatch) = self.reference.compare(&stage.arena, m)?;
            tokens_checked = checked;
            mismatches.push(mismatch);
        }
        let timings = stage.clock(Pace::THOROUGH)?.measure(&contenders);
        let mut variants = Vec::new();
        for ((variant, timing), mismatch) in Variant::ALL.into_iter().zip(timings).zip(mismatches) {
            variants.push(VariantTime { variant, timing: timing?, mismatch });
        }
        let (tile, plan) = (plan.tiled().map_or(0, |tiled| tiled.shape().tokens), plan.to_string());
        Ok(Point { m, n, k, tile, plan, variants, tokens_checked })
    }

    fn contender<'b>(&'b self, stage: &'b Stage<'_>, variant: Variant, plan: &Plan) -> Contender<'b> {
        let operands = stage.operands(plan.problem());
        let plan = *plan;
        Contender {
            copies: self.weights.len(),
            launch: Box::new(move |copy| {
                let (weights, workspace, stream) = (&self.weights[copy], &stage.workspace, &stage.stream);
                // SAFETY: all memory belongs to the stage and the fixture, which outlive the launch.
                // All launches are on one stream, which orders them.
                unsafe { self.variants.launch(variant, weights, &operands, &plan, workspace, stream) }
            }),
        }
    }
}

/// The plan that all variants share.
/// It uses the smallest tile that holds all tokens, or else the largest tile,
/// and the schedule for that tile that the planner expects to be the fastest.
fn plan(m: usize, n: usize, k: usize, figures: &liquidgemm::DeviceFigures) -> anyhow::Result<Plan> {
    let tokens = TOKENS.into_iter().find(|&tokens| m <= tokens as usize).unwrap_or(TOKENS[TOKENS.len() - 1]);
    let tile = tile(tokens).context("there is no tile shape for a size in the ablation's list")?;
    // The planner skips tiles that are at most half full, so ask for more tokens than that.
    let full = m.max(tokens as usize / 2 + 1);
    let candidates = Plan::candidates(Problem::new(full, n, k), figures)?.into_iter();
    let estimate = |plan: &Plan| plan.estimate_us(figures);
    let best = candidates
        .filter(|plan| plan.tiled().is_some_and(|tiled| tiled.shape() == tile))
        .min_by(|a, b| estimate(a).total_cmp(&estimate(b)));
    let best =
        best.as_ref().and_then(Plan::tiled).context("the planner has no plan with the ablation's tile")?;
    Ok(Plan::with_config(Problem { m, n, k }, best.config())?)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A point whose variants have the given speeds relative to the baseline, in order of [`Variant::ALL`].
    pub(crate) fn point(m: usize, n: usize, k: usize, speeds: [f64; 5]) -> Point {
        let times = Variant::ALL.into_iter().zip(speeds);
        let variants = times.map(|(variant, speed)| {
            let us = 100.0 / speed;
            let timing = Timing::new(vec![us * 0.99, us, us * 1.01], 20).unwrap();
            VariantTime { variant, timing, mismatch: None }
        });
        let (plan, variants) = ("tile".into(), variants.collect());
        Point { m, n, k, tile: 16, plan, variants, tokens_checked: 5 }
    }

    #[test]
    fn speedups_are_relative_to_the_baseline_and_a_saved_run_is_loaded_unchanged() {
        let point = point(4, 64, 128, [1.0, 1.25, 1.5, 2.0, 0.5]);
        assert!((point.speedup(Variant::Explicit).unwrap() - 1.5).abs() < 1e-12);
        let circumstances = Circumstances { device: "GPU".into(), ..Circumstances::default() };
        let mut run = Ablation { circumstances, points: vec![point], ..Ablation::default() };
        run.points[0].variants[2].mismatch = Some("token 0".into());
        assert_eq!(run.mismatches(), 1);
        assert!(run.points[0].row().contains("WRONG in +ExCP: token 0"));
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("run.json");
        run.save(&path).unwrap();
        assert_eq!(Ablation::load(&path).unwrap(), run);
        run.points[0].variants[1].timing.us = 0.0;
        run.save(&path).unwrap();
        assert!(Ablation::load(&path).unwrap_err().to_string().contains("an impossible time"));
    }

    #[test]
    fn every_point_of_the_list_has_a_plan_with_the_smallest_tile_that_holds_it() {
        for case in crate::shapes::ablation_cases() {
            for m in case.tokens {
                let plan =
                    plan(m, case.matrix.n, case.matrix.k, &liquidgemm::DeviceFigures::H100_SXM).unwrap();
                let shape = plan.tiled().unwrap().shape();
                let tokens = shape.tokens as usize;
                assert_eq!(
                    tokens,
                    if m <= 16 {
                        16
                    } else if m <= 64 {
                        64
                    } else {
                        128
                    }
                );
                assert_eq!(plan.problem(), Problem::new(m, case.matrix.n, case.matrix.k));
                assert_eq!((shape.strips, shape.warpgroup_split), (2, 1));
            }
        }
    }
}
