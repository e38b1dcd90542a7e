//! AWQ checkpoints of AutoAWQ, version `gemm`.
//!
//! | tensor | type | shape | |
//! |---|---|---|---|
//! | `P.qweight` | I32 | `[k, n/8]` | codes along n, in the order of [`ORDER`] |
//! | `P.qzeros` | I32 | `[groups, n/8]` | zeros in the same order |
//! | `P.scales` | float | `[groups, n]` | |
//!
//! A weight is `(code − zero) · scale`.

use serde_json::Value;

use super::words::{CODES, code, matrix, words};
use super::{Found, Parts};
use crate::error::Problem;

/// The position in a word of channel 8c + i. Bits 0, 4, 8 … hold the channels 0, 2, 4, 6, 1, 3, 5, 7.
const ORDER: [usize; CODES] = [0, 4, 1, 5, 2, 6, 3, 7];

/// Checks the configuration.
pub(super) fn check(config: &Value) -> Result<(), Problem> {
    let refuse =
        |what: String| Err(Problem::Unsupported { what, remedy: "quantize the original checkpoint" });
    match config.get("bits").and_then(Value::as_u64) {
        Some(4) => {}
        other => return refuse(format!("AWQ weights with {other:?} bits; 4 expected")),
    }
    match config.get("version").and_then(Value::as_str).unwrap_or("gemm").to_ascii_lowercase().as_str() {
        "gemm" => Ok(()),
        other => refuse(format!("the AWQ version {other:?}; only gemm can be read")),
    }
}

pub(super) fn find(parts: &Parts<'_>) -> Result<Vec<Found>, Problem> {
    let mut all = Vec::new();
    for (module, codes) in parts.with_suffix(".qweight") {
        let scales = parts.required(&module, ".scales")?;
        let zeros = parts.required(&module, ".qzeros")?;
        let [groups, n] = parts.matrix_shape(scales)?;
        let [k, _] = parts.matrix_shape(codes)?;
        if !n.is_multiple_of(CODES) {
            return Err(parts.wrong_shape(scales, "[groups, n] with n a multiple of 8"));
        }
        parts.expect(codes, &[k, n / CODES])?;
        parts.expect(zeros, &[groups, n / CODES])?;
        all.push(Found { zeros: Some(zeros), ..Found::new(module, [n, k], groups, [codes, scales]) });
    }
    Ok(all)
}

/// Unpacks codes to `[n, k]`.
pub(super) fn codes(bytes: &[u8], n: usize, k: usize) -> Vec<u8> {
    unpacked(bytes, n, k)
}

/// Unpacks zeros to `[n, groups]`.
pub(super) fn zeros(bytes: &[u8], n: usize, groups: usize) -> Vec<u8> {
    unpacked(bytes, n, groups)
}

fn unpacked(bytes: &[u8], n: usize, columns: usize) -> Vec<u8> {
    let (words, width) = (words(bytes), n / CODES);
    matrix(n, columns, |row, column| code(words[column * width + row / CODES], ORDER[row % CODES]))
}
