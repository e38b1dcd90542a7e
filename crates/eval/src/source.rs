//! Where a model's settings and tensors come from: a Hugging Face folder or a GGUF file.
//!
//! Nothing else in this crate knows the file formats. Reading is candle's.

use std::collections::HashMap;
use std::fs;
use std::io::BufReader;
use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::{Content, Value};
use candle_core::{DType, Device, Tensor};
use serde_json::Value as Json;

use crate::Error;

/// A model on disk.
pub(crate) enum Source {
    /// A folder with config.json and safetensors.
    Folder { path: PathBuf, config: Json, tensors: HashMap<String, Tensor> },
    /// A GGUF file.
    Gguf { path: PathBuf, content: Content, file: std::cell::RefCell<BufReader<fs::File>> },
}

impl Source {
    /// Opens a GGUF file, or a folder that holds a Hugging Face model or one GGUF file.
    pub(crate) fn open(path: &Path) -> Result<Self, Error> {
        let metadata = fs::metadata(path).map_err(Error::read(path))?;
        if metadata.is_file() {
            return Self::open_gguf(path);
        }
        let config = path.join("config.json");
        let files = list(path)?;
        let with_extension = |extension: &'static str| {
            files.iter().filter(move |file| file.extension().is_some_and(|e| e == extension))
        };
        if config.is_file() {
            return Self::open_folder(path, &config, with_extension("safetensors"));
        }
        let mut gguf = with_extension("gguf");
        match (gguf.next(), gguf.next()) {
            (Some(file), None) => Self::open_gguf(file),
            _ => Err(Error::NoModel { path: path.to_owned() }),
        }
    }

    fn open_folder<'a>(
        path: &Path,
        config_path: &Path,
        files: impl Iterator<Item = &'a PathBuf>,
    ) -> Result<Self, Error> {
        let text = fs::read_to_string(config_path).map_err(Error::read(config_path))?;
        let config = serde_json::from_str(&text).map_err(|error| Error::invalid(config_path, error))?;
        let mut tensors = HashMap::new();
        for file in files {
            let shard = candle_core::safetensors::load(file, &Device::Cpu)
                .map_err(|error| Error::invalid(file, error))?;
            tensors.extend(shard);
        }
        if tensors.is_empty() {
            return Err(Error::NoModel { path: path.to_owned() });
        }
        Ok(Source::Folder { path: path.to_owned(), config, tensors })
    }

    fn open_gguf(path: &Path) -> Result<Self, Error> {
        let file = fs::File::open(path).map_err(Error::read(path))?;
        let mut file = BufReader::new(file);
        let content = Content::read(&mut file).map_err(|error| Error::invalid(path, error))?;
        Ok(Source::Gguf { path: path.to_owned(), content, file: file.into() })
    }

    /// Returns where tokenizer.json would be.
    pub(crate) fn tokenizer_path(&self) -> PathBuf {
        match self {
            Source::Folder { path, .. } => path.join("tokenizer.json"),
            Source::Gguf { path, .. } => path.with_file_name("tokenizer.json"),
        }
    }

    /// Returns the name of the model for reports: that of its folder or file.
    pub(crate) fn name(&self) -> String {
        let (Source::Folder { path, .. } | Source::Gguf { path, .. }) = self;
        let path = fs::canonicalize(path).unwrap_or_else(|_| path.clone());
        let name = match self {
            Source::Folder { .. } => path.file_name(),
            Source::Gguf { .. } => path.file_stem(),
        };
        name.map_or_else(|| "model".into(), |name| name.to_string_lossy().into_owned())
    }

    /// Returns the name of the architecture, as the model gives it.
    pub(crate) fn architecture(&self) -> Result<String, Error> {
        match self {
            Source::Folder { config, .. } => config["model_type"]
                .as_str()
                .map(str::to_owned)
                .ok_or_else(|| Error::MissingSetting { key: "model_type".into() }),
            Source::Gguf { .. } => self.gguf_text("general.architecture").map(str::to_owned),
        }
    }

    /// Returns whether the tensor exists.
    pub(crate) fn has(&self, name: &str) -> bool {
        match self {
            Source::Folder { tensors, .. } => tensors.contains_key(name),
            Source::Gguf { content, .. } => content.tensor_infos.contains_key(name),
        }
    }

    /// Returns a tensor as f32, after a check of its shape.
    pub(crate) fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor, Error> {
        if !self.has(name) {
            return Err(Error::MissingTensor { name: name.to_owned() });
        }
        let tensor = match self {
            Source::Folder { tensors, .. } => tensors[name].to_dtype(DType::F32)?,
            Source::Gguf { content, file, .. } => {
                let tensor = content.tensor(&mut *file.borrow_mut(), name, &Device::Cpu)?;
                tensor.dequantize(&Device::Cpu)?
            }
        };
        if tensor.dims() != shape {
            return Err(Error::TensorShape {
                name: name.to_owned(),
                actual: tensor.dims().to_vec(),
                expected: shape.to_vec(),
            });
        }
        Ok(tensor)
    }

    /// Returns a tensor of one dimension as a vector.
    pub(crate) fn vector(&self, name: &str, length: usize) -> Result<Vec<f32>, Error> {
        Ok(self.tensor(name, &[length])?.to_vec1()?)
    }

    /// Returns a value of the GGUF metadata.
    pub(crate) fn gguf_value(&self, key: &str) -> Option<&Value> {
        match self {
            Source::Folder { .. } => None,
            Source::Gguf { content, .. } => content.metadata.get(key),
        }
    }

    /// Returns a text of the GGUF metadata.
    pub(crate) fn gguf_text(&self, key: &str) -> Result<&str, Error> {
        self.gguf_value(key)
            .and_then(|value| value.to_string().ok())
            .map(String::as_str)
            .ok_or_else(|| Error::MissingSetting { key: key.to_owned() })
    }

    /// Returns a list of the GGUF metadata.
    pub(crate) fn gguf_list(&self, key: &str) -> Result<&[Value], Error> {
        self.gguf_value(key)
            .and_then(|value| value.to_vec().ok())
            .map(Vec::as_slice)
            .ok_or_else(|| Error::MissingSetting { key: key.to_owned() })
    }
}

/// Returns the files of a folder, sorted.
fn list(path: &Path) -> Result<Vec<PathBuf>, Error> {
    let mut files = Vec::new();
    for entry in fs::read_dir(path).map_err(Error::read(path))? {
        files.push(entry.map_err(Error::read(path))?.path());
    }
    files.sort();
    Ok(files)
}

/// A size, and where it may be found: a key of config.json or of the GGUF metadata.
pub(crate) trait Settings {
    /// Returns a whole number.
    fn size(&self, key: &str) -> Result<usize, Error>;
    /// Returns a number, or `None` if the key is missing.
    fn number(&self, key: &str) -> Option<f64>;
}

impl Settings for Source {
    fn size(&self, key: &str) -> Result<usize, Error> {
        let value = match self {
            Source::Folder { config, .. } => config[key].as_u64(),
            Source::Gguf { .. } => self.gguf_value(key).and_then(|value| value.to_u64().ok()),
        };
        // Sizes beyond 2³² are no model's, and would overflow in products of two.
        value
            .filter(|&value| value > 0 && value <= u64::from(u32::MAX))
            .map(|value| value as usize)
            .ok_or_else(|| Error::MissingSetting { key: key.to_owned() })
    }

    fn number(&self, key: &str) -> Option<f64> {
        match self {
            Source::Folder { config, .. } => config[key].as_f64(),
            Source::Gguf { .. } => {
                let value = self.gguf_value(key)?;
                value.to_f64().ok().or_else(|| value.to_f32().ok().map(f64::from))
            }
        }
    }
}
