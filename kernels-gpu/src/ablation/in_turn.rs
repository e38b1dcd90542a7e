//! A main loop without overlap: a consumer loads a span's codes, dequantizes them, multiplies, waits for the products,
//! and only then turns to the next.

use core::marker::PhantomData;

use cuda_std::warp;
use liquidgemm_format::ring::RingCursor;
use liquidgemm_format::schedule::Segment;
use liquidgemm_format::tile::{STRIP_SPAN_BYTES, TileShape};

use crate::dequant::{BrickShare, Dequantization};
use crate::gemm::MainLoop;
use crate::pipeline::{Cluster, Consumer, Shared};
use crate::ptx::wgmma::{self, Accumulator};

/// The loop, for one consumer a strip.
pub struct InTurn<D, const STAGES: u32> {
    dequantization: PhantomData<D>,
    ring: RingCursor<STAGES>,
}

impl<D: Dequantization, const STAGES: u32> MainLoop for InTurn<D, STAGES> {
    type Position = RingCursor<STAGES>;

    const START: Self::Position = RingCursor::start();

    #[inline(always)]
    unsafe fn accumulate<A: Accumulator>(
        accumulator: &mut A,
        position: Self::Position,
        segment: Segment,
        shared: Shared,
        shape: TileShape,
        cluster: Cluster,
        consumer: Consumer,
    ) -> Self {
        let place = shared.share_place(consumer);
        let mut ring = position;
        for step in segment.k_begin..segment.k_end {
            let stage = ring.stage();
            let bricks = stage * shape.stage_bytes();
            let tile = warp::broadcast(shared.activation_descriptor(stage));
            // SAFETY: the stage is read between acquiring and releasing it, and its MMAs are done after the wait; the
            // caller vouches for the warpgroup.
            unsafe {
                seq_macro::seq!(SPAN in 0..2 {
                    if SPAN < shape.spans() {
                        shared.acquire_full(stage, SPAN, ring.full_parity());
                        let bricks = bricks + SPAN * STRIP_SPAN_BYTES;
                        let tile = tile + SPAN * wgmma::descriptor_step(shape.span_bytes());
                        let first = BrickShare::load(bricks, place);
                        let second = BrickShare::load_second(bricks, place, shared.stream());
                        let operands = [
                            first.operand::<D, 0>(),
                            first.operand::<D, 1>(),
                            second.operand::<D, 0>(),
                            second.operand::<D, 1>(),
                        ];
                        wgmma::fence();
                        let accumulate = SPAN > 0 || step > segment.k_begin;
                        accumulator.multiply_accumulate_along(operands, tile, accumulate);
                        wgmma::commit();
                        wgmma::wait::<0>();
                    }
                });
                shared.release(stage, cluster, consumer.thread % warp::WARP_SIZE);
            }
            ring = ring.next();
        }
        Self { dequantization: PhantomData, ring }
    }

    #[inline(always)]
    unsafe fn leave(self) -> Self::Position {
        self.ring
    }
}
