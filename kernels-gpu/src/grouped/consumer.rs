//! A consumer warpgroup of the grouped GEMM: multiplies its cluster's tiles and stores their results.
//!
//! Main loop, reduction and epilogue are those of the tiled GEMM.
//! For the epilogue, an expert's tile is a tile of a GEMM that ends with the expert's last row.

use cuda_std::TensorMap;
use liquidgemm_format::arguments::{GemmArguments, GroupedArguments, WeightsArguments};
use liquidgemm_format::ring::RingCursor;
use liquidgemm_format::schedule::{Schedule, Segment};

use super::first_strip;
use super::table::{Tile, Tiles};
use crate::block::{Block, Consumer};
use crate::dequant::LiquidQuant;
use crate::epilogue::Epilogue;
use crate::gemm::main_loop::{MainLoop, StageWalk};
use crate::ptx::tma;
use crate::ptx::wgmma::{Accumulator, Fitting, FragmentVisitor};
use crate::reduce::warpgroup;
use crate::shape::Shape;

/// Runs a consumer, which computes a strip of 64 channels of every tile.
/// With warpgroup split-K it computes half of the strip's K.
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
    let shape = S::SHAPE;
    let mut position = RingCursor::<STAGES>::start();
    // As in the tiled GEMM, small tiles store their scales before the main loop.
    let stores_scales_early = !shape.moves_registers();
    // SAFETY: the caller guarantees the arguments and the warpgroup.
    // All threads of the warpgroup take the same branches, because conditions depend on the tile alone.
    unsafe {
        let mut tile = tiles.next::<S>();
        let Some(first) = tile else { return };
        let mut scales = epilogue_of(&gemm_of(arguments, first), output, block, first, consumer).fetch();
        while let Some(current) = tile {
            let gemm = gemm_of(arguments, current);
            let epilogue = epilogue_of(&gemm, output, block, current, consumer);
            let mut accumulator = Fitted::<A>::for_rows(current.rows::<S>());
            if stores_scales_early {
                epilogue.store_scales(scales);
            }
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
            if !stores_scales_early {
                epilogue.store_scales(scales);
            }
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
/// Its tokens are all rows up to the expert's last one, and its channels are the expert's.
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
