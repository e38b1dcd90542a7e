//! `liquidgemm calibrate`: records the second moments of a model's layer inputs for the quantizers.
//! The forward pass and the file are in `liquidgemm-eval`.

use std::path::PathBuf;

use liquidgemm_eval::evaluate;
use liquidgemm_eval::{Calibration, Model, texts};

use super::Report;
use super::eval::{self, Passes};
use super::progress::Stages;

/// Record the second moments of the inputs of a model's linear layers, for quantizers that need them
///
/// The model runs in float over a text. For each layer the file has the mean of x² and the maximum of |x| of each input channel,
/// and with --hessian the mean of x xᵀ, which gptq needs. Models are those of `liquidgemm eval`.
/// With --inputs, the moments are those of captured inputs, and no model runs.
///
/// The exit code is 1 if a model or a file can't be read, used or written.
#[derive(clap::Args)]
pub(super) struct Arguments {
    /// The model
    #[arg(value_name = "MODEL", required_unless_present = "inputs")]
    model: Option<PathBuf>,

    /// The file to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,

    /// Run this text: sentences, one a line, for encoders; prose for language models
    /// [default: a text that is part of the program]
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,

    #[command(flatten)]
    passes: Passes,

    /// Record E[x xᵀ] as well: 4·k² bytes for each input of k channels
    #[arg(long)]
    hessian: bool,

    /// Take captured inputs from this safetensors file: a float tensor [tokens, k] for each layer, with its name
    #[arg(long, value_name = "FILE", conflicts_with_all = ["model", "text", "tokens", "window"])]
    inputs: Option<PathBuf>,

    /// Write a summary as JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(arguments: &Arguments) -> anyhow::Result<Report> {
    // In a thread of the pool, so that no small operation waits for the pool to wake up.
    rayon::scope(|_| run_in_pool(arguments))
}

fn run_in_pool(arguments: &Arguments) -> anyhow::Result<Report> {
    let progress = Stages::default();
    let mut calibration = match (&arguments.inputs, &arguments.model) {
        (Some(inputs), _) => progress.spinner("reading", || Calibration::load(inputs))?,
        (None, Some(path)) => {
            let model = progress.spinner("reading", || Model::open(path))?;
            let text = match &arguments.text {
                Some(file) => eval::read(file)?,
                None => texts::calibration(&model.network),
            };
            let task = arguments.passes.task(&model, &text)?;
            evaluate::calibrate(&model, &task, arguments.hessian, &progress)?
        }
        (None, None) => unreachable!("the arguments require one of them"),
    };
    if !arguments.hessian {
        calibration.drop_hessians();
    }
    progress.spinner("writing", || calibration.save(&arguments.output))?;

    let layers: Vec<_> = calibration.layers().collect();
    let tokens = layers.first().map_or(0, |(_, moments)| moments.tokens);
    let output = arguments.output.display().to_string();
    let text = if arguments.json {
        let summary = serde_json::json!({
            "output": output, "layers": layers.len(), "tokens": tokens, "hessian": arguments.hessian,
        });
        format!("{summary}\n")
    } else {
        let what = if arguments.hessian { "second moments and Hessians" } else { "second moments" };
        format!("{output}: {what} of {} layers over {tokens} tokens\n", layers.len())
    };
    Ok(Report { text, success: true })
}
