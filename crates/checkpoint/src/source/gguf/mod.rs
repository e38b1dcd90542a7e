//! GGUF files of llama.cpp, as the Hugging Face folder that they were converted from.

mod blocks;
mod config;
mod container;
mod names;
mod tokenizer;

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use half::{bf16, f16};
use safetensors::tensor::Dtype;
use serde_json::{Map, Value as Json};

pub(crate) use container::MAGIC;

use self::blocks::{BlockType, dequantize};
use self::config::{Heads, Reader};
use self::container::{Container, Tensor};
use self::names::{Family, Target, permuted_row, target};
use super::folder::SINGLE_FILE;
use super::side_files::{SideContents, SideFile};
use super::{Source, SourceTensor};
use crate::error::{Problem, Result};
use crate::files::ReadFile;

/// Bytes of the source that one shard of the output comes from.
const SHARD_BYTES: u64 = 8 << 30;

/// The most experts of a layer.
const MOST_EXPERTS: usize = 4096;

/// The type of kept tensors that GGML stores in blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DequantizedType {
    /// IEEE half precision, with 11 bits of significand.
    #[default]
    F16,
    /// bfloat16, with 8 bits of significand.
    Bf16,
    /// IEEE single precision, exact.
    F32,
}

impl DequantizedType {
    fn dtype(self) -> Dtype {
        match self {
            DequantizedType::F16 => Dtype::F16,
            DequantizedType::Bf16 => Dtype::BF16,
            DequantizedType::F32 => Dtype::F32,
        }
    }

    fn torch_name(self) -> &'static str {
        match self {
            DequantizedType::F16 => "float16",
            DequantizedType::Bf16 => "bfloat16",
            DequantizedType::F32 => "float32",
        }
    }
}

impl FromStr for DequantizedType {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "f16" => Ok(DequantizedType::F16),
            "bf16" => Ok(DequantizedType::Bf16),
            "f32" => Ok(DequantizedType::F32),
            other => Err(format!("{other:?} is no type for kept tensors; write f16, bf16 or f32")),
        }
    }
}

/// A GGUF file.
pub(super) struct GgufModel {
    file: ReadFile,
    version: u32,
    config: Map<String, Json>,
    shards: Vec<String>,
    tensors: Vec<SourceTensor>,
    /// Parallel to `tensors`.
    places: Vec<Place>,
    side_files: Vec<SideFile>,
    left_out: Vec<(String, String)>,
}

/// Where a tensor lies in the file.
#[derive(Clone, Copy)]
struct Place {
    block: BlockType,
    offset: u64,
    row_bytes: u64,
    /// Elements of a head whose rows, or whose elements if there is one row, are permuted.
    permuted_head: Option<usize>,
}

impl GgufModel {
    pub(super) fn open(file: ReadFile, dequantized: DequantizedType) -> Result<Self> {
        let path = file.path().to_owned();
        let at = |problem: Problem| problem.at(&path);
        let container = Container::read(&file).map_err(at)?;
        if container
            .metadata
            .get("split.count")
            .and_then(|count| count.as_u64())
            .is_some_and(|count| count > 1)
        {
            let what = "one part of a GGUF model in several files".to_owned();
            return Err(at(Problem::Unsupported {
                what,
                remedy: "join the parts with llama.cpp's `llama-gguf-split --merge`",
            }));
        }
        let family = Family::of(&container).map_err(at)?;
        let reader = Reader { container: &container, family };
        let heads = reader.heads().map_err(at)?;

        let mut listing = Listing { tensors: Vec::new(), places: Vec::new(), dequantized, heads, family };
        let mut rope_factor = None;
        let mut left_out = Vec::new();
        for tensor in &container.tensors {
            let unknown = || Problem::Gguf {
                reason: format!(
                    "tensor {:?} is not known in the architecture {}",
                    tensor.name,
                    family.prefix()
                ),
            };
            let target = target(family, &tensor.name).ok_or_else(unknown).map_err(at)?;
            if target == Target::InConfig {
                rope_factor = Some(largest(&file, tensor)?);
                left_out
                    .push((tensor.name.clone(), "its factors are `rope_scaling` in config.json".to_owned()));
            } else {
                listing.add(tensor, target).map_err(at)?;
            }
        }
        let config = reader.config(rope_factor, dequantized.torch_name()).map_err(at)?;
        let mut side_files = vec![json_file("generation_config.json", &generation_config(&config))];
        match tokenizer::derive(&reader) {
            Ok(files) => side_files.extend(files.into_iter().map(|(name, value)| json_file(name, &value))),
            Err(reason) => left_out.push(("tokenizer".to_owned(), reason)),
        }
        let Listing { mut tensors, places, .. } = listing;
        let shards = assign_shards(&mut tensors);
        let version = container.version;
        Ok(Self { file, version, config, shards, tensors, places, side_files, left_out })
    }

    /// Reads rows of llama.cpp's order, as stored.
    fn read_stored(&self, place: &Place, first: usize, bytes: &mut [u8]) -> Result<()> {
        self.file.read_at(place.offset + first as u64 * place.row_bytes, bytes)
    }

    /// Reads rows in the order of Hugging Face, as stored.
    fn read_ordered(&self, tensor: usize, rows: Range<usize>, bytes: &mut [u8]) -> Result<()> {
        let place = &self.places[tensor];
        let row_bytes = place.row_bytes as usize;
        match place.permuted_head {
            Some(head) if self.tensors[tensor].shape.len() > 1 => {
                // The rows of a head are permuted among themselves, so whole heads are read.
                let first = rows.start / head * head;
                let end = rows.end.next_multiple_of(head);
                let mut stored = vec![0; (end - first) * row_bytes];
                self.read_stored(place, first, &mut stored)?;
                for (row, bytes) in rows.zip(bytes.chunks_exact_mut(row_bytes)) {
                    let from = permuted_row(row, head) - first;
                    bytes.copy_from_slice(&stored[from * row_bytes..][..row_bytes]);
                }
                Ok(())
            }
            Some(head) => {
                // A bias: its elements are permuted, and their blocks have one element.
                let mut stored = vec![0; row_bytes];
                self.read_stored(place, rows.start, &mut stored)?;
                let width = place.block.bytes();
                for (element, bytes) in bytes.chunks_exact_mut(width).enumerate() {
                    bytes.copy_from_slice(&stored[permuted_row(element, head) * width..][..width]);
                }
                Ok(())
            }
            None => self.read_stored(place, rows.start, bytes),
        }
    }
}

/// The tensors found so far.
struct Listing {
    tensors: Vec<SourceTensor>,
    places: Vec<Place>,
    dequantized: DequantizedType,
    heads: Heads,
    family: Family,
}

impl Listing {
    fn add(&mut self, tensor: &Tensor, target: Target) -> Result<(), Problem> {
        let shape = tensor.shape.clone();
        let permuted = |heads: usize| -> Result<Option<usize>, Problem> {
            if !self.family.permutes() {
                return Ok(None);
            }
            let (rows, size) = (shape[0], self.heads.size);
            if shape.len() > 2
                || Some(rows) != heads.checked_mul(size)
                || (shape.len() == 1 && tensor.block.elements() != 1)
            {
                let reason = format!("has the shape {shape:?}, not that of {heads} heads of {size}");
                return Err(Problem::tensor(&tensor.name, reason));
            }
            Ok(Some(size))
        };
        match target {
            Target::Same(name) => self.push(tensor, name, shape, 0, None),
            Target::Row(name) => self.push(tensor, name, [&[1], &shape[..]].concat(), 0, None),
            Target::Query(name) => {
                let head = permuted(self.heads.queries)?;
                self.push(tensor, name, shape, 0, head);
            }
            Target::Key(name) => {
                let head = permuted(self.heads.keys)?;
                self.push(tensor, name, shape, 0, head);
            }
            Target::Experts(prefix, suffix) => {
                let [experts, rows, columns] = shape[..] else {
                    let reason = format!("has the shape {shape:?}; experts, rows and columns expected");
                    return Err(Problem::tensor(&tensor.name, reason));
                };
                if experts > MOST_EXPERTS {
                    let reason = format!("has {experts} experts; at most {MOST_EXPERTS} are accepted");
                    return Err(Problem::tensor(&tensor.name, reason));
                }
                for expert in 0..experts {
                    self.push(
                        tensor,
                        format!("{prefix}{expert}{suffix}"),
                        vec![rows, columns],
                        expert * rows,
                        None,
                    );
                }
            }
            Target::InConfig => {}
        }
        Ok(())
    }

    fn push(
        &mut self,
        tensor: &Tensor,
        name: String,
        shape: Vec<usize>,
        first_row: usize,
        permuted_head: Option<usize>,
    ) {
        let columns = shape.last().copied().unwrap_or(1);
        let row_bytes = (columns / tensor.block.elements() * tensor.block.bytes()) as u64;
        let rows: usize = shape.iter().rev().skip(1).product();
        self.places.push(Place {
            block: tensor.block,
            offset: tensor.offset + first_row as u64 * row_bytes,
            row_bytes,
            permuted_head,
        });
        self.tensors.push(SourceTensor {
            name,
            shape,
            stored: tensor.block.name().to_owned(),
            stored_bytes: rows as u64 * row_bytes,
            kept: kept_type(tensor.block).unwrap_or(self.dequantized.dtype()),
            shard: 0,
            is_readable: true,
            scales_of: None,
            is_imported: false,
            imported_group: None,
            permuted: false,
        });
    }
}

/// Returns the type of safetensors that stores these elements unchanged.
fn kept_type(block: BlockType) -> Option<Dtype> {
    match block {
        BlockType::F32 => Some(Dtype::F32),
        BlockType::F16 => Some(Dtype::F16),
        BlockType::BF16 => Some(Dtype::BF16),
        _ => None,
    }
}

/// Cuts the tensors into shards of about [`SHARD_BYTES`], and returns the shards' names.
fn assign_shards(tensors: &mut [SourceTensor]) -> Vec<String> {
    let (mut shard, mut bytes) = (0, 0);
    for tensor in tensors {
        if bytes > 0 && bytes + tensor.stored_bytes > SHARD_BYTES {
            shard += 1;
            bytes = 0;
        }
        bytes += tensor.stored_bytes;
        tensor.shard = shard;
    }
    let count = shard + 1;
    if count == 1 {
        return vec![SINGLE_FILE.to_owned()];
    }
    (1..=count).map(|number| format!("model-{number:05}-of-{count:05}.safetensors")).collect()
}

/// Returns the largest value of a small tensor.
fn largest(file: &ReadFile, tensor: &Tensor) -> Result<f32> {
    const MOST_VALUES: u64 = 1 << 16;
    let values: u64 = tensor.shape.iter().map(|&side| side as u64).product();
    if values > MOST_VALUES {
        let reason = format!("has {values} values; at most {MOST_VALUES} are expected");
        return Err(Problem::tensor(&tensor.name, reason).at(file.path()));
    }
    let mut bytes = vec![0; tensor.bytes as usize];
    file.read_at(tensor.offset, &mut bytes)?;
    let mut factors = vec![0.0; values as usize];
    dequantize(tensor.block, &bytes, &mut factors);
    let largest = factors.iter().copied().fold(f32::MIN, f32::max);
    if factors.iter().all(|factor| factor.is_finite()) && largest >= 1.0 {
        return Ok(largest);
    }
    Err(Problem::tensor(&tensor.name, "has values that are no factors").at(file.path()))
}

fn generation_config(config: &Map<String, Json>) -> Json {
    let keys = ["bos_token_id", "eos_token_id", "pad_token_id"];
    let entries = keys.iter().filter_map(|&key| Some((key.to_owned(), config.get(key)?.clone())));
    Json::Object(entries.collect())
}

fn json_file(name: &str, value: &Json) -> SideFile {
    let bytes = serde_json::to_vec(value).expect("JSON values can be written");
    SideFile { name: PathBuf::from(name), contents: SideContents::Bytes(bytes) }
}

impl Source for GgufModel {
    fn path(&self) -> &Path {
        self.file.path()
    }

    fn format(&self) -> String {
        let model = self.config["model_type"].as_str().unwrap_or_default();
        format!("GGUF version {}, {model}", self.version)
    }

    fn config(&self) -> &Map<String, Json> {
        &self.config
    }

    fn tensors(&self) -> &[SourceTensor] {
        &self.tensors
    }

    fn shards(&self) -> &[String] {
        &self.shards
    }

    fn read_rows(&self, tensor: usize, rows: Range<usize>, values: &mut [f32]) -> Result<()> {
        let place = self.places[tensor];
        assert_eq!(values.len(), rows.len() * self.tensors[tensor].columns(), "values of {rows:?}");
        let mut bytes = vec![0; rows.len() * place.row_bytes as usize];
        self.read_ordered(tensor, rows, &mut bytes)?;
        dequantize(place.block, &bytes, values);
        Ok(())
    }

    fn read_kept(&self, tensor: usize, rows: Range<usize>, bytes: &mut [u8]) -> Result<()> {
        let info = &self.tensors[tensor];
        assert_eq!(bytes.len(), rows.len() * info.kept_row_bytes(), "bytes of {rows:?}");
        if kept_type(self.places[tensor].block).is_some() {
            return self.read_ordered(tensor, rows, bytes);
        }
        let mut values = vec![0.0; rows.len() * info.columns()];
        self.read_rows(tensor, rows, &mut values)?;
        match info.kept {
            Dtype::F16 => {
                for (bytes, &value) in bytes.chunks_exact_mut(2).zip(&values) {
                    let rounded = f16::from_f32(value);
                    if value.is_finite() && !rounded.is_finite() {
                        let reason =
                            format!("has the value {value}, beyond f16; keep tensors as bf16 or f32");
                        return Err(Problem::tensor(&info.name, reason).at(self.path()));
                    }
                    bytes.copy_from_slice(&rounded.to_le_bytes());
                }
            }
            Dtype::BF16 => {
                for (bytes, &value) in bytes.chunks_exact_mut(2).zip(&values) {
                    bytes.copy_from_slice(&bf16::from_f32(value).to_le_bytes());
                }
            }
            _ => {
                for (bytes, &value) in bytes.chunks_exact_mut(4).zip(&values) {
                    bytes.copy_from_slice(&value.to_le_bytes());
                }
            }
        }
        Ok(())
    }

    fn side_files(&self) -> &[SideFile] {
        &self.side_files
    }

    fn left_out(&self) -> &[(String, String)] {
        &self.left_out
    }

    fn fingerprint(&self) -> String {
        self.file.fingerprint()
    }
}
