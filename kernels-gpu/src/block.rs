//! A thread block's place in its cluster, its consumers, its shared memory,
//! and the full and empty barriers of its pipeline.
//!
//! The layout of shared memory is that of `liquidgemm_format::tile::TileShape`,
//! from which the host takes the launch's shared-memory size.

use core::marker::PhantomData;

use cuda_std::{cluster, shared};
use liquidgemm_format::brick::BRICK_CHANNELS;
use liquidgemm_format::grouped;
use liquidgemm_format::stream::WeightStream;
use liquidgemm_format::tile::{MAX_SPLIT_ROUNDS, SPLIT_BARRIERS_BYTES, TileShape, WARPGROUP};

use crate::dequant::FragmentAddress;
use crate::ptx::{mbarrier, wgmma};
use crate::shape::Shape;

/// A thread block that computes tiles of shape `S`.
#[derive(Clone, Copy)]
pub struct Block<S> {
    /// The thread block's shared memory.
    pub shared: Shared,
    /// The thread block's place in its cluster.
    pub cluster: Cluster,
    shape: PhantomData<S>,
}

impl<S: Shape> Block<S> {
    /// Returns the calling thread block, for weights laid out as `stream` says.
    #[inline(always)]
    pub fn current(stream: WeightStream) -> Self {
        Self {
            shared: Shared::new(shared::dynamic_shared_mem(), S::SHAPE, stream),
            cluster: Cluster::of_block(S::SHAPE),
            shape: PhantomData,
        }
    }
}

/// A thread block's place in its cluster.
#[derive(Clone, Copy)]
pub struct Cluster {
    /// Thread blocks of the cluster that share activation tiles; 1 with cluster split-K.
    pub blocks: u32,
    /// The thread block's rank among those; 0 with cluster split-K.
    pub rank: u32,
    /// With cluster split-K, the part of the tile's K that the thread block multiplies; otherwise 0.
    pub part: u32,
}

impl Cluster {
    /// Returns the place of the calling thread block, which computes tiles of shape `shape`.
    #[inline(always)]
    pub fn of_block(shape: TileShape) -> Self {
        if shape.cluster_split > 1 {
            Self { blocks: 1, rank: 0, part: cluster::block_rank() }
        } else {
            Self { blocks: cluster::blocks(), rank: cluster::block_rank(), part: 0 }
        }
    }

    /// Returns the tokens of a tile that each thread block loads and multicasts to all: an equal part.
    ///
    /// The number of thread blocks is a power of two, so a shift replaces the division.
    #[inline(always)]
    pub fn part_tokens(self, shape: TileShape) -> u32 {
        shape.tokens >> self.blocks.trailing_zeros()
    }

    /// Returns the number of other thread blocks that finish tokens of the tile.
    /// This thread block sends sums to all of them.
    #[inline(always)]
    pub fn receivers(self, shape: TileShape) -> u32 {
        shape.finishers() - (self.part < shape.finishers()) as u32
    }

    /// Returns the tokens of an activation box: [`TileShape::box_tokens`] without a division.
    #[inline(always)]
    pub fn box_tokens(self, shape: TileShape) -> u32 {
        if shape.cluster_split > 1 { shape.finished_tokens() } else { self.part_tokens(shape) }
    }
}

/// The barriers through which a consumer exchanges sums with the other thread blocks in cluster split-K.
#[derive(Clone, Copy)]
pub struct SplitBarriers(u32);

impl SplitBarriers {
    /// Returns the barrier that completes when the other thread blocks' sums of a round have arrived.
    ///
    /// `round` is below [`MAX_SPLIT_ROUNDS`]. A round is a part of the epilogue.
    #[inline(always)]
    pub fn arrived(self, round: u32) -> u32 {
        self.0 + round * 8
    }

    /// Returns the barrier that completes when the receivers of this consumer's sums have added them.
    #[inline(always)]
    pub fn taken(self) -> u32 {
        self.0 + MAX_SPLIT_ROUNDS * 8
    }
}

/// The consumer that a warpgroup is, and a thread's index in it.
#[derive(Clone, Copy)]
pub struct Consumer {
    /// Index among the thread block's consumers.
    pub index: u32,
    /// The strip of the thread block's tile that the consumer computes.
    pub strip: u32,
    /// With warpgroup split-K, the brick of each K-tile that the consumer multiplies, 0 or 1; otherwise 0.
    pub k_index: u32,
    /// The thread's index in the warpgroup.
    pub thread: u32,
}

impl Consumer {
    /// Returns the consumer of `warpgroup`, for the thread `thread` of the thread block.
    #[inline(always)]
    pub fn of_warpgroup(warpgroup: u32, thread: u32, shape: TileShape) -> Self {
        let (strip, k_index) = match shape.strips {
            _ if shape.warpgroup_split == 1 => (warpgroup, 0),
            1 => (0, warpgroup),
            _ => (warpgroup % 2, warpgroup / 2),
        };
        Self { index: warpgroup, strip, k_index, thread: thread % WARPGROUP }
    }
}

/// A thread block's shared memory, laid out for one tile shape.
#[derive(Clone, Copy)]
pub struct Shared {
    base: u32,
    shape: TileShape,
    stream: WeightStream,
}

impl Shared {
    /// Returns the shared memory at `base`, for weights laid out as `stream` says.
    ///
    /// `base` is aligned to 1,024 bytes and `shape.shared_bytes()` bytes are valid there.
    #[inline(always)]
    fn new(base: u32, shape: TileShape, stream: WeightStream) -> Self {
        Self { base, shape, stream }
    }

    /// Returns the layout of the weights, which is the same in device and shared memory.
    #[inline(always)]
    pub fn stream(self) -> WeightStream {
        self.stream
    }

    /// Returns the address of a stage.
    #[inline(always)]
    fn stage(self, stage: u32) -> u32 {
        self.base + stage * self.shape.stage_bytes()
    }

    /// Returns the address of a stage's activation tiles.
    ///
    /// The tiles of the stage's K-tiles follow one another.
    /// A tile has a row of 128 bytes for each token, with the 128-byte swizzle.
    #[inline(always)]
    pub fn activations(self, stage: u32) -> u32 {
        self.stage(stage)
    }

    /// Returns the lower half of the wgmma descriptor of a stage's first activation tile.
    #[inline(always)]
    pub fn activation_descriptor(self, stage: u32) -> u32 {
        wgmma::descriptor(self.base) + stage * wgmma::descriptor_step(self.shape.stage_bytes())
    }

    /// Returns the address of a strip's bricks in a stage: for each K-tile the codes, then the pairs.
    #[inline(always)]
    pub fn bricks(self, stage: u32, strip: u32) -> u32 {
        self.stage(stage) + self.shape.bricks_offset() + strip * self.shape.strip_stage_bytes()
    }

    /// Returns the address of a thread's A fragment in stage 0, in the consumer's first brick.
    #[inline(always)]
    pub fn fragment_address(self, consumer: Consumer) -> FragmentAddress {
        FragmentAddress::of_thread(consumer.thread)
            .moved(self.bricks(0, consumer.strip))
            .in_brick(consumer.k_index, self.stream)
    }

    /// Returns the address of a consumer's transposition buffers.
    #[inline(always)]
    pub fn epilogue(self, consumer: Consumer) -> u32 {
        self.base + self.shape.epilogue_offset() + consumer.index * self.shape.epilogue_bytes()
    }

    /// Returns the address of the buffer through which the two consumers of a strip exchange sums.
    #[inline(always)]
    pub fn exchange(self, strip: u32) -> u32 {
        self.base + self.shape.exchange_offset() + strip * self.shape.exchange_bytes()
    }

    /// Returns the address of the buffer that receives other thread blocks' sums in cluster split-K.
    #[inline(always)]
    pub fn other_sums(self, consumer: Consumer) -> u32 {
        self.base + self.shape.split_offset() + consumer.index * self.shape.split_bytes()
    }

    /// Returns the barriers of that exchange, for the consumer with index `consumer`.
    #[inline(always)]
    pub fn split_barriers(self, consumer: u32) -> SplitBarriers {
        SplitBarriers(self.base + self.shape.split_barriers_offset() + consumer * SPLIT_BARRIERS_BYTES)
    }

    /// Returns the address of a consumer's copy of the tile's token scales, one f32 each.
    #[inline(always)]
    pub fn token_scales(self, consumer: Consumer) -> u32 {
        self.base + self.shape.token_scales_offset() + consumer.index * self.shape.tokens * 4
    }

    /// Returns the address of a consumer's copy of its channels' scales and biases, two f32 per channel.
    #[inline(always)]
    pub fn channels(self, consumer: Consumer) -> u32 {
        self.base + self.shape.channels_offset() + consumer.index * BRICK_CHANNELS as u32 * 8
    }

    /// Returns the address of a grouped kernel's table of experts.
    #[inline(always)]
    pub fn expert_table(self) -> u32 {
        self.base + grouped::table_offset(self.shape)
    }

    /// Returns the full barrier of a K-tile of a stage.
    #[inline(always)]
    pub fn full(self, stage: u32, k_tile: u32) -> u32 {
        self.stage(stage) + self.shape.barriers_offset() + k_tile * 8
    }

    /// Returns the empty barrier of a stage.
    #[inline(always)]
    fn empty(self, stage: u32) -> u32 {
        self.full(stage, self.shape.k_tiles())
    }

    /// Initializes the barriers of the ring and of the exchange between thread blocks.
    ///
    /// Every thread of the thread block's own consumers arrives at an empty barrier,
    /// because each of them reads bricks.
    /// One thread of each consumer warp of the cluster's other thread blocks arrives as well,
    /// because they share the activations.
    ///
    /// # Safety
    /// One thread calls it. A barrier of the whole cluster separates the call from every use of the barriers.
    #[inline(always)]
    pub unsafe fn init_barriers(self, cluster: Cluster) {
        let consumers = self.shape.consumers();
        let empty_arrivals = consumers * WARPGROUP + (cluster.blocks - 1) * consumers * (WARPGROUP / 32);
        let mut stage = 0;
        while stage < self.shape.stages {
            // SAFETY: the barriers lie inside the thread block's shared memory.
            unsafe {
                let mut k_tile = 0;
                while k_tile < self.shape.k_tiles() {
                    mbarrier::init(self.full(stage, k_tile), self.shape.full_arrivals());
                    k_tile += 1;
                }
                mbarrier::init(self.empty(stage), empty_arrivals);
            }
            stage += 1;
        }
        let mut consumer = 0;
        while consumer < consumers && self.shape.cluster_split > 1 {
            let barriers = self.split_barriers(consumer);
            // SAFETY: the barriers lie inside the thread block's shared memory.
            unsafe {
                let mut round = 0;
                while round < MAX_SPLIT_ROUNDS {
                    mbarrier::init(barriers.arrived(round), 1);
                    round += 1;
                }
                // Without receivers nobody waits on this barrier, but a barrier needs at least one arrival.
                let receivers = cluster.receivers(self.shape);
                mbarrier::init(barriers.taken(), receivers.max(1) * (WARPGROUP / 32));
            }
            consumer += 1;
        }
        // SAFETY: this thread initialized the barriers.
        unsafe { mbarrier::fence_init() }
    }

    /// Producer: waits until the consumers have released a stage.
    ///
    /// # Safety
    /// The barriers are initialized.
    #[inline(always)]
    pub unsafe fn acquire_empty(self, stage: u32, parity: u32) {
        // SAFETY: the caller guarantees that the barriers are initialized.
        unsafe { mbarrier::wait(self.empty(stage), parity) }
    }

    /// Producer: announces `bytes` of its copies into a K-tile of a stage.
    /// Returns the full barrier that must count them.
    ///
    /// # Safety
    /// The stage is acquired; the producer's whole warp calls it.
    #[inline(always)]
    pub unsafe fn announce(self, stage: u32, k_tile: u32, bytes: u32) -> u32 {
        let full = self.full(stage, k_tile);
        // SAFETY: the caller guarantees that the barriers are initialized and the warp is whole.
        unsafe { mbarrier::arrive_expect(full, bytes) };
        full
    }

    /// Consumer: returns whether a K-tile of a stage has arrived.
    ///
    /// # Safety
    /// The barriers are initialized.
    #[inline(always)]
    pub unsafe fn is_full(self, stage: u32, k_tile: u32, parity: u32) -> bool {
        // SAFETY: the caller guarantees that the barriers are initialized.
        unsafe { mbarrier::test(self.full(stage, k_tile), parity) }
    }

    /// Consumer: waits until a K-tile of a stage has arrived.
    ///
    /// # Safety
    /// The barriers are initialized.
    #[inline(always)]
    pub unsafe fn acquire_full(self, stage: u32, k_tile: u32, parity: u32) {
        // SAFETY: the caller guarantees that the barriers are initialized.
        unsafe { mbarrier::wait(self.full(stage, k_tile), parity) }
    }

    /// Consumer: releases a stage to the producers of all thread blocks in the cluster.
    ///
    /// # Safety
    /// Every thread of the consumer calls it.
    /// The barriers are initialized, and the warp no longer reads the stage.
    #[inline(always)]
    pub unsafe fn release(self, stage: u32, cluster: Cluster, lane: u32) {
        let empty = self.empty(stage);
        // SAFETY: the caller guarantees that the barriers are initialized;
        // the cluster's thread blocks end together, so the remote barriers still exist.
        unsafe {
            mbarrier::arrive(empty);
            if lane < cluster.blocks && lane != cluster.rank {
                mbarrier::arrive_remote(empty, lane);
            }
        }
    }
}
