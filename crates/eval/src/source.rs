//! A model's settings and tensors, whatever files they come from: `liquidgemm_checkpoint` reads them, under Hugging Face's names.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use liquidgemm_checkpoint::{OpenOptions, SideContents};
use serde_json::{Map, Value as Json};

use crate::Error;

/// A model on disk.
pub(crate) struct Source {
    model: Box<dyn liquidgemm_checkpoint::Source>,
    /// The number of each tensor.
    numbers: HashMap<String, usize>,
}

impl Source {
    /// Opens a GGUF file, or a folder that holds a Hugging Face model or one GGUF file.
    pub(crate) fn open(path: &Path) -> Result<Self, Error> {
        let model = liquidgemm_checkpoint::open(path, OpenOptions::default())?;
        let numbers = model.tensors().iter().zip(0..).map(|(tensor, number)| (tensor.name.clone(), number));
        Ok(Self { numbers: numbers.collect(), model })
    }

    /// Returns the contents of config.json, or what stands for it.
    pub(crate) fn config(&self) -> &Map<String, Json> {
        self.model.config()
    }

    /// Returns a setting, or null if there is none.
    pub(crate) fn setting(&self, key: &str) -> &Json {
        self.config().get(key).unwrap_or(&Json::Null)
    }

    /// Returns a setting that is a whole number.
    pub(crate) fn size(&self, key: &str) -> Result<usize, Error> {
        // Sizes beyond 2³² are no model's, and would overflow in products of two.
        let value = self.setting(key).as_u64().filter(|&value| value > 0 && value <= u64::from(u32::MAX));
        value.map(|value| value as usize).ok_or_else(|| Error::MissingSetting { key: key.to_owned() })
    }

    /// Returns a setting that is a number, or `None` if it is missing.
    pub(crate) fn number(&self, key: &str) -> Option<f64> {
        self.setting(key).as_f64()
    }

    /// Returns the name of the model for reports: that of its folder or file.
    pub(crate) fn name(&self) -> String {
        let path = self.model.path();
        let path = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        let name = if path.is_dir() { path.file_name() } else { path.file_stem() };
        name.map_or_else(|| "model".into(), |name| name.to_string_lossy().into_owned())
    }

    /// Returns the name of the architecture, as the model gives it.
    pub(crate) fn architecture(&self) -> Result<&str, Error> {
        self.setting("model_type").as_str().ok_or_else(|| Error::MissingSetting { key: "model_type".into() })
    }

    /// Returns where a tokenizer.json that is not part of the model would be: beside the file.
    pub(crate) fn tokenizer_path(&self) -> PathBuf {
        let path = self.model.path();
        if path.is_dir() { path.join("tokenizer.json") } else { path.with_file_name("tokenizer.json") }
    }

    /// Returns the model's own tokenizer.json, or why there is none.
    pub(crate) fn tokenizer(&self) -> Result<&SideContents, &str> {
        let file = self.model.side_files().iter().find(|file| file.name == Path::new("tokenizer.json"));
        let reason = || {
            let mut left_out = self.model.left_out().iter();
            left_out.find(|(name, _)| name == "tokenizer").map_or("it has no such file", |(_, reason)| reason)
        };
        file.map(|file| &file.contents).ok_or_else(reason)
    }

    /// Returns whether the tensor exists.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.numbers.contains_key(name)
    }

    /// Returns a tensor as f32, after a check of its shape.
    pub(crate) fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor, Error> {
        Ok(Tensor::from_vec(self.values(name, shape)?, shape, &Device::Cpu)?)
    }

    /// Returns a tensor of one dimension as a vector.
    pub(crate) fn vector(&self, name: &str, length: usize) -> Result<Vec<f32>, Error> {
        self.values(name, &[length])
    }

    fn values(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, Error> {
        let &number = self.numbers.get(name).ok_or_else(|| Error::MissingTensor { name: name.to_owned() })?;
        let tensor = &self.model.tensors()[number];
        if tensor.shape != shape {
            let (actual, expected) = (tensor.shape.clone(), shape.to_vec());
            return Err(Error::TensorShape { name: name.to_owned(), actual, expected });
        }
        if !tensor.is_readable {
            return Err(Error::TensorType { name: name.to_owned(), stored: tensor.stored.clone() });
        }
        let mut values = vec![0.0; tensor.rows() * tensor.columns()];
        self.model.read_rows(number, 0..tensor.rows(), &mut values)?;
        Ok(values)
    }
}
