//! The table of experts in shared memory, and the search for a cluster's tiles in it.
//!
//! For each expert the table has the number of token tiles up to its last one.
//! Each warp adds up those of 32 experts at a time;
//! with more than 32 experts, a second pass adds those of the experts before.

use cuda_std::{cluster, thread, warp};
use liquidgemm_format::arguments::GroupedArguments;
use liquidgemm_format::grouped::{CHUNK_EXPERTS, MAX_EXPERTS, Turns, status, tile_rows, token_tiles};

use crate::ptx::memory::{load_global_if, load_shared, store_global, store_shared};
use crate::shape::Shape;

const _: () = assert!(CHUNK_EXPERTS == warp::WARP_SIZE, "one expert for each lane");

/// A filled table of experts.
#[derive(Clone, Copy)]
pub(super) struct ExpertTable {
    /// Its address in shared memory: token tiles up to each expert's last one, then those of each chunk of experts.
    address: u32,
    /// The token tiles of all experts.
    total: u32,
}

/// Loads the entries of `expert` in the index: its own and, if the rows are contiguous, the next.
/// They are zeros if there is no such expert.
///
/// # Safety
/// The arguments' index is valid.
#[inline(always)]
unsafe fn load_index(arguments: &GroupedArguments, expert: u32) -> [u32; 2] {
    let layout = arguments.schedule.layout;
    let exists = expert < layout.experts;
    let address = arguments.index + expert as u64 * 4;
    // SAFETY: the index has an entry for each expert, and one more if the rows are contiguous.
    unsafe { [load_global_if(exists, address), load_global_if(exists && !layout.is_masked(), address + 4)] }
}

impl ExpertTable {
    /// Fills the table at `address` from the offsets or counts, and writes the launch's status.
    ///
    /// `warp` is the warp's index in its thread block. All of the thread block's earlier writes
    /// to shared memory are visible to all of its threads afterwards.
    ///
    /// # Safety
    /// The whole thread block calls it. The arguments are valid, and the table has room at `address`.
    #[inline(always)]
    pub(super) unsafe fn fill<S: Shape>(address: u32, arguments: &GroupedArguments, warp: u32) -> Self {
        let warps = S::SHAPE.threads() / warp::WARP_SIZE;
        let lane = warp::lane_id();
        let schedule = &arguments.schedule;
        let experts = schedule.layout.experts;
        let totals = address + MAX_EXPERTS * 4;
        let place = |chunk: u32| address + (chunk * CHUNK_EXPERTS + lane) * 4;
        let mut is_limited = false;
        let mut chunk = warp;
        while chunk * CHUNK_EXPERTS < experts {
            // SAFETY: the caller guarantees the index; the table has room for whole chunks.
            unsafe {
                let expert = chunk * CHUNK_EXPERTS + lane;
                let [first, second] = load_index(arguments, expert);
                let rows = schedule.layout.rows_of(expert, first.cast_signed(), second.cast_signed());
                is_limited |= !rows.is_valid;
                let end = warp::inclusive_sum(token_tiles(rows.end - rows.begin, S::SHAPE.tokens));
                store_shared(place(chunk), end);
                // All lanes store the same number.
                store_shared(totals + chunk * 4, warp::broadcast_from(end, warp::WARP_SIZE - 1));
            }
            chunk += warps;
        }
        let is_limited = thread::sync_threads_or(is_limited);
        if arguments.status != 0
            && cluster::cluster_idx_x() + cluster::block_rank() + thread::thread_idx_x() == 0
        {
            let value = if is_limited { status::LIMITED } else { status::VALID };
            // SAFETY: the caller guarantees the status word.
            unsafe { store_global(arguments.status, value) };
        }
        if experts > CHUNK_EXPERTS {
            let mut chunk = warp;
            while chunk * CHUNK_EXPERTS < experts {
                // SAFETY: the chunk and the totals of those before it were stored before the barrier.
                unsafe {
                    let total = if lane < chunk { load_shared(totals + lane * 4) } else { 0 };
                    let before = warp::broadcast_from(warp::inclusive_sum(total), warp::WARP_SIZE - 1);
                    store_shared(place(chunk), load_shared(place(chunk)) + before);
                }
                chunk += warps;
            }
            thread::sync_threads();
        }
        // SAFETY: there is at least one expert, and its entry was stored before the barrier.
        let total = unsafe { load_shared(address + (experts - 1) * 4) };
        Self { address, total: warp::broadcast(total) }
    }
}

/// A tile of an expert. All values are the same for all lanes of a warp.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    pub(super) expert: u32,
    /// Position along the expert's channels, in tiles of a cluster.
    pub(super) channel_tile: u32,
    /// The tile's first row.
    pub(super) first_row: u32,
    /// One past the tile's last row, which is behind `first_row`.
    pub(super) end_row: u32,
}

impl Tile {
    /// Returns the number of the tile's rows, from 1 to the tokens of its shape.
    #[inline(always)]
    pub(super) fn rows(self) -> u32 {
        self.end_row - self.first_row
    }
}

/// A tile whose expert's entries in the index are still being loaded.
///
/// A consumer finds its next tile before the main loop of this one, and needs it afterwards.
#[derive(Clone, Copy)]
pub(super) struct FoundTile {
    expert: u32,
    /// The tile's number among the tiles of the expert.
    tile: u32,
    index: [u32; 2],
}

impl FoundTile {
    /// Returns the tile, once its expert's entries have been loaded.
    #[inline(always)]
    pub(super) fn tile<S: Shape>(self, arguments: &GroupedArguments) -> Tile {
        let schedule = &arguments.schedule;
        let [first, second] = self.index;
        let rows = schedule.layout.rows_of(self.expert, first.cast_signed(), second.cast_signed());
        let count = rows.end - rows.begin;
        let tiles = token_tiles(count, S::SHAPE.tokens);
        let position = schedule.position(self.tile, tiles);
        let (first, end) = tile_rows(count, tiles, position.token_tile);
        Tile {
            expert: self.expert,
            channel_tile: warp::broadcast(position.channel_tile),
            first_row: warp::broadcast(rows.begin + first),
            end_row: warp::broadcast(rows.begin + end),
        }
    }
}

impl ExpertTable {
    /// Returns the number of tiles up to the last one of `expert`.
    ///
    /// The table has whole chunks of experts.
    #[inline(always)]
    fn end(self, arguments: &GroupedArguments, expert: u32) -> u32 {
        // SAFETY: the expert's chunk was stored before the last barrier.
        let token_tiles = unsafe { load_shared(self.address + expert * 4) };
        token_tiles * arguments.schedule.channel_tiles
    }
}

/// A warp's way through the tiles of its cluster.
#[derive(Clone, Copy)]
pub(super) struct Tiles<'a> {
    arguments: &'a GroupedArguments,
    table: ExpertTable,
    turns: Turns,
    /// The first expert of the chunk in which the search for the next tile begins.
    chunk: u32,
}

impl<'a> Tiles<'a> {
    /// Returns the tiles of cluster `cluster`.
    #[inline(always)]
    pub(super) fn new(arguments: &'a GroupedArguments, table: ExpertTable, cluster: u32) -> Self {
        Self { arguments, table, turns: arguments.schedule.turns(cluster), chunk: 0 }
    }

    /// Finds the cluster's next tile, and begins to load its expert's rows.
    ///
    /// The tiles ascend, so the search for the expert goes on where the last one ended.
    ///
    /// # Safety
    /// A whole warp calls it, converged; the arguments' index is valid.
    #[inline(always)]
    pub(super) unsafe fn find(&mut self) -> Option<FoundTile> {
        let (arguments, table) = (self.arguments, self.table);
        let tile = warp::broadcast(self.turns.next());
        if tile >= table.total * arguments.schedule.channel_tiles {
            return None;
        }
        let mut passed = self.passed(tile);
        while passed == CHUNK_EXPERTS && self.chunk + CHUNK_EXPERTS < arguments.schedule.layout.experts {
            self.chunk += CHUNK_EXPERTS;
            passed = self.passed(tile);
        }
        let expert = warp::broadcast(self.chunk + passed);
        let begin = if expert == 0 { 0 } else { table.end(arguments, expert - 1) };
        // SAFETY: the caller guarantees the index.
        let index = unsafe { load_index(arguments, expert) };
        Some(FoundTile { expert, tile: tile - begin, index })
    }

    /// Returns how many experts of the chunk end at or before `tile`.
    #[inline(always)]
    fn passed(&self, tile: u32) -> u32 {
        let end = self.table.end(self.arguments, self.chunk + warp::lane_id());
        warp::ballot(end <= tile).count_ones()
    }

    /// Returns the cluster's next tile.
    ///
    /// # Safety
    /// As for [`find`](Self::find).
    #[inline(always)]
    pub(super) unsafe fn next<S: Shape>(&mut self) -> Option<Tile> {
        // SAFETY: the caller guarantees the same.
        match unsafe { self.find() } {
            Some(found) => Some(found.tile::<S>(self.arguments)),
            None => None,
        }
    }
}
