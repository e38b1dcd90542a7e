//! Runs over mixtures of experts.

use std::path::Path;

use liquidgemm_bench::moe::{self, Mixtures, Plans};
use liquidgemm_bench::plots;
use liquidgemm_bench::torch::Progress;

use super::kind::Kind;
use super::screen::Screen;
use super::{Arguments, Tokens};

impl Kind for Mixtures {
    fn measure(arguments: &Arguments) -> anyhow::Result<Self> {
        let gpu = arguments.gpu()?;
        let points = moe::points(arguments.m.as_ref().map(|Tokens(tokens)| tokens.as_slice()));
        let (group, pace) = (arguments.group, arguments.options().pace);
        let torch = match &arguments.torch {
            None => None,
            Some(python) => {
                let screen = Screen::new(points.len());
                let mut watch = |progress: Progress<'_>| screen.torch(progress);
                Some(moe::measure_torch(&gpu, python, &points, group, pace, &mut watch)?)
            }
        };
        let screen = Screen::new(points.len());
        screen.print(&format!("{}\n{}\n{}", gpu.description(), moe::page().provenance, moe::heading()));
        let plans = if arguments.every_plan { Plans::Every } else { Plans::Chosen };
        let run = moe::run(&gpu, &points, group, pace, plans, torch.as_ref(), |run, new| {
            screen.rows(run.points[run.points.len() - new..].iter().map(moe::row));
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
        let rows = self.points.iter().map(|point| format!("{}\n", moe::row(point)));
        format!("{}\n{}\n{}", self.circumstances.device, moe::heading(), rows.collect::<String>())
    }

    fn summary(&self) -> String {
        format!("\n{}", moe::summary(&self.points))
    }

    fn write(runs: &[Self], arguments: &Arguments) -> anyhow::Result<()> {
        let pictures = match &arguments.plots {
            Some(directory) => plots::write_mixtures(runs, directory)?,
            None => Vec::new(),
        };
        arguments.markdown.as_deref().map_or(Ok(()), |path| moe::write_page(runs, &pictures, path))
    }

    fn mismatches(&self) -> usize {
        Mixtures::mismatches(self)
    }
}
