//! Ablations: the kernel without one of its ideas at a time.

use std::path::Path;

use liquidgemm_bench::ablation::{self, Ablation, Point};
use liquidgemm_bench::plots::{self, Picture};

use super::Arguments;
use super::kind::{self, Kind};
use super::screen::Screen;

impl Kind for Ablation {
    type Pictures = Vec<Picture>;

    const SINGLE: Option<&'static str> = Some("--ablation");

    fn measure(arguments: &Arguments) -> anyhow::Result<Self> {
        let gpu = arguments.gpu()?;
        let cases = arguments.cases();
        let mut screen = Screen::of_cases(&cases);
        let rows = screen.clone();
        screen.print(&format!("{}\n{}", gpu.description(), ablation::heading()));
        let run = ablation::run(&gpu, &cases, &mut screen, |run| {
            rows.rows(run.points.last().map(Point::row));
            arguments.keep(|path| run.save(path))
        })?;
        // The run is marked as complete only now.
        arguments.keep(|path| run.save(path))?;
        Ok(run)
    }

    fn load(path: &Path) -> anyhow::Result<Self> {
        Self::load(path)
    }

    fn table(&self) -> String {
        kind::table(&self.circumstances.device, &ablation::heading(), self.points.iter().map(Point::row))
    }

    fn plot(runs: &[Self], directory: &Path) -> anyhow::Result<Vec<Picture>> {
        runs.first().map_or(Ok(Vec::new()), |run| plots::write_ablation(run, directory))
    }

    fn write_page(runs: &[Self], pictures: &Vec<Picture>, path: &Path) -> anyhow::Result<()> {
        runs.first().map_or(Ok(()), |run| ablation::write_page(run, pictures, path))
    }

    fn mismatches(&self) -> usize {
        Ablation::mismatches(self)
    }
}
