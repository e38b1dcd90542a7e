//! The epilogue: scales the sums, adds the bias, rounds, transposes and stores.
//!
//! The accumulator's rows are channels, the output's rows are tokens.
//! So 16-bit results are transposed by `stmatrix.trans` through a buffer in shared memory (`transposed.rs`).
//! 32-bit results are stored from registers, eight neighbouring channels at a time (`direct.rs`).
//! The host twin is `host/src/output.rs`, with the same rounded operations in the same order.

mod direct;
mod transposed;

use core::marker::PhantomData;

use cuda_std::TensorMap;
use direct::Direct;
use liquidgemm_format::arguments::{GemmArguments, output_type};
use liquidgemm_format::brick::BRICK_CHANNELS;
use liquidgemm_format::tile::WARPGROUP;
use transposed::{Bf16, Either, F16, Mapped, Pieces, Transposed};

use crate::block::{Block, Consumer};
use crate::ptx::copy::{copy_4_if, end_group};
use crate::ptx::hint;
use crate::ptx::integer::{add_bias, scale};
use crate::ptx::memory::{load_global_f32_if, load_shared_f32x2, store_shared_f32};
use crate::ptx::tma;
use crate::ptx::wgmma::Accumulator;
use crate::reduce::cluster::finishes;
use crate::reduce::stream_k::sync_consumer;
use crate::shape::Shape;

/// A bias that changes no value, not even −0.0.
pub const NO_BIAS: f32 = -0.0;

/// Returns the f32 at `index` of the array at `address`.
/// Returns `otherwise` past the array's end, or if there is no array.
///
/// # Safety
/// `address` is 0 or an array of `length` f32.
#[inline(always)]
pub unsafe fn element(address: u64, index: u32, length: u32, otherwise: f32) -> f32 {
    let valid = (address != 0) & (index < length);
    // SAFETY: if the load is valid, the element is inside the array.
    unsafe { load_global_f32_if(valid, address + index as u64 * 4, otherwise) }
}

/// A thread's part of a tile's scales and biases, between global and shared memory.
///
/// They are loaded before the main loop, so that they arrive during it.
#[derive(Clone, Copy)]
pub struct Scales {
    /// Scales of the tile's tokens `thread` and `thread + 128`.
    tokens: [f32; 2],
    /// Scale and bias of the strip's channel `thread`, in the first 64 threads.
    channel: [f32; 2],
}

/// The inputs and outputs of a consumer's epilogue for its part of a tile.
#[derive(Clone, Copy)]
pub struct Epilogue<'a, S> {
    arguments: &'a GemmArguments,
    output_map: *const TensorMap,
    shape: PhantomData<S>,
    /// Address of the transposition buffers.
    buffer: u32,
    /// Address in shared memory of an f32 scale for each token of the tile.
    token_scales: u32,
    /// Address in shared memory of scale and bias, two f32, for each channel of the strip.
    channels: u32,
    first_token: u32,
    first_channel: u32,
    consumer: Consumer,
}

impl<'a, S: Shape> Epilogue<'a, S> {
    /// Returns the epilogue for strip `first_strip` and the tokens from `first_token` on.
    #[inline(always)]
    pub fn new(
        arguments: &'a GemmArguments,
        output_map: *const TensorMap,
        block: Block<S>,
        [first_strip, first_token]: [u32; 2],
        consumer: Consumer,
    ) -> Self {
        let shared = block.shared;
        Self {
            arguments,
            output_map,
            shape: PhantomData,
            buffer: shared.epilogue(consumer),
            token_scales: shared.token_scales(consumer),
            channels: shared.channels(consumer),
            first_token,
            first_channel: first_strip * BRICK_CHANNELS as u32,
            consumer,
        }
    }

    /// Loads the tile's scales and biases.
    ///
    /// # Safety
    /// The arguments describe valid memory.
    #[inline(always)]
    pub unsafe fn fetch(&self) -> Scales {
        let arguments = self.arguments;
        // SAFETY: the arrays have n, n and m elements.
        unsafe {
            let token = |index: u32| {
                let m = if index < S::SHAPE.tokens { arguments.m } else { 0 };
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

    /// Stores scales and biases to shared memory, where the whole consumer can read them after a barrier.
    ///
    /// # Safety
    /// No thread of the consumer still reads those of another tile.
    #[inline(always)]
    pub unsafe fn store_scales(&self, scales: Scales) {
        // SAFETY: shared memory has room for each token and channel.
        unsafe {
            if self.consumer.thread < S::SHAPE.tokens {
                store_shared_f32(self.token_scales + self.consumer.thread * 4, scales.tokens[0]);
            }
            if self.consumer.thread + WARPGROUP < S::SHAPE.tokens {
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

    /// Copies the tile's scales and biases by `cp.async`.
    ///
    /// They go where [`store_scales`](Self::store_scales) stores them, without passing through registers.
    /// The whole consumer can read them once each thread has awaited its copies
    /// and all threads have met at a barrier.
    ///
    /// # Safety
    /// As for [`fetch`](Self::fetch) and [`store_scales`](Self::store_scales).
    #[inline(always)]
    pub unsafe fn copy_scales(&self) {
        let arguments = self.arguments;
        let thread = self.consumer.thread;
        // SAFETY: the arrays have n, n and m elements, and shared memory has room for each token and channel.
        unsafe {
            seq_macro::seq!(PART in 0..3 {
                if const { PART < 2 || PART * WARPGROUP < S::SHAPE.tokens } {
                    let token = thread + PART * WARPGROUP;
                    let global = self.first_token + token;
                    copy_4_if(
                        arguments.token_scales != 0 && token < S::SHAPE.tokens && global < arguments.m,
                        self.token_scales + token * 4,
                        arguments.token_scales + global as u64 * 4,
                    );
                }
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

    /// Writes the tile's results.
    ///
    /// With cluster split-K, `only` is the round of the exchange whose tokens to write; rounds come in order.
    /// Scales and biases are in shared memory.
    ///
    /// # Safety
    /// All threads of the consumer call it, and the arguments' output is valid.
    #[inline(always)]
    pub unsafe fn store<A: Accumulator>(&self, accumulator: &mut A, only: Option<u32>) {
        if let None | Some(0) = only {
            // TMA may still read a buffer of the last tile, if this tile's main loop was short.
            if const { S::SHAPE.maps_output() } {
                tma::await_stores::<0>();
            }
            sync_consumer(self.consumer.index);
        }
        let channel = self.consumer.thread / 32 * 16 + self.consumer.thread % 32 / 4;
        // SAFETY: scales and biases were stored before the barrier.
        let [upper, lower] = unsafe {
            [
                load_shared_f32x2(self.channels + channel * 8),
                load_shared_f32x2(self.channels + (channel + 8) * 8),
            ]
        };
        let output_type = self.arguments.output_type;
        let is_bf16 = output_type == output_type::BF16;
        if const { S::SHAPE.maps_output() } && self.arguments.output_is_mapped != 0 {
            // The most frequent cases of large tiles have code of their own.
            if const { S::SHAPE.cluster_split == 1 } && self.arguments.bias == 0 {
                let scaling = Scaling::<S, false> { epilogue: self, upper, lower, only };
                if is_bf16 {
                    accumulator.visit(&mut Transposed::new(scaling, Bf16, Mapped));
                } else {
                    accumulator.visit(&mut Transposed::new(scaling, F16, Mapped));
                }
            } else {
                let scaling = Scaling::<S, true> { epilogue: self, upper, lower, only };
                accumulator.visit(&mut Transposed::new(scaling, Either { is_bf16 }, Mapped));
            }
            // The last barrier of the visitor comes after all reads of the scales.
            return;
        }
        let scaling = Scaling::<S, true> { epilogue: self, upper, lower, only };
        match output_type {
            output_type::BF16 | output_type::F16 => {
                accumulator.visit(&mut Transposed::new(scaling, Either { is_bf16 }, Pieces));
            }
            _ => {
                // The largest tiles have no registers to keep values derived from the thread index.
                let thread = hint::thread_idx_anew() % WARPGROUP;
                accumulator.visit(&mut Direct {
                    scaling,
                    thread,
                    is_scaled: output_type == output_type::F32,
                });
            }
        }
        // After this barrier the next tile's scales may overwrite these.
        sync_consumer(self.consumer.index);
    }

    /// Returns whether the epilogue round of fragment `j` has tokens of the output.
    #[inline(always)]
    fn has_tokens_in_round_of(&self, j: u32) -> bool {
        let first = (j - S::SHAPE.fragment_in_round(j)) * 8;
        self.first_token + first < self.arguments.m
    }

    /// Returns the address of an output element of `size` bytes.
    #[inline(always)]
    fn output(&self, token: u32, channel: u32, size: u64) -> u64 {
        let index = token as u64 * self.arguments.output_stride as u64 + channel as u64;
        self.arguments.output + index * size
    }
}

/// The scales and biases of a thread's two channels. `BIAS` says whether there are biases.
#[derive(Clone, Copy)]
struct Scaling<'a, 'b, S, const BIAS: bool> {
    epilogue: &'a Epilogue<'b, S>,
    /// Scale and bias of channel g, in the accumulator's order.
    upper: [f32; 2],
    /// Scale and bias of channel g + 8.
    lower: [f32; 2],
    /// The round of the exchange to write, or `None` for the whole tile.
    only: Option<u32>,
}

impl<S: Shape, const BIAS: bool> Scaling<'_, '_, S, BIAS> {
    /// Returns whether this consumer writes the results of fragment `j` in this call.
    #[inline(always)]
    fn writes(&self, j: u32) -> bool {
        self.only.is_none_or(|round| round == S::SHAPE.split_round_of_fragment(j))
            && finishes(S::SHAPE, self.epilogue.consumer, j)
            && (!S::SKIPS_ROUNDS || self.epilogue.has_tokens_in_round_of(j))
    }

    /// Returns the four results of fragment `j` as f32, in the accumulator's order.
    #[inline(always)]
    fn scaled(&self, j: u32, sums: &[i32; 4]) -> [f32; 4] {
        let pair = self.epilogue.consumer.thread % 4;
        // SAFETY: the scales were stored before the barrier of `store`.
        let tokens = unsafe { load_shared_f32x2(self.epilogue.token_scales + (8 * j + 2 * pair) * 4) };
        let result = |sum: i32, [channel_scale, bias]: [f32; 2], token_scale: f32| {
            let scaled = scale(sum, channel_scale, token_scale);
            if BIAS { add_bias(scaled, bias) } else { scaled }
        };
        [
            result(sums[0], self.upper, tokens[0]),
            result(sums[1], self.upper, tokens[1]),
            result(sums[2], self.lower, tokens[0]),
            result(sums[3], self.lower, tokens[1]),
        ]
    }
}
