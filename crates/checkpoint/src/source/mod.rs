//! Models to quantize, whatever file they come from: their tensors under Hugging Face names, read row by row.

mod folder;
mod gguf;
mod rotated;
mod side_files;

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use liquidgemm::Group;
use safetensors::tensor::Dtype;
use serde_json::{Map, Value};

pub(crate) use folder::{INDEX, SafetensorsModel, shard_names};
pub use gguf::DequantizedType;
pub use rotated::Rotated;
pub use side_files::{SideContents, SideFile};

use crate::error::Result;
use crate::files::ReadFile;
use crate::import::Imported;

/// A model whose tensors can be read in pieces.
///
/// A tensor `[…, columns]` counts as a matrix `[rows, columns]`, with `rows` the product of the other dimensions.
pub trait Source: Send + Sync {
    /// Returns the path that was opened.
    fn path(&self) -> &Path;

    /// Returns the format in words, such as `GGUF version 3, llama`.
    fn format(&self) -> String;

    /// Returns the configuration: `config.json`, or what stands for it. Empty if there is none.
    fn config(&self) -> &Map<String, Value>;

    /// Returns all tensors in the order in which they are best read.
    fn tensors(&self) -> &[SourceTensor];

    /// Returns the names of the output's shards. [`SourceTensor::shard`] is an index into them.
    fn shards(&self) -> &[String];

    /// Reads rows of a tensor as f32.
    ///
    /// # Errors
    /// If the file can't be read.
    ///
    /// # Panics
    /// If the tensor is not [readable](SourceTensor::is_readable), rows are out of range,
    /// or `values` has another length than the rows.
    fn read_rows(&self, tensor: usize, rows: Range<usize>, values: &mut [f32]) -> Result<()>;

    /// Reads rows of a tensor as they are kept, in [`SourceTensor::kept`].
    ///
    /// # Errors
    /// If the file can't be read, or a value does not fit the type.
    ///
    /// # Panics
    /// If rows are out of range, or `bytes` has another length than the rows.
    fn read_kept(&self, tensor: usize, rows: Range<usize>, bytes: &mut [u8]) -> Result<()>;

    /// Returns the codes of a tensor that another quantizer has quantized, or `None` for any other tensor.
    ///
    /// # Errors
    /// If the file can't be read, or its codes contradict its description.
    fn import(&self, _tensor: usize) -> Result<Option<Arc<Imported>>> {
        Ok(None)
    }

    /// Returns the channels of a block in which the model's residual stream is rotated, or `None` if it is not.
    fn rotation(&self) -> Option<usize> {
        None
    }

    /// Returns the weight of the norm before a tensor, if rotation has taken that into the tensor: its inputs are the model's original ones,
    /// divided by this weight and rotated.
    ///
    /// # Errors
    /// If the file can't be read.
    fn norm_before(&self, _tensor: usize) -> Result<Option<Vec<f32>>> {
        Ok(None)
    }

    /// Returns the files beside the weights.
    fn side_files(&self) -> &[SideFile];

    /// Returns the files that are left out of the output, each with the reason.
    fn left_out(&self) -> &[(String, String)];

    /// Returns a text that changes when the model's files change.
    fn fingerprint(&self) -> String;
}

/// A tensor of a [`Source`].
#[derive(Clone, Debug)]
pub struct SourceTensor {
    /// The name in a Hugging Face checkpoint.
    pub name: String,
    /// The shape, rows before columns.
    pub shape: Vec<usize>,
    /// The type in the file, such as `BF16` or `Q4_1`.
    pub stored: String,
    /// Bytes in the file.
    pub stored_bytes: u64,
    /// The type of the output if the tensor is kept.
    pub kept: Dtype,
    /// Index of the output's shard.
    pub shard: usize,
    /// Whether [`Source::read_rows`] can read it.
    pub is_readable: bool,
    /// The tensor that this one holds the scales of. It is dropped if that tensor is quantized.
    pub scales_of: Option<usize>,
    /// Whether another quantizer has quantized the tensor to four bits.
    pub is_imported: bool,
    /// The group of weights that another quantizer has quantized to four bits, if the packed format can have it.
    pub imported_group: Option<Group>,
    /// Whether the columns are in another order than the activations, so that the output stores a permutation.
    pub permuted: bool,
}

impl SourceTensor {
    /// Returns the last dimension, 1 for a scalar, or 0 if any dimension is 0.
    pub fn columns(&self) -> usize {
        if self.shape.contains(&0) { 0 } else { self.shape.last().copied().unwrap_or(1) }
    }

    /// Returns the product of all dimensions but the last, or 0 if any dimension is 0.
    pub fn rows(&self) -> usize {
        // The other dimensions of an empty tensor may be too large to be multiplied.
        if self.shape.contains(&0) { 0 } else { self.shape.iter().rev().skip(1).product() }
    }

    /// Returns the bytes of one row in the type that it is kept in.
    pub fn kept_row_bytes(&self) -> usize {
        self.columns() * self.kept.bitsize() / 8
    }
}

/// How to open a model.
#[derive(Clone, Copy, Debug, Default)]
pub struct OpenOptions {
    /// The type that kept tensors get if the output has no type for their blocks, as those of GGUF.
    pub dequantized: DequantizedType,
}

/// Opens a Hugging Face folder, a `.safetensors` file, a GGUF file, or a folder whose model is one GGUF file.
///
/// # Errors
/// [`CheckpointError`](crate::CheckpointError) with the first problem found. All headers are read and checked.
pub fn open(path: impl AsRef<Path>, options: OpenOptions) -> Result<Box<dyn Source>> {
    let mut path = path.as_ref().to_owned();
    if path.is_dir() {
        match folder::only_gguf(&path)? {
            Some(file) => path = file,
            None => return folder::open(&path),
        }
    }
    let file = ReadFile::open(&path)?;
    let mut magic = [0; 4];
    if file.length() >= 4 {
        file.read_at(0, &mut magic)?;
    }
    if magic == gguf::MAGIC {
        return Ok(Box::new(gguf::GgufModel::open(file, options.dequantized)?));
    }
    folder::open_file(&path)
}

impl fmt::Debug for dyn Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Source").field("path", &PathBuf::from(self.path())).finish_non_exhaustive()
    }
}
