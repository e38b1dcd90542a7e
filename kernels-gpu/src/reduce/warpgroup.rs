//! Warpgroup split-K: the reduction between the two consumers that share a strip's K.
//!
//! Each keeps half of the tokens. It stores its sums of the other half to shared memory,
//! and adds the other consumer's sums to those that it keeps.
//! The sums are int32, so the order of additions does not change the result.
//! `liquidgemm_format::tile` lays out the exchange buffer and says which tokens a consumer keeps.

use cuda_std::thread;
use liquidgemm_format::tile::{TileShape, WARPGROUP};

use crate::block::{Block, Consumer};
use crate::ptx::memory::{load_shared_x4_if, store_shared_x4_if};
use crate::ptx::wgmma::{Accumulator, FragmentVisitor, add_sums, words};
use crate::shape::Shape;

/// The first named barrier of the strips; the thread block and the consumers use lower ones.
const FIRST_BARRIER: u32 = 8;

/// Returns whether a consumer keeps accumulator fragment `j`, the sums of eight tokens.
#[inline(always)]
pub fn keeps(shape: TileShape, consumer: Consumer, j: u32) -> bool {
    shape.warpgroup_split == 1 || j * 8 / shape.kept_tokens() == consumer.k_index
}

/// Exchanges sums between the two consumers of a strip. Does nothing without warpgroup split-K.
///
/// # Safety
/// All threads of both consumers call it.
#[inline(always)]
pub unsafe fn exchange<A: Accumulator, S: Shape>(accumulator: &mut A, block: Block<S>, consumer: Consumer) {
    let (shared, shape) = (block.shared, S::SHAPE);
    if const { S::SHAPE.warpgroup_split == 1 } {
        return;
    }
    let barrier = FIRST_BARRIER + consumer.strip;
    let buffer = shared.exchange(consumer.strip) + consumer.thread * 16;
    let mut round = 0;
    while round < shape.exchange_rounds() {
        accumulator.visit(&mut Give { shape, consumer, buffer, round });
        thread::sync_named::<{ 2 * WARPGROUP }>(barrier);
        accumulator.visit(&mut Take { shape, consumer, buffer, round });
        // After this barrier the next round may overwrite the buffer.
        thread::sync_named::<{ 2 * WARPGROUP }>(barrier);
        round += 1;
    }
}

/// Returns whether to access the buffer for every fragment by predicated instructions instead of branching.
///
/// Half of the accesses then do nothing; that pays for many fragments.
#[inline(always)]
fn is_branchless(shape: TileShape) -> bool {
    shape.tokens >= 128
}

/// Returns the address of fragment `j` in the buffer if this round exchanges it.
#[inline(always)]
fn place(shape: TileShape, buffer: u32, round: u32, j: u32) -> Option<u32> {
    let blocks = shape.tokens / 8 / shape.exchange_rounds();
    if j % shape.exchange_rounds() == round {
        Some(buffer + j / shape.exchange_rounds() % blocks * WARPGROUP * 16)
    } else {
        None
    }
}

/// Visitor that stores the fragments of a round that the other consumer keeps.
struct Give {
    shape: TileShape,
    consumer: Consumer,
    buffer: u32,
    round: u32,
}

impl FragmentVisitor for Give {
    #[inline(always)]
    fn fragment(&mut self, j: u32, sums: &mut [i32; 4]) {
        if let Some(address) = place(self.shape, self.buffer, self.round, j) {
            let given = !keeps(self.shape, self.consumer, j);
            if given || is_branchless(self.shape) {
                // SAFETY: the address is inside the strip's exchange buffer.
                unsafe { store_shared_x4_if(given, address, words(*sums)) };
            }
        }
    }
}

/// Visitor that adds the other consumer's sums to the kept fragments of a round.
struct Take {
    shape: TileShape,
    consumer: Consumer,
    buffer: u32,
    round: u32,
}

impl FragmentVisitor for Take {
    #[inline(always)]
    fn fragment(&mut self, j: u32, sums: &mut [i32; 4]) {
        if let Some(address) = place(self.shape, self.buffer, self.round, j) {
            let kept = keeps(self.shape, self.consumer, j);
            if kept || is_branchless(self.shape) {
                // SAFETY: the other consumer stored the sums before the barrier.
                add_sums(sums, unsafe { load_shared_x4_if(kept, address) });
            }
        }
    }
}
