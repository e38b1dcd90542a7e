//! A consumer warpgroup: multiplies its cluster's segments and finishes their tiles.
//!
//! For each segment of the schedule it runs a main loop (`main_loop.rs`),
//! a reduction where several consumers have parts of the sums (`reduce/`), and the epilogue (`epilogue/`).

use cuda_std::{TensorMap, cluster};
use liquidgemm_format::arguments::GemmArguments;
use liquidgemm_format::schedule::Segment;
use liquidgemm_format::tile::MAX_SPLIT_ROUNDS;

use super::first_strip;
use super::main_loop::MainLoop;
use crate::block::{Block, Consumer};
use crate::epilogue::Epilogue;
use crate::ptx::wgmma::Accumulator;
use crate::ptx::{grid, tma};
use crate::reduce::cluster::Exchange;
use crate::reduce::{stream_k, warpgroup};
use crate::shape::Shape;

/// Runs a consumer, which computes a strip of 64 channels of every tile.
/// With warpgroup split-K it computes half of the strip's K.
///
/// # Safety
/// The whole warpgroup calls it; the ring's barriers are initialized.
/// The arguments are valid as `gemm` requires.
#[inline(always)]
pub(crate) unsafe fn consume<A: Accumulator, L: MainLoop>(
    arguments: &GemmArguments,
    output: *const TensorMap,
    block: Block<L::Shape>,
    consumer: Consumer,
) {
    let shape = L::Shape::SHAPE;
    let schedule = arguments.schedule;
    let cluster_index = cluster::cluster_idx_x();
    let slots = stream_k::Slots::new(block, consumer);
    let mut position = L::START;
    let exchange = Exchange::new(block, consumer);
    let mut parity = 0;
    // Small tiles store their scales to shared memory before the main loop:
    // they wait for their first stage anyway, and have no registers to spare during the main loop.
    let stores_scales_early = !shape.moves_registers();
    let mut segments = schedule.segments(cluster_index);
    let mut segment = segments.next();
    // Until the preceding launch has ended, it may use scales, workspace and output.
    grid::wait_for_dependency();
    let mut epilogue = epilogue_of(segment, arguments, output, block, consumer);
    // SAFETY: the caller guarantees the arguments.
    let mut scales = unsafe { epilogue.fetch() };
    while let Some(current) = segment {
        let mut accumulator = A::arbitrary();
        // SAFETY: the caller guarantees the arguments.
        // All threads of the warpgroup take the same branches,
        // because conditions depend on the segment alone.
        unsafe {
            if stores_scales_early {
                epilogue.store_scales(scales);
            }
            let walk = L::accumulate(&mut accumulator, position, current, block, consumer);
            // From here to `leave`, the work overlaps with the last MMAs.
            if const { L::Shape::SHAPE.cluster_split > 1 } {
                exchange.open(parity);
            }
            if !stores_scales_early {
                epilogue.store_scales(scales);
            }
            segment = segments.next();
            let mut next = epilogue;
            if segment.is_some() {
                next = epilogue_of(segment, arguments, output, block, consumer);
                scales = next.fetch();
            }
            position = walk.leave();
            warpgroup::exchange(&mut accumulator, block, consumer);
            if const { L::Shape::SHAPE.cluster_split > 1 } {
                exchange.give(&mut accumulator);
                if exchange.takes() {
                    const { assert!(MAX_SPLIT_ROUNDS == 2) };
                    seq_macro::seq!(ROUND in 0..2 {
                        if const { ROUND < L::Shape::SHAPE.split_rounds() } {
                            exchange.take(&mut accumulator, ROUND, parity);
                            epilogue.store(&mut accumulator, Some(ROUND));
                        }
                    });
                    if segment.is_some() {
                        exchange.release();
                    }
                }
                parity ^= 1;
            } else if schedule.owns(current) {
                let first = schedule.first_peer(cluster_index, current);
                slots.collect(&mut accumulator, arguments, first..cluster_index);
                epilogue.store(&mut accumulator, None);
            } else {
                slots.store_partials(&mut accumulator, arguments, cluster_index);
            }
            epilogue = next;
        }
    }
    // The thread block's shared memory must last until the TMA stores have read it.
    tma::await_stores::<0>();
}

/// Returns the epilogue of the segment's tile.
///
/// After the last segment it returns that of tile 0, which is never used.
#[inline(always)]
fn epilogue_of<'a, S: Shape>(
    segment: Option<Segment>,
    arguments: &'a GemmArguments,
    output: *const TensorMap,
    block: Block<S>,
    consumer: Consumer,
) -> Epilogue<'a, S> {
    let shape = S::SHAPE;
    let tile = match segment {
        Some(segment) => segment.tile,
        None => 0,
    };
    let position = arguments.schedule.position(tile);
    let strip = first_strip(position, block) + consumer.strip;
    // With cluster split-K, the tokens that a thread block finishes come first in its accumulators.
    let token = position.token_tile * shape.tokens + block.cluster.part * shape.finished_tokens();
    Epilogue::new(arguments, output, block, [strip, token], consumer)
}
