//! Compares the weights of two models, packed or not, module by module.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use liquidgemm_format::brick::BRICK_CHANNELS;
use rayon::prelude::*;
use serde_json::Map;

use crate::checkpoint::{Checkpoint, Module, has_packed_modules};
use crate::error::Result;
use crate::progress::Progress;
use crate::source::{self, OpenOptions, Source};
use crate::tensor_file::TensorFile;

/// The bytes of f32 weights that are read at a time, unless 64 channels have more.
const BLOCK_BYTES: usize = 64 << 20;

/// A model of either kind.
pub enum Model {
    /// A packed checkpoint.
    Packed(Box<Checkpoint>),
    /// Any other model.
    Source(Box<dyn Source>),
}

/// How far the weights of a module are from a reference.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Difference {
    /// `‖w − reference‖ / ‖reference‖`, in the Frobenius norm. 0 if both are 0.
    pub relative: f64,
    /// The largest `|w − reference|`.
    pub largest: f64,
}

/// The outcome of [`compare`].
#[derive(Clone, Debug, Default)]
pub struct Comparison {
    /// The matrices of both models with the same shape, sorted by name, with the distance of the second's weights
    /// to the first's.
    pub modules: Vec<(String, Difference)>,
    /// Matrices of both models with different shapes.
    pub shapes_differ: Vec<String>,
    /// Matrices of the first model alone.
    pub only_in_first: Vec<String>,
    /// Matrices of the second model alone.
    pub only_in_second: Vec<String>,
}

impl Model {
    /// Opens a packed checkpoint, or any model that [`open`](crate::open) reads.
    ///
    /// # Errors
    /// As [`Checkpoint::open`] and [`open`](crate::open).
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let is_packed = if path.is_dir() {
            has_packed_modules(path)
        } else {
            TensorFile::open(path).is_ok_and(|file| file.metadata().contains_key(crate::format::METHOD))
        };
        if is_packed {
            return Ok(Model::Packed(Box::new(Checkpoint::open(path)?)));
        }
        Ok(Model::Source(source::open(path, OpenOptions::default())?))
    }

    /// Returns the configuration.
    pub fn config(&self) -> &Map<String, serde_json::Value> {
        match self {
            Model::Packed(checkpoint) => checkpoint.config(),
            Model::Source(source) => source.config(),
        }
    }

    /// Returns readers of all matrices by module.
    pub(crate) fn readers(&self) -> BTreeMap<String, Reader<'_>> {
        match self {
            Model::Packed(checkpoint) => {
                let packed = checkpoint.modules();
                packed.map(|module| (module.name.to_owned(), Reader::packed(checkpoint, module))).collect()
            }
            Model::Source(source) => source_readers(source.as_ref()),
        }
    }
}

/// Returns readers of all matrices of a source by module.
pub(crate) fn source_readers(source: &dyn Source) -> BTreeMap<String, Reader<'_>> {
    let tensors = source.tensors().iter().enumerate();
    let matrices = tensors.filter(|(_, tensor)| tensor.is_readable && tensor.shape.len() == 2);
    let readers = matrices.filter_map(|(index, tensor)| {
        let module = tensor.name.strip_suffix(".weight")?;
        let shape = [tensor.shape[0], tensor.shape[1]];
        Some((module.to_owned(), Reader::Source { source, tensor: index, shape }))
    });
    readers.collect()
}

/// Reads the weights of one module as f32.
#[derive(Clone, Copy)]
pub(crate) enum Reader<'a> {
    Packed { checkpoint: &'a Checkpoint, module: Module<'a> },
    Source { source: &'a dyn Source, tensor: usize, shape: [usize; 2] },
}

impl<'a> Reader<'a> {
    pub(crate) fn packed(checkpoint: &'a Checkpoint, module: Module<'a>) -> Self {
        Reader::Packed { checkpoint, module }
    }

    /// Returns `[n, k]`.
    pub(crate) fn shape(&self) -> [usize; 2] {
        match self {
            Reader::Packed { module, .. } => [module.n, module.k],
            Reader::Source { shape, .. } => *shape,
        }
    }

    /// Reads the weights of some strips, row-major: without smoothing, folded or not, and in the order of the activations.
    fn strips(&self, strips: Range<usize>) -> Result<Vec<f32>> {
        let [n, k] = self.shape();
        match self {
            Reader::Packed { checkpoint, module } => {
                let mut weights = checkpoint.block(module.name, strips.clone())?.dequantize();
                if let Some(divisors) = checkpoint.folded_divisors(module.name, n)? {
                    let divisors = &divisors[strips.start * BRICK_CHANNELS..];
                    for (row, divisor) in weights.chunks_exact_mut(k).zip(divisors) {
                        row.iter_mut().for_each(|weight| *weight *= divisor);
                    }
                }
                let smoothing = checkpoint.smoothing(module.name)?;
                for smoothing in [smoothing, checkpoint.folded_columns(module.name)?].into_iter().flatten() {
                    for row in weights.chunks_exact_mut(k) {
                        row.iter_mut().zip(&smoothing).for_each(|(weight, factor)| *weight /= factor);
                    }
                }
                if let Some(permutation) = checkpoint.input_permutation(module.name)? {
                    for row in weights.chunks_exact_mut(k) {
                        let packed = row.to_vec();
                        permutation.iter().zip(packed).for_each(|(&to, weight)| row[to] = weight);
                    }
                }
                Ok(weights)
            }
            Reader::Source { source, tensor, .. } => {
                let rows = strips.start * BRICK_CHANNELS..n.min(strips.end * BRICK_CHANNELS);
                let mut weights = vec![0.0; rows.len() * k];
                source.read_rows(*tensor, rows, &mut weights)?;
                Ok(weights)
            }
        }
    }
}

impl Checkpoint {
    /// Returns the ranges of strips in which a module is read.
    pub(crate) fn blocks(&self, module: &str) -> Result<Vec<Range<usize>>> {
        let found = self.modules().find(|found| found.name == module);
        let module = found.ok_or_else(|| crate::CheckpointError::NoModule { module: module.to_owned() })?;
        Ok(blocks(module.n, module.k).collect())
    }
}

fn blocks(n: usize, k: usize) -> impl Iterator<Item = Range<usize>> {
    let strips = n.div_ceil(BRICK_CHANNELS);
    let step = (BLOCK_BYTES / size_of::<f32>() / BRICK_CHANNELS / k.max(1)).max(1);
    (0..strips).step_by(step).map(move |start| start..strips.min(start + step))
}

/// Returns the distance of `other` to `reference`, or `None` if their shapes differ.
pub(crate) fn difference(reference: &Reader<'_>, other: &Reader<'_>) -> Result<Option<Difference>> {
    let [n, k] = reference.shape();
    if other.shape() != [n, k] || n == 0 || k == 0 {
        return Ok(None);
    }
    let (mut squares, mut errors, mut largest) = (0.0, 0.0, 0f64);
    for strips in blocks(n, k) {
        let (reference, other) = (reference.strips(strips.clone())?, other.strips(strips)?);
        // Sum up by rows, in order, so that the result does not depend on the number of threads.
        let rows: Vec<[f64; 3]> = reference
            .par_chunks_exact(k)
            .zip(other.par_chunks_exact(k))
            .map(|(reference, other)| {
                let mut sums = [0.0; 3];
                for (&reference, &other) in reference.iter().zip(other) {
                    let error = f64::from(other) - f64::from(reference);
                    sums[0] += f64::from(reference) * f64::from(reference);
                    sums[1] += error * error;
                    sums[2] = f64::max(sums[2], error.abs());
                }
                sums
            })
            .collect();
        for [square, error, most] in rows {
            squares += square;
            errors += error;
            largest = largest.max(most);
        }
    }
    let relative = if errors == 0.0 { 0.0 } else { (errors / squares).sqrt() };
    Ok(Some(Difference { relative, largest }))
}

/// Compares the matrices of two models.
///
/// # Errors
/// If a file can't be read, or a packed module is not valid.
pub fn compare(first: &Model, second: &Model, progress: &dyn Progress) -> Result<Comparison> {
    let (first, second) = (first.readers(), second.readers());
    let weights = |reader: &Reader<'_>| reader.shape().iter().map(|&side| side as u64).product::<u64>();
    let common: Vec<_> =
        first.iter().filter_map(|(name, reader)| Some((name, reader, second.get(name)?))).collect();
    progress.begin(common.iter().map(|(_, reader, _)| weights(reader)).sum());
    let mut result = Comparison::default();
    for (name, reference, other) in common {
        progress.item(name);
        match difference(reference, other)? {
            Some(figures) => result.modules.push((name.clone(), figures)),
            None => result.shapes_differ.push(name.clone()),
        }
        progress.advance(weights(reference));
    }
    let only = |here: &BTreeMap<String, Reader<'_>>, there: &BTreeMap<String, Reader<'_>>| {
        here.keys().filter(|name| !there.contains_key(*name)).cloned().collect()
    };
    result.only_in_first = only(&first, &second);
    result.only_in_second = only(&second, &first);
    Ok(result)
}
