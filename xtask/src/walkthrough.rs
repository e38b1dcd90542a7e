//! `cargo xtask walkthrough`: runs the commands for whole models on the two models of `accuracy`, in an empty folder,
//! and writes docs/walkthrough.md with the commands and what they print.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, ensure};

use crate::accuracy;
use crate::steps::cargo;

/// The page.
const PAGE: &str = "docs/walkthrough.md";
/// The longest output that the page shows whole. Of longer ones it shows the first and the last lines.
const MOST_LINES: usize = 28;
const FIRST_LINES: usize = 20;
const LAST_LINES: usize = 5;

const INTRODUCTION: &str = "# Whole models, command by command

`cargo xtask walkthrough` fetches two models, runs these commands in an empty folder with the models in it, and writes this page.
Output goes to stdout as shown, progress to stderr. Of long outputs the middle is left out.

- `minilm` is all-MiniLM-L6-v2, a Hugging Face folder in f32.
- `smollm2.gguf` is SmolLM2-135M-Instruct, a GGUF file of type Q4_1.
";

/// A command and what it is for.
struct Step(&'static str, &'static str);

const STEPS: [(&str, &[Step]); 4] = [
    (
        "A sentence encoder",
        &[
            Step("inspect minilm", "What is in the model:"),
            Step("quantize minilm -o minilm-w4 --dry-run", "What would be packed, without reading a weight:"),
            Step("quantize minilm -o minilm-w4", "Pack it, without data:"),
            Step("inspect minilm-w4", "What is in the packed folder:"),
            Step("verify minilm-w4 --against minilm", "Check it against the original:"),
            Step("calibrate minilm -o minilm.moments --hessian", "Record what the layers get as inputs:"),
            Step(
                "quantize minilm -o minilm-gptq --method gptq --calibration minilm.moments --exclude pooler.dense",
                "Pack it by GPTQ with them. Sentence embeddings are means and do not use the pooler, so it has no inputs to record:",
            ),
            Step("compare minilm-w4 minilm-gptq", "Compare both with each other:"),
            Step(
                "eval minilm --method search,gptq --group 64,128 --calibration minilm.moments",
                "How much of the embeddings is kept:",
            ),
        ],
    ),
    (
        "A language model",
        &[
            Step(
                "inspect smollm2.gguf",
                "What is in the file, under the names that Hugging Face gives its tensors:",
            ),
            Step("quantize smollm2.gguf -o smollm2-w4", "Pack it, without data:"),
            Step("verify smollm2-w4 --against smollm2.gguf", "Check it against the original:"),
            Step(
                "calibrate smollm2.gguf -o smollm2.moments --hessian --tokens 8192",
                "Record what the layers get as inputs, over 8,192 tokens:",
            ),
            Step(
                "quantize smollm2.gguf -o smollm2-gptq --method gptq --group 128 --calibration smollm2.moments",
                "Pack it by GPTQ with them:",
            ),
            Step("compare smollm2-w4 smollm2-gptq", "Compare both:"),
            Step(
                "eval smollm2.gguf --method search,gptq --calibration smollm2.moments --tokens 4096 --layers 3",
                "Perplexity over 4,096 tokens, and the layers with the largest errors \
                 ([accuracy.md](accuracy.md) has the whole text):",
            ),
        ],
    ),
    (
        "What serving it would cost",
        &[
            Step("estimate smollm2-w4 --batch 1,64", "Of the language model, from its folder:"),
            Step(
                "estimate llama-2-70b --batch 16,64 --gpus 2 --price 2.5",
                "Of a larger one, from the built-in list:",
            ),
        ],
    ),
    (
        "For other programs",
        &[
            Step("verify minilm-w4 --against minilm --json", "Every command writes JSON as well:"),
            Step("eval minilm --json", ""),
        ],
    ),
];

/// Runs all commands and writes the page.
///
/// # Errors
/// Returns one if a model can't be fetched, or if a command fails.
pub fn run() -> anyhow::Result<()> {
    let [minilm, smollm2] = accuracy::fetch()?;
    let manifest = fs::canonicalize("Cargo.toml")?;
    let folder = tempfile::tempdir()?;
    copy(&minilm, &folder.path().join("minilm"))?;
    copy(&smollm2, &folder.path().join("smollm2.gguf"))?;
    let mut page = INTRODUCTION.to_owned();
    for (title, steps) in STEPS {
        write!(page, "\n## {title}\n")?;
        for Step(command, purpose) in steps {
            println!("liquidgemm {command}");
            let mut program = cargo(["run", "--release", "--quiet", "--package", "liquidgemm-cli"]);
            program.arg("--manifest-path").arg(&manifest).arg("--").args(command.split(' '));
            let output = program.current_dir(folder.path()).stderr(std::process::Stdio::inherit()).output();
            let output = output.context("cannot run cargo")?;
            ensure!(output.status.success(), "liquidgemm {command}: {}", output.status);
            let text = String::from_utf8(output.stdout).context("the output is not UTF-8")?;
            if !purpose.is_empty() {
                write!(page, "\n{purpose}\n")?;
            }
            write!(page, "\n```text\n$ liquidgemm {command}\n{}```\n", shortened(&text))?;
        }
    }
    fs::write(PAGE, page).with_context(|| format!("cannot write {PAGE}"))?;
    println!("{PAGE} is written");
    Ok(())
}

/// Leaves out the middle of a long text.
fn shortened(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    if lines.len() <= MOST_LINES {
        return text.to_owned();
    }
    let (first, rest) = lines.split_at(FIRST_LINES);
    let (middle, last) = rest.split_at(rest.len() - LAST_LINES);
    format!("{}\n… {} more lines …\n{}\n", first.join("\n"), middle.len(), last.join("\n"))
}

/// Copies a file, a folder with everything in it, or the only file of a folder that is to become a file.
fn copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    let cannot = || format!("cannot copy {} to {}", from.display(), to.display());
    if from.is_file() {
        fs::copy(from, to).with_context(cannot)?;
        return Ok(());
    }
    let entries = fs::read_dir(from).with_context(cannot)?.collect::<Result<Vec<_>, _>>()?;
    if to.extension().is_some() {
        ensure!(entries.len() == 1, "{} has {} files, one expected", from.display(), entries.len());
        return copy(&entries[0].path(), to);
    }
    fs::create_dir(to).with_context(cannot)?;
    for entry in entries {
        copy(&entry.path(), &to.join(entry.file_name()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_outputs_lose_their_middle_and_short_ones_nothing() {
        let lines = |count: usize| (1..=count).map(|line| format!("{line}\n")).collect::<String>();
        assert_eq!(shortened(&lines(MOST_LINES)), lines(MOST_LINES));
        let short = shortened(&lines(100));
        assert!(short.starts_with(&lines(FIRST_LINES)) && short.ends_with("100\n"), "{short}");
        assert!(short.contains("… 75 more lines …"), "{short}");
    }
}
