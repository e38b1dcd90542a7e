//! Runs over the quantization of activations.

use std::path::Path;

use liquidgemm_bench::activations::{self, Activations, Options, Point};
use liquidgemm_bench::plots::{self, Picture};
use liquidgemm_bench::torch::Progress;

use super::kind::{self, Kind};
use super::screen::Screen;
use super::{Arguments, Tokens};

/// The rows that are measured by default.
const ROWS: [usize; 7] = [1, 4, 16, 64, 256, 2048, 8192];
/// The lengths of a row.
const LENGTHS: [usize; 3] = [4096, 8192, 28672];

impl Kind for Activations {
    type Pictures = Vec<Picture>;

    const SINGLE: Option<&'static str> = Some("--activations");

    fn measure(arguments: &Arguments) -> anyhow::Result<Self> {
        let gpu = arguments.gpu()?;
        let rows = arguments.m.as_ref().map_or(&ROWS[..], |Tokens(tokens)| tokens);
        let options = Options { rows, lengths: &LENGTHS, pace: arguments.options().pace };
        let torch = match &arguments.torch {
            None => None,
            Some(python) => {
                let screen = Screen::new(activations::torch_jobs(&options));
                let mut watch = |progress: Progress<'_>| screen.torch(progress);
                Some(activations::measure_torch(&gpu, python, &options, &mut watch)?)
            }
        };
        let screen = Screen::new(options.problems().count());
        screen.print(&format!("{}\n{}", gpu.description(), activations::heading()));
        let run = activations::run(&gpu, &options, torch.as_ref(), |run| {
            screen.rows(run.points.last().map(Point::row));
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
        kind::table(&self.circumstances.device, &activations::heading(), self.points.iter().map(Point::row))
    }

    fn plot(runs: &[Self], directory: &Path) -> anyhow::Result<Vec<Picture>> {
        runs.first().map_or(Ok(Vec::new()), |run| plots::write_activations(run, directory))
    }

    fn write_page(runs: &[Self], pictures: &Vec<Picture>, path: &Path) -> anyhow::Result<()> {
        runs.first().map_or(Ok(()), |run| activations::write_page(run, pictures, path))
    }

    fn mismatches(&self) -> usize {
        Activations::mismatches(self)
    }
}
