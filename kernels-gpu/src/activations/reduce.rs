//! Sums and maxima over a row, by the thread block or the cluster that has it.
//!
//! Sums follow the order that `liquidgemm_format::activations` fixes:
//! a warp adds up its 32 vectors, the thread block its warps, and the cluster its pieces.

use cuda_std::{cluster, shared, thread, warp};
use liquidgemm_format::activations::{
    CLUSTER, EXCHANGE_BYTES, GROUP_SUMS_BYTES, LANES, MAX_GROUPS, PIECE, WARP_MAXIMA_BYTES,
};

use crate::ptx::memory::{load_shared, load_shared_f32x2, load_shared_x4, store_remote, store_shared};

/// Warps of a piece.
const PIECE_WARPS: u32 = PIECE / warp::WARP_SIZE;
/// Pieces of the longest row whose threads hold a vector each.
const PIECES: u32 = LANES as u32 / PIECE;

const _: () = assert!(PIECE_WARPS == 8 && PIECES == 16 && CLUSTER == 4 && MAX_GROUPS == 64);

/// A thread's place among those that reduce rows.
#[derive(Clone, Copy)]
pub struct Reduction<const BLOCKS: u32> {
    /// The thread's warp.
    pub warp: u32,
    /// Warps of the thread block.
    pub warps: u32,
    /// The thread's lane.
    pub lane: u32,
    /// The thread block's shared memory.
    pub shared: u32,
    /// Which of two sets of shared memory the row uses: 0 and 1 for rows in turn.
    parity: u32,
}

impl<const BLOCKS: u32> Reduction<BLOCKS> {
    /// Returns the place of the calling thread, for the first row.
    #[inline(always)]
    pub fn of_thread() -> Self {
        let thread = thread::thread_idx_x();
        Self {
            warp: warp::broadcast(thread / warp::WARP_SIZE),
            warps: thread::block_dim_x() / warp::WARP_SIZE,
            lane: thread % warp::WARP_SIZE,
            shared: warp::broadcast(shared::dynamic_shared_mem()),
            parity: 0,
        }
    }

    /// Goes on to the thread block's next row.
    #[inline(always)]
    pub fn next_row(&mut self) {
        self.parity ^= 1;
    }

    /// Returns the address of the groups' sums, for the row's sum `number`.
    #[inline(always)]
    fn group_sums(self, number: u32) -> u32 {
        self.shared + number * (GROUP_SUMS_BYTES / 2)
    }

    /// Returns the address of the warps' maxima.
    #[inline(always)]
    fn warp_maxima(self) -> u32 {
        self.shared + GROUP_SUMS_BYTES + self.parity * (WARP_MAXIMA_BYTES / 2)
    }

    /// Returns the address of the words that the cluster exchanges, in its exchange `number` for the row.
    #[inline(always)]
    fn exchange(self, number: u32) -> u32 {
        let exchanges = self.shared + GROUP_SUMS_BYTES + WARP_MAXIMA_BYTES;
        exchanges + self.parity * (EXCHANGE_BYTES / 2) + number * PIECES * 4
    }

    /// Takes each lane's part of the sum of the thread block's group `group`.
    ///
    /// A part is the sum of a vector, or of two neighbours.
    ///
    /// # Safety
    /// The whole warp calls it. `number` is 0 or 1.
    #[inline(always)]
    pub unsafe fn give_sum(self, number: u32, group: u32, sum: f32) {
        let sum = tree::<16>(tree::<8>(tree::<4>(tree::<2>(tree::<1>(sum)))));
        if self.lane == 0 {
            // SAFETY: the word lies in the thread block's shared memory.
            unsafe { store_shared(self.group_sums(number) + group * 4, sum.to_bits()) }
        }
    }

    /// Returns the row's sum, of which the thread block has given `groups` groups.
    ///
    /// # Safety
    /// All threads of the cluster call it, once for each row and number.
    #[inline(always)]
    pub unsafe fn sum(self, number: u32, groups: u32) -> f32 {
        thread::sync_threads();
        let (lane, sums) = (self.lane, self.group_sums(number));
        // SAFETY: the words lie in the thread block's shared memory.
        // The thread blocks of the cluster run until all of them have come past the barrier.
        unsafe {
            if const { BLOCKS == 1 } {
                let [first, second] = load_shared_f32x2(sums + lane * 8);
                let first = if lane * 2 < groups { first } else { 0.0 };
                let second = if lane * 2 + 1 < groups { second } else { 0.0 };
                let sum = first + second;
                return tree::<16>(tree::<8>(tree::<4>(tree::<2>(tree::<1>(sum)))));
            }
            let of_group = if lane < groups { f32::from_bits(load_shared(sums + lane * 4)) } else { 0.0 };
            let of_piece = tree::<4>(tree::<2>(tree::<1>(of_group)));
            // Lane l has the sum of the thread block's piece l / 8. Warps 0 to 3 tell one thread block each.
            if self.warp < BLOCKS && lane.is_multiple_of(PIECE_WARPS) {
                let piece = lane / PIECE_WARPS * BLOCKS + cluster::block_rank();
                store_remote(self.exchange(number) + piece * 4, of_piece.to_bits(), self.warp);
            }
            cluster::sync_cluster();
            let of_piece = f32::from_bits(load_shared(self.exchange(number) + lane % PIECES * 4));
            tree::<8>(tree::<4>(tree::<2>(tree::<1>(of_piece))))
        }
    }

    /// Returns the largest `value` of all threads that have the row.
    ///
    /// # Safety
    /// All threads of the cluster call it, once for each row.
    #[inline(always)]
    pub unsafe fn max(self, value: u32) -> u32 {
        // SAFETY: the words lie in the thread block's shared memory.
        // The thread blocks of the cluster run until all of them have come past the barrier.
        unsafe {
            let of_warp = warp::reduce_max(value);
            if self.lane == 0 {
                store_shared(self.warp_maxima() + self.warp * 4, of_warp);
            }
            thread::sync_threads();
            let of_warp =
                if self.lane < self.warps { load_shared(self.warp_maxima() + self.lane * 4) } else { 0 };
            let of_block = warp::reduce_max(of_warp);
            if const { BLOCKS == 1 } {
                return of_block;
            }
            if self.warp == 0 && self.lane < BLOCKS {
                store_remote(self.exchange(2) + cluster::block_rank() * 4, of_block, self.lane);
            }
            cluster::sync_cluster();
            let [a, b, c, d] = load_shared_x4(self.exchange(2));
            a.max(b).max(c.max(d))
        }
    }
}

/// Adds the value of the lane whose number differs in the bits of `MASK`.
#[inline(always)]
fn tree<const MASK: u32>(value: f32) -> f32 {
    value + warp::shuffle_xor::<MASK>(value)
}
