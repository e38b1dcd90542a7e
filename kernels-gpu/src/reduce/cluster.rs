//! Cluster split-K: the reduction between the thread blocks of a cluster that share a tile's K.
//!
//! Each thread block finishes a part of the tokens.
//! A consumer keeps its sums of that part, and sends its other sums to the thread blocks that finish them,
//! there to the consumer with the same channels. It adds the sums that it receives to its own.
//! The sums are int32, so the order of additions does not change the result.
//!
//! The sums go straight from registers to the other SMs' shared memory, as asynchronous stores.
//! A barrier there counts their bytes, one barrier for each round of the epilogue:
//! the results of the first round are on their way out while the sums of the second arrive.
//!
//! A thread block's activation tiles, and so its accumulators, begin with the tokens that it finishes.
//! `liquidgemm_format::tile` says which thread block finishes which tokens, and lays out the buffers.

use cuda_std::warp::{self, WARP_SIZE};
use liquidgemm_format::tile::{MAX_CLUSTER_SPLIT, TileShape, WARPGROUP};

use crate::block::{Block, Cluster, Consumer, SplitBarriers};
use crate::ptx::mbarrier;
use crate::ptx::memory::{load_shared_x4_if, store_remote_x4_if};
use crate::ptx::wgmma::{Accumulator, FragmentVisitor, add_sums, words};
use crate::reduce::warpgroup::keeps;
use crate::shape::Shape;

/// Returns whether a consumer finishes accumulator fragment `j`, the sums of eight tokens.
///
/// The answer holds for thread blocks that finish tokens.
#[inline(always)]
pub fn finishes(shape: TileShape, consumer: Consumer, j: u32) -> bool {
    keeps(shape, consumer, j) && shape.part_of_fragment(j) == 0
}

/// A consumer's exchange with the consumers of the same channels in the cluster's other thread blocks.
#[derive(Clone, Copy)]
pub struct Exchange {
    shape: TileShape,
    cluster: Cluster,
    consumer: Consumer,
    /// Address of the first sums that this thread receives.
    buffer: u32,
    barriers: SplitBarriers,
}

impl Exchange {
    /// Returns the exchange of a consumer.
    #[inline(always)]
    pub fn new<S: Shape>(block: Block<S>, consumer: Consumer) -> Self {
        let Block { shared, cluster, .. } = block;
        Self {
            shape: S::SHAPE,
            cluster,
            consumer,
            buffer: shared.other_sums(consumer) + consumer.thread * 16,
            barriers: shared.split_barriers(consumer.index),
        }
    }

    /// Returns whether this thread block finishes tokens, and so receives sums.
    #[inline(always)]
    pub fn takes(self) -> bool {
        self.shape.finishers() == self.shape.cluster_split || self.cluster.part < self.shape.finishers()
    }

    /// Prepares the barriers for a tile's sums.
    /// Then waits until the receivers have added this consumer's sums of the preceding tile.
    ///
    /// `parity` starts with 0 and alternates from tile to tile.
    ///
    /// # Safety
    /// All threads of the consumer call it; the barriers of the whole cluster are initialized.
    #[inline(always)]
    pub unsafe fn open(self, parity: u32) {
        let shape = self.shape;
        // SAFETY: the caller guarantees that the barriers are initialized.
        unsafe {
            if warp::broadcast(self.consumer.thread / WARP_SIZE) == 0 && self.takes() {
                let mut round = 0;
                while round < shape.split_rounds() {
                    let bytes =
                        shape.split_bytes() / shape.finished_tokens() * shape.split_round_tokens(round);
                    mbarrier::arrive_expect(self.barriers.arrived(round), bytes);
                    round += 1;
                }
            }
            if self.cluster.receivers(self.shape) > 0 {
                mbarrier::wait(self.barriers.taken(), parity ^ 1);
            }
        }
    }

    /// Sends the sums of the tokens that other thread blocks finish.
    ///
    /// # Safety
    /// All threads of the consumer call it after [`open`](Self::open).
    /// The same consumers of the cluster's other thread blocks execute the whole exchange, too.
    #[inline(always)]
    pub unsafe fn give<A: Accumulator>(self, accumulator: &mut A) {
        accumulator.visit(&mut Give(self));
    }

    /// Waits for the other thread blocks' sums of a round, and adds them.
    ///
    /// # Safety
    /// As for [`give`](Self::give), for each round in turn.
    /// The thread block must be one that [receives](Self::takes) sums.
    #[inline(always)]
    pub unsafe fn take<A: Accumulator>(self, accumulator: &mut A, round: u32, parity: u32) {
        // SAFETY: the caller guarantees that the barriers are initialized.
        unsafe { mbarrier::wait(self.barriers.arrived(round), parity) };
        accumulator.visit(&mut Take { exchange: self, round });
    }

    /// Lets the other thread blocks send the next tile's sums.
    ///
    /// A barrier of the consumer must separate the last [`take`](Self::take) from this call.
    /// Directly behind the loads, the arrival would overtake loads that wait in the SM's queue,
    /// and the next sums would overwrite what they have still to read.
    ///
    /// # Safety
    /// All threads of the consumer call it, once for each tile that another tile follows.
    /// No thread block of the cluster ends before this one.
    #[inline(always)]
    pub unsafe fn release(self) {
        warp::sync_warp();
        let lane = self.consumer.thread % WARP_SIZE;
        if lane < self.shape.cluster_split && lane != self.cluster.part {
            // SAFETY: the caller guarantees the barriers, and that their thread blocks have not ended.
            unsafe { mbarrier::arrive_remote_in_order(self.barriers.taken(), lane) };
        }
    }

    /// Returns the address of fragment `j` in a slot of the buffer.
    #[inline(always)]
    fn place(self, slot: u32, j: u32) -> u32 {
        let in_slot = j % (self.shape.finished_tokens() / 8) * WARPGROUP * 16;
        self.buffer + slot * self.shape.slot_bytes() + in_slot
    }
}

/// Visitor that sends the fragments that other thread blocks finish.
struct Give(Exchange);

impl FragmentVisitor for Give {
    #[inline(always)]
    fn fragment(&mut self, j: u32, sums: &mut [i32; 4]) {
        let Self(exchange) = *self;
        let Exchange { shape, cluster, consumer, barriers, .. } = exchange;
        let position = shape.part_of_fragment(j);
        if position == 0 && shape.finishers() == shape.cluster_split {
            return;
        }
        let finisher = shape.finisher(cluster.part, position);
        let given = keeps(shape, consumer, j) && finisher != cluster.part;
        let place = exchange.place(shape.slot(finisher, cluster.part), j);
        let barrier = barriers.arrived(shape.split_round_of_fragment(j));
        // SAFETY: the address is inside the receiver's buffer, and its barrier counts the bytes.
        unsafe { store_remote_x4_if(given, place, words(*sums), barrier, finisher) };
    }
}

/// Visitor that adds the other thread blocks' sums to the fragments of a round.
struct Take {
    exchange: Exchange,
    round: u32,
}

impl FragmentVisitor for Take {
    #[inline(always)]
    fn fragment(&mut self, j: u32, sums: &mut [i32; 4]) {
        let Exchange { shape, consumer, .. } = self.exchange;
        if shape.part_of_fragment(j) != 0 || shape.split_round_of_fragment(j) != self.round {
            return;
        }
        let kept = keeps(shape, consumer, j);
        const { assert!(MAX_CLUSTER_SPLIT == 4) };
        seq_macro::seq!(SLOT in 0..3 {
            if SLOT + 1 < shape.cluster_split {
                // SAFETY: the other thread block's sums have arrived.
                add_sums(sums, unsafe { load_shared_x4_if(kept, self.exchange.place(SLOT, j)) });
            }
        });
    }
}
