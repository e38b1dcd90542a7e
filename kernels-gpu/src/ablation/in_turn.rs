//! A main loop without overlap, for the ablation.
//!
//! A consumer loads a K-tile's codes, dequantizes them, multiplies, and waits for the products.
//! Only then does it turn to the next K-tile.
//! The rest of the kernel is the library's `gemm`.

use core::marker::PhantomData;

use cuda_std::warp;
use liquidgemm_format::ring::RingCursor;
use liquidgemm_format::schedule::Segment;
use liquidgemm_format::tile::STRIP_K_TILE_BYTES;

use crate::block::{Block, Consumer};
use crate::dequant::{AFragment, Dequantization};
use crate::gemm::main_loop::MainLoop;
use crate::ptx::wgmma::{self, Accumulator};
use crate::shape::Shape;

/// The main loop without overlap, for one consumer per strip.
pub struct InTurn<D, S, const STAGES: u32> {
    parameters: PhantomData<(D, S)>,
    ring: RingCursor<STAGES>,
}

impl<D: Dequantization, S: Shape, const STAGES: u32> MainLoop for InTurn<D, S, STAGES> {
    type Shape = S;
    type Position = RingCursor<STAGES>;

    const START: Self::Position = RingCursor::start();

    #[inline(always)]
    unsafe fn accumulate<A: Accumulator>(
        accumulator: &mut A,
        position: Self::Position,
        segment: Segment,
        block: Block<S>,
        consumer: Consumer,
    ) -> Self {
        let Block { shared, cluster, .. } = block;
        let shape = S::SHAPE;
        let place = shared.fragment_address(consumer);
        let mut ring = position;
        for iteration in segment.k_begin..segment.k_end {
            let stage = ring.stage();
            let bricks = stage * shape.stage_bytes();
            let tile = warp::broadcast(shared.activation_descriptor(stage));
            // SAFETY: a stage is read between its acquisition and its release,
            // and its MMAs are done after the wait; the caller guarantees the warpgroup.
            unsafe {
                seq_macro::seq!(TILE in 0..2 {
                    if TILE < shape.k_tiles() {
                        shared.acquire_full(stage, TILE, ring.full_parity());
                        let bricks = bricks + TILE * STRIP_K_TILE_BYTES;
                        let tile = tile + TILE * wgmma::descriptor_step(shape.k_tile_bytes());
                        let first = AFragment::load(bricks, place);
                        let second = AFragment::load_second(bricks, place, shared.stream());
                        let operands = [
                            first.operand::<D, 0>(),
                            first.operand::<D, 1>(),
                            second.operand::<D, 0>(),
                            second.operand::<D, 1>(),
                        ];
                        wgmma::fence();
                        let accumulate = TILE > 0 || iteration > segment.k_begin;
                        accumulator.multiply_accumulate_along(operands, tile, accumulate);
                        wgmma::commit();
                        wgmma::wait::<0>();
                    }
                });
                shared.release(stage, cluster, consumer.thread % warp::WARP_SIZE);
            }
            ring = ring.next();
        }
        Self { parameters: PhantomData, ring }
    }

    #[inline(always)]
    unsafe fn leave(self) -> Self::Position {
        self.ring
    }
}
