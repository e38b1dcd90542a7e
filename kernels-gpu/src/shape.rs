//! A kernel's tile shape as a type, so that everything that depends on the shape is a compile-time constant.
//!
//! The compiler then drops unused code before code generation.
//! The shapes are those of `liquidgemm_format::tile`, which the host uses too.

use liquidgemm_format::tile::TileShape;

/// A type that stands for the tile shape of a kernel.
pub trait Shape: Copy {
    /// The tile shape.
    const SHAPE: TileShape;

    /// Whether a tile may have far fewer tokens than its shape, as those of a small expert.
    ///
    /// The epilogue then leaves out rounds without tokens.
    const SKIPS_ROUNDS: bool = false;
}
