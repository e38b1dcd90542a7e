//! Two blocks of a cluster that share a tile's K: each consumer hands the one with the same channels in the other block the sums of one
//! half of its tokens, adds what it gets to the other half, and finishes that alone. The sums are int32, so the order is of no
//! consequence.
//!
//! They go straight from registers to the other multiprocessor's shared memory, as asynchronous stores whose bytes barriers
//! there count, one for each round of the epilogue: the first round's results are on their way out while the second's sums arrive. The
//! tokens that a block finishes lie first in its activation tiles, and so in its accumulators.

use cuda_std::warp::{self, WARP_SIZE};
use liquidgemm_format::tile::{TileShape, WARPGROUP};

use crate::halves::keeps;
use crate::pipeline::{Cluster, Consumer, Shared, SplitBarriers};
use crate::ptx::mbarrier;
use crate::ptx::memory::{load_shared_x4_if, store_remote_x4_if};
use crate::ptx::wgmma::{Accumulator, BlockVisitor, add_sums};

/// Whether a consumer finishes the eight tokens of block `j` of its accumulator.
#[inline(always)]
pub fn finishes(shape: TileShape, consumer: Consumer, j: u32) -> bool {
    keeps(shape, consumer, j) && is_finished_half(shape, j)
}

/// Whether the block that keeps these eight tokens finishes them, rather than the other one of its cluster.
#[inline(always)]
fn is_finished_half(shape: TileShape, j: u32) -> bool {
    shape.split == 1 || j * 8 % shape.kept_tokens() < shape.finished_tokens()
}

/// A consumer's exchange with the one in the other block.
#[derive(Clone, Copy)]
pub struct Exchange {
    shape: TileShape,
    consumer: Consumer,
    /// Where this thread gets its first sums.
    buffer: u32,
    barriers: SplitBarriers,
    /// The other block's rank.
    other: u32,
}

impl Exchange {
    /// Of a consumer.
    #[inline(always)]
    pub fn new(shared: Shared, shape: TileShape, cluster: Cluster, consumer: Consumer) -> Self {
        Self {
            shape,
            consumer,
            buffer: shared.other_sums(consumer) + consumer.thread * 16,
            barriers: shared.split_barriers(consumer.index),
            other: cluster.part ^ 1,
        }
    }

    /// Makes ready for a tile's sums, and waits until the other consumer has taken those of the tile before. `parity` alternates
    /// from tile to tile, and begins with 0.
    ///
    /// # Safety
    /// All threads of the consumer call it; the cluster's barriers are made.
    #[inline(always)]
    pub unsafe fn open(self, parity: u32) {
        let (rounds, bytes) = (self.shape.epilogue_rounds(), self.shape.split_bytes());
        // SAFETY: the caller vouches for the barriers.
        unsafe {
            if warp::broadcast(self.consumer.thread / WARP_SIZE) == 0 {
                let mut round = 0;
                while round < rounds {
                    mbarrier::arrive_expect(self.barriers.arrived(round), bytes / rounds);
                    round += 1;
                }
            }
            mbarrier::wait(self.barriers.taken(), parity ^ 1);
        }
    }

    /// Hands over the sums of the tokens that the other block finishes.
    ///
    /// # Safety
    /// All threads of the consumer call it, after [`open`](Self::open); the same consumer of the other block does all of this, too.
    #[inline(always)]
    pub unsafe fn give<A: Accumulator>(self, accumulator: &mut A) {
        accumulator.visit(&mut Give(self));
    }

    /// Adds what the other block has of a round of the epilogue.
    ///
    /// # Safety
    /// As for [`give`](Self::give); for each round in turn.
    #[inline(always)]
    pub unsafe fn take<A: Accumulator>(self, accumulator: &mut A, round: u32, parity: u32) {
        // SAFETY: the caller vouches for the barriers.
        unsafe { mbarrier::wait(self.barriers.arrived(round), parity) };
        accumulator.visit(&mut Take { exchange: self, round });
    }

    /// Lets the other block send the next tile's sums.
    ///
    /// Behind a barrier of the consumer that comes after the last [`take`](Self::take): an arrival right behind the loads would overtake
    /// those that wait in the multiprocessor's queue, and the next sums would be where they look.
    ///
    /// # Safety
    /// All threads of the consumer call it, once for each tile that another follows; the other block has not ended before this one.
    #[inline(always)]
    pub unsafe fn release(self) {
        warp::sync_warp();
        if self.consumer.thread % WARP_SIZE == 0 {
            // SAFETY: the caller vouches for the barriers.
            unsafe { mbarrier::arrive_remote_in_order(self.barriers.taken(), self.other) };
        }
    }

    /// The place of a block's sums in the buffer.
    #[inline(always)]
    fn place(self, j: u32) -> u32 {
        self.buffer + j % (self.shape.finished_tokens() / 8) * WARPGROUP * 16
    }
}

struct Give(Exchange);

impl BlockVisitor for Give {
    #[inline(always)]
    fn block(&mut self, j: u32, block: &mut [i32; 4]) {
        let Self(exchange) = *self;
        let Exchange { shape, consumer, barriers, other, .. } = exchange;
        if !is_finished_half(shape, j) {
            let (given, sums) = (keeps(shape, consumer, j), block.map(|sum| sum as u32));
            let barrier = barriers.arrived(shape.round_of_block(j));
            // SAFETY: inside the other block's buffer, whose barrier counts the bytes.
            unsafe { store_remote_x4_if(given, exchange.place(j), sums, barrier, other) };
        }
    }
}

struct Take {
    exchange: Exchange,
    round: u32,
}

impl BlockVisitor for Take {
    #[inline(always)]
    fn block(&mut self, j: u32, block: &mut [i32; 4]) {
        let Exchange { shape, consumer, .. } = self.exchange;
        if is_finished_half(shape, j) && shape.round_of_block(j) == self.round {
            // SAFETY: the other block's sums are there.
            add_sums(block, unsafe { load_shared_x4_if(keeps(shape, consumer, j), self.exchange.place(j)) });
        }
    }
}
