//! Hugging Face folders and single safetensors files, with f32, f16, bf16 or fp8-e4m3 weights.
//!
//! An fp8 weight `P.weight` has its scales in `P.weight_scale_inv` (DeepSeek: one for each block of 128 × 128) or
//! in `P.weight_scale` (one for the tensor, or one a channel). The weight is the product of code and scale.

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};

use safetensors::tensor::Dtype;
use serde_json::{Map, Value};

use super::side_files::{self, SideFile};
use super::{Source, SourceTensor};
use crate::error::{Problem, Result};
use crate::files::{Folder, is_plain_name, read_json};
use crate::import;
use crate::number::{decode, is_weight_type};
use crate::tensor_file::{FileTensor, TensorFile};

/// The name of a model's only file of weights.
pub(crate) const SINGLE_FILE: &str = "model.safetensors";
/// The name of the index of many files.
pub(crate) const INDEX: &str = "model.safetensors.index.json";
/// The sides of an fp8 block where the configuration gives none.
const FP8_BLOCK: usize = 128;

/// Safetensors files of a model with its configuration.
pub(crate) struct SafetensorsModel {
    path: PathBuf,
    config: Map<String, Value>,
    files: Vec<TensorFile>,
    shards: Vec<String>,
    tensors: Vec<SourceTensor>,
    /// Parallel to `tensors`.
    places: Vec<Place>,
    side_files: Vec<SideFile>,
    left_out: Vec<(String, String)>,
}

/// Where a tensor lies, and the scales that it is multiplied with.
struct Place {
    file: usize,
    tensor: FileTensor,
    scales: Option<Fp8Scales>,
}

/// The scales of an fp8 weight.
struct Fp8Scales {
    /// Index of their tensor.
    tensor: usize,
    /// Rows and columns that share a scale.
    block: [usize; 2],
}

pub(super) fn open(path: &Path) -> Result<Box<dyn Source>> {
    let folder = Folder::open(path)?;
    if !folder.has("config.json") {
        let what = "the folder has no config.json".to_owned();
        let remedy = "give a Hugging Face folder, a .safetensors file or a GGUF file";
        return Err(Problem::Unsupported { what, remedy }.at(path));
    }
    let config = read_json(&folder.file(Path::new("config.json"))?)?;
    let shards = shard_names(&folder)?;
    let files = shards.names.iter().map(|name| TensorFile::open(&folder.file(Path::new(name))?));
    let files = files.collect::<Result<Vec<_>>>()?;
    shards.check(&files, path)?;
    let (side_files, left_out) = side_files::list(&folder, &shards.names)?;
    import::wrap(SafetensorsModel::new(path, config, shards.names, files, side_files, left_out)?)
}

/// Returns the GGUF file of a folder that has no config.json, if there is exactly one.
pub(super) fn only_gguf(path: &Path) -> Result<Option<PathBuf>> {
    let folder = Folder::open(path)?;
    if folder.has("config.json") {
        return Ok(None);
    }
    let names = folder.names(Path::new(""))?;
    let files: Vec<&String> = names.iter().filter(|name| name.ends_with(".gguf")).collect();
    let [only] = files[..] else { return Ok(None) };
    folder.file(Path::new(only)).map(Some)
}

pub(super) fn open_file(path: &Path) -> Result<Box<dyn Source>> {
    let files = vec![TensorFile::open(path)?];
    let shards = vec![SINGLE_FILE.to_owned()];
    let model = SafetensorsModel::new(path, Map::new(), shards, files, Vec::new(), Vec::new())?;
    Ok(Box::new(model))
}

/// The files of a folder's weights.
pub(crate) struct Shards {
    /// Plain names of files, sorted.
    pub(crate) names: Vec<String>,
    /// The index, if there is one: the file of each tensor.
    index: Option<HashMap<String, String>>,
}

/// Finds the files of a folder's weights.
pub(crate) fn shard_names(folder: &Folder) -> Result<Shards> {
    if folder.has(SINGLE_FILE) {
        return Ok(Shards { names: vec![SINGLE_FILE.to_owned()], index: None });
    }
    if folder.has(INDEX) {
        let path = folder.file(Path::new(INDEX))?;
        let index = parse_index(&read_json(&path)?).map_err(|problem| problem.at(&path))?;
        let names: BTreeSet<&String> = index.values().collect();
        if let Some(missing) = names.iter().find(|name| !folder.has(name)) {
            return Err(Problem::Missing { name: missing.to_string() }.at(&path));
        }
        let names = names.into_iter().cloned().collect();
        return Ok(Shards { names, index: Some(index) });
    }
    let names = folder.names(Path::new(""))?;
    let weights: Vec<&String> = names.iter().filter(|name| name.ends_with(".safetensors")).collect();
    if let [only] = weights[..] {
        return Ok(Shards { names: vec![only.clone()], index: None });
    }
    let (what, remedy) = if !weights.is_empty() {
        (
            format!("the folder has {} .safetensors files, but no {INDEX}", weights.len()),
            "fetch the index as well",
        )
    } else if names.iter().any(|name| name.ends_with(".gguf")) {
        ("the folder has no .safetensors file".to_owned(), "give the .gguf file itself")
    } else {
        let remedy = "save the model as safetensors first (`save_pretrained` of transformers does)";
        ("the folder has no .safetensors file".to_owned(), remedy)
    };
    Err(Problem::Unsupported { what, remedy }.at(folder.path()))
}

/// Reads the index's `weight_map`: the file of each tensor.
pub(crate) fn parse_index(index: &Map<String, Value>) -> Result<HashMap<String, String>, Problem> {
    let bad = |reason: &str| Problem::Json { reason: reason.to_owned() };
    let map = index.get("weight_map").and_then(Value::as_object);
    let map = map.ok_or_else(|| bad("the index has no object \"weight_map\""))?;
    if map.is_empty() {
        return Err(bad("the index's \"weight_map\" is empty"));
    }
    map.iter()
        .map(|(tensor, file)| {
            let file =
                file.as_str().ok_or_else(|| bad("the index's \"weight_map\" has a value that is no text"))?;
            if !is_plain_name(file) || !file.ends_with(".safetensors") {
                return Err(Problem::UnsafeName { name: file.to_owned() });
            }
            Ok((tensor.clone(), file.to_owned()))
        })
        .collect()
}

impl Shards {
    /// Checks that every tensor of the index is in the file that the index names.
    pub(crate) fn check(&self, files: &[TensorFile], path: &Path) -> Result<()> {
        let Some(index) = &self.index else { return Ok(()) };
        let mut present = BTreeSet::new();
        for (name, file) in self.names.iter().zip(files) {
            present.extend(file.tensors().iter().map(|tensor| (tensor.name.as_str(), name.as_str())));
        }
        let mut missing =
            index.iter().filter(|(tensor, file)| !present.contains(&(tensor.as_str(), file.as_str())));
        match missing.next() {
            Some((tensor, file)) => Err(Problem::Missing { name: format!("{tensor} in {file}") }.at(path)),
            None => Ok(()),
        }
    }
}

impl SafetensorsModel {
    fn new(
        path: &Path,
        config: Map<String, Value>,
        shards: Vec<String>,
        files: Vec<TensorFile>,
        side_files: Vec<SideFile>,
        left_out: Vec<(String, String)>,
    ) -> Result<Self> {
        let (mut tensors, mut places) = (Vec::new(), Vec::new());
        let mut known: HashMap<String, usize> = HashMap::new();
        for (index, file) in files.iter().enumerate() {
            for tensor in file.tensors() {
                if let Some(other) = known.insert(tensor.name.clone(), tensors.len()) {
                    let place: &Place = &places[other];
                    let other = shards[place.file].clone();
                    return Err(Problem::Twice { name: tensor.name.clone(), other }.at(file.path()));
                }
                let is_empty = tensor.shape.contains(&0);
                if !is_empty
                    && !(tensor.shape.last().unwrap_or(&1) * tensor.dtype.bitsize()).is_multiple_of(8)
                {
                    let reason =
                        format!("has rows of {:?} that are no whole bytes, as no known model", tensor.dtype);
                    return Err(Problem::tensor(&tensor.name, reason).at(file.path()));
                }
                tensors.push(SourceTensor {
                    name: tensor.name.clone(),
                    shape: tensor.shape.clone(),
                    stored: format!("{:?}", tensor.dtype),
                    stored_bytes: tensor.bytes,
                    kept: tensor.dtype,
                    shard: index,
                    is_readable: is_weight_type(tensor.dtype),
                    scales_of: None,
                    is_imported: false,
                    imported_group: None,
                    permuted: false,
                });
                places.push(Place { file: index, tensor: tensor.clone(), scales: None });
            }
        }
        let mut model =
            Self { path: path.to_owned(), config, files, shards, tensors, places, side_files, left_out };
        model.find_fp8_scales(&known)?;
        Ok(model)
    }

    /// Finds the scales of each fp8 weight, and checks their shapes.
    fn find_fp8_scales(&mut self, known: &HashMap<String, usize>) -> Result<()> {
        let blocks =
            self.config.get("quantization_config").and_then(|config| config.get("weight_block_size"));
        let configured =
            |axis: usize| blocks.and_then(|blocks| blocks.get(axis)?.as_u64()).map(|side| side as usize);
        let sides = [0, 1].map(|axis| configured(axis).filter(|&side| side > 0).unwrap_or(FP8_BLOCK));
        for weight in 0..self.tensors.len() {
            let tensor = &self.tensors[weight];
            if self.places[weight].tensor.dtype != Dtype::F8_E4M3 || tensor.shape.len() != 2 {
                continue;
            }
            let names = ["_scale_inv", "_scale"].map(|suffix| format!("{}{suffix}", tensor.name));
            let Some(&scales) = names.iter().find_map(|name| known.get(name)) else { continue };
            let (n, k) = (tensor.shape[0], tensor.shape[1]);
            let block = match self.tensors[scales].shape[..] {
                [] | [1] | [1, 1] => Some([n, k]),
                [rows] | [rows, 1] if rows == n => Some([1, k]),
                [rows, columns] if rows == n.div_ceil(sides[0]) && columns == k.div_ceil(sides[1]) => {
                    Some(sides)
                }
                _ => None,
            };
            let reason = match block {
                None => format!(
                    "has the shape {:?}, which fits no scales of [{n}, {k}] weights in blocks of {sides:?}",
                    self.tensors[scales].shape
                ),
                Some(_) if !self.tensors[scales].is_readable => {
                    format!("has the type {}, which is no type of scales", self.tensors[scales].stored)
                }
                Some(block) => {
                    self.tensors[scales].scales_of = Some(weight);
                    self.places[weight].scales = Some(Fp8Scales { tensor: scales, block });
                    continue;
                }
            };
            let file = &self.files[self.places[scales].file];
            return Err(Problem::tensor(&self.tensors[scales].name, reason).at(file.path()));
        }
        Ok(())
    }

    /// Reads a whole tensor as it is stored. Fails if there is no memory for it.
    pub(crate) fn read_bytes(&self, tensor: usize) -> Result<Vec<u8>> {
        let Place { file, tensor, .. } = &self.places[tensor];
        self.files[*file].read_all(tensor)
    }

    /// Reads a tensor of 32-bit integers.
    pub(crate) fn read_words(&self, tensor: usize) -> Result<Vec<u32>, Problem> {
        let info = &self.tensors[tensor];
        if info.kept != Dtype::I32 {
            return Err(Problem::tensor(&info.name, format!("has the type {}; I32 expected", info.stored)));
        }
        let bytes =
            self.read_bytes(tensor).map_err(|error| Problem::tensor(&info.name, error.to_string()))?;
        Ok(bytes.as_chunks().0.iter().map(|&bytes| u32::from_le_bytes(bytes)).collect())
    }

    /// Reads the two numbers of a shape.
    pub(crate) fn read_shape(&self, tensor: usize) -> Result<[usize; 2], Problem> {
        let info = &self.tensors[tensor];
        let bad = |reason: String| Problem::tensor(&info.name, reason);
        if info.shape != [2] {
            return Err(bad(format!("has the shape {:?}; [2] expected", info.shape)));
        }
        let bytes = self.read_bytes(tensor).map_err(|error| bad(error.to_string()))?;
        let sides: Vec<i64> = match info.kept {
            Dtype::I64 => bytes.as_chunks().0.iter().map(|&bytes| i64::from_le_bytes(bytes)).collect(),
            Dtype::I32 => bytes.as_chunks().0.iter().map(|&bytes| i32::from_le_bytes(bytes).into()).collect(),
            _ => return Err(bad(format!("has the type {}, which is none of shapes", info.stored))),
        };
        match sides[..] {
            // Larger sides than this could not be multiplied.
            [n, k] if (1..=1 << 31).contains(&n) && (1..=1 << 31).contains(&k) => {
                Ok([n as usize, k as usize])
            }
            _ => Err(bad(format!("holds {sides:?}, which is no shape"))),
        }
    }

    /// Reads a whole tensor as f32.
    pub(crate) fn read_all(&self, tensor: usize) -> Result<Vec<f32>> {
        let info = &self.tensors[tensor];
        let mut values = vec![0.0; info.rows() * info.columns()];
        self.read_rows(tensor, 0..info.rows(), &mut values)?;
        Ok(values)
    }
}

impl Source for SafetensorsModel {
    fn path(&self) -> &Path {
        &self.path
    }

    fn format(&self) -> String {
        let kind = if self.config.is_empty() { "safetensors file" } else { "Hugging Face folder" };
        match self.config.get("model_type").and_then(Value::as_str) {
            Some(model) => format!("{kind}, {model}"),
            None => kind.to_owned(),
        }
    }

    fn config(&self) -> &Map<String, Value> {
        &self.config
    }

    fn tensors(&self) -> &[SourceTensor] {
        &self.tensors
    }

    fn shards(&self) -> &[String] {
        &self.shards
    }

    fn read_rows(&self, tensor: usize, rows: Range<usize>, values: &mut [f32]) -> Result<()> {
        let columns = self.tensors[tensor].columns();
        assert_eq!(values.len(), rows.len() * columns, "values of {rows:?}");
        if values.is_empty() {
            return Ok(());
        }
        let mut bytes = vec![0; rows.len() * self.tensors[tensor].kept_row_bytes()];
        self.read_kept(tensor, rows.clone(), &mut bytes)?;
        decode(self.places[tensor].tensor.dtype, &bytes, values);
        drop(bytes);
        if let Some(Fp8Scales { tensor: scales, block }) = &self.places[tensor].scales {
            let scales = self.read_all(*scales)?;
            let scale_columns = columns.div_ceil(block[1]);
            for (row, values) in rows.zip(values.chunks_exact_mut(columns)) {
                let scales = &scales[row / block[0] * scale_columns..][..scale_columns];
                for (values, scale) in values.chunks_mut(block[1]).zip(scales) {
                    values.iter_mut().for_each(|value| *value *= scale);
                }
            }
        }
        Ok(())
    }

    fn read_kept(&self, tensor: usize, rows: Range<usize>, bytes: &mut [u8]) -> Result<()> {
        let row = self.tensors[tensor].kept_row_bytes();
        assert_eq!(bytes.len(), rows.len() * row, "bytes of {rows:?}");
        let Place { file, tensor, .. } = &self.places[tensor];
        self.files[*file].read(tensor, rows.start as u64 * row as u64, bytes)
    }

    fn side_files(&self) -> &[SideFile] {
        &self.side_files
    }

    fn left_out(&self) -> &[(String, String)] {
        &self.left_out
    }

    fn fingerprint(&self) -> String {
        let files: Vec<String> = self.files.iter().map(TensorFile::fingerprint).collect();
        files.join("\n")
    }
}
