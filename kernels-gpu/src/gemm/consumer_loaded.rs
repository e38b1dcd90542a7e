//! The GEMM whose consumers load for themselves, for tiles of 192 channels × 144 to 256 tokens.
//!
//! The accumulators of such tiles leave no registers for a producer.
//! Each activation that reaches an SM is reused for 192 channels instead of 128,
//! which saves the most where the GPU's power is the limit.
//! The first consumer warp refills a stage while it waits for its own products of the next stage,
//! so that no consumer waits for the refill.
//!
//! Everything else is as in [`gemm`](mod@crate::gemm), with two exceptions:
//! a tile is never shared along K, and each brick is a wgmma group of its own,
//! because registers suffice for one brick's operands only.
//! The host twin is `host/src/gpu/gemm.rs`.

use cuda_std::{TensorMap, cluster, thread, warp};
use liquidgemm_format::arguments::GemmArguments;
use liquidgemm_format::ring::RingCursor;
use liquidgemm_format::tile::{K_TILE, WARPGROUP};

use super::producer::{KTileLoad, TokenBoxes, tile_tokens};
use super::{first_strip, sync, tile_strips};
use crate::block::{Block, Consumer};
use crate::dequant::{AFragment, FragmentAddress, LiquidQuant};
use crate::epilogue::Epilogue;
use crate::ptx::tma::Policy;
use crate::ptx::wgmma::{Accumulator, DESCRIPTOR_K32};
use crate::ptx::{copy, grid, hint, tma, wgmma};
use crate::shape::Shape;

/// Computes the cluster's tiles: the body of the kernels, which each thread executes.
///
/// `S` is the tile shape, `A` the accumulator of a strip, `STAGES` the number of stages in the ring.
///
/// # Safety
/// As for [`gemm`](crate::gemm::gemm); the schedule has no stream-K tiles.
#[inline(always)]
pub unsafe fn gemm<A: Accumulator, S: Shape, const STAGES: u32>(
    activations: TokenBoxes,
    output: *const TensorMap,
    arguments: &GemmArguments,
) {
    let shape = S::SHAPE;
    let block = Block::<S>::current(arguments.weights.stream);
    let Block { shared, cluster, .. } = block;
    let thread = thread::thread_idx_x();
    let warp = warp::broadcast(thread / warp::WARP_SIZE);

    if thread == 0 {
        // SAFETY: the maps are kernel parameters;
        // the barrier below orders the initialization of the barriers before their use.
        unsafe {
            activations.prefetch(arguments, block);
            tma::prefetch_map(output);
            shared.init_barriers(cluster);
        }
    }
    sync(cluster);

    let schedule = arguments.schedule;
    let cluster_index = cluster::cluster_idx_x();
    let consumer = Consumer::of_warpgroup(warp / 4, thread, shape);
    let fills = warp == 0;
    let mut filler = Filler::<S, STAGES>::new(activations, arguments, block, cluster_index);
    grid::launch_dependents();
    // SAFETY: one whole warp fills the ring; the barriers are initialized.
    unsafe {
        if fills {
            filler.fill_bricks_of_first_turn();
        }
        grid::wait_for_dependency();
        if fills {
            filler.fill_activations_of_first_turn();
        }
    }

    let mut walk = Walk::<S, STAGES> {
        block,
        place: shared.fragment_address(consumer),
        lane: thread % warp::WARP_SIZE,
        ring: RingCursor::start(),
        fills,
        is_first_iteration: true,
    };
    let mut tile = cluster_index;
    while tile < schedule.tiles() {
        let position = schedule.position(tile);
        let strip = first_strip(position, block) + consumer.strip;
        let token = position.token_tile * shape.tokens;
        // Values derived from the thread index have no registers during the main loop.
        // The epilogue derives them anew.
        let epilogue = |thread: u32| {
            let consumer = Consumer { thread: thread % WARPGROUP, ..consumer };
            Epilogue::new(arguments, output, block, [strip, token], consumer)
        };
        let mut accumulator = A::arbitrary();
        // SAFETY: the consumer has left the last tile's epilogue, and all its threads execute this;
        // the caller guarantees the arguments.
        unsafe {
            epilogue(hint::thread_idx_anew()).copy_scales();
            walk.multiply(&mut accumulator, schedule.k_iterations, &mut filler);
            copy::await_groups::<0>();
            epilogue(hint::thread_idx_anew()).store(&mut accumulator, None);
        }
        tile += schedule.clusters;
    }
    // The thread block's shared memory must last until the TMA stores have read it.
    tma::await_stores::<0>();
    if cluster.blocks > 1 {
        // The cluster's other thread blocks may still send activations to this one,
        // or arrive on its barriers.
        cluster::sync_cluster_relaxed();
    }
}

/// A consumer's main loop over the stages of its tiles.
struct Walk<S, const STAGES: u32> {
    block: Block<S>,
    /// Address of the thread's A fragment in stage 0, in the consumer's first brick.
    place: FragmentAddress,
    lane: u32,
    /// The stage to multiply next.
    ring: RingCursor<STAGES>,
    /// Whether this warp fills the ring.
    fills: bool,
    /// Whether the consumer has not released a stage yet.
    is_first_iteration: bool,
}

impl<S: Shape, const STAGES: u32> Walk<S, STAGES> {
    /// Computes a tile's sums over `iterations` k-iterations, and refills the stages that become empty.
    ///
    /// The first products replace the accumulator's contents.
    ///
    /// # Safety
    /// The whole consumer calls it.
    /// The ring's barriers are initialized, and the ring is filled for the same tile.
    #[inline(always)]
    unsafe fn multiply<A: Accumulator>(
        &mut self,
        accumulator: &mut A,
        mut iterations: u32,
        filler: &mut Filler<'_, S, STAGES>,
    ) {
        let Block { shared, cluster, .. } = self.block;
        // SAFETY: a stage is read between its acquisition and its release.
        // The registers of operands are not written before their wgmma group is done.
        unsafe {
            shared.acquire_full(self.ring.stage(), 0, self.ring.full_parity());
            let mut share = self.load(self.ring);
            let tile_iterations = iterations;
            while iterations > 0 {
                let (ring, next) = (self.ring, self.ring.next());
                // The descriptor is the same for all threads of the warp; the broadcast tells the compiler.
                let tile = warp::broadcast(shared.activation_descriptor(ring.stage()));
                let operands = [share.operand::<LiquidQuant, 0>(), share.operand::<LiquidQuant, 1>()];
                share = self.load_second(ring);
                wgmma::fence();
                // The tile's first products replace the accumulator's contents.
                accumulator.multiply_accumulate_along(operands, tile, iterations < tile_iterations);
                wgmma::commit();
                if self.fills && !self.is_first_iteration {
                    filler.fill();
                }
                self.is_first_iteration = false;
                wgmma::wait::<0>();

                let next_is_full = shared.is_full(next.stage(), 0, next.full_parity());
                let operands = [share.operand::<LiquidQuant, 0>(), share.operand::<LiquidQuant, 1>()];
                iterations -= 1;
                if next_is_full && iterations > 0 {
                    share = self.load(next);
                }
                wgmma::fence();
                accumulator.multiply_accumulate_along(operands, tile + 2 * DESCRIPTOR_K32, true);
                wgmma::commit();
                if !next_is_full && iterations > 0 {
                    shared.acquire_full(next.stage(), 0, next.full_parity());
                    share = self.load(next);
                }
                wgmma::wait::<0>();
                shared.release(ring.stage(), cluster, self.lane);
                self.ring = next;
            }
        }
    }

    /// Loads the thread's A fragment of a stage's first brick.
    ///
    /// # Safety
    /// The stage is acquired.
    #[inline(always)]
    unsafe fn load(&self, ring: RingCursor<STAGES>) -> AFragment {
        // SAFETY: the caller guarantees that the stage is acquired.
        unsafe { AFragment::load(ring.stage() * S::SHAPE.stage_bytes(), self.place) }
    }

    /// Loads the thread's A fragment of a stage's second brick.
    ///
    /// # Safety
    /// The stage is acquired.
    #[inline(always)]
    unsafe fn load_second(&self, ring: RingCursor<STAGES>) -> AFragment {
        let k_tile = ring.stage() * S::SHAPE.stage_bytes();
        // SAFETY: the caller guarantees that the stage is acquired.
        unsafe { AFragment::load_second(k_tile, self.place, self.block.shared.stream()) }
    }
}

/// The state of the warp that fills the ring: the stage to fill next, and its source.
///
/// It is the same for all threads, so it lies in uniform registers and takes none of the threads' own.
#[derive(Clone, Copy)]
struct Filler<'a, S, const STAGES: u32> {
    activations: TokenBoxes,
    arguments: &'a GemmArguments,
    block: Block<S>,
    ring: RingCursor<STAGES>,
    tile: u32,
    iteration: u32,
    /// Address of the tile's first strip.
    source: u64,
    /// Bytes from the first K-tile of a strip to the next one to load.
    offset: u32,
    /// Strips of the tile that exist.
    strips: u32,
    /// The first token that this thread block loads.
    token: u32,
    /// Bytes of a stage's activation tile, as far as its tokens exist.
    activation_bytes: u32,
}

impl<'a, S: Shape, const STAGES: u32> Filler<'a, S, STAGES> {
    /// Returns the state before the first stage of the cluster's first tile.
    #[inline(always)]
    fn new(
        activations: TokenBoxes,
        arguments: &'a GemmArguments,
        block: Block<S>,
        cluster_index: u32,
    ) -> Self {
        let ring = RingCursor::start();
        let mut filler = Self {
            activations,
            arguments,
            block,
            ring,
            tile: cluster_index,
            iteration: 0,
            source: 0,
            offset: 0,
            strips: 0,
            token: 0,
            activation_bytes: 0,
        };
        filler.enter_tile();
        filler
    }

    /// Waits until the next stage is empty, and fills it. Does nothing after the last tile.
    ///
    /// # Safety
    /// One whole warp calls it; the barriers are initialized.
    #[inline(always)]
    unsafe fn fill(&mut self) {
        if self.is_done() {
            return;
        }
        // SAFETY: the stage is empty once acquired.
        // So are the stages of the cluster's other thread blocks, because their consumers arrive here too.
        unsafe {
            self.block.shared.acquire_empty(self.ring.stage(), self.ring.empty_parity());
            self.fill_bricks();
            self.fill_activations();
        }
        self.advance();
    }

    /// Announces everything that the stages of the ring's first turn will hold, and loads their bricks.
    ///
    /// The weights do not depend on the preceding launch.
    ///
    /// # Safety
    /// As for [`fill`](Self::fill).
    #[inline(always)]
    unsafe fn fill_bricks_of_first_turn(&self) {
        let mut ahead = *self;
        for _ in 0..STAGES {
            if !ahead.is_done() {
                // SAFETY: the stage is unused so far.
                unsafe { ahead.fill_bricks() };
                ahead.advance();
            }
        }
    }

    /// Loads the activations of the same stages.
    ///
    /// # Safety
    /// As for [`fill`](Self::fill); the preceding launch has ended.
    #[inline(always)]
    unsafe fn fill_activations_of_first_turn(&mut self) {
        for _ in 0..STAGES {
            if !self.is_done() {
                // SAFETY: the stage is unused so far.
                unsafe { self.fill_activations() };
                self.advance();
            }
        }
    }

    /// Returns whether the cluster has no tiles left to load.
    #[inline(always)]
    fn is_done(&self) -> bool {
        self.tile >= self.arguments.schedule.tiles()
    }

    /// Returns the offset in a tile of the first token that this thread block loads.
    #[inline(always)]
    fn own_tokens(&self) -> u32 {
        self.block.cluster.rank * self.block.cluster.part_tokens(S::SHAPE)
    }

    /// Announces everything that the stage will hold, and loads its bricks.
    #[inline(always)]
    unsafe fn fill_bricks(&self) {
        let (shared, stage, strips) = (self.block.shared, self.ring.stage(), self.strips);
        let stream = shared.stream();
        let load = KTileLoad::new(stream, self.iteration < STAGES);
        let policy = Policy::evict_first();
        // SAFETY: the stage is empty and has room for the copies; the bricks exist.
        unsafe {
            let full = shared.announce(stage, 0, strips * load.bytes() + self.activation_bytes);
            seq_macro::seq!(STRIP in 0..3 {
                if STRIP < S::SHAPE.strips && STRIP < strips {
                    let strip = self.source + STRIP * stream.strip_bytes as u64;
                    load.load(shared.bricks(stage, STRIP), strip, self.offset, full, policy);
                }
            });
        }
    }

    /// Loads this thread block's part of the stage's activations, for all thread blocks of the cluster.
    #[inline(always)]
    unsafe fn fill_activations(&self) {
        let stage = self.ring.stage();
        let to = self.block.shared.activations(stage) + self.own_tokens() * K_TILE;
        let full = self.block.shared.full(stage, 0);
        let k = self.iteration * K_TILE;
        let map = self.activations.map(self.arguments, self.token, self.block.cluster.part_tokens(S::SHAPE));
        // SAFETY: the stage is empty in all thread blocks of the cluster and has room for the boxes.
        unsafe {
            if self.block.cluster.blocks == 1 {
                tma::load_2d(to, map, k, self.token, full);
            } else if self.token < self.arguments.m {
                let every_block = (1 << self.block.cluster.blocks) - 1;
                tma::load_2d_multicast(to, map, k, self.token, full, every_block);
            }
        }
    }

    /// Advances to the next stage.
    #[inline(always)]
    fn advance(&mut self) {
        self.ring = self.ring.next();
        self.offset += self.block.shared.stream().k_tile_bytes;
        self.iteration += 1;
        if self.iteration == self.arguments.schedule.k_iterations {
            self.iteration = 0;
            self.tile += self.arguments.schedule.clusters;
            self.enter_tile();
        }
    }

    /// Sets the addresses and sizes for the current tile.
    #[inline(always)]
    fn enter_tile(&mut self) {
        let position = self.arguments.schedule.position(self.tile);
        let first_strip = first_strip(position, self.block);
        self.strips = tile_strips(self.arguments, first_strip, S::SHAPE);
        let weights = &self.arguments.weights;
        self.source = weights.strips + first_strip as u64 * weights.stream.strip_bytes as u64;
        self.offset = 0;
        let first_token = position.token_tile * S::SHAPE.tokens;
        self.token = first_token + self.own_tokens();
        self.activation_bytes = tile_tokens(self.arguments, first_token, S::SHAPE) * K_TILE;
    }
}
