//! Compiles a device crate with cargo.
//!
//! Removes the caller's flags, targets, wrappers and profiles from the environment.
//! The same sources therefore give the same PTX in every shell and inside every other cargo.
//! `toolchain.rs` finds the compiler. This file's text is part of the sources' hash (`hash.rs`).

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader, IsTerminal};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::error::Error;
use crate::toolchain::Toolchain;

/// rustc's name of the device target.
const TARGET: &str = "nvptx64-nvidia-cuda";

/// The PTX version that the kernels' instructions need.
const PTX_FEATURE: &str = "+ptx81";

/// The start of rustc's warning about that feature, which it gives for every crate.
/// The pinned compiler keeps it stable.
const KNOWN_WARNING: &str = "unstable feature specified for `-Ctarget-feature`";

/// Returns rustc's flags for the device code.
pub(crate) fn flags(target: &str) -> Vec<String> {
    vec![
        format!("-Ctarget-cpu={target}"),
        format!("-Ctarget-feature={PTX_FEATURE}"),
        "--emit=asm".to_owned(),
        // The assembly is the product, so replace the linker by `true`.
        "-Clinker=true".to_owned(),
    ]
}

/// The results of cargo's build.
pub(crate) struct Assembly {
    /// The PTX as the compiler wrote it.
    pub(crate) text: String,
    /// The files of this repository that it was compiled from.
    pub(crate) sources: Vec<PathBuf>,
    /// The number of compiler warnings.
    pub(crate) warnings: usize,
}

/// Compiles a device crate and all its dependencies, including `core`, to one PTX text.
pub(crate) fn compile(
    toolchain: &Toolchain,
    crate_dir: &Path,
    target: &str,
    target_dir: &Path,
) -> Result<Assembly, Error> {
    let manifest = crate_dir.join("Cargo.toml");
    let mut command = Command::new(&toolchain.cargo);
    let format = if std::io::stderr().is_terminal() { "json-diagnostic-rendered-ansi" } else { "json" };
    command
        .args(["build", "--release", "-Zbuild-std=core", "--target", TARGET, "--message-format", format])
        .arg("--manifest-path")
        .arg(&manifest)
        .arg("--target-dir")
        .arg(target_dir);
    // Run beside the device crate, because its toolchain file could redirect a `cargo`
    // that is rustup's proxy.
    command.current_dir(crate_dir.parent().unwrap_or(crate_dir));
    for (name, _) in std::env::vars_os().filter(|(name, _)| is_about_another_build(name)) {
        command.env_remove(name);
    }
    command
        .env("RUSTC", &toolchain.rustc)
        .env("RUSTC_WRAPPER", "")
        .env("RUSTC_WORKSPACE_WRAPPER", "")
        // `-Zbuild-std` and the NVPTX target's features are not stable.
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_ENCODED_RUSTFLAGS", flags(target).join("\x1f"));
    toolchain.set_library_path(&mut command);

    let program = toolchain.cargo.display().to_string();
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|source| Error::Start { program: program.clone(), source })?;
    let mut messages = Messages::default();
    if let Some(output) = child.stdout.take() {
        for line in BufReader::new(output).lines() {
            messages.read(&line.map_err(Error::file("read the messages of", &toolchain.cargo))?, &manifest);
        }
    }
    let status = child.wait().map_err(|source| Error::Start { program, source })?;
    if !status.success() {
        return Err(Error::Compile { crate_dir: crate_dir.to_owned(), status });
    }

    let release = target_dir.join(TARGET).join("release");
    let name = messages.library.unwrap_or_else(|| "unknown".to_owned());
    let assembly = release.join("deps").join(format!("{name}.s"));
    if !assembly.is_file() {
        return Err(Error::NoAssembly {
            crate_dir: crate_dir.to_owned(),
            expected: assembly,
            target_dir: target_dir.to_owned(),
        });
    }
    let text = fs::read_to_string(&assembly).map_err(Error::file("read", &assembly))?;
    let dependencies = release.join(format!("{name}.d"));
    let list = fs::read_to_string(&dependencies).map_err(Error::file("read", &dependencies))?;
    Ok(Assembly { text, sources: listed_sources(&list), warnings: messages.warnings })
}

/// Returns whether an environment variable configures the surrounding build and must not reach this one.
fn is_about_another_build(name: &OsStr) -> bool {
    let name = name.to_string_lossy();
    let exact =
        ["RUSTC", "RUSTDOC", "RUSTFLAGS", "RUSTDOCFLAGS", "CARGO_ENCODED_RUSTFLAGS", "CARGO_INCREMENTAL"];
    let families =
        ["RUSTUP_TOOLCHAIN", "RUSTC_", "CARGO_BUILD_", "CARGO_TARGET_", "CARGO_PROFILE_", "CARGO_UNSTABLE_"];
    let caller = ["CARGO_MANIFEST_", "CARGO_PKG_", "CARGO_CRATE_", "CARGO_BIN_", "CARGO_PRIMARY_"];
    exact.contains(&&*name) || families.iter().chain(&caller).any(|family| name.starts_with(family))
}

/// The facts read from cargo's messages.
#[derive(Default)]
struct Messages {
    /// The file name of the crate's own output, without its extension.
    library: Option<String>,
    warnings: usize,
}

impl Messages {
    /// Reads one message and prints the compiler's diagnostics.
    fn read(&mut self, line: &str, manifest: &Path) {
        let Ok(message) = serde_json::from_str::<Value>(line) else {
            eprintln!("{line}");
            return;
        };
        match message["reason"].as_str() {
            Some("compiler-message") => {
                let diagnostic = &message["message"];
                if diagnostic["message"].as_str().is_some_and(|text| text.starts_with(KNOWN_WARNING)) {
                    return;
                }
                if let Some(rendered) = diagnostic["rendered"].as_str() {
                    eprint!("{rendered}");
                }
                // The summary of the warnings is a warning, too, but has no source location.
                let points_somewhere = diagnostic["spans"].as_array().is_some_and(|spans| !spans.is_empty());
                if diagnostic["level"] == "warning" && points_somewhere {
                    self.warnings += 1;
                }
            }
            Some("compiler-artifact") => {
                let of_crate =
                    message["manifest_path"].as_str().is_some_and(|path| Path::new(path) == manifest);
                let kind = &message["target"]["kind"];
                if of_crate && kind.as_array().is_some_and(|kinds| kinds.iter().any(|kind| kind == "cdylib"))
                {
                    self.library = message["target"]["name"].as_str().map(|name| name.replace('-', "_"));
                }
            }
            _ => {}
        }
    }
}

/// Returns the sources in a dependency file. They follow the colon, separated by spaces.
/// Spaces in names are escaped.
fn listed_sources(list: &str) -> Vec<PathBuf> {
    let Some((_, sources)) = list.lines().next().unwrap_or_default().split_once(": ") else {
        return Vec::new();
    };
    let escaped = sources.replace("\\ ", "\0");
    escaped.split_whitespace().map(|path| PathBuf::from(path.replace('\0', " "))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_of_the_surrounding_build_are_recognized_and_network_settings_are_kept() {
        for name in [
            "RUSTFLAGS",
            "CARGO_TARGET_DIR",
            "RUSTUP_TOOLCHAIN",
            "RUSTC_WRAPPER",
            "CARGO_PROFILE_RELEASE_LTO",
        ] {
            assert!(is_about_another_build(OsStr::new(name)), "{name}");
        }
        for name in
            ["CARGO_HOME", "CARGO_HTTP_PROXY", "CARGO_NET_OFFLINE", "PATH", "CARGO_REGISTRIES_X_INDEX"]
        {
            assert!(!is_about_another_build(OsStr::new(name)), "{name}");
        }
    }

    #[test]
    fn listed_sources_keep_spaces_in_their_names() {
        let list = "/t/release/kernels.ptx: /a\\ b/lib.rs /a\\ b/ptx/mod.rs\n";
        assert_eq!(listed_sources(list), [PathBuf::from("/a b/lib.rs"), PathBuf::from("/a b/ptx/mod.rs")]);
    }

    #[test]
    fn warnings_count_once_each_and_the_crates_own_library_is_named() {
        let mut messages = Messages::default();
        let manifest = Path::new("/k/Cargo.toml");
        for line in [
            r#"{"reason":"compiler-message","message":{"level":"warning","spans":[{}]}}"#,
            r#"{"reason":"compiler-message","message":{"level":"warning","spans":[]}}"#,
            r#"{"reason":"compiler-artifact","manifest_path":"/o/Cargo.toml","target":{"name":"o","kind":["cdylib"]}}"#,
            r#"{"reason":"compiler-artifact","manifest_path":"/k/Cargo.toml","target":{"name":"k-gpu","kind":["cdylib"]}}"#,
            r#"{"reason":"build-finished","success":true}"#,
        ] {
            messages.read(line, manifest);
        }
        assert_eq!((messages.warnings, messages.library.as_deref()), (1, Some("k_gpu")));
    }
}
