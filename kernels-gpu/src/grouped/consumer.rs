//! A consumer warpgroup of the grouped GEMM: multiplies its cluster's tiles and stores their results.
//!
//! Main loop, reduction and epilogue are those of the tiled GEMM.
//! For the epilogue, a tile is the last one of a GEMM that ends with the tile's last row.

use cuda_std::{TensorMap, warp};
use liquidgemm_format::arguments::{GemmArguments, GroupedArguments, WeightsArguments};
use liquidgemm_format::ring::RingCursor;
use liquidgemm_format::schedule::{Schedule, Segment};
use liquidgemm_format::tile::{MAX_WGMMA_TOKENS, WARPGROUP};

use super::first_strip;
use super::table::{FoundTile, Tile, Tiles};
use crate::block::{Block, Consumer};
use crate::dequant::LiquidQuant;
use crate::epilogue::Epilogue;
use crate::gemm::main_loop::{MainLoop, StageWalk};
use crate::ptx::wgmma::{Accumulator, Fitting, FragmentVisitor};
use crate::ptx::{copy, hint, tma};
use crate::reduce::warpgroup;
use crate::shape::Shape;

/// Runs a consumer, which computes a strip of 64 channels of every tile.
/// With warpgroup split-K it computes half of the strip's K.
/// It is for small tiles, which store their scales before the main loop, as in the tiled GEMM.
///
/// # Safety
/// The whole warpgroup calls it; the ring's barriers are initialized.
/// The arguments are valid as `grouped` requires.
#[inline(always)]
pub(super) unsafe fn consume<A: Fitting, S: Shape, const STAGES: u32>(
    arguments: &GroupedArguments,
    output: *const TensorMap,
    block: Block<S>,
    consumer: Consumer,
    mut tiles: Tiles<'_>,
) {
    let mut position = RingCursor::<STAGES>::start();
    // SAFETY: the caller guarantees the arguments and the warpgroup.
    // All threads of the warpgroup take the same branches, because conditions depend on the tile alone.
    unsafe {
        let mut tile = tiles.next::<S>();
        let Some(first) = tile else { return };
        let mut scales = epilogue_of(&gemm_of(arguments, first), output, block, first, consumer).fetch();
        while let Some(current) = tile {
            let gemm = gemm_of(arguments, current);
            let epilogue = epilogue_of(&gemm, output, block, current, consumer);
            let mut accumulator = Fitted::<A>::for_rows(current.rows());
            epilogue.store_scales(scales);
            // The rows of the next tile's expert arrive during the main loop.
            let found = tiles.find();
            let segment = Segment { tile: 0, k_begin: 0, k_end: arguments.schedule.k_iterations };
            let walk = StageWalk::<LiquidQuant, S, STAGES>::accumulate(
                &mut accumulator,
                position,
                segment,
                block,
                consumer,
            );
            tile = match found {
                Some(found) => Some(found.tile::<S>(arguments)),
                None => None,
            };
            if let Some(next) = tile {
                scales = epilogue_of(&gemm_of(arguments, next), output, block, next, consumer).fetch();
            }
            position = walk.leave();
            warpgroup::exchange(&mut accumulator, block, consumer);
            epilogue.store(&mut accumulator, None);
        }
    }
    // The thread block's shared memory must last until the TMA stores have read it.
    tma::await_stores::<0>();
}

/// As [`consume`], for large tiles, whose producer gives registers to the consumers.
///
/// Their accumulators leave few registers. So the next tile is found while the last MMAs run,
/// scales are copied to shared memory without passing through registers,
/// and what the epilogue derives from the thread's index is derived anew.
///
/// # Safety
/// As for [`consume`].
#[inline(always)]
pub(super) unsafe fn consume_large<A: Fitting, S: Shape, const STAGES: u32>(
    arguments: &GroupedArguments,
    output: *const TensorMap,
    block: Block<S>,
    consumer: Consumer,
    mut tiles: Tiles<'_>,
) {
    let mut position = RingCursor::<STAGES>::start();
    let locates_early = S::SHAPE.tokens <= MAX_WGMMA_TOKENS;
    let locate = |found: Option<FoundTile>| match found {
        Some(found) => Some(found.tile::<S>(arguments)),
        None => None,
    };
    // SAFETY: the caller guarantees the arguments and the warpgroup.
    // All threads of the warpgroup take the same branches, because conditions depend on the tile alone.
    unsafe {
        let mut tile = tiles.next::<S>();
        while let Some(current) = tile {
            let gemm = gemm_of(arguments, current);
            let epilogue = |thread: u32| {
                let consumer = Consumer { thread: thread % WARPGROUP, ..consumer };
                epilogue_of(&gemm, output, block, current, consumer)
            };
            epilogue(hint::thread_idx_anew()).copy_scales();
            let mut accumulator = Fitted::<A>::for_rows(current.rows());
            // The broadcast keeps the assembler from keeping values that derive from it for all tiles.
            let k_iterations = warp::broadcast(arguments.schedule.k_iterations);
            let walk = StageWalk::<LiquidQuant, S, STAGES>::accumulate(
                &mut accumulator,
                position,
                Segment { tile: 0, k_begin: 0, k_end: k_iterations },
                block,
                consumer,
            );
            // The last MMAs run for longer than this takes.
            // The very largest tiles have no registers yet for the divisions that locate the tile.
            let found = tiles.find();
            if locates_early {
                tile = locate(found);
            }
            position = walk.leave();
            copy::await_groups::<0>();
            epilogue(hint::thread_idx_anew()).store(&mut accumulator, None);
            if !locates_early {
                tile = locate(found);
            }
        }
    }
    // The thread block's shared memory must last until the TMA stores have read it.
    tma::await_stores::<0>();
}

/// An accumulator of which only the first tokens are multiplied: as many as the tile has rows, or a few more.
struct Fitted<A> {
    accumulator: A,
    /// The rows of the tile.
    rows: u32,
}

impl<A: Accumulator> Fitted<A> {
    /// Returns an accumulator with arbitrary contents for a tile with `rows` rows.
    #[inline(always)]
    fn for_rows(rows: u32) -> Self {
        Self { accumulator: A::arbitrary(), rows }
    }
}

impl<A: Fitting> Accumulator for Fitted<A> {
    const TOKENS: u32 = A::TOKENS;
    const COMMITS: bool = true;

    #[inline(always)]
    fn zero() -> Self {
        Self { accumulator: A::zero(), ..Self::for_rows(A::TOKENS) }
    }

    #[inline(always)]
    fn arbitrary() -> Self {
        Self::for_rows(A::TOKENS)
    }

    #[inline(always)]
    unsafe fn multiply_accumulate(&mut self, a: [u32; 4], descriptor: u32, accumulate: bool) {
        // SAFETY: the caller guarantees the same.
        unsafe { self.accumulator.multiply_accumulate(a, descriptor, accumulate) }
    }

    #[inline(always)]
    unsafe fn multiply_accumulate_along<const COUNT: usize>(
        &mut self,
        a: [[u32; 4]; COUNT],
        descriptor: u32,
        accumulate: bool,
    ) {
        // SAFETY: a tile has no more rows than tokens; the caller guarantees the rest.
        unsafe { self.accumulator.multiply_accumulate_fitting(self.rows, a, descriptor, accumulate) }
    }

    #[inline(always)]
    unsafe fn multiply_accumulate_shared(&mut self, a: u32, descriptor: u32, accumulate: bool) {
        // SAFETY: the caller guarantees the same.
        unsafe { self.accumulator.multiply_accumulate_shared(a, descriptor, accumulate) }
    }

    #[inline(always)]
    fn visit(&mut self, visitor: &mut impl FragmentVisitor) {
        self.accumulator.visit(visitor);
    }
}

/// Returns the GEMM that a tile belongs to, as far as the epilogue needs it.
///
/// Its tokens are all rows up to the tile's last one, and its channels are the expert's.
#[inline(always)]
fn gemm_of(arguments: &GroupedArguments, tile: Tile) -> GemmArguments {
    let first_f32 = (tile.expert as u64 * arguments.n as u64) * 4;
    GemmArguments {
        weights: WeightsArguments {
            strips: 0,
            channel_scales: arguments.weights.channel_scales + first_f32,
            stream: arguments.weights.stream,
        },
        token_scales: arguments.token_scales,
        bias: if arguments.bias == 0 { 0 } else { arguments.bias + first_f32 },
        output: arguments.output,
        partials: 0,
        flags: 0,
        m: tile.end_row,
        n: arguments.n,
        first_turn_cycles: 0,
        output_stride: arguments.output_stride,
        output_type: arguments.output_type,
        schedule: const { Schedule::new([1, 1, 1], 1, 0, 1) },
        output_is_mapped: arguments.output_is_mapped,
    }
}

/// Returns the epilogue of a tile.
#[inline(always)]
fn epilogue_of<'a, S: Shape>(
    gemm: &'a GemmArguments,
    output: *const TensorMap,
    block: Block<S>,
    tile: Tile,
    consumer: Consumer,
) -> Epilogue<'a, S> {
    let strip = first_strip(tile.channel_tile, block) + consumer.strip;
    Epilogue::new(gemm, output, block, [strip, tile.first_row], consumer)
}
