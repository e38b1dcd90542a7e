//! `cargo xtask header`: writes the C header, `crates/liquidgemm-c/include/liquidgemm.h`, with cbindgen.
//!
//! The crate's test `header` makes the header, and compares it with the committed one in CI.

use crate::steps::{cargo, check};

/// Writes the header.
///
/// # Errors
/// Returns one if cbindgen cannot read the sources or the file cannot be written.
pub fn run() -> anyhow::Result<()> {
    let mut test = cargo(["test", "--quiet", "--package", "liquidgemm-c", "--test", "header"]);
    check(test.env("LIQUIDGEMM_WRITE_HEADER", "1"))
}
