//! A model whose residual stream is rotated, as in QuaRot (arXiv 2404.00456): it computes the same, but outliers of single channels
//! are spread over the channels of a block, so that weights and activations lose less when they are quantized.
//!
//! With `Q` the block-diagonal Hadamard matrix of [`liquidgemm::rotate`], which is symmetric and its own inverse:
//!
//! | tensor | becomes |
//! |---|---|
//! | embedding `E` | `E Q` |
//! | what reads the stream behind a norm with weight `g`: q, k, v, gate, up, head | `W diag(g) Q` |
//! | what writes it: o, down, and their biases | `Q W`, `Q b` |
//! | weights of norms | 1 |
//!
//! RMSNorm without a weight commutes with `Q`, because `Q` keeps the length of vectors. A head that is tied to the embedding becomes a tensor of its own.

use std::collections::HashSet;
use std::ops::Range;
use std::path::Path;

use liquidgemm::rotate;
use safetensors::tensor::Dtype;
use serde_json::{Map, Value, json};

use super::{SideFile, Source, SourceTensor};
use crate::error::{Problem, Result, weights_error};
use crate::smooth::encode;
use crate::structure::{EMBEDDING, FAMILIES, HEAD, LAST_NORM, READERS, Structure, WRITERS, norms};

/// The most channels of a block. Larger ones would need more memory for rows that are rotated together.
const MOST_BLOCK: usize = 1024;

/// A rotated model. It reads another one and changes its tensors as they are read.
pub struct Rotated<'a> {
    inner: &'a dyn Source,
    config: Map<String, Value>,
    tensors: Vec<SourceTensor>,
    /// Parallel to `tensors`.
    changes: Vec<Change>,
    block: usize,
}

/// How a tensor is made.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Change {
    /// It is the tensor of the model with this index.
    None(usize),
    /// Its rows are multiplied by a norm's weight, if there is one, and rotated.
    Columns { from: usize, norm: Option<usize> },
    /// Its columns are rotated. A vector counts as one column.
    Rows(usize),
    /// It is a norm's weight, and becomes 1.
    Ones,
}

impl<'a> Rotated<'a> {
    /// Rotates a model.
    ///
    /// # Errors
    /// [`CheckpointError::Input`](crate::CheckpointError::Input) if the model's structure is not known, it has tensors that do not belong to that structure,
    /// or its weights are not f32, f16 or bf16.
    pub fn new(inner: &'a dyn Source) -> Result<Self> {
        Self::build(inner).map_err(|problem| problem.at(inner.path()))
    }

    fn build(inner: &'a dyn Source) -> Result<Self, Problem> {
        let unsupported = |what: String, remedy: &'static str| Problem::Unsupported { what, remedy };
        let structure = Structure::of(inner).map_err(|model| {
            let what = format!(
                "a model of the type {model:?} can't be rotated, because it is not known which of its layers read the residual stream; \
                 known are {}",
                FAMILIES.join(", ")
            );
            unsupported(what, "leave --rotate out")
        })?;
        let index =
            |name: &str| structure.tensor(name).ok_or_else(|| Problem::Missing { name: name.to_owned() });
        let embedding = index(EMBEDDING)?;
        let hidden = inner.tensors()[embedding].columns();
        let mut changes: Vec<Change> = (0..inner.tensors().len()).map(Change::None).collect();
        let expect = |tensor: usize, axis: usize| {
            let info = &inner.tensors()[tensor];
            if info.shape.get(axis) == Some(&hidden) {
                return Ok(());
            }
            let reason = format!(
                "has the shape {:?}, which does not fit the embedding's {hidden} channels",
                info.shape
            );
            Err(Problem::tensor(&info.name, reason))
        };
        changes[embedding] = Change::Columns { from: embedding, norm: None };
        for block in 0..structure.blocks() {
            let module = |name: &str, part: &str| format!("model.layers.{block}.{name}.{part}");
            let [first, second] = norms(block);
            let [first, second] = [index(&first)?, index(&second)?];
            for norm in [first, second] {
                expect(norm, 0)?;
                changes[norm] = Change::Ones;
            }
            for (number, reader) in READERS.iter().enumerate() {
                let from = index(&module(reader, "weight"))?;
                expect(from, 1)?;
                changes[from] = Change::Columns { from, norm: Some(if number < 3 { first } else { second }) };
            }
            for writer in WRITERS {
                let from = index(&module(writer, "weight"))?;
                expect(from, 0)?;
                changes[from] = Change::Rows(from);
                if let Some(bias) = structure.tensor(&module(writer, "bias")) {
                    expect(bias, 0)?;
                    changes[bias] = Change::Rows(bias);
                }
            }
        }
        let norm = index(LAST_NORM)?;
        expect(norm, 0)?;
        changes[norm] = Change::Ones;
        let mut tensors = inner.tensors().to_vec();
        match structure.tensor(HEAD) {
            Some(head) => {
                expect(head, 1)?;
                changes[head] = Change::Columns { from: head, norm: Some(norm) };
            }
            None => {
                tensors.push(SourceTensor { name: HEAD.to_owned(), ..tensors[embedding].clone() });
                changes.push(Change::Columns { from: embedding, norm: Some(norm) });
            }
        }
        check_tensors(&tensors, &changes, structure.blocks())?;
        let mut config = inner.config().clone();
        config.insert("tie_word_embeddings".into(), json!(false));
        let block = (1 << hidden.trailing_zeros().min(usize::BITS - 1)).min(MOST_BLOCK);
        Ok(Self { inner, config, tensors, changes, block })
    }

    /// Returns the channels of a block: the largest power of two that divides the model's, at most 1024.
    pub fn block(&self) -> usize {
        self.block
    }

    fn floats(&self, tensor: usize) -> Result<Vec<f32>> {
        let info = &self.inner.tensors()[tensor];
        let mut values = vec![0.0; info.rows() * info.columns()];
        self.inner.read_rows(tensor, 0..info.rows(), &mut values)?;
        Ok(values)
    }

    fn rotate(&self, name: &str, values: &mut [f32], k: usize) -> Result<()> {
        rotate(values, k, self.block).map_err(weights_error(name))
    }
}

/// Checks that changed tensors are floating-point numbers, and that no other tensor could read or write the residual stream.
fn check_tensors(tensors: &[SourceTensor], changes: &[Change], blocks: usize) -> Result<(), Problem> {
    let mut others: HashSet<String> = HashSet::new();
    for block in 0..blocks {
        // Biases behind the readers are added to what does not rotate.
        others.extend(READERS.map(|reader| format!("model.layers.{block}.{reader}.bias")));
        others.insert(format!("model.layers.{block}.self_attn.rotary_emb.inv_freq"));
    }
    others.insert("lm_head.bias".to_owned());
    for (tensor, change) in tensors.iter().zip(changes) {
        let refuse = |reason: &str| Err(Problem::tensor(&tensor.name, reason));
        if tensor.is_imported {
            return refuse("is quantized already; only floating-point weights can be rotated");
        }
        match change {
            Change::None(_) if !others.contains(&tensor.name) => {
                return refuse(
                    "is none of the known structure, so the model can't be rotated; leave --rotate out",
                );
            }
            Change::None(_) => {}
            _ if !tensor.is_readable || !matches!(tensor.kept, Dtype::F32 | Dtype::F16 | Dtype::BF16) => {
                return refuse("is not f32, f16 or bf16; only such weights can be rotated");
            }
            _ => {}
        }
    }
    Ok(())
}

impl Source for Rotated<'_> {
    fn path(&self) -> &Path {
        self.inner.path()
    }

    fn format(&self) -> String {
        format!("{}, rotated in blocks of {}", self.inner.format(), self.block)
    }

    fn config(&self) -> &Map<String, Value> {
        &self.config
    }

    fn tensors(&self) -> &[SourceTensor] {
        &self.tensors
    }

    fn shards(&self) -> &[String] {
        self.inner.shards()
    }

    fn read_rows(&self, tensor: usize, rows: Range<usize>, values: &mut [f32]) -> Result<()> {
        let info = &self.tensors[tensor];
        let columns = info.columns();
        match self.changes[tensor] {
            Change::None(from) => self.inner.read_rows(from, rows, values),
            Change::Ones => {
                values.fill(1.0);
                Ok(())
            }
            Change::Columns { from, norm } => {
                self.inner.read_rows(from, rows, values)?;
                if let Some(norm) = norm {
                    let norm = self.floats(norm)?;
                    for row in values.chunks_exact_mut(columns) {
                        row.iter_mut().zip(&norm).for_each(|(value, factor)| *value *= factor);
                    }
                }
                self.rotate(&info.name, values, columns)
            }
            Change::Rows(from) if info.shape.len() == 1 => {
                let mut all = self.floats(from)?;
                self.rotate(&info.name, &mut all, columns)?;
                values.copy_from_slice(&all[..values.len()]);
                Ok(())
            }
            Change::Rows(from) => {
                if rows.is_empty() {
                    return Ok(());
                }
                // All rows of the blocks in which rows are wanted.
                let needed = rows.start / self.block * self.block..rows.end.next_multiple_of(self.block);
                let mut read = vec![0.0; needed.len() * columns];
                self.inner.read_rows(from, needed.clone(), &mut read)?;
                let mut turned: Vec<f32> = crate::import::transposed(&read, needed.len(), columns);
                self.rotate(&info.name, &mut turned, needed.len())?;
                let read = crate::import::transposed(&turned, columns, needed.len());
                let first = (rows.start - needed.start) * columns;
                values.copy_from_slice(&read[first..first + values.len()]);
                Ok(())
            }
        }
    }

    fn read_kept(&self, tensor: usize, rows: Range<usize>, bytes: &mut [u8]) -> Result<()> {
        if let Change::None(from) = self.changes[tensor] {
            return self.inner.read_kept(from, rows, bytes);
        }
        let info = &self.tensors[tensor];
        let mut values = vec![0.0; rows.len() * info.columns()];
        self.read_rows(tensor, rows, &mut values)?;
        bytes.copy_from_slice(&encode(&values, info.kept));
        Ok(())
    }

    fn rotation(&self) -> Option<usize> {
        Some(self.block)
    }

    fn norm_before(&self, tensor: usize) -> Result<Option<Vec<f32>>> {
        match self.changes[tensor] {
            Change::Columns { norm: Some(norm), .. } => self.floats(norm).map(Some),
            _ => Ok(None),
        }
    }

    fn side_files(&self) -> &[SideFile] {
        self.inner.side_files()
    }

    fn left_out(&self) -> &[(String, String)] {
        self.inner.left_out()
    }

    fn fingerprint(&self) -> String {
        format!("{}\nrotated in blocks of {}", self.inner.fingerprint(), self.block)
    }
}
