//! One safetensors file: its header, checked, and positioned reads of its tensors.

use std::collections::HashMap;
use std::path::Path;

use safetensors::tensor::{Dtype, Metadata};

use crate::error::{Problem, Result};
use crate::files::ReadFile;

/// The longest header that is read. It is the limit of the safetensors crate.
const MOST_HEADER_BYTES: u64 = 100_000_000;
/// Bytes of the header's length, the first field of the file.
const LENGTH_BYTES: u64 = 8;

/// A safetensors file whose header is valid and describes exactly the bytes that the file has.
#[derive(Debug)]
pub(crate) struct TensorFile {
    file: ReadFile,
    /// Where the data begin.
    data: u64,
    /// In the order of the data.
    tensors: Vec<FileTensor>,
    metadata: HashMap<String, String>,
}

/// A tensor of a file.
#[derive(Clone, Debug)]
pub(crate) struct FileTensor {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    /// First byte, counted from the start of the data.
    begin: u64,
    /// Bytes.
    pub(crate) bytes: u64,
}

impl TensorFile {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let file = ReadFile::open(path)?;
        let problem = |problem: Problem| problem.at(path);
        if file.length() < LENGTH_BYTES {
            return Err(problem(Problem::Length { expected: LENGTH_BYTES, found: file.length() }));
        }
        let mut length = [0; LENGTH_BYTES as usize];
        file.read_at(0, &mut length)?;
        let length = u64::from_le_bytes(length);
        if length > MOST_HEADER_BYTES {
            let limit = MOST_HEADER_BYTES;
            return Err(problem(Problem::TooLong { what: "a header", bytes: length, limit }));
        }
        let data = LENGTH_BYTES + length;
        if data > file.length() {
            return Err(problem(Problem::Length { expected: data, found: file.length() }));
        }
        let mut header = vec![0; length as usize];
        file.read_at(LENGTH_BYTES, &mut header)?;
        let (tensors, metadata, data_bytes) = parse_header(&header).map_err(problem)?;
        let expected = data.saturating_add(data_bytes);
        if expected != file.length() {
            return Err(problem(Problem::Length { expected, found: file.length() }));
        }
        Ok(Self { file, data, tensors, metadata })
    }

    pub(crate) fn path(&self) -> &Path {
        self.file.path()
    }

    pub(crate) fn tensors(&self) -> &[FileTensor] {
        &self.tensors
    }

    pub(crate) fn metadata(&self) -> &HashMap<String, String> {
        &self.metadata
    }

    pub(crate) fn fingerprint(&self) -> String {
        self.file.fingerprint()
    }

    /// Fills `buffer` with the bytes of `tensor` from `offset` on.
    ///
    /// # Panics
    /// If the range is not within the tensor.
    pub(crate) fn read(&self, tensor: &FileTensor, offset: u64, buffer: &mut [u8]) -> Result<()> {
        assert!(offset + buffer.len() as u64 <= tensor.bytes, "a read beyond {}", tensor.name);
        self.file.read_at(self.data + tensor.begin + offset, buffer)
    }
}

impl TensorFile {
    /// Reads a whole tensor. Fails if there is no memory for it.
    pub(crate) fn read_all(&self, tensor: &FileTensor) -> Result<Vec<u8>> {
        self.file.read_vec(self.data + tensor.begin, tensor.bytes)
    }
}

type Parsed = (Vec<FileTensor>, HashMap<String, String>, u64);

/// Parses a header. The safetensors crate checks that tensors neither overlap nor leave gaps,
/// that each has the bytes of its shape and type, and that no size overflows.
pub(crate) fn parse_header(header: &[u8]) -> Result<Parsed, Problem> {
    let parsed: Metadata =
        serde_json::from_slice(header).map_err(|error| Problem::Header { reason: error.to_string() })?;
    let tensors = parsed.offset_keys().into_iter().filter_map(|name| {
        let info = parsed.info(&name)?;
        let (begin, end) = info.data_offsets;
        let (begin, bytes) = (begin as u64, (end - begin) as u64);
        Some(FileTensor { dtype: info.dtype, shape: info.shape.clone(), begin, bytes, name })
    });
    let metadata = parsed.metadata().clone().unwrap_or_default();
    Ok((tensors.collect(), metadata, parsed.data_len() as u64))
}
