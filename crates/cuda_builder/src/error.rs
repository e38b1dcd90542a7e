//! The errors of a build, from a device crate to its PTX, and running programs.
//!
//! `finish.rs` has the errors of PTX that cannot be finished.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};

use crate::finish::FinishError;

/// A failed build. Every message says what went wrong and, where possible, what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or directory could not be read or written.
    #[error("cannot {action} {}: {source}", path.display())]
    File {
        /// The action that failed, as a verb.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The operating system's error.
        source: io::Error,
    },

    /// A program could not be started.
    #[error("cannot start `{program}`: {source}")]
    Start {
        /// The program.
        program: String,
        /// The operating system's error.
        source: io::Error,
    },

    /// A program ran and failed.
    #[error("`{command}` failed ({status}): {stderr}")]
    Failed {
        /// The program and its arguments.
        command: String,
        /// The exit status.
        status: ExitStatus,
        /// The last lines of its error stream.
        stderr: String,
    },

    /// The device crate pins no toolchain.
    #[error("{} has no line `channel = \"VERSION\"`: pin the exact compiler that builds the device code", path.display())]
    NoPinnedChannel {
        /// The toolchain file.
        path: PathBuf,
    },

    /// No usable compiler was found.
    #[error(
        "no device toolchain: the kernels need rustc {channel} with its library source.\n{}\n\
         Run `rustup toolchain install {channel} --profile minimal --component rust-src` and try again.",
        tried.iter().map(|reason| format!("  - {reason}")).collect::<Vec<_>>().join("\n")
    )]
    NoToolchain {
        /// The version that is needed.
        channel: String,
        /// Each place that was searched, with the reason why it is not usable.
        tried: Vec<String>,
    },

    /// Debian's packages lack something that is needed.
    #[error("{0}")]
    Packages(String),

    /// cargo could not compile the device crate.
    #[error("cargo could not compile {} ({status}); its messages are above", crate_dir.display())]
    Compile {
        /// The device crate.
        crate_dir: PathBuf,
        /// cargo's exit status.
        status: ExitStatus,
    },

    /// The device crate compiled with warnings, and the builder was told to deny them.
    #[error("{} compiled with {count} warning(s), and warnings are denied; they are above", crate_dir.display())]
    Warnings {
        /// The device crate.
        crate_dir: PathBuf,
        /// The number of warnings.
        count: usize,
    },

    /// cargo succeeded but wrote no assembly.
    #[error(
        "cargo built {} but left no {}: delete {} and build again",
        crate_dir.display(),
        expected.display(),
        target_dir.display()
    )]
    NoAssembly {
        /// The device crate.
        crate_dir: PathBuf,
        /// The file that should be there.
        expected: PathBuf,
        /// cargo's output directory.
        target_dir: PathBuf,
    },

    /// A source is compiled into the PTX but not part of the hash.
    #[error(
        "{} is compiled into the PTX but not covered by the sources' hash: name its crate with `path_dependency`",
        path.display()
    )]
    UnhashedSource {
        /// The source file.
        path: PathBuf,
    },

    /// A source changed while cargo was running.
    #[error("the device sources changed while they were compiled: build again")]
    SourcesChanged,

    /// The compiler's PTX could not be finished.
    #[error(transparent)]
    Finish(#[from] FinishError),
}

impl Error {
    /// Returns a function that adds the action and the path to an I/O error.
    pub(crate) fn file(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
        move |source| Error::File { action, path: path.to_owned(), source }
    }
}

/// Runs a command to its end and returns its output stream.
pub(crate) fn output_of(command: &mut Command) -> Result<String, Error> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|source| Error::Start { program, source })?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let stderr = String::from_utf8_lossy(&output.stderr);
    let lines: Vec<&str> = stderr.trim().lines().collect();
    Err(Error::Failed {
        command: display(command),
        status: output.status,
        stderr: lines[lines.len().saturating_sub(8)..].join("\n"),
    })
}

/// Returns a command as a person would type it.
fn display(command: &Command) -> String {
    let arguments = command.get_args().map(|argument| argument.to_string_lossy().into_owned());
    let program = command.get_program().to_string_lossy().into_owned();
    std::iter::once(program).chain(arguments).collect::<Vec<_>>().join(" ")
}
