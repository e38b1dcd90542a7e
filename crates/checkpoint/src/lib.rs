//! Whole models in and out of packed 4-bit weights.
//!
//! [`open`] reads a Hugging Face folder, a safetensors file or a GGUF file, and checks every header.
//! [`Plan::new`] chooses the linear layers, and [`Plan::run`] writes a complete folder with them packed:
//! shard by shard, in bounded memory, resumable. [`Checkpoint`] reads such a folder.
//!
//! | task | start at |
//! |---|---|
//! | quantize a model | [`open`], [`Plan::new`], [`Plan::run`] |
//! | rotate a model before it is quantized | [`Rotated::new`], and [`Plan::new`] with it |
//! | load a packed layer | [`Checkpoint::open`], [`Checkpoint::linear`] |
//! | load a rank's part of a layer | [`Checkpoint::packed_shard`] |
//! | check a packed model, also against its original | [`verify`] |
//! | compare two models | [`compare`] |
//!
//! In a shard of the output, a module `P` has these tensors in place of `P.weight`:
//!
//! | tensor | type | shape | |
//! |---|---|---|---|
//! | `P.weight_codes` | U8 | `[⌈n/64⌉, ⌈k/64⌉, 2048]` | bricks of 4-bit codes |
//! | `P.weight_pairs` | U8 | `[⌈n/64⌉, groups, 128]` | `(s, a)` of each group |
//! | `P.weight_scales` | F32 | `[n]` | channel scales |
//! | `P.smoothing` | F32 | `[k]` | optional: activations are divided by it |
//! | `P.input_permutation` | I32 | `[k]` | optional: packed column `j` multiplies activation `input_permutation[j]` |
//!
//! So a rank's part is a plain slice: strips along the first dimension for channels, bricks along the second for K.

mod calibration;
mod checkpoint;
mod compare;
mod error;
mod files;
mod format;
mod import;
mod method;
mod number;
mod plan;
mod progress;
mod quantize;
mod select;
mod shard_writer;
mod smooth;
mod source;
mod structure;
mod tensor_file;
mod verify;

pub use calibration::{Calibration, CalibrationContent};
pub use checkpoint::{Axis, Checkpoint, Module, Tensor};
pub use compare::{Comparison, Difference, Model, compare};
pub use error::{CheckpointError, Problem, Result};
pub use import::{ImportKind, ImportOutcome, Imported};
pub use method::{Method, QuantizeOptions};
pub use plan::{Fate, Layer, Plan};
pub use progress::Progress;
pub use quantize::Summary;
pub use select::{Kept, Patterns};
pub use smooth::Smoothing;
pub use source::{DequantizedType, OpenOptions, Rotated, SideContents, SideFile, Source, SourceTensor, open};
pub use verify::{Verification, verify};
