//! Sweeps: the time of every plan of each problem.

use std::path::Path;

use liquidgemm_bench::record::write_json;
use liquidgemm_bench::sweep::{Sweep, sweep, verdict};

use super::Arguments;
use super::kind::Kind;
use super::screen::Screen;

/// The problems of a run.
pub(super) struct Sweeps(Vec<Sweep>);

impl Kind for Sweeps {
    type Pictures = ();

    fn measure(arguments: &Arguments) -> anyhow::Result<Self> {
        let gpu = arguments.gpu()?;
        let cases = arguments.cases();
        let mut screen = Screen::of_cases(&cases);
        let rows = screen.clone();
        screen.print(&format!(
            "{}\n*: the planner's choice; ~: estimated only, far slower than the fastest",
            gpu.description()
        ));
        let mut sweeps = Vec::new();
        sweep(&gpu, &cases, &mut screen, |sweep| {
            rows.rows([sweep.report().trim_end()]);
            sweeps.push(sweep);
            arguments.keep(|path| write_json(path, &sweeps))
        })?;
        Ok(Self(sweeps))
    }

    fn load(path: &Path) -> anyhow::Result<Self> {
        Sweep::load(path).map(Self)
    }

    fn table(&self) -> String {
        self.0.iter().map(Sweep::report).collect()
    }

    fn conclusion(runs: &[Self]) -> String {
        let all: Vec<Sweep> = runs.iter().flat_map(|run| run.0.clone()).collect();
        format!("{}\n", verdict(&all))
    }

    // Sweeps have neither plots nor pages; the arguments exclude both.
    fn plot(_runs: &[Self], _directory: &Path) -> anyhow::Result<()> {
        Ok(())
    }

    fn write_page(_runs: &[Self], _pictures: &(), _path: &Path) -> anyhow::Result<()> {
        Ok(())
    }

    fn mismatches(&self) -> usize {
        self.0.iter().flat_map(|sweep| &sweep.plans).filter(|plan| plan.mismatch.is_some()).count()
    }
}
