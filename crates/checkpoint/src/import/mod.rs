//! Weights that other quantizers have quantized to four bits. Each format is a file.

use serde_json::Value;

use crate::error::{Problem, Result};
use crate::source::Source;
use crate::source::SafetensorsModel;

/// Codes, scales and zeros of a matrix that another quantizer has quantized.
///
/// The weight of (`channel`, `column`) is `(code − zero) · scale` of its group.
#[derive(Clone, Debug, Default)]
pub struct Imported {
    /// Codes, 0 to 15, row-major `[n, k]`.
    pub codes: Vec<u8>,
    /// Columns in a group. The last group may be shorter.
    pub group: usize,
    /// Scales, row-major `[n, groups]`.
    pub scales: Vec<f32>,
    /// Zeros, 0 to 16, row-major `[n, groups]`.
    pub zeros: Vec<u8>,
    /// If the columns are sorted by group: the activation that each column multiplies.
    pub permutation: Option<Vec<i32>>,
}

/// Returns the model, read through the importer of its format if another quantizer has quantized it.
pub(crate) fn wrap(model: SafetensorsModel) -> Result<Box<dyn Source>> {
    let path = model.path().to_owned();
    let method = model.config().get("quantization_config").and_then(|config| config.get("quant_method"));
    let refuse = |what: &str, remedy: &'static str| {
        Err(Problem::Unsupported { what: what.to_owned(), remedy }.at(&path))
    };
    let Some(method) = method else { return Ok(Box::new(model)) };
    match method.as_str() {
        Some("fp8") => Ok(Box::new(model)),
        Some("liquidgemm") => refuse("this model is packed already", "quantize the original"),
        Some("mxfp4") => refuse(
            "MXFP4 weights are floating-point codes (e2m1), which no integer scale maps to the packed format's integers",
            "quantize the original checkpoint",
        ),
        Some("modelopt") => refuse(
            "NVFP4 and other ModelOpt weights are floating-point codes, which no integer scale maps to the packed format's integers",
            "quantize the original checkpoint",
        ),
        _ => refuse(
            &format!("the model is quantized by {}", Value::to_string(method)),
            "quantize the original checkpoint",
        ),
    }
}
