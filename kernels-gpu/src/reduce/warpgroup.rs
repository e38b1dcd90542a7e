//! Two consumers that share a strip's K: each hands the other the sums of one half of the tokens and adds what it
//! gets to its own half, which it keeps. The sums are int32, so the order is of no consequence.

use cuda_std::thread;
use liquidgemm_format::tile::{TileShape, WARPGROUP};

use crate::pipeline::{Consumer, Shared};
use crate::ptx::memory::{load_shared_x4_if, store_shared_x4_if};
use crate::ptx::wgmma::{Accumulator, BlockVisitor, add_sums};

/// The first named barrier of the strips; those before are the block's and the consumers'.
const FIRST_BARRIER: u32 = 8;

/// Whether a consumer keeps the eight tokens of block `j` of its accumulator.
#[inline(always)]
pub fn keeps(shape: TileShape, consumer: Consumer, j: u32) -> bool {
    shape.halves == 1 || j * 8 / shape.kept_tokens() == consumer.half
}

/// Exchanges the sums of a strip's two consumers, if it has two.
///
/// # Safety
/// All threads of both consumers call it.
#[inline(always)]
pub unsafe fn exchange<A: Accumulator>(
    accumulator: &mut A,
    shared: Shared,
    shape: TileShape,
    consumer: Consumer,
) {
    if shape.halves == 1 {
        return;
    }
    let barrier = FIRST_BARRIER + consumer.strip;
    let buffer = shared.exchange(consumer.strip) + consumer.thread * 16;
    let mut round = 0;
    while round < shape.exchange_rounds() {
        accumulator.visit(&mut Give { shape, consumer, buffer, round });
        thread::sync_named::<{ 2 * WARPGROUP }>(barrier);
        accumulator.visit(&mut Take { shape, consumer, buffer, round });
        // What was taken may be overwritten.
        thread::sync_named::<{ 2 * WARPGROUP }>(barrier);
        round += 1;
    }
}

/// Whether to go on with every block, for nothing with half of them, rather than to branch at each: that pays for many blocks.
#[inline(always)]
fn is_branchless(shape: TileShape) -> bool {
    shape.tokens >= 128
}

/// Where block `j` lies in the buffer, if it is exchanged in this round.
#[inline(always)]
fn place(shape: TileShape, buffer: u32, round: u32, j: u32) -> Option<u32> {
    let blocks = shape.tokens / 8 / shape.exchange_rounds();
    if j % shape.exchange_rounds() == round {
        Some(buffer + j / shape.exchange_rounds() % blocks * WARPGROUP * 16)
    } else {
        None
    }
}

struct Give {
    shape: TileShape,
    consumer: Consumer,
    buffer: u32,
    round: u32,
}

impl BlockVisitor for Give {
    #[inline(always)]
    fn block(&mut self, j: u32, block: &mut [i32; 4]) {
        if let Some(address) = place(self.shape, self.buffer, self.round, j) {
            let given = !keeps(self.shape, self.consumer, j);
            if given || is_branchless(self.shape) {
                // SAFETY: inside the strip's exchange buffer.
                unsafe { store_shared_x4_if(given, address, block.map(|sum| sum as u32)) };
            }
        }
    }
}

struct Take {
    shape: TileShape,
    consumer: Consumer,
    buffer: u32,
    round: u32,
}

impl BlockVisitor for Take {
    #[inline(always)]
    fn block(&mut self, j: u32, block: &mut [i32; 4]) {
        if let Some(address) = place(self.shape, self.buffer, self.round, j) {
            let kept = keeps(self.shape, self.consumer, j);
            if kept || is_branchless(self.shape) {
                // SAFETY: the other consumer wrote it before the barrier.
                add_sums(block, unsafe { load_shared_x4_if(kept, address) });
            }
        }
    }
}
