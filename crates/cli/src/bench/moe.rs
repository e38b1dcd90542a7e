//! Runs over mixtures of experts.

use std::path::Path;

use liquidgemm_bench::moe::{self, Mixtures, Plans};
use liquidgemm_bench::plots::{self, Picture};
use liquidgemm_bench::torch::Progress;

use super::kind::{self, Kind};
use super::screen::Screen;
use super::{Arguments, Tokens};

impl Kind for Mixtures {
    type Pictures = Vec<Vec<Picture>>;

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
        kind::table(&self.circumstances.device, &moe::heading(), self.points.iter().map(moe::row))
    }

    fn summary(&self) -> String {
        format!("\n{}", moe::summary(&self.points))
    }

    fn plot(runs: &[Self], directory: &Path) -> anyhow::Result<Vec<Vec<Picture>>> {
        plots::write_mixtures(runs, directory)
    }

    fn write_page(runs: &[Self], pictures: &Vec<Vec<Picture>>, path: &Path) -> anyhow::Result<()> {
        moe::write_page(runs, pictures, path)
    }

    fn mismatches(&self) -> usize {
        Mixtures::mismatches(self)
    }
}
