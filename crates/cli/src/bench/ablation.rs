//! Ablations: the kernel without one of its ideas at a time.

use std::path::Path;

use liquidgemm_bench::ablation::{self, Ablation, Point};
use liquidgemm_bench::plots;

use super::Arguments;
use super::kind::Kind;
use super::screen::Screen;

impl Kind for Ablation {
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
        let rows = self.points.iter().map(|point| format!("{}\n", point.row()));
        format!("{}\n{}\n{}", self.circumstances.device, ablation::heading(), rows.collect::<String>())
    }

    fn write(runs: &[Self], arguments: &Arguments) -> anyhow::Result<()> {
        for run in runs {
            let pictures = match &arguments.plots {
                Some(directory) => plots::write_ablation(run, directory)?,
                None => Vec::new(),
            };
            if let Some(path) = &arguments.markdown {
                ablation::write_page(run, &pictures, path)?;
            }
        }
        Ok(())
    }

    fn mismatches(&self) -> usize {
        Ablation::mismatches(self)
    }
}
