//! The container of GGUF files, versions 2 and 3, little-endian: metadata, and where each tensor lies.
//!
//! Everything in the header is checked before memory is reserved for it, and tensors must lie within the file
//! without overlapping. The format is specified in ggml's `docs/gguf.md`.

use std::collections::HashMap;
use std::io::{self, BufReader, Read};

use super::blocks::BlockType;
use crate::error::Problem;
use crate::files::{ReadFile, Sequential};

/// The first four bytes of every GGUF file.
pub(crate) const MAGIC: [u8; 4] = *b"GGUF";
/// The longest header that is read. A vocabulary of 256,000 tokens with its merges has about 20 MB.
const MOST_HEADER_BYTES: u64 = 256 << 20;
/// The most elements of all arrays together.
const MOST_ELEMENTS: u64 = 1 << 24;
/// The most metadata entries, and the most tensors.
const MOST_ENTRIES: u64 = 1 << 20;
/// The most dimensions of a tensor.
const MOST_DIMENSIONS: u32 = 4;
/// The alignment of tensors where the metadata give none.
const DEFAULT_ALIGNMENT: u64 = 32;

/// A value of the metadata.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Value {
    Unsigned(u64),
    Signed(i64),
    F32(f32),
    F64(f64),
    Bool(bool),
    Text(String),
    Array(Vec<Value>),
}

impl Value {
    pub(crate) fn as_u64(&self) -> Option<u64> {
        match *self {
            Value::Unsigned(value) => Some(value),
            Value::Signed(value) => value.try_into().ok(),
            _ => None,
        }
    }

    pub(crate) fn as_text(&self) -> Option<&str> {
        match self {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    pub(crate) fn as_array(&self) -> Option<&[Value]> {
        match self {
            Value::Array(values) => Some(values),
            _ => None,
        }
    }
}

/// A tensor of a GGUF file.
#[derive(Clone, Debug)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    /// Rows before columns, unlike in the file.
    pub(crate) shape: Vec<usize>,
    pub(crate) block: BlockType,
    /// First byte in the file.
    pub(crate) offset: u64,
    /// Bytes.
    pub(crate) bytes: u64,
}

/// The contents of a header.
#[derive(Debug)]
pub(crate) struct Container {
    pub(crate) version: u32,
    pub(crate) metadata: HashMap<String, Value>,
    pub(crate) tensors: Vec<Tensor>,
}

impl Container {
    /// Reads and checks the header.
    pub(crate) fn read(file: &ReadFile) -> Result<Self, Problem> {
        let mut header =
            Header { reader: BufReader::with_capacity(1 << 16, file.reader()), read: 0, elements: 0 };
        let magic: [u8; 4] = header.bytes()?;
        if magic != MAGIC {
            return Err(bad("it does not begin with GGUF"));
        }
        let version = u32::from_le_bytes(header.bytes()?);
        if version.swap_bytes() <= 3 && version > 3 {
            let what = "a big-endian GGUF file".to_owned();
            return Err(Problem::Unsupported { what, remedy: "convert it to little-endian" });
        }
        if !(2..=3).contains(&version) {
            let what = format!("GGUF version {version}");
            return Err(Problem::Unsupported {
                what,
                remedy: "versions 2 and 3 can be read; convert it again",
            });
        }
        let tensors = header.count("tensors", MOST_ENTRIES)?;
        let entries = header.count("metadata entries", MOST_ENTRIES)?;
        let mut metadata = HashMap::new();
        for _ in 0..entries {
            let key = header.text()?;
            let kind = u32::from_le_bytes(header.bytes()?);
            let value = header.value(kind, 0)?;
            if metadata.contains_key(&key) {
                return Err(bad(format!("metadata {key:?} appears twice")));
            }
            metadata.insert(key, value);
        }
        let tensors = (0..tensors).map(|_| header.tensor()).collect::<Result<Vec<_>, _>>()?;
        let alignment = match metadata.get("general.alignment") {
            None => DEFAULT_ALIGNMENT,
            Some(value) => value
                .as_u64()
                .filter(|alignment| alignment.is_power_of_two() && (8..=1 << 20).contains(alignment))
                .ok_or_else(|| {
                    bad(format!("general.alignment is {value:?}; a power of two from 8 on expected"))
                })?,
        };
        let data = header.read.next_multiple_of(alignment);
        let tensors = place(tensors, data, alignment, file.length())?;
        Ok(Self { version, metadata, tensors })
    }
}

/// Turns offsets into positions in the file, and checks that tensors lie within it without overlapping.
fn place(mut tensors: Vec<Tensor>, data: u64, alignment: u64, length: u64) -> Result<Vec<Tensor>, Problem> {
    for tensor in &mut tensors {
        let name = &tensor.name;
        if !tensor.offset.is_multiple_of(alignment) {
            let offset = tensor.offset;
            return Err(bad(format!("tensor {name:?} is at {offset}, which is no multiple of {alignment}")));
        }
        let end = data.checked_add(tensor.offset).and_then(|begin| begin.checked_add(tensor.bytes));
        match end.filter(|&end| end <= length) {
            Some(_) => tensor.offset += data,
            None => {
                let (offset, bytes) = (tensor.offset, tensor.bytes);
                return Err(bad(format!(
                    "tensor {name:?} has {bytes} bytes at {offset}, beyond the end of the file; it is truncated"
                )));
            }
        }
    }
    let mut order: Vec<&Tensor> = tensors.iter().collect();
    order.sort_by_key(|tensor| (tensor.offset, tensor.bytes));
    if let Some(pair) = order.windows(2).find(|pair| pair[0].offset + pair[0].bytes > pair[1].offset) {
        return Err(bad(format!("tensors {:?} and {:?} overlap", pair[0].name, pair[1].name)));
    }
    let mut names: Vec<&str> = tensors.iter().map(|tensor| tensor.name.as_str()).collect();
    names.sort_unstable();
    if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(bad(format!("tensor {:?} appears twice", pair[0])));
    }
    Ok(tensors)
}

/// Reads a header and counts what it has read.
struct Header<'a> {
    reader: BufReader<Sequential<'a>>,
    read: u64,
    elements: u64,
}

impl Header<'_> {
    fn fill(&mut self, buffer: &mut [u8]) -> Result<(), Problem> {
        self.read += buffer.len() as u64;
        if self.read > MOST_HEADER_BYTES {
            return Err(Problem::TooLong { what: "a header", bytes: self.read, limit: MOST_HEADER_BYTES });
        }
        self.reader.read_exact(buffer).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => bad("it ends within the header"),
            _ => bad(format!("cannot read it: {error}")),
        })
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], Problem> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn count(&mut self, what: &str, limit: u64) -> Result<u64, Problem> {
        let count = u64::from_le_bytes(self.bytes()?);
        if count > limit {
            return Err(bad(format!("it claims {count} {what}; at most {limit} are accepted")));
        }
        Ok(count)
    }

    fn text(&mut self) -> Result<String, Problem> {
        let length = u64::from_le_bytes(self.bytes()?);
        if length > MOST_HEADER_BYTES - self.read.min(MOST_HEADER_BYTES) {
            return Err(bad(format!("a text of {length} bytes is longer than any header")));
        }
        // Reserve no more than arrives, because the length may be a lie.
        let mut text = Vec::new();
        let read = (&mut self.reader).take(length).read_to_end(&mut text);
        read.map_err(|error| bad(format!("cannot read it: {error}")))?;
        self.read += text.len() as u64;
        if text.len() as u64 != length {
            return Err(bad("it ends within the header"));
        }
        String::from_utf8(text).map_err(|_| bad("a text is not UTF-8"))
    }

    fn value(&mut self, kind: u32, depth: usize) -> Result<Value, Problem> {
        Ok(match kind {
            0 => Value::Unsigned(u8::from_le_bytes(self.bytes()?).into()),
            1 => Value::Signed(i8::from_le_bytes(self.bytes()?).into()),
            2 => Value::Unsigned(u16::from_le_bytes(self.bytes()?).into()),
            3 => Value::Signed(i16::from_le_bytes(self.bytes()?).into()),
            4 => Value::Unsigned(u32::from_le_bytes(self.bytes()?).into()),
            5 => Value::Signed(i32::from_le_bytes(self.bytes()?).into()),
            6 => Value::F32(f32::from_le_bytes(self.bytes()?)),
            7 => match self.bytes::<1>()? {
                [0] => Value::Bool(false),
                [1] => Value::Bool(true),
                [other] => return Err(bad(format!("a truth value is {other}; 0 or 1 expected"))),
            },
            8 => Value::Text(self.text()?),
            9 if depth < 4 => {
                let kind = u32::from_le_bytes(self.bytes()?);
                let count = u64::from_le_bytes(self.bytes()?);
                self.elements = self.elements.saturating_add(count);
                if self.elements > MOST_ELEMENTS {
                    return Err(bad(format!("arrays with more than {MOST_ELEMENTS} elements")));
                }
                Value::Array((0..count).map(|_| self.value(kind, depth + 1)).collect::<Result<_, _>>()?)
            }
            9 => return Err(bad("arrays are nested too deep")),
            10 => Value::Unsigned(u64::from_le_bytes(self.bytes()?)),
            11 => Value::Signed(i64::from_le_bytes(self.bytes()?)),
            12 => Value::F64(f64::from_le_bytes(self.bytes()?)),
            other => return Err(bad(format!("metadata of the unknown type {other}"))),
        })
    }

    /// Reads a tensor's entry. Its offset still counts from the start of the data.
    fn tensor(&mut self) -> Result<Tensor, Problem> {
        let name = self.text()?;
        let dimensions = u32::from_le_bytes(self.bytes()?);
        if !(1..=MOST_DIMENSIONS).contains(&dimensions) {
            return Err(bad(format!(
                "tensor {name:?} has {dimensions} dimensions; 1 to {MOST_DIMENSIONS} expected"
            )));
        }
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            let side = u64::from_le_bytes(self.bytes()?);
            shape.push(
                usize::try_from(side).map_err(|_| bad(format!("tensor {name:?} has a side of {side}")))?,
            );
        }
        // The file has columns first.
        shape.reverse();
        let kind = u32::from_le_bytes(self.bytes()?);
        let offset = u64::from_le_bytes(self.bytes()?);
        let block = BlockType::from_id(kind).ok_or_else(|| Problem::Unsupported {
            what: format!("tensor {name:?} has GGML type {kind}"),
            remedy: "F32, F16, BF16, Q8_0, Q5_0, Q5_1, Q4_0, Q4_1, Q4_K, Q5_K and Q6_K can be read",
        })?;
        let elements = shape.iter().try_fold(1u64, |product, &side| product.checked_mul(side as u64));
        let elements = elements.filter(|&elements| elements > 0 && elements <= i64::MAX as u64 / 4);
        let elements =
            elements.ok_or_else(|| bad(format!("tensor {name:?} has the impossible shape {shape:?}")))?;
        let columns = shape[shape.len() - 1];
        if !columns.is_multiple_of(block.elements()) {
            let (block, elements) = (block.name(), block.elements());
            return Err(bad(format!(
                "tensor {name:?} has {columns} columns, no multiple of {block}'s {elements}"
            )));
        }
        let bytes = elements / block.elements() as u64 * block.bytes() as u64;
        Ok(Tensor { name, shape, block, offset, bytes })
    }
}

fn bad(reason: impl Into<String>) -> Problem {
    Problem::Gguf { reason: reason.into() }
}
