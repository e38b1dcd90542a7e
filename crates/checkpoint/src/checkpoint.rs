//! Packed checkpoints: opening one, reading its modules, and cutting them for tensor parallelism.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};

use liquidgemm::{Group, Linear, PackedWeights};
use liquidgemm_format::brick::{BRICK_CHANNELS, BRICK_K, CODE_BYTES, PAIR_BYTES};
use safetensors::tensor::Dtype;
use serde_json::{Map, Value};
use xxhash_rust::xxh3::Xxh3;

use crate::error::{CheckpointError, Problem, Result, weights_error};
use crate::files::{Folder, read_json};
use crate::format::{
    CONFIG_KEY, FOLDED_FILE, METHOD, Matrix, MatrixMetadata, Part, ROTATION_KEY, SMOOTHING_KEY,
    ShardMetadata, VERSION, digits,
};
use crate::number::{decode, is_weight_type};
use crate::smooth::FoldedVector;
use crate::source::shard_names;
use crate::tensor_file::{FileTensor, TensorFile};

/// A packed checkpoint: a folder, or one of its shards.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    config: Map<String, Value>,
    files: Vec<TensorFile>,
    modules: BTreeMap<String, Packed>,
    tensors: BTreeMap<String, Kept>,
    folded: Folded,
}

/// A packed module.
#[derive(Debug)]
struct Packed {
    file: usize,
    matrix: Matrix,
    /// In the order of [`Part::ALL`].
    parts: [Option<FileTensor>; 5],
    checksum: Option<String>,
}

/// Any other tensor.
#[derive(Debug)]
struct Kept {
    file: usize,
    tensor: FileTensor,
    checksum: Option<String>,
}

/// Smoothing vectors that are folded into other tensors.
#[derive(Debug, Default)]
struct Folded {
    /// From the module whose columns are multiplied by a vector to the vector's name.
    columns: BTreeMap<String, String>,
    /// From the module or norm that is divided by a vector to the vector's name.
    divided: BTreeMap<String, String>,
    /// `None` if there is no such file.
    file: Option<TensorFile>,
}

/// What a folder's configuration says of its modules. Files of other programs have no description of their own.
struct Listed {
    modules: BTreeSet<String>,
    group: Group,
}

/// A packed module of a [`Checkpoint`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Module<'a> {
    /// The name, such as `model.layers.0.mlp.up_proj`.
    pub name: &'a str,
    /// Output channels.
    pub n: usize,
    /// Elements of a channel.
    pub k: usize,
    /// The group.
    pub group: Group,
    /// Bytes of all its tensors.
    pub bytes: u64,
    /// Whether activations are divided by a smoothing vector.
    pub has_smoothing: bool,
    /// Whether activations are permuted.
    pub has_permutation: bool,
}

/// A tensor of a [`Checkpoint`] that is not packed.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// The type.
    pub dtype: Dtype,
    /// The shape.
    pub shape: Vec<usize>,
    /// The bytes, little-endian, row-major.
    pub bytes: Vec<u8>,
}

/// What is cut for tensor parallelism.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Axis {
    /// Output channels: column parallelism. Each rank computes some of the outputs.
    N,
    /// Elements along K: row parallelism. The ranks' int32 products add up to the whole product.
    K,
}

/// Returns whether a folder's configuration says that it is a packed checkpoint.
pub(crate) fn is_packed_folder(path: &Path) -> bool {
    read_json(&path.join("config.json")).is_ok_and(|config| own_config(&config).is_some())
}

/// Returns whether a folder is a packed checkpoint with packed modules. Without any it is a model in floating point.
pub(crate) fn has_packed_modules(path: &Path) -> bool {
    let has_modules = |own: &Map<String, Value>| {
        own.get("quantized_modules").and_then(Value::as_array).is_none_or(|list| !list.is_empty())
    };
    read_json(&path.join("config.json")).is_ok_and(|config| own_config(&config).is_some_and(has_modules))
}

fn own_config(config: &Map<String, Value>) -> Option<&Map<String, Value>> {
    let own = config.get(CONFIG_KEY)?.as_object()?;
    (own.get("quant_method").and_then(Value::as_str) == Some(METHOD)).then_some(own)
}

impl Checkpoint {
    /// Opens a folder that [`Plan::run`](crate::Plan::run) wrote, or one shard of it. Reads and checks all headers.
    ///
    /// Also opens such a folder that another program has saved again, as `save_pretrained` of transformers does. Its shards
    /// have lost their checksums and the length of K: k is then a multiple of 64, unless a smoothing vector or a permutation tells it.
    ///
    /// # Errors
    /// [`CheckpointError::Input`] with the first problem found.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        if !path.is_dir() {
            return Self::assemble(path, Map::new(), vec![TensorFile::open(path)?], None);
        }
        let folder = Folder::open(path)?;
        let config_path = folder.file(Path::new("config.json"))?;
        let config = read_json(&config_path)?;
        let not_packed = || Problem::Unsupported {
            what: format!("{CONFIG_KEY} names no packed checkpoint"),
            remedy: "make one with `liquidgemm quantize`",
        };
        let own = own_config(&config).ok_or_else(|| not_packed().at(&config_path))?;
        let version = own.get("format_version");
        if version.and_then(Value::as_u64) != Some(VERSION.into()) {
            let what = format!("format version {}", version.unwrap_or(&Value::Null));
            let remedy =
                "this program reads version 1; quantize the original again, or use another version of it";
            return Err(Problem::Unsupported { what, remedy }.at(&config_path));
        }
        let shards = shard_names(&folder)?;
        let files = shards.names.iter().map(|name| TensorFile::open(&folder.file(Path::new(name))?));
        let files = files.collect::<Result<Vec<_>>>()?;
        shards.check(&files, path)?;
        let listed = own.get("quantized_modules").and_then(Value::as_array);
        let listed = listed.and_then(|list| list.iter().map(Value::as_str).collect::<Option<BTreeSet<_>>>());
        let reason = format!("{CONFIG_KEY} has no list \"quantized_modules\"");
        let listed = listed.ok_or_else(|| Problem::Json { reason }.at(&config_path))?;
        let modules: BTreeSet<String> = listed.into_iter().map(str::to_owned).collect();
        let group = own.get("group").and_then(Value::as_str).and_then(|group| group.parse().ok());
        let listed = Listed { modules, group: group.unwrap_or_default() };
        let folded =
            Folded::open(&folder, own).map_err(|reason| Problem::Json { reason }.at(&config_path))??;
        let mut checkpoint = Self::assemble(path, config, files, Some(&listed))?;
        checkpoint.folded = folded;
        let present: BTreeSet<String> = checkpoint.modules.keys().cloned().collect();
        if let Some(name) = listed.modules.symmetric_difference(&present).next() {
            let reason = format!("{CONFIG_KEY} and the shards do not agree whether {name:?} is quantized");
            return Err(Problem::Json { reason }.at(&config_path));
        }
        Ok(checkpoint)
    }

    fn assemble(
        path: &Path,
        config: Map<String, Value>,
        files: Vec<TensorFile>,
        listed: Option<&Listed>,
    ) -> Result<Self> {
        let mut checkpoint = Self {
            path: path.to_owned(),
            config,
            files: Vec::new(),
            modules: BTreeMap::new(),
            tensors: BTreeMap::new(),
            folded: Folded::default(),
        };
        for (index, file) in files.iter().enumerate() {
            checkpoint.add(index, file, listed).map_err(|problem| problem.at(file.path()))?;
        }
        checkpoint.files = files;
        Ok(checkpoint)
    }

    /// Adds the contents of one shard.
    fn add(&mut self, index: usize, file: &TensorFile, listed: Option<&Listed>) -> Result<(), Problem> {
        let mut tensors: BTreeMap<&str, &FileTensor> =
            file.tensors().iter().map(|tensor| (tensor.name.as_str(), tensor)).collect();
        let mut matrices = Vec::new();
        let mut checksums = None;
        match (file.metadata().get(METHOD), listed) {
            (Some(text), _) => {
                let metadata = parse_metadata(text)?;
                for (module, MatrixMetadata { n, k, group, checksum }) in metadata.matrices {
                    let bad = |reason: String| Problem::tensor(&module, reason);
                    let parsed: Group =
                        group.parse().map_err(|error: liquidgemm::Error| bad(error.to_string()))?;
                    if parsed.to_string() != group {
                        let parsed = parsed.to_string();
                        return Err(bad(format!("has the group {group:?}, not written as {parsed:?}")));
                    }
                    matrices.push((module, Matrix { n, k, group: parsed }, Some(checksum)));
                }
                checksums = Some(metadata.tensors);
            }
            (None, Some(listed)) => {
                for module in &listed.modules {
                    if let Some(codes) = tensors.get(Part::Codes.name(module).as_str()) {
                        let matrix = matrix_of_shapes(module, codes, &tensors, listed.group)?;
                        matrices.push((module.clone(), matrix, None));
                    }
                }
            }
            (None, None) => {
                return Err(Problem::Unsupported {
                    what: format!("the file's metadata have no entry {METHOD:?}"),
                    remedy: "packed shards are made with `liquidgemm quantize`",
                });
            }
        }
        for (module, matrix, checksum) in matrices {
            matrix.check().map_err(|error| Problem::tensor(&module, error.to_string()))?;
            let mut parts = [const { None }; 5];
            for (part, slot) in Part::ALL.into_iter().zip(&mut parts) {
                let name = part.name(&module);
                let Some(tensor) = tensors.remove(name.as_str()) else {
                    if part.is_optional() {
                        continue;
                    }
                    return Err(Problem::Missing { name });
                };
                let (dtype, shape) = (part.dtype(), matrix.shape(part));
                if tensor.dtype != dtype || tensor.shape != shape {
                    let reason =
                        format!("is {:?} {:?}; {dtype:?} {shape:?} expected", tensor.dtype, tensor.shape);
                    return Err(Problem::tensor(&name, reason));
                }
                *slot = Some(tensor.clone());
            }
            let packed = Packed { file: index, matrix, parts, checksum };
            if let Some(other) = self.modules.insert(module.clone(), packed) {
                return Err(Problem::Twice { name: module, other: format!("shard {}", other.file + 1) });
            }
        }
        for (name, tensor) in tensors {
            let checksum = match &mut checksums {
                None => None,
                Some(checksums) => {
                    let missing = || Problem::tensor(name, "has no checksum in the file's metadata");
                    Some(checksums.remove(name).ok_or_else(missing)?)
                }
            };
            let kept = Kept { file: index, tensor: tensor.clone(), checksum };
            if let Some(other) = self.tensors.insert(name.to_owned(), kept) {
                return Err(Problem::Twice {
                    name: name.to_owned(),
                    other: format!("shard {}", other.file + 1),
                });
            }
        }
        match checksums.unwrap_or_default().into_keys().next() {
            Some(name) => Err(Problem::Missing { name }),
            None => Ok(()),
        }
    }

    /// Returns the number of modules and other tensors that have no checksum, because another program has saved them.
    pub fn without_checksum(&self) -> usize {
        let modules = self.modules.values().filter(|packed| packed.checksum.is_none()).count();
        modules + self.tensors.values().filter(|kept| kept.checksum.is_none()).count()
    }

    /// Returns whether the residual stream of the model is rotated.
    pub(crate) fn is_rotated(&self) -> bool {
        own_config(&self.config).is_some_and(|own| own.contains_key(ROTATION_KEY))
    }

    /// Returns the vector that multiplies the columns of a module, if it is not stored but folded into the layer before: `[k]`.
    pub(crate) fn folded_columns(&self, module: &str) -> Result<Option<Vec<f32>>> {
        let Some(vector) = self.folded.columns.get(module) else { return Ok(None) };
        self.folded.read(vector, self.find(module)?.matrix.k, &self.path).map(Some)
    }

    /// Returns the vector that divides the rows of a module, or the weight of a norm, or their bias: `[length]`.
    pub(crate) fn folded_divisors(&self, name: &str, length: usize) -> Result<Option<Vec<f32>>> {
        let Some(vector) = self.folded.divided.get(name) else { return Ok(None) };
        self.folded.read(vector, length, &self.path).map(Some)
    }

    /// Returns the path that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the contents of `config.json`. Empty if a single shard was opened.
    pub fn config(&self) -> &Map<String, Value> {
        &self.config
    }

    /// Returns the packed modules, sorted by name.
    pub fn modules(&self) -> impl Iterator<Item = Module<'_>> {
        self.modules.iter().map(|(name, packed)| Module {
            name,
            n: packed.matrix.n,
            k: packed.matrix.k,
            group: packed.matrix.group,
            bytes: packed.parts.iter().flatten().map(|part| part.bytes).sum(),
            has_smoothing: packed.part(Part::Smoothing).is_some(),
            has_permutation: packed.part(Part::InputPermutation).is_some(),
        })
    }

    /// Returns the other tensors, sorted by name: name, type, shape and bytes.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, Dtype, &[usize], u64)> {
        self.tensors
            .iter()
            .map(|(name, kept)| (name.as_str(), kept.tensor.dtype, &kept.tensor.shape[..], kept.tensor.bytes))
    }

    /// Reads the weights of a packed module, and checks its checksum and the invariant of every pair.
    ///
    /// # Errors
    /// - [`CheckpointError::NoModule`] if there is no such packed module.
    /// - [`CheckpointError::Input`] with [`Problem::Checksum`] if its bytes have changed.
    /// - [`CheckpointError::Weights`] if the weights are not valid.
    /// - [`CheckpointError::Io`] if the file can't be read.
    pub fn packed(&self, module: &str) -> Result<PackedWeights> {
        let packed = self.find(module)?;
        let mut hashes = Vec::new();
        let mut contents = [const { Vec::new() }; 3];
        for (slot, part) in Part::ALL.into_iter().enumerate() {
            if let Some(bytes) = self.part(packed, part)? {
                let mut hash = Xxh3::new();
                hash.update(&bytes);
                hashes.push(digits(&hash));
                if let Some(contents) = contents.get_mut(slot) {
                    *contents = bytes;
                }
            }
        }
        self.check_sum(module, packed, hashes)?;
        let [codes, pairs, scales] = contents;
        let Matrix { n, k, group } = packed.matrix;
        PackedWeights::from_parts(codes, pairs, floats(&scales), n, k, group).map_err(weights_error(module))
    }

    /// Reads a module as a linear layer, with its bias (`MODULE.bias`) and smoothing vector.
    ///
    /// # Errors
    /// As [`packed`](Self::packed). Also [`CheckpointError::Options`] if its activations must be permuted:
    /// take [`packed`](Self::packed) and [`input_permutation`](Self::input_permutation) then.
    pub fn linear(&self, module: &str) -> Result<Linear> {
        let mut linear = Linear::new(self.packed(module)?);
        if self.input_permutation(module)?.is_some() {
            let reason = format!(
                "{module} has an input permutation, which a linear layer does not apply; \
                 use `packed` and `input_permutation`"
            );
            return Err(CheckpointError::Options { reason });
        }
        if let Some(smoothing) = self.smoothing(module)? {
            linear = linear.with_smoothing(smoothing).map_err(weights_error(module))?;
        }
        let bias = format!("{module}.bias");
        if self.tensors.contains_key(&bias) {
            linear = linear.with_bias(self.floats(&bias)?).map_err(weights_error(module))?;
        }
        Ok(linear)
    }

    /// Reads a module's smoothing vector, `[k]`, by which its activations are divided.
    ///
    /// # Errors
    /// [`CheckpointError::NoModule`], or [`CheckpointError::Io`] if the file can't be read.
    pub fn smoothing(&self, module: &str) -> Result<Option<Vec<f32>>> {
        let bytes = self.part(self.find(module)?, Part::Smoothing)?;
        Ok(bytes.map(|bytes| floats(&bytes)))
    }

    /// Reads a module's input permutation, `[k]`: packed column `j` multiplies activation `permutation[j]`.
    ///
    /// # Errors
    /// [`CheckpointError::NoModule`], [`CheckpointError::Io`] if the file can't be read,
    /// or [`CheckpointError::Input`] if it is no permutation.
    pub fn input_permutation(&self, module: &str) -> Result<Option<Vec<usize>>> {
        let packed = self.find(module)?;
        let Some(bytes) = self.part(packed, Part::InputPermutation)? else { return Ok(None) };
        let k = packed.matrix.k;
        let permutation: Vec<usize> =
            bytes.as_chunks().0.iter().map(|&bytes| i32::from_le_bytes(bytes) as usize).collect();
        let mut seen = vec![false; k];
        let is_permutation = permutation
            .iter()
            .all(|&from| seen.get_mut(from).is_some_and(|seen| !std::mem::replace(seen, true)));
        if is_permutation {
            return Ok(Some(permutation));
        }
        let name = Part::InputPermutation.name(module);
        Err(Problem::tensor(&name, format!("is no permutation of 0 to {}", k - 1))
            .at(self.files[packed.file].path()))
    }

    /// Reads a tensor that is not packed, and checks its checksum.
    ///
    /// # Errors
    /// - [`CheckpointError::NoTensor`] if there is no such tensor.
    /// - [`CheckpointError::Input`] with [`Problem::Checksum`] if its bytes have changed.
    /// - [`CheckpointError::Io`] if the file can't be read.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let kept =
            self.tensors.get(name).ok_or_else(|| CheckpointError::NoTensor { tensor: name.to_owned() })?;
        let file = &self.files[kept.file];
        let bytes = file.read_all(&kept.tensor)?;
        let mut hash = Xxh3::new();
        hash.update(&bytes);
        self.check_tensor_sum(name, digits(&hash))?;
        Ok(Tensor { dtype: kept.tensor.dtype, shape: kept.tensor.shape.clone(), bytes })
    }

    /// Reads a rank's part of a packed module, and no more of the file than that part.
    ///
    /// Along [`Axis::N`] rank `r` of `world` has the channels `r·n/world .. (r+1)·n/world`. Along [`Axis::K`] it has those
    /// elements of every channel; the cuts must lie at multiples of the group, or of 64 with one group a channel.
    ///
    /// # Errors
    /// - [`CheckpointError::BadShard`] if the module can't be cut so.
    /// - As [`packed`](Self::packed), but only whole modules have a checksum: a part's is not checked.
    pub fn packed_shard(&self, module: &str, axis: Axis, rank: usize, world: usize) -> Result<PackedWeights> {
        let packed = self.find(module)?;
        let Matrix { n, k, group } = packed.matrix;
        let (what, length) = match axis {
            Axis::N => ("n", n),
            Axis::K => ("k", k),
        };
        let bad = |reason| CheckpointError::BadShard {
            module: module.to_owned(),
            what,
            length,
            rank,
            world,
            reason,
        };
        if rank >= world {
            return Err(bad("ranks are numbered from 0 up to one less than their number"));
        }
        if !length.is_multiple_of(world) {
            return Err(bad("the parts would differ in size"));
        }
        let part = length / world;
        let range = part * rank..part * (rank + 1);
        match axis {
            Axis::N => {
                let strips = range.start / BRICK_CHANNELS..range.end.div_ceil(BRICK_CHANNELS);
                let first = strips.start * BRICK_CHANNELS;
                let block = self.block(module, strips)?;
                if range.start == first && block.n() == range.len() {
                    return Ok(block);
                }
                block.channel_shard(range.start - first..range.end - first).map_err(weights_error(module))
            }
            Axis::K => {
                let step = match group {
                    Group::K(group) => group.min(k.next_multiple_of(BRICK_K)),
                    Group::Channel => BRICK_K,
                };
                if !part.is_multiple_of(step) && world > 1 {
                    return Err(bad(
                        "a part must be a multiple of the group, or of 64 with one group a channel",
                    ));
                }
                if packed.part(Part::InputPermutation).is_some() {
                    return Err(bad("its inputs are permuted, so a part needs inputs of other ranks"));
                }
                self.columns(module, packed, range)
            }
        }
    }

    /// Reads elements of every channel, between multiples of the group.
    fn columns(&self, module: &str, packed: &Packed, range: Range<usize>) -> Result<PackedWeights> {
        let Matrix { n, group, .. } = packed.matrix;
        let matrix = packed.matrix;
        let cut = Matrix { k: range.len(), ..matrix };
        let first_group = match group {
            Group::K(group) => range.start / group,
            Group::Channel => 0,
        };
        let mut codes = vec![0; cut.strips() * cut.k_blocks() * CODE_BYTES];
        let mut pairs = vec![0; cut.strips() * cut.groups() * PAIR_BYTES];
        let file = &self.files[packed.file];
        let slices = [
            (Part::Codes, &mut codes, matrix.k_blocks(), cut.k_blocks(), range.start / BRICK_K, CODE_BYTES),
            (Part::Pairs, &mut pairs, matrix.groups(), cut.groups(), first_group, PAIR_BYTES),
        ];
        for (part, bytes, all, count, first, size) in slices {
            let tensor = packed.required(part);
            for (strip, bytes) in bytes.chunks_exact_mut(count * size).enumerate() {
                file.read(tensor, ((strip * all + first) * size) as u64, bytes)?;
            }
        }
        let scales = self.part(packed, Part::Scales)?.unwrap_or_default();
        PackedWeights::from_parts(codes, pairs, floats(&scales), n, range.len(), group)
            .map_err(weights_error(module))
    }

    /// Reads some strips of a packed module as weights of their own.
    pub(crate) fn block(&self, module: &str, strips: Range<usize>) -> Result<PackedWeights> {
        let packed = self.find(module)?;
        let Matrix { n, k, group } = packed.matrix;
        let file = &self.files[packed.file];
        let read = |part: Part, strip_bytes: usize| -> Result<Vec<u8>> {
            let mut bytes = vec![0; strips.len() * strip_bytes];
            file.read(packed.required(part), (strips.start * strip_bytes) as u64, &mut bytes)?;
            Ok(bytes)
        };
        let codes = read(Part::Codes, packed.matrix.k_blocks() * CODE_BYTES)?;
        let pairs = read(Part::Pairs, packed.matrix.groups() * PAIR_BYTES)?;
        let channels = strips.start * BRICK_CHANNELS..n.min(strips.end * BRICK_CHANNELS);
        let mut scales = vec![0; channels.len() * size_of::<f32>()];
        file.read(packed.required(Part::Scales), (channels.start * size_of::<f32>()) as u64, &mut scales)?;
        PackedWeights::from_parts(codes, pairs, floats(&scales), channels.len(), k, group)
            .map_err(weights_error(module))
    }

    /// Fails unless these checksums of the module's tensors make the module's checksum.
    pub(crate) fn check_module_sum(&self, module: &str, hashes: Vec<String>) -> Result<()> {
        self.check_sum(module, self.find(module)?, hashes)
    }

    fn check_sum(&self, module: &str, packed: &Packed, hashes: Vec<String>) -> Result<()> {
        let computed = packed.matrix.checksum(VERSION, hashes);
        self.compare_sums(module, packed.file, packed.checksum.as_deref(), computed)
    }

    /// Fails unless this is the checksum of a tensor that is not packed.
    pub(crate) fn check_tensor_sum(&self, name: &str, computed: String) -> Result<()> {
        let kept =
            self.tensors.get(name).ok_or_else(|| CheckpointError::NoTensor { tensor: name.to_owned() })?;
        self.compare_sums(name, kept.file, kept.checksum.as_deref(), computed)
    }

    /// What has no checksum passes.
    fn compare_sums(&self, name: &str, file: usize, found: Option<&str>, computed: String) -> Result<()> {
        let Some(found) = found.filter(|&found| found != computed) else { return Ok(()) };
        let problem = Problem::Checksum { name: name.to_owned(), found: found.to_owned(), computed };
        Err(problem.at(self.files[file].path()))
    }

    /// Reads bytes of a tensor that is not packed.
    pub(crate) fn tensor_bytes(&self, name: &str, offset: u64, bytes: &mut [u8]) -> Result<()> {
        let kept =
            self.tensors.get(name).ok_or_else(|| CheckpointError::NoTensor { tensor: name.to_owned() })?;
        self.files[kept.file].read(&kept.tensor, offset, bytes)
    }

    /// Reads a tensor of any type of weights as f32.
    fn floats(&self, name: &str) -> Result<Vec<f32>> {
        let Tensor { dtype, bytes, .. } = self.tensor(name)?;
        if !is_weight_type(dtype) {
            let kept = &self.tensors[name];
            let reason = format!("has the type {dtype:?}, not one of weights");
            return Err(Problem::tensor(name, reason).at(self.files[kept.file].path()));
        }
        let mut values = vec![0.0; bytes.len() * 8 / dtype.bitsize()];
        decode(dtype, &bytes, &mut values);
        Ok(values)
    }

    fn find(&self, module: &str) -> Result<&Packed> {
        self.modules.get(module).ok_or_else(|| CheckpointError::NoModule { module: module.to_owned() })
    }

    fn part(&self, packed: &Packed, part: Part) -> Result<Option<Vec<u8>>> {
        let Some(tensor) = packed.part(part) else { return Ok(None) };
        Ok(Some(self.files[packed.file].read_all(tensor)?))
    }
}

impl Folded {
    /// Reads what the configuration says of folded vectors, and opens their file. The outer error is one of the configuration.
    fn open(folder: &Folder, own: &Map<String, Value>) -> Result<Result<Self>, String> {
        let Some(list) = own.get(SMOOTHING_KEY).and_then(|smoothing| smoothing.get("folded")) else {
            return Ok(Ok(Self::default()));
        };
        let list: Vec<FoldedVector> = serde_json::from_value(list.clone())
            .map_err(|error| format!("the list of folded smoothing vectors is not valid: {error}"))?;
        let mut folded = Self::default();
        for FoldedVector { modules, into } in list {
            let Some(vector) = modules.first().cloned() else { continue };
            folded.divided.insert(into, vector.clone());
            folded.columns.extend(modules.into_iter().map(|module| (module, vector.clone())));
        }
        if folder.has(FOLDED_FILE) {
            match folder.file(Path::new(FOLDED_FILE)).and_then(|path| TensorFile::open(&path)) {
                Ok(file) => folded.file = Some(file),
                Err(error) => return Ok(Err(error)),
            }
        }
        Ok(Ok(folded))
    }

    fn read(&self, name: &str, length: usize, folder: &Path) -> Result<Vec<f32>> {
        let Some(file) = &self.file else {
            let what =
                format!("smoothing vectors are folded into other tensors, and {FOLDED_FILE} is missing");
            let remedy = "comparing with another model needs that file too";
            return Err(Problem::Unsupported { what, remedy }.at(folder));
        };
        let bad = |reason: String| Problem::tensor(name, reason).at(file.path());
        let tensor = file.tensors().iter().find(|tensor| tensor.name == name);
        let tensor = tensor.ok_or_else(|| bad("is missing".to_owned()))?;
        if tensor.dtype != Dtype::F32 || tensor.shape != [length] {
            let reason = format!("is {:?} {:?}; F32 [{length}] expected", tensor.dtype, tensor.shape);
            return Err(bad(reason));
        }
        let vector = floats(&file.read_all(tensor)?);
        match vector.iter().find(|factor| !(factor.is_finite() && **factor > 0.0)) {
            Some(factor) => Err(bad(format!("has the factor {factor}; factors are finite and positive"))),
            None => Ok(vector),
        }
    }
}

/// Returns the sizes of a module by the shapes of its tensors. `usual` is the group of most modules.
fn matrix_of_shapes(
    module: &str,
    codes: &FileTensor,
    tensors: &BTreeMap<&str, &FileTensor>,
    usual: Group,
) -> Result<Matrix, Problem> {
    let shape = |part: Part| tensors.get(part.name(module).as_str()).map(|tensor| &tensor.shape[..]);
    let missing = |part: Part| Problem::Missing { name: part.name(module) };
    let bad = |part: Part| {
        let found = shape(part).unwrap_or_default();
        Problem::tensor(
            &part.name(module),
            format!("has the shape {found:?}, which is none of packed weights"),
        )
    };
    let &[n] = shape(Part::Scales).ok_or_else(|| missing(Part::Scales))? else {
        return Err(bad(Part::Scales));
    };
    let &[_, groups, _] = shape(Part::Pairs).ok_or_else(|| missing(Part::Pairs))? else {
        return Err(bad(Part::Pairs));
    };
    let &[_, k_blocks, _] = &codes.shape[..] else { return Err(bad(Part::Codes)) };
    let exact = [Part::Smoothing, Part::InputPermutation].into_iter().find_map(|part| match shape(part) {
        Some(&[k]) => Some(k),
        _ => None,
    });
    let k = exact.unwrap_or_else(|| k_blocks.saturating_mul(BRICK_K));
    let fits = |group: Group| group.count(k).is_ok_and(|count| count == groups);
    let blocks = k_blocks.checked_div(groups).map(|_| k_blocks.div_ceil(groups)).unwrap_or(0);
    let found = [usual, Group::Channel, Group::K(blocks.saturating_mul(BRICK_K))]
        .into_iter()
        .find(|&group| fits(group));
    found.map(|group| Matrix { n, k, group }).ok_or_else(|| bad(Part::Pairs))
}

impl Packed {
    fn part(&self, part: Part) -> Option<&FileTensor> {
        let slot = Part::ALL.iter().position(|&other| other == part)?;
        self.parts[slot].as_ref()
    }

    /// Returns a part that every module has.
    fn required(&self, part: Part) -> &FileTensor {
        self.part(part).expect("checked when the checkpoint was opened")
    }
}

/// Parses the entry `liquidgemm` of a shard's metadata.
pub(crate) fn parse_metadata(text: &str) -> Result<ShardMetadata, Problem> {
    let bad =
        |reason: String| Problem::Json { reason: format!("the metadata {METHOD:?} are not valid: {reason}") };
    let metadata: ShardMetadata = serde_json::from_str(text).map_err(|error| bad(error.to_string()))?;
    if metadata.version != VERSION {
        return Err(bad(format!("version {}; this program reads version {VERSION}", metadata.version)));
    }
    Ok(metadata)
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()
}
