//! What can go wrong between a device crate and its PTX.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};

use crate::finish::FinishError;

/// A build that failed. Every message says what was wrong and what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or directory could not be read or written.
    #[error("cannot {action} {}: {source}", path.display())]
    File {
        /// What was tried, as a verb.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The operating system's answer.
        source: io::Error,
    },

    /// A program could not be started.
    #[error("cannot start `{program}`: {source}")]
    Start {
        /// The program.
        program: String,
        /// The operating system's answer.
        source: io::Error,
    },

    /// A program ran and failed.
    #[error("`{command}` failed ({status}): {stderr}")]
    Failed {
        /// Program and arguments.
        command: String,
        /// How it ended.
        status: ExitStatus,
        /// The end of what it wrote to its error stream.
        stderr: String,
    },

    /// The device crate pins no toolchain.
    #[error("{} has no line `channel = \"VERSION\"`: pin the exact compiler that builds the device code", path.display())]
    NoPinnedChannel {
        /// The toolchain file.
        path: PathBuf,
    },

    /// No place holds a usable compiler.
    #[error(
        "no device toolchain: the kernels need rustc {channel} with its library source.\n{}\n\
         Run `rustup toolchain install {channel} --profile minimal --component rust-src` and try again.",
        tried.iter().map(|reason| format!("  - {reason}")).collect::<Vec<_>>().join("\n")
    )]
    NoToolchain {
        /// The version that is needed.
        channel: String,
        /// Each place that was looked at, with the reason why it will not do.
        tried: Vec<String>,
    },

    /// Debian's packages do not hold what is needed.
    #[error("{0}")]
    Packages(String),

    /// cargo could not compile the device crate.
    #[error("cargo could not compile {} ({status}); its messages are above", crate_dir.display())]
    Compile {
        /// The device crate.
        crate_dir: PathBuf,
        /// How cargo ended.
        status: ExitStatus,
    },

    /// The device crate compiled with warnings, and the builder was told to deny them.
    #[error("{} compiled with {count} warning(s), and warnings are denied; they are above", crate_dir.display())]
    Warnings {
        /// The device crate.
        crate_dir: PathBuf,
        /// How many.
        count: usize,
    },

    /// cargo succeeded and left no assembly.
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

    /// A source went into the PTX but not into the hash.
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
    /// Adds the action and the path to an I/O error.
    pub(crate) fn file(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
        move |source| Error::File { action, path: path.to_owned(), source }
    }
}

/// Runs a command to its end and returns what it wrote to its output stream.
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

/// A command as a person would type it.
fn display(command: &Command) -> String {
    let arguments = command.get_args().map(|argument| argument.to_string_lossy().into_owned());
    let program = command.get_program().to_string_lossy().into_owned();
    std::iter::once(program).chain(arguments).collect::<Vec<_>>().join(" ")
}
