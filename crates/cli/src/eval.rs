//! `liquidgemm eval`: runs a model with quantized layers against its float run.
//! The forward passes and figures are in `liquidgemm-eval`; this file has the arguments, the progress and the files.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, ensure};
use liquidgemm::{Backend, Group, NewFile};
use liquidgemm_eval::evaluate::{self, Task};
use liquidgemm_eval::model::Layers;
use liquidgemm_eval::report::{self, Evaluation, Row};
use liquidgemm_eval::{Calibration, Method, Model, Recipe, Smoothing, texts};

use super::progress::Stages;
use super::{Place, Report};

/// Run models with quantized layers, and show how much of the float result they keep
///
/// A model is a Hugging Face folder (config.json, .safetensors, tokenizer.json), a GGUF file, or a folder with one
/// GGUF file. Supported are sentence encoders of the BERT family, and language models of the LLaMA and Qwen2 families.
///
/// Encoders are measured by the cosine between the embeddings of 200 sentences. Language models are measured
/// by perplexity, agreement on the next token and KL divergence, on some 23,000 tokens of a novel.
/// These texts, and others for calibration, are part of the program.
///
/// The exit code is 1 if a model or a file can't be read or used.
#[derive(clap::Args)]
pub(super) struct Arguments {
    /// The models
    #[arg(required = true, value_name = "MODEL")]
    models: Vec<PathBuf>,

    /// How weights are quantized: rtn, search, weighted or gptq, or a8 for activations alone;
    /// separate several by commas
    #[arg(long, value_name = "METHODS", value_delimiter = ',', default_value = "search")]
    method: Vec<Method>,

    /// Number of weights along K that share one pair (scale and offset): a multiple of 64, or "channel";
    /// separate several by commas
    #[arg(long, value_name = "GROUPS", value_delimiter = ',', default_value = "64")]
    group: Vec<Group>,

    /// Divide inputs by a smoothing vector with this exponent, from 0 to 1, or "auto"
    #[arg(long, value_name = "ALPHA")]
    smooth: Option<Smoothing>,

    /// Measure every method, group and smoothing of the accuracy page, and write PATH.md and PATH.json
    #[arg(long, value_name = "PATH", conflicts_with_all = ["method", "group", "smooth"])]
    table: Option<PathBuf>,

    /// Measure on this text: sentences, one a line, for encoders; prose for language models
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,

    #[command(flatten)]
    passes: Passes,

    /// Take second moments from this file of `liquidgemm calibrate`, or from a safetensors file of captured inputs
    /// [default: run the program's own calibration text, if the method needs it]
    #[arg(long, value_name = "FILE")]
    calibration: Option<PathBuf>,

    /// Show this many of the layers with the largest errors
    #[arg(long, value_name = "COUNT", default_value_t = 0)]
    layers: usize,

    #[command(flatten)]
    place: Place,

    /// Write the figures as JSON
    #[arg(long)]
    json: bool,
}

/// How a model goes through a text.
#[derive(clap::Args)]
pub(super) struct Passes {
    /// Stop after this many tokens, or sentences for encoders
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(2..))]
    tokens: Option<u32>,

    /// Tokens that a language model sees in one forward pass
    #[arg(long, value_name = "TOKENS", default_value_t = 512, value_parser = clap::value_parser!(u32).range(2..))]
    window: u32,
}

impl Passes {
    /// Divides a text into forward passes.
    pub(super) fn task(&self, model: &Model, text: &str) -> anyhow::Result<Task> {
        Ok(Task::new(model, text, self.window as usize, self.tokens.map(|tokens| tokens as usize))?)
    }
}

/// Tokens of the text over which the errors of single layers are measured.
const LAYER_TOKENS: usize = 2048;
/// Layers that the accuracy page lists.
const TABLE_LAYERS: usize = 10;

pub(super) fn run(arguments: &Arguments) -> anyhow::Result<Report> {
    // In a thread of the pool, so that no small operation waits for the pool to wake up.
    rayon::scope(|_| run_in_pool(arguments))
}

fn run_in_pool(arguments: &Arguments) -> anyhow::Result<Report> {
    let backend = Arc::new(arguments.place.open()?);
    let mut evaluations = Vec::new();
    for path in &arguments.models {
        evaluations.push(evaluate(path, arguments, &backend)?);
    }
    let json = serde_json::to_string_pretty(&evaluations)? + "\n";
    if let Some(path) = &arguments.table {
        NewFile::with_contents(path.with_extension("json"), json.as_bytes())?;
        NewFile::with_contents(path.with_extension("md"), report::page(&evaluations).as_bytes())?;
    }
    let text = if arguments.json {
        json
    } else {
        evaluations.iter().map(Evaluation::table).collect::<Vec<_>>().join("\n")
    };
    Ok(Report { text, success: true })
}

fn evaluate(path: &Path, arguments: &Arguments, backend: &Arc<Backend>) -> anyhow::Result<Evaluation> {
    let progress = Stages::default();
    let model = progress.spinner("reading", || Model::open(path))?;
    let recipes =
        if arguments.table.is_some() { report::recipes(&model.network) } else { arguments.recipes() };
    let (text, text_name) = match &arguments.text {
        Some(file) => (read(file)?, file.display().to_string()),
        None => (texts::evaluation(&model.network), texts::EVALUATION_NAME.of(&model.network).into()),
    };
    let task = arguments.passes.task(&model, &text)?;
    let calibration = calibration(&model, &recipes, arguments, &progress)?;
    let (calibration, calibration_name) = calibration.unzip();

    let mut variants = Vec::new();
    for recipe in &recipes {
        variants.push(recipe.layers(&model, calibration.as_ref(), backend, &progress)?);
    }
    let borrowed: Vec<&dyn Layers> = variants.iter().map(|layers| layers as &dyn Layers).collect();
    let scores = evaluate::score(&model, &task, &borrowed, &progress)?;
    let mut rows = Vec::new();
    for ((recipe, layers), score) in recipes.iter().zip(&variants).zip(scores) {
        let count = if arguments.table.is_none() {
            arguments.layers
        } else if recipe.method == Method::Gptq && recipe.group == Group::default() && recipe.smooth.is_none()
        {
            TABLE_LAYERS
        } else {
            0
        };
        let mut errors = Vec::new();
        if count > 0 {
            errors = evaluate::layer_errors(&model, task.first(LAYER_TOKENS), layers, &progress)?;
            errors.truncate(count);
        }
        rows.push(Row::new(recipe, score, errors));
    }
    Ok(Evaluation {
        model: model.name.clone(),
        text: text_name,
        passes: task.pieces().len(),
        tokens: task.tokens(),
        calibration: calibration_name,
        backend: backend.to_string(),
        rows,
    })
}

/// Returns second moments and where they come from, if a recipe needs them.
fn calibration(
    model: &Model,
    recipes: &[Recipe],
    arguments: &Arguments,
    progress: &Stages,
) -> anyhow::Result<Option<(Calibration, String)>> {
    let needed = recipes.iter().any(Recipe::needs_calibration);
    match &arguments.calibration {
        Some(file) => {
            ensure!(needed, "no method needs --calibration {}", file.display());
            let calibration = progress.spinner("reading", || Calibration::load(file))?;
            Ok(Some((calibration, file.display().to_string())))
        }
        None if needed => {
            let text = texts::calibration(&model.network);
            let task = Task::new(model, &text, arguments.passes.window as usize, None)?;
            let hessian = recipes.iter().any(Recipe::needs_hessian);
            let calibration = evaluate::calibrate(model, &task, hessian, progress)?;
            let name = texts::CALIBRATION_NAME.of(&model.network);
            Ok(Some((calibration, format!("{} tokens of {name}", task.tokens()))))
        }
        None => Ok(None),
    }
}

/// Reads a text.
pub(super) fn read(file: &Path) -> anyhow::Result<String> {
    std::fs::read_to_string(file).with_context(|| format!("cannot read the text {}", file.display()))
}

impl Arguments {
    fn recipes(&self) -> Vec<Recipe> {
        let mut recipes = Vec::new();
        for &method in &self.method {
            // Activations alone have no groups.
            let groups = if method == Method::A8 { &self.group[..1] } else { &self.group[..] };
            recipes.extend(groups.iter().map(|&group| Recipe { method, group, smooth: self.smooth }));
        }
        recipes
    }
}
