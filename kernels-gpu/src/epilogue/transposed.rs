//! The epilogue of 16-bit results: transposed through shared memory, then stored by TMA or by the threads.
//!
//! It relies on [`Scaling`] for the scaled results, and on `liquidgemm_format::tile` for the buffers.

use cuda_std::warp;
use cuda_std::warp::WARP_SIZE;
use liquidgemm_format::tile::MAX_EPILOGUE_TOKENS;

use super::{Epilogue, Scaling};
use crate::ptx::hint::no_unroll;
use crate::ptx::integer::{pack_bf16, pack_f16};
use crate::ptx::matrix::{store_transposed_x2, store_transposed_x4};
use crate::ptx::memory::{load_shared_u16, load_shared_x4, store_global_u16, store_global_x4};
use crate::ptx::wgmma::FragmentVisitor;
use crate::ptx::{mbarrier, tma};
use crate::reduce::stream_k::sync_consumer;
use crate::shape::Shape;

/// A 16-bit output type.
pub(super) trait Half: Copy {
    /// Returns two results rounded to the type, `low` in the lower half.
    fn pack(self, low: f32, high: f32) -> u32;
}

/// bfloat16.
#[derive(Clone, Copy)]
pub(super) struct Bf16;

impl Half for Bf16 {
    #[inline(always)]
    fn pack(self, low: f32, high: f32) -> u32 {
        pack_bf16(low, high)
    }
}

/// IEEE half precision.
#[derive(Clone, Copy)]
pub(super) struct F16;

impl Half for F16 {
    #[inline(always)]
    fn pack(self, low: f32, high: f32) -> u32 {
        pack_f16(low, high)
    }
}

/// The type that the arguments name, as a value at run time.
///
/// One visitor for both types costs a few instructions and saves code.
#[derive(Clone, Copy)]
pub(super) struct Either {
    pub(super) is_bf16: bool,
}

impl Half for Either {
    #[inline(always)]
    fn pack(self, low: f32, high: f32) -> u32 {
        if self.is_bf16 { pack_bf16(low, high) } else { pack_f16(low, high) }
    }
}

/// The way from a transposition buffer to the output.
pub(super) trait Exit {
    /// Runs before the barrier that makes a filled buffer visible. `buffers` is the number of buffers.
    fn before_barrier(&self, buffers: u32);

    /// Copies the buffer at `address` to the output; it holds `tokens` tokens from `first_token` on.
    fn leave<S: Shape>(&self, epilogue: &Epilogue<'_, S>, first_token: u32, tokens: u32, address: u32);
}

/// By TMA stores, which need rows that are multiples of 16 bytes.
///
/// Where a tile may end inside a round, the rows behind it are another expert's.
/// TMA would overwrite them, so the threads store such a round.
pub(super) struct Mapped;

impl Exit for Mapped {
    #[inline(always)]
    fn before_barrier(&self, buffers: u32) {
        // SAFETY: the barrier follows.
        unsafe { mbarrier::fence_async() };
        // TMA must have read the buffer that is filled next, which is the one stored the longest ago.
        if buffers > 2 {
            tma::await_stores::<1>();
        } else {
            tma::await_stores::<0>();
        }
    }

    #[inline(always)]
    fn leave<S: Shape>(&self, epilogue: &Epilogue<'_, S>, first_token: u32, tokens: u32, address: u32) {
        if S::SKIPS_ROUNDS && warp::broadcast((first_token + tokens > epilogue.arguments.m) as u32) != 0 {
            return Pieces.leave(epilogue, first_token, tokens, address);
        }
        // The warp's number comes from a broadcast.
        // After a branch that could diverge the warp, the compiler keeps nothing in uniform registers,
        // not even in the main loop.
        if warp::broadcast(epilogue.consumer.thread / WARP_SIZE) == 0 {
            // SAFETY: the buffer is full, and is refilled only after `epilogue_buffers` − 1 other rounds.
            unsafe { tma::store_2d(epilogue.output_map, epilogue.first_channel, first_token, address) };
        }
    }
}

/// By the threads: in 16-byte pieces of a token's row if the rows allow it, otherwise by element.
pub(super) struct Pieces;

impl Exit for Pieces {
    #[inline(always)]
    fn before_barrier(&self, _: u32) {}

    #[inline(always)]
    fn leave<S: Shape>(&self, epilogue: &Epilogue<'_, S>, first_token: u32, tokens: u32, address: u32) {
        let arguments = epilogue.arguments;
        let first_row = epilogue.consumer.thread / 8;
        let piece = epilogue.consumer.thread % 8;
        let channel = epilogue.first_channel + piece * 8;
        let whole =
            arguments.output_stride % 8 == 0 && arguments.output % 16 == 0 && channel + 8 <= arguments.n;
        let place = |row: u32| address + row * 128 + (piece ^ (row % 8)) * 16;
        const { assert!(MAX_EPILOGUE_TOKENS <= 32) };
        let mut words = [[0; 4]; 2];
        // SAFETY: the rows lie in the buffer, and elements below m and n lie in the output.
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

/// Visitor that stores 16-bit results through the transposition buffers.
///
/// A buffer has a row of 128 bytes for each token.
/// The low bits of the token permute the row's 16-byte pieces,
/// so that neither writes nor reads have bank conflicts. This is TMA's 128-byte swizzle.
pub(super) struct Transposed<'a, 'b, S, H, E, const BIAS: bool> {
    scaling: Scaling<'a, 'b, S, BIAS>,
    half: H,
    exit: E,
    /// Address of this lane's matrix row for the first two fragments.
    row: u32,
    /// The packed results of the even fragment, kept until those of the odd one are computed.
    even: [u32; 2],
}

impl<'a, 'b, S: Shape, H: Half, E: Exit, const BIAS: bool> Transposed<'a, 'b, S, H, E, BIAS> {
    /// Returns the visitor for results of type `half` that leave by `exit`.
    #[inline(always)]
    pub(super) fn new(scaling: Scaling<'a, 'b, S, BIAS>, half: H, exit: E) -> Self {
        let epilogue = scaling.epilogue;
        let (warp, lane) = (epilogue.consumer.thread / WARP_SIZE, epilogue.consumer.thread % WARP_SIZE);
        let (matrix, token) = (lane / 8, lane % 8);
        let piece = (warp * 2 + matrix % 2) ^ token;
        let row = epilogue.buffer + (matrix / 2 * 8 + token) * 128 + piece * 16;
        Self { scaling, half, exit, row, even: [0; 2] }
    }

    /// Sends the buffer at `offset`, which holds `tokens` tokens from `first_token` on, to the output.
    ///
    /// Its one barrier makes the buffer's contents visible.
    /// It also says that all threads are done with the buffer that is filled next.
    #[inline(always)]
    pub(super) fn flush(&self, first_token: u32, tokens: u32, offset: u32) {
        let epilogue = self.scaling.epilogue;
        self.exit.before_barrier(S::SHAPE.epilogue_buffers());
        sync_consumer(epilogue.consumer.index);
        self.exit.leave(epilogue, first_token, tokens, epilogue.buffer + offset);
    }
}

/// Copies the 16-bit elements of eight channels from shared to global memory.
///
/// The channels start at `channel`; those from `n` on are left out.
///
/// # Safety
/// As many elements are valid at both addresses.
#[inline(always)]
unsafe fn store_one_by_one(mut address: u64, mut shared: u32, mut channel: u32, n: u32) {
    // `channel + 8` would make the compiler unroll this loop, which is seldom executed and never fast.
    let end = (channel | 7) + 1;
    while channel < end && channel < n {
        no_unroll();
        // SAFETY: the caller guarantees the elements below `n`.
        unsafe { store_global_u16(address, load_shared_u16(shared)) };
        address += 2;
        shared += 2;
        channel += 1;
    }
}

impl<S: Shape, H: Half, E: Exit, const BIAS: bool> FragmentVisitor for Transposed<'_, '_, S, H, E, BIAS> {
    #[inline(always)]
    fn fragment(&mut self, j: u32, sums: &mut [i32; 4]) {
        let (shape, first_token) = (S::SHAPE, self.scaling.epilogue.first_token);
        if !self.scaling.writes(j) {
            return;
        }
        let [a, b, c, d] = self.scaling.scaled(j, sums);
        let packed = [self.half.pack(a, b), self.half.pack(c, d)];
        let (round, in_round) = (shape.round_of_fragment(j), shape.fragment_in_round(j));
        let is_last = in_round == shape.round_tokens(round) / 8 - 1;
        let offset = round % shape.epilogue_buffers() * shape.epilogue_buffer_bytes();
        // SAFETY: the addresses lie in the consumer's buffers.
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
