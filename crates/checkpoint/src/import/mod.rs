//! Models that other quantizers have quantized to four bits. Each format is a file; the rest is common.
//!
//! | file | |
//! |---|---|
//! | `compressed_tensors.rs`, `gptq.rs`, `awq.rs`, `qqq.rs`, `qserve.rs` | where a format keeps codes, scales and zeros |
//! | `words.rs` | codes in 32-bit words |
//!
//! [`PackedWeights::from_int4`](liquidgemm::PackedWeights::from_int4) takes their codes, scales and zeros to packed weights.

mod awq;
mod compressed_tensors;
mod gptq;
mod qqq;
mod qserve;
mod words;

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use half::f16;
use liquidgemm::{Group, Int4Weights};
use liquidgemm_format::brick::BRICK_K;
use safetensors::tensor::Dtype;
use serde_json::{Map, Value};

pub use liquidgemm::ImportKind;

use crate::error::{Problem, Result};
use crate::source::{SafetensorsModel, SideFile, Source, SourceTensor};

/// A matrix that another quantizer has quantized.
#[derive(Clone, Debug)]
pub struct Imported {
    /// Codes, scales and zeros.
    pub weights: Int4Weights,
    /// If the columns were sorted by group: the activation that each column multiplies.
    pub permutation: Option<Vec<i32>>,
}

/// The outcome of taking over a matrix.
#[derive(Clone, Debug, PartialEq)]
pub struct ImportOutcome {
    /// The module.
    pub module: String,
    /// How it was taken over.
    pub kind: ImportKind,
    /// `‖packed − source‖ / ‖source‖` of the weights.
    pub error: f64,
}

/// The formats.
#[derive(Clone, Copy, Debug)]
enum Format {
    CompressedTensors,
    Gptq {
        /// Added to stored zeros.
        more: u8,
    },
    Awq,
    Qqq,
    Qserve,
}

impl Format {
    /// Returns the name for reports.
    fn name(self) -> &'static str {
        match self {
            Format::CompressedTensors => "compressed-tensors",
            Format::Gptq { .. } => "GPTQ",
            Format::Awq => "AWQ",
            Format::Qqq => "QQQ",
            Format::Qserve => "QServe",
        }
    }
}

/// What elements a tensor of a matrix has.
#[derive(Clone, Copy, PartialEq)]
enum Elements {
    /// One of the types of weights.
    Floats,
    /// I32.
    Words,
    /// I8 or U8.
    Bytes,
}

/// A matrix in one of the formats: its sizes, and the indices of its tensors.
pub(crate) struct Found {
    module: String,
    n: usize,
    k: usize,
    groups: usize,
    codes: usize,
    scales: usize,
    /// Scales of groups, if `scales` has those of channels.
    group_scales: Option<usize>,
    zeros: Option<usize>,
    group_index: Option<usize>,
    others: Vec<usize>,
}

impl Found {
    /// Returns a matrix `[n, k]` that has codes and scales only.
    fn new(module: String, [n, k]: [usize; 2], groups: usize, [codes, scales]: [usize; 2]) -> Self {
        let (group_scales, zeros, group_index, others) = (None, None, None, Vec::new());
        Self { module, n, k, groups, codes, scales, group_scales, zeros, group_index, others }
    }

    fn tensors(&self) -> impl Iterator<Item = usize> {
        let required = [self.codes, self.scales].into_iter().chain(self.group_scales);
        let required = required.chain(self.zeros).chain(self.group_index);
        required.chain(self.others.iter().copied())
    }

    /// Returns the elements that each tensor must have, but for the others.
    fn elements(&self, format: Format) -> impl Iterator<Item = (usize, Elements)> {
        let (codes, group_scales, zeros) = match format {
            Format::Qserve if self.group_scales.is_some() => {
                (Elements::Bytes, Elements::Bytes, Elements::Bytes)
            }
            Format::Qserve => (Elements::Bytes, Elements::Bytes, Elements::Floats),
            _ => (Elements::Words, Elements::Floats, Elements::Words),
        };
        let optional =
            [(self.group_scales, group_scales), (self.zeros, zeros), (self.group_index, Elements::Words)];
        let required = [(self.codes, codes), (self.scales, Elements::Floats)];
        required
            .into_iter()
            .chain(optional.into_iter().filter_map(|(tensor, elements)| Some((tensor?, elements))))
    }

    /// Returns the columns in a group.
    fn group(&self) -> usize {
        self.k.div_ceil(self.groups)
    }
}

/// The tensors of a model by name.
pub(crate) struct Parts<'a> {
    tensors: &'a [SourceTensor],
    by_name: HashMap<&'a str, usize>,
}

impl<'a> Parts<'a> {
    fn new(tensors: &'a [SourceTensor]) -> Self {
        let by_name =
            tensors.iter().enumerate().map(|(index, tensor)| (tensor.name.as_str(), index)).collect();
        Self { tensors, by_name }
    }

    /// Returns the modules that have a tensor with this suffix, and its index.
    fn with_suffix(&self, suffix: &str) -> Vec<(String, usize)> {
        let modules = self.tensors.iter().enumerate();
        modules.filter_map(|(index, t)| Some((t.name.strip_suffix(suffix)?.to_owned(), index))).collect()
    }

    fn optional(&self, module: &str, suffix: &str) -> Option<usize> {
        self.by_name.get(format!("{module}{suffix}").as_str()).copied()
    }

    fn required(&self, module: &str, suffix: &str) -> Result<usize, Problem> {
        self.optional(module, suffix).ok_or_else(|| Problem::Missing { name: format!("{module}{suffix}") })
    }

    fn shape(&self, tensor: usize) -> &'a [usize] {
        &self.tensors[tensor].shape
    }

    fn matrix_shape(&self, tensor: usize) -> Result<[usize; 2], Problem> {
        match *self.shape(tensor) {
            [rows, columns] if rows > 0 && columns > 0 => Ok([rows, columns]),
            _ => Err(self.wrong_shape(tensor, "a matrix")),
        }
    }

    fn expect(&self, tensor: usize, shape: &[usize]) -> Result<(), Problem> {
        if self.shape(tensor) == shape {
            Ok(())
        } else {
            Err(self.wrong_shape(tensor, &format!("{shape:?}")))
        }
    }

    fn wrong_shape(&self, tensor: usize, expected: &str) -> Problem {
        let reason = format!("has the shape {:?}; {expected} expected", self.shape(tensor));
        Problem::tensor(&self.tensors[tensor].name, reason)
    }
}

/// Returns the model, read through the importer of its format if another quantizer has quantized it.
pub(crate) fn wrap(model: SafetensorsModel) -> Result<Box<dyn Source>> {
    let path = model.path().to_owned();
    let config = model.config().get("quantization_config").cloned().unwrap_or(Value::Null);
    let format = match format_of(&config).map_err(|problem| problem.at(&path))? {
        Some(format) => format,
        // QServe's converter leaves the configuration as it was.
        None if config.is_null() && model.tensors().iter().any(|tensor| qserve::is_mark(&tensor.name)) => {
            Format::Qserve
        }
        None => return Ok(Box::new(model)),
    };
    let imported = ImportedModel::new(model, format).map_err(|problem| problem.at(&path))?;
    Ok(Box::new(imported))
}

/// Returns the format of a model with this `quantization_config`, or `None` if its weights are floating-point numbers.
fn format_of(config: &Value) -> Result<Option<Format>, Problem> {
    let remedy = "quantize the original checkpoint";
    let refuse = |what: &str| Err(Problem::Unsupported { what: what.to_owned(), remedy });
    let Some(method) = config.get("quant_method") else { return Ok(None) };
    match method.as_str() {
        Some("fp8") => Ok(None),
        Some("compressed-tensors") => {
            let is_fp8 = config.get("format").and_then(Value::as_str) == Some("float-quantized");
            if is_fp8 {
                return Ok(None);
            }
            compressed_tensors::check(config).map(|()| Some(Format::CompressedTensors))
        }
        Some("gptq") => gptq::check(config).map(|more| Some(Format::Gptq { more })),
        Some("awq") => awq::check(config).map(|()| Some(Format::Awq)),
        Some("qqq") => qqq::check(config).map(|()| Some(Format::Qqq)),
        Some("qserve" | "qoq") => qserve::check(config).map(|()| Some(Format::Qserve)),
        // Everything was kept: the weights are floating-point numbers, as those of a model that was only rotated.
        Some("liquidgemm")
            if config.get("quantized_modules").is_some_and(|list| *list == Value::Array(Vec::new())) =>
        {
            Ok(None)
        }
        Some("liquidgemm") => refuse("this model is packed already"),
        Some("mxfp4") => refuse(
            "MXFP4 weights are floating-point codes (e2m1), which no integer scale maps to the packed format's integers",
        ),
        Some("modelopt") => refuse(
            "NVFP4 and other ModelOpt weights are floating-point codes, which no integer scale maps to the packed \
             format's integers",
        ),
        _ => refuse(&format!("the model is quantized by {method}")),
    }
}

/// A model whose matrices another quantizer has quantized. Each matrix `P` appears as one tensor, `P.weight`.
struct ImportedModel {
    model: SafetensorsModel,
    format: Format,
    tensors: Vec<SourceTensor>,
    /// Parallel to `tensors`.
    origins: Vec<Origin>,
    /// The matrix that was read last: rows of it are read one block after another.
    last: Mutex<Option<(usize, Arc<Imported>)>>,
}

enum Origin {
    /// A tensor of the model.
    Same(usize),
    /// A matrix of the format.
    Matrix(Found),
}

impl ImportedModel {
    fn new(model: SafetensorsModel, format: Format) -> Result<Self, Problem> {
        let parts = Parts::new(model.tensors());
        let found = match format {
            Format::CompressedTensors => compressed_tensors::find(&model, &parts)?,
            Format::Gptq { .. } => gptq::find(&parts)?,
            Format::Awq => awq::find(&parts)?,
            Format::Qqq => qqq::find(&parts)?,
            Format::Qserve => qserve::find(&parts)?,
        };
        let mut matrices: HashMap<usize, Found> = HashMap::new();
        let mut absorbed = vec![false; model.tensors().len()];
        for found in found {
            for (tensor, elements) in found.elements(format) {
                let info = &model.tensors()[tensor];
                let fits = match elements {
                    Elements::Floats => info.is_readable,
                    Elements::Words => info.kept == Dtype::I32,
                    Elements::Bytes => matches!(info.kept, Dtype::I8 | Dtype::U8),
                };
                if !fits {
                    return Err(Problem::tensor(
                        &info.name,
                        format!("has the type {}, which has no place there", info.stored),
                    ));
                }
            }
            if let Some(index) = found.group_index {
                parts.expect(index, &[found.k])?;
            }
            // The last group may be shorter, but no group is empty.
            if found.groups == 0 || found.groups > found.k || (found.groups - 1) * found.group() >= found.k {
                let reason = format!("has {} groups for {} columns", found.groups, found.k);
                return Err(Problem::tensor(&model.tensors()[found.scales].name, reason));
            }
            for tensor in found.tensors() {
                if std::mem::replace(&mut absorbed[tensor], true) {
                    return Err(Problem::tensor(&model.tensors()[tensor].name, "belongs to two matrices"));
                }
            }
            matrices.insert(found.codes, found);
        }
        let (mut tensors, mut origins) = (Vec::new(), Vec::new());
        // Where each tensor of the model has gone.
        let mut places = vec![None; absorbed.len()];
        for (index, tensor) in model.tensors().iter().enumerate() {
            if let Some(found) = matrices.remove(&index) {
                tensors.push(found.described(&model, format)?);
                origins.push(Origin::Matrix(found));
            } else if !absorbed[index] {
                places[index] = Some(tensors.len());
                tensors.push(tensor.clone());
                origins.push(Origin::Same(index));
            }
        }
        for tensor in &mut tensors {
            tensor.scales_of = tensor.scales_of.and_then(|weight| places[weight]);
        }
        Ok(Self { model, format, tensors, origins, last: Mutex::new(None) })
    }

    /// Reads a matrix, or returns the one that was read last.
    fn matrix(&self, tensor: usize, found: &Found) -> Result<Arc<Imported>> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, matrix)) = last.as_ref().filter(|(index, _)| *index == tensor) {
            return Ok(Arc::clone(matrix));
        }
        // Two matrices at a time would need twice the memory.
        *last = None;
        let matrix = Arc::new(found.read(&self.model, self.format)?);
        *last = Some((tensor, Arc::clone(&matrix)));
        Ok(matrix)
    }
}

impl Found {
    /// Describes the matrix as one tensor.
    fn described(&self, model: &SafetensorsModel, format: Format) -> Result<SourceTensor, Problem> {
        let group = self.group();
        let imported_group = if self.groups == 1 {
            Some(Group::Channel)
        } else {
            group.is_multiple_of(BRICK_K).then_some(Group::K(group))
        };
        let method = match format {
            Format::CompressedTensors => "int4",
            other => other.name(),
        };
        let group_name = if self.groups == 1 { "channel".to_owned() } else { group.to_string() };
        let permuted = match self.group_index {
            // Without codes that can be taken over, the columns return to the order of the activations.
            Some(index) => imported_group.is_some() && !is_sorted(&model.read_words(index)?, group),
            None => false,
        };
        Ok(SourceTensor {
            name: format!("{}.weight", self.module),
            shape: vec![self.n, self.k],
            stored: format!("{method} g{group_name}"),
            stored_bytes: self.tensors().map(|tensor| model.tensors()[tensor].stored_bytes).sum(),
            kept: Dtype::F16,
            shard: model.tensors()[self.codes].shard,
            is_readable: true,
            scales_of: None,
            is_imported: true,
            imported_group,
            permuted,
        })
    }

    /// Reads the matrix, with its columns sorted by group.
    fn read(&self, model: &SafetensorsModel, format: Format) -> Result<Imported> {
        let (n, k, groups, group) = (self.n, self.k, self.groups, self.group());
        let codes = model.read_bytes(self.codes)?;
        let scales = model.read_all(self.scales)?;
        let stored_zeros = || self.zeros.map(|zeros| model.read_bytes(zeros)).transpose();
        let about = |tensor: usize, reason: String| {
            Problem::tensor(&model.tensors()[tensor].name, reason).at(model.path())
        };
        // Codes and scales, and zeros unless they are in the middle of symmetric codes.
        let (mut codes, scales, zeros) = match format {
            Format::CompressedTensors => {
                let zeros = stored_zeros()?.map(|zeros| compressed_tensors::zeros(&zeros, n, groups));
                (compressed_tensors::codes(&codes, n, k), scales, zeros.map(floats))
            }
            Format::Gptq { more } => {
                let zeros = stored_zeros()?.map(|zeros| gptq::zeros(&zeros, n, groups, more));
                (gptq::codes(&codes, n, k), transposed(&scales, groups, n), zeros.map(floats))
            }
            Format::Awq => {
                let zeros = stored_zeros()?.map(|zeros| awq::zeros(&zeros, n, groups));
                (awq::codes(&codes, n, k), transposed(&scales, groups, n), zeros.map(floats))
            }
            Format::Qqq => {
                let group_scales = self.group_scales.map(|tensor| model.read_all(tensor)).transpose()?;
                let codes = qqq::codes(&codes, n, k, group_scales.is_some());
                (codes, qqq::scales(&scales, group_scales.as_deref(), n), None)
            }
            Format::Qserve => {
                let codes = qserve::codes(&codes, n, k);
                let tensor = self.zeros.unwrap_or(self.scales);
                let (scales, zeros) = match self.group_scales {
                    None => {
                        let zeros = qserve::channel_zeros(&scales, &model.read_all(tensor)?);
                        (scales, zeros.map_err(|reason| about(tensor, reason))?)
                    }
                    Some(group_scales) => {
                        let group_scales = model.read_bytes(group_scales)?;
                        let zeros = stored_zeros()?.unwrap_or_default();
                        qserve::group_levels(&codes, &scales, &group_scales, &zeros, k, group)
                            .map_err(|reason| about(tensor, reason))?
                    }
                };
                (codes, scales, Some(zeros))
            }
        };
        let mut permutation = None;
        if let Some(index) = self.group_index {
            let words = model.read_words(index).map_err(|problem| problem.at(model.path()))?;
            if !is_sorted(&words, group) {
                let order = sorted_columns(&words, groups, group).map_err(|reason| about(index, reason))?;
                codes = words::matrix(n, k, |row, column| codes[row * k + order[column] as usize]);
                permutation = Some(order);
            }
        }
        let weights = Int4Weights::new(codes, scales, zeros, [n, k], group)
            .map_err(|error| about(self.scales, format!("does not fit the matrix: {error}")))?;
        Ok(Imported { weights, permutation })
    }
}

/// Returns whether column c belongs to group c / group, for all columns.
fn is_sorted(groups: &[u32], group: usize) -> bool {
    groups.iter().enumerate().all(|(column, &of)| of as usize == column / group)
}

/// Returns the columns in the order of their groups. Every group must have its number of columns.
fn sorted_columns(of: &[u32], groups: usize, group: usize) -> Result<Vec<i32>, String> {
    let mut order: Vec<i32> = (0..of.len() as i32).collect();
    order.sort_by_key(|&column| of[column as usize]);
    for (place, &column) in order.iter().enumerate() {
        let found = of[column as usize] as usize;
        if found != place / group || found >= groups {
            return Err(format!("gives the groups other numbers of columns than {group}"));
        }
    }
    Ok(order)
}

fn floats(codes: Vec<u8>) -> Vec<f32> {
    codes.into_iter().map(f32::from).collect()
}

/// Transposes `[rows, columns]`.
pub(crate) fn transposed(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    words::matrix(columns, rows, |column, row| values[row * columns + column])
}

impl Source for ImportedModel {
    fn path(&self) -> &Path {
        self.model.path()
    }

    fn format(&self) -> String {
        format!("{}, {}", self.model.format(), self.format.name())
    }

    fn config(&self) -> &Map<String, Value> {
        self.model.config()
    }

    fn tensors(&self) -> &[SourceTensor] {
        &self.tensors
    }

    fn shards(&self) -> &[String] {
        self.model.shards()
    }

    fn read_rows(&self, tensor: usize, rows: Range<usize>, values: &mut [f32]) -> Result<()> {
        let found = match &self.origins[tensor] {
            Origin::Same(inner) => return self.model.read_rows(*inner, rows, values),
            Origin::Matrix(found) => found,
        };
        let matrix = self.matrix(tensor, found)?;
        for (sorted, values) in matrix.weights.dequantize_channels(rows).zip(values.chunks_exact_mut(found.k))
        {
            match &matrix.permutation {
                Some(order) => {
                    order.iter().zip(&sorted).for_each(|(&to, &value)| values[to as usize] = value)
                }
                None => values.copy_from_slice(&sorted),
            }
        }
        Ok(())
    }

    fn read_kept(&self, tensor: usize, rows: Range<usize>, bytes: &mut [u8]) -> Result<()> {
        if let Origin::Same(inner) = self.origins[tensor] {
            return self.model.read_kept(inner, rows, bytes);
        }
        let mut values = vec![0.0; rows.len() * self.tensors[tensor].columns()];
        self.read_rows(tensor, rows, &mut values)?;
        for (bytes, value) in bytes.chunks_exact_mut(2).zip(values) {
            let rounded = f16::from_f32(value);
            if !rounded.is_finite() {
                let reason = format!("has the value {value}, beyond f16; do not exclude it");
                return Err(Problem::tensor(&self.tensors[tensor].name, reason).at(self.path()));
            }
            bytes.copy_from_slice(&rounded.to_le_bytes());
        }
        Ok(())
    }

    fn import(&self, tensor: usize) -> Result<Option<Arc<Imported>>> {
        match &self.origins[tensor] {
            Origin::Matrix(found) if self.tensors[tensor].imported_group.is_some() => {
                Ok(Some(self.matrix(tensor, found)?))
            }
            _ => Ok(None),
        }
    }

    fn side_files(&self) -> &[SideFile] {
        self.model.side_files()
    }

    fn left_out(&self) -> &[(String, String)] {
        self.model.left_out()
    }

    fn fingerprint(&self) -> String {
        self.model.fingerprint()
    }
}
