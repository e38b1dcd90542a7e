//! What all kinds of runs have in common: a run is measured or read from a file, shown as text,
//! and written as a page with pictures.

use std::path::Path;

use anyhow::bail;

use super::Arguments;
use crate::Report;

/// A kind of run.
pub(super) trait Kind: Sized {
    /// The option that chooses a kind whose report is about a single run.
    const SINGLE: Option<&'static str> = None;

    /// What the page links of the plots.
    type Pictures: Default;

    /// Measures a run, shows its rows as they are measured, and keeps the JSON file up to date.
    fn measure(arguments: &Arguments) -> anyhow::Result<Self>;

    /// Reads a run from a file.
    fn load(path: &Path) -> anyhow::Result<Self>;

    /// Formats the heading and the rows of a run that was read.
    fn table(&self) -> String;

    /// Formats what follows the rows of a run.
    fn summary(&self) -> String {
        String::new()
    }

    /// Formats what follows all runs.
    fn conclusion(_runs: &[Self]) -> String {
        String::new()
    }

    /// Writes the plots.
    fn plot(runs: &[Self], directory: &Path) -> anyhow::Result<Self::Pictures>;

    /// Writes the page.
    fn write_page(runs: &[Self], pictures: &Self::Pictures, path: &Path) -> anyhow::Result<()>;

    /// Returns the number of wrong results.
    fn mismatches(&self) -> usize;

    /// Formats which results are wrong; there are `wrong` of them in all runs.
    fn complaint(_runs: &[Self], wrong: usize) -> String {
        format!("\n{wrong} results differ from the CPU backend's\n")
    }
}

/// Formats the device, the heading and the rows of a run that was read.
pub(super) fn table(device: &str, heading: &str, rows: impl Iterator<Item = String>) -> String {
    let rows: String = rows.map(|row| row + "\n").collect();
    format!("{device}\n{heading}\n{rows}")
}

/// Measures or reads runs, writes their files and reports them.
pub(super) fn report<K: Kind>(arguments: &Arguments) -> anyhow::Result<Report> {
    let loaded = !arguments.from.is_empty();
    if let Some(option) = K::SINGLE
        && arguments.from.len() > 1
    {
        bail!("{option} reads one run; give --from once");
    }
    let runs = if loaded {
        arguments.from.iter().map(|path| K::load(path)).collect::<Result<Vec<_>, _>>()?
    } else {
        vec![K::measure(arguments)?]
    };
    let mut text = String::new();
    for run in &runs {
        if loaded {
            text += &run.table();
        }
        text += &run.summary();
    }
    text += &K::conclusion(&runs);
    let pictures = match &arguments.plots {
        Some(directory) => K::plot(&runs, directory)?,
        None => K::Pictures::default(),
    };
    if let Some(path) = &arguments.markdown {
        K::write_page(&runs, &pictures, path)?;
    }
    let wrong: usize = runs.iter().map(K::mismatches).sum();
    if wrong > 0 {
        text += &K::complaint(&runs, wrong);
    }
    Ok(Report { text, success: wrong == 0 })
}
