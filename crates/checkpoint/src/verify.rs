//! Checks a packed checkpoint: checksums, the format's invariant, and the distance to the model that it was made from.

use xxhash_rust::xxh3::Xxh3;

use crate::checkpoint::Checkpoint;
use crate::compare::{Difference, Model, Reader, difference, source_readers};
use crate::error::{CheckpointError, Problem, Result};
use crate::format::{Part, digits};
use crate::number::{decode, is_weight_type};
use crate::progress::Progress;
use crate::source::{Rotated, Source};

/// Bytes of a tensor that are read at a time.
const READ_BYTES: u64 = 16 << 20;

/// The outcome of [`verify`].
#[derive(Clone, Debug, Default)]
pub struct Verification {
    /// The packed modules, sorted by name, each with its distance to the original if one was given.
    pub modules: Vec<(String, Option<Difference>)>,
    /// Tensors that were checked beside them.
    pub tensors: usize,
    /// Those modules and tensors among them that have no checksum: only their structure, shapes and ranges were checked.
    pub without_checksum: usize,
    /// Everything that is wrong, one line each. Empty if the checkpoint is sound.
    pub problems: Vec<String>,
}

/// Reads a whole checkpoint and checks every checksum and every pair. With `original`, also measures the error of every
/// module, and checks that all other tensors are unchanged.
///
/// Damage does not end the check: it is listed in [`Verification::problems`].
///
/// # Errors
/// [`CheckpointError::Io`] if a file can't be read.
pub fn verify(
    checkpoint: &Checkpoint,
    original: Option<&Model>,
    progress: &dyn Progress,
) -> Result<Verification> {
    let mut result =
        Verification { without_checksum: checkpoint.without_checksum(), ..Verification::default() };
    let modules: Vec<_> = checkpoint.modules().collect();
    let tensors: Vec<_> = checkpoint.tensors().collect();
    progress.begin(modules.iter().map(|m| m.bytes).chain(tensors.iter().map(|tensor| tensor.3)).sum());
    let source = match original {
        Some(Model::Source(source)) => Some(source.as_ref()),
        _ => None,
    };
    // A rotated model is compared with its original, rotated alike.
    let rotated = source.filter(|_| checkpoint.is_rotated()).map(Rotated::new).transpose()?;
    let source = rotated.as_ref().map(|rotated| rotated as &dyn Source).or(source);
    let originals = match source {
        Some(source) => Some(source_readers(source)),
        None => original.map(|model| model.readers()),
    };
    for module in &modules {
        progress.item(module.name);
        let mut figures = None;
        match check_module(checkpoint, module.name) {
            Err(error) => result.problems.push(reported(error)?),
            Ok(()) => match originals.as_ref().map(|readers| readers.get(module.name)) {
                None => {}
                Some(None) => {
                    result.problems.push(format!("{}: the original has no such module", module.name))
                }
                Some(Some(reader)) => {
                    let own = Reader::packed(checkpoint, *module);
                    match difference(reader, &own) {
                        Ok(Some(found)) => figures = Some(found),
                        Ok(None) => result.problems.push(format!(
                            "{}: the original has the shape {:?}, not {:?}",
                            module.name,
                            reader.shape(),
                            own.shape()
                        )),
                        Err(error) => result.problems.push(reported(error)?),
                    }
                }
            },
        }
        result.modules.push((module.name.to_owned(), figures));
        progress.advance(module.bytes);
    }
    for (name, _, _, bytes) in tensors {
        progress.item(name);
        if let Err(error) = check_tensor(checkpoint, name, bytes) {
            result.problems.push(reported(error)?);
        } else if let Some(source) = source {
            match source.tensors().iter().position(|tensor| tensor.name == name) {
                None => result.problems.push(format!("{name}: the original has no such tensor")),
                Some(tensor) => match is_as_planned(checkpoint, name, bytes, source, tensor) {
                    Ok(true) => {}
                    Ok(false) => result.problems.push(format!("{name}: it differs from the original's")),
                    Err(error) => result.problems.push(reported(error)?),
                },
            }
        }
        result.tensors += 1;
        progress.advance(bytes);
    }
    Ok(result)
}

/// Turns damage into a line. Failures of the system stay errors.
fn reported(error: CheckpointError) -> Result<String> {
    match error {
        CheckpointError::Io { .. } => Err(error),
        other => Ok(other.to_string()),
    }
}

/// Checks checksum and pairs of a module, some strips at a time.
fn check_module(checkpoint: &Checkpoint, module: &str) -> Result<()> {
    let mut hashes = [const { Xxh3::new() }; 3];
    for strips in checkpoint.blocks(module)? {
        let block = checkpoint.block(module, strips)?;
        hashes[0].update(block.codes());
        hashes[1].update(block.pairs());
        block.channel_scales().iter().for_each(|scale| hashes[2].update(&scale.to_le_bytes()));
    }
    let mut sums: Vec<String> = hashes.iter().map(digits).collect();
    if let Some(smoothing) = checkpoint.smoothing(module)? {
        let mut hash = Xxh3::new();
        smoothing.iter().for_each(|factor| hash.update(&factor.to_le_bytes()));
        sums.push(digits(&hash));
        if let Some(bad) = smoothing.iter().find(|factor| !(factor.is_finite() && **factor > 0.0)) {
            let reason = format!("has the factor {bad}; factors are finite and positive");
            return Err(Problem::tensor(&Part::Smoothing.name(module), reason).at(checkpoint.path()));
        }
    }
    if let Some(permutation) = checkpoint.input_permutation(module)? {
        let mut hash = Xxh3::new();
        permutation.iter().for_each(|&from| hash.update(&(from as i32).to_le_bytes()));
        sums.push(digits(&hash));
    }
    checkpoint.check_module_sum(module, sums)
}

fn check_tensor(checkpoint: &Checkpoint, name: &str, bytes: u64) -> Result<()> {
    let mut hash = Xxh3::new();
    for offset in (0..bytes).step_by(READ_BYTES as usize) {
        let mut buffer = vec![0; READ_BYTES.min(bytes - offset) as usize];
        checkpoint.tensor_bytes(name, offset, &mut buffer)?;
        hash.update(&buffer);
    }
    checkpoint.check_tensor_sum(name, digits(&hash))
}

/// Returns whether a kept tensor is that of the source, divided by a smoothing vector if one is folded into it.
fn is_as_planned(
    checkpoint: &Checkpoint,
    name: &str,
    bytes: u64,
    source: &dyn Source,
    tensor: usize,
) -> Result<bool> {
    let info = &source.tensors()[tensor];
    let owner = [".weight", ".bias"].into_iter().find_map(|suffix| name.strip_suffix(suffix));
    let divisors = match owner {
        Some(owner) if info.shape.len() == 1 => checkpoint.folded_divisors(owner, info.columns())?,
        _ => None,
    };
    let Some(divisors) = divisors else { return is_unchanged(checkpoint, name, bytes, source, tensor) };
    if bytes != (info.columns() * info.kept.bitsize() / 8) as u64 || !is_weight_type(info.kept) {
        return Ok(false);
    }
    let (mut theirs, mut ours, mut stored) =
        (vec![0.0; info.columns()], vec![0.0; info.columns()], vec![0; bytes as usize]);
    source.read_rows(tensor, 0..1, &mut theirs)?;
    checkpoint.tensor_bytes(name, 0, &mut stored)?;
    decode(info.kept, &stored, &mut ours);
    // One rounding in the tensor's type.
    let within = if info.kept.bitsize() == 32 { 1e-6 } else { 1.0 / 128.0 };
    let expected = theirs.iter().zip(&divisors).map(|(value, divisor)| value / divisor);
    Ok(expected.zip(ours).all(|(expected, ours)| (ours - expected).abs() <= within * expected.abs()))
}

/// Returns whether a tensor has the bytes that the source would keep.
fn is_unchanged(
    checkpoint: &Checkpoint,
    name: &str,
    bytes: u64,
    source: &dyn Source,
    tensor: usize,
) -> Result<bool> {
    let info = &source.tensors()[tensor];
    let row = info.kept_row_bytes();
    if (info.rows() as u64).saturating_mul(row as u64) != bytes {
        return Ok(false);
    }
    let step = (READ_BYTES as usize / row.max(1)).max(1);
    for start in (0..info.rows()).step_by(step) {
        let rows = start..info.rows().min(start + step);
        let mut theirs = vec![0; rows.len() * row];
        let mut ours = theirs.clone();
        source.read_kept(tensor, rows.clone(), &mut theirs)?;
        checkpoint.tensor_bytes(name, (rows.start * row) as u64, &mut ours)?;
        if ours != theirs {
            return Ok(false);
        }
    }
    Ok(true)
}
