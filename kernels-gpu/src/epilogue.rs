//! From the accumulator to the output: scale, add the bias, round, transpose, store.
//!
//! The accumulator's rows are channels while the output's are tokens. 16-bit results are transposed by
//! `stmatrix.trans` through a buffer in shared memory and leave in 16-byte pieces of a token's row; 32-bit
//! results go out directly, eight neighbouring channels at a time.

use liquidgemm_format::arguments::{GemmArguments, output_type};
use liquidgemm_format::brick::BRICK_CHANNELS;
use liquidgemm_format::schedule::TilePosition;
use liquidgemm_format::tile::{CONSUMERS, TileShape};

use crate::partials::sync_consumer;
use crate::pipeline::Shared;
use crate::ptx::integer::{pack_bf16, pack_f16, scale};
use crate::ptx::matrix::{store_transposed_x2, store_transposed_x4};
use crate::ptx::memory::{
    load_global_f32, load_shared_f32x2, load_shared_x4, store_global, store_global_u16, store_global_x4,
    store_shared_f32,
};
use crate::ptx::wgmma::{Accumulator, BlockVisitor};

/// A bias that changes no value, not even −0.0.
const NO_BIAS: f32 = -0.0;

/// What a thread needs to finish its part of a tile. The scales are asked for before the main loop and arrive
/// during it.
pub struct Epilogue<'a> {
    arguments: &'a GemmArguments,
    shape: TileShape,
    buffer: u32,
    token_scales: u32,
    first_token: u32,
    first_channel: u32,
    consumer: u32,
    thread: u32,
    channel_scales: [f32; 2],
    bias: [f32; 2],
    /// Scales of tokens `thread` and `thread + 128` of the tile, for the whole consumer to read.
    own_token_scales: [f32; 2],
}

/// The f32 at `index` of the array at `address`, or `otherwise` past its end or if there is no array.
///
/// # Safety
/// `address` is 0 or an array of `length`.
#[inline(always)]
unsafe fn element(address: u64, index: u32, length: u32, otherwise: f32) -> f32 {
    if address != 0 && index < length {
        // SAFETY: inside the array.
        unsafe { load_global_f32(address + index as u64 * 4) }
    } else {
        otherwise
    }
}

impl<'a> Epilogue<'a> {
    /// Asks for the scales and the bias of a tile.
    ///
    /// # Safety
    /// The arguments describe valid memory.
    #[inline(always)]
    pub unsafe fn prefetch(
        arguments: &'a GemmArguments,
        shared: Shared,
        shape: TileShape,
        position: TilePosition,
        consumer: u32,
        thread: u32,
    ) -> Self {
        let first_token = position.token_tile * shape.tokens;
        let first_channel = (position.channel_tile * CONSUMERS + consumer) * BRICK_CHANNELS as u32;
        let channel = first_channel + thread / 32 * 16 + thread % 32 / 4;
        // SAFETY: the arrays have n, n and m elements.
        unsafe {
            let channel_scale = |index| element(arguments.channel_scales, index, arguments.n, 0.0);
            let bias = |index| element(arguments.bias, index, arguments.n, NO_BIAS);
            let token_scale = |index| {
                let token = first_token + index;
                if index < shape.tokens { element(arguments.token_scales, token, arguments.m, 0.0) } else { 0.0 }
            };
            Self {
                arguments,
                shape,
                buffer: shared.epilogue(consumer),
                token_scales: shared.token_scales(consumer),
                first_token,
                first_channel,
                consumer,
                thread,
                channel_scales: [channel_scale(channel), channel_scale(channel + 8)],
                bias: [bias(channel), bias(channel + 8)],
                own_token_scales: [token_scale(thread), token_scale(thread + 128)],
            }
        }
    }

    /// Writes the tile.
    ///
    /// # Safety
    /// All threads of the consumer call it, and the arguments' output is valid.
    #[inline(always)]
    pub unsafe fn store<A: Accumulator>(&self, accumulator: &mut A) {
        let [first, second] = self.own_token_scales;
        // SAFETY: a consumer's token scales have a place for each token. The first barrier of the next tile's
        // store comes after the last read of this one's.
        unsafe {
            if self.thread < self.shape.tokens {
                store_shared_f32(self.token_scales + self.thread * 4, first);
            }
            if self.thread + 128 < self.shape.tokens {
                store_shared_f32(self.token_scales + (self.thread + 128) * 4, second);
            }
        }
        sync_consumer(self.consumer);
        match self.arguments.output_type {
            output_type::BF16 => accumulator.visit(&mut Transposed::<A, true>::new(self)),
            output_type::F16 => accumulator.visit(&mut Transposed::<A, false>::new(self)),
            output_type::F32 => accumulator.visit(&mut Direct::<true> { epilogue: self }),
            _ => accumulator.visit(&mut Direct::<false> { epilogue: self }),
        }
        // The next tile's token scales may overwrite these.
        sync_consumer(self.consumer);
    }

    /// The block's four results as f32, in the accumulator's order.
    #[inline(always)]
    fn scaled(&self, j: u32, block: &[i32; 4]) -> [f32; 4] {
        let pair = self.thread % 4;
        // SAFETY: the tile's token scales lie there since `store`'s barrier.
        let tokens = unsafe { load_shared_f32x2(self.token_scales + (8 * j + 2 * pair) * 4) };
        [
            scale(block[0], self.channel_scales[0], tokens[0], self.bias[0]),
            scale(block[1], self.channel_scales[0], tokens[1], self.bias[0]),
            scale(block[2], self.channel_scales[1], tokens[0], self.bias[1]),
            scale(block[3], self.channel_scales[1], tokens[1], self.bias[1]),
        ]
    }

    /// The address of an output element of `size` bytes.
    #[inline(always)]
    fn output(&self, token: u32, channel: u32, size: u64) -> u64 {
        let index = token as u64 * self.arguments.output_stride as u64 + channel as u64;
        self.arguments.output + index * size
    }
}

/// 16-bit results, through the transposition buffer: a row of 128 bytes a token, its 16-byte pieces permuted by
/// the token's low bits so that neither side has bank conflicts.
struct Transposed<'a, 'b, A, const BF16: bool> {
    epilogue: &'a Epilogue<'b>,
    /// Where this lane's matrix row of the first two blocks goes.
    row: u32,
    /// The even block's packed results, until the odd one's are there too.
    even: [u32; 2],
    accumulator: core::marker::PhantomData<A>,
}

impl<'a, 'b, A: Accumulator, const BF16: bool> Transposed<'a, 'b, A, BF16> {
    /// Tokens that the buffer holds.
    const BUFFER_TOKENS: u32 = if A::TOKENS < 64 { A::TOKENS } else { 64 };

    #[inline(always)]
    fn new(epilogue: &'a Epilogue<'b>) -> Self {
        let (warp, lane) = (epilogue.thread / 32, epilogue.thread % 32);
        let (matrix, token) = (lane / 8, lane % 8);
        let piece = (warp * 2 + matrix % 2) ^ token;
        let row = epilogue.buffer + (matrix / 2 * 8 + token) * 128 + piece * 16;
        Self { epilogue, row, even: [0; 2], accumulator: core::marker::PhantomData }
    }

    #[inline(always)]
    fn pack(low: f32, high: f32) -> u32 {
        if BF16 { pack_bf16(low, high) } else { pack_f16(low, high) }
    }

    /// Copies the buffer, which holds the tokens from `first_token`, to the output.
    #[inline(always)]
    fn flush(&self, first_token: u32) {
        let epilogue = self.epilogue;
        let arguments = epilogue.arguments;
        let piece = epilogue.thread % 8;
        let channel = epilogue.first_channel + piece * 8;
        let aligned = arguments.output_stride % 8 == 0 && arguments.output % 16 == 0;
        sync_consumer(epilogue.consumer);
        let mut row = epilogue.thread / 8;
        while row < Self::BUFFER_TOKENS {
            let token = first_token + row;
            if token < arguments.m {
                let address = epilogue.output(token, channel, 2);
                // SAFETY: the row lies in the buffer, the elements below m and n in the output.
                unsafe {
                    let words = load_shared_x4(epilogue.buffer + row * 128 + (piece ^ (row % 8)) * 16);
                    if aligned && channel + 8 <= arguments.n {
                        store_global_x4(address, words);
                    } else {
                        store_pairs(address, words, arguments.n.saturating_sub(channel));
                    }
                }
            }
            row += 16;
        }
        sync_consumer(epilogue.consumer);
    }
}

/// Stores the first `count` of eight 16-bit elements one by one.
///
/// # Safety
/// As many elements are valid at `address`.
#[inline(always)]
unsafe fn store_pairs(address: u64, words: [u32; 4], count: u32) {
    // SAFETY: the caller vouches for `count` elements.
    unsafe {
        seq_macro::seq!(I in 0..4 {
            if 2 * I < count {
                store_global_u16(address + 4 * I, words[I]);
            }
            if 2 * I + 1 < count {
                store_global_u16(address + 4 * I + 2, words[I] >> 16);
            }
        });
    }
}

impl<A: Accumulator, const BF16: bool> BlockVisitor for Transposed<'_, '_, A, BF16> {
    #[inline(always)]
    fn block(&mut self, j: u32, block: &mut [i32; 4]) {
        let [a, b, c, d] = self.epilogue.scaled(j, block);
        let packed = [Self::pack(a, b), Self::pack(c, d)];
        let in_buffer = j % (Self::BUFFER_TOKENS / 8);
        // SAFETY: the addresses lie in the consumer's buffer.
        unsafe {
            if A::TOKENS == 8 {
                store_transposed_x2(self.row, packed);
            } else if j % 2 == 1 {
                let [even_upper, even_lower] = self.even;
                let address = self.row + (in_buffer - 1) * 1024;
                store_transposed_x4(address, [even_upper, even_lower, packed[0], packed[1]]);
            }
        }
        self.even = packed;
        if in_buffer == Self::BUFFER_TOKENS / 8 - 1 {
            self.flush(self.epilogue.first_token + (j - in_buffer) * 8);
        }
    }
}

/// 32-bit results, from the registers.
struct Direct<'a, 'b, const SCALED: bool> {
    epilogue: &'a Epilogue<'b>,
}

impl<const SCALED: bool> BlockVisitor for Direct<'_, '_, SCALED> {
    #[inline(always)]
    fn block(&mut self, j: u32, block: &mut [i32; 4]) {
        let epilogue = self.epilogue;
        let lane = epilogue.thread % 32;
        let token = epilogue.first_token + 8 * j + lane % 4 * 2;
        let channel = epilogue.first_channel + epilogue.thread / 32 * 16 + lane / 4;
        let values = if SCALED { epilogue.scaled(j, block).map(f32::to_bits) } else { block.map(|sum| sum as u32) };
        let store = |token: u32, channel: u32, value: u32| {
            if token < epilogue.arguments.m && channel < epilogue.arguments.n {
                // SAFETY: inside the output.
                unsafe { store_global(epilogue.output(token, channel, 4), value) };
            }
        };
        store(token, channel, values[0]);
        store(token + 1, channel, values[1]);
        store(token, channel + 8, values[2]);
        store(token + 1, channel + 8, values[3]);
    }
}
