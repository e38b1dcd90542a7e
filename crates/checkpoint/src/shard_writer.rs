//! Writes one shard: ordinary safetensors whose tensors arrive piece by piece, in any order of tensors.
//!
//! The header comes first in the file but holds checksums of what follows. Its length is known, because all checksums
//! have the same length, so it is written twice: with zeros in their place, and at the end with the checksums.

use std::collections::{BTreeMap, HashMap};
use std::io::{Seek, SeekFrom};
use std::path::Path;

use liquidgemm::NewFile;
use safetensors::tensor::{Dtype, TensorInfo};
use serde_json::{Map, Value, json};
use xxhash_rust::xxh3::Xxh3;

use crate::error::{CheckpointError, Problem, Result, io_error};
use crate::format::{METHOD, Matrix, MatrixMetadata, Part, ShardMetadata, VERSION, digits};

/// Tensors begin at a multiple of this many bytes.
const ALIGNMENT: usize = 8;
/// Temporary files of unfinished shards begin with this.
pub(crate) const TEMPORARY_PREFIX: &str = ".liquidgemm-shard-";

/// A tensor of a shard that will be written.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct OutputTensor {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
}

impl OutputTensor {
    pub(crate) fn bytes(&self) -> u64 {
        // The other dimensions of an empty tensor may be too large to be multiplied.
        if self.shape.contains(&0) {
            return 0;
        }
        self.shape.iter().map(|&side| side as u64).product::<u64>() * self.dtype.bitsize() as u64 / 8
    }
}

/// A shard that is being written under a temporary name.
pub(crate) struct ShardWriter {
    file: NewFile,
    matrices: BTreeMap<String, Matrix>,
    tensors: HashMap<String, Written>,
    /// In the order of the file.
    order: Vec<OutputTensor>,
    header_bytes: usize,
}

/// The state of one tensor.
struct Written {
    /// First byte in the file.
    begin: u64,
    bytes: u64,
    /// Bytes that have arrived.
    done: u64,
    hash: Xxh3,
}

impl ShardWriter {
    /// Starts the shard that will be at `path`. The matrices' tensors are among `tensors`.
    pub(crate) fn create(
        path: &Path,
        mut tensors: Vec<OutputTensor>,
        matrices: BTreeMap<String, Matrix>,
    ) -> Result<Self> {
        // The order of the safetensors crate: wide types first, so that all are aligned.
        tensors.sort_by(|a, b| b.dtype.bitsize().cmp(&a.dtype.bitsize()).then_with(|| a.name.cmp(&b.name)));
        let file = NewFile::create_with_prefix(path, TEMPORARY_PREFIX).map_err(CheckpointError::File)?;
        let mut writer = Self { file, matrices, tensors: HashMap::new(), order: tensors, header_bytes: 0 };
        let header = writer.header(|_| "0".repeat(16), |_| "0".repeat(16));
        writer.header_bytes = header.len();
        let mut begin = header.len() as u64;
        for tensor in &writer.order {
            let bytes = tensor.bytes();
            let state = Written { begin, bytes, done: 0, hash: Xxh3::new() };
            writer.tensors.insert(tensor.name.clone(), state);
            begin += bytes;
        }
        writer.put(0, &header)?;
        writer.file.file().set_len(begin).map_err(io_error(path, "reserve space in the new file"))?;
        Ok(writer)
    }

    /// Appends bytes to a tensor.
    ///
    /// # Panics
    /// If the shard has no such tensor, or it would become longer than its shape.
    pub(crate) fn append(&mut self, tensor: &str, bytes: &[u8]) -> Result<()> {
        let state = self.tensors.get_mut(tensor).expect("a tensor of this shard");
        let at = state.begin + state.done;
        state.done += bytes.len() as u64;
        assert!(state.done <= state.bytes, "{tensor} has more than {} bytes", state.bytes);
        state.hash.update(bytes);
        self.put(at, bytes)
    }

    /// Writes the final header, flushes the file and gives it its name.
    pub(crate) fn finish(mut self) -> Result<()> {
        for (name, state) in &self.tensors {
            assert_eq!(state.done, state.bytes, "bytes of {name}");
        }
        let tensor = |name: &str| digits(&self.tensors[name].hash);
        let matrix = |module: &str| {
            let parts = Part::ALL.map(|part| part.name(module));
            let parts = parts.iter().filter(|name| self.tensors.contains_key(*name)).map(|name| tensor(name));
            self.matrices[module].checksum(VERSION, parts)
        };
        let header = self.header(tensor, matrix);
        assert_eq!(header.len(), self.header_bytes, "the header's length");
        self.put(0, &header)?;
        self.file.finish().map_err(CheckpointError::File)
    }

    fn put(&mut self, at: u64, bytes: &[u8]) -> Result<()> {
        self.file.file().seek(SeekFrom::Start(at)).map_err(io_error(self.file.unfinished_path(), "seek"))?;
        self.file.write(bytes).map_err(CheckpointError::File)
    }

    /// Returns the header with its length in front. Keys are sorted, so equal contents give equal bytes.
    fn header(
        &self,
        tensor_checksum: impl Fn(&str) -> String,
        matrix_checksum: impl Fn(&str) -> String,
    ) -> Vec<u8> {
        let of_matrix = |name: &str| {
            let mut owners = Part::ALL.iter().filter_map(|part| name.strip_suffix(part.suffix()));
            owners.any(|module| self.matrices.contains_key(module))
        };
        let matrices = self.matrices.iter().map(|(module, matrix)| {
            let Matrix { n, k, group } = *matrix;
            let checksum = matrix_checksum(module);
            (module.clone(), MatrixMetadata { n, k, group: group.to_string(), checksum })
        });
        let kept = self.order.iter().filter(|tensor| !of_matrix(&tensor.name));
        let metadata = ShardMetadata {
            version: VERSION,
            matrices: matrices.collect(),
            tensors: kept.map(|tensor| (tensor.name.clone(), tensor_checksum(&tensor.name))).collect(),
        };
        let metadata = serde_json::to_string(&metadata).expect("texts and numbers can be written");
        let mut header = Map::new();
        // Readers of transformers refuse files without this entry.
        header.insert("__metadata__".into(), json!({"format": "pt", METHOD: metadata}));
        let mut begin = 0;
        for tensor in &self.order {
            let end = begin + tensor.bytes() as usize;
            let info =
                TensorInfo { dtype: tensor.dtype, shape: tensor.shape.clone(), data_offsets: (begin, end) };
            let info = serde_json::to_value(&info).expect("texts and numbers can be written");
            header.insert(tensor.name.clone(), info);
            begin = end;
        }
        let mut text = serde_json::to_vec(&Value::Object(header)).expect("texts and numbers can be written");
        text.resize(text.len().next_multiple_of(ALIGNMENT), b' ');
        let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
        bytes.extend(text);
        bytes
    }
}

/// Checks that no two tensors of a model have the same name.
pub(crate) fn check_names<'a>(
    names: impl IntoIterator<Item = (&'a str, &'a str)>,
    source: &Path,
) -> Result<()> {
    let mut known: HashMap<&str, &str> = HashMap::new();
    for (name, shard) in names {
        if let Some(other) = known.insert(name, shard) {
            return Err(Problem::Twice { name: name.to_owned(), other: other.to_owned() }.at(source));
        }
        if name == "__metadata__" {
            return Err(Problem::tensor(name, "has a name that safetensors reserve").at(source));
        }
    }
    Ok(())
}
