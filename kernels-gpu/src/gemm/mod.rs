//! The tiled W4A8 GEMM.
//!
//! Two producer warps, one for bricks and one for activations, fill a ring of pipeline stages.
//! Consumer warpgroups dequantize in registers and issue wgmma:
//! LiquidGEMM's implicit fine-grained pipeline (arXiv 2509.01229, section 5).
//! Weights are wgmma's A operand and come from registers;
//! activations are B and come from swizzled shared memory.
//! Thread blocks are persistent and compute the segments that the schedule gives their cluster.
//!
//! It relies on `block.rs` for shared memory and barriers,
//! and on `liquidgemm_format::schedule` for the segments.
//! The host twin, which plans and launches this kernel, is `host/src/gpu/gemm.rs`.

pub mod consumer;
pub mod consumer_loaded;
pub mod main_loop;
pub mod producer;

use cuda_std::{TensorMap, cluster, thread, warp};
use liquidgemm_format::arguments::GemmArguments;
use liquidgemm_format::schedule::TilePosition;
use liquidgemm_format::tile::TileShape;

use crate::block::{Block, Cluster, Consumer};
use crate::ptx::wgmma::Accumulator;
use crate::ptx::{grid, registers, tma};
use crate::shape::Shape;
use consumer::consume;
use main_loop::MainLoop;
use producer::{TokenBoxes, produce_activations, produce_bricks};

/// Computes the cluster's tiles: the body of the kernels, which each thread executes.
///
/// `L` is the main loop, which sets the tile shape.
/// `A` is the accumulator of a strip of such a tile, `STAGES` the number of stages in its ring.
///
/// # Safety
/// The arguments describe memory as their documentation says.
/// `activations` are maps of int8 `[m, k]` with 128-byte swizzle
/// and boxes of [`K_TILE`](liquidgemm_format::tile::K_TILE) × [`TileShape::box_tokens`].
/// If `output_is_mapped` is set, `output` is a map of the 16-bit output with the same swizzle
/// and boxes of 64 channels × [`TileShape::epilogue_tokens`].
#[inline(always)]
pub unsafe fn gemm<A: Accumulator, L: MainLoop, const STAGES: u32>(
    activations: TokenBoxes,
    output: *const TensorMap,
    arguments: &GemmArguments,
) {
    let shape = L::Shape::SHAPE;
    let block = Block::<L::Shape>::current(arguments.weights.stream);
    let Block { shared, cluster, .. } = block;
    let thread = thread::thread_idx_x();
    let warp = warp::broadcast(thread / warp::WARP_SIZE);
    let warpgroup = warp / 4;

    if thread == 0 {
        // SAFETY: the maps are kernel parameters;
        // the barrier below orders the initialization of the barriers before their use.
        unsafe {
            activations.prefetch(arguments, block);
            if shape.maps_output() {
                tma::prefetch_map(output);
            }
            shared.init_barriers(cluster);
        }
    }
    sync(cluster);
    if shape.cluster_split > 1 {
        cluster::arrive_relaxed();
    }

    let consumers = shape.consumers();
    if warpgroup == consumers {
        if shape.moves_registers() {
            // SAFETY: the whole warpgroup executes this.
            unsafe { registers::decrease::<L::Shape>() };
        }
        if warp == consumers * 4 {
            // Launch dependents now:
            // their launch latency is longer than the delay that their first weight loads cause here.
            grid::launch_dependents();
            // SAFETY: one whole warp executes this; the caller guarantees the arguments.
            unsafe { produce_bricks::<L::Shape, STAGES>(arguments, block) };
        } else if warp == consumers * 4 + 1 {
            // SAFETY: one whole warp executes this; the caller guarantees the arguments.
            unsafe { produce_activations::<L::Shape, STAGES>(activations, arguments, block) };
        }
        if shape.cluster_split > 1 {
            // Every cluster arrive needs its wait before the next arrive.
            cluster::wait();
        }
    } else {
        if shape.moves_registers() {
            // SAFETY: the whole warpgroup executes this.
            unsafe { registers::increase::<L::Shape>() };
        }
        let consumer = Consumer::of_warpgroup(warpgroup, thread, shape);
        if shape.cluster_split > 1 {
            // After this wait the barriers of the cluster's other thread blocks are initialized.
            cluster::wait();
        }
        // SAFETY: the whole warpgroup executes this; the caller guarantees the arguments.
        unsafe { consume::<A, L>(arguments, output, block, consumer) };
    }
    if shape.cluster_split > 1 || cluster.blocks > 1 {
        // The cluster's other thread blocks may still send activations or sums to this one,
        // or arrive on its barriers.
        cluster::sync_cluster_relaxed();
    }
}

/// Waits for every thread of the thread block, or of the cluster where its thread blocks share activations.
#[inline(always)]
pub(crate) fn sync(cluster: Cluster) {
    if cluster.blocks > 1 {
        cluster::sync_cluster_relaxed();
    } else {
        thread::sync_threads();
    }
}

/// Returns the first strip of the thread block's tile at `position`.
#[inline(always)]
pub(crate) fn first_strip<S: Shape>(position: TilePosition, Block { cluster, .. }: Block<S>) -> u32 {
    (position.channel_tile * cluster.blocks + cluster.rank) * S::SHAPE.strips
}

/// Returns how many strips of a tile exist.
///
/// The last tiles may have fewer strips than the shape.
/// The consumers of missing strips then multiply stale shared memory, and store nothing.
#[inline(always)]
pub(crate) fn tile_strips(arguments: &GemmArguments, first_strip: u32, shape: TileShape) -> u32 {
    arguments.strips().saturating_sub(first_strip).min(shape.strips)
}
