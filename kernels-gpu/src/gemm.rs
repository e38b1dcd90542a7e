//! The W4A8 GEMM: two producer warps, one for bricks and one for activations, fill a ring of stages; consumer warpgroups
//! dequantize in registers and feed the tensor cores (LiquidGEMM's implicit fine-grained pipeline, arXiv 2509.01229,
//! section 5).
//!
//! Weights are wgmma's A operand and come from registers; activations are B and come from swizzled shared
//! memory. Blocks are persistent and go through the segments that the schedule gives their cluster. The host twin,
//! which plans and launches this, is `host/src/gpu/gemm.rs`.

use cuda_std::{TensorMap, cluster, shared, thread, warp};
use liquidgemm_format::arguments::GemmArguments;
use liquidgemm_format::brick::BRICK_BYTES;
use liquidgemm_format::ring::RingCursor;
use liquidgemm_format::schedule::{Segment, TilePosition};
use liquidgemm_format::tile::{STAGE_BRICKS, STAGE_K, STRIP_STAGE_BYTES, TileShape};

use crate::dequant::{BrickShare, SharePlace};
use crate::epilogue::Epilogue;
use crate::pipeline::{Cluster, Consumer, Shared};
use crate::ptx::wgmma::{Accumulator, DESCRIPTOR_K32};
use crate::ptx::{grid, registers, tma, wgmma};
use crate::{halves, partials};

/// The kernel's body, for the token tile of `A`, `STRIPS` strips with `HALVES` consumers each, and a ring of `STAGES`.
///
/// # Safety
/// The arguments describe memory as their documentation says; `activations` is a map of int8 `[m, k]` with
/// boxes of [`STAGE_K`] × a cluster block's part of the tile's tokens and 128-byte swizzle. `output` is one of the
/// 16-bit output with boxes of 64 channels × [`TileShape::epilogue_tokens`] and the same swizzle, if
/// `output_is_mapped` says so.
#[inline(always)]
pub unsafe fn gemm<A: Accumulator, const STRIPS: u32, const HALVES: u32, const STAGES: u32>(
    activations: *const TensorMap,
    output: *const TensorMap,
    arguments: &GemmArguments,
) {
    let shape = const { TileShape { strips: STRIPS, tokens: A::TOKENS, halves: HALVES, stages: STAGES } };
    let shared = Shared::new(shared::dynamic_shared_mem(), shape);
    let thread = thread::thread_idx_x();
    let warp = warp::broadcast(thread / warp::WARP_SIZE);
    let warpgroup = warp / 4;
    let cluster = Cluster { blocks: cluster::blocks(), rank: cluster::block_rank() };

    if thread == 0 {
        // SAFETY: the map is a parameter; the barrier below orders the barriers' making.
        unsafe {
            tma::prefetch_map(activations);
            if shape.maps_output() {
                tma::prefetch_map(output);
            }
            shared.init_barriers(cluster);
        }
    }
    sync(cluster);

    let consumers = STRIPS * HALVES;
    if warpgroup == consumers {
        if shape.moves_registers() {
            // SAFETY: the whole warpgroup is here.
            unsafe { registers::decrease::<STRIPS, HALVES>() };
        }
        // SAFETY (both): one whole warp each; the caller vouches for the arguments.
        if warp == consumers * 4 {
            // As early as can be: a launch takes longer to begin than its first bricks delay this one's.
            grid::admit_next();
            unsafe { produce_bricks::<STAGES>(arguments, shared, shape, cluster) };
        } else if warp == consumers * 4 + 1 {
            unsafe { produce_activations::<STAGES>(activations, arguments, shared, shape, cluster) };
        }
    } else {
        if shape.moves_registers() {
            // SAFETY: the whole warpgroup is here.
            unsafe { registers::increase::<STRIPS, HALVES>() };
        }
        let consumer = Consumer::of_warpgroup(warpgroup, thread, shape);
        // SAFETY: the whole warpgroup is here; the caller vouches for the arguments.
        unsafe { consume::<A, STAGES>(arguments, output, shared, shape, cluster, consumer) };
    }
    if cluster.blocks > 1 {
        // The others may still send activations here, or arrive on the barriers.
        cluster::sync_cluster_relaxed();
    }
}

/// Waits for every thread of the cluster.
#[inline(always)]
fn sync(cluster: Cluster) {
    if cluster.blocks > 1 {
        cluster::sync_cluster_relaxed();
    } else {
        thread::sync_threads();
    }
}

/// The first strip of a block's tile.
#[inline(always)]
fn first_strip(position: TilePosition, shape: TileShape, cluster: Cluster) -> u32 {
    (position.channel_tile * cluster.blocks + cluster.rank) * shape.strips
}

/// The first producer: keeps the ring full of bricks.
///
/// The weights are there before the launch, so it begins at once, while the launch before this one, which may be
/// computing the activations, still runs.
#[inline(always)]
unsafe fn produce_bricks<const STAGES: u32>(
    arguments: &GemmArguments,
    shared: Shared,
    shape: TileShape,
    cluster: Cluster,
) {
    let schedule = arguments.schedule;
    let strip_bytes = arguments.k_blocks as u64 * BRICK_BYTES as u64;
    let mut ring = RingCursor::<STAGES>::start();
    for segment in schedule.segments(cluster::cluster_idx_x()) {
        let first_strip = first_strip(schedule.position(segment.tile), shape, cluster);
        // The last tiles may have fewer strips: their consumers then work on what happens to lie there, and store
        // nothing.
        let strips = arguments.strips.saturating_sub(first_strip).min(shape.strips);
        let mut block = segment.k_begin * STAGE_BRICKS;
        let mut source =
            arguments.bricks + first_strip as u64 * strip_bytes + block as u64 * BRICK_BYTES as u64;
        for _ in segment.k_begin..segment.k_end {
            // Past the last brick the activations are zeros, so stale bricks add nothing.
            let bytes = if block + 1 < arguments.k_blocks { STRIP_STAGE_BYTES } else { BRICK_BYTES as u32 };
            let stage = ring.stage();
            // SAFETY: the stage is empty once acquired and holds what is copied; the bricks exist.
            unsafe {
                let full = shared.acquire_empty(stage, ring.empty_parity(), strips * bytes);
                seq_macro::seq!(STRIP in 0..3 {
                    if STRIP < shape.strips && STRIP < strips {
                        let from = source + STRIP * strip_bytes;
                        tma::load_bulk(shared.bricks(stage, STRIP), from, bytes, full);
                    }
                });
            }
            block += STAGE_BRICKS;
            source += STRIP_STAGE_BYTES as u64;
            ring = ring.next();
        }
    }
}

/// The second producer: keeps the ring full of activations, which the launch before this one may have to finish first.
#[inline(always)]
unsafe fn produce_activations<const STAGES: u32>(
    activations: *const TensorMap,
    arguments: &GemmArguments,
    shared: Shared,
    shape: TileShape,
    cluster: Cluster,
) {
    let schedule = arguments.schedule;
    // A cluster has a power of two of blocks; each loads an equal part of the tile's tokens for all of them.
    let part_tokens = shape.tokens >> cluster.blocks.trailing_zeros();
    let part_offset = cluster.rank * part_tokens * STAGE_K;
    let every_block = (1 << cluster.blocks) - 1;
    let mut ring = RingCursor::<STAGES>::start();
    grid::await_previous();
    for segment in schedule.segments(cluster::cluster_idx_x()) {
        let position = schedule.position(segment.tile);
        let token = position.token_tile * shape.tokens + cluster.rank * part_tokens;
        for step in segment.k_begin..segment.k_end {
            let stage = ring.stage();
            let destination = shared.activations(stage) + part_offset;
            // SAFETY: the stage is empty once acquired and holds what is copied; so do the other blocks', as their
            // consumers arrive here too.
            unsafe {
                let full = shared.acquire_empty(stage, ring.empty_parity(), shape.activation_bytes());
                if cluster.blocks > 1 {
                    tma::load_2d_multicast(
                        destination,
                        activations,
                        step * STAGE_K,
                        token,
                        full,
                        every_block,
                    );
                } else {
                    tma::load_2d(destination, activations, step * STAGE_K, token, full);
                }
            }
            ring = ring.next();
        }
    }
}

/// A consumer: a 64-channel strip of every tile, or one half of its K.
#[inline(always)]
unsafe fn consume<A: Accumulator, const STAGES: u32>(
    arguments: &GemmArguments,
    output: *const TensorMap,
    shared: Shared,
    shape: TileShape,
    cluster: Cluster,
    consumer: Consumer,
) {
    let schedule = arguments.schedule;
    let worker = cluster::cluster_idx_x();
    let slots = partials::Slots { shape, cluster, consumer };
    let mut ring = RingCursor::<STAGES>::start();
    // A small tile waits for its first stage anyway, and has no registers to spare during the main loop.
    let parks_early = !shape.moves_registers();
    let mut segments = schedule.segments(worker);
    let mut segment = segments.next();
    // Scales, workspace and output belong to the launch before this one until it has ended.
    grid::await_previous();
    let mut epilogue = epilogue_of(segment, arguments, output, shared, shape, cluster, consumer);
    // SAFETY: the caller vouches for the arguments.
    let mut scales = unsafe { epilogue.fetch() };
    while let Some(current) = segment {
        let mut accumulator = A::zero();
        // SAFETY: the caller vouches for the arguments; all threads of the warpgroup go the same way, as
        // every condition depends on the segment alone.
        unsafe {
            if parks_early {
                epilogue.park(scales);
            }
            let walk = accumulate(&mut accumulator, ring, current, shared, shape, cluster, consumer);
            // While the last MMAs run:
            if !parks_early {
                epilogue.park(scales);
            }
            segment = segments.next();
            let mut next = epilogue;
            if segment.is_some() {
                next = epilogue_of(segment, arguments, output, shared, shape, cluster, consumer);
                scales = next.fetch();
            }
            ring = walk.leave();
            halves::exchange(&mut accumulator, shared, shape, consumer);
            if schedule.owns(current) {
                let first = schedule.first_contributor(worker, current);
                slots.collect(&mut accumulator, arguments, first..worker);
                epilogue.store(&mut accumulator);
            } else {
                slots.contribute(&mut accumulator, arguments, worker);
            }
            epilogue = next;
        }
    }
    // The block's shared memory must last as long as it is read.
    tma::await_stores::<0>();
}

/// The epilogue of a segment's tile; of any tile after the last segment, when nothing will use it.
#[inline(always)]
fn epilogue_of<'a>(
    segment: Option<Segment>,
    arguments: &'a GemmArguments,
    output: *const TensorMap,
    shared: Shared,
    shape: TileShape,
    cluster: Cluster,
    consumer: Consumer,
) -> Epilogue<'a> {
    let tile = match segment {
        Some(segment) => segment.tile,
        None => 0,
    };
    let position = arguments.schedule.position(tile);
    let strip = first_strip(position, shape, cluster) + consumer.strip;
    Epilogue::new(arguments, output, shared, shape, [strip, position.token_tile * shape.tokens], consumer)
}

/// The main loop: adds a segment's products to the accumulator, the last of which may still be on their way.
///
/// Each step is one wgmma group, of four MMAs or of the two that are this consumer's. While it runs, the next step's
/// codes are loaded and dequantized into operand registers of their own; two steps a turn of the loop make those two
/// sets.
#[inline(always)]
unsafe fn accumulate<A: Accumulator, const STAGES: u32>(
    accumulator: &mut A,
    ring: RingCursor<STAGES>,
    segment: Segment,
    shared: Shared,
    shape: TileShape,
    cluster: Cluster,
    consumer: Consumer,
) -> StageWalk<STAGES> {
    // SAFETY: a stage is read between acquiring and releasing it, and released when its last wgmma is done;
    // the caller vouches for the warpgroup.
    unsafe {
        let mut walk =
            StageWalk::enter(ring, segment.k_end - segment.k_begin, shared, shape, cluster, consumer);
        // One way out of the loop only: what is the same for all threads then stays in uniform registers.
        if walk.steps % 2 == 1 {
            walk.step(accumulator);
        }
        while walk.steps > 0 {
            walk.step(accumulator);
            walk.step(accumulator);
        }
        walk
    }
}

/// A consumer's way through the stages of a segment.
struct StageWalk<const STAGES: u32> {
    shared: Shared,
    shape: TileShape,
    cluster: Cluster,
    consumer: Consumer,
    /// The thread's share of its own first brick in stage 0.
    place: SharePlace,
    /// The stage to multiply next.
    ring: RingCursor<STAGES>,
    /// The codes of its bricks; where two consumers share the strip, of this one's brick, twice.
    shares: [BrickShare; STAGE_BRICKS as usize],
    /// Steps left, with this one.
    steps: u32,
    /// The stage whose MMAs may still run; `STAGES` for none.
    unreleased: u32,
}

impl<const STAGES: u32> StageWalk<STAGES> {
    /// Waits for the first stage.
    #[inline(always)]
    unsafe fn enter(
        ring: RingCursor<STAGES>,
        steps: u32,
        shared: Shared,
        shape: TileShape,
        cluster: Cluster,
        consumer: Consumer,
    ) -> Self {
        let place = SharePlace::of_thread(consumer.thread).moved(shared.own_bricks(0, consumer));
        // SAFETY: the stage is acquired before it is read.
        let shares = unsafe {
            shared.acquire_full(ring.stage(), ring.full_parity());
            Self::load(shape, ring, place)
        };
        Self { shared, shape, cluster, consumer, place, ring, shares, steps, unreleased: STAGES }
    }

    /// Loads the consumer's codes of a stage.
    #[inline(always)]
    unsafe fn load(
        shape: TileShape,
        ring: RingCursor<STAGES>,
        place: SharePlace,
    ) -> [BrickShare; STAGE_BRICKS as usize] {
        let bricks = ring.stage() * shape.stage_bytes();
        // SAFETY: the caller has acquired the stage.
        unsafe {
            let first = BrickShare::load(bricks, place);
            if shape.halves == 1 {
                [first, BrickShare::load(bricks + BRICK_BYTES as u32, place)]
            } else {
                [first, first]
            }
        }
    }

    /// Multiplies one stage.
    ///
    /// An MMA whose operand comes from registers holds its warp until it has read it, and so until the MMAs before it
    /// are nearly done. Whatever else takes time is therefore asked for before: the next stage's codes arrive while
    /// the MMAs hold the warp.
    #[inline(always)]
    unsafe fn step<A: Accumulator>(&mut self, accumulator: &mut A) {
        let next = self.ring.next();
        // SAFETY: the barriers are made. Asked now, the answer is there when it is needed.
        let next_is_full = unsafe { self.shared.is_full(next.stage(), next.full_parity()) };
        // The same for all threads, which the compiler can't see: told so, it keeps descriptors in uniform registers.
        let tile = warp::broadcast(self.shared.activation_descriptor(self.ring.stage()));
        let tile = tile + self.consumer.half * 2 * DESCRIPTOR_K32;
        let operands = self.operands();
        let before = self.unreleased;
        self.unreleased = self.ring.stage();
        self.ring = next;
        self.steps -= 1;
        // SAFETY: the stages are acquired before they are read; the operands' registers are not written before their
        // group is done; the group before this one is done after the wait, and with it the stage before.
        unsafe {
            if next_is_full && self.steps > 0 {
                self.shares = Self::load(self.shape, next, self.place);
            }
            wgmma::fence();
            accumulator.multiply_accumulate(operands[0], tile);
            accumulator.multiply_accumulate(operands[1], tile + DESCRIPTOR_K32);
            if self.shape.halves == 1 {
                accumulator.multiply_accumulate(operands[2], tile + 2 * DESCRIPTOR_K32);
                accumulator.multiply_accumulate(operands[3], tile + 3 * DESCRIPTOR_K32);
            }
            wgmma::commit();
            if !next_is_full && self.steps > 0 {
                self.shared.acquire_full(next.stage(), next.full_parity());
                self.shares = Self::load(self.shape, next, self.place);
            }
            wgmma::wait::<1>();
            if before != STAGES {
                self.shared.release(before, self.cluster, self.consumer.thread % warp::WARP_SIZE);
            }
        }
    }

    /// The A operands of the stage's MMAs; where two consumers share the strip, of this one's two, twice.
    #[inline(always)]
    fn operands(&self) -> [[u32; 4]; 4] {
        let [first, second] = self.shares;
        let operands = [first.operand::<0>(), first.operand::<1>()];
        if self.shape.halves == 1 {
            [operands[0], operands[1], second.operand::<0>(), second.operand::<1>()]
        } else {
            [operands[0], operands[1], operands[0], operands[1]]
        }
    }

    /// Waits for the last MMAs, gives their stage back, and returns the ring's next stage.
    #[inline(always)]
    unsafe fn leave(self) -> RingCursor<STAGES> {
        // SAFETY: all groups are done after the wait.
        unsafe {
            wgmma::wait::<0>();
            self.shared.release(self.unreleased, self.cluster, self.consumer.thread % warp::WARP_SIZE);
        }
        self.ring
    }
}
