//! The W4A8 GEMM: one producer warpgroup fills a ring of stages, two consumer warpgroups dequantize in registers
//! and feed the tensor cores (LiquidGEMM's implicit fine-grained pipeline, arXiv 2509.01229, section 5).
//!
//! Weights are wgmma's A operand and come from registers; activations are B and come from swizzled shared
//! memory. Blocks are persistent and go through the segments that the schedule gives them. The host twin, which
//! plans and launches this, is `host/src/gpu/gemm.rs`.

use cuda_std::{TensorMap, shared, thread, warp};
use liquidgemm_format::arguments::GemmArguments;
use liquidgemm_format::brick::BRICK_BYTES;
use liquidgemm_format::ring::RingCursor;
use liquidgemm_format::schedule::Segment;
use liquidgemm_format::tile::{BLOCK_THREADS, CONSUMERS, STAGE_BRICKS, STAGE_K, TileShape};

use crate::dequant::{BrickShare, SharePlace};
use crate::epilogue::Epilogue;
use crate::partials;
use crate::pipeline::Shared;
use crate::ptx::wgmma::Accumulator;
use crate::ptx::{registers, tma, wgmma};

/// Registers a thread of the producer keeps; the consumers share the rest.
const PRODUCER_REGISTERS: u32 = 40;
/// Registers a thread of a consumer has.
const CONSUMER_REGISTERS: u32 = 232;
const _: () = assert!(
    128 * (PRODUCER_REGISTERS + CONSUMERS * CONSUMER_REGISTERS) <= 65_536,
    "the warpgroups share one register file"
);
const _: () = assert!(BLOCK_THREADS == 384, "the kernels' launch bounds say 384");

/// The kernel's body, for the token tile of `A` and a ring of `STAGES`.
///
/// # Safety
/// The arguments describe memory as their documentation says; `activations` is a map of int8 `[m, k]` with
/// boxes of [`STAGE_K`] × `A::TOKENS` and 128-byte swizzle.
#[inline(always)]
pub unsafe fn gemm<A: Accumulator, const STAGES: u32>(
    activations: *const TensorMap,
    arguments: &GemmArguments,
) {
    let shape = const { TileShape { tokens: A::TOKENS, stages: STAGES } };
    let shared = Shared::new(shared::dynamic_shared_mem(), shape);
    let thread = thread::thread_idx_x();
    let warp = warp::broadcast(thread / warp::WARP_SIZE);
    let warpgroup = warp / 4;

    if thread == 0 {
        // SAFETY: the map is a parameter; the block barrier below orders the barriers' making.
        unsafe {
            tma::prefetch_map(activations);
            shared.init_barriers();
        }
    }
    thread::sync_threads();

    if warpgroup == CONSUMERS {
        // SAFETY: the whole warpgroup is here.
        unsafe { registers::decrease::<PRODUCER_REGISTERS>() };
        if thread == CONSUMERS * 128 {
            // SAFETY: one thread; the caller vouches for the arguments.
            unsafe { produce::<STAGES>(activations, arguments, shared, shape) };
        }
    } else {
        // SAFETY: the whole warpgroup is here; the caller vouches for the arguments.
        unsafe {
            registers::increase::<CONSUMER_REGISTERS>();
            consume::<A, STAGES>(arguments, shared, shape, warpgroup);
        }
    }
}

/// The producer: keeps the ring full of bricks and activations.
#[inline(always)]
unsafe fn produce<const STAGES: u32>(
    activations: *const TensorMap,
    arguments: &GemmArguments,
    shared: Shared,
    shape: TileShape,
) {
    let schedule = arguments.schedule;
    let mut ring = RingCursor::<STAGES>::start();
    for segment in schedule.segments(thread::block_idx_x()) {
        let position = schedule.position(segment.tile);
        let first_token = position.token_tile * shape.tokens;
        let first_strip = position.channel_tile * CONSUMERS;
        // The last tile may have one strip only: its second consumer then works on what happens to lie there,
        // and stores nothing.
        let strips = (arguments.strips - first_strip).min(CONSUMERS);

        for step in segment.k_begin..segment.k_end {
            let first_block = step * STAGE_BRICKS;
            // Past the last brick the activations are zeros, so stale bricks add nothing.
            let blocks = (arguments.k_blocks - first_block).min(STAGE_BRICKS);
            let bytes = blocks * BRICK_BYTES as u32;
            let stage = ring.stage();
            // SAFETY: the stage is empty once acquired and holds what is copied; the bricks exist.
            unsafe {
                let full =
                    shared.acquire_empty(stage, ring.empty_parity(), shape.activation_bytes() + strips * bytes);
                tma::load_2d(shared.activations(stage), activations, step * STAGE_K, first_token, full);
                let mut strip = 0;
                while strip < strips {
                    let brick = (first_strip + strip) as u64 * arguments.k_blocks as u64 + first_block as u64;
                    let source = arguments.bricks + brick * BRICK_BYTES as u64;
                    tma::load_bulk(shared.bricks(stage, strip), source, bytes, full);
                    strip += 1;
                }
            }
            ring = ring.next();
        }
    }
}

/// A consumer: a 64-channel strip of every tile.
#[inline(always)]
unsafe fn consume<A: Accumulator, const STAGES: u32>(
    arguments: &GemmArguments,
    shared: Shared,
    shape: TileShape,
    consumer: u32,
) {
    let schedule = arguments.schedule;
    let worker = thread::block_idx_x();
    let thread = thread::thread_idx_x() % 128;
    let mut ring = RingCursor::<STAGES>::start();
    for segment in schedule.segments(worker) {
        let mut accumulator = A::zero();
        let position = schedule.position(segment.tile);
        // SAFETY: the caller vouches for the arguments; all threads of the warpgroup go the same way, as
        // every condition depends on the segment alone.
        unsafe {
            let epilogue = Epilogue::prefetch(arguments, shared, shape, position, consumer, thread);
            ring = accumulate(&mut accumulator, ring, segment, shared, consumer, thread);
            if schedule.owns(segment) {
                let first = schedule.first_contributor(worker, segment);
                partials::collect(&mut accumulator, arguments, first..worker, consumer, thread);
                epilogue.store(&mut accumulator);
            } else {
                partials::contribute(&mut accumulator, arguments, worker, consumer, thread);
            }
        }
    }
}

/// The main loop: adds a segment's products to the accumulator and returns the ring's next stage.
///
/// Two bricks a step, each its own wgmma group. While one brick's group runs, the next brick is loaded and
/// dequantized into the other set of registers.
#[inline(always)]
unsafe fn accumulate<A: Accumulator, const STAGES: u32>(
    accumulator: &mut A,
    mut ring: RingCursor<STAGES>,
    segment: Segment,
    shared: Shared,
    consumer: u32,
    thread: u32,
) -> RingCursor<STAGES> {
    let place = SharePlace::of_thread(thread);
    let releases = thread % warp::WARP_SIZE == 0;
    let mut steps = segment.k_end - segment.k_begin;
    let mut unreleased = STAGES;

    // SAFETY: a stage is read between acquiring and releasing it, and released when its last wgmma is done;
    // the caller vouches for the warpgroup.
    unsafe {
        shared.acquire_full(ring.stage(), ring.full_parity());
        let mut share = BrickShare::load(shared.bricks(ring.stage(), consumer), place);
        loop {
            let bricks = shared.bricks(ring.stage(), consumer);
            let tile = wgmma::descriptor(shared.activations(ring.stage()));

            multiply_brick(accumulator, share, tile);
            let second = BrickShare::load(bricks + BRICK_BYTES as u32, place);
            wgmma::wait::<1>();
            // The other lanes' reads of the stage come before the arrival of the one that gives it back.
            warp::sync_warp();
            if releases && unreleased != STAGES {
                shared.release(unreleased);
            }

            multiply_brick(accumulator, second, tile + (BRICK_ROW_BYTES >> 4));
            unreleased = ring.stage();
            ring = ring.next();
            steps -= 1;
            if steps == 0 {
                break;
            }
            shared.acquire_full(ring.stage(), ring.full_parity());
            share = BrickShare::load(shared.bricks(ring.stage(), consumer), place);
            wgmma::wait::<1>();
        }
        wgmma::wait::<0>();
        warp::sync_warp();
        if releases {
            shared.release(unreleased);
        }
    }
    ring
}

/// Bytes of an activation row that one brick spans.
const BRICK_ROW_BYTES: u64 = (STAGE_K / STAGE_BRICKS) as u64;

/// Dequantizes a brick and issues its two MMAs as one group.
#[inline(always)]
unsafe fn multiply_brick<A: Accumulator>(accumulator: &mut A, share: BrickShare, tile: u64) {
    let [first, second] = share.dequantize();
    // SAFETY: the caller waits before it touches the accumulator or reuses the operands' registers.
    unsafe {
        wgmma::fence();
        accumulator.multiply_accumulate(first, tile);
        accumulator.multiply_accumulate(second, tile + (BRICK_ROW_BYTES >> 5));
        wgmma::commit();
    }
}
