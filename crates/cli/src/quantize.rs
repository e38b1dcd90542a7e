//! `liquidgemm quantize`: packs the linear layers of a model, and writes a complete folder.

use std::fmt::Write;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::bail;
use liquidgemm::Group;
use liquidgemm_checkpoint::{
    Calibration, DequantizedType, Fate, Layer, Method, OpenOptions, Patterns, Plan, QuantizeOptions, Rotated,
    Smoothing, Source, open,
};
use serde_json::{Value, json};

use super::Report;
use super::models::{EXIT_CODES, Table, json_report, percent, printable, shape};
use super::progress::Progress;
use super::units::bytes;

/// Pack the linear layers of a model to 4 bits, and write a complete folder
///
/// MODEL is a Hugging Face folder (config.json and .safetensors files of f32, f16, bf16 or fp8-e4m3 weights),
/// one .safetensors file, or a GGUF file. Models that compressed-tensors, GPTQ, AWQ, QQQ or QServe has quantized to 4 bits are taken over:
/// the result lists for each module whether its weights are exact, snapped to the scales that the format has, or requantized.
/// Embeddings, norms, heads and routers are kept, as all other tensors and the files beside the weights.
///
/// The output grows in the folder OUTPUT.partial, which gets its final name when it is complete.
/// A run that was killed continues behind the finished shards when it is repeated, and gives the same bytes.
#[derive(clap::Args)]
#[command(after_help = EXIT_CODES)]
pub(super) struct Arguments {
    /// Folder or file of the model
    model: PathBuf,

    /// Folder to write
    #[arg(short, long, required_unless_present = "dry_run")]
    output: Option<PathBuf>,

    /// How codes are chosen: rtn rounds to nearest, search minimizes the weights' squared error,
    /// gptq minimizes the outputs' error and needs --calibration with Hessians
    #[arg(long, default_value_t)]
    method: Method,

    /// Number of weights along K that share one pair (scale and offset): a multiple of 64, or "channel"
    /// [default: 64, or the group of a model that is quantized already]
    #[arg(long)]
    group: Option<Group>,

    /// Calibration file with statistics of the layers' inputs, or a safetensors file of captured inputs
    #[arg(long, value_name = "FILE")]
    calibration: Option<PathBuf>,

    /// Divide inputs by a smoothing vector with this exponent from 0 to 1, or "auto" for the best of 0.1 to 0.9 for each input;
    /// needs --calibration. In LLaMA, Mistral and Qwen2 the vector is folded into the norm or the layer before, else stored
    #[arg(long, value_name = "ALPHA")]
    smooth: Option<Smoothing>,

    /// Rotate the residual stream by Hadamard matrices, which spread outliers, folded into the weights of LLaMA, Mistral and Qwen2 models;
    /// embedding, norms and head change too, and a head that is tied to the embedding becomes a tensor of its own.
    /// It does not help every model: measure it
    #[arg(long, conflicts_with = "smooth")]
    rotate: bool,

    /// Quantize modules that fit this pattern although they are kept by default, such as "lm_head"
    #[arg(long, value_name = "GLOB")]
    include: Vec<String>,

    /// Keep modules that fit this pattern, such as "model.layers.0.*"
    #[arg(long, value_name = "GLOB")]
    exclude: Vec<String>,

    /// Type of kept tensors that GGUF stores in blocks: f16, bf16 or f32
    #[arg(long, value_name = "TYPE", default_value = "f16")]
    dequantized: DequantizedType,

    /// Show what would be done, and read no weights
    #[arg(long)]
    dry_run: bool,

    /// Replace a packed checkpoint at OUTPUT, and discard an unfinished run of another model or with other options
    #[arg(long)]
    force: bool,

    /// Write the result as JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(arguments: &Arguments) -> anyhow::Result<Report> {
    let opened = open(&arguments.model, OpenOptions { dequantized: arguments.dequantized })?;
    let rotated = arguments.rotate.then(|| Rotated::new(opened.as_ref())).transpose()?;
    let source = rotated.as_ref().map_or(opened.as_ref(), |rotated| rotated as &dyn Source);
    let options = QuantizeOptions {
        method: arguments.method,
        group: arguments.group,
        patterns: Patterns { include: arguments.include.clone(), exclude: arguments.exclude.clone() },
        calibration: arguments.calibration.as_ref().map(Calibration::open).transpose()?.map(Arc::new),
        smoothing: arguments.smooth,
    };
    let plan = Plan::new(source, &options)?;
    let mut result = described(source, &plan);
    if arguments.dry_run {
        let mut text = if arguments.json { String::new() } else { table(plan.layers()) };
        text.push_str(&totals(source, plan.layers()));
        return Ok(if arguments.json { json_report(&result, true) } else { Report { text, success: true } });
    }
    let Some(output) = &arguments.output else { bail!("give the folder to write with --output") };
    let summary = plan.run(output, arguments.force, &Progress::bytes("quantizing"))?;
    result["output"] = json!(output);
    result["resumed_shards"] = json!(summary.resumed_shards);
    let imports = summary.imports.iter().map(
        |import| json!({"module": import.module, "kind": import.kind.to_string(), "relative_error": import.error}),
    );
    result["imports"] = json!(imports.collect::<Vec<_>>());
    if arguments.json {
        return Ok(json_report(&result, true));
    }
    let mut text = String::new();
    if !summary.imports.is_empty() {
        let mut table = Table::new(&["module", "codes", "error"], &[false, false, true]);
        for import in &summary.imports {
            table.row([import.module.clone(), import.kind.to_string(), percent(import.error)]);
        }
        text.push_str(&table.render());
    }
    text.push_str(&totals(source, plan.layers()));
    if summary.resumed_shards > 0 {
        writeln!(text, "resumed    {} shards were there already", summary.resumed_shards)?;
    }
    writeln!(text, "written    {}", output.display())?;
    Ok(Report { text, success: true })
}

/// Returns the plan as JSON.
fn described(source: &dyn Source, plan: &Plan<'_>) -> Value {
    let layers = plan.layers().iter().map(|layer| {
        let mut value = json!({
            "name": layer.name, "shape": layer.shape, "stored": layer.stored,
            "bytes_before": layer.bytes_before, "bytes_after": layer.bytes_after,
            "divided_by_smoothing": layer.is_divided,
        });
        match &layer.fate {
            Fate::Packed { module, group } => {
                value["fate"] = json!("packed");
                value["module"] = json!(module);
                value["group"] = json!(group.to_string());
            }
            Fate::Kept(kept) => {
                value["fate"] = json!("kept");
                value["reason"] = json!(kept.reason());
            }
            Fate::Dropped => value["fate"] = json!("dropped"),
        }
        value
    });
    let left_out = source.left_out().iter().map(|(name, reason)| json!({"name": name, "reason": reason}));
    let sum = |bytes: fn(&Layer) -> u64| plan.layers().iter().map(bytes).sum::<u64>();
    json!({
        "model": source.path(), "format": source.format(), "shards": plan.shards(),
        "layers": layers.collect::<Vec<_>>(), "left_out": left_out.collect::<Vec<_>>(),
        "bytes_before": sum(|layer| layer.bytes_before), "bytes_after": sum(|layer| layer.bytes_after),
    })
}

fn table(layers: &[Layer]) -> String {
    let mut table = Table::new(
        &["tensor", "shape", "type", "before", "after", ""],
        &[false, false, false, true, true, false],
    );
    for layer in layers {
        let mut fate = match &layer.fate {
            Fate::Packed { group, .. } => format!("packed, group {group}"),
            Fate::Kept(kept) => format!("kept: {}", kept.reason()),
            Fate::Dropped => "scales of a packed weight".to_owned(),
        };
        if layer.is_divided {
            fate.push_str(", smoothing folded in");
        }
        table.row([
            layer.name.clone(),
            shape(&layer.shape),
            layer.stored.clone(),
            bytes(layer.bytes_before as f64),
            bytes(layer.bytes_after as f64),
            fate,
        ]);
    }
    table.render()
}

fn totals(source: &dyn Source, layers: &[Layer]) -> String {
    let packed: Vec<&Layer> =
        layers.iter().filter(|layer| matches!(layer.fate, Fate::Packed { .. })).collect();
    let weights: f64 =
        packed.iter().map(|layer| layer.shape.iter().map(|&side| side as f64).product::<f64>()).sum();
    let after = packed.iter().map(|layer| layer.bytes_after).sum::<u64>() as f64;
    let kept = layers.iter().filter(|layer| matches!(layer.fate, Fate::Kept(_))).count();
    let sum = |of: fn(&Layer) -> u64| layers.iter().map(|layer| of(layer) as f64).sum::<f64>();
    let (all_before, all_after) = (sum(|layer| layer.bytes_before), sum(|layer| layer.bytes_after));
    let mut text = String::new();
    let mut line =
        |what: &str, value: String| writeln!(text, "{what:<10} {value}").expect("a String takes all");
    line("model", format!("{}, {}", source.path().display(), printable(&source.format())));
    line("packed", format!("{} modules, {:.3} bits a weight", packed.len(), after * 8.0 / weights.max(1.0)));
    line("kept", format!("{kept} tensors"));
    line("size", format!("{} → {}", bytes(all_before), bytes(all_after)));
    for (name, reason) in source.left_out() {
        line("left out", printable(&format!("{name}: {reason}")));
    }
    text
}
