//! The epilogue of the kernel for few tokens: adds the warps' sums, scales, adds the bias, rounds and stores.
//!
//! The host twin is `host/src/output.rs`, with the same rounded operations in the same order.
//! `liquidgemm_format::skinny` lays out the sums in shared memory.

use cuda_std::{thread, warp};
use liquidgemm_format::arguments::{SkinnyArguments, output_type};
use liquidgemm_format::skinny::{
    GROUP_TOKENS, M16_CHANNELS, SUMS_BYTES, SUMS_TOKEN_BYTES, SkinnyShape, WARPS,
};
use seq_macro::seq;

use super::{Place, Sums, shape};
use crate::epilogue::{NO_BIAS, element};
use crate::ptx::integer::{add_bias, pack_bf16, pack_f16, scale};
use crate::ptx::mbarrier;
use crate::ptx::memory::{
    load_shared_f32, load_shared_x4, store_global, store_global_u16, store_global_x2, store_global_x4,
    store_shared, store_shared_f32,
};

/// A thread's part of a pass's scales and biases, between global and shared memory.
///
/// They are loaded before the main loop, so that they arrive during it.
#[derive(Clone, Copy)]
pub(super) struct Scales {
    token: f32,
    channel: f32,
    bias: f32,
}

impl Scales {
    /// Loads the scales and biases of the pass that begins with `first_m16_tile`.
    ///
    /// # Safety
    /// The arguments describe valid memory.
    #[inline(always)]
    pub(super) unsafe fn fetch(arguments: &SkinnyArguments, shape: SkinnyShape, first_m16_tile: u32) -> Self {
        let thread = thread::thread_idx_x();
        let channel = first_m16_tile * M16_CHANNELS + thread;
        let n = if thread < shape.channels() { arguments.n } else { 0 };
        let m = if thread < shape.tokens { arguments.m } else { 0 };
        // SAFETY: the arrays have m, n and n elements.
        unsafe {
            Self {
                token: element(arguments.token_scales, thread, m, 0.0),
                channel: element(arguments.weights.channel_scales, channel, n, 0.0),
                bias: element(arguments.bias, channel, n, NO_BIAS),
            }
        }
    }

    /// Stores scales and biases to shared memory, where the thread block can read them after a barrier.
    ///
    /// # Safety
    /// No thread still reads those of another pass.
    #[inline(always)]
    pub(super) unsafe fn store_scales(self, shape: SkinnyShape, place: Place) {
        let thread = place.thread();
        // SAFETY: shared memory has room for each token and channel.
        unsafe {
            if thread < shape.tokens {
                store_shared_f32(place.shared + shape.token_scales_offset() + thread * 4, self.token);
            }
            if thread < shape.channels() {
                let channel = place.shared + shape.channels_offset() + thread * 8;
                store_shared_f32(channel, self.channel);
                store_shared_f32(channel + 4, self.bias);
            }
        }
    }
}

/// Adds the sums of the thread block's warps, scales and stores them.
///
/// The pass has `m16_tiles` m16 tiles from `first_m16_tile` on.
///
/// # Safety
/// The whole thread block calls it.
/// The activation rings are empty, and scales and biases are in shared memory.
#[inline(always)]
pub(super) unsafe fn finish<const M16_TILES: usize, const GROUPS: usize>(
    sums: &Sums<M16_TILES, GROUPS>,
    arguments: &SkinnyArguments,
    place: Place,
    first_m16_tile: u32,
    m16_tiles: u32,
) {
    let shape = const { shape(M16_TILES, GROUPS) };
    // In `mma`'s order a lane has channel g, then g + 8, each at tokens 2·c and 2·c + 1.
    let own = place.activations(shape) + place.lane % 4 * 2 * SUMS_TOKEN_BYTES + place.lane / 4 * 4;
    // After this barrier no lane still reads the ring.
    warp::sync_warp();
    seq!(ROUND in 0..8 {
        if ROUND * shape.sum_m16_tiles() < shape.m16_tiles {
            // SAFETY: the ring has room for this many m16 tiles;
            // a barrier separates all writes from all reads.
            unsafe {
                seq!(M16_TILE in 0..8 {
                    if M16_TILE < M16_TILES && M16_TILE / shape.sum_m16_tiles() == ROUND {
                        seq!(GROUP in 0..4 {
                            if GROUP < GROUPS {
                                let block = M16_TILE % shape.sum_m16_tiles() * GROUPS as u32 + GROUP;
                                let to = own + block * SUMS_BYTES;
                                let [upper, upper_next, lower, lower_next] = sums[M16_TILE][GROUP];
                                store_shared(to, upper.cast_unsigned());
                                store_shared(to + SUMS_TOKEN_BYTES, upper_next.cast_unsigned());
                                store_shared(to + 8 * 4, lower.cast_unsigned());
                                store_shared(to + 8 * 4 + SUMS_TOKEN_BYTES, lower_next.cast_unsigned());
                            }
                        });
                    }
                });
                thread::sync_threads();
                let done = ROUND * shape.sum_m16_tiles();
                let first_m16_tile = first_m16_tile + done;
                let m16_tiles = m16_tiles.saturating_sub(done).min(shape.sum_m16_tiles());
                let mut block = place.warp;
                while block < m16_tiles * GROUPS as u32 {
                    finish_block::<GROUPS>(arguments, shape, place, [first_m16_tile, done], block);
                    block += WARPS;
                }
                // The next writes here may be TMA's.
                mbarrier::fence_async();
            }
            thread::sync_threads();
        }
    });
}

/// Adds, scales and stores 16 channels × 8 tokens. Each lane has four channels of a token.
///
/// # Safety
/// The whole warp calls it; the sums of all warps are in shared memory.
#[inline(always)]
unsafe fn finish_block<const GROUPS: usize>(
    arguments: &SkinnyArguments,
    shape: SkinnyShape,
    place: Place,
    [first_m16_tile, m16_tiles_done]: [u32; 2],
    block: u32,
) {
    let (m16_tile, group) = (block / GROUPS as u32, block % GROUPS as u32);
    // Eight neighbouring lanes read tokens t and t + 4, whose rows lie in different banks.
    let row = place.lane / 8 + place.lane / 4 % 2 * 4;
    let quad = place.lane % 4;
    let token = group * GROUP_TOKENS + row;
    let from = place.shared + block * SUMS_BYTES + row * SUMS_TOKEN_BYTES + quad * 16;
    const { assert!(WARPS == 8) };
    let mut sums = [0u32; 4];
    seq!(WARP in 0..8 {
        // SAFETY: each warp's sums lie in its activation ring.
        let more = unsafe { load_shared_x4(from + WARP * shape.activation_ring_bytes()) };
        seq!(I in 0..4 { sums[I] = sums[I].wrapping_add(more[I]); });
    });
    if token >= arguments.m {
        return;
    }
    let channel = (first_m16_tile + m16_tile) * M16_CHANNELS + quad * 4;
    let index = token as u64 * arguments.output_stride as u64 + channel as u64;
    let channels =
        place.shared + shape.channels_offset() + ((m16_tiles_done + m16_tile) * M16_CHANNELS + quad * 4) * 8;
    let results = Results { channel, n: arguments.n };
    // SAFETY: scales and biases are in shared memory.
    // The output has the element at `index` and the rest of its row.
    unsafe {
        if arguments.output_type == output_type::I32 {
            results.store_words(arguments.output + index * 4, sums);
            return;
        }
        let token_scale = load_shared_f32(place.shared + shape.token_scales_offset() + token * 4);
        let [scale0, bias0, scale1, bias1] = load_shared_x4(channels).map(f32::from_bits);
        let [scale2, bias2, scale3, bias3] = load_shared_x4(channels + 16).map(f32::from_bits);
        let value = |sum: u32, channel_scale: f32, bias: f32| {
            add_bias(scale(sum.cast_signed(), channel_scale, token_scale), bias)
        };
        let values = [
            value(sums[0], scale0, bias0),
            value(sums[1], scale1, bias1),
            value(sums[2], scale2, bias2),
            value(sums[3], scale3, bias3),
        ];
        let [a, b, c, d] = values;
        match arguments.output_type {
            output_type::BF16 => {
                results.store_halves(arguments.output + index * 2, [pack_bf16(a, b), pack_bf16(c, d)]);
            }
            output_type::F16 => {
                results.store_halves(arguments.output + index * 2, [pack_f16(a, b), pack_f16(c, d)]);
            }
            _ => results.store_words(arguments.output + index * 4, values.map(f32::to_bits)),
        }
    }
}

/// The position of four neighbouring results in a token's row of n channels.
#[derive(Clone, Copy)]
struct Results {
    channel: u32,
    n: u32,
}

impl Results {
    /// Stores four elements of 4 bytes, as far as they lie in the row.
    ///
    /// # Safety
    /// `address` is that of the first element, which lies in the row or behind its end.
    #[inline(always)]
    pub(super) unsafe fn store_words(self, address: u64, words: [u32; 4]) {
        // SAFETY: only elements in the row are stored, and 16 bytes at once only if they are aligned.
        unsafe {
            if self.channel + 4 <= self.n && address.is_multiple_of(16) {
                store_global_x4(address, words);
            } else {
                seq!(I in 0..4 {
                    if self.channel + I < self.n {
                        store_global(address + I * 4, words[I]);
                    }
                });
            }
        }
    }

    /// Stores four elements of 2 bytes, as far as they lie in the row.
    ///
    /// # Safety
    /// As for [`store_words`](Self::store_words).
    #[inline(always)]
    pub(super) unsafe fn store_halves(self, address: u64, pairs: [u32; 2]) {
        // SAFETY: only elements in the row are stored, and 8 bytes at once only if they are aligned.
        unsafe {
            if self.channel + 4 <= self.n && address.is_multiple_of(8) {
                store_global_x2(address, pairs);
            } else {
                let results = [pairs[0], pairs[0] >> 16, pairs[1], pairs[1] >> 16];
                seq!(I in 0..4 {
                    if self.channel + I < self.n {
                        store_global_u16(address + I * 2, results[I]);
                    }
                });
            }
        }
    }
}
