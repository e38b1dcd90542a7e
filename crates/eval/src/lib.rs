//! Runs real models with W4A8 linear layers against their float run, and records what quantizers calibrate with.
//!
//! | task | start at |
//! |---|---|
//! | read a model: a Hugging Face folder or a GGUF file | [`Model::open`] |
//! | make its linear layers by some method | [`Recipe::layers`] |
//! | compare them with the float run | [`evaluate::score`], [`evaluate::layer_errors`] |
//! | record second moments of the layers' inputs | [`evaluate::calibrate`], [`Calibration`] |
//! | write figures as a table or a page | [`report`] |
//! | texts that ship with the crate | [`texts`] |
//!
//! Models are sentence encoders of the BERT family, and causal language models of the LLaMA and Qwen2 families.
//! Everything but the quantized layers is f32 on the CPU, by candle.

mod error;
pub mod evaluate;
pub mod layers;
pub mod model;
mod moments;
mod ops;
mod recipe;
pub mod report;
mod source;
pub mod texts;
mod tokenizer;

pub use error::{Error, SUPPORTED};
pub use liquidgemm_checkpoint::Smoothing;
pub use model::Model;
pub use moments::{Calibration, Moments, Recorder};
pub use recipe::{Method, Recipe};

/// Where a longer computation reports how far it is.
pub trait Progress {
    /// Work of `steps` steps begins.
    fn begin(&self, what: &'static str, steps: usize);
    /// One step is done.
    fn step(&self);
}

/// Reports nothing.
impl Progress for () {
    fn begin(&self, _: &'static str, _: usize) {}
    fn step(&self) {}
}
