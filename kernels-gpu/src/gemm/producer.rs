//! The producers of the pipeline: one warp loads bricks, one loads activations.
//!
//! They fill the stages that `block.rs` lays out, in the order of the schedule's segments.
//! Weights are laid out in device memory as `liquidgemm_format::stream` says,
//! so that one bulk copy loads a strip's part of a K-tile.

use cuda_std::{TensorMap, cluster, thread};
use liquidgemm_format::arguments::GemmArguments;
use liquidgemm_format::brick::PAIR_BYTES;
use liquidgemm_format::ring::RingCursor;
use liquidgemm_format::schedule::Schedule;
use liquidgemm_format::stream::WeightStream;
use liquidgemm_format::tile::{K_TILE, STRIP_K_TILE_BYTES, STRIP_K_TILE_CODE_BYTES, TileShape};

use super::{first_strip, tile_strips};
use crate::block::{Block, Cluster};
use crate::ptx::tma::Policy;
use crate::ptx::{grid, tma};
use crate::shape::Shape;

/// Loads the bricks of an acquired stage: of `$strips` strips from address `$source` on.
/// The stage begins with K-tile `$first_k_tile`, `$offset` bytes behind the first one of each strip.
///
/// It is a macro because a function would change the machine code of the tiled kernels, which is tuned as it is.
macro_rules! load_bricks {
    ($shape:ident, $shared:ident, $stage:ident, $stream:ident, $load:ident, $source:ident, $strips:ident, $first_k_tile:ident, $offset:ident, $policy:ident) => {
        seq_macro::seq!(TILE in 0..2 {
            if TILE < $shape.k_tiles() {
                // Behind the last K-tile the activations are zeros, so stale bricks add nothing.
                // With cluster split-K even the first K-tile of a last k-iteration may not exist.
                let exists = TILE == 0 && $shape.cluster_split == 1 || $first_k_tile + TILE < $stream.k_tiles;
                let bytes = if exists { $load.bytes() } else { 0 };
                let full = $shared.announce($stage, TILE, $strips * bytes);
                seq_macro::seq!(STRIP in 0..3 {
                    if STRIP < $shape.strips && STRIP < $strips && exists {
                        let to = $shared.bricks($stage, STRIP) + TILE * STRIP_K_TILE_BYTES;
                        let strip = $source + STRIP * $stream.strip_bytes as u64;
                        $load.load(to, strip, $offset + TILE * $stream.k_tile_bytes, full, $policy);
                    }
                });
            }
        });
    };
}
pub(crate) use load_bricks;

/// Runs the first producer warp, which keeps the ring full of bricks.
///
/// Weights do not depend on the preceding launch, which may compute the activations.
/// So this producer starts at once and overlaps with that launch.
/// It fills the ring's first turn at the speed of memory, one stage every `first_turn_cycles`.
/// Thread blocks that read the same weights do so at about the same time,
/// so bricks are first to be evicted from the L2 cache and activations stay.
///
/// # Safety
/// One whole warp calls it; the ring's barriers are initialized.
/// The arguments are valid as `gemm` requires.
#[inline(always)]
pub(crate) unsafe fn produce_bricks<S: Shape, const STAGES: u32>(arguments: &GemmArguments, block: Block<S>) {
    let Block { shared, cluster, .. } = block;
    let shape = S::SHAPE;
    let schedule = arguments.schedule;
    let stream = arguments.weights.stream;
    let mut ring = RingCursor::<STAGES>::start();
    let begin = thread::clock64() as u32;
    let pace = arguments.first_turn_cycles;
    let mut due = 0;
    let policy = Policy::evict_first();
    for segment in schedule.segments(cluster::cluster_idx_x()) {
        let first_strip = first_strip(schedule.position(segment.tile), block);
        let strips = tile_strips(arguments, first_strip, shape);
        let source = arguments.weights.strips + first_strip as u64 * stream.strip_bytes as u64;
        let mut first_k_tile = (first_iteration(schedule, cluster) + segment.k_begin) * shape.k_tiles();
        let mut offset = first_k_tile * stream.k_tile_bytes;
        for iteration in 0..segment.k_end - segment.k_begin {
            let stage = ring.stage();
            if due < STAGES * pace {
                while (thread::clock64() as u32).wrapping_sub(begin) < due {}
                due += pace;
            }
            let load = KTileLoad::new(stream, iteration < STAGES);
            // SAFETY: the stage is empty once acquired and has room for the copies; the K-tiles exist.
            unsafe {
                shared.acquire_empty(stage, ring.empty_parity());
                load_bricks!(
                    shape,
                    shared,
                    stage,
                    stream,
                    load,
                    source,
                    strips,
                    first_k_tile,
                    offset,
                    policy
                );
            }
            first_k_tile += shape.k_tiles();
            offset += shape.k_tiles() * stream.k_tile_bytes;
            ring = ring.next();
        }
    }
}

/// The copies that load a strip's part of a K-tile: codes and pairs.
///
/// With one group per channel, the strip's pairs are a copy of their own.
#[derive(Clone, Copy)]
pub(crate) struct KTileLoad {
    stream: WeightStream,
    loads_channel_pairs: bool,
}

impl KTileLoad {
    /// Returns the copies of a K-tile.
    ///
    /// `is_first` says that the K-tile is the segment's first one in its place in the ring.
    /// With one group per channel only such a K-tile loads pairs, which then stay there.
    #[inline(always)]
    pub(crate) fn new(stream: WeightStream, is_first: bool) -> Self {
        Self { stream, loads_channel_pairs: stream.channel_pairs > 0 && is_first }
    }

    /// Returns the bytes that are copied for each strip.
    #[inline(always)]
    pub(crate) fn bytes(self) -> u32 {
        self.stream.k_tile_bytes + if self.loads_channel_pairs { PAIR_BYTES as u32 } else { 0 }
    }

    /// Loads a strip's part of a K-tile to shared memory at `to`.
    ///
    /// The source is `offset` bytes behind the first K-tile of the strip at `strip`.
    ///
    /// # Safety
    /// As for [`tma::load_bulk`].
    #[inline(always)]
    pub(crate) unsafe fn load(self, to: u32, strip: u64, offset: u32, full: u32, policy: Policy) {
        // SAFETY: the caller guarantees that the addresses are valid.
        unsafe {
            let from = strip + (self.stream.channel_pairs + offset) as u64;
            tma::load_bulk(to, from, self.stream.k_tile_bytes, full, policy);
            if self.loads_channel_pairs {
                tma::load_bulk(to + STRIP_K_TILE_CODE_BYTES, strip, PAIR_BYTES as u32, full, policy);
            }
        }
    }
}

/// The tensor maps of the activations, with boxes of [`TileShape::box_tokens`] tokens.
///
/// TMA takes far longer to fill rows of a box outside the tensor than to read rows inside it.
/// So the last box of a problem has a map of its own with the remaining tokens,
/// and boxes without tokens are not loaded.
/// The stale rows that shared memory then has for tokens from m on reach only sums that are never stored.
#[derive(Clone, Copy)]
pub struct TokenBoxes {
    /// The map for whole boxes.
    pub whole: *const TensorMap,
    /// The map for the last box, of the tokens left after whole boxes; any map if none are left.
    pub last: *const TensorMap,
}

impl TokenBoxes {
    /// Prefetches the maps.
    ///
    /// # Safety
    /// The maps are the kernel's parameters.
    #[inline(always)]
    pub(crate) unsafe fn prefetch<S: Shape>(self, arguments: &GemmArguments, block: Block<S>) {
        // SAFETY: the caller guarantees that the maps are the kernel's parameters.
        unsafe {
            if arguments.m >= block.cluster.box_tokens(S::SHAPE) {
                tma::prefetch_map(self.whole);
            }
            tma::prefetch_map(self.last);
        }
    }

    /// Returns the map for the box of up to `tokens` tokens that starts at token `first`.
    #[inline(always)]
    pub(crate) fn map(self, arguments: &GemmArguments, first: u32, tokens: u32) -> *const TensorMap {
        if first + tokens <= arguments.m { self.whole } else { self.last }
    }
}

/// Returns how many tokens exist of a tile that starts at token `first`.
#[inline(always)]
pub(crate) fn tile_tokens(arguments: &GemmArguments, first: u32, shape: TileShape) -> u32 {
    arguments.m.saturating_sub(first).min(shape.tokens)
}

/// Runs the second producer warp, which keeps the ring full of activations.
///
/// It first waits for the preceding launch, which may compute the activations.
///
/// # Safety
/// As for [`produce_bricks`]; the maps are those that `gemm` requires.
#[inline(always)]
pub(crate) unsafe fn produce_activations<S: Shape, const STAGES: u32>(
    activations: TokenBoxes,
    arguments: &GemmArguments,
    block: Block<S>,
) {
    let Block { shared, cluster, .. } = block;
    let shape = S::SHAPE;
    let schedule = arguments.schedule;
    let part_tokens = cluster.part_tokens(shape);
    let part_offset = cluster.rank * part_tokens * K_TILE;
    let every_block = (1 << cluster.blocks) - 1;
    let first_iteration = first_iteration(schedule, cluster);
    let mut ring = RingCursor::<STAGES>::start();
    grid::wait_for_dependency();
    for segment in schedule.segments(cluster::cluster_idx_x()) {
        let first_token = schedule.position(segment.tile).token_tile * shape.tokens;
        let bytes = tile_tokens(arguments, first_token, shape) * K_TILE;
        let token = first_token + cluster.rank * part_tokens;
        let map = activations.map(arguments, token, part_tokens);
        for iteration in first_iteration + segment.k_begin..first_iteration + segment.k_end {
            let stage = ring.stage();
            let destination = shared.activations(stage) + part_offset;
            // SAFETY: the stage is empty once acquired and has room for the boxes.
            // So has the same stage of the cluster's other thread blocks,
            // because their consumers arrive here too.
            unsafe {
                shared.acquire_empty(stage, ring.empty_parity());
                seq_macro::seq!(TILE in 0..2 {
                    if TILE < shape.k_tiles() {
                        let full = shared.announce(stage, TILE, bytes);
                        let (to, k) = (destination + TILE * shape.k_tile_bytes(), iteration * shape.stage_k() + TILE * K_TILE);
                        if const { S::SHAPE.cluster_split > 1 } {
                            load_parts(to, activations, arguments, k, token, full, block);
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

/// Returns the first k-iteration of the thread block's part of a tile; 0 without cluster split-K.
#[inline(always)]
fn first_iteration(schedule: Schedule, cluster: Cluster) -> u32 {
    cluster.part * schedule.k_iterations
}

/// Loads an activation tile for cluster split-K, box by box:
/// first the tokens that this thread block's consumers finish, then those of the other thread blocks.
///
/// # Safety
/// As for [`tma::load_2d`], for all boxes of the tile that starts at `token`.
#[inline(always)]
unsafe fn load_parts<S: Shape>(
    to: u32,
    activations: TokenBoxes,
    arguments: &GemmArguments,
    k: u32,
    token: u32,
    full: u32,
    Block { cluster, .. }: Block<S>,
) {
    let shape = S::SHAPE;
    let tokens = shape.finished_tokens();
    seq_macro::seq!(PART in 0..16 {
        if PART * tokens < shape.tokens {
            let (consumer, position) = (PART / shape.finishers(), PART % shape.finishers());
            let part = consumer * shape.finishers() + shape.finisher(cluster.part, position);
            let first = token + part * tokens;
            if first < arguments.m {
                let map = activations.map(arguments, first, tokens);
                // SAFETY: the caller guarantees that the boxes of the tile are valid.
                unsafe { tma::load_2d(to + PART * tokens * K_TILE, map, k, first, full) };
            }
        }
    });
}
