//! Speed-of-light probes: one kernel only reads memory, one only issues wgmmas.
//!
//! The bench times them beside the GEMM; the host twin is `crates/bench/src/probes.rs`.
//! Both sides take sizes from `liquidgemm_format::probe`.

use cuda_std::{shared, thread, warp};
use liquidgemm_format::probe::{MMA_TILE_BYTES, STREAM_PIECE_BYTES, STREAM_STAGES};
use liquidgemm_format::ring::RingCursor;

use crate::ptx::memory::{store_global, store_shared};
use crate::ptx::wgmma::{Accumulator, Accumulator256, FragmentVisitor};
use crate::ptx::{mbarrier, tma, wgmma};

/// Loads `pieces` pieces of [`STREAM_PIECE_BYTES`] into shared memory by bulk copies, and drops them.
///
/// The thread blocks of the grid take pieces round robin.
/// Each keeps up to [`STREAM_STAGES`] copies in flight.
///
/// # Safety
/// As many bytes are valid at `source`, which is 16-byte aligned. A thread block has one warp.
#[inline(always)]
pub unsafe fn stream(source: u64, pieces: u32) {
    let base = shared::dynamic_shared_mem();
    let barriers = base + STREAM_STAGES * STREAM_PIECE_BYTES;
    // SAFETY: barriers and stages lie in the thread block's shared memory; the caller guarantees the source.
    unsafe {
        let mut stage = 0;
        while stage < STREAM_STAGES && thread::thread_idx_x() == 0 {
            mbarrier::init(barriers + stage * 8, 1);
            stage += 1;
        }
        mbarrier::fence_init();
        warp::sync_warp();

        let policy = tma::Policy::evict_first();
        let pull = |ring: RingCursor<STREAM_STAGES>, piece: u32| {
            let barrier = barriers + ring.stage() * 8;
            mbarrier::arrive_expect(barrier, STREAM_PIECE_BYTES);
            let from = source + piece as u64 * STREAM_PIECE_BYTES as u64;
            tma::load_bulk(
                base + ring.stage() * STREAM_PIECE_BYTES,
                from,
                STREAM_PIECE_BYTES,
                barrier,
                policy,
            );
        };
        let blocks = thread::grid_dim_x();
        let mut filled = RingCursor::start();
        let mut next = thread::block_idx_x();
        let mut in_flight = 0;
        while in_flight < STREAM_STAGES && next < pieces {
            pull(filled, next);
            filled = filled.next();
            next += blocks;
            in_flight += 1;
        }
        let mut drained = RingCursor::<STREAM_STAGES>::start();
        while in_flight > 0 {
            mbarrier::wait(barriers + drained.stage() * 8, drained.full_parity());
            drained = drained.next();
            if next < pieces {
                pull(filled, next);
                filled = filled.next();
                next += blocks;
            } else {
                in_flight -= 1;
            }
        }
    }
}

/// Issues `rounds` × 4 wgmmas m64n256k32 per warpgroup on pseudo-random operands.
///
/// `rounds` is at least 1. Each thread stores the XOR of its sums, so that the compiler keeps the products.
///
/// # Safety
/// `sink` is an array of one u32 for each thread of the grid. A thread block has two warpgroups.
#[inline(always)]
pub unsafe fn mma(sink: u64, rounds: u32) {
    let base = shared::dynamic_shared_mem();
    let thread = thread::thread_idx_x();
    let random = |index: u32| {
        let mixed = (index ^ 0x9E37_79B9).wrapping_mul(0x85EB_CA6B);
        (mixed ^ (mixed >> 13)).wrapping_mul(0xC2B2_AE35)
    };
    let mut offset = thread * 4;
    while offset < MMA_TILE_BYTES {
        // SAFETY: the address is inside the thread block's shared memory.
        unsafe { store_shared(base + offset, random(offset)) };
        offset += 256 * 4;
    }
    // SAFETY: the fence orders the stores above before the tensor cores' reads.
    unsafe { mbarrier::fence_async() };
    thread::sync_threads();

    let operand = |set: u32| [0, 1, 2, 3].map(|i| random(thread * 16 + set * 4 + i));
    let operands = [operand(0), operand(1), operand(2), operand(3)];
    let tile = wgmma::descriptor(base);
    let mut accumulator = Accumulator256::zero();
    let mut round = 0;
    // SAFETY: whole warpgroups execute this, and no operand changes while wgmmas run.
    unsafe {
        loop {
            wgmma::fence();
            accumulator.multiply_accumulate_along(operands, tile, true);
            wgmma::commit();
            round += 1;
            if round >= rounds {
                break;
            }
            wgmma::wait::<1>();
        }
        wgmma::wait::<0>();
    }
    let mut mix = Mix(0);
    accumulator.visit(&mut mix);
    let index = thread::block_idx_x() as u64 * 256 + thread as u64;
    // SAFETY: `sink` has an element for each thread.
    unsafe { store_global(sink + index * 4, mix.0 as u32) };
}

/// The XOR of a thread's sums, stored so that the compiler keeps the products.
struct Mix(i32);

impl FragmentVisitor for Mix {
    #[inline(always)]
    fn fragment(&mut self, _: u32, sums: &mut [i32; 4]) {
        self.0 ^= sums[0] ^ sums[1] ^ sums[2] ^ sums[3];
    }
}
