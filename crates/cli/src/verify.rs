//! `liquidgemm verify`: checks the checksums and pairs of a packed model, and its distance to the original.

use std::fmt::Write;
use std::path::PathBuf;

use liquidgemm_checkpoint::{Checkpoint, Model, verify};
use serde_json::json;

use super::Report;
use super::models::{EXIT_CODES, Table, json_report, percent, printable};
use super::progress::Progress;
use super::units::digits;

/// Check every checksum and every pair of a packed model, and its error against the original
///
/// The error of a module is ‖packed − original‖ / ‖original‖. Tensors that are kept must be unchanged.
/// A folder that another program has saved again, such as `save_pretrained` of transformers, has no checksums. Its structure, shapes and
/// ranges are checked, and the result says so.
/// The exit code is 1 if anything is wrong; everything that is wrong is listed.
#[derive(clap::Args)]
#[command(after_help = EXIT_CODES)]
pub(super) struct Arguments {
    /// Packed folder or shard
    path: PathBuf,

    /// Model that it was made from
    #[arg(long, value_name = "MODEL")]
    against: Option<PathBuf>,

    /// Write the result as JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(arguments: &Arguments) -> anyhow::Result<Report> {
    let checkpoint = Checkpoint::open(&arguments.path)?;
    let original = arguments.against.as_ref().map(Model::open).transpose()?;
    let found = verify(&checkpoint, original.as_ref(), &Progress::bytes("verifying"))?;
    let success = found.problems.is_empty();
    if arguments.json {
        let modules = found.modules.iter().map(|(name, difference)| match difference {
            Some(figures) => {
                json!({"name": name, "relative_error": figures.relative, "largest_error": figures.largest})
            }
            None => json!({"name": name}),
        });
        let value = json!({
            "path": arguments.path, "sound": success, "modules": modules.collect::<Vec<_>>(),
            "tensors": found.tensors, "without_checksum": found.without_checksum, "problems": found.problems,
        });
        return Ok(json_report(&value, success));
    }
    let mut text = String::new();
    if original.is_some() {
        let mut table = Table::new(&["module", "error", "largest"], &[false, true, true]);
        for (name, difference) in &found.modules {
            let figures = difference.map_or_else(
                || ["?".to_owned(), "?".to_owned()],
                |figures| [percent(figures.relative), digits(figures.largest)],
            );
            table.row([vec![name.clone()], figures.to_vec()].concat());
        }
        text = table.render();
    }
    for problem in &found.problems {
        writeln!(text, "wrong: {}", printable(problem))?;
    }
    if found.without_checksum > 0 {
        writeln!(
            text,
            "no checksums: {} of them were saved without one, so changed bytes can't be seen; \
             structure, shapes and ranges were checked",
            found.without_checksum
        )?;
    }
    let verdict = if success { "sound" } else { "DAMAGED OR DIFFERENT" };
    writeln!(text, "{verdict}: {} modules and {} tensors checked", found.modules.len(), found.tensors)?;
    Ok(Report { text, success })
}
