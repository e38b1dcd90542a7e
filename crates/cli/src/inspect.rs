//! `liquidgemm inspect`: lists the modules and tensors of a model, packed or not.

use std::path::PathBuf;

use liquidgemm_checkpoint::{Checkpoint, Model, Source};
use serde_json::{Value, json};

use super::Report;
use super::models::{EXIT_CODES, Table, json_report, printable, shape};
use super::units::bytes;

/// List the modules and tensors of a model: shapes, types, groups, sizes and bits per weight
#[derive(clap::Args)]
#[command(after_help = EXIT_CODES)]
pub(super) struct Arguments {
    /// Packed folder or shard, Hugging Face folder, .safetensors file or GGUF file
    path: PathBuf,

    /// Write the result as JSON
    #[arg(long)]
    json: bool,
}

/// One line of the list.
struct Entry {
    name: String,
    shape: Vec<usize>,
    stored: String,
    group: Option<String>,
    bytes: u64,
}

impl Entry {
    fn weights(&self) -> f64 {
        self.shape.iter().map(|&side| side as f64).product()
    }

    fn bits(&self) -> f64 {
        self.bytes as f64 * 8.0 / self.weights().max(1.0)
    }
}

pub(super) fn run(arguments: &Arguments) -> anyhow::Result<Report> {
    let model = Model::open(&arguments.path)?;
    let (format, entries) = match &model {
        Model::Packed(checkpoint) => ("packed checkpoint, version 1".to_owned(), packed_entries(checkpoint)),
        Model::Source(source) => (source.format(), source_entries(source.as_ref())),
    };
    let total: u64 = entries.iter().map(|entry| entry.bytes).sum();
    if arguments.json {
        let list = entries.iter().map(|entry| {
            json!({
                "name": entry.name, "shape": entry.shape, "type": entry.stored, "group": entry.group,
                "bytes": entry.bytes, "bits_per_weight": entry.bits(),
            })
        });
        let quantization = model.config().get("quantization_config").cloned().unwrap_or(Value::Null);
        let value = json!({
            "path": arguments.path, "format": format, "entries": list.collect::<Vec<_>>(), "bytes": total,
            "quantization_config": quantization,
        });
        return Ok(json_report(&value, true));
    }
    let head = ["name", "shape", "type", "group", "size", "bits/weight"];
    let mut table = Table::new(&head, &[false, false, false, true, true, true]);
    for entry in &entries {
        table.row([
            entry.name.clone(),
            shape(&entry.shape),
            entry.stored.clone(),
            entry.group.clone().unwrap_or_default(),
            bytes(entry.bytes as f64),
            format!("{:.3}", entry.bits()),
        ]);
    }
    let mut text = table.render();
    let weights: f64 = entries.iter().map(Entry::weights).sum();
    text.push_str(&format!(
        "{}: {} entries, {}, {:.3} bits a weight\n",
        printable(&format),
        entries.len(),
        bytes(total as f64),
        total as f64 * 8.0 / weights.max(1.0)
    ));
    Ok(Report { text, success: true })
}

fn packed_entries(checkpoint: &Checkpoint) -> Vec<Entry> {
    let modules = checkpoint.modules().map(|module| {
        let mut stored = "packed".to_owned();
        if module.has_smoothing {
            stored.push_str(", smoothed");
        }
        if module.has_permutation {
            stored.push_str(", permuted");
        }
        let group = Some(module.group.to_string());
        Entry {
            name: module.name.to_owned(),
            shape: vec![module.n, module.k],
            stored,
            group,
            bytes: module.bytes,
        }
    });
    let tensors = checkpoint.tensors().map(|(name, dtype, shape, bytes)| Entry {
        name: name.to_owned(),
        shape: shape.to_vec(),
        stored: format!("{dtype:?}"),
        group: None,
        bytes,
    });
    modules.chain(tensors).collect()
}

fn source_entries(source: &dyn Source) -> Vec<Entry> {
    let entries = source.tensors().iter().map(|tensor| Entry {
        name: tensor.name.clone(),
        shape: tensor.shape.clone(),
        stored: tensor.stored.clone(),
        group: tensor.imported_group.map(|group| group.to_string()),
        bytes: tensor.stored_bytes,
    });
    entries.collect()
}
