//! The brick: a packed tile of 64 channels × 64 K of 4-bit codes, and the pairs that belong to its channels.
//!
//! The functions here are the only definition of the layout, for host and device.
//! The codes lie in the order of wgmma's A operand (`m64nNk32`, from registers).
//! Each of a warpgroup's 128 threads finds its A fragment in 16 contiguous bytes:
//! the 32 codes for the brick's two `k32` MMAs.
//!
//! With warp `w`, `g = lane / 4` and `c = lane % 4`, thread `t` owns bytes `16 t .. 16 t + 16`.
//! They are four little-endian words:
//!
//! | word | MMA | channel | k in low nibbles | k in high nibbles |
//! |---|---|---|---|---|
//! | 0 | 0 | `16 w + g` | `4 c ..` | `16 + 4 c ..` |
//! | 1 | 0 | `16 w + g + 8` | `4 c ..` | `16 + 4 c ..` |
//! | 2 | 1 | `16 w + g` | `32 + 4 c ..` | `48 + 4 c ..` |
//! | 3 | 1 | `16 w + g + 8` | `32 + 4 c ..` | `48 + 4 c ..` |
//!
//! Pairs are stored apart from the codes, once per group and channel.
//! Those of a group take 128 bytes for the 64 channels of a strip.
//! For each warp and each `g` they hold four bytes:
//! `[s, a]` of channel `16 w + g`, then `[s, a]` of channel `16 w + g + 8`.

/// Output channels (rows of W) per brick. This is also the height of a strip.
pub const BRICK_CHANNELS: usize = 64;
/// Elements along K per brick. This is also the smallest quantization group.
pub const BRICK_K: usize = 64;
/// Bytes of 4-bit codes per brick.
pub const CODE_BYTES: usize = BRICK_CHANNELS * BRICK_K / 2;
/// Bytes of the `(s, a)` pairs of one group, for the 64 channels of a strip.
pub const PAIR_BYTES: usize = BRICK_CHANNELS * 2;
/// Bytes of a brick's codes and one set of pairs.
pub const BRICK_BYTES: usize = CODE_BYTES + PAIR_BYTES;
/// The largest K whose sums of products of int8 weights and int8 activations fit int32.
/// One sum does not fit: that of 131,072 products (−128) · (−128).
pub const MAX_K: usize = 131_072;

const _: () = assert!(
    CODE_BYTES.is_multiple_of(16) && PAIR_BYTES.is_multiple_of(16),
    "bulk copies move multiples of 16 bytes"
);
const _: () = assert!((MAX_K as u64) * 128 * 128 <= 1 << 31, "int32 accumulators must not wrap");

/// Returns the number of 64-channel strips that hold `n` channels. The last strip is padded.
pub const fn strips(n: usize) -> usize {
    n.div_ceil(BRICK_CHANNELS)
}

/// Returns the number of blocks of 64 along K that hold `k` elements. The last block is padded.
pub const fn k_blocks(k: usize) -> usize {
    k.div_ceil(BRICK_K)
}

/// Returns the bytes of the codes `[strips, k_blocks, 2048]` of `[n, k]` weights.
/// Returns `None` if the size exceeds `usize`.
///
/// Bricks are ordered with K fastest, so the codes of a strip are contiguous.
pub const fn codes_bytes(n: usize, k: usize) -> Option<usize> {
    bytes(strips(n), k_blocks(k), CODE_BYTES)
}

/// Returns the bytes of the pairs `[strips, groups, 128]` of `n` channels with `groups` groups each.
/// Returns `None` if the size exceeds `usize`.
pub const fn pairs_bytes(n: usize, groups: usize) -> Option<usize> {
    bytes(strips(n), groups, PAIR_BYTES)
}

const fn bytes(strips: usize, count: usize, each: usize) -> Option<usize> {
    match strips.checked_mul(count) {
        Some(count) => count.checked_mul(each),
        None => None,
    }
}

/// Returns the position of the code of (`channel`, `k`) in its brick:
/// the byte, and whether the code is in the high nibble.
///
/// Both arguments are positions in the brick, below 64.
pub const fn code_position(channel: usize, k: usize) -> (usize, bool) {
    debug_assert!(channel < BRICK_CHANNELS && k < BRICK_K);
    let (warp, row_half, g) = (channel / 16, channel / 8 % 2, channel % 8);
    let (mma, high, c, byte_in_word) = (k / 32, k / 16 % 2, k / 4 % 4, k % 4);
    let thread = warp * 32 + g * 4 + c;
    let word = mma * 2 + row_half;
    (thread * 16 + word * 4 + byte_in_word, high == 1)
}

/// Returns the position (`channel`, `k`) in the brick of the code at `byte`, in the high or the low nibble.
/// It is the inverse of [`code_position`].
pub const fn code_at(byte: usize, high: bool) -> (usize, usize) {
    debug_assert!(byte < CODE_BYTES);
    let (thread, word, byte_in_word) = (byte / 16, byte / 4 % 4, byte % 4);
    let (warp, g, c) = (thread / 32, thread / 4 % 8, thread % 4);
    let (mma, row_half) = (word / 2, word % 2);
    (warp * 16 + row_half * 8 + g, mma * 32 + (high as usize) * 16 + c * 4 + byte_in_word)
}

/// Returns the byte offset of the pair of `channel` (below 64) among a group's pairs.
/// `s` is at this offset, `a` one byte later.
pub const fn pair_offset(channel: usize) -> usize {
    debug_assert!(channel < BRICK_CHANNELS);
    let (warp, row_half, g) = (channel / 16, channel / 8 % 2, channel % 8);
    4 * (warp * 8 + g) + 2 * row_half
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_channel_and_k_maps_to_its_own_nibble_and_back() {
        let mut taken = [[false; 2]; CODE_BYTES];
        for channel in 0..BRICK_CHANNELS {
            for k in 0..BRICK_K {
                let (byte, high) = code_position(channel, k);
                assert!(!core::mem::replace(&mut taken[byte][high as usize], true), "nibble taken twice");
                assert_eq!(code_at(byte, high), (channel, k));
            }
        }
        assert!(taken.iter().flatten().all(|&nibble| nibble), "no nibble may stay unused");
    }

    #[test]
    fn a_thread_finds_its_wgmma_fragment_in_sixteen_contiguous_bytes() {
        // Written from the A fragment's figure in the PTX manual, not from the functions under test.
        for warp in 0..4 {
            for lane in 0..32 {
                let (g, c) = (lane / 4, lane % 4);
                let base = (warp * 32 + lane) * 16;
                for mma in 0..2 {
                    for register in 0..4 {
                        // Registers 0 and 2 hold row g; 1 and 3 hold row g + 8.
                        // Registers 2 and 3 hold k from 16 on.
                        let channel = 16 * warp + g + 8 * (register % 2);
                        for j in 0..4 {
                            let k = 32 * mma + 16 * (register / 2) + 4 * c + j;
                            let word = 2 * mma + register % 2;
                            assert_eq!(code_position(channel, k), (base + 4 * word + j, register >= 2));
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn pairs_fill_their_bytes_without_overlap() {
        let mut taken = [false; PAIR_BYTES / 2];
        for channel in 0..BRICK_CHANNELS {
            let offset = pair_offset(channel);
            assert!(offset + 2 <= PAIR_BYTES && offset.is_multiple_of(2));
            assert!(!core::mem::replace(&mut taken[offset / 2], true));
        }
        assert!(taken.iter().all(|&pair| pair));
    }

    #[test]
    fn one_word_of_pairs_serves_rows_g_and_g_plus_eight() {
        for warp in 0..4 {
            for g in 0..8 {
                let word = 4 * (warp * 8 + g);
                assert_eq!(pair_offset(16 * warp + g), word);
                assert_eq!(pair_offset(16 * warp + g + 8), word + 2);
            }
        }
    }

    #[test]
    fn padding_rounds_up_to_whole_bricks() {
        assert_eq!((strips(1), strips(64), strips(65)), (1, 1, 2));
        assert_eq!((k_blocks(1), k_blocks(64), k_blocks(MAX_K)), (1, 1, 2048));
        assert_eq!((codes_bytes(65, 65), pairs_bytes(65, 3)), (Some(4 * CODE_BYTES), Some(6 * PAIR_BYTES)));
        assert_eq!((codes_bytes(usize::MAX, MAX_K), pairs_bytes(usize::MAX, 64)), (None, None));
    }

    proptest! {
        #[test]
        fn bricks_cover_all_weights_and_no_more(n in 1usize..2000, k in 1usize..5000) {
            let (strips, k_blocks) = (strips(n), k_blocks(k));
            prop_assert!((strips - 1) * 64 < n && n <= strips * 64);
            prop_assert!((k_blocks - 1) * 64 < k && k <= k_blocks * 64);
            prop_assert_eq!(codes_bytes(n, k), Some(strips * k_blocks * 2048));
        }
    }
}
