//! The order of packed weights in device memory.
//!
//! Strips follow one another. Within a strip, its K-tiles (128 along K) follow one another.
//! Each has the layout that it has in shared memory, so one bulk copy loads it.
//! `host/src/gpu/stream.rs` writes this order, and the producers in `kernels-gpu` read it.
//!
//! A K-tile is the codes of its two bricks, followed by the pairs of both.
//! If both bricks always have the same pairs, only those of the first are stored.
//! If a group is the whole channel, its pairs lie once, at the start of the strip.
//! The last K-tile is always complete: if the number of bricks is odd, zeros follow the last brick.

use crate::brick::PAIR_BYTES;
use crate::tile::{K_TILE_BRICKS, STRIP_K_TILE_CODE_BYTES};

/// The layout of the strips of weights with a given number of bricks along K.
///
/// The host computes everything that the kernels need, so that they only read constants.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WeightStream {
    /// K-tiles per strip.
    pub k_tiles: u32,
    /// Bytes of one strip's K-tile: codes, then pairs.
    pub k_tile_bytes: u32,
    /// Bytes per strip.
    pub strip_bytes: u32,
    /// Bytes from the pairs of a K-tile's first brick to those of the second.
    /// 0 if both bricks have the same pairs.
    pub second_pairs: u32,
    /// Bytes of pairs at the start of a strip.
    pub channel_pairs: u32,
}

impl WeightStream {
    /// Returns the layout for `k_blocks` bricks along K.
    /// Each `group_blocks` consecutive bricks share their pairs.
    #[must_use]
    pub const fn new(k_blocks: u32, group_blocks: u32) -> Self {
        let pair = PAIR_BYTES as u32;
        let (channel_pairs, k_tile_pairs, second_pairs) = if group_blocks >= k_blocks {
            (pair, 0, 0)
        } else if group_blocks.is_multiple_of(K_TILE_BRICKS) {
            (0, pair, 0)
        } else {
            (0, 2 * pair, pair)
        };
        let k_tiles = k_blocks.div_ceil(K_TILE_BRICKS);
        let k_tile_bytes = STRIP_K_TILE_CODE_BYTES + k_tile_pairs;
        Self {
            k_tiles,
            k_tile_bytes,
            strip_bytes: channel_pairs + k_tiles * k_tile_bytes,
            second_pairs,
            channel_pairs,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strip_bytes_include_the_pairs_that_the_group_size_needs() {
        let strip = |k_blocks, group_blocks| WeightStream::new(k_blocks, group_blocks).strip_bytes;
        assert_eq!(strip(64, 1), 64 * (2048 + 128));
        assert_eq!(strip(64, 2), 64 * 2048 + 32 * 128);
        assert_eq!(strip(64, 3), 64 * (2048 + 128));
        assert_eq!((strip(64, 64), strip(64, 100)), (64 * 2048 + 128, 64 * 2048 + 128));
        assert_eq!((strip(7, 1), strip(7, 2), strip(7, 7)), (4 * 4352, 4 * 4224, 4 * 4096 + 128));
    }
}
