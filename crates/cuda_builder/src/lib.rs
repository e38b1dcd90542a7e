//! Builds a Rust device crate to PTX.
