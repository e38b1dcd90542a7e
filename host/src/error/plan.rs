//! Errors of making a plan.

use liquidgemm_format::brick::BRICK_CHANNELS;

/// The reason why a plan cannot be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// A value does not fit the kernels' 32-bit arguments, or a kernel's number of tokens.
    #[error("{what} is {value}; the GPU kernels take at most {limit}")]
    OutOfRange {
        /// The value's name.
        what: &'static str,
        /// The value.
        value: usize,
        /// The largest value that fits.
        limit: usize,
    },

    /// A two-launch plan cannot divide the channels at this boundary.
    #[error(
        "{n} channels can't be divided behind the first {boundary}; take a multiple of 64 between 0 and {n}"
    )]
    NoSuchBoundary {
        /// The number of channels requested for the first launch.
        boundary: usize,
        /// The problem's number of channels.
        n: usize,
    },

    /// No skinny kernel has this shape.
    #[error(
        "there is no kernel for passes of {} channels x {} tokens; \
         liquidgemm_format::skinny::SKINNY_SHAPES lists those that there are",
        shape.channels(), shape.tokens
    )]
    UnknownSkinnyShape {
        /// The shape requested.
        shape: liquidgemm_format::skinny::SkinnyShape,
    },

    /// No kernel has this tile shape.
    #[error(
        "there is no kernel for tiles of {} channels x {} tokens with {} consumers a strip and K shared by {} blocks; \
         liquidgemm_format::tile::TILE_SHAPES lists those that there are",
        u64::from(shape.strips) * BRICK_CHANNELS as u64, shape.tokens, shape.warpgroup_split, shape.cluster_split
    )]
    UnknownTile {
        /// The shape requested.
        shape: liquidgemm_format::tile::TileShape,
    },
}
