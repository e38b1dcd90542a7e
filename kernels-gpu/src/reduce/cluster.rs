//! Blocks of a cluster that share a tile's K: each consumer hands the ones with the same channels in the other blocks the sums of the tokens
//! that those finish, adds what it gets to its own part, and finishes that alone. The sums are int32, so the order is of no
//! consequence.
//!
//! They go straight from registers to the other SMs' shared memory, as asynchronous stores whose bytes barriers
//! there count, one for each round of the epilogue: the first round's results are on their way out while the second's sums arrive. The
//! tokens that a block finishes lie first in its activation tiles, and so in its accumulators; which block finishes what is
//! `liquidgemm_format::tile`'s to say.

use cuda_std::warp::{self, WARP_SIZE};
use liquidgemm_format::tile::{TileShape, WARPGROUP};

use crate::halves::keeps;
use crate::pipeline::{Cluster, Consumer, Shared, SplitBarriers};
use crate::ptx::mbarrier;
use crate::ptx::memory::{load_shared_x4_if, store_remote_x4_if};
use crate::ptx::wgmma::{Accumulator, BlockVisitor, add_sums};

/// Whether a consumer finishes the eight tokens of block `j` of its accumulator, in a block that finishes any.
#[inline(always)]
pub fn finishes(shape: TileShape, consumer: Consumer, j: u32) -> bool {
    keeps(shape, consumer, j) && shape.part_of_block(j) == 0
}

/// A consumer's exchange with the ones in the other blocks.
#[derive(Clone, Copy)]
pub struct Exchange {
    shape: TileShape,
    cluster: Cluster,
    consumer: Consumer,
    /// Where this thread gets its first sums.
    buffer: u32,
    barriers: SplitBarriers,
}

impl Exchange {
    /// Of a consumer.
    #[inline(always)]
    pub fn new(shared: Shared, shape: TileShape, cluster: Cluster, consumer: Consumer) -> Self {
        Self {
            shape,
            cluster,
            consumer,
            buffer: shared.other_sums(consumer) + consumer.thread * 16,
            barriers: shared.split_barriers(consumer.index),
        }
    }

    /// Whether this block finishes tokens.
    #[inline(always)]
    pub fn takes(self) -> bool {
        self.shape.finishers() == self.shape.split || self.cluster.part < self.shape.finishers()
    }

    /// Makes ready for a tile's sums, and waits until the others have taken those of the tile before. `parity` alternates
    /// from tile to tile, and begins with 0.
    ///
    /// # Safety
    /// All threads of the consumer call it; the cluster's barriers are made.
    #[inline(always)]
    pub unsafe fn open(self, parity: u32) {
        let shape = self.shape;
        // SAFETY: the caller vouches for the barriers.
        unsafe {
            if warp::broadcast(self.consumer.thread / WARP_SIZE) == 0 && self.takes() {
                let mut round = 0;
                while round < shape.epilogue_rounds() {
                    let bytes = shape.split_bytes() / shape.finished_tokens() * shape.round_tokens(round);
                    mbarrier::arrive_expect(self.barriers.arrived(round), bytes);
                    round += 1;
                }
            }
            if self.cluster.receivers(self.shape) > 0 {
                mbarrier::wait(self.barriers.taken(), parity ^ 1);
            }
        }
    }

    /// Hands over the sums of the tokens that other blocks finish.
    ///
    /// # Safety
    /// All threads of the consumer call it, after [`open`](Self::open); the same consumers of the other blocks do all of this, too.
    #[inline(always)]
    pub unsafe fn give<A: Accumulator>(self, accumulator: &mut A) {
        accumulator.visit(&mut Give(self));
    }

    /// Adds what the other blocks have of a round of the epilogue.
    ///
    /// # Safety
    /// As for [`give`](Self::give), where the block [takes](Self::takes) any; for each round in turn.
    #[inline(always)]
    pub unsafe fn take<A: Accumulator>(self, accumulator: &mut A, round: u32, parity: u32) {
        // SAFETY: the caller vouches for the barriers.
        unsafe { mbarrier::wait(self.barriers.arrived(round), parity) };
        accumulator.visit(&mut Take { exchange: self, round });
    }

    /// Lets the other blocks send the next tile's sums.
    ///
    /// Behind a barrier of the consumer that comes after the last [`take`](Self::take): an arrival right behind the loads would overtake
    /// those that wait in the SM's queue, and the next sums would be where they look.
    ///
    /// # Safety
    /// All threads of the consumer call it, once for each tile that another follows; no other block has ended before this one.
    #[inline(always)]
    pub unsafe fn release(self) {
        warp::sync_warp();
        let lane = self.consumer.thread % WARP_SIZE;
        if lane < self.shape.split && lane != self.cluster.part {
            // SAFETY: the caller vouches for the barriers.
            unsafe { mbarrier::arrive_remote_in_order(self.barriers.taken(), lane) };
        }
    }

    /// The place of a block's sums in a slot of the buffer.
    #[inline(always)]
    fn place(self, slot: u32, j: u32) -> u32 {
        let in_slot = j % (self.shape.finished_tokens() / 8) * WARPGROUP * 16;
        self.buffer + slot * self.shape.slot_bytes() + in_slot
    }
}

struct Give(Exchange);

impl BlockVisitor for Give {
    #[inline(always)]
    fn block(&mut self, j: u32, block: &mut [i32; 4]) {
        let Self(exchange) = *self;
        let Exchange { shape, cluster, consumer, barriers, .. } = exchange;
        let position = shape.part_of_block(j);
        if position == 0 && shape.finishers() == shape.split {
            return;
        }
        let finisher = shape.finisher(cluster.part, position);
        let given = keeps(shape, consumer, j) && finisher != cluster.part;
        let place = exchange.place(shape.slot(finisher, cluster.part), j);
        let barrier = barriers.arrived(shape.round_of_block(j));
        // SAFETY: inside the other block's buffer, whose barrier counts the bytes.
        unsafe { store_remote_x4_if(given, place, block.map(|sum| sum as u32), barrier, finisher) };
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
        if shape.part_of_block(j) != 0 || shape.round_of_block(j) != self.round {
            return;
        }
        let kept = keeps(shape, consumer, j);
        seq_macro::seq!(SLOT in 0..7 {
            if SLOT + 1 < shape.split {
                // SAFETY: the other block's sums are there.
                add_sums(block, unsafe { load_shared_x4_if(kept, self.exchange.place(SLOT, j)) });
            }
        });
    }
}
