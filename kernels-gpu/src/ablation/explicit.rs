//! The explicit coarse-grained pipeline (ExCP), for the ablation.
//!
//! For each strip one warpgroup dequantizes into a buffer of int8 weights in shared memory,
//! and another multiplies from there. A full and an empty barrier for each buffer synchronize them.
//!
//! A buffer is laid out as an activation tile:
//! a row of 128 bytes for each channel, with the 128-byte swizzle.
//! Wgmma reads this layout, and `stmatrix` can write it without bank conflicts.
//! `liquidgemm_format::ablation` computes the sizes and offsets;
//! the host twin is `crates/bench/src/ablation`.

use cuda_std::warp::WARP_SIZE;
use cuda_std::{TensorMap, cluster, thread, warp};
use liquidgemm_format::ablation::{EXPLICIT_MMA_BYTES, EXPLICIT_REGISTERS, ExplicitShape, explicit_row};
use liquidgemm_format::arguments::GemmArguments;
use liquidgemm_format::ring::RingCursor;
use liquidgemm_format::schedule::Segment;
use liquidgemm_format::tile::{STRIP_K_TILE_BYTES, WARPGROUP};

use crate::block::{Block, Consumer, Shared};
use crate::dequant::{AFragment, Dequantization};
use crate::gemm::consumer::consume;
use crate::gemm::main_loop::MainLoop;
use crate::gemm::producer::{TokenBoxes, produce_activations, produce_bricks};
use crate::gemm::sync;
use crate::ptx::matrix::store_x4;
use crate::ptx::wgmma::{Accumulator, DESCRIPTOR_K32};
use crate::ptx::{grid, mbarrier, registers, tma, wgmma};
use crate::shape::Shape;

/// Strips of a tile. Each has a warpgroup that dequantizes and one that multiplies.
const STRIPS: u32 = 2;

/// Computes the cluster's tiles: the body of the kernels, which each thread executes.
///
/// # Safety
/// As for [`crate::gemm::gemm`].
#[inline(always)]
pub unsafe fn gemm<A: Accumulator, D: Dequantization, S: Shape, const STAGES: u32, const BUFFERS: u32>(
    activations: TokenBoxes,
    output: *const TensorMap,
    arguments: &GemmArguments,
) {
    let tile = S::SHAPE;
    let shape = ExplicitShape { tile, buffers: BUFFERS };
    let block = Block::<S>::current(arguments.weights.stream);
    let Block { shared, cluster, .. } = block;
    let buffers = Buffers::behind(shared, shape);
    let thread = thread::thread_idx_x();
    let warp = warp::broadcast(thread / WARP_SIZE);
    let warpgroup = warp / 4;

    if thread == 0 {
        // SAFETY: the maps are kernel parameters;
        // the barrier below orders the initialization of the barriers before their use.
        unsafe {
            activations.prefetch(arguments, block);
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
            // SAFETY: the whole warpgroup executes this.
            unsafe { registers::decrease_to::<{ EXPLICIT_REGISTERS[0] }>() };
        }
        if warp == PRODUCER * 4 {
            grid::launch_dependents();
            // SAFETY: one whole warp executes this; the caller guarantees the arguments.
            unsafe { produce_bricks::<S, STAGES>(arguments, block) };
        } else if warp == PRODUCER * 4 + 1 {
            // SAFETY: one whole warp executes this; the caller guarantees the arguments.
            unsafe { produce_activations::<S, STAGES>(activations, arguments, block) };
        }
    } else if warpgroup >= STRIPS {
        if tile.moves_registers() {
            // SAFETY: the whole warpgroup executes this.
            unsafe { registers::decrease_to::<{ EXPLICIT_REGISTERS[1] }>() };
        }
        let consumer = Consumer::of_warpgroup(warpgroup - STRIPS, thread, tile);
        // SAFETY: the whole warpgroup executes this; the caller guarantees the arguments.
        unsafe { dequantize::<D, STAGES, BUFFERS>(arguments, shared, buffers, consumer) };
    } else {
        if tile.moves_registers() {
            // SAFETY: the whole warpgroup executes this.
            unsafe { registers::increase_to::<{ EXPLICIT_REGISTERS[2] }>() };
        }
        let consumer = Consumer::of_warpgroup(warpgroup, thread, tile);
        // SAFETY: the whole warpgroup executes this; the caller guarantees the arguments.
        unsafe {
            consume::<A, FromBuffers<S, STAGES, BUFFERS>>(arguments, output, block, consumer);
        }
    }
    if cluster.blocks > 1 {
        // The cluster's other thread blocks may still send activations to this one,
        // or arrive on its barriers.
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
    /// Returns the buffers behind `shared`.
    #[inline(always)]
    fn behind(shared: Shared, shape: ExplicitShape) -> Self {
        // The ring's first stage, which begins with activations, lies at the start of shared memory.
        Self { base: shared.activations(0), shape }
    }

    /// Returns the address of a strip's weights in a buffer.
    #[inline(always)]
    fn weights(self, buffer: u32, strip: u32) -> u32 {
        self.base + self.shape.buffers_offset() + (buffer * STRIPS + strip) * self.shape.strip_bytes()
    }

    /// Returns the barrier that completes when a strip's weights are in a buffer.
    #[inline(always)]
    fn full(self, buffer: u32, strip: u32) -> u32 {
        self.base + self.shape.barriers_offset() + (buffer * STRIPS + strip) * 16
    }

    /// Returns the barrier that completes when a strip's weights in a buffer have been read.
    #[inline(always)]
    fn empty(self, buffer: u32, strip: u32) -> u32 {
        self.full(buffer, strip) + 8
    }

    /// Initializes the buffers' barriers.
    ///
    /// Every thread of the dequantizing warpgroup arrives on the full barrier when it has written;
    /// every thread of the multiplying warpgroup arrives on the empty barrier when the MMAs have read.
    ///
    /// # Safety
    /// One thread calls it, and [`Shared::init_barriers`] follows.
    #[inline(always)]
    unsafe fn init_barriers(self) {
        let mut index = 0;
        while index < self.shape.buffers * STRIPS {
            // SAFETY: the barriers lie inside the thread block's shared memory.
            unsafe {
                mbarrier::init(self.full(0, 0) + index * 16, WARPGROUP);
                mbarrier::init(self.empty(0, 0) + index * 16, WARPGROUP);
            }
            index += 1;
        }
    }
}

/// Runs a warpgroup that dequantizes a strip.
///
/// It releases no stage of the ring.
/// The multiplying warpgroup does so later, after it has seen this one's weights.
///
/// # Safety
/// The whole warpgroup calls it; the barriers are initialized.
#[inline(always)]
unsafe fn dequantize<D: Dequantization, const STAGES: u32, const BUFFERS: u32>(
    arguments: &GemmArguments,
    shared: Shared,
    buffers: Buffers,
    consumer: Consumer,
) {
    let tile = buffers.shape.tile;
    let place = shared.fragment_address(consumer);
    let row = explicit_row(consumer.thread);
    let mut ring = RingCursor::<STAGES>::start();
    let mut filled = RingCursor::<BUFFERS>::start();
    for segment in arguments.schedule.segments(cluster::cluster_idx_x()) {
        for _ in segment.k_begin..segment.k_end {
            let mut bricks = ring.stage() * tile.stage_bytes();
            let mut k_tile = 0;
            while k_tile < tile.k_tiles() {
                let (buffer, strip) = (filled.stage(), consumer.strip);
                // SAFETY: the K-tile is acquired before it is read, and the buffer before it is written.
                unsafe {
                    shared.acquire_full(ring.stage(), k_tile, ring.full_parity());
                    let first = AFragment::load(bricks, place);
                    let second = AFragment::load_second(bricks, place, shared.stream());
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
                bricks += STRIP_K_TILE_BYTES;
                k_tile += 1;
            }
            ring = ring.next();
        }
    }
}

/// The main loop of a warpgroup that multiplies, with both operands in shared memory.
///
/// The MMAs of a K-tile are issued while those of the K-tile before run.
struct FromBuffers<S, const STAGES: u32, const BUFFERS: u32> {
    block: Block<S>,
    buffers: Buffers,
    consumer: Consumer,
    /// The stage and the buffer to multiply next.
    position: Position<STAGES, BUFFERS>,
    /// The buffer whose MMAs may still run, or `BUFFERS` if there is none;
    /// then its stage if the buffer was the stage's last, otherwise `STAGES`.
    unreleased: [u32; 2],
}

/// A position in the ring and among the buffers.
#[derive(Clone, Copy)]
struct Position<const STAGES: u32, const BUFFERS: u32> {
    ring: RingCursor<STAGES>,
    drained: RingCursor<BUFFERS>,
}

impl<S: Shape, const STAGES: u32, const BUFFERS: u32> MainLoop for FromBuffers<S, STAGES, BUFFERS> {
    type Shape = S;
    type Position = Position<STAGES, BUFFERS>;

    const START: Self::Position = Position { ring: RingCursor::start(), drained: RingCursor::start() };

    #[inline(always)]
    unsafe fn accumulate<A: Accumulator>(
        accumulator: &mut A,
        position: Self::Position,
        segment: Segment,
        block: Block<S>,
        consumer: Consumer,
    ) -> Self {
        let buffers = Buffers::behind(block.shared, ExplicitShape { tile: S::SHAPE, buffers: BUFFERS });
        let mut walk = Self { block, buffers, consumer, position, unreleased: [BUFFERS, STAGES] };
        for _ in segment.k_begin..segment.k_end {
            // SAFETY: the caller guarantees the warpgroup and the rings.
            unsafe {
                walk.iteration(accumulator, 0);
                if buffers.shape.tile.k_tiles() > 1 {
                    walk.iteration(accumulator, 1);
                }
            }
        }
        walk
    }

    #[inline(always)]
    unsafe fn leave(self) -> Self::Position {
        // SAFETY: all wgmma groups are done after the wait.
        unsafe {
            wgmma::wait::<0>();
            self.release();
        }
        self.position
    }
}

impl<S: Shape, const STAGES: u32, const BUFFERS: u32> FromBuffers<S, STAGES, BUFFERS> {
    /// Multiplies one K-tile, and releases what the MMAs of the K-tile before have read.
    ///
    /// # Safety
    /// The whole warpgroup calls it; the barriers are initialized.
    #[inline(always)]
    unsafe fn iteration<A: Accumulator>(&mut self, accumulator: &mut A, k_tile: u32) {
        let Position { ring, drained } = self.position;
        let (stage, buffer, strip) = (ring.stage(), drained.stage(), self.consumer.strip);
        // The descriptors are the same for all threads of the warp; the broadcasts tell the compiler.
        let shape = self.buffers.shape.tile;
        let tile = warp::broadcast(self.block.shared.activation_descriptor(stage));
        let tile = tile + k_tile * wgmma::descriptor_step(shape.k_tile_bytes());
        let ends = k_tile + 1 == shape.k_tiles();
        let weights = warp::broadcast(wgmma::descriptor(self.buffers.weights(buffer, strip)));
        // SAFETY: stage and buffer are acquired before the MMAs read them.
        // After the wait the preceding wgmma group is done, and has read its operands.
        unsafe {
            self.block.shared.acquire_full(stage, k_tile, ring.full_parity());
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

    /// Releases the buffer and the stage in `unreleased`.
    ///
    /// # Safety
    /// The barriers are initialized, and the MMAs that read the buffer are done.
    #[inline(always)]
    unsafe fn release(&self) {
        let [buffer, stage] = self.unreleased;
        // SAFETY: the caller guarantees the barriers, and has waited for the MMAs.
        unsafe {
            if stage != STAGES {
                self.block.shared.release(stage, self.block.cluster, self.consumer.thread % WARP_SIZE);
            }
            if buffer != BUFFERS {
                mbarrier::arrive(self.buffers.empty(buffer, self.consumer.strip));
            }
        }
    }
}
