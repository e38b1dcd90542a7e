//! The ablation, the paper's figure 13 remade: what each idea of the kernel is worth. Every arm computes the same product
//! with the same tile and the same schedule, and its result is compared bit for bit with the CPU backend's.

mod page;

use std::path::Path;

use anyhow::{Context, ensure};
use liquidgemm_format::ablation::{TOKENS, tile};
use serde::{Deserialize, Serialize};

use super::arena::copies;
use super::check::Reference;
use super::circumstances::Circumstances;
use super::data;
use super::record::{read_json, write_json};
use super::replay::{Contender, Pace};
use super::run::{Observer, Stage};
use super::shapes::{Case, Matrix, distinct};
use super::statistics::Timing;
use crate::gpu::Gpu;
use crate::gpu::ablation::{Arm, ArmWeights};
use crate::{Group, Plan};

pub use page::write as write_page;

/// A whole run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Ablation {
    /// On which GPU, when and with what.
    #[serde(flatten)]
    pub circumstances: Circumstances,
    /// False while points are still missing.
    pub complete: bool,
    /// In the order of measuring.
    pub points: Vec<Point>,
}

/// One problem, measured in every arm.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// Tokens.
    pub m: usize,
    /// Output channels.
    pub n: usize,
    /// Elements a channel.
    pub k: usize,
    /// Tokens of the tile.
    pub tile: u32,
    /// How every arm was launched.
    pub plan: String,
    /// In the order of [`Arm::ALL`].
    pub arms: Vec<ArmTime>,
    /// Tokens whose outputs were compared in every arm, every channel of them.
    pub tokens_checked: usize,
}

/// One arm's time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ArmTime {
    /// Which.
    pub arm: Arm,
    /// Microseconds a launch.
    pub timing: Timing,
    /// The first difference to the CPU backend, if there is one.
    pub mismatch: Option<String>,
}

impl Point {
    /// The weights.
    pub fn matrix(&self) -> Matrix {
        Matrix { n: self.n, k: self.k }
    }

    /// Microseconds of an arm.
    pub fn us(&self, arm: Arm) -> Option<f64> {
        Some(self.arms.iter().find(|time| time.arm == arm)?.timing.us)
    }

    /// The baseline's time over an arm's.
    pub fn speedup(&self, arm: Arm) -> Option<f64> {
        Some(self.us(Arm::Baseline)? / self.us(arm)?)
    }

    /// The point as a line under [`heading`].
    pub fn row(&self) -> String {
        let mut text = format!("{:>5} {:>12} {:>5}", self.m, self.matrix().to_string(), self.tile);
        for time in &self.arms {
            let speedup = self.speedup(time.arm).unwrap_or(f64::NAN);
            text += &format!(" {:>9.2} {speedup:>6.2}", time.timing.us);
        }
        for time in &self.arms {
            if let Some(mismatch) = &time.mismatch {
                text += &format!("  WRONG in {}: {mismatch}", time.arm);
            }
        }
        text
    }
}

/// The columns of [`Point::row`]: of each arm microseconds and speed relative to the baseline.
pub fn heading() -> String {
    let arms: String = Arm::ALL.iter().map(|arm| format!(" {:>16}", arm.name())).collect();
    format!("{:>5} {:>12} {:>5}{arms}", "M", "N x K", "tile")
}

impl Ablation {
    /// Writes the run to `path` in one step.
    ///
    /// # Errors
    /// If the file can't be written.
    pub fn save(&self, path: &Path) -> anyhow::Result<()> {
        write_json(path, self)
    }

    /// Reads a run back.
    ///
    /// # Errors
    /// If the file can't be read or holds something else, or a dimension or a time is impossible.
    pub fn load(path: &Path) -> anyhow::Result<Self> {
        let run: Self = read_json(path, "ablation")?;
        let plausible = run.points.iter().all(|point| {
            point.m.min(point.n).min(point.k) > 0 && point.arms.iter().all(|arm| arm.timing.is_plausible())
        });
        ensure!(plausible, "{} has a dimension of 0 or an impossible time", path.display());
        Ok(run)
    }

    /// The matrices, in the order in which they first occur.
    pub fn matrices(&self) -> Vec<Matrix> {
        distinct(self.points.iter().map(Point::matrix))
    }

    /// How many results were wrong.
    pub fn mismatches(&self) -> usize {
        self.points.iter().flat_map(|point| &point.arms).filter(|time| time.mismatch.is_some()).count()
    }
}

/// Measures every problem in every arm; `measured` is given the run after each point.
///
/// A wrong result is recorded and does not end the run.
///
/// # Errors
/// If the GPU or a kernel fails, or `measured` does.
pub fn run(
    gpu: &Gpu,
    cases: &[Case],
    observer: &mut dyn Observer,
    mut measured: impl FnMut(&Ablation) -> anyhow::Result<()>,
) -> anyhow::Result<Ablation> {
    let mut run = Ablation { circumstances: Circumstances::of(gpu), ..Ablation::default() };
    let stage = Stage::new(gpu, cases, None, &[])?;
    for case in cases {
        let fixture = Fixture::new(&stage, case)?;
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

/// The weights of one matrix, and what the products with them should be.
struct Fixture {
    weights: Vec<ArmWeights>,
    reference: Reference,
}

impl Fixture {
    fn new(stage: &Stage<'_>, case: &Case) -> anyhow::Result<Self> {
        let weights = data::random_weights(case.matrix.n, case.matrix.k, Group::default())?;
        let copies = copies(weights.bytes());
        let uploads = (0..copies).map(|_| stage.gpu.upload_for_ablation(&weights));
        Ok(Self { weights: uploads.collect::<Result<_, _>>()?, reference: stage.reference(&weights, case)? })
    }

    fn point(&self, stage: &Stage<'_>, m: usize) -> anyhow::Result<Point> {
        let (n, k) = (self.weights[0].n(), self.weights[0].k());
        let plan = plan(m, n, k, stage.gpu.figures())?;
        let contenders = Arm::ALL.map(|arm| self.contender(stage, arm, &plan));
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
        let mut arms = Vec::new();
        for ((arm, timing), mismatch) in Arm::ALL.into_iter().zip(timings).zip(mismatches) {
            arms.push(ArmTime { arm, timing: timing?, mismatch });
        }
        let (tile, plan) = (plan.tiled().map_or(0, |tiled| tiled.shape().tokens), plan.to_string());
        Ok(Point { m, n, k, tile, plan, arms, tokens_checked })
    }

    fn contender<'a>(&'a self, stage: &'a Stage<'_>, arm: Arm, plan: &Plan) -> Contender<'a> {
        let operands = stage.operands(plan.problem());
        let plan = *plan;
        Contender {
            copies: self.weights.len(),
            launch: Box::new(move |copy| {
                let (weights, workspace, stream) = (&self.weights[copy], &stage.workspace, &stage.stream);
                // SAFETY: all memory lives in the stage and the fixture, and one stream orders the launches.
                unsafe { stage.gpu.ablation(arm, weights, &operands, &plan, workspace, stream) }?;
                Ok(())
            }),
        }
    }
}

/// The plan of every arm: the smallest tile that holds all tokens, or else the largest, and of its schedules the one that
/// the planner takes for the fastest.
fn plan(m: usize, n: usize, k: usize, figures: &crate::DeviceFigures) -> anyhow::Result<Plan> {
    let tokens = TOKENS.into_iter().find(|&tokens| m <= tokens as usize).unwrap_or(TOKENS[TOKENS.len() - 1]);
    let tile = tile(tokens).context("the ablation lists a tile that it doesn't have")?;
    // The planner passes over tiles that are half empty, but this is about tiles alike in all arms.
    let full = m.max(tokens as usize / 2 + 1);
    let candidates = Plan::candidates(full, n, k, figures)?.into_iter();
    let estimate = |plan: &Plan| plan.estimate_us(figures);
    let best = candidates
        .filter(|plan| plan.tiled().is_some_and(|tiled| tiled.shape() == tile))
        .min_by(|a, b| estimate(a).total_cmp(&estimate(b)));
    let best =
        best.as_ref().and_then(Plan::tiled).context("the planner has no plan with the ablation's tile")?;
    Ok(Plan::with_cut(m, n, k, best.cut())?)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A point whose arms are so many times as fast as the baseline, in the order of [`Arm::ALL`].
    pub(crate) fn point(m: usize, n: usize, k: usize, speeds: [f64; 5]) -> Point {
        let times = Arm::ALL.into_iter().zip(speeds);
        let arms = times.map(|(arm, speed)| {
            let us = 100.0 / speed;
            let timing = Timing::new(vec![us * 0.99, us, us * 1.01], 20).unwrap();
            ArmTime { arm, timing, mismatch: None }
        });
        let (plan, arms) = ("tile".into(), arms.collect());
        Point { m, n, k, tile: 16, plan, arms, tokens_checked: 5 }
    }

    #[test]
    fn speedups_are_over_the_baseline_and_runs_survive_a_file() {
        let point = point(4, 64, 128, [1.0, 1.25, 1.5, 2.0, 0.5]);
        assert!((point.speedup(Arm::Explicit).unwrap() - 1.5).abs() < 1e-12);
        let circumstances = Circumstances { device: "GPU".into(), ..Circumstances::default() };
        let mut run = Ablation { circumstances, points: vec![point], ..Ablation::default() };
        run.points[0].arms[2].mismatch = Some("token 0".into());
        assert_eq!(run.mismatches(), 1);
        assert!(run.points[0].row().contains("WRONG in +ExCP: token 0"));
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("run.json");
        run.save(&path).unwrap();
        assert_eq!(Ablation::load(&path).unwrap(), run);
        run.points[0].arms[1].timing.us = 0.0;
        run.save(&path).unwrap();
        assert!(Ablation::load(&path).unwrap_err().to_string().contains("an impossible time"));
    }

    #[test]
    fn every_point_of_the_list_has_a_plan_with_the_smallest_tile_that_holds_it() {
        for case in crate::bench::shapes::ablation_cases() {
            for m in case.tokens {
                let plan = plan(m, case.matrix.n, case.matrix.k, &crate::DeviceFigures::H100_SXM).unwrap();
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
                assert_eq!(plan.problem(), [m, case.matrix.n, case.matrix.k]);
                assert_eq!((shape.strips, shape.halves), (2, 1));
            }
        }
    }
}
