//! Every plan of a problem, measured: what a planner's choice should be judged by.

use std::cmp::Ordering;

use liquidgemm_format::tile::TILE_SHAPES;
use serde::{Deserialize, Serialize};

use super::record::Run;
use super::run::{Observer, Options, Stage};
use crate::gpu::Gpu;
use crate::{Error, Plan};

/// A plan this much slower than the fastest is not timed in detail.
const HOPELESS: f64 = 2.0;

/// One problem under all of its plans.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sweep {
    /// Tokens.
    pub m: usize,
    /// Output channels.
    pub n: usize,
    /// Elements a channel.
    pub k: usize,
    /// The slower of the two probes, in microseconds.
    pub floor: f64,
    /// Every plan, the fastest first.
    pub plans: Vec<PlanTime>,
}

/// One plan's time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PlanTime {
    /// The plan in words.
    pub plan: String,
    /// Microseconds, the median of the replays.
    pub us: f64,
    /// Whether it was only estimated, because it is far behind.
    pub estimated: bool,
    /// Whether the planner would choose it.
    pub chosen: bool,
    /// The first difference to the CPU backend, if there is one.
    pub mismatch: Option<String>,
}

/// Every plan that a problem can have on a GPU.
///
/// # Errors
/// As [`Plan::new`].
pub fn candidates(m: usize, n: usize, k: usize, multiprocessors: u32) -> Result<Vec<Plan>, Error> {
    let mut plans = vec![Plan::new(m, n, k, multiprocessors)?];
    for shape in TILE_SHAPES {
        let plan = Plan::with_tile(m, n, k, shape, multiprocessors)?;
        if !plans.contains(&plan) {
            plans.push(plan);
        }
    }
    Ok(plans)
}

/// Measures every plan of every problem; `measured` is given each problem's outcome.
///
/// # Errors
/// If the GPU or a kernel fails, or `measured` does.
pub fn sweep(
    gpu: &Gpu,
    options: &Options,
    observer: &mut dyn Observer,
    mut measured: impl FnMut(Sweep) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let options = Options { cublaslt: false, ..options.clone() };
    let stage = Stage::new(gpu, &options, &mut Run::default(), observer)?;
    for case in &options.cases {
        let bed = stage.bed(case)?;
        for &m in &case.tokens {
            observer.starts(m, case.matrix);
            measured(one(&stage, &bed, m, gpu.multiprocessors())?)?;
        }
    }
    Ok(())
}

fn one(stage: &Stage<'_>, bed: &super::run::Bed, m: usize, multiprocessors: u32) -> anyhow::Result<Sweep> {
    let (n, k) = (bed.n(), bed.k());
    let clock = stage.clock()?;
    let mut floor: f64 = 0.0;
    for probe in clock.measure(&[stage.stream_probe(m, n, k), stage.mma_probe(m, n, k)]) {
        floor = floor.max(probe?.us);
    }
    let chosen = Plan::new(m, n, k, multiprocessors)?;
    let mut estimates = Vec::new();
    for plan in candidates(m, n, k, multiprocessors)? {
        estimates.push((clock.estimate(&stage.ours(bed, m, &plan))?, plan));
    }
    let fastest = estimates.iter().map(|(us, _)| *us).fold(f64::INFINITY, f64::min);
    let mut plans = Vec::new();
    for (estimate, plan) in estimates {
        let hopeless = estimate > HOPELESS * fastest && plan != chosen;
        stage.clear_output()?;
        let contender = stage.ours(bed, m, &plan);
        let us = if hopeless {
            clock.estimate(&contender)?
        } else {
            clock.measure(std::slice::from_ref(&contender)).remove(0)?.us
        };
        plans.push(PlanTime {
            plan: plan.to_string(),
            us,
            estimated: hopeless,
            chosen: plan == chosen,
            mismatch: stage.difference(bed, m)?,
        });
    }
    plans.sort_by(|a, b| a.us.partial_cmp(&b.us).unwrap_or(Ordering::Equal));
    Ok(Sweep { m, n, k, floor, plans })
}

impl Sweep {
    /// The outcome as text: a line for the problem and one for each plan.
    pub fn report(&self) -> String {
        let mut text =
            format!("M = {}, N = {}, K = {}: floor {:.2} µs\n", self.m, self.n, self.k, self.floor);
        for plan in &self.plans {
            text.push_str(&format!(
                "  {}{:>9.2} µs  score {:.3} {} {}{}\n",
                if plan.estimated { '~' } else { ' ' },
                plan.us,
                self.floor / plan.us,
                if plan.chosen { '*' } else { ' ' },
                plan.plan,
                plan.mismatch.as_ref().map(|mismatch| format!("  WRONG: {mismatch}")).unwrap_or_default(),
            ));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn candidates_begin_with_the_planners_choice_and_have_every_tile_once() {
        let plans = candidates(100, 4096, 4096, 132).unwrap();
        assert_eq!(plans[0], Plan::new(100, 4096, 4096, 132).unwrap());
        for shape in TILE_SHAPES {
            assert!(plans.iter().any(|plan| plan.shape() == shape), "{shape:?}");
        }
        for (index, plan) in plans.iter().enumerate() {
            assert!(!plans[..index].contains(plan));
        }
    }

    #[test]
    fn report_marks_the_planners_choice_and_estimates() {
        let plan =
            |us, chosen, estimated| PlanTime { plan: "tile".into(), us, estimated, chosen, mismatch: None };
        let sweep = Sweep {
            m: 1,
            n: 2,
            k: 3,
            floor: 5.0,
            plans: vec![plan(10.0, true, false), plan(30.0, false, true)],
        };
        let lines: Vec<String> = sweep.report().lines().map(str::to_owned).collect();
        assert!(lines[1].contains("10.00 µs  score 0.500 * tile"), "{}", lines[1]);
        assert!(lines[2].trim_start().starts_with('~'));
    }
}
