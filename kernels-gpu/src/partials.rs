//! Partial sums of a tile that several workers share: int32, through global memory, and therefore exact.
//!
//! Every worker has one slot, laid out as its threads hold their registers, and a flag for each consumer.
//! Flags are zero between launches: whoever waits for one lowers it.

use core::ops::Range;

use cuda_std::thread;
use liquidgemm_format::arguments::GemmArguments;
use liquidgemm_format::tile::CONSUMERS;

use crate::ptx::memory::{await_flag, load_global_x4, raise_flag, store_global_x4};
use crate::ptx::wgmma::{Accumulator, BlockVisitor};

/// Threads of a consumer.
const THREADS: u32 = 128;

/// The named barrier of one consumer.
#[inline(always)]
pub fn sync_consumer(consumer: u32) {
    thread::sync_named::<THREADS>(1 + consumer);
}

/// The address of this thread's first block in a worker's slot; the blocks follow at [`BLOCK_STRIDE`].
#[inline(always)]
fn slot<A: Accumulator>(arguments: &GemmArguments, worker: u32, consumer: u32, thread: u32) -> u64 {
    let consumers_before = (worker * CONSUMERS + consumer) as u64;
    arguments.partials + consumers_before * (A::TOKENS as u64 / 8 * BLOCK_STRIDE) + thread as u64 * 16
}

/// Bytes from one block of a thread to its next: the whole consumer's blocks lie side by side.
const BLOCK_STRIDE: u64 = THREADS as u64 * 16;

#[inline(always)]
fn flag(arguments: &GemmArguments, worker: u32, consumer: u32) -> u64 {
    arguments.flags + (worker * CONSUMERS + consumer) as u64 * 4
}

/// Hands this consumer's sums to the tile's owner.
///
/// # Safety
/// All threads of the consumer call it; the arguments' slots and flags are valid.
#[inline(always)]
pub unsafe fn contribute<A: Accumulator>(
    accumulator: &mut A,
    arguments: &GemmArguments,
    worker: u32,
    consumer: u32,
    thread: u32,
) {
    accumulator.visit(&mut Write { address: slot::<A>(arguments, worker, consumer, thread) });
    sync_consumer(consumer);
    if thread == 0 {
        // SAFETY: the caller vouches for the flag.
        unsafe { raise_flag(flag(arguments, worker, consumer)) };
    }
}

/// Adds the sums of `contributors` to this consumer's.
///
/// # Safety
/// As for [`contribute`].
#[inline(always)]
pub unsafe fn collect<A: Accumulator>(
    accumulator: &mut A,
    arguments: &GemmArguments,
    contributors: Range<u32>,
    consumer: u32,
    thread: u32,
) {
    for contributor in contributors {
        if thread == 0 {
            // SAFETY: the caller vouches for the flag.
            unsafe { await_flag(flag(arguments, contributor, consumer)) };
        }
        sync_consumer(consumer);
        accumulator.visit(&mut Add { address: slot::<A>(arguments, contributor, consumer, thread) });
    }
}

struct Write {
    address: u64,
}

impl BlockVisitor for Write {
    #[inline(always)]
    fn block(&mut self, j: u32, block: &mut [i32; 4]) {
        // SAFETY: the block lies in this worker's slot.
        unsafe { store_global_x4(self.address + j as u64 * BLOCK_STRIDE, block.map(|sum| sum as u32)) };
    }
}

struct Add {
    address: u64,
}

impl BlockVisitor for Add {
    #[inline(always)]
    fn block(&mut self, j: u32, block: &mut [i32; 4]) {
        // SAFETY: the block lies in the contributor's slot, whose flag was seen.
        let other = unsafe { load_global_x4(self.address + j as u64 * BLOCK_STRIDE) };
        block[0] = block[0].wrapping_add(other[0]);
        block[1] = block[1].wrapping_add(other[1]);
        block[2] = block[2].wrapping_add(other[2]);
        block[3] = block[3].wrapping_add(other[3]);
    }
}
