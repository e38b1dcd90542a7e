//! The table of experts in shared memory, and the search for a cluster's tiles in it.
//!
//! For each expert the table has the numbers of whole and of partial token tiles up to its last one.
//! Each warp adds up those of 32 experts at a time;
//! with more than 32 experts, a second pass adds those of the experts before.

use cuda_std::{cluster, thread, warp};
use liquidgemm_format::arguments::GroupedArguments;
use liquidgemm_format::grouped::{CHUNK_EXPERTS, MAX_EXPERTS, TokenTiles, Turns, status};
use liquidgemm_format::schedule::TilePosition;

use crate::ptx::memory::{load_global_if, load_shared, store_global, store_shared};
use crate::shape::Shape;

const _: () = assert!(CHUNK_EXPERTS == warp::WARP_SIZE, "one expert for each lane");

/// A filled table of experts.
#[derive(Clone, Copy)]
pub(super) struct ExpertTable {
    /// Its address in shared memory: [`TokenTiles`] for each expert, then for each chunk of experts.
    address: u32,
    /// The token tiles of all experts.
    totals: TokenTiles,
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
                let tiles = TokenTiles::of_rows(rows.end - rows.begin, S::SHAPE.tokens);
                let end = warp::inclusive_sum(tiles.0);
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
        let totals = unsafe { load_shared(address + (experts - 1) * 4) };
        Self { address, totals: TokenTiles(warp::broadcast(totals)) }
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
    /// One past the expert's last row, which is behind `first_row`.
    pub(super) end_row: u32,
}

impl Tile {
    /// Returns the number of the tile's rows, from 1 to the tokens of `S`.
    #[inline(always)]
    pub(super) fn rows<S: Shape>(self) -> u32 {
        (self.end_row - self.first_row).min(S::SHAPE.tokens)
    }
}

/// A tile whose expert's entries in the index are still being loaded.
///
/// A consumer finds its next tile before the main loop of this one, and needs it afterwards.
#[derive(Clone, Copy)]
pub(super) struct FoundTile {
    expert: u32,
    /// The tile's number among the tiles of its kind of the expert.
    tile: u32,
    /// Whether it has fewer rows than a whole tile.
    is_partial: bool,
    index: [u32; 2],
}

impl FoundTile {
    /// Returns the tile, once its expert's entries have been loaded.
    #[inline(always)]
    pub(super) fn tile<S: Shape>(self, arguments: &GroupedArguments) -> Tile {
        let schedule = &arguments.schedule;
        let [first, second] = self.index;
        let rows = schedule.layout.rows_of(self.expert, first.cast_signed(), second.cast_signed());
        let whole = TokenTiles::of_rows(rows.end - rows.begin, S::SHAPE.tokens).count(false);
        let position = if self.is_partial {
            TilePosition { channel_tile: self.tile, token_tile: whole }
        } else {
            schedule.position(self.tile, whole)
        };
        Tile {
            expert: self.expert,
            channel_tile: warp::broadcast(position.channel_tile),
            first_row: warp::broadcast(rows.begin + position.token_tile * S::SHAPE.tokens),
            end_row: warp::broadcast(rows.end),
        }
    }
}

/// A way through the tiles of one kind, whole or partial, of a cluster.
#[derive(Clone, Copy)]
struct Cursor<const PARTIAL: bool> {
    turns: Turns,
    /// The first expert of the chunk in which the search for the next tile begins.
    chunk: u32,
    /// The expert of the next tile, or `u32::MAX` if there is none.
    expert: u32,
    /// The number of the next tile among the tiles of its kind of all experts.
    tile: u32,
}

impl<const PARTIAL: bool> Cursor<PARTIAL> {
    /// Returns the way of cluster `cluster`, at its first tile.
    #[inline(always)]
    fn new(arguments: &GroupedArguments, table: ExpertTable, cluster: u32) -> Self {
        let turns = arguments.schedule.turns_from(cluster, Self::first(arguments, table));
        let mut cursor = Self { turns, chunk: 0, expert: 0, tile: 0 };
        cursor.advance(arguments, table);
        cursor
    }

    /// Returns the first turn of the kind. The turns of partial tiles follow those of whole ones.
    #[inline(always)]
    fn first(arguments: &GroupedArguments, table: ExpertTable) -> u32 {
        if PARTIAL { table.totals.count(false) * arguments.schedule.channel_tiles } else { 0 }
    }

    /// Goes on to the cluster's next tile.
    ///
    /// The tiles ascend, so the search for the expert goes on where the last one ended.
    #[inline(always)]
    fn advance(&mut self, arguments: &GroupedArguments, table: ExpertTable) {
        let schedule = &arguments.schedule;
        self.tile = warp::broadcast(self.turns.next() - Self::first(arguments, table));
        if self.tile >= table.totals.count(PARTIAL) * schedule.channel_tiles {
            self.expert = u32::MAX;
            return;
        }
        let mut passed = self.passed(arguments, table);
        while passed == CHUNK_EXPERTS && self.chunk + CHUNK_EXPERTS < schedule.layout.experts {
            self.chunk += CHUNK_EXPERTS;
            passed = self.passed(arguments, table);
        }
        self.expert = warp::broadcast(self.chunk + passed);
    }

    /// Returns how many experts of the chunk end at or before the tile.
    #[inline(always)]
    fn passed(&self, arguments: &GroupedArguments, table: ExpertTable) -> u32 {
        let end = table.end::<PARTIAL>(arguments, self.chunk + warp::lane_id());
        warp::ballot(end <= self.tile).count_ones()
    }

    /// Returns the next tile, and begins to load its expert's rows.
    ///
    /// # Safety
    /// There is a next tile; the arguments' index is valid.
    #[inline(always)]
    unsafe fn found(&self, arguments: &GroupedArguments, table: ExpertTable) -> FoundTile {
        let begin = if self.expert == 0 { 0 } else { table.end::<PARTIAL>(arguments, self.expert - 1) };
        FoundTile {
            expert: self.expert,
            tile: self.tile - begin,
            is_partial: PARTIAL,
            // SAFETY: the caller guarantees the index.
            index: unsafe { load_index(arguments, self.expert) },
        }
    }
}

impl ExpertTable {
    /// Returns the number of tiles of a kind up to the last one of `expert`.
    ///
    /// The table has whole chunks of experts.
    #[inline(always)]
    fn end<const PARTIAL: bool>(self, arguments: &GroupedArguments, expert: u32) -> u32 {
        // SAFETY: the expert's chunk was stored before the last barrier.
        let tiles = TokenTiles(unsafe { load_shared(self.address + expert * 4) });
        tiles.count(PARTIAL) * arguments.schedule.channel_tiles
    }
}

/// A warp's way through the tiles of its cluster.
#[derive(Clone, Copy)]
pub(super) struct Tiles<'a> {
    arguments: &'a GroupedArguments,
    table: ExpertTable,
    whole: Cursor<false>,
    partial: Cursor<true>,
}

impl<'a> Tiles<'a> {
    /// Returns the tiles of cluster `cluster`. A whole warp calls it, converged.
    #[inline(always)]
    pub(super) fn new(arguments: &'a GroupedArguments, table: ExpertTable, cluster: u32) -> Self {
        Self {
            arguments,
            table,
            whole: Cursor::new(arguments, table, cluster),
            partial: Cursor::new(arguments, table, cluster),
        }
    }

    /// Finds the cluster's next tile, and begins to load its expert's rows.
    ///
    /// The tiles come in the order of their experts, and the whole ones of an expert before its partial ones.
    ///
    /// # Safety
    /// A whole warp calls it, converged; the arguments' index is valid.
    #[inline(always)]
    pub(super) unsafe fn find(&mut self) -> Option<FoundTile> {
        let (arguments, table) = (self.arguments, self.table);
        if self.whole.expert.min(self.partial.expert) == u32::MAX {
            return None;
        }
        // SAFETY: there is a next tile; the caller guarantees the index.
        unsafe {
            if self.whole.expert <= self.partial.expert {
                let found = self.whole.found(arguments, table);
                self.whole.advance(arguments, table);
                Some(found)
            } else {
                let found = self.partial.found(arguments, table);
                self.partial.advance(arguments, table);
                Some(found)
            }
        }
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
