//! The built-in models: one table, `models.json`, of their published configurations.
//! Each entry holds the keys of the model's `config.json` that matter here, so it goes through the same reader
//! as a model folder ([`Model::from_config`]). Parameter counts are those of the model cards.

use std::path::Path;
use std::sync::LazyLock;

use anyhow::{Context, bail, ensure};
use serde::Deserialize;
use serde_json::Value;

use crate::architecture::Model;

/// The largest `config.json` that is read, in bytes.
const LARGEST_CONFIG: u64 = 16 << 20;

/// A built-in model.
#[derive(Debug, Deserialize)]
pub struct BuiltIn {
    /// The model's name.
    pub name: String,
    /// Number of parameters as published.
    pub published_parameters: f64,
    config: Value,
}

impl BuiltIn {
    /// Returns the model.
    ///
    /// # Errors
    /// None for the table of this crate, which a test reads in full.
    pub fn model(&self) -> anyhow::Result<Model> {
        Model::from_config(&self.name, &self.config)
    }
}

/// Returns the built-in models.
pub fn built_in() -> &'static [BuiltIn] {
    static MODELS: LazyLock<Vec<BuiltIn>> =
        LazyLock::new(|| serde_json::from_str(include_str!("models.json")).expect("the table is valid"));
    &MODELS
}

/// Finds a model: a folder with a `config.json`, such a file itself, or the name of a built-in model in any case.
///
/// # Errors
/// If there is no such folder, file or name; if the file can't be read, has more than 16 MiB or is not JSON;
/// or as [`Model::from_config`].
pub fn find(text: &str) -> anyhow::Result<Model> {
    if let Some(model) = built_in().iter().find(|model| model.name.eq_ignore_ascii_case(text)) {
        return model.model();
    }
    let path = Path::new(text);
    if !path.exists() {
        let names: Vec<&str> = built_in().iter().map(|model| model.name.as_str()).collect();
        bail!(
            "{text:?} is neither a folder with a config.json nor a built-in model; those are {}",
            names.join(", ")
        );
    }
    let file = if path.is_dir() { path.join("config.json") } else { path.to_owned() };
    let read = || -> anyhow::Result<Value> {
        let facts = std::fs::metadata(&file)?;
        ensure!(facts.is_file(), "it is not a file");
        ensure!(
            facts.len() <= LARGEST_CONFIG,
            "it has {} bytes, more than a config.json may have (16 MiB)",
            facts.len()
        );
        Ok(serde_json::from_slice(&std::fs::read(&file)?)?)
    };
    let config = read().with_context(|| format!("cannot read {}", file.display()))?;
    // The folder's name, also for `.` and for a path to the file.
    let folder = file.parent().and_then(|parent| parent.canonicalize().ok());
    let name = folder.as_deref().and_then(Path::file_name).map(|name| name.to_string_lossy().into_owned());
    Model::from_config(name.as_deref().unwrap_or("model"), &config)
        .with_context(|| format!("{} can't be used", file.display()))
}
