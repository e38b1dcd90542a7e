//! The producers of the grouped GEMM: one warp loads bricks, one loads activations.
//!
//! They differ from those of the tiled GEMM (`gemm/producer.rs`) in what they load for a tile:
//! the strips of the tile's expert, and the tile's own rows instead of a whole box.

use cuda_std::{TensorMap, thread};
use liquidgemm_format::arguments::GroupedArguments;
use liquidgemm_format::brick::BRICK_CHANNELS;
use liquidgemm_format::grouped::{BOX_ROW_STEP, MAX_BOX_ROWS, loaded_part};
use liquidgemm_format::ring::RingCursor;
use liquidgemm_format::tile::{K_TILE, STRIP_K_TILE_BYTES};

use super::first_strip;
use super::table::Tiles;
use crate::block::Block;
use crate::gemm::producer::{KTileLoad, load_bricks};
use crate::ptx::tma;
use crate::ptx::tma::Policy;
use crate::shape::Shape;

/// The tensor maps of the activations, one for each height of a box.
#[derive(Clone, Copy)]
pub(super) struct BoxMaps(pub(super) *const TensorMap);

impl BoxMaps {
    /// Returns the map for boxes of `rows` rows, a positive multiple of [`BOX_ROW_STEP`].
    #[inline(always)]
    fn of_rows(self, rows: u32) -> *const TensorMap {
        self.0.wrapping_add((rows / BOX_ROW_STEP - 1) as usize)
    }
}

/// Runs the first producer warp, which keeps the ring full of bricks.
///
/// As in the tiled GEMM it fills the ring's first turn at the speed of memory,
/// and bricks are first to be evicted from the L2 cache.
///
/// # Safety
/// One whole warp calls it; the ring's barriers are initialized.
/// The arguments are valid as `grouped` requires.
#[inline(always)]
pub(super) unsafe fn produce_bricks<S: Shape, const STAGES: u32>(
    arguments: &GroupedArguments,
    block: Block<S>,
    mut tiles: Tiles<'_>,
) {
    let shared = block.shared;
    let shape = S::SHAPE;
    let stream = arguments.weights.stream;
    let all_strips = arguments.n.div_ceil(BRICK_CHANNELS as u32);
    let mut ring = RingCursor::<STAGES>::start();
    let begin = thread::clock64() as u32;
    let pace = arguments.first_turn_cycles;
    let mut due = 0;
    let policy = Policy::evict_first();
    // SAFETY: the caller guarantees the arguments and the warp.
    while let Some(tile) = unsafe { tiles.next::<S>() } {
        let first_strip = first_strip(tile.channel_tile, block);
        // The last tiles may have fewer strips than the shape.
        // The consumers of missing strips then multiply stale shared memory, and store nothing.
        let strips = all_strips.saturating_sub(first_strip).min(shape.strips);
        let source = arguments.weights.strips
            + tile.expert as u64 * arguments.expert_bytes
            + first_strip as u64 * stream.strip_bytes as u64;
        let mut first_k_tile = 0;
        let mut offset = 0;
        for iteration in 0..arguments.schedule.k_iterations {
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

/// Runs the second producer warp, which keeps the ring full of activations.
///
/// It loads the tile's rows in one box, or two where the tile has more than [`MAX_BOX_ROWS`].
/// Up to seven rows more make whole swizzle atoms; they reach only sums that are never stored.
/// In a cluster each thread block loads a part of the rows and multicasts it to both.
///
/// # Safety
/// As for [`produce_bricks`]; the maps are those that `grouped` requires.
#[inline(always)]
pub(super) unsafe fn produce_activations<S: Shape, const STAGES: u32>(
    boxes: BoxMaps,
    arguments: &GroupedArguments,
    block: Block<S>,
    mut tiles: Tiles<'_>,
) {
    let Block { shared, cluster, .. } = block;
    let shape = S::SHAPE;
    let every_block = (1 << cluster.blocks) - 1;
    let mut ring = RingCursor::<STAGES>::start();
    // SAFETY: the caller guarantees the arguments and the warp.
    while let Some(tile) = unsafe { tiles.next::<S>() } {
        let rows = tile.rows();
        let bytes = rows.next_multiple_of(BOX_ROW_STEP) * K_TILE;
        let (first, part) = loaded_part(rows, cluster.blocks, cluster.rank);
        let first_box = part.min(MAX_BOX_ROWS);
        let second_box = part - first_box;
        let row = tile.first_row + first;
        for iteration in 0..arguments.schedule.k_iterations {
            let stage = ring.stage();
            let destination = shared.activations(stage) + first * K_TILE;
            // SAFETY: the stage is empty once acquired and has room for the boxes.
            // So has the same stage of the cluster's other thread block, because its consumers arrive here too.
            unsafe {
                shared.acquire_empty(stage, ring.empty_parity());
                seq_macro::seq!(TILE in 0..2 {
                    if TILE < shape.k_tiles() {
                        let full = shared.announce(stage, TILE, bytes);
                        let to = destination + TILE * shape.k_tile_bytes();
                        let k = iteration * shape.stage_k() + TILE * K_TILE;
                        if cluster.blocks == 1 {
                            tma::load_2d(to, boxes.of_rows(first_box), k, row, full);
                            if shape.tokens > MAX_BOX_ROWS && second_box > 0 {
                                tma::load_2d(
                                    to + MAX_BOX_ROWS * K_TILE,
                                    boxes.of_rows(second_box),
                                    k,
                                    row + MAX_BOX_ROWS,
                                    full,
                                );
                            }
                        } else if part > 0 {
                            tma::load_2d_multicast(to, boxes.of_rows(part), k, row, full, every_block);
                        }
                    }
                });
            }
            ring = ring.next();
        }
    }
}
