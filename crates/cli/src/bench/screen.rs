//! The screen of a running measurement: rows on stdout as they are measured, progress on stderr.

use std::io::Write;

use indicatif::{ProgressBar, ProgressFinish, ProgressStyle};
use liquidgemm_bench::run::Observer;
use liquidgemm_bench::shapes::{Case, Matrix};
use liquidgemm_bench::torch::Progress;

/// Characters of a script's line that the progress shows.
const MESSAGE: usize = 48;

/// A progress bar with rows above it. It is cleared when it and its clones are dropped.
#[derive(Clone)]
pub(super) struct Screen {
    bar: ProgressBar,
}

impl Screen {
    /// Returns the screen of a measurement of this many points.
    pub(super) fn new(points: usize) -> Self {
        let style = ProgressStyle::with_template("{msg:24} {wide_bar} {pos}/{len}  {eta} left")
            .expect("the template is valid");
        let bar = ProgressBar::new(points as u64).with_style(style);
        Self { bar: bar.with_finish(ProgressFinish::AndClear) }
    }

    /// Returns the screen of a measurement of these problems.
    pub(super) fn of_cases(cases: &[Case]) -> Self {
        Self::new(cases.iter().map(|case| case.tokens.len()).sum())
    }

    /// Prints above the progress bar.
    /// A closed stdout does not end the run, because results may go to a file as well.
    pub(super) fn print(&self, text: &str) {
        self.bar.suspend(|| {
            let mut out = std::io::stdout();
            let _ = writeln!(out, "{text}").and_then(|()| out.flush());
        });
    }

    /// Prints the rows of a measured point and counts it.
    pub(super) fn rows(&self, rows: impl IntoIterator<Item = impl AsRef<str>>) {
        rows.into_iter().for_each(|row| self.print(row.as_ref()));
        self.bar.inc(1);
    }

    /// Shows the progress of a script that measures torch.
    pub(super) fn torch(&self, progress: Progress<'_>) {
        match progress {
            Progress::Line(text) => {
                let start: String = text.chars().take(MESSAGE).collect();
                self.bar.set_message(format!("torch: {start}"));
            }
            Progress::Measured => self.bar.inc(1),
        }
    }
}

impl Observer for Screen {
    fn starts(&mut self, m: usize, matrix: Matrix) {
        self.bar.set_message(format!("M = {m}, {matrix}"));
    }

    fn note(&mut self, text: &str) {
        self.bar.suspend(|| eprintln!("note: {text}"));
    }
}
