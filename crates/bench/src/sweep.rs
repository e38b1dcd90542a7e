//! Measures every plan of a problem, which shows how good the planner's choice is.
//! Memory and operands come from [`run`](super::run), times from [`replay`](super::replay).

use std::cmp::Ordering;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::record::read_json;
use super::replay::Pace;
use super::run::{Observer, Stage};
use super::shapes::Case;
use super::statistics::geometric_mean;
use liquidgemm::gpu::Gpu;
use liquidgemm::{Group, Plan, Problem};

/// Plans that are estimated to take longer than the fastest one by this factor are not timed in detail.
const HOPELESS: f64 = 1.3;
/// Number of plans that a report lists, besides the planner's choice and plans with wrong results.
const REPORTED: usize = 10;

/// The times of all plans of one problem.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sweep {
    /// Tokens.
    pub m: usize,
    /// Output channels.
    pub n: usize,
    /// Elements per channel.
    pub k: usize,
    /// SMs of the GPU.
    pub multiprocessors: u32,
    /// The time of the slower probe, in microseconds.
    pub floor: f64,
    /// All plans, the fastest first.
    pub plans: Vec<PlanTime>,
}

/// One plan's time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PlanTime {
    /// The plan as text.
    pub plan: String,
    /// Microseconds, the median of the replays.
    pub us: f64,
    /// Whether the time is only an estimate, because the plan is far slower than the fastest one.
    pub estimated: bool,
    /// Whether the planner chooses this plan.
    pub chosen: bool,
    /// The first difference from the CPU backend's result, if there is one.
    pub mismatch: Option<String>,
}

/// Measures every plan of every problem and passes the outcome of each problem to `measured`.
///
/// # Errors
/// If the GPU or a kernel fails, or `measured` returns an error.
pub fn sweep(
    gpu: &Gpu,
    cases: &[Case],
    observer: &mut dyn Observer,
    mut measured: impl FnMut(Sweep) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let stage = Stage::new(gpu, cases, None, &[])?;
    for case in cases {
        let fixture = stage.fixture(case, Group::default())?;
        for &m in &case.tokens {
            observer.starts(m, case.matrix);
            measured(one(&stage, &fixture, m, gpu.figures())?)?;
        }
    }
    Ok(())
}

fn one(
    stage: &Stage<'_>,
    fixture: &super::run::Fixture,
    m: usize,
    figures: &liquidgemm::DeviceFigures,
) -> anyhow::Result<Sweep> {
    let (n, k) = (fixture.n(), fixture.k());
    let clock = stage.clock(Pace::RANKING)?;
    let mut floor: f64 = 0.0;
    for probe in clock.measure(&[stage.stream_probe(m, n, k, Group::default()), stage.mma_probe(m, n, k)]) {
        floor = floor.max(probe?.us);
    }
    let chosen = Plan::new(Problem { m, n, k }, figures)?;
    let mut estimates = Vec::new();
    for plan in Plan::candidates(Problem { m, n, k }, figures)? {
        estimates.push((clock.estimate(&stage.ours(fixture, m, &plan))?, plan));
    }
    let fastest = estimates.iter().map(|(us, _)| *us).fold(f64::INFINITY, f64::min);
    let mut plans = Vec::new();
    for (estimate, plan) in estimates {
        let hopeless = estimate > HOPELESS * fastest && !plan.launches_like(&chosen);
        stage.clear_output()?;
        let contender = stage.ours(fixture, m, &plan);
        let us = if hopeless {
            clock.estimate(&contender)?
        } else {
            clock.measure(std::slice::from_ref(&contender)).remove(0)?.us
        };
        plans.push(PlanTime {
            plan: plan.to_string(),
            us,
            estimated: hopeless,
            chosen: plan.launches_like(&chosen),
            mismatch: stage.difference(fixture, m)?,
        });
    }
    plans.sort_by(|a, b| a.us.partial_cmp(&b.us).unwrap_or(Ordering::Equal));
    Ok(Sweep { m, n, k, multiprocessors: figures.multiprocessors, floor, plans })
}

impl Sweep {
    /// Reads recorded sweeps and marks the plans that the present planner chooses on an H100 SXM.
    ///
    /// # Errors
    /// If the file can't be read or is not a sweep, or if a problem in it can't be planned.
    pub fn load(path: &Path) -> anyhow::Result<Vec<Self>> {
        let mut sweeps: Vec<Self> = read_json(path, "sweep")?;
        for sweep in &mut sweeps {
            let chosen =
                Plan::new(Problem::new(sweep.m, sweep.n, sweep.k), &liquidgemm::DeviceFigures::H100_SXM)?
                    .to_string();
            sweep.plans.iter_mut().for_each(|plan| plan.chosen = plan.plan == chosen);
        }
        Ok(sweeps)
    }

    /// The time of the planner's choice divided by that of the fastest plan.
    /// `None` if the planner's choice is missing or was only estimated.
    pub fn loss(&self) -> Option<f64> {
        let chosen = self.plans.iter().find(|plan| plan.chosen && !plan.estimated)?;
        Some(chosen.us / self.plans.first()?.us)
    }

    /// Formats the outcome as text: a line for the problem, then one for each of the fastest plans.
    /// The planner's choice and plans with wrong results always have a line.
    pub fn report(&self) -> String {
        let mut text =
            format!("M = {}, N = {}, K = {}: floor {:.2} µs\n", self.m, self.n, self.k, self.floor);
        let worth_a_line =
            |(rank, plan): &(usize, &PlanTime)| *rank < REPORTED || plan.chosen || plan.mismatch.is_some();
        for (_, plan) in self.plans.iter().enumerate().filter(worth_a_line) {
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

/// Says in one sentence how much longer the planner's choices take than the fastest plans.
pub fn verdict(sweeps: &[Sweep]) -> String {
    let percent = |loss: f64| (loss - 1.0) * 100.0;
    let losses = || sweeps.iter().filter_map(|sweep| Some((sweep.loss()?, sweep)));
    let Some(mean) = geometric_mean(losses().map(|(loss, _)| loss)) else {
        return "No choice of the planner was timed.".into();
    };
    let mut text = format!("The planner's choices take {:.2} % longer than the fastest plans", percent(mean));
    if let Some((most, Sweep { m, n, k, .. })) = losses().max_by(|(a, _), (b, _)| a.total_cmp(b)) {
        let most = percent(most);
        text += &format!(" (geometric mean), {most:.1} % at most (M = {m}, N = {n}, K = {k})");
    }
    match sweeps.len() - losses().count() {
        0 => text + ".",
        missing => text + &format!("; they were not timed for {missing} of {} problems.", sweeps.len()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(us: f64, chosen: bool, estimated: bool) -> PlanTime {
        PlanTime { plan: "tile".into(), us, estimated, chosen, mismatch: None }
    }

    fn sweep_of(plans: Vec<PlanTime>) -> Sweep {
        Sweep { m: 1, n: 2, k: 3, multiprocessors: 132, floor: 5.0, plans }
    }

    #[test]
    fn verdict_names_the_mean_loss_the_worst_and_what_is_missing() {
        let sweeps = [
            sweep_of(vec![plan(10.0, true, false), plan(12.0, false, false)]),
            Sweep { m: 7, ..sweep_of(vec![plan(10.0, false, false), plan(12.1, true, false)]) },
            sweep_of(vec![plan(10.0, false, false), plan(90.0, true, true)]),
        ];
        let text = verdict(&sweeps);
        assert!(text.contains("take 10.00 % longer"), "{text}");
        assert!(text.contains("21.0 % at most (M = 7, N = 2, K = 3)"), "{text}");
        assert!(text.contains("1 of 3 problems"), "{text}");
        assert!(verdict(&sweeps[2..]).contains("No choice"));
    }

    #[test]
    fn a_loaded_sweep_marks_the_choice_of_the_present_planner() {
        let (m, n, k) = (64, 4096, 4096);
        let plans: Vec<PlanTime> =
            Plan::candidates(Problem { m, n, k }, &liquidgemm::DeviceFigures::H100_SXM)
                .unwrap()
                .iter()
                .map(|candidate| PlanTime { plan: candidate.to_string(), ..plan(1.0, true, false) })
                .collect();
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("sweep.json");
        crate::record::write_json(&path, &[Sweep { m, n, k, ..sweep_of(plans) }]).unwrap();
        let loaded = Sweep::load(&path).unwrap();
        let chosen: Vec<&str> =
            loaded[0].plans.iter().filter(|plan| plan.chosen).map(|plan| plan.plan.as_str()).collect();
        assert_eq!(
            chosen,
            [Plan::new(Problem { m, n, k }, &liquidgemm::DeviceFigures::H100_SXM).unwrap().to_string()]
        );
    }

    #[test]
    fn report_marks_the_planners_choice_and_estimates() {
        let mut plans: Vec<PlanTime> = (10..50).map(|us| plan(us.into(), false, us > 20)).collect();
        plans[39].chosen = true;
        let sweep = sweep_of(plans);
        let lines: Vec<String> = sweep.report().lines().map(str::to_owned).collect();
        assert_eq!(lines.len(), 1 + REPORTED + 1);
        assert!(lines[1].contains("10.00 µs  score 0.500   tile"), "{}", lines[1]);
        assert!(lines[11].trim_start().starts_with('~') && lines[11].contains("* tile"), "{}", lines[11]);
    }
}
