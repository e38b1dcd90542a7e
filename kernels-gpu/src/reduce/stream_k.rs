//! Partial sums of a tile that several workers share: int32, through global memory, and therefore exact.
//!
//! Every block has one slot, a strip's sums laid out as its consumer's threads hold them, and a flag for each consumer.
//! Where two consumers share a strip, each writes and adds the tokens that it finishes.
//! Flags are zero between launches: whoever waits for one lowers it.

use core::ops::Range;

use cuda_std::thread;
use liquidgemm_format::arguments::GemmArguments;
use liquidgemm_format::tile::{TileShape, WARPGROUP};

use crate::pipeline::{Cluster, Consumer};
use crate::ptx::memory::{await_flag, load_global_x4_if, raise_flag, store_global_x4};
use crate::ptx::wgmma::{Accumulator, BlockVisitor, add_sums};
use crate::split::finishes;

/// The named barrier of one consumer.
#[inline(always)]
pub fn sync_consumer(consumer: u32) {
    thread::sync_named::<WARPGROUP>(1 + consumer);
}

/// Bytes from one block of a thread's sums to its next: the whole consumer's lie side by side.
const BLOCK_STRIDE: u64 = WARPGROUP as u64 * 16;

/// Which part of the slots a thread reads and writes.
#[derive(Clone, Copy)]
pub struct Slots {
    /// The kernel's tile shape.
    pub shape: TileShape,
    /// The block's place in its cluster: it shares tiles with the blocks of the same rank.
    pub cluster: Cluster,
    /// The consumer in its block.
    pub consumer: Consumer,
}

impl Slots {
    /// The number of the block, of this rank, in the cluster of `worker`.
    #[inline(always)]
    fn block(self, worker: u32) -> u32 {
        worker * self.cluster.blocks + self.cluster.rank
    }

    /// The address of this thread's first sums in a worker's slot; the others follow at [`BLOCK_STRIDE`].
    #[inline(always)]
    fn slot(self, arguments: &GemmArguments, worker: u32) -> u64 {
        let strips_before = self.block(worker) * self.shape.strips + self.consumer.strip;
        let offset = strips_before as u64 * self.shape.strip_sums_bytes() as u64;
        arguments.partials + offset + self.consumer.thread as u64 * 16
    }

    #[inline(always)]
    fn flag(self, arguments: &GemmArguments, worker: u32) -> u64 {
        let consumers_before = self.block(worker) * self.shape.consumers() + self.consumer.index;
        arguments.flags + consumers_before as u64 * 4
    }

    /// Hands this consumer's sums to the tile's owner.
    ///
    /// # Safety
    /// All threads of the consumer call it; the arguments' slots and flags are valid.
    #[inline(always)]
    pub unsafe fn contribute<A: Accumulator>(
        self,
        accumulator: &mut A,
        arguments: &GemmArguments,
        worker: u32,
    ) {
        accumulator.visit(&mut Write { slots: self, address: self.slot(arguments, worker) });
        sync_consumer(self.consumer.index);
        if self.consumer.thread == 0 {
            // SAFETY: the caller vouches for the flag.
            unsafe { raise_flag(self.flag(arguments, worker)) };
        }
    }

    /// Adds the sums of `contributors` to this consumer's.
    ///
    /// # Safety
    /// As for [`contribute`](Self::contribute).
    #[inline(always)]
    pub unsafe fn collect<A: Accumulator>(
        self,
        accumulator: &mut A,
        arguments: &GemmArguments,
        contributors: Range<u32>,
    ) {
        if contributors.start >= contributors.end {
            return;
        }
        // Each flag has a thread that waits for it, so that the waits go on side by side.
        let mut waited = contributors.start + self.consumer.thread;
        while waited < contributors.end {
            // SAFETY: the caller vouches for the flag.
            unsafe { await_flag(self.flag(arguments, waited)) };
            waited += WARPGROUP;
        }
        sync_consumer(self.consumer.index);
        let worker_stride = self.slot(arguments, 1) - self.slot(arguments, 0);
        let mut address = self.slot(arguments, contributors.start);
        let mut left = contributors.end - contributors.start;
        while left > 0 {
            // Loads take long to answer: eight are under way, of as many contributors as the tile has too few blocks for.
            let together = match A::TOKENS {
                0..=16 => 4,
                17..=32 => 2,
                _ => 1,
            };
            let count = left.min(together);
            let source = Source { slots: self, address, worker_stride, count };
            match A::TOKENS {
                0..=16 => accumulator.visit(&mut Add::<4, 2>::start(source)),
                17..=32 => accumulator.visit(&mut Add::<2, 4>::start(source)),
                _ => accumulator.visit(&mut Add::<1, 8>::start(source)),
            }
            address += worker_stride * count as u64;
            left -= count;
        }
    }
}

struct Write {
    slots: Slots,
    address: u64,
}

impl BlockVisitor for Write {
    #[inline(always)]
    fn block(&mut self, j: u32, block: &mut [i32; 4]) {
        if !finishes(self.slots.shape, self.slots.consumer, j) {
            return;
        }
        // SAFETY: the block lies in this worker's slot.
        unsafe { store_global_x4(self.address + j as u64 * BLOCK_STRIDE, block.map(|sum| sum as u32)) };
    }
}

/// The slots of `count` contributors, one after the other.
#[derive(Clone, Copy)]
struct Source {
    slots: Slots,
    address: u64,
    worker_stride: u64,
    count: u32,
}

impl Source {
    /// Asks for block `j` of `TOGETHER` contributors; zeros for those that there are not.
    #[inline(always)]
    fn load<const TOGETHER: usize>(self, j: u32) -> [[i32; 4]; TOGETHER] {
        let mut blocks = [[0; 4]; TOGETHER];
        seq_macro::seq!(I in 0..4 {
            if I < TOGETHER {
                let address = self.address + I as u64 * self.worker_stride + j as u64 * BLOCK_STRIDE;
                let valid = (I as u32) < self.count && self.is_finished_here(j);
                // SAFETY: the block lies in a contributor's slot, whose flag was seen.
                blocks[I] = unsafe { load_global_x4_if(valid, address) };
            }
        });
        blocks
    }

    #[inline(always)]
    fn is_finished_here(self, j: u32) -> bool {
        j * 8 < self.slots.shape.tokens && finishes(self.slots.shape, self.slots.consumer, j)
    }
}

/// Adds the sums of up to `TOGETHER` contributors, at most four, with `AHEAD` blocks asked for ahead, at most eight.
struct Add<const TOGETHER: usize, const AHEAD: usize> {
    source: Source,
    /// Block `j` is at `j % AHEAD`.
    asked_for: [[[i32; 4]; TOGETHER]; AHEAD],
}

impl<const TOGETHER: usize, const AHEAD: usize> Add<TOGETHER, AHEAD> {
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

impl<const TOGETHER: usize, const AHEAD: usize> BlockVisitor for Add<TOGETHER, AHEAD> {
    #[inline(always)]
    fn block(&mut self, j: u32, block: &mut [i32; 4]) {
        let place = j as usize % AHEAD;
        seq_macro::seq!(I in 0..4 {
            if I < TOGETHER {
                add_sums(block, self.asked_for[place][I]);
            }
        });
        self.asked_for[place] = self.source.load(j + AHEAD as u32);
    }
}
