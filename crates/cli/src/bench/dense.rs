//! Runs over single matrices: our kernel, the probes and cuBLASLt.

use std::path::Path;

use liquidgemm_bench::circumstances::Circumstances;
use liquidgemm_bench::plots::{self, Pictures};
use liquidgemm_bench::record::Run;
use liquidgemm_bench::run::Observer;
use liquidgemm_bench::shapes::Matrix;
use liquidgemm_bench::{markdown, monotone, table, targets};

use super::Arguments;
use super::kind::{self, Kind};
use super::screen::Screen;

impl Kind for Run {
    type Pictures = Pictures;

    fn measure(arguments: &Arguments) -> anyhow::Result<Self> {
        let gpu = arguments.gpu()?;
        let options = arguments.options();
        let mut rows = Rows { screen: Screen::of_cases(&options.cases), arguments };
        rows.screen.print(&format!("{}\n{}", gpu.description(), table::heading()));
        let run = liquidgemm_bench::run::run(&gpu, &options, &mut rows)?;
        // The run is marked as complete only now.
        arguments.keep(|path| run.save(path))?;
        Ok(run)
    }

    fn load(path: &Path) -> anyhow::Result<Self> {
        Self::load(path)
    }

    fn table(&self) -> String {
        let Circumstances { device, date, kernels, .. } = &self.circumstances;
        let device = format!("{device}, {date}, kernels {kernels}");
        kind::table(&device, &table::heading(), self.points.iter().map(table::row))
    }

    fn conclusion(runs: &[Self]) -> String {
        let merged = Run::merged(runs);
        let mut text = format!("\n{}\n{}", table::LEGEND, table::bands(&merged));
        let verdicts = targets::report(&targets::judge(&merged));
        if !verdicts.is_empty() {
            text += &format!("\n{verdicts}");
        }
        for run in runs {
            if let Some(breaks) = &run.breaks {
                text += &format!("\n{}", monotone::report(breaks, &run.points));
            }
        }
        text
    }

    fn plot(runs: &[Self], directory: &Path) -> anyhow::Result<Pictures> {
        plots::write(runs, directory)
    }

    fn write_page(runs: &[Self], pictures: &Pictures, path: &Path) -> anyhow::Result<()> {
        markdown::write(runs, pictures, path)
    }

    fn mismatches(&self) -> usize {
        Run::mismatches(self).count()
    }

    fn complaint(runs: &[Self], wrong: usize) -> String {
        let all: usize = runs.iter().map(|run| run.points.len()).sum();
        format!("\n{wrong} of {all} results differ from the CPU backend's\n")
    }
}

/// Shows the points of a run as they are measured.
struct Rows<'a> {
    screen: Screen,
    arguments: &'a Arguments,
}

impl Observer for Rows<'_> {
    fn starts(&mut self, m: usize, matrix: Matrix) {
        self.screen.starts(m, matrix);
    }

    fn measured(&mut self, run: &Run) -> anyhow::Result<()> {
        self.screen.rows(run.points.last().map(table::row));
        self.arguments.keep(|path| run.save(path))
    }

    fn note(&mut self, text: &str) {
        self.screen.note(text);
    }
}
