//! Speed-of-light probes: what the memory and the tensor cores give to a kernel that does nothing else.
//!
//! The bench measures them beside the GEMM; the host twin is `host/src/gpu/probes.rs`.

use cuda_std::{shared, thread, warp};
use liquidgemm_format::probe::{MMA_TILE_BYTES, STREAM_PIECE_BYTES, STREAM_STAGES};
use liquidgemm_format::ring::RingCursor;

use crate::ptx::memory::{store_global, store_shared};
use crate::ptx::wgmma::{Accumulator, Accumulator256, BlockVisitor};
use crate::ptx::{mbarrier, tma, wgmma};

/// Pulls `pieces` pieces of memory through shared memory and drops them.
///
/// # Safety
/// As many bytes are valid at `source`, 16-byte aligned. A block is one warp.
#[inline(always)]
pub unsafe fn stream(source: u64, pieces: u32) {
    let base = shared::dynamic_shared_mem();
    let barriers = base + STREAM_STAGES * STREAM_PIECE_BYTES;
    // SAFETY: barriers and stages lie in the block's shared memory; the caller vouches for the source.
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

/// Issues `rounds` (at least one) × 4 wgmmas m64n256k32 a warpgroup, on pseudo-random operands, and nothing else.
///
/// # Safety
/// A u32 for every thread of the grid is valid at `sink`; the block has two warpgroups.
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
        // SAFETY: inside the block's shared memory.
        unsafe { store_shared(base + offset, random(offset)) };
        offset += 256 * 4;
    }
    // SAFETY: orders the stores above before the tensor cores' reads.
    unsafe { mbarrier::fence_async() };
    thread::sync_threads();

    let operand = |set: u32| [0, 1, 2, 3].map(|i| random(thread * 16 + set * 4 + i));
    let operands = [operand(0), operand(1), operand(2), operand(3)];
    let tile = wgmma::descriptor(base);
    let mut accumulator = Accumulator256::zero();
    let mut round = 0;
    // SAFETY: whole warpgroups; the operands are not touched while wgmmas run.
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
    // SAFETY: one element a thread.
    unsafe { store_global(sink + index * 4, mix.0 as u32) };
}

/// Keeps the compiler from dropping the sums.
struct Mix(i32);

impl BlockVisitor for Mix {
    #[inline(always)]
    fn block(&mut self, _: u32, block: &mut [i32; 4]) {
        self.0 ^= block[0] ^ block[1] ^ block[2] ^ block[3];
    }
}
