//! What calibration knows of the inputs of a model's layers.
//!
//! A calibration file is a safetensors file whose metadata are [`CalibrationContent`].
//! Layers with the same input share a set of statistics. A set `L` of inputs with `k` channels has the f32 tensors
//! - `L.mean_square`, `[k]`: E\[x²\] of each channel,
//! - `L.absmax`, `[k]`: the largest magnitude of each channel,
//! - `L.hessian`, `[k, k]`: E\[x xᵀ\]. Only GPTQ needs it.
//!
//! Any other safetensors file holds captured inputs: a tensor `[tokens, k]` for each layer, named after it.

use std::collections::BTreeMap;
use std::path::Path;

use liquidgemm::{Hessian, HessianBuilder, InputStatistics, InputStatisticsBuilder};
use safetensors::tensor::Dtype;
use serde::{Deserialize, Serialize};

use crate::error::{CheckpointError, Problem, Result, weights_error};
use crate::number::{decode, is_weight_type};
use crate::tensor_file::{FileTensor, TensorFile};

/// The metadata of a calibration file: a JSON object under [`KEY`](Self::KEY).
///
/// It is one entry, because safetensors files have several in random order.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CalibrationContent {
    version: u32,
    /// For each set of statistics, the number of tokens that it was recorded over.
    pub tokens: BTreeMap<String, u64>,
    /// For each layer, the name of its set.
    pub layers: BTreeMap<String, String>,
}

impl CalibrationContent {
    /// The name of the metadata's entry.
    pub const KEY: &str = "liquidgemm-calibration";
    const VERSION: u32 = 1;

    /// Returns the content of a file of the current version.
    pub fn new(tokens: BTreeMap<String, u64>, layers: BTreeMap<String, String>) -> Self {
        Self { version: Self::VERSION, tokens, layers }
    }

    /// Parses the metadata's entry.
    ///
    /// # Errors
    /// What is wrong with it, also if its version is unknown.
    pub fn parse(entry: &str) -> Result<Self, String> {
        let content: Self = serde_json::from_str(entry)
            .map_err(|error| format!("the metadata {:?} are not valid: {error}", Self::KEY))?;
        match content.version {
            Self::VERSION => Ok(content),
            other => Err(format!("the calibration has the version {other}; {} can be read", Self::VERSION)),
        }
    }

    /// Formats the metadata's entry. The same content gives the same text.
    pub fn to_entry(&self) -> String {
        serde_json::json!(self).to_string()
    }
}

/// An open calibration file. Statistics are read when they are needed.
#[derive(Debug)]
pub struct Calibration {
    file: TensorFile,
    /// From a layer's name to its set's.
    layers: BTreeMap<String, String>,
    tensors: BTreeMap<String, FileTensor>,
    are_captured: bool,
}

impl Calibration {
    /// Opens a calibration file, or a safetensors file of captured inputs.
    ///
    /// # Errors
    /// [`CheckpointError::Input`] if it is neither.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let file = TensorFile::open(path)?;
        let tensors: BTreeMap<String, FileTensor> =
            file.tensors().iter().map(|tensor| (tensor.name.clone(), tensor.clone())).collect();
        if let Some(entry) = file.metadata().get(CalibrationContent::KEY) {
            let content =
                CalibrationContent::parse(entry).map_err(|reason| Problem::Json { reason }.at(path))?;
            return Ok(Self { file, layers: content.layers, tensors, are_captured: false });
        }
        if let Some(tensor) =
            tensors.values().find(|tensor| tensor.shape.len() != 2 || !is_weight_type(tensor.dtype))
        {
            let found =
                format!("is {:?} {:?}; captured inputs are float [tokens, k]", tensor.dtype, tensor.shape);
            return Err(Problem::tensor(&tensor.name, found).at(path));
        }
        let layers = tensors.keys().map(|name| (name.clone(), name.clone())).collect();
        Ok(Self { file, layers, tensors, are_captured: true })
    }

    /// Returns the name of a module's set: modules with the same set have the same inputs.
    pub(crate) fn set(&self, module: &str) -> Option<&str> {
        self.layers.get(module).map(String::as_str)
    }

    /// Checks that a module with `k` input channels has statistics, and a Hessian if it needs one.
    pub(crate) fn check(&self, module: &str, k: usize, needs_hessian: bool) -> Result<()> {
        let Some(set) = self.set(module) else {
            let reason = format!(
                "{} has no statistics of the inputs of {module}; calibrate it as well, or exclude it",
                self.file.path().display()
            );
            return Err(CheckpointError::Options { reason });
        };
        if self.are_captured {
            let tensor = &self.tensors[set];
            if tensor.shape[1] == k && tensor.shape[0] > 0 {
                return Ok(());
            }
            let reason = format!("has the shape {:?}; [tokens, {k}] expected", tensor.shape);
            return Err(Problem::tensor(set, reason).at(self.file.path()));
        }
        self.tensor(set, "mean_square", &[k])?;
        self.tensor(set, "absmax", &[k])?;
        if needs_hessian {
            self.tensor(set, "hessian", &[k, k])?;
        }
        Ok(())
    }

    /// Reads the statistics of the inputs of a module.
    pub(crate) fn statistics(&self, module: &str, k: usize) -> Result<InputStatistics> {
        self.check(module, k, false)?;
        let set = self.set(module).unwrap_or(module);
        if self.are_captured {
            let mut builder = InputStatisticsBuilder::new(k).map_err(weights_error(module))?;
            let (inputs, tokens) = self.captured(set)?;
            builder.add(&inputs, tokens).map_err(weights_error(module))?;
            return builder.finish().map_err(weights_error(module));
        }
        let read = |what: &str| self.tensor(set, what, &[k]).and_then(|tensor| self.read(tensor));
        Ok(InputStatistics { second_moments: read("mean_square")?, largest: read("absmax")? })
    }

    /// Reads the Hessian of the inputs of a module.
    pub(crate) fn hessian(&self, module: &str, k: usize) -> Result<Hessian> {
        self.check(module, k, true)?;
        let set = self.set(module).unwrap_or(module);
        if self.are_captured {
            let mut builder = HessianBuilder::new(k).map_err(weights_error(module))?;
            let (inputs, tokens) = self.captured(set)?;
            builder.add(&inputs, tokens).map_err(weights_error(module))?;
            return builder.finish().map_err(weights_error(module));
        }
        let values = self.read(self.tensor(set, "hessian", &[k, k])?)?;
        Hessian::new(values, k).map_err(weights_error(module))
    }

    fn tensor(&self, set: &str, what: &str, shape: &[usize]) -> Result<&FileTensor> {
        let name = format!("{set}.{what}");
        let at = |problem: Problem| problem.at(self.file.path());
        let tensor = self.tensors.get(&name).ok_or_else(|| at(Problem::Missing { name: name.clone() }))?;
        if tensor.dtype != Dtype::F32 || tensor.shape != shape {
            let reason = format!("is {:?} {:?}; F32 {shape:?} expected", tensor.dtype, tensor.shape);
            return Err(at(Problem::tensor(&name, reason)));
        }
        Ok(tensor)
    }

    fn read(&self, tensor: &FileTensor) -> Result<Vec<f32>> {
        let bytes = self.file.read_all(tensor)?;
        let mut values = vec![0.0; tensor.shape.iter().product()];
        decode(tensor.dtype, &bytes, &mut values);
        Ok(values)
    }

    fn captured(&self, set: &str) -> Result<(Vec<f32>, usize)> {
        let tensor = &self.tensors[set];
        Ok((self.read(tensor)?, tensor.shape[0]))
    }

    pub(crate) fn fingerprint(&self) -> String {
        self.file.fingerprint()
    }
}
