//! From the accumulator to the output: scale, add the bias, round, transpose, store.
//!
//! The accumulator's rows are channels while the output's are tokens. 16-bit results are transposed by
//! `stmatrix.trans` through a buffer in shared memory and leave in 16-byte pieces of a token's row; 32-bit
//! results go out directly, eight neighbouring channels at a time.

use cuda_std::TensorMap;
use cuda_std::warp::{self, WARP_SIZE};
use liquidgemm_format::arguments::{GemmArguments, output_type};
use liquidgemm_format::brick::BRICK_CHANNELS;
use liquidgemm_format::tile::{MAX_EPILOGUE_TOKENS, TileShape, WARPGROUP};

use crate::partials::sync_consumer;
use crate::pipeline::{Consumer, Shared};
use crate::ptx::copy::{copy_4_if, end_group};
use crate::ptx::hint::{self, no_unroll};
use crate::ptx::integer::{add_bias, pack_bf16, pack_f16, scale};
use crate::ptx::matrix::{store_transposed_x2, store_transposed_x4};
use crate::ptx::memory::{
    load_global_f32_if, load_shared_f32x2, load_shared_u16, load_shared_x4, store_global, store_global_u16,
    store_global_x4, store_shared_f32,
};
use crate::ptx::wgmma::{Accumulator, BlockVisitor};
use crate::ptx::{mbarrier, tma};
use crate::split::finishes;

/// A bias that changes no value, not even −0.0.
pub const NO_BIAS: f32 = -0.0;

/// The f32 at `index` of the array at `address`, or `otherwise` past its end or if there is no array.
///
/// # Safety
/// `address` is 0 or an array of `length`.
#[inline(always)]
pub unsafe fn element(address: u64, index: u32, length: u32, otherwise: f32) -> f32 {
    let valid = (address != 0) & (index < length);
    // SAFETY: inside the array.
    unsafe { load_global_f32_if(valid, address + index as u64 * 4, otherwise) }
}

/// One thread's part of a tile's scales and bias, on its way from global to shared memory: asked for before the main
/// loop, so that it arrives during it.
#[derive(Clone, Copy)]
pub struct Scales {
    /// Of the tile's tokens `thread` and `thread + 128`.
    tokens: [f32; 2],
    /// Scale and bias of the strip's channel `thread`, in the first 64 threads.
    channel: [f32; 2],
}

/// What a consumer needs to finish its part of a tile.
#[derive(Clone, Copy)]
pub struct Epilogue<'a> {
    arguments: &'a GemmArguments,
    output_map: *const TensorMap,
    shape: TileShape,
    /// For the transposition.
    buffer: u32,
    /// In shared memory: f32 for each token of the tile.
    token_scales: u32,
    /// In shared memory: scale and bias for each channel of the strip.
    channels: u32,
    first_token: u32,
    first_channel: u32,
    consumer: Consumer,
}

impl<'a> Epilogue<'a> {
    /// For the tile of one strip and the tokens from `first_token`.
    #[inline(always)]
    pub fn new(
        arguments: &'a GemmArguments,
        output_map: *const TensorMap,
        shared: Shared,
        shape: TileShape,
        [first_strip, first_token]: [u32; 2],
        consumer: Consumer,
    ) -> Self {
        Self {
            arguments,
            output_map,
            shape,
            buffer: shared.epilogue(consumer),
            token_scales: shared.token_scales(consumer),
            channels: shared.channels(consumer),
            first_token,
            first_channel: first_strip * BRICK_CHANNELS as u32,
            consumer,
        }
    }

    /// Asks for the tile's scales and bias.
    ///
    /// # Safety
    /// The arguments describe valid memory.
    #[inline(always)]
    pub unsafe fn fetch(&self) -> Scales {
        let arguments = self.arguments;
        // SAFETY: the arrays have n, n and m elements.
        unsafe {
            let token = |index: u32| {
                let m = if index < self.shape.tokens { arguments.m } else { 0 };
                element(arguments.token_scales, self.first_token + index, m, 0.0)
            };
            let channel = self.first_channel + self.consumer.thread;
            let n = if self.consumer.thread < BRICK_CHANNELS as u32 { arguments.n } else { 0 };
            Scales {
                tokens: [token(self.consumer.thread), token(self.consumer.thread + WARPGROUP)],
                channel: [
                    element(arguments.weights.channel_scales, channel, n, 0.0),
                    element(arguments.bias, channel, n, NO_BIAS),
                ],
            }
        }
    }

    /// Puts the scales and the bias where the whole consumer can read them after a barrier.
    ///
    /// # Safety
    /// No thread of the consumer still reads those of another tile.
    #[inline(always)]
    pub unsafe fn park(&self, scales: Scales) {
        // SAFETY: there is a place for each token and channel.
        unsafe {
            if self.consumer.thread < self.shape.tokens {
                store_shared_f32(self.token_scales + self.consumer.thread * 4, scales.tokens[0]);
            }
            if self.consumer.thread + WARPGROUP < self.shape.tokens {
                store_shared_f32(
                    self.token_scales + (self.consumer.thread + WARPGROUP) * 4,
                    scales.tokens[1],
                );
            }
            if self.consumer.thread < BRICK_CHANNELS as u32 {
                store_shared_f32(self.channels + self.consumer.thread * 8, scales.channel[0]);
                store_shared_f32(self.channels + self.consumer.thread * 8 + 4, scales.channel[1]);
            }
        }
    }

    /// Copies the tile's scales and biases to where [`park`](Self::park) puts them, without registers: they are there when the thread's
    /// copies are done, for the consumer after a barrier.
    ///
    /// # Safety
    /// As for [`fetch`](Self::fetch) and [`park`](Self::park).
    #[inline(always)]
    pub unsafe fn copy_scales(&self) {
        let arguments = self.arguments;
        let thread = self.consumer.thread;
        // SAFETY: the arrays have n, n and m elements, and there is a place for each token and channel.
        unsafe {
            seq_macro::seq!(HALF in 0..2 {
                let token = thread + HALF * WARPGROUP;
                let global = self.first_token + token;
                copy_4_if(
                    arguments.token_scales != 0 && token < self.shape.tokens && global < arguments.m,
                    self.token_scales + token * 4,
                    arguments.token_scales + global as u64 * 4,
                );
            });
            let channel = self.first_channel + thread;
            let valid = thread < BRICK_CHANNELS as u32 && channel < arguments.n;
            let place = self.channels + thread * 8;
            copy_4_if(
                valid && arguments.weights.channel_scales != 0,
                place,
                arguments.weights.channel_scales + channel as u64 * 4,
            );
            if arguments.bias != 0 {
                copy_4_if(valid, place + 4, arguments.bias + channel as u64 * 4);
            } else if thread < BRICK_CHANNELS as u32 {
                store_shared_f32(place + 4, NO_BIAS);
            }
        }
        end_group();
    }

    /// Writes the tile, whose scales are parked, or one of its rounds, which come one after the other.
    ///
    /// # Safety
    /// All threads of the consumer call it, and the arguments' output is valid.
    #[inline(always)]
    pub unsafe fn store<A: Accumulator>(&self, accumulator: &mut A, only: Option<u32>) {
        if let None | Some(0) = only {
            sync_consumer(self.consumer.index);
        }
        let channel = self.consumer.thread / 32 * 16 + self.consumer.thread % 32 / 4;
        // SAFETY: parked before the barrier.
        let [upper, lower] = unsafe {
            [
                load_shared_f32x2(self.channels + channel * 8),
                load_shared_f32x2(self.channels + (channel + 8) * 8),
            ]
        };
        let output_type = self.arguments.output_type;
        let is_bf16 = output_type == output_type::BF16;
        if self.shape.maps_output() && self.arguments.output_is_mapped != 0 {
            // What large tiles are used for most, each its own code.
            if self.arguments.bias == 0 && self.shape.split == 1 {
                let scaling = Scaling::<false> { epilogue: self, upper, lower, only };
                if is_bf16 {
                    accumulator.visit(&mut Transposed::new(scaling, Bf16, Mapped));
                } else {
                    accumulator.visit(&mut Transposed::new(scaling, F16, Mapped));
                }
            } else {
                let scaling = Scaling::<true> { epilogue: self, upper, lower, only };
                accumulator.visit(&mut Transposed::new(scaling, Either { is_bf16 }, Mapped));
            }
            // Its last barrier has seen everyone read the last scales.
            return;
        }
        let scaling = Scaling::<true> { epilogue: self, upper, lower, only };
        match output_type {
            output_type::BF16 | output_type::F16 => {
                accumulator.visit(&mut Transposed::new(scaling, Either { is_bf16 }, Pieces));
            }
            _ => {
                // The largest tiles have no register to keep what is derived from the thread's index in.
                let thread = hint::thread_idx_anew() % WARPGROUP;
                accumulator.visit(&mut Direct {
                    scaling,
                    thread,
                    is_scaled: output_type == output_type::F32,
                });
            }
        }
        // The next tile's scales may overwrite these.
        sync_consumer(self.consumer.index);
    }

    /// The address of an output element of `size` bytes.
    #[inline(always)]
    fn output(&self, token: u32, channel: u32, size: u64) -> u64 {
        let index = token as u64 * self.arguments.output_stride as u64 + channel as u64;
        self.arguments.output + index * size
    }
}

/// The scales and biases of a thread's two channels; `BIAS` says whether there are biases.
#[derive(Clone, Copy)]
struct Scaling<'a, 'b, const BIAS: bool> {
    epilogue: &'a Epilogue<'b>,
    /// Scale and bias of channel g, in the accumulator's order.
    upper: [f32; 2],
    /// And of channel g + 8.
    lower: [f32; 2],
    /// The round to write, if not all of them.
    only: Option<u32>,
}

impl<const BIAS: bool> Scaling<'_, '_, BIAS> {
    /// Whether the results of block `j` are written, and by this consumer.
    #[inline(always)]
    fn writes(&self, j: u32) -> bool {
        let Epilogue { shape, consumer, .. } = *self.epilogue;
        self.only.is_none_or(|round| round == shape.round_of_block(j)) && finishes(shape, consumer, j)
    }

    /// The block's four results as f32, in the accumulator's order.
    #[inline(always)]
    fn scaled(&self, j: u32, block: &[i32; 4]) -> [f32; 4] {
        let pair = self.epilogue.consumer.thread % 4;
        // SAFETY: parked before `store`'s barrier.
        let tokens = unsafe { load_shared_f32x2(self.epilogue.token_scales + (8 * j + 2 * pair) * 4) };
        let result = |sum: i32, [channel_scale, bias]: [f32; 2], token_scale: f32| {
            let scaled = scale(sum, channel_scale, token_scale);
            if BIAS { add_bias(scaled, bias) } else { scaled }
        };
        [
            result(block[0], self.upper, tokens[0]),
            result(block[1], self.upper, tokens[1]),
            result(block[2], self.lower, tokens[0]),
            result(block[3], self.lower, tokens[1]),
        ]
    }
}

/// A 16-bit output type.
trait Half: Copy {
    /// Two results, `low` in the lower half.
    fn pack(self, low: f32, high: f32) -> u32;
}

#[derive(Clone, Copy)]
struct Bf16;

impl Half for Bf16 {
    #[inline(always)]
    fn pack(self, low: f32, high: f32) -> u32 {
        pack_bf16(low, high)
    }
}

#[derive(Clone, Copy)]
struct F16;

impl Half for F16 {
    #[inline(always)]
    fn pack(self, low: f32, high: f32) -> u32 {
        pack_f16(low, high)
    }
}

/// The type that the arguments name, where one piece of code for both is worth a few instructions.
#[derive(Clone, Copy)]
struct Either {
    is_bf16: bool,
}

impl Half for Either {
    #[inline(always)]
    fn pack(self, low: f32, high: f32) -> u32 {
        if self.is_bf16 { pack_bf16(low, high) } else { pack_f16(low, high) }
    }
}

/// How the transposition buffer's contents go to the output.
trait Exit {
    /// Before the barrier that makes a filled buffer, of so many, visible.
    fn before_barrier(&self, buffers: u32);

    /// Copies the buffer at `address`, which holds so many `tokens` from `first_token` on, to the output.
    fn leave(&self, epilogue: &Epilogue<'_>, first_token: u32, tokens: u32, address: u32);
}

/// By the copy engine, which needs rows on 16 bytes.
struct Mapped;

impl Exit for Mapped {
    #[inline(always)]
    fn before_barrier(&self, buffers: u32) {
        // SAFETY: the barrier follows.
        unsafe { mbarrier::fence_async() };
        // The one that is filled next, stored longest ago, must have left.
        if buffers > 2 {
            tma::await_stores::<1>();
        } else {
            tma::await_stores::<0>();
        }
    }

    #[inline(always)]
    fn leave(&self, epilogue: &Epilogue<'_>, first_token: u32, _: u32, address: u32) {
        // The warp's number by way of a broadcast: after a branch that could part a warp's lanes, the compiler keeps nothing in
        // uniform registers, not even in the main loop.
        if warp::broadcast(epilogue.consumer.thread / WARP_SIZE) == 0 {
            // SAFETY: the buffer is full and stays so until the next but `epilogue_buffers` is filled.
            unsafe { tma::store_2d(epilogue.output_map, epilogue.first_channel, first_token, address) };
        }
    }
}

/// In 16-byte pieces of a token's row where rows allow it, else one by one.
struct Pieces;

impl Exit for Pieces {
    #[inline(always)]
    fn before_barrier(&self, _: u32) {}

    #[inline(always)]
    fn leave(&self, epilogue: &Epilogue<'_>, first_token: u32, tokens: u32, address: u32) {
        let arguments = epilogue.arguments;
        let first_row = epilogue.consumer.thread / 8;
        let piece = epilogue.consumer.thread % 8;
        let channel = epilogue.first_channel + piece * 8;
        let whole =
            arguments.output_stride % 8 == 0 && arguments.output % 16 == 0 && channel + 8 <= arguments.n;
        let place = |row: u32| address + row * 128 + (piece ^ (row % 8)) * 16;
        const { assert!(MAX_EPILOGUE_TOKENS <= 32) };
        let mut words = [[0; 4]; 2];
        // SAFETY: the rows lie in the buffer, the elements below m and n in the output.
        unsafe {
            seq_macro::seq!(R in 0..2 {
                let row = first_row + 16 * R;
                if 16 * R < tokens && row < tokens {
                    words[R] = load_shared_x4(place(row));
                }
            });
            seq_macro::seq!(R in 0..2 {
                let row = first_row + 16 * R;
                if 16 * R < tokens && row < tokens && first_token + row < arguments.m {
                    let address = epilogue.output(first_token + row, channel, 2);
                    if whole {
                        store_global_x4(address, words[R]);
                    } else {
                        store_one_by_one(address, place(row), channel, arguments.n);
                    }
                }
            });
        }
    }
}

/// 16-bit results, through the transposition buffer: a row of 128 bytes a token, its 16-byte pieces permuted by
/// the token's low bits so that neither side has bank conflicts. It is the copy engine's 128-byte swizzle.
struct Transposed<'a, 'b, H, E, const BIAS: bool> {
    scaling: Scaling<'a, 'b, BIAS>,
    half: H,
    exit: E,
    /// Where this lane's matrix row of the first two blocks goes.
    row: u32,
    /// The even block's packed results, until the odd one's are there too.
    even: [u32; 2],
}

impl<'a, 'b, H: Half, E: Exit, const BIAS: bool> Transposed<'a, 'b, H, E, BIAS> {
    #[inline(always)]
    fn new(scaling: Scaling<'a, 'b, BIAS>, half: H, exit: E) -> Self {
        let epilogue = scaling.epilogue;
        let (warp, lane) = (epilogue.consumer.thread / WARP_SIZE, epilogue.consumer.thread % WARP_SIZE);
        let (matrix, token) = (lane / 8, lane % 8);
        let piece = (warp * 2 + matrix % 2) ^ token;
        let row = epilogue.buffer + (matrix / 2 * 8 + token) * 128 + piece * 16;
        Self { scaling, half, exit, row, even: [0; 2] }
    }

    /// Sends the buffer at `offset`, which holds so many `tokens` from `first_token` on, to the output.
    ///
    /// The one barrier makes the buffer's contents visible, and says that everyone is done with the buffer that is
    /// filled next.
    #[inline(always)]
    fn flush(&self, first_token: u32, tokens: u32, offset: u32) {
        let epilogue = self.scaling.epilogue;
        self.exit.before_barrier(epilogue.shape.epilogue_buffers());
        sync_consumer(epilogue.consumer.index);
        self.exit.leave(epilogue, first_token, tokens, epilogue.buffer + offset);
    }
}

/// Copies the 16-bit elements of the eight channels from `channel` that lie below `n` from shared to global memory.
///
/// # Safety
/// As many elements are valid at both addresses.
#[inline(always)]
unsafe fn store_one_by_one(mut address: u64, mut shared: u32, mut channel: u32, n: u32) {
    // The end is not written as `channel + 8`, lest the compiler unroll what is seldom run and never fast.
    let end = (channel | 7) + 1;
    while channel < end && channel < n {
        no_unroll();
        // SAFETY: the caller vouches for the elements below `n`.
        unsafe { store_global_u16(address, load_shared_u16(shared)) };
        address += 2;
        shared += 2;
        channel += 1;
    }
}

impl<H: Half, E: Exit, const BIAS: bool> BlockVisitor for Transposed<'_, '_, H, E, BIAS> {
    #[inline(always)]
    fn block(&mut self, j: u32, block: &mut [i32; 4]) {
        let Epilogue { shape, first_token, .. } = *self.scaling.epilogue;
        if !self.scaling.writes(j) {
            return;
        }
        let [a, b, c, d] = self.scaling.scaled(j, block);
        let packed = [self.half.pack(a, b), self.half.pack(c, d)];
        let (round, in_round) = (shape.round_of_block(j), shape.block_in_round(j));
        let is_last = in_round == shape.round_tokens(round) / 8 - 1;
        let offset = round % shape.epilogue_buffers() * shape.epilogue_buffer_bytes();
        // SAFETY: the addresses lie in the consumer's buffer.
        unsafe {
            if in_round % 2 == 1 {
                let [even_upper, even_lower] = self.even;
                let address = self.row + offset + (in_round - 1) * 1024;
                store_transposed_x4(address, [even_upper, even_lower, packed[0], packed[1]]);
            } else if is_last {
                store_transposed_x2(self.row + offset + in_round * 1024, packed);
            }
        }
        self.even = packed;
        if is_last {
            self.flush(first_token + (j - in_round) * 8, shape.round_tokens(round), offset);
        }
    }
}

/// 32-bit results, from the registers: f32, or the sums themselves. One piece of code for both is worth an instruction a result.
struct Direct<'a, 'b> {
    scaling: Scaling<'a, 'b, true>,
    /// The thread in its warpgroup.
    thread: u32,
    is_scaled: bool,
}

impl BlockVisitor for Direct<'_, '_> {
    #[inline(always)]
    fn block(&mut self, j: u32, block: &mut [i32; 4]) {
        let epilogue = self.scaling.epilogue;
        if !self.scaling.writes(j) {
            return;
        }
        let lane = self.thread % 32;
        let token = epilogue.first_token + 8 * j + lane % 4 * 2;
        let channel = epilogue.first_channel + self.thread / 32 * 16 + lane / 4;
        let [a, b, c, d] = self.scaling.scaled(j, block);
        let value = |scaled: f32, sum: i32| if self.is_scaled { scaled.to_bits() } else { sum as u32 };
        let values = [value(a, block[0]), value(b, block[1]), value(c, block[2]), value(d, block[3])];
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
