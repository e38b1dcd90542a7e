//! `liquidgemm compare`: the distance between the weights of two models, packed or not.

use std::fmt::Write;
use std::path::PathBuf;

use liquidgemm_checkpoint::{Model, compare};
use serde_json::json;

use super::Report;
use super::models::{EXIT_CODES, Table, json_report, percent, printable};
use super::progress::Progress;
use super::units::digits;

/// Compare the matrices of two models, packed or not
///
/// The difference of a matrix is ‖B − A‖ / ‖A‖.
/// The exit code is 0 also if the models differ.
#[derive(clap::Args)]
#[command(after_help = EXIT_CODES)]
pub(super) struct Arguments {
    /// Model that is the reference
    a: PathBuf,

    /// Model to compare with it
    b: PathBuf,

    /// Write the result as JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(arguments: &Arguments) -> anyhow::Result<Report> {
    let (a, b) = (Model::open(&arguments.a)?, Model::open(&arguments.b)?);
    let found = compare(&a, &b, &Progress::bytes("comparing"))?;
    if arguments.json {
        let modules = found.modules.iter().map(|(name, figures)| {
            json!({"name": name, "relative_difference": figures.relative, "largest_difference": figures.largest})
        });
        let value = json!({
            "a": arguments.a, "b": arguments.b, "modules": modules.collect::<Vec<_>>(),
            "shapes_differ": found.shapes_differ, "only_in_a": found.only_in_first, "only_in_b": found.only_in_second,
        });
        return Ok(json_report(&value, true));
    }
    let mut table = Table::new(&["matrix", "difference", "largest"], &[false, true, true]);
    for (name, figures) in &found.modules {
        table.row([name.clone(), percent(figures.relative), digits(figures.largest)]);
    }
    let mut text = table.render();
    let lists = [
        ("other shape", &found.shapes_differ),
        ("only in A", &found.only_in_first),
        ("only in B", &found.only_in_second),
    ];
    for (what, names) in lists {
        for name in names {
            writeln!(text, "{what}: {}", printable(name))?;
        }
    }
    writeln!(text, "{} matrices compared", found.modules.len())?;
    Ok(Report { text, success: true })
}
