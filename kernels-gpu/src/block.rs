//! Shared memory as the kernel carves it up, and the full and empty barriers of its ring.
//!
//! The layout is `liquidgemm_format::tile`'s, from which the host takes the size.

use cuda_std::cluster;
use liquidgemm_format::brick::BRICK_CHANNELS;
use liquidgemm_format::stream::WeightStream;
use liquidgemm_format::tile::{SPLIT_BARRIERS_BYTES, TileShape, WARPGROUP};

use crate::dequant::SharePlace;
use crate::ptx::{mbarrier, wgmma};

/// Where a block stands in its cluster.
#[derive(Clone, Copy)]
pub struct Cluster {
    /// The cluster's blocks that share activations; 1 where they share K.
    pub blocks: u32,
    /// This block's rank among them.
    pub rank: u32,
    /// Which part of its tiles' K the block multiplies, where blocks share that; else 0.
    pub part: u32,
}

impl Cluster {
    /// Of this block, whose tile has a shape.
    #[inline(always)]
    pub fn of_block(shape: TileShape) -> Self {
        if shape.split > 1 {
            Self { blocks: 1, rank: 0, part: cluster::block_rank() }
        } else {
            Self { blocks: cluster::blocks(), rank: cluster::block_rank(), part: 0 }
        }
    }

    /// Tokens of a tile that each block loads for all of them, an equal part. There is a power of two of blocks.
    #[inline(always)]
    pub fn part_tokens(self, shape: TileShape) -> u32 {
        shape.tokens >> self.blocks.trailing_zeros()
    }

    /// Blocks that finish tokens of the tile, besides this one.
    #[inline(always)]
    pub fn receivers(self, shape: TileShape) -> u32 {
        shape.finishers() - (self.part < shape.finishers()) as u32
    }

    /// Tokens of an activation box: [`TileShape::box_tokens`] without a division.
    #[inline(always)]
    pub fn box_tokens(self, shape: TileShape) -> u32 {
        if shape.split > 1 { shape.finished_tokens() } else { self.part_tokens(shape) }
    }
}

/// The barriers of a consumer's exchange with the other blocks that share its tile's K.
#[derive(Clone, Copy)]
pub struct SplitBarriers(u32);

impl SplitBarriers {
    /// The sums of this round of the epilogue, the first or the second, are here.
    #[inline(always)]
    pub fn arrived(self, round: u32) -> u32 {
        self.0 + round * 8
    }

    /// The blocks that get sums from here have taken theirs.
    #[inline(always)]
    pub fn taken(self) -> u32 {
        self.0 + 16
    }
}

/// Which of a block's consumers a warpgroup is, and which of its threads a thread.
#[derive(Clone, Copy)]
pub struct Consumer {
    /// Among the block's consumers.
    pub index: u32,
    /// The strip of the block's tile that it works on.
    pub strip: u32,
    /// Which bricks of each span are its own, where two consumers share a strip: the first or the second.
    pub half: u32,
    /// The thread in the warpgroup.
    pub thread: u32,
}

impl Consumer {
    /// The consumer that a block's thread belongs to.
    #[inline(always)]
    pub fn of_warpgroup(warpgroup: u32, thread: u32, shape: TileShape) -> Self {
        let (strip, half) = match shape.strips {
            _ if shape.halves == 1 => (warpgroup, 0),
            1 => (0, warpgroup),
            _ => (warpgroup % 2, warpgroup / 2),
        };
        Self { index: warpgroup, strip, half, thread: thread % WARPGROUP }
    }
}

/// The block's shared memory for one tile shape.
#[derive(Clone, Copy)]
pub struct Shared {
    base: u32,
    shape: TileShape,
    stream: WeightStream,
}

impl Shared {
    /// The memory at `base`, 1,024-byte aligned and at least `shape.shared_bytes()` long, for weights of this layout.
    #[inline(always)]
    pub fn new(base: u32, shape: TileShape, stream: WeightStream) -> Self {
        Self { base, shape, stream }
    }

    /// How the weights are laid out, in device memory and here.
    #[inline(always)]
    pub fn stream(self) -> WeightStream {
        self.stream
    }

    /// The address of a stage.
    #[inline(always)]
    fn stage(self, stage: u32) -> u32 {
        self.base + stage * self.shape.stage_bytes()
    }

    /// The activation tiles of a stage, one behind the other: a row of 128 bytes a token, swizzled.
    #[inline(always)]
    pub fn activations(self, stage: u32) -> u32 {
        self.stage(stage)
    }

    /// The descriptor of a stage's first activation tile.
    #[inline(always)]
    pub fn activation_descriptor(self, stage: u32) -> u32 {
        wgmma::descriptor(self.base) + stage * wgmma::descriptor_step(self.shape.stage_bytes())
    }

    /// The bricks of a strip in a stage, span by span: the codes, then the pairs.
    #[inline(always)]
    pub fn bricks(self, stage: u32, strip: u32) -> u32 {
        self.stage(stage) + self.shape.bricks_offset() + strip * self.shape.strip_stage_bytes()
    }

    /// Where a consumer's thread finds its share of the first brick that is the consumer's own, in stage 0.
    #[inline(always)]
    pub fn share_place(self, consumer: Consumer) -> SharePlace {
        SharePlace::of_thread(consumer.thread)
            .moved(self.bricks(0, consumer.strip))
            .in_brick(consumer.half, self.stream)
    }

    /// The buffer in which a consumer transposes its result.
    #[inline(always)]
    pub fn epilogue(self, consumer: Consumer) -> u32 {
        self.base + self.shape.epilogue_offset() + consumer.index * self.shape.epilogue_bytes()
    }

    /// The buffer through which a strip's two consumers exchange sums.
    #[inline(always)]
    pub fn exchange(self, strip: u32) -> u32 {
        self.base + self.shape.exchange_offset() + strip * self.shape.exchange_bytes()
    }

    /// The buffer in which a consumer gets the other blocks' sums, where blocks share a tile's K.
    #[inline(always)]
    pub fn other_sums(self, consumer: Consumer) -> u32 {
        self.base + self.shape.split_offset() + consumer.index * self.shape.split_bytes()
    }

    /// The barriers of that exchange, of a consumer by its index.
    #[inline(always)]
    pub fn split_barriers(self, consumer: u32) -> SplitBarriers {
        SplitBarriers(self.base + self.shape.split_barriers_offset() + consumer * SPLIT_BARRIERS_BYTES)
    }

    /// A consumer's copy of the tile's token scales.
    #[inline(always)]
    pub fn token_scales(self, consumer: Consumer) -> u32 {
        self.base + self.shape.token_scales_offset() + consumer.index * self.shape.tokens * 4
    }

    /// A consumer's copy of its channels' scales and biases.
    #[inline(always)]
    pub fn channels(self, consumer: Consumer) -> u32 {
        self.base + self.shape.channels_offset() + consumer.index * BRICK_CHANNELS as u32 * 8
    }

    /// The full barrier of a span of a stage.
    #[inline(always)]
    pub fn full(self, stage: u32, span: u32) -> u32 {
        self.stage(stage) + self.shape.barriers_offset() + span * 8
    }

    #[inline(always)]
    fn empty(self, stage: u32) -> u32 {
        self.full(stage, self.shape.spans())
    }

    /// Makes the ring's barriers, for a cluster of so many blocks.
    ///
    /// A stage is empty after the arrivals of every thread of the block's own consumers, as each reads bricks, and of
    /// one thread for each consumer warp of the cluster's other blocks, which share the activations.
    ///
    /// # Safety
    /// One thread calls it, and a barrier of the cluster separates it from every use of the ring.
    #[inline(always)]
    pub unsafe fn init_barriers(self, cluster: Cluster) {
        let consumers = self.shape.consumers();
        let empty_arrivals = consumers * WARPGROUP + (cluster.blocks - 1) * consumers * (WARPGROUP / 32);
        let mut stage = 0;
        while stage < self.shape.stages {
            // SAFETY: the barriers lie inside the block's shared memory.
            unsafe {
                let mut span = 0;
                while span < self.shape.spans() {
                    mbarrier::init(self.full(stage, span), self.shape.full_arrivals());
                    span += 1;
                }
                mbarrier::init(self.empty(stage), empty_arrivals);
            }
            stage += 1;
        }
        let mut consumer = 0;
        while consumer < consumers && self.shape.split > 1 {
            let barriers = self.split_barriers(consumer);
            // SAFETY: as above.
            unsafe {
                mbarrier::init(barriers.arrived(0), 1);
                mbarrier::init(barriers.arrived(1), 1);
                // With nobody to hand anything to, nobody waits.
                let receivers = cluster.receivers(self.shape);
                mbarrier::init(barriers.taken(), receivers.max(1) * (WARPGROUP / 32));
            }
            consumer += 1;
        }
        // SAFETY: this thread made the barriers.
        unsafe { mbarrier::fence_init() }
    }

    /// Producer: waits until the consumers are done with a stage.
    ///
    /// # Safety
    /// The barriers are made.
    #[inline(always)]
    pub unsafe fn acquire_empty(self, stage: u32, parity: u32) {
        // SAFETY: the caller vouches for the barriers.
        unsafe { mbarrier::wait(self.empty(stage), parity) }
    }

    /// Producer: announces `bytes` of this producer's copies into a span of a stage, and returns the barrier on which they
    /// count.
    ///
    /// # Safety
    /// The stage is acquired; the producer's whole warp calls it.
    #[inline(always)]
    pub unsafe fn announce(self, stage: u32, span: u32, bytes: u32) -> u32 {
        let full = self.full(stage, span);
        // SAFETY: the caller vouches for the barriers.
        unsafe { mbarrier::arrive_expect(full, bytes) };
        full
    }

    /// Consumer: whether a span of a stage has its data.
    ///
    /// # Safety
    /// The barriers are made.
    #[inline(always)]
    pub unsafe fn is_full(self, stage: u32, span: u32, parity: u32) -> bool {
        // SAFETY: the caller vouches for the barriers.
        unsafe { mbarrier::test(self.full(stage, span), parity) }
    }

    /// Consumer: waits until a span of a stage has its data.
    ///
    /// # Safety
    /// The barriers are made.
    #[inline(always)]
    pub unsafe fn acquire_full(self, stage: u32, span: u32, parity: u32) {
        // SAFETY: the caller vouches for the barriers.
        unsafe { mbarrier::wait(self.full(stage, span), parity) }
    }

    /// Consumer: gives a stage back to the producers of all the cluster's blocks. Every thread calls it.
    ///
    /// # Safety
    /// The barriers are made, and the warp no longer reads the stage.
    #[inline(always)]
    pub unsafe fn release(self, stage: u32, cluster: Cluster, lane: u32) {
        let empty = self.empty(stage);
        // SAFETY: the caller vouches for the barriers, the cluster's blocks end together.
        unsafe {
            mbarrier::arrive(empty);
            if lane < cluster.blocks && lane != cluster.rank {
                mbarrier::arrive_remote(empty, lane);
            }
        }
    }
}
