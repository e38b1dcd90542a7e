//! Sums and maxima over a row, by the thread block or the cluster that has it.
//!
//! Sums follow the order that `liquidgemm_format::activations` fixes:
//! a warp adds up its 32 vectors, the thread block its warps, and the cluster its pieces.

use cuda_std::{cluster, shared, thread, warp};
use liquidgemm_format::activations::{
    CLUSTER, EXCHANGE_BYTES, GROUP_SUMS_BYTES, LANES, MAX_GROUPS, PIECE, WARP_MAXIMA_BYTES,
};

use crate::ptx::memory::{load_shared, load_shared_f32x2, store_remote, store_shared};

/// Warps of a piece.
const PIECE_WARPS: u32 = PIECE / warp::WARP_SIZE;
/// Pieces of the longest row whose threads hold a vector each.
const PIECES: u32 = LANES as u32 / PIECE;

const _: () = assert!(PIECE_WARPS == 8 && PIECES == 16 && CLUSTER == 8 && MAX_GROUPS == 64);

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

    /// Returns the number of the sum for rows that have only one: 0 and 1 in turn.
    #[inline(always)]
    pub fn only_sum(self) -> u32 {
        self.parity
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
    pub unsafe fn give_sum(self, number: u32, group: u32, part: f32) {
        let sum = tree::<16>(tree::<8>(tree::<4>(tree::<2>(tree::<1>(part)))));
        if self.lane == 0 {
            // SAFETY: the word lies in the thread block's shared memory.
            unsafe { store_shared(self.group_sums(number) + group * 4, sum.to_bits()) }
        }
    }

    /// Takes each lane's parts of the sums of two groups, of which the second may not exist.
    ///
    /// # Safety
    /// As for [`give_sum`](Self::give_sum).
    #[inline(always)]
    pub unsafe fn give_sums(self, number: u32, groups: [u32; 2], second_exists: bool, parts: [f32; 2]) {
        // Even lanes go on with the first sum, odd ones with the second.
        let is_odd = self.lane % 2 == 1;
        let (own, other) = if is_odd { (parts[1], parts[0]) } else { (parts[0], parts[1]) };
        let sum = own + warp::shuffle_xor::<1>(other);
        let sum = tree::<16>(tree::<8>(tree::<4>(tree::<2>(sum))));
        let group = if is_odd { groups[1] } else { groups[0] };
        if self.lane < 2 && (second_exists || !is_odd) {
            // SAFETY: the word lies in the thread block's shared memory.
            unsafe { store_shared(self.group_sums(number) + group * 4, sum.to_bits()) }
        }
    }

    /// Takes each thread's `value` for the largest one.
    ///
    /// # Safety
    /// The whole warp calls it.
    #[inline(always)]
    unsafe fn give_max(self, value: u32) {
        let of_warp = warp::reduce_max(value);
        if self.lane == 0 {
            // SAFETY: the word lies in the thread block's shared memory.
            unsafe { store_shared(self.warp_maxima() + self.warp * 4, of_warp) }
        }
    }

    /// Returns the row's sum, of which the thread block has given `groups` groups.
    ///
    /// # Safety
    /// All threads of the cluster call it, once for each row and number.
    #[inline(always)]
    pub unsafe fn sum(self, number: u32, groups: u32) -> f32 {
        thread::sync_threads();
        // SAFETY: the caller guarantees the threads.
        unsafe {
            let sum = self.sum_of_block(number, groups);
            if const { BLOCKS == 1 } {
                return sum;
            }
            cluster::sync_cluster();
            self.sum_of_cluster(number)
        }
    }

    /// Returns the largest `value` of all threads that have the row.
    ///
    /// # Safety
    /// All threads of the cluster call it, once for each row.
    #[inline(always)]
    pub unsafe fn max(self, value: u32) -> u32 {
        // SAFETY: the caller guarantees the threads.
        unsafe {
            self.give_max(value);
            thread::sync_threads();
            let max = self.max_of_block();
            if const { BLOCKS == 1 } {
                return max;
            }
            cluster::sync_cluster();
            self.max_of_cluster()
        }
    }

    /// Returns the row's [sum](Self::sum) and its [largest value](Self::max).
    ///
    /// # Safety
    /// All threads of the cluster call it, once for each row, instead of both.
    #[inline(always)]
    pub unsafe fn sum_and_max(self, number: u32, groups: u32, value: u32) -> (f32, u32) {
        // SAFETY: the caller guarantees the threads.
        unsafe {
            self.give_max(value);
            thread::sync_threads();
            let sum = self.sum_of_block(number, groups);
            let max = self.max_of_block();
            if const { BLOCKS == 1 } {
                return (sum, max);
            }
            cluster::sync_cluster();
            (self.sum_of_cluster(number), self.max_of_cluster())
        }
    }

    /// Returns the thread block's sum, or tells the cluster's thread blocks the sums of its pieces.
    ///
    /// # Safety
    /// All threads of the thread block call it after the barrier that follows their parts.
    /// The thread blocks of the cluster run until all of them have come past the cluster's next barrier.
    #[inline(always)]
    unsafe fn sum_of_block(self, number: u32, groups: u32) -> f32 {
        let (lane, sums) = (self.lane, self.group_sums(number));
        // SAFETY: the words lie in the shared memory of the cluster's thread blocks.
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
            // Lane l has the sum of the thread block's piece l / 8. Warps 0 to 7 tell one thread block each.
            if self.warp < BLOCKS && lane < groups && lane.is_multiple_of(PIECE_WARPS) {
                let piece = lane / PIECE_WARPS * BLOCKS + cluster::block_rank();
                store_remote(self.exchange(number) + piece * 4, of_piece.to_bits(), self.warp);
            }
            of_piece
        }
    }

    /// Returns the cluster's sum.
    ///
    /// # Safety
    /// A whole warp calls it after the barrier that follows [`sum_of_block`](Self::sum_of_block).
    #[inline(always)]
    unsafe fn sum_of_cluster(self, number: u32) -> f32 {
        // SAFETY: the word lies in the thread block's shared memory.
        let of_piece = unsafe { load_shared(self.exchange(number) + self.lane % PIECES * 4) };
        tree::<8>(tree::<4>(tree::<2>(tree::<1>(f32::from_bits(of_piece)))))
    }

    /// Returns the thread block's largest value, and tells it the cluster's thread blocks.
    ///
    /// # Safety
    /// As for [`sum_of_block`](Self::sum_of_block).
    #[inline(always)]
    unsafe fn max_of_block(self) -> u32 {
        // SAFETY: the words lie in the shared memory of the cluster's thread blocks.
        unsafe {
            let of_warp =
                if self.lane < self.warps { load_shared(self.warp_maxima() + self.lane * 4) } else { 0 };
            let of_block = warp::reduce_max(of_warp);
            if BLOCKS > 1 && self.warp == 0 && self.lane < BLOCKS {
                store_remote(self.exchange(2) + cluster::block_rank() * 4, of_block, self.lane);
            }
            of_block
        }
    }

    /// Returns the cluster's largest value.
    ///
    /// # Safety
    /// A whole warp calls it after the barrier that follows [`max_of_block`](Self::max_of_block).
    #[inline(always)]
    unsafe fn max_of_cluster(self) -> u32 {
        // SAFETY: the words lie in the thread block's shared memory.
        let of_block = unsafe { load_shared(self.exchange(2) + self.lane % CLUSTER * 4) };
        warp::reduce_max(of_block)
    }
}

/// Adds the value of the lane whose number differs in the bits of `MASK`.
#[inline(always)]
fn tree<const MASK: u32>(value: f32) -> f32 {
    value + warp::shuffle_xor::<MASK>(value)
}
