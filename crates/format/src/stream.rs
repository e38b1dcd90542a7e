//! How packed weights lie in device memory: strip by strip, and of each strip the spans of 128 along K one behind the other, as shared memory
//! holds them, so that one bulk copy loads a span.
//!
//! A span is the codes of its two bricks, then the pairs of both, or of the first alone where the second's are always the same. A group that is
//! the whole channel has its pairs once, at the beginning of the strip. The last span is whole, too: behind an odd number of bricks follow zeros.

use crate::brick::PAIR_BYTES;
use crate::tile::{SPAN_BRICKS, STRIP_SPAN_CODE_BYTES};

/// The layout of weights with so many bricks along K.
///
/// What the kernels need is computed beforehand: to them it is a constant.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WeightStream {
    /// Spans of a strip.
    pub spans: u32,
    /// Bytes of a span.
    pub span_bytes: u32,
    /// Bytes of a strip.
    pub strip_bytes: u32,
    /// Bytes from the pairs of a span's first brick to those of the second: 0 where both are the same.
    pub second_pairs: u32,
    /// Bytes of pairs at the beginning of a strip.
    pub channel_pairs: u32,
}

impl WeightStream {
    /// For weights with `k_blocks` bricks along K, of which `group_blocks` share a pair.
    #[must_use]
    pub const fn new(k_blocks: u32, group_blocks: u32) -> Self {
        let pair = PAIR_BYTES as u32;
        let (channel_pairs, span_pairs, second_pairs) = if group_blocks >= k_blocks {
            (pair, 0, 0)
        } else if group_blocks.is_multiple_of(SPAN_BRICKS) {
            (0, pair, 0)
        } else {
            (0, 2 * pair, pair)
        };
        let spans = k_blocks.div_ceil(SPAN_BRICKS);
        let span_bytes = STRIP_SPAN_CODE_BYTES + span_pairs;
        Self {
            spans,
            span_bytes,
            strip_bytes: channel_pairs + spans * span_bytes,
            second_pairs,
            channel_pairs,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_take_what_their_groups_need() {
        let strip = |k_blocks, group_blocks| WeightStream::new(k_blocks, group_blocks).strip_bytes;
        assert_eq!(strip(64, 1), 64 * (2048 + 128));
        assert_eq!(strip(64, 2), 64 * 2048 + 32 * 128);
        assert_eq!(strip(64, 3), 64 * (2048 + 128));
        assert_eq!((strip(64, 64), strip(64, 100)), (64 * 2048 + 128, 64 * 2048 + 128));
        assert_eq!((strip(7, 1), strip(7, 2), strip(7, 7)), (4 * 4352, 4 * 4224, 4 * 4096 + 128));
    }
}
