//! compressed-tensors, format `pack-quantized`: int4 weights of llm-compressor, symmetric or not, also with activation order.
//!
//! | tensor | type | shape | |
//! |---|---|---|---|
//! | `P.weight_packed` | I32 | `[n, ⌈k/8⌉]` | code 8c + i in bits 4i of word c |
//! | `P.weight_scale` | float | `[n, groups]` | |
//! | `P.weight_shape` | integer | `[2]` | n and k |
//! | `P.weight_zero_point` | I32 | `[⌈n/8⌉, groups]` | optional: packed along n; 8 without it |
//! | `P.weight_g_idx` | I32 | `[k]` | optional: the group of each column |
//!
//! A weight is `(code − zero) · scale`. The file's codes and zeros are 8 above the signed ones.

use serde_json::Value;

use super::words::{CODES, code, matrix, words};
use super::{Found, Parts};
use crate::error::Problem;
use crate::source::SafetensorsModel;

/// Checks the configuration: every group of modules has int4 weights.
pub(super) fn check(config: &Value) -> Result<(), Problem> {
    let text = |key: &str| config.get(key).and_then(Value::as_str).unwrap_or("(none)");
    let refuse = |what: String, remedy: &'static str| Err(Problem::Unsupported { what, remedy });
    let format = text("format");
    let remedy = "quantize the original checkpoint";
    if format.contains("nvfp4") || format.contains("mxfp4") {
        let what = format!(
            "the format {format:?} has floating-point codes (e2m1), which no integer scale maps to the packed format's integers"
        );
        return refuse(what, remedy);
    }
    if format != "pack-quantized" {
        return refuse(format!("the compressed-tensors format {format:?}"), remedy);
    }
    let groups = config.get("config_groups").and_then(Value::as_object);
    for (name, group) in groups.into_iter().flatten() {
        let weights = group.get("weights");
        let bits = weights.and_then(|weights| weights.get("num_bits")).and_then(Value::as_u64);
        let kind = weights.and_then(|weights| weights.get("type")).and_then(Value::as_str).unwrap_or("int");
        if bits != Some(4) || kind != "int" {
            let what =
                format!("{name} has weights of type {kind} with {bits:?} bits; int with 4 bits expected");
            return refuse(what, remedy);
        }
    }
    Ok(())
}

pub(super) fn find(model: &SafetensorsModel, parts: &Parts<'_>) -> Result<Vec<Found>, Problem> {
    let mut all = Vec::new();
    for (module, codes) in parts.with_suffix(".weight_packed") {
        let scales = parts.required(&module, ".weight_scale")?;
        let shape = parts.required(&module, ".weight_shape")?;
        let zeros = parts.optional(&module, ".weight_zero_point");
        let group_index = parts.optional(&module, ".weight_g_idx");
        let [n, k] = model.read_shape(shape)?;
        let groups = match parts.shape(scales)[..] {
            [rows] if rows == n => 1,
            [rows, groups] if rows == n && groups > 0 => groups,
            _ => return Err(parts.wrong_shape(scales, &format!("[{n}, groups]"))),
        };
        parts.expect(codes, &[n, k.div_ceil(CODES)])?;
        if let Some(zeros) = zeros {
            parts.expect(zeros, &[n.div_ceil(CODES), groups])?;
        }
        let others = vec![shape];
        let found = Found::new(module, [n, k], groups, [codes, scales]);
        all.push(Found { zeros, group_index, others, ..found });
    }
    Ok(all)
}

/// Unpacks codes to `[n, k]`.
pub(super) fn codes(bytes: &[u8], n: usize, k: usize) -> Vec<u8> {
    let (words, columns) = (words(bytes), k.div_ceil(CODES));
    matrix(n, k, |row, column| code(words[row * columns + column / CODES], column % CODES))
}

/// Unpacks zeros to `[n, groups]`.
pub(super) fn zeros(bytes: &[u8], n: usize, groups: usize) -> Vec<u8> {
    let words = words(bytes);
    matrix(n, groups, |row, group| code(words[row / CODES * groups + group], row % CODES))
}
