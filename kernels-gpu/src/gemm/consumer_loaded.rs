//! The GEMM for the widest tiles, 192 channels × 144 to 256 tokens, whose accumulators leave no registers to a producer: three consumers fill
//! the ring themselves. Each activation that reaches an SM is reused for 192 channels instead of 128,
//! which saves what costs the most where the GPU's power is the limit.
//!
//! The first warp refills a stage while it waits for its own products of the next, so that no consumer is kept from it.
//! The host twin is `host/src/gpu/gemm.rs`, as for all tiles. Everything else is as in [`gemm`](mod@crate::gemm), but that a tile is never shared along K, and that each brick is a wgmma group
//! of its own: there are registers for the operands of one.

use cuda_std::{TensorMap, cluster, shared, thread, warp};
use liquidgemm_format::arguments::GemmArguments;
use liquidgemm_format::ring::RingCursor;
use liquidgemm_format::tile::{SPAN_K, TileShape, WARPGROUP};

use crate::dequant::{BrickShare, LiquidQuant, SharePlace};
use crate::epilogue::Epilogue;
use crate::gemm::{SpanLoad, TokenBoxes, first_strip, sync, tile_strips, tile_tokens};
use crate::pipeline::{Cluster, Consumer, Shared};
use crate::ptx::tma::Policy;
use crate::ptx::wgmma::{Accumulator, DESCRIPTOR_K32};
use crate::ptx::{copy, grid, hint, tma, wgmma};

/// The kernel's body, for the token tile of `A`, `STRIPS` strips with a consumer each, and a ring of `STAGES`.
///
/// # Safety
/// As for [`gemm`](crate::gemm::gemm); the schedule streams no tile.
#[inline(always)]
pub unsafe fn gemm<A: Accumulator, const STRIPS: u32, const STAGES: u32>(
    activations: TokenBoxes,
    output: *const TensorMap,
    arguments: &GemmArguments,
) {
    let shape =
        const { TileShape { strips: STRIPS, tokens: A::TOKENS, halves: 1, split: 1, stages: STAGES } };
    let shared = Shared::new(shared::dynamic_shared_mem(), shape, arguments.weights.stream);
    let thread = thread::thread_idx_x();
    let warp = warp::broadcast(thread / warp::WARP_SIZE);
    let cluster = Cluster::of_block(shape);

    if thread == 0 {
        // SAFETY: the maps are parameters; the barrier below orders the barriers' making.
        unsafe {
            activations.prefetch(arguments, shape, cluster);
            tma::prefetch_map(output);
            shared.init_barriers(cluster);
        }
    }
    sync(cluster);

    let schedule = arguments.schedule;
    let worker = cluster::cluster_idx_x();
    let consumer = Consumer::of_warpgroup(warp / 4, thread, shape);
    let fills = warp == 0;
    let mut filler = Filler::<STAGES>::new(activations, arguments, shared, shape, cluster, worker);
    grid::admit_next();
    // SAFETY: one whole warp; the barriers are made.
    unsafe {
        if fills {
            filler.fill_bricks_of_first_turn();
        }
        grid::await_previous();
        if fills {
            filler.fill_activations_of_first_turn();
        }
    }

    let mut walk = Walk::<STAGES> {
        shared,
        shape,
        cluster,
        place: shared.share_place(consumer),
        lane: thread % warp::WARP_SIZE,
        ring: RingCursor::start(),
        fills,
        is_first_step: true,
    };
    let mut tile = worker;
    while tile < schedule.tiles() {
        let position = schedule.position(tile);
        let strip = first_strip(position, shape, cluster) + consumer.strip;
        let token = position.token_tile * shape.tokens;
        // What is derived from the thread's index has no registers to stay in during the main loop: it is derived anew.
        let epilogue = |thread: u32| {
            let consumer = Consumer { thread: thread % WARPGROUP, ..consumer };
            Epilogue::new(arguments, output, shared, shape, [strip, token], consumer)
        };
        let mut accumulator = A::arbitrary();
        // SAFETY: the consumer has left the last tile's epilogue; all its threads are here; the caller vouches for the arguments.
        unsafe {
            epilogue(hint::thread_idx_anew()).copy_scales();
            walk.multiply(&mut accumulator, schedule.k_steps, &mut filler);
            copy::await_groups::<0>();
            epilogue(hint::thread_idx_anew()).store(&mut accumulator, None);
        }
        tile += schedule.workers;
    }
    // The block's shared memory must last as long as it is read.
    tma::await_stores::<0>();
    if cluster.blocks > 1 {
        // The other block may still send activations here, or arrive on the barriers.
        cluster::sync_cluster_relaxed();
    }
}

/// A consumer's way through the stages of its tiles.
struct Walk<const STAGES: u32> {
    shared: Shared,
    shape: TileShape,
    cluster: Cluster,
    /// The thread's share of its consumer's first brick in stage 0.
    place: SharePlace,
    lane: u32,
    /// The stage to multiply next.
    ring: RingCursor<STAGES>,
    /// Whether this is the warp that fills the ring.
    fills: bool,
    /// Whether no stage has been emptied yet.
    is_first_step: bool,
}

impl<const STAGES: u32> Walk<STAGES> {
    /// Adds the products of a tile's `steps` stages to the accumulator, and refills those that get empty.
    ///
    /// # Safety
    /// The whole consumer calls it; the ring's barriers are made, and it is filled for the same tile.
    #[inline(always)]
    unsafe fn multiply<A: Accumulator>(
        &mut self,
        accumulator: &mut A,
        mut steps: u32,
        filler: &mut Filler<'_, STAGES>,
    ) {
        let Self { shared, cluster, .. } = *self;
        // SAFETY: a stage is read between acquiring and releasing it; no operand's register is written before its group is done.
        unsafe {
            shared.acquire_full(self.ring.stage(), 0, self.ring.full_parity());
            let mut share = self.load(self.ring);
            let tile_steps = steps;
            while steps > 0 {
                let (ring, next) = (self.ring, self.ring.next());
                // The same for all threads, which the compiler can't see.
                let tile = warp::broadcast(shared.activation_descriptor(ring.stage()));
                let operands = [share.operand::<LiquidQuant, 0>(), share.operand::<LiquidQuant, 1>()];
                share = self.load_second(ring);
                wgmma::fence();
                // The tile's first products replace what the accumulator holds.
                accumulator.multiply_accumulate_along(operands, tile, steps < tile_steps);
                wgmma::commit();
                if self.fills && !self.is_first_step {
                    filler.fill();
                }
                self.is_first_step = false;
                wgmma::wait::<0>();

                let next_is_full = shared.is_full(next.stage(), 0, next.full_parity());
                let operands = [share.operand::<LiquidQuant, 0>(), share.operand::<LiquidQuant, 1>()];
                steps -= 1;
                if next_is_full && steps > 0 {
                    share = self.load(next);
                }
                wgmma::fence();
                accumulator.multiply_accumulate_along(operands, tile + 2 * DESCRIPTOR_K32, true);
                wgmma::commit();
                if !next_is_full && steps > 0 {
                    shared.acquire_full(next.stage(), 0, next.full_parity());
                    share = self.load(next);
                }
                wgmma::wait::<0>();
                shared.release(ring.stage(), cluster, self.lane);
                self.ring = next;
            }
        }
    }

    /// Loads the consumer's share of a stage's first brick.
    ///
    /// # Safety
    /// The stage is acquired.
    #[inline(always)]
    unsafe fn load(&self, ring: RingCursor<STAGES>) -> BrickShare {
        // SAFETY: the caller vouches for the stage.
        unsafe { BrickShare::load(ring.stage() * self.shape.stage_bytes(), self.place) }
    }

    /// Loads its share of the second.
    ///
    /// # Safety
    /// The stage is acquired.
    #[inline(always)]
    unsafe fn load_second(&self, ring: RingCursor<STAGES>) -> BrickShare {
        let span = ring.stage() * self.shape.stage_bytes();
        // SAFETY: the caller vouches for the stage.
        unsafe { BrickShare::load_second(span, self.place, self.shared.stream()) }
    }
}

/// What the warp that fills the ring knows of the stage to fill next. The same for all threads, so that it takes none of their
/// registers.
#[derive(Clone, Copy)]
struct Filler<'a, const STAGES: u32> {
    activations: TokenBoxes,
    arguments: &'a GemmArguments,
    shared: Shared,
    shape: TileShape,
    cluster: Cluster,
    ring: RingCursor<STAGES>,
    tile: u32,
    step: u32,
    /// The address of the tile's first strip.
    source: u64,
    /// Bytes from the strips' first spans to those that are next.
    offset: u32,
    /// How many strips of the tile there are.
    strips: u32,
    /// The first of the tokens that this block loads.
    token: u32,
    /// Bytes of the stage's activations.
    activation_bytes: u32,
}

impl<'a, const STAGES: u32> Filler<'a, STAGES> {
    /// Before the first stage of a worker's first tile.
    #[inline(always)]
    fn new(
        activations: TokenBoxes,
        arguments: &'a GemmArguments,
        shared: Shared,
        shape: TileShape,
        cluster: Cluster,
        worker: u32,
    ) -> Self {
        let ring = RingCursor::start();
        let mut filler = Self {
            activations,
            arguments,
            shared,
            shape,
            cluster,
            ring,
            tile: worker,
            step: 0,
            source: 0,
            offset: 0,
            strips: 0,
            token: 0,
            activation_bytes: 0,
        };
        filler.enter_tile();
        filler
    }

    /// Fills the next stage, if there is one, as soon as it is empty.
    ///
    /// # Safety
    /// One whole warp calls it; the barriers are made.
    #[inline(always)]
    unsafe fn fill(&mut self) {
        if self.is_done() {
            return;
        }
        // SAFETY: the stage is empty once acquired; so are the other blocks', as their consumers arrive here too.
        unsafe {
            self.shared.acquire_empty(self.ring.stage(), self.ring.empty_parity());
            self.fill_bricks();
            self.fill_activations();
        }
        self.advance();
    }

    /// Announces all that the stages of the ring's first turn will hold, and asks for the bricks among it, which are there before the
    /// launch.
    ///
    /// # Safety
    /// As for [`fill`](Self::fill).
    #[inline(always)]
    unsafe fn fill_bricks_of_first_turn(&self) {
        let mut ahead = *self;
        for _ in 0..STAGES {
            if !ahead.is_done() {
                // SAFETY: the stage has not been used.
                unsafe { ahead.fill_bricks() };
                ahead.advance();
            }
        }
    }

    /// Asks for those stages' activations.
    ///
    /// # Safety
    /// As for [`fill`](Self::fill), after the launch before this one has ended.
    #[inline(always)]
    unsafe fn fill_activations_of_first_turn(&mut self) {
        for _ in 0..STAGES {
            if !self.is_done() {
                // SAFETY: the stage has not been used.
                unsafe { self.fill_activations() };
                self.advance();
            }
        }
    }

    /// Whether the worker has no further tile.
    #[inline(always)]
    fn is_done(&self) -> bool {
        self.tile >= self.arguments.schedule.tiles()
    }

    /// The first of this block's tokens in a tile.
    #[inline(always)]
    fn own_tokens(&self) -> u32 {
        self.cluster.rank * self.cluster.part_tokens(self.shape)
    }

    /// Announces all that the stage will hold, and asks for its bricks.
    #[inline(always)]
    unsafe fn fill_bricks(&self) {
        let (shared, stage, strips) = (self.shared, self.ring.stage(), self.strips);
        let stream = shared.stream();
        let load = SpanLoad::new(stream, self.step < STAGES);
        let policy = Policy::evict_first();
        // SAFETY: the stage is empty and holds what is copied; the bricks exist.
        unsafe {
            let full = shared.announce(stage, 0, strips * load.bytes() + self.activation_bytes);
            seq_macro::seq!(STRIP in 0..3 {
                if STRIP < self.shape.strips && STRIP < strips {
                    let strip = self.source + STRIP * stream.strip_bytes as u64;
                    load.load(shared.bricks(stage, STRIP), strip, self.offset, full, policy);
                }
            });
        }
    }

    /// Asks for this block's part of the stage's activations, for all of its cluster.
    #[inline(always)]
    unsafe fn fill_activations(&self) {
        let stage = self.ring.stage();
        let to = self.shared.activations(stage) + self.own_tokens() * SPAN_K;
        let full = self.shared.full(stage, 0);
        let k = self.step * SPAN_K;
        let map = self.activations.map(self.arguments, self.token, self.cluster.part_tokens(self.shape));
        // SAFETY: the stage is empty in all blocks and holds what is copied.
        unsafe {
            if self.cluster.blocks == 1 {
                tma::load_2d(to, map, k, self.token, full);
            } else if self.token < self.arguments.m {
                let every_block = (1 << self.cluster.blocks) - 1;
                tma::load_2d_multicast(to, map, k, self.token, full, every_block);
            }
        }
    }

    /// Moves on to the next stage.
    #[inline(always)]
    fn advance(&mut self) {
        self.ring = self.ring.next();
        self.offset += self.shared.stream().span_bytes;
        self.step += 1;
        if self.step == self.arguments.schedule.k_steps {
            self.step = 0;
            self.tile += self.arguments.schedule.workers;
            self.enter_tile();
        }
    }

    /// Looks up where a tile's bricks and tokens are.
    #[inline(always)]
    fn enter_tile(&mut self) {
        let position = self.arguments.schedule.position(self.tile);
        let first_strip = first_strip(position, self.shape, self.cluster);
        self.strips = tile_strips(self.arguments, first_strip, self.shape);
        let weights = &self.arguments.weights;
        self.source = weights.strips + first_strip as u64 * weights.stream.strip_bytes as u64;
        self.offset = 0;
        let first_token = position.token_tile * self.shape.tokens;
        self.token = first_token + self.own_tokens();
        self.activation_bytes = tile_tokens(self.arguments, first_token, self.shape) * SPAN_K;
    }
}
