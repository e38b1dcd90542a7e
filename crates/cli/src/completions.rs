//! `liquidgemm completions` and `liquidgemm man`: what shells and `man` know about this command, made from its arguments.

use std::path::PathBuf;

use anyhow::Context;
use clap::Command;
use clap_complete::Shell;

use super::Report;
use super::models::{EXIT_CODES, json_report};

/// Print the completion script of a shell
#[derive(clap::Args)]
#[command(after_help = EXIT_CODES)]
pub(super) struct CompletionArguments {
    /// Shell that the script is for
    #[arg(value_enum)]
    shell: Shell,
}

/// Write the man pages of the command and its subcommands
#[derive(clap::Args)]
#[command(after_help = EXIT_CODES)]
pub(super) struct ManArguments {
    /// Folder to write them to; it must exist
    folder: PathBuf,

    /// Write the names of the pages as JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn completions(arguments: &CompletionArguments, mut command: Command) -> anyhow::Result<Report> {
    let name = command.get_name().to_owned();
    let mut script = Vec::new();
    clap_complete::generate(arguments.shell, &mut command, name, &mut script);
    Ok(Report { text: String::from_utf8(script)?, success: true })
}

pub(super) fn man(arguments: &ManArguments, command: Command) -> anyhow::Result<Report> {
    let folder = &arguments.folder;
    let name = command.get_name();
    let pages = command.get_subcommands().map(|subcommand| format!("{name}-{}.1", subcommand.get_name()));
    let pages: Vec<String> = std::iter::once(format!("{name}.1")).chain(pages).collect();
    clap_mangen::generate_to(command.disable_help_subcommand(true), folder)
        .with_context(|| format!("cannot write man pages to {}", folder.display()))?;
    if arguments.json {
        return Ok(json_report(&serde_json::json!({"folder": folder, "pages": pages}), true));
    }
    Ok(Report { text: String::new(), success: true })
}
