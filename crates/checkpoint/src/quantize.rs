//! Carries out a plan: shard by shard, in bounded memory, resumable, and with nothing under the output's name
//! before everything is there.
//!
//! The output grows in a folder `OUTPUT.partial`. A shard is written under a temporary name, flushed and renamed, so a
//! shard with its final name is complete, whenever the process was killed. A later run with the same model, options and
//! version continues behind the finished shards. At the end the folder is renamed to `OUTPUT`.

use std::ffi::OsString;
use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use liquidgemm::{Int4Import, PackedWeights, smooth_weights};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

use crate::checkpoint::is_packed_folder;
use crate::error::{CheckpointError, Result, io_error, weights_error};
use crate::files::{is_plain_name, read_json};
use crate::format::{FOLDED_FILE, Part};
use crate::import::ImportOutcome;
use crate::method::{ChangedInputs, Quantizer};
use crate::plan::{Fate, Layer, Plan, matrix_of};
use crate::progress::Progress;
use crate::shard_writer::{ShardWriter, TEMPORARY_PREFIX};
use crate::smooth::encode;
use crate::source::{INDEX, SideContents};

/// The bytes of f32 weights that are quantized at a time, unless 64 channels have more.
const BLOCK_BYTES: usize = 128 << 20;
/// The bytes of a kept tensor that are copied at a time, unless a row has more.
const COPY_BYTES: usize = 16 << 20;
/// Says which plan an unfinished folder belongs to.
const JOB: &str = ".liquidgemm-job.json";
/// Locked while a process writes the folder.
const LOCK: &str = ".liquidgemm-lock";

/// What a run did.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    /// Modules that were packed.
    pub packed: usize,
    /// Tensors that were kept.
    pub kept: usize,
    /// Shards that an earlier, unfinished run had left.
    pub resumed_shards: usize,
    /// Bytes of all tensors before.
    pub bytes_before: u64,
    /// Bytes of all tensors after.
    pub bytes_after: u64,
    /// What became of modules that another quantizer had quantized, except for those in resumed shards.
    pub imports: Vec<ImportOutcome>,
}

impl Plan<'_> {
    /// Quantizes the model into the folder `output`.
    ///
    /// With `force`, an unfinished run of another plan is discarded, and a packed checkpoint at `output` is replaced
    /// when the new one is complete. Nothing else is ever replaced.
    ///
    /// # Errors
    /// - [`CheckpointError::OutputExists`], [`CheckpointError::OtherRun`], [`CheckpointError::Busy`] or
    ///   [`CheckpointError::Options`] if the output's place can't be used.
    /// - [`CheckpointError::Weights`] for weights that are not finite, and every error of reading the source.
    ///   Nothing is left behind.
    /// - [`CheckpointError::Io`] if writing fails. Finished shards stay in `output.partial`, and the same call continues there.
    pub fn run(&self, output: &Path, force: bool, progress: &dyn Progress) -> Result<Summary> {
        self.run_in_blocks(output, force, progress, BLOCK_BYTES)
    }

    pub(crate) fn run_in_blocks(
        &self,
        output: &Path,
        force: bool,
        progress: &dyn Progress,
        block_bytes: usize,
    ) -> Result<Summary> {
        check_place(output, self.source.path(), force)?;
        let folder = PartialFolder::open(output, &self.fingerprint(), force)?;
        let outcome = self.fill(&folder.path, progress, block_bytes);
        match outcome {
            Ok(summary) => {
                folder.become_output(output)?;
                Ok(summary)
            }
            Err(error) => {
                let is_about_writing =
                    matches!(&error, CheckpointError::Io { path, .. } if path.starts_with(&folder.path));
                folder.give_up(is_about_writing)?;
                Err(error)
            }
        }
    }

    fn fill(&self, folder: &Path, progress: &dyn Progress, block_bytes: usize) -> Result<Summary> {
        let mut summary = Summary::default();
        progress.begin(self.layers().iter().map(|layer| layer.bytes_before).sum());
        for layer in self.layers() {
            summary.bytes_before += layer.bytes_before;
            summary.bytes_after += layer.bytes_after;
            match layer.fate {
                Fate::Packed { .. } => summary.packed += 1,
                Fate::Kept(_) => summary.kept += 1,
                Fate::Dropped => {}
            }
        }
        for (shard, name) in self.shards().iter().enumerate() {
            let path = folder.join(name);
            if path.exists() {
                summary.resumed_shards += 1;
                progress.advance(self.layers_of(shard).map(|layer| layer.bytes_before).sum());
                continue;
            }
            let mut writer = ShardWriter::create(&path, self.tensors_of(shard), self.matrices_of(shard))?;
            for layer in self.layers_of(shard) {
                progress.item(&layer.name);
                match &layer.fate {
                    Fate::Dropped => {}
                    Fate::Kept(_) if layer.is_divided => {
                        self.divide(layer, &mut writer, block_bytes)?;
                        progress.advance(layer.bytes_before);
                    }
                    Fate::Kept(_) => self.copy(layer, &mut writer, progress)?,
                    Fate::Packed { module, .. } => {
                        summary.imports.extend(self.pack(
                            layer,
                            module,
                            &mut writer,
                            progress,
                            block_bytes,
                        )?);
                    }
                }
            }
            writer.finish()?;
        }
        self.write_side_files(folder)?;
        self.write_folded(folder, block_bytes)?;
        Ok(summary)
    }

    /// Copies a tensor that is kept.
    fn copy(&self, layer: &Layer, writer: &mut ShardWriter, progress: &dyn Progress) -> Result<()> {
        let tensor = &self.source.tensors()[layer.tensor];
        let (rows, row_bytes) = (tensor.rows(), tensor.kept_row_bytes());
        let mut meter = Meter::new(layer.bytes_before, rows);
        for rows in blocks(rows, row_bytes, COPY_BYTES, 1) {
            let mut bytes = vec![0; rows.len() * row_bytes];
            let count = rows.len();
            self.source.read_kept(layer.tensor, rows, &mut bytes)?;
            writer.append(&layer.name, &bytes)?;
            progress.advance(meter.advance(count));
        }
        Ok(())
    }

    /// Writes a norm's weight or a bias that is divided by a smoothing vector, in the type that it is kept in.
    fn divide(&self, layer: &Layer, writer: &mut ShardWriter, block_bytes: usize) -> Result<()> {
        let tensor = &self.source.tensors()[layer.tensor];
        let mut values = vec![0f32; tensor.columns()];
        self.source.read_rows(layer.tensor, 0..1, &mut values)?;
        if let Some(vector) = self.vector(self.sites.of_divided(layer.tensor), block_bytes)? {
            values.iter_mut().zip(&*vector).for_each(|(value, factor)| *value /= factor);
        }
        writer.append(&layer.name, &encode(&values, tensor.kept))
    }

    /// Returns the smoothing vector of a site.
    fn vector(&self, site: Option<usize>, block_bytes: usize) -> Result<Option<Arc<Vec<f32>>>> {
        let (Some(site), Some(making)) = (site, self.making(block_bytes)) else { return Ok(None) };
        self.sites.vector(site, &making).map(Some)
    }

    /// Quantizes a module in blocks of channels. Channels are independent, so the blocks' size changes nothing.
    fn pack(
        &self,
        layer: &Layer,
        module: &str,
        writer: &mut ShardWriter,
        progress: &dyn Progress,
        block_bytes: usize,
    ) -> Result<Option<ImportOutcome>> {
        let Fate::Packed { group, .. } = layer.fate else { unreachable!("the module is packed") };
        let matrix = matrix_of(layer, group);
        let names = Part::ALL.map(|part| part.name(module));
        // Weights that another quantizer has quantized are taken over without statistics of their inputs.
        if let Some(imported) = self.source.import(layer.tensor)? {
            let taken = PackedWeights::from_int4(&imported.weights, group, self.options.method.data_free());
            let Int4Import { weights, kind, error } = taken.map_err(weights_error(module))?;
            write_packed(writer, &names, &weights)?;
            if self.source.tensors()[layer.tensor].permuted {
                let order = imported.permutation.iter().flatten();
                writer.append(&names[4], &order.flat_map(|from| from.to_le_bytes()).collect::<Vec<u8>>())?;
            }
            progress.advance(layer.bytes_before);
            return Ok(Some(ImportOutcome { module: module.to_owned(), kind, error }));
        }
        let is_imported = self.source.tensors()[layer.tensor].is_imported;
        let smoothing = self.vector(self.sites.of_reader(layer.tensor), block_bytes)?;
        let divisors = self.vector(self.sites.of_divided(layer.tensor), block_bytes)?;
        let quantizer = if is_imported {
            Quantizer::data_free(self.options.method)
        } else {
            let norm = self.source.norm_before(layer.tensor)?;
            let inputs = ChangedInputs {
                smoothing: smoothing.as_ref().map(|vector| &vector[..]),
                block: self.source.rotation().filter(|_| norm.is_some()),
                norm: norm.as_deref(),
            };
            self.options.quantizer(module, matrix.k, &inputs)?
        };
        if let Some(smoothing) = smoothing.as_ref().filter(|_| self.sites.is_stored(layer.tensor)) {
            writer.append(&names[3], &encode(smoothing, Dtype::F32))?;
        }
        let block_bytes = if quantizer.wants_all_channels() { usize::MAX } else { block_bytes };
        let mut meter = Meter::new(layer.bytes_before, matrix.n);
        for rows in blocks(matrix.n, matrix.k * size_of::<f32>(), block_bytes, 64) {
            let mut weights = vec![0f32; rows.len() * matrix.k];
            self.source.read_rows(layer.tensor, rows.clone(), &mut weights)?;
            if let Some(smoothing) = &smoothing {
                weights = smooth_weights(&weights, rows.len(), matrix.k, smoothing)
                    .map_err(weights_error(module))?;
            }
            if let Some(divisors) = &divisors {
                for (row, divisor) in weights.chunks_exact_mut(matrix.k).zip(&divisors[rows.clone()]) {
                    row.iter_mut().for_each(|weight| *weight /= divisor);
                }
            }
            let packed = quantizer.quantize(&weights, rows.len(), matrix.k, group);
            let packed = packed.map_err(|error| weights_error(module)(shifted(error, rows.start)))?;
            write_packed(writer, &names, &packed)?;
            progress.advance(meter.advance(rows.len()));
        }
        Ok(None)
    }

    /// Writes configuration, index and the source's side files.
    fn write_side_files(&self, folder: &Path) -> Result<()> {
        for file in self.source.side_files() {
            let path = folder.join(&file.name);
            if let Some(parent) = path.parent() {
                fs::create_dir_all(parent).map_err(io_error(parent, "create the folder"))?;
            }
            match &file.contents {
                SideContents::Bytes(bytes) => fs::write(&path, bytes).map_err(io_error(&path, "write"))?,
                SideContents::CopyOf(from) => {
                    // Not `fs::copy`: a read-only original would make the copy read-only.
                    let mut from_file = File::open(from).map_err(io_error(from, "open the file"))?;
                    let mut to = File::create(&path).map_err(io_error(&path, "create the file"))?;
                    io::copy(&mut from_file, &mut to).map_err(io_error(&path, "copy"))?;
                }
            }
        }
        let pretty = |value: &Value| serde_json::to_vec_pretty(value).expect("JSON values can be written");
        let config = folder.join("config.json");
        fs::write(&config, pretty(&Value::Object(self.config()))).map_err(io_error(&config, "write"))?;
        if let Some(index) = self.index() {
            let path = folder.join(INDEX);
            fs::write(&path, pretty(&index)).map_err(io_error(&path, "write"))?;
        }
        Ok(())
    }

    /// Writes the smoothing vectors that are folded into other tensors, for comparisons with the original.
    fn write_folded(&self, folder: &Path, block_bytes: usize) -> Result<()> {
        let mut vectors = Vec::new();
        for (site, folded) in self.sites.folded(self.layers()) {
            if let Some(vector) = self.vector(Some(site), block_bytes)? {
                vectors.push((folded.modules[0].clone(), vector.len(), encode(&vector, Dtype::F32)));
            }
        }
        if vectors.is_empty() {
            return Ok(());
        }
        let path = folder.join(FOLDED_FILE);
        let views = vectors.iter().map(|(name, k, bytes)| {
            (name, TensorView::new(Dtype::F32, vec![*k], bytes).expect("bytes of [k]"))
        });
        let bytes = safetensors::serialize(views, None).expect("small tensors with names of their own");
        fs::write(&path, bytes).map_err(io_error(&path, "write"))
    }
}

/// Appends packed weights to the tensors of their module, whose names are in the order of [`Part::ALL`].
fn write_packed(writer: &mut ShardWriter, names: &[String], packed: &PackedWeights) -> Result<()> {
    writer.append(&names[0], packed.codes())?;
    writer.append(&names[1], packed.pairs())?;
    let scales: Vec<u8> = packed.channel_scales().iter().flat_map(|scale| scale.to_le_bytes()).collect();
    writer.append(&names[2], &scales)
}

/// Adds the first channel of a block to the position in an error.
fn shifted(error: liquidgemm::Error, first: usize) -> liquidgemm::Error {
    match error {
        liquidgemm::Error::NonFiniteWeight { channel, k, value } => {
            liquidgemm::Error::NonFiniteWeight { channel: channel + first, k, value }
        }
        other => other,
    }
}

/// Cuts rows into blocks of about `bytes`, each a multiple of `multiple` rows but the last.
pub(crate) fn blocks(
    rows: usize,
    row_bytes: usize,
    bytes: usize,
    multiple: usize,
) -> impl Iterator<Item = std::ops::Range<usize>> {
    let step = (bytes / row_bytes.max(1) / multiple * multiple).max(multiple);
    (0..rows).step_by(step).map(move |start| start..rows.min(start + step))
}

/// Shares a tensor's bytes out among its rows.
struct Meter {
    bytes: u64,
    rows: usize,
    done: usize,
}

impl Meter {
    fn new(bytes: u64, rows: usize) -> Self {
        Self { bytes, rows, done: 0 }
    }

    /// Returns the bytes of the next `rows` rows. All rows together have all bytes.
    fn advance(&mut self, rows: usize) -> u64 {
        let at = |done: usize| (u128::from(self.bytes) * done as u128 / self.rows.max(1) as u128) as u64;
        let bytes = at(self.done + rows) - at(self.done);
        self.done += rows;
        bytes
    }
}

/// Checks that the output can have its name.
fn check_place(output: &Path, source: &Path, force: bool) -> Result<()> {
    let Some(name) = output.file_name() else {
        let reason =
            format!("{:?} is no name of a folder; give a path that ends in a name", output.display());
        return Err(CheckpointError::Options { reason });
    };
    if !name.to_str().is_some_and(is_plain_name) {
        let reason = format!("{:?} is no plain name of a folder", name.to_string_lossy());
        return Err(CheckpointError::Options { reason });
    }
    let parent = parent_of(output);
    let real_parent = fs::canonicalize(parent).map_err(io_error(parent, "open the folder"))?;
    let real_source = fs::canonicalize(source).map_err(io_error(source, "open"))?;
    if real_parent.join(name).starts_with(&real_source) {
        let reason =
            format!("the output {} lies in the model's folder; choose another place", output.display());
        return Err(CheckpointError::Options { reason });
    }
    match fs::symlink_metadata(output) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(io_error(output, "look at the output's place")(error)),
        Ok(_) if force && is_packed_folder(output) => Ok(()),
        Ok(_) if force => {
            let reason = format!(
                "{} is no packed checkpoint, and --force replaces nothing else; remove it or choose another output",
                output.display()
            );
            Err(CheckpointError::Options { reason })
        }
        Ok(_) => Err(CheckpointError::OutputExists { path: output.to_owned() }),
    }
}

fn parent_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Returns the path with a suffix behind its name.
fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name: OsString = path.file_name().unwrap_or_default().to_owned();
    name.push(suffix);
    path.with_file_name(name)
}

/// The folder in which the output grows. Its lock is held until it is dropped.
struct PartialFolder {
    path: PathBuf,
    _lock: File,
}

impl PartialFolder {
    /// Creates the folder, or continues an unfinished run of the same plan.
    fn open(output: &Path, fingerprint: &str, force: bool) -> Result<Self> {
        let path = with_suffix(output, ".partial");
        match fs::create_dir(&path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(io_error(&path, "create the folder")(error));
            }
            _ => {}
        }
        if !fs::symlink_metadata(&path).is_ok_and(|metadata| metadata.is_dir()) {
            let reason = format!("{} is no folder; remove it or choose another output", path.display());
            return Err(CheckpointError::Options { reason });
        }
        let lock_path = path.join(LOCK);
        let names = || fs::read_dir(&path).map_err(io_error(&path, "list the folder"));
        let is_new = names()?.next().is_none();
        // A run that is killed just before its last step leaves a complete folder without the lock.
        if !is_new && !lock_path.exists() && !is_packed_folder(&path) {
            let reason = format!(
                "{} was not made by this program; remove it or choose another output",
                path.display()
            );
            return Err(CheckpointError::Options { reason });
        }
        let lock = File::create(&lock_path).map_err(io_error(&lock_path, "create the file"))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(CheckpointError::Busy { path }),
            Err(TryLockError::Error(error)) => return Err(io_error(&lock_path, "lock")(error)),
        }
        let job = path.join(JOB);
        let belongs = job.exists()
            && read_json(&job).is_ok_and(|job| job.get("plan").and_then(Value::as_str) == Some(fingerprint));
        if !belongs {
            if job.exists() && !force {
                return Err(CheckpointError::OtherRun { path });
            }
            for entry in names()? {
                let entry = entry.map_err(io_error(&path, "list the folder"))?;
                if entry.file_name() != LOCK {
                    remove(&entry.path())?;
                }
            }
            let contents = json!({"plan": fingerprint}).to_string();
            fs::write(&job, contents).map_err(io_error(&job, "write"))?;
        }
        // Shards that a killed process had begun.
        for entry in names()? {
            let entry = entry.map_err(io_error(&path, "list the folder"))?;
            if entry.file_name().to_string_lossy().starts_with(TEMPORARY_PREFIX) {
                remove(&entry.path())?;
            }
        }
        Ok(Self { path, _lock: lock })
    }

    /// Gives the complete folder the output's name. What is there is replaced.
    fn become_output(self, output: &Path) -> Result<()> {
        for name in [JOB, LOCK] {
            remove(&self.path.join(name))?;
        }
        sync_tree(&self.path)?;
        let replaced = with_suffix(output, ".replaced");
        if is_packed_folder(&replaced) {
            // A run that was killed while it replaced a checkpoint left this.
            remove(&replaced)?;
        }
        let is_replacing = fs::symlink_metadata(output).is_ok();
        if is_replacing {
            fs::rename(output, &replaced).map_err(io_error(output, "rename"))?;
        }
        fs::rename(&self.path, output).map_err(io_error(&self.path, "rename into place"))?;
        sync_folder(parent_of(output))?;
        if is_replacing {
            remove(&replaced)?;
        }
        Ok(())
    }

    /// Removes the folder, unless it holds finished shards that a later run can use.
    fn give_up(self, keep_shards: bool) -> Result<()> {
        let names = fs::read_dir(&self.path).map_err(io_error(&self.path, "list the folder"))?;
        let has_shards = names.flatten().any(|entry| !entry.file_name().to_string_lossy().starts_with('.'));
        if keep_shards && has_shards { Ok(()) } else { remove(&self.path) }
    }
}

fn remove(path: &Path) -> Result<()> {
    let is_folder = fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_dir());
    let outcome = if is_folder { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    outcome.map_err(io_error(path, "remove"))
}

/// Flushes the entries of a folder. Not every system can open a folder.
fn sync_folder(path: &Path) -> Result<()> {
    #[cfg(unix)]
    File::open(path).and_then(|folder| folder.sync_all()).map_err(io_error(path, "flush the folder"))?;
    Ok(())
}

/// Flushes all files of a folder and the folders themselves.
fn sync_tree(path: &Path) -> Result<()> {
    for entry in fs::read_dir(path).map_err(io_error(path, "list the folder"))? {
        let entry = entry.map_err(io_error(path, "list the folder"))?.path();
        if entry.is_dir() {
            sync_tree(&entry)?;
        } else {
            let file = File::open(&entry).map_err(io_error(&entry, "open the file"))?;
            file.sync_all().map_err(io_error(&entry, "flush to the disk"))?;
        }
    }
    sync_folder(path)
}
