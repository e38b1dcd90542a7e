//! GPTQ checkpoints of AutoGPTQ and GPTQModel, with or without activation order.
//!
//! | tensor | type | shape | |
//! |---|---|---|---|
//! | `P.qweight` | I32 | `[⌈k/8⌉, n]` | code 8r + i along K in bits 4i of row r |
//! | `P.qzeros` | I32 | `[groups, ⌈n/8⌉]` | zero 8c + i along n in bits 4i; one less than the zero in version 1 |
//! | `P.scales` | float | `[groups, n]` | |
//! | `P.g_idx` | I32 | `[k]` | optional: the group of each column |
//!
//! A weight is `(code − zero) · scale`.

use serde_json::Value;

use super::words::{CODES, code, matrix, words};
use super::{Found, Parts};
use crate::error::Problem;

/// Checks the configuration, and returns what is added to stored zeros.
pub(super) fn check(config: &Value) -> Result<u8, Problem> {
    let refuse =
        |what: String| Err(Problem::Unsupported { what, remedy: "quantize the original checkpoint" });
    match config.get("bits").and_then(Value::as_u64) {
        Some(4) => {}
        other => return refuse(format!("GPTQ weights with {other:?} bits; 4 expected")),
    }
    match config.get("checkpoint_format").and_then(Value::as_str).unwrap_or("gptq") {
        "gptq" => Ok(1),
        "gptq_v2" => Ok(0),
        other => refuse(format!("the GPTQ checkpoint format {other:?}")),
    }
}

pub(super) fn find(parts: &Parts<'_>) -> Result<Vec<Found>, Problem> {
    let mut all = Vec::new();
    for (module, codes) in parts.with_suffix(".qweight") {
        let scales = parts.required(&module, ".scales")?;
        let zeros = parts.required(&module, ".qzeros")?;
        let group_index = parts.optional(&module, ".g_idx");
        let [groups, n] = parts.matrix_shape(scales)?;
        let [rows, _] = parts.matrix_shape(codes)?;
        // K is a multiple of 8 in this format, and in every layer that was quantized with it.
        let k = rows.checked_mul(CODES).ok_or_else(|| parts.wrong_shape(codes, "[k/8, n]"))?;
        parts.expect(codes, &[rows, n])?;
        parts.expect(zeros, &[groups, n.div_ceil(CODES)])?;
        let found = Found::new(module, [n, k], groups, [codes, scales]);
        all.push(Found { zeros: Some(zeros), group_index, ..found });
    }
    Ok(all)
}

/// Unpacks codes to `[n, k]`.
pub(super) fn codes(bytes: &[u8], n: usize, k: usize) -> Vec<u8> {
    let words = words(bytes);
    matrix(n, k, |row, column| code(words[column / CODES * n + row], column % CODES))
}

/// Unpacks zeros to `[n, groups]`, and adds `more` to each.
pub(super) fn zeros(bytes: &[u8], n: usize, groups: usize, more: u8) -> Vec<u8> {
    let (words, columns) = (words(bytes), n.div_ceil(CODES));
    matrix(n, groups, |row, group| code(words[group * columns + row / CODES], row % CODES) + more)
}
