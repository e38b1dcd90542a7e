//! Stream-K: the reduction of a tile's partial sums between persistent clusters, through global memory.
//!
//! A tile's owner is the cluster that computes its last k-iteration;
//! its peers are the clusters that compute earlier ones.
//! A peer stores its int32 sums and raises a flag. The owner waits for its peers' flags and adds their sums.
//! The sums are int32, so the reduction is exact.
//!
//! Every thread block has one slot, with the sums of each strip in the order of its consumers' threads,
//! and a flag for each consumer.
//! With warpgroup split-K each of a strip's consumers stores and adds the tokens that it finishes.
//! Flags are zero between launches: the owner that waits for a flag also lowers it.
//! `liquidgemm_format::schedule` says which clusters are a tile's owner and peers.

use core::ops::Range;

use cuda_std::thread;
use liquidgemm_format::arguments::GemmArguments;
use liquidgemm_format::tile::{TileShape, WARPGROUP};

use crate::block::{Block, Cluster, Consumer};
use crate::ptx::memory::{await_flag, load_global_x4_if, raise_flag, store_global_x4};
use crate::ptx::wgmma::{Accumulator, FragmentVisitor, add_sums, words};
use crate::reduce::cluster::finishes;
use crate::shape::Shape;

/// Waits for all threads of one consumer, at a named barrier of its own.
#[inline(always)]
pub fn sync_consumer(consumer: u32) {
    thread::sync_named::<WARPGROUP>(1 + consumer);
}

/// Bytes from one fragment of a thread to its next. The fragments of a consumer's threads lie side by side.
const BLOCK_STRIDE: u64 = WARPGROUP as u64 * 16;

/// The part of the slots that a thread reads and writes.
#[derive(Clone, Copy)]
pub struct Slots {
    shape: TileShape,
    /// The thread block's place in its cluster.
    /// It shares tiles with the thread blocks of the same rank in other clusters.
    cluster: Cluster,
    consumer: Consumer,
}

impl Slots {
    /// Returns a consumer's part of the slots.
    #[inline(always)]
    pub fn new<S: Shape>(block: Block<S>, consumer: Consumer) -> Self {
        Self { shape: S::SHAPE, cluster: block.cluster, consumer }
    }

    /// Returns the index among all thread blocks of the one with this rank in cluster `cluster_index`.
    #[inline(always)]
    fn block_number(self, cluster_index: u32) -> u32 {
        cluster_index * self.cluster.blocks + self.cluster.rank
    }

    /// Returns the address of this thread's first fragment in the slot of cluster `cluster_index`.
    ///
    /// The other fragments follow at multiples of [`BLOCK_STRIDE`].
    #[inline(always)]
    fn slot(self, arguments: &GemmArguments, cluster_index: u32) -> u64 {
        let strips_before = self.block_number(cluster_index) * self.shape.strips + self.consumer.strip;
        let offset = strips_before as u64 * self.shape.strip_sums_bytes() as u64;
        arguments.partials + offset + self.consumer.thread as u64 * 16
    }

    /// Returns the address of this consumer's flag for cluster `cluster_index`.
    #[inline(always)]
    fn flag(self, arguments: &GemmArguments, cluster_index: u32) -> u64 {
        let consumers_before =
            self.block_number(cluster_index) * self.shape.consumers() + self.consumer.index;
        arguments.flags + consumers_before as u64 * 4
    }

    /// Stores this consumer's partial sums for the tile's owner.
    ///
    /// # Safety
    /// All threads of the consumer call it; the arguments' slots and flags are valid.
    #[inline(always)]
    pub unsafe fn store_partials<A: Accumulator>(
        self,
        accumulator: &mut A,
        arguments: &GemmArguments,
        cluster_index: u32,
    ) {
        accumulator.visit(&mut Write { slots: self, address: self.slot(arguments, cluster_index) });
        sync_consumer(self.consumer.index);
        if self.consumer.thread == 0 {
            // SAFETY: the caller guarantees that the flag is valid.
            unsafe { raise_flag(self.flag(arguments, cluster_index)) };
        }
    }

    /// Adds the partial sums of the peers, the clusters `peers`, to this consumer's sums.
    ///
    /// # Safety
    /// As for [`store_partials`](Self::contribute).
    #[inline(always)]
    pub unsafe fn collect<A: Accumulator>(
        self,
        accumulator: &mut A,
        arguments: &GemmArguments,
        peers: Range<u32>,
    ) {
        if peers.start >= peers.end {
            return;
        }
        // Each flag has a thread of its own that waits for it, so that the waits overlap.
        let mut waited = peers.start + self.consumer.thread;
        while waited < peers.end {
            // SAFETY: the caller guarantees that the flag is valid.
            unsafe { await_flag(self.flag(arguments, waited)) };
            waited += WARPGROUP;
        }
        sync_consumer(self.consumer.index);
        let cluster_stride = self.slot(arguments, 1) - self.slot(arguments, 0);
        let mut address = self.slot(arguments, peers.start);
        let mut left = peers.end - peers.start;
        while left > 0 {
            // Keep eight loads in flight. A small tile gets that many by loading from several peers at once.
            let together = match A::TOKENS {
                0..=16 => 4,
                17..=32 => 2,
                _ => 1,
            };
            let count = left.min(together);
            let source = Source { slots: self, address, cluster_stride, count };
            match A::TOKENS {
                0..=16 => accumulator.visit(&mut Add::<4, 2>::start(source)),
                17..=32 => accumulator.visit(&mut Add::<2, 4>::start(source)),
                _ => accumulator.visit(&mut Add::<1, 8>::start(source)),
            }
            address += cluster_stride * count as u64;
            left -= count;
        }
    }
}

/// Visitor that stores the fragments that the consumer finishes to its slot.
struct Write {
    slots: Slots,
    address: u64,
}

impl FragmentVisitor for Write {
    #[inline(always)]
    fn fragment(&mut self, j: u32, sums: &mut [i32; 4]) {
        if !finishes(self.slots.shape, self.slots.consumer, j) {
            return;
        }
        // SAFETY: the fragment lies in this cluster's slot.
        unsafe { store_global_x4(self.address + j as u64 * BLOCK_STRIDE, words(*sums)) };
    }
}

/// The slots of `count` peers, which follow one another.
#[derive(Clone, Copy)]
struct Source {
    slots: Slots,
    address: u64,
    cluster_stride: u64,
    count: u32,
}

impl Source {
    /// Loads fragment `j` of `TOGETHER` peers; zeros for peers beyond `count`.
    #[inline(always)]
    fn load<const TOGETHER: usize>(self, j: u32) -> [[i32; 4]; TOGETHER] {
        let mut blocks = [[0; 4]; TOGETHER];
        seq_macro::seq!(I in 0..4 {
            if I < TOGETHER {
                let address = self.address + I as u64 * self.cluster_stride + j as u64 * BLOCK_STRIDE;
                let valid = (I as u32) < self.count && self.is_finished_here(j);
                // SAFETY: the fragment lies in the slot of a peer whose flag was seen.
                blocks[I] = unsafe { load_global_x4_if(valid, address) };
            }
        });
        blocks
    }

    /// Returns whether fragment `j` exists and the consumer finishes it.
    #[inline(always)]
    fn is_finished_here(self, j: u32) -> bool {
        j * 8 < self.slots.shape.tokens && finishes(self.slots.shape, self.slots.consumer, j)
    }
}

/// Adds the sums of up to `TOGETHER` peers, at most four.
///
/// The loads of `AHEAD` fragments, at most eight, are in flight.
struct Add<const TOGETHER: usize, const AHEAD: usize> {
    source: Source,
    /// Loaded fragments: fragment `j` at `j % AHEAD`.
    asked_for: [[[i32; 4]; TOGETHER]; AHEAD],
}

impl<const TOGETHER: usize, const AHEAD: usize> Add<TOGETHER, AHEAD> {
    /// Starts the loads of the first fragments.
    #[inline(always)]
    fn start(source: Source) -> Self {
        let mut asked_for = [[[0; 4]; TOGETHER]; AHEAD];
        seq_macro::seq!(J in 0..8 {
            if J < AHEAD {
                asked_for[J] = source.load(J as u32);
            }
        });
        Self { source, asked_for }
    }
}

impl<const TOGETHER: usize, const AHEAD: usize> FragmentVisitor for Add<TOGETHER, AHEAD> {
    #[inline(always)]
    fn fragment(&mut self, j: u32, sums: &mut [i32; 4]) {
        let place = j as usize % AHEAD;
        seq_macro::seq!(I in 0..4 {
            if I < TOGETHER {
                add_sums(sums, self.asked_for[place][I]);
            }
        });
        self.asked_for[place] = self.source.load(j + AHEAD as u32);
    }
}
