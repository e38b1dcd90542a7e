//! The explicit coarse-grained pipeline (ExCP): for each strip one warpgroup dequantizes into a buffer of int8 weights in
//! shared memory, and another multiplies from there. A full and an empty barrier for each buffer keep them apart.
//!
//! A buffer is laid out as the activation tile is, a row of 128 bytes a channel with the 128-byte swizzle, which is what
//! wgmma reads and what `stmatrix` can write without bank conflicts.

use cuda_std::warp::WARP_SIZE;
use cuda_std::{TensorMap, cluster, shared, thread, warp};
use liquidgemm_format::ablation::{EXPLICIT_MMA_BYTES, EXPLICIT_REGISTERS, ExplicitShape, explicit_row};
use liquidgemm_format::arguments::GemmArguments;
use liquidgemm_format::ring::RingCursor;
use liquidgemm_format::schedule::Segment;
use liquidgemm_format::tile::{STRIP_SPAN_BYTES, TileShape, WARPGROUP};

use crate::dequant::{BrickShare, Dequantization};
use crate::gemm::{MainLoop, TokenBoxes, consume, produce_activations, produce_bricks, sync};
use crate::pipeline::{Cluster, Consumer, Shared};
use crate::ptx::matrix::store_x4;
use crate::ptx::wgmma::{Accumulator, DESCRIPTOR_K32};
use crate::ptx::{grid, mbarrier, registers, tma, wgmma};

/// Strips of a tile: each has a warpgroup that dequantizes and one that multiplies.
const STRIPS: u32 = 2;

/// The block with a ring of so many stages and so many buffers.
const fn shape(tokens: u32, stages: u32, buffers: u32) -> ExplicitShape {
    ExplicitShape { tile: TileShape { strips: STRIPS, tokens, halves: 1, split: 1, stages }, buffers }
}

/// The kernel's body.
///
/// # Safety
/// As for [`crate::gemm::gemm`].
#[inline(always)]
pub unsafe fn gemm<A: Accumulator, D: Dequantization, const STAGES: u32, const BUFFERS: u32>(
    activations: TokenBoxes,
    output: *const TensorMap,
    arguments: &GemmArguments,
) {
    let shape = const { shape(A::TOKENS, STAGES, BUFFERS) };
    let tile = shape.tile;
    let shared = Shared::new(shared::dynamic_shared_mem(), tile, arguments.weights.stream);
    let buffers = Buffers::behind(shared, shape);
    let thread = thread::thread_idx_x();
    let warp = warp::broadcast(thread / WARP_SIZE);
    let warpgroup = warp / 4;
    let cluster = Cluster::of_block(tile);

    if thread == 0 {
        // SAFETY: the maps are parameters; the barrier below orders the barriers' making.
        unsafe {
            activations.prefetch(arguments, tile, cluster);
            if tile.maps_output() {
                tma::prefetch_map(output);
            }
            buffers.init_barriers();
            shared.init_barriers(cluster);
        }
    }
    sync(cluster);

    const PRODUCER: u32 = 2 * STRIPS;
    if warpgroup == PRODUCER {
        if tile.moves_registers() {
            // SAFETY: the whole warpgroup is here.
            unsafe { registers::decrease_to::<{ EXPLICIT_REGISTERS[0] }>() };
        }
        // SAFETY (both): one whole warp each; the caller vouches for the arguments.
        if warp == PRODUCER * 4 {
            grid::admit_next();
            unsafe { produce_bricks::<STAGES>(arguments, shared, tile, cluster) };
        } else if warp == PRODUCER * 4 + 1 {
            unsafe { produce_activations::<STAGES>(activations, arguments, shared, tile, cluster) };
        }
    } else if warpgroup >= STRIPS {
        if tile.moves_registers() {
            // SAFETY: the whole warpgroup is here.
            unsafe { registers::decrease_to::<{ EXPLICIT_REGISTERS[1] }>() };
        }
        let consumer = Consumer::of_warpgroup(warpgroup - STRIPS, thread, tile);
        // SAFETY: the whole warpgroup is here; the caller vouches for the arguments.
        unsafe { dequantize::<D, STAGES, BUFFERS>(arguments, shared, buffers, consumer) };
    } else {
        if tile.moves_registers() {
            // SAFETY: the whole warpgroup is here.
            unsafe { registers::increase_to::<{ EXPLICIT_REGISTERS[2] }>() };
        }
        let consumer = Consumer::of_warpgroup(warpgroup, thread, tile);
        // SAFETY: the whole warpgroup is here; the caller vouches for the arguments.
        unsafe {
            consume::<A, FromBuffers<STAGES, BUFFERS>>(arguments, output, shared, tile, cluster, consumer);
        }
    }
    if cluster.blocks > 1 {
        // The others may still send activations here, or arrive on the barriers.
        cluster::sync_cluster_relaxed();
    }
}

/// The buffers of int8 weights and their barriers, behind the rest of shared memory.
#[derive(Clone, Copy)]
struct Buffers {
    base: u32,
    shape: ExplicitShape,
}

impl Buffers {
    #[inline(always)]
    fn behind(shared: Shared, shape: ExplicitShape) -> Self {
        // The ring's first stage begins where shared memory does.
        Self { base: shared.activations(0), shape }
    }

    /// A strip's weights in a buffer.
    #[inline(always)]
    fn weights(self, buffer: u32, strip: u32) -> u32 {
        self.base + self.shape.buffers_offset() + (buffer * STRIPS + strip) * self.shape.strip_bytes()
    }

    #[inline(always)]
    fn full(self, buffer: u32, strip: u32) -> u32 {
        self.base + self.shape.barriers_offset() + (buffer * STRIPS + strip) * 16
    }

    #[inline(always)]
    fn empty(self, buffer: u32, strip: u32) -> u32 {
        self.full(buffer, strip) + 8
    }

    /// Makes the barriers: every thread of the one warpgroup arrives when it has written, of the other when it has read.
    ///
    /// # Safety
    /// One thread calls it, and [`Shared::init_barriers`] follows.
    #[inline(always)]
    unsafe fn init_barriers(self) {
        let mut index = 0;
        while index < self.shape.buffers * STRIPS {
            // SAFETY: the barriers lie inside the block's shared memory.
            unsafe {
                mbarrier::init(self.full(0, 0) + index * 16, WARPGROUP);
                mbarrier::init(self.empty(0, 0) + index * 16, WARPGROUP);
            }
            index += 1;
        }
    }
}

/// A warpgroup that dequantizes a strip.
///
/// It gives no stage back: the warpgroup that multiplies does so later, and only after it has seen this one's weights.
///
/// # Safety
/// The whole warpgroup calls it; the barriers are made.
#[inline(always)]
unsafe fn dequantize<D: Dequantization, const STAGES: u32, const BUFFERS: u32>(
    arguments: &GemmArguments,
    shared: Shared,
    buffers: Buffers,
    consumer: Consumer,
) {
    let tile = buffers.shape.tile;
    let place = shared.share_place(consumer);
    let row = explicit_row(consumer.thread);
    let mut ring = RingCursor::<STAGES>::start();
    let mut filled = RingCursor::<BUFFERS>::start();
    for segment in arguments.schedule.segments(cluster::cluster_idx_x()) {
        for _ in segment.k_begin..segment.k_end {
            let mut bricks = ring.stage() * tile.stage_bytes();
            let mut span = 0;
            while span < tile.spans() {
                let (buffer, strip) = (filled.stage(), consumer.strip);
                // SAFETY: the span is acquired before it is read, and so is the buffer before it is written.
                unsafe {
                    shared.acquire_full(ring.stage(), span, ring.full_parity());
                    let first = BrickShare::load(bricks, place);
                    let second = BrickShare::load_second(bricks, place, shared.stream());
                    mbarrier::wait(buffers.empty(buffer, strip), filled.empty_parity());
                    let address = buffers.weights(buffer, strip) + row;
                    store_x4(address, first.operand::<D, 0>());
                    store_x4(address ^ EXPLICIT_MMA_BYTES, first.operand::<D, 1>());
                    store_x4(address ^ (2 * EXPLICIT_MMA_BYTES), second.operand::<D, 0>());
                    store_x4(address ^ (3 * EXPLICIT_MMA_BYTES), second.operand::<D, 1>());
                    mbarrier::fence_async();
                    mbarrier::arrive(buffers.full(buffer, strip));
                }
                filled = filled.next();
                bricks += STRIP_SPAN_BYTES;
                span += 1;
            }
            ring = ring.next();
        }
    }
}

/// The main loop of a warpgroup that multiplies: both operands come from shared memory, and while a span's MMAs run,
/// those of the next are issued.
struct FromBuffers<const STAGES: u32, const BUFFERS: u32> {
    shared: Shared,
    buffers: Buffers,
    cluster: Cluster,
    consumer: Consumer,
    /// The stage and the buffer to multiply next.
    position: Position<STAGES, BUFFERS>,
    /// The buffer whose MMAs may still run, `BUFFERS` for none, and the stage, if it was the stage's last; else `STAGES`.
    unreleased: [u32; 2],
}

/// Where in the ring and among the buffers.
#[derive(Clone, Copy)]
struct Position<const STAGES: u32, const BUFFERS: u32> {
    ring: RingCursor<STAGES>,
    drained: RingCursor<BUFFERS>,
}

impl<const STAGES: u32, const BUFFERS: u32> MainLoop for FromBuffers<STAGES, BUFFERS> {
    type Position = Position<STAGES, BUFFERS>;

    const START: Self::Position = Position { ring: RingCursor::start(), drained: RingCursor::start() };

    #[inline(always)]
    unsafe fn accumulate<A: Accumulator>(
        accumulator: &mut A,
        position: Self::Position,
        segment: Segment,
        shared: Shared,
        _: TileShape,
        cluster: Cluster,
        consumer: Consumer,
    ) -> Self {
        let buffers = Buffers::behind(shared, const { shape(A::TOKENS, STAGES, BUFFERS) });
        let mut walk = Self { shared, buffers, cluster, consumer, position, unreleased: [BUFFERS, STAGES] };
        for _ in segment.k_begin..segment.k_end {
            // SAFETY: the caller vouches for the warpgroup and the rings.
            unsafe {
                walk.step(accumulator, 0);
                if buffers.shape.tile.spans() > 1 {
                    walk.step(accumulator, 1);
                }
            }
        }
        walk
    }

    #[inline(always)]
    unsafe fn leave(self) -> Self::Position {
        // SAFETY: all groups are done after the wait.
        unsafe {
            wgmma::wait::<0>();
            self.release();
        }
        self.position
    }
}

impl<const STAGES: u32, const BUFFERS: u32> FromBuffers<STAGES, BUFFERS> {
    /// Multiplies one span, and gives back what the one before was read from.
    #[inline(always)]
    unsafe fn step<A: Accumulator>(&mut self, accumulator: &mut A, span: u32) {
        let Position { ring, drained } = self.position;
        let (stage, buffer, strip) = (ring.stage(), drained.stage(), self.consumer.strip);
        // The same for all threads, which the compiler can't see.
        let shape = self.buffers.shape.tile;
        let tile = warp::broadcast(self.shared.activation_descriptor(stage));
        let tile = tile + span * wgmma::descriptor_step(shape.span_bytes());
        let ends = span + 1 == shape.spans();
        let weights = warp::broadcast(wgmma::descriptor(self.buffers.weights(buffer, strip)));
        // SAFETY: stage and buffer are acquired before the MMAs read them; the group before this one is done after the
        // wait, and with it what it read.
        unsafe {
            self.shared.acquire_full(stage, span, ring.full_parity());
            mbarrier::wait(self.buffers.full(buffer, strip), drained.full_parity());
            wgmma::fence();
            let is_first = self.unreleased[0] == BUFFERS;
            seq_macro::seq!(MMA in 0..4 {
                accumulator.multiply_accumulate_shared(
                    weights + MMA * DESCRIPTOR_K32,
                    tile + MMA * DESCRIPTOR_K32,
                    MMA > 0 || !is_first,
                );
            });
            wgmma::commit();
            wgmma::wait::<1>();
            self.release();
        }
        self.unreleased = [buffer, if ends { stage } else { STAGES }];
        self.position = Position { ring: if ends { ring.next() } else { ring }, drained: drained.next() };
    }

    /// Gives back what is unreleased.
    #[inline(always)]
    unsafe fn release(&self) {
        let [buffer, stage] = self.unreleased;
        // SAFETY: the barriers are made; the caller has waited for the MMAs.
        unsafe {
            if stage != STAGES {
                self.shared.release(stage, self.cluster, self.consumer.thread % WARP_SIZE);
            }
            if buffer != BUFFERS {
                mbarrier::arrive(self.buffers.empty(buffer, self.consumer.strip));
            }
        }
    }
}
