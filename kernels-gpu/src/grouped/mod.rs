//! The grouped W4A8 GEMM: each expert's rows times that expert's weights, in one launch.
//!
//! It is the tiled GEMM ([`gemm`](mod@crate::gemm)) with another schedule.
//! How many rows each expert has is known only on the device.
//! So each thread block first counts the tiles of all experts ([`table`]),
//! and its producers and consumers then find their tiles in that table.
//! A tile has the rows of one expert. Producers load only these rows,
//! and consumers multiply by the smallest instructions that have room for them.
//!
//! `liquidgemm_format::grouped` has the arithmetic of the schedule, and the shapes.
//! The host twin is `host/src/gpu/grouped.rs`.

mod consumer;
mod producer;
mod table;

use cuda_std::{TensorMap, cluster, thread, warp};
use liquidgemm_format::arguments::GroupedArguments;
use liquidgemm_format::grouped::box_maps;

use crate::block::{Block, Consumer};
use crate::ptx::wgmma::Fitting;
use crate::ptx::{grid, registers, tma};
use crate::shape::Shape;
use consumer::{consume, consume_large};
use producer::{BoxMaps, produce_activations, produce_bricks};
use table::{ExpertTable, Tiles};

/// Computes the cluster's tiles: the body of the kernels, which each thread executes.
///
/// `S` is the tile shape, `A` the accumulator of a strip, `STAGES` the number of stages in the ring.
/// `boxes` are maps of int8 `[rows, k]` with 128-byte swizzle,
/// one for each height of a box: 8, 16, 24, … rows.
///
/// # Safety
/// The arguments describe memory as their documentation says.
/// There are [`box_maps`](liquidgemm_format::grouped::box_maps) maps at `boxes`.
/// If `output_is_mapped` is set, `output` is a map of the 16-bit output with the same swizzle
/// and boxes of 64 channels × [`epilogue_tokens`](liquidgemm_format::tile::TileShape::epilogue_tokens).
#[inline(always)]
pub unsafe fn grouped<A: Fitting, S: Shape, const STAGES: u32>(
    boxes: *const TensorMap,
    output: *const TensorMap,
    arguments: &GroupedArguments,
) {
    let shape = S::SHAPE;
    let block = Block::<S>::current(arguments.weights.stream);
    let Block { shared, cluster, .. } = block;
    let thread = thread::thread_idx_x();
    let warp = warp::broadcast(thread / warp::WARP_SIZE);
    let warpgroup = warp / 4;

    if thread < box_maps(shape) {
        // SAFETY: the maps are kernel parameters.
        unsafe { tma::prefetch_map(boxes.add(thread as usize)) };
    }
    if thread == 0 {
        // SAFETY: the map is a kernel parameter;
        // the barriers below order the initialization of the barriers before their use.
        unsafe {
            if shape.maps_output() {
                tma::prefetch_map(output);
            }
            shared.init_barriers(cluster);
        }
    }
    // Launch dependents now: their launch latency is longer than the delay that their first loads cause here.
    grid::launch_dependents();
    // The preceding launch may write the offsets or counts.
    grid::wait_for_dependency();
    // SAFETY: the whole thread block executes this; the caller guarantees the arguments.
    let table = unsafe { ExpertTable::fill::<S>(shared.expert_table(), arguments, warp) };
    if cluster.blocks > 1 {
        cluster::sync_cluster_relaxed();
    }
    let tiles = Tiles::new(arguments, table, cluster::cluster_idx_x());

    let consumers = shape.consumers();
    if warpgroup == consumers {
        if shape.moves_registers() {
            // SAFETY: the whole warpgroup executes this.
            unsafe { registers::decrease::<S>() };
        }
        if warp == consumers * 4 {
            // SAFETY: one whole warp executes this; the caller guarantees the arguments.
            unsafe { produce_bricks::<S, STAGES>(arguments, block, tiles) };
        } else if warp == consumers * 4 + 1 {
            // SAFETY: one whole warp executes this; the caller guarantees the arguments.
            unsafe { produce_activations::<S, STAGES>(BoxMaps(boxes), arguments, block, tiles) };
        }
    } else {
        if shape.moves_registers() {
            // SAFETY: the whole warpgroup executes this.
            unsafe { registers::increase::<S>() };
        }
        let consumer = Consumer::of_warpgroup(warpgroup, thread, shape);
        // SAFETY: the whole warpgroup executes this; the caller guarantees the arguments.
        unsafe {
            if shape.moves_registers() {
                consume_large::<A, S, STAGES>(arguments, output, block, consumer, tiles);
            } else {
                consume::<A, S, STAGES>(arguments, output, block, consumer, tiles);
            }
        }
    }
    if cluster.blocks > 1 {
        // The cluster's other thread block may still send activations to this one, or arrive on its barriers.
        cluster::sync_cluster_relaxed();
    }
}

/// Returns the first strip, counted from the expert's first, of the thread block's part of a channel tile.
#[inline(always)]
fn first_strip<S: Shape>(channel_tile: u32, Block { cluster, .. }: Block<S>) -> u32 {
    (channel_tile * cluster.blocks + cluster.rank) * S::SHAPE.strips
}
