//! The W4A8 GEMM: two producer warps, one for bricks and one for activations, fill a ring of stages; consumer warpgroups
//! dequantize in registers and feed the tensor cores (LiquidGEMM's implicit fine-grained pipeline, arXiv 2509.01229,
//! section 5).
//!
//! Weights are wgmma's A operand and come from registers; activations are B and come from swizzled shared
//! memory. Blocks are persistent and go through the segments that the schedule gives their cluster. The host twin,
//! which plans and launches this, is `host/src/gpu/gemm.rs`.

use core::marker::PhantomData;

use cuda_std::{TensorMap, cluster, shared, thread, warp};
use liquidgemm_format::arguments::GemmArguments;
use liquidgemm_format::brick::PAIR_BYTES;
use liquidgemm_format::ring::RingCursor;
use liquidgemm_format::schedule::{Schedule, Segment, TilePosition};
use liquidgemm_format::stream::WeightStream;
use liquidgemm_format::tile::{SPAN_BRICKS, SPAN_K, STRIP_SPAN_BYTES, STRIP_SPAN_CODE_BYTES, TileShape};

use crate::dequant::{BrickShare, Dequantization, SharePlace};
use crate::epilogue::Epilogue;
use crate::pipeline::{Cluster, Consumer, Shared};
use crate::ptx::tma::Policy;
use crate::ptx::wgmma::{Accumulator, DESCRIPTOR_K32};
use crate::ptx::{grid, registers, tma, wgmma};
use crate::split::Exchange;
use crate::{halves, partials};

/// A consumer's main loop, on its way through a segment. The library's is [`StageWalk`]; the ablation compares it with
/// others.
pub trait MainLoop: Sized {
    /// Where in its rings it stands between two segments.
    type Position: Copy;

    /// Where it stands before the first.
    const START: Self::Position;

    /// Adds up a segment's products in the accumulator: the first replace what it holds, the last may still be on their way.
    ///
    /// # Safety
    /// The whole warpgroup calls it; the ring's barriers are made, and its producers fill it for the same segment.
    unsafe fn accumulate<A: Accumulator>(
        accumulator: &mut A,
        position: Self::Position,
        segment: Segment,
        shared: Shared,
        shape: TileShape,
        cluster: Cluster,
        consumer: Consumer,
    ) -> Self;

    /// Waits for the last products and gives back what they were read from.
    ///
    /// # Safety
    /// The whole warpgroup calls it.
    unsafe fn leave(self) -> Self::Position;
}

/// The kernel's body, for the token tile of `A`, `STRIPS` strips with `HALVES` consumers each that have `L` as their
/// main loop, and a ring of `STAGES`.
///
/// # Safety
/// The arguments describe memory as their documentation says; `activations` are maps of int8 `[m, k]` with
/// boxes of [`SPAN_K`] × [`TileShape::box_tokens`] and 128-byte swizzle. `output` is one of the
/// 16-bit output with boxes of 64 channels × [`TileShape::epilogue_tokens`] and the same swizzle, if
/// `output_is_mapped` says so.
#[inline(always)]
pub unsafe fn gemm<
    A: Accumulator,
    L: MainLoop,
    const STRIPS: u32,
    const HALVES: u32,
    const SPLIT: u32,
    const STAGES: u32,
>(
    activations: TokenBoxes,
    output: *const TensorMap,
    arguments: &GemmArguments,
) {
    let shape = const {
        TileShape { strips: STRIPS, tokens: A::TOKENS, halves: HALVES, split: SPLIT, stages: STAGES }
    };
    let shared = Shared::new(shared::dynamic_shared_mem(), shape, arguments.weights.stream);
    let thread = thread::thread_idx_x();
    let warp = warp::broadcast(thread / warp::WARP_SIZE);
    let warpgroup = warp / 4;
    let cluster = Cluster::of_block(shape);

    if thread == 0 {
        // SAFETY: the maps are parameters; the barrier below orders the barriers' making.
        unsafe {
            activations.prefetch(arguments, shape, cluster);
            if shape.maps_output() {
                tma::prefetch_map(output);
            }
            shared.init_barriers(cluster);
        }
    }
    sync(cluster);
    if shape.split > 1 {
        cluster::arrive_relaxed();
    }

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
        if shape.split > 1 {
            // Nobody needs to know here, but whoever has arrived must wait before the cluster meets again.
            cluster::wait();
        }
    } else {
        if shape.moves_registers() {
            // SAFETY: the whole warpgroup is here.
            unsafe { registers::increase::<STRIPS, HALVES>() };
        }
        let consumer = Consumer::of_warpgroup(warpgroup, thread, shape);
        if shape.split > 1 {
            // The other block's barriers are made.
            cluster::wait();
        }
        // SAFETY: the whole warpgroup is here; the caller vouches for the arguments.
        unsafe { consume::<A, L>(arguments, output, shared, shape, cluster, consumer) };
    }
    if shape.split > 1 || cluster.blocks > 1 {
        // The others may still send activations or sums here, or arrive on the barriers.
        cluster::sync_cluster_relaxed();
    }
}

/// Waits for every thread of the cluster.
#[inline(always)]
pub(crate) fn sync(cluster: Cluster) {
    if cluster.blocks > 1 {
        cluster::sync_cluster_relaxed();
    } else {
        thread::sync_threads();
    }
}

/// The first strip of a block's tile.
#[inline(always)]
pub(crate) fn first_strip(position: TilePosition, shape: TileShape, cluster: Cluster) -> u32 {
    (position.channel_tile * cluster.blocks + cluster.rank) * shape.strips
}

/// How many strips there are of a tile. The last tiles may have fewer: their consumers then work on what happens to lie there, and
/// store nothing.
#[inline(always)]
pub(crate) fn tile_strips(arguments: &GemmArguments, first_strip: u32, shape: TileShape) -> u32 {
    arguments.strips().saturating_sub(first_strip).min(shape.strips)
}

/// The first producer: keeps the ring full of bricks.
///
/// The weights are there before the launch, so it begins at once, while the launch before this one, which may be
/// computing the activations, still runs. It fills the ring at the pace of memory. The blocks that read the same weights do so at
/// about the same time: they leave the L2 cache first, so that the activations stay.
#[inline(always)]
pub(crate) unsafe fn produce_bricks<const STAGES: u32>(
    arguments: &GemmArguments,
    shared: Shared,
    shape: TileShape,
    cluster: Cluster,
) {
    let schedule = arguments.schedule;
    let stream = arguments.weights.stream;
    let mut ring = RingCursor::<STAGES>::start();
    let begin = thread::clock64() as u32;
    let pace = arguments.first_turn_cycles;
    let mut due = 0;
    let policy = Policy::evict_first();
    for segment in schedule.segments(cluster::cluster_idx_x()) {
        let first_strip = first_strip(schedule.position(segment.tile), shape, cluster);
        let strips = tile_strips(arguments, first_strip, shape);
        let source = arguments.weights.strips + first_strip as u64 * stream.strip_bytes as u64;
        let mut first_span = (first_step(schedule, cluster) + segment.k_begin) * shape.spans();
        let mut offset = first_span * stream.span_bytes;
        for step in 0..segment.k_end - segment.k_begin {
            let stage = ring.stage();
            if due < STAGES * pace {
                while (thread::clock64() as u32).wrapping_sub(begin) < due {}
                due += pace;
            }
            let load = SpanLoad::new(stream, step < STAGES);
            // SAFETY: the stage is empty once acquired and holds what is copied; the spans exist.
            unsafe {
                shared.acquire_empty(stage, ring.empty_parity());
                seq_macro::seq!(SPAN in 0..2 {
                    if SPAN < shape.spans() {
                        // Past the last span the activations are zeros, so stale bricks add nothing. Where two blocks share K, the second
                        // one's last step may have no span at all.
                        let exists = SPAN == 0 && shape.split == 1 || first_span + SPAN < stream.spans;
                        let bytes = if exists { load.bytes() } else { 0 };
                        let full = shared.announce(stage, SPAN, strips * bytes);
                        seq_macro::seq!(STRIP in 0..3 {
                            if STRIP < shape.strips && STRIP < strips && exists {
                                let to = shared.bricks(stage, STRIP) + SPAN * STRIP_SPAN_BYTES;
                                let strip = source + STRIP * stream.strip_bytes as u64;
                                load.load(to, strip, offset + SPAN * stream.span_bytes, full, policy);
                            }
                        });
                    }
                });
            }
            first_span += shape.spans();
            offset += shape.spans() * stream.span_bytes;
            ring = ring.next();
        }
    }
}

/// What is loaded of every strip of a tile for a span: the span, and where a channel has its pairs once, these.
#[derive(Clone, Copy)]
pub(crate) struct SpanLoad {
    stream: WeightStream,
    loads_channel_pairs: bool,
}

impl SpanLoad {
    /// `is_first` says that no other span of the tile has been in its place in the ring: pairs that a channel has once stay there.
    #[inline(always)]
    pub(crate) fn new(stream: WeightStream, is_first: bool) -> Self {
        Self { stream, loads_channel_pairs: stream.channel_pairs > 0 && is_first }
    }

    /// Bytes of each strip.
    #[inline(always)]
    pub(crate) fn bytes(self) -> u32 {
        self.stream.span_bytes + if self.loads_channel_pairs { PAIR_BYTES as u32 } else { 0 }
    }

    /// Loads a strip's span, which lies `offset` behind the first span of a strip at `strip`.
    ///
    /// # Safety
    /// As for [`tma::load_bulk`].
    #[inline(always)]
    pub(crate) unsafe fn load(self, to: u32, strip: u64, offset: u32, full: u32, policy: Policy) {
        // SAFETY: the caller vouches for the addresses.
        unsafe {
            let from = strip + (self.stream.channel_pairs + offset) as u64;
            tma::load_bulk(to, from, self.stream.span_bytes, full, policy);
            if self.loads_channel_pairs {
                tma::load_bulk(to + STRIP_SPAN_CODE_BYTES, strip, PAIR_BYTES as u32, full, policy);
            }
        }
    }
}

/// The maps of the activations, in boxes of [`TileShape::box_tokens`].
///
/// Rows of a box that lie outside of the tensor take far longer to fill than rows that are read. So the last box of a problem has a map
/// of its own, with the tokens that are left, and boxes without any token are not loaded. What shared memory then holds for tokens from m
/// on only reaches sums that are never stored.
#[derive(Clone, Copy)]
pub struct TokenBoxes {
    /// Of whole boxes.
    pub whole: *const TensorMap,
    /// Of boxes that hold the rest of m after whole boxes; any map if there is no rest.
    pub last: *const TensorMap,
}

impl TokenBoxes {
    /// Fetches the maps ahead of their first use.
    ///
    /// # Safety
    /// The maps are the kernel's parameters.
    #[inline(always)]
    pub(crate) unsafe fn prefetch(self, arguments: &GemmArguments, shape: TileShape, cluster: Cluster) {
        // SAFETY: the caller vouches for the maps.
        unsafe {
            if arguments.m >= cluster.box_tokens(shape) {
                tma::prefetch_map(self.whole);
            }
            tma::prefetch_map(self.last);
        }
    }

    /// The map for the box of up to `tokens` from `first` on.
    #[inline(always)]
    pub(crate) fn map(self, arguments: &GemmArguments, first: u32, tokens: u32) -> *const TensorMap {
        if first + tokens <= arguments.m { self.whole } else { self.last }
    }
}

/// How many tokens there are of a tile that begins with `first`.
#[inline(always)]
pub(crate) fn tile_tokens(arguments: &GemmArguments, first: u32, shape: TileShape) -> u32 {
    arguments.m.saturating_sub(first).min(shape.tokens)
}

/// The second producer: keeps the ring full of activations, which the launch before this one may have to finish first.
#[inline(always)]
pub(crate) unsafe fn produce_activations<const STAGES: u32>(
    activations: TokenBoxes,
    arguments: &GemmArguments,
    shared: Shared,
    shape: TileShape,
    cluster: Cluster,
) {
    let schedule = arguments.schedule;
    let part_tokens = cluster.part_tokens(shape);
    let part_offset = cluster.rank * part_tokens * SPAN_K;
    let every_block = (1 << cluster.blocks) - 1;
    let first_step = first_step(schedule, cluster);
    let mut ring = RingCursor::<STAGES>::start();
    grid::await_previous();
    for segment in schedule.segments(cluster::cluster_idx_x()) {
        let first_token = schedule.position(segment.tile).token_tile * shape.tokens;
        let bytes = tile_tokens(arguments, first_token, shape) * SPAN_K;
        let token = first_token + cluster.rank * part_tokens;
        let map = activations.map(arguments, token, part_tokens);
        for step in first_step + segment.k_begin..first_step + segment.k_end {
            let stage = ring.stage();
            let destination = shared.activations(stage) + part_offset;
            // SAFETY: the stage is empty once acquired and holds what is copied; so do the other blocks', as their
            // consumers arrive here too.
            unsafe {
                shared.acquire_empty(stage, ring.empty_parity());
                seq_macro::seq!(SPAN in 0..2 {
                    if SPAN < shape.spans() {
                        let full = shared.announce(stage, SPAN, bytes);
                        let (to, k) = (destination + SPAN * shape.span_bytes(), step * shape.stage_k() + SPAN * SPAN_K);
                        if shape.split > 1 {
                            load_parts(to, activations, arguments, k, token, full, shape, cluster);
                        } else if cluster.blocks == 1 {
                            tma::load_2d(to, map, k, token, full);
                        } else if token < arguments.m {
                            tma::load_2d_multicast(to, map, k, token, full, every_block);
                        }
                    }
                });
            }
            ring = ring.next();
        }
    }
}

/// The first step that is this block's, where two share a tile's K.
#[inline(always)]
fn first_step(schedule: Schedule, cluster: Cluster) -> u32 {
    cluster.part * schedule.k_steps
}

/// Loads an activation tile with the tokens that this block's consumers finish before those that the other blocks' do.
///
/// # Safety
/// As for [`tma::load_2d`], for all boxes of the tile from `token` on.
#[inline(always)]
unsafe fn load_parts(
    to: u32,
    activations: TokenBoxes,
    arguments: &GemmArguments,
    k: u32,
    token: u32,
    full: u32,
    shape: TileShape,
    cluster: Cluster,
) {
    let tokens = shape.finished_tokens();
    seq_macro::seq!(PART in 0..16 {
        if PART * tokens < shape.tokens {
            let (consumer, position) = (PART / shape.finishers(), PART % shape.finishers());
            let part = consumer * shape.finishers() + shape.finisher(cluster.part, position);
            let first = token + part * tokens;
            if first < arguments.m {
                let map = activations.map(arguments, first, tokens);
                // SAFETY: the caller vouches for the tile.
                unsafe { tma::load_2d(to + PART * tokens * SPAN_K, map, k, first, full) };
            }
        }
    });
}

/// A consumer: a 64-channel strip of every tile, or one half of its K.
#[inline(always)]
pub(crate) unsafe fn consume<A: Accumulator, L: MainLoop>(
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
    let mut position = L::START;
    let exchange = Exchange::new(shared, shape, cluster, consumer);
    let mut parity = 0;
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
        let mut accumulator = A::arbitrary();
        // SAFETY: the caller vouches for the arguments; all threads of the warpgroup go the same way, as
        // every condition depends on the segment alone.
        unsafe {
            if parks_early {
                epilogue.park(scales);
            }
            let walk = L::accumulate(&mut accumulator, position, current, shared, shape, cluster, consumer);
            // While the last MMAs run:
            if shape.split > 1 {
                exchange.open(parity);
            }
            if !parks_early {
                epilogue.park(scales);
            }
            segment = segments.next();
            let mut next = epilogue;
            if segment.is_some() {
                next = epilogue_of(segment, arguments, output, shared, shape, cluster, consumer);
                scales = next.fetch();
            }
            position = walk.leave();
            halves::exchange(&mut accumulator, shared, shape, consumer);
            if shape.split > 1 {
                exchange.give(&mut accumulator);
                if exchange.takes() {
                    seq_macro::seq!(ROUND in 0..2 {
                        if ROUND < shape.epilogue_rounds() {
                            exchange.take(&mut accumulator, ROUND, parity);
                            epilogue.store(&mut accumulator, Some(ROUND));
                        }
                    });
                    if segment.is_some() {
                        exchange.release();
                    }
                }
                parity ^= 1;
            } else if schedule.owns(current) {
                let first = schedule.first_contributor(worker, current);
                slots.collect(&mut accumulator, arguments, first..worker);
                epilogue.store(&mut accumulator, None);
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
    // Where blocks share the tile, each one's own tokens lie first in its accumulators.
    let token = position.token_tile * shape.tokens + cluster.part * shape.finished_tokens();
    Epilogue::new(arguments, output, shared, shape, [strip, token], consumer)
}

/// The library's main loop: a consumer's way through the stages of a segment.
///
/// Each span is one wgmma group, of four MMAs or of the two that are this consumer's. While it runs, the next span's
/// codes are loaded and dequantized into operand registers of their own; two spans a turn of the loop make those two
/// sets.
pub struct StageWalk<D, const STAGES: u32> {
    dequantization: PhantomData<D>,
    shared: Shared,
    shape: TileShape,
    cluster: Cluster,
    consumer: Consumer,
    /// The thread's share of its own first brick in stage 0.
    place: SharePlace,
    /// The stage to multiply next.
    ring: RingCursor<STAGES>,
    /// The codes of the next span's bricks; where two consumers share the strip, of this one's brick, twice.
    shares: [BrickShare; SPAN_BRICKS as usize],
    /// Stages left, with this one.
    steps: u32,
    /// The stage whose MMAs may still run; `STAGES` for none.
    unreleased: u32,
}

impl<D: Dequantization, const STAGES: u32> MainLoop for StageWalk<D, STAGES> {
    type Position = RingCursor<STAGES>;

    const START: Self::Position = RingCursor::start();

    #[inline(always)]
    unsafe fn accumulate<A: Accumulator>(
        accumulator: &mut A,
        position: Self::Position,
        segment: Segment,
        shared: Shared,
        shape: TileShape,
        cluster: Cluster,
        consumer: Consumer,
    ) -> Self {
        // SAFETY: a stage is read between acquiring and releasing it, and released when its last wgmma is done;
        // the caller vouches for the warpgroup.
        unsafe {
            let steps = segment.k_end - segment.k_begin;
            let mut walk = Self::enter(position, steps, shared, shape, cluster, consumer);
            // One way out of the loop only: what is the same for all threads then stays in uniform registers.
            if shape.spans() == 1 && walk.steps % 2 == 1 {
                walk.step(accumulator, 0);
            }
            while walk.steps > 0 {
                walk.step(accumulator, 0);
                walk.step(accumulator, shape.spans() - 1);
            }
            walk
        }
    }

    #[inline(always)]
    unsafe fn leave(self) -> Self::Position {
        // SAFETY: all groups are done after the wait.
        unsafe {
            wgmma::wait::<0>();
            self.shared.release(self.unreleased, self.cluster, self.consumer.thread % warp::WARP_SIZE);
        }
        self.ring
    }
}

impl<D: Dequantization, const STAGES: u32> StageWalk<D, STAGES> {
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
        let place = shared.share_place(consumer);
        // SAFETY: the stage is acquired before it is read.
        let shares = unsafe {
            shared.acquire_full(ring.stage(), 0, ring.full_parity());
            Self::load(shape, ring, 0, place, shared.stream())
        };
        Self {
            dequantization: PhantomData,
            shared,
            shape,
            cluster,
            consumer,
            place,
            ring,
            shares,
            steps,
            unreleased: STAGES,
        }
    }

    /// Loads the consumer's codes of a span of a stage.
    #[inline(always)]
    unsafe fn load(
        shape: TileShape,
        ring: RingCursor<STAGES>,
        span: u32,
        place: SharePlace,
        stream: WeightStream,
    ) -> [BrickShare; SPAN_BRICKS as usize] {
        let bricks = ring.stage() * shape.stage_bytes() + span * STRIP_SPAN_BYTES;
        // SAFETY: the caller has acquired the stage.
        unsafe {
            let first = BrickShare::load(bricks, place);
            if shape.halves == 1 {
                [first, BrickShare::load_second(bricks, place, stream)]
            } else {
                [first, first]
            }
        }
    }

    /// Multiplies one span of a stage.
    ///
    /// An MMA whose operand comes from registers holds its warp until it has read it, and so until the MMAs before it
    /// are nearly done. Whatever else takes time is therefore asked for before: the next span's codes arrive while
    /// the MMAs hold the warp.
    #[inline(always)]
    unsafe fn step<A: Accumulator>(&mut self, accumulator: &mut A, span: u32) {
        let (ring, shape) = (self.ring, self.shape);
        let ends = span + 1 == shape.spans();
        let (next, next_span) = if ends { (ring.next(), 0) } else { (ring, span + 1) };
        // SAFETY: the barriers are made. Asked now, the answer is there when it is needed.
        let next_is_full = unsafe { self.shared.is_full(next.stage(), next_span, next.full_parity()) };
        // The same for all threads, which the compiler can't see: told so, it keeps descriptors in uniform registers.
        let tile = warp::broadcast(self.shared.activation_descriptor(ring.stage()));
        let tile = tile + span * wgmma::descriptor_step(shape.span_bytes());
        let tile = tile + self.consumer.half * 2 * DESCRIPTOR_K32;
        let operands = self.operands();
        let before = self.unreleased;
        // The segment's first products replace what the accumulator holds.
        let accumulate = span > 0 || before != STAGES;
        if ends {
            self.unreleased = ring.stage();
            self.ring = next;
            self.steps -= 1;
        }
        let goes_on = !ends || self.steps > 0;
        // SAFETY: the stages are acquired before they are read; the operands' registers are not written before their
        // group is done; the group before this one is done after the wait, and with the first span's the stage before.
        unsafe {
            if next_is_full && goes_on {
                self.shares = Self::load(shape, next, next_span, self.place, self.shared.stream());
            }
            wgmma::fence();
            if shape.halves == 1 {
                accumulator.multiply_accumulate_along(operands, tile, accumulate);
            } else {
                accumulator.multiply_accumulate_along([operands[0], operands[1]], tile, accumulate);
            }
            wgmma::commit();
            if !next_is_full && goes_on {
                self.shared.acquire_full(next.stage(), next_span, next.full_parity());
                self.shares = Self::load(shape, next, next_span, self.place, self.shared.stream());
            }
            wgmma::wait::<1>();
            if span == 0 && before != STAGES {
                self.shared.release(before, self.cluster, self.consumer.thread % warp::WARP_SIZE);
            }
        }
    }

    /// The A operands of the span's MMAs; where two consumers share the strip, of this one's two, twice.
    #[inline(always)]
    fn operands(&self) -> [[u32; 4]; 4] {
        let [first, second] = self.shares;
        let operands = [first.operand::<D, 0>(), first.operand::<D, 1>()];
        if self.shape.halves == 1 {
            [operands[0], operands[1], second.operand::<D, 0>(), second.operand::<D, 1>()]
        } else {
            [operands[0], operands[1], operands[0], operands[1]]
        }
    }
}
