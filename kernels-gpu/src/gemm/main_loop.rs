//! The main loop of a consumer: for each k-iteration of a segment, dequantizes in registers and multiplies.
//!
//! The trait [`MainLoop`] lets the ablation put other loops in the place of the library's, [`StageWalk`].

use core::marker::PhantomData;

use cuda_std::warp;
use liquidgemm_format::ring::RingCursor;
use liquidgemm_format::schedule::Segment;
use liquidgemm_format::stream::WeightStream;
use liquidgemm_format::tile::{K_TILE_BRICKS, STRIP_K_TILE_BYTES};

use crate::block::{Block, Consumer};
use crate::dequant::{AFragment, Dequantization, FragmentAddress};
use crate::ptx::wgmma;
use crate::ptx::wgmma::{Accumulator, DESCRIPTOR_K32};
use crate::shape::Shape;

/// A consumer's main loop over one segment.
///
/// The library's is [`StageWalk`]; the ablation compares it with others.
pub trait MainLoop: Sized {
    /// The shape of the tiles.
    type Shape: Shape;

    /// A position in the loop's rings, kept from one segment to the next.
    type Position: Copy;

    /// The position before the first segment.
    const START: Self::Position;

    /// Computes a segment's sums in `accumulator`.
    ///
    /// The first products replace the accumulator's contents. The last MMAs may still run on return.
    ///
    /// # Safety
    /// The whole warpgroup calls it.
    /// The ring's barriers are initialized, and its producers fill it for the same segment.
    unsafe fn accumulate<A: Accumulator>(
        accumulator: &mut A,
        position: Self::Position,
        segment: Segment,
        block: Block<Self::Shape>,
        consumer: Consumer,
    ) -> Self;

    /// Waits for the last MMAs and releases the stages that they read.
    /// Returns the position for the next segment.
    ///
    /// # Safety
    /// The whole warpgroup calls it.
    unsafe fn leave(self) -> Self::Position;
}

/// The library's main loop.
///
/// Each K-tile is one wgmma group of four MMAs,
/// or with warpgroup split-K of the two MMAs that are this consumer's.
/// While the group runs, the codes of the next K-tile are loaded,
/// and dequantized into operand registers of their own.
/// The loop body has two K-tiles, so that the two sets of operand registers alternate.
pub struct StageWalk<D, S, const STAGES: u32> {
    dequantization: PhantomData<D>,
    block: Block<S>,
    consumer: Consumer,
    /// Address of the thread's A fragment in stage 0, in the consumer's first brick.
    place: FragmentAddress,
    /// The stage to multiply next.
    ring: RingCursor<STAGES>,
    /// The A fragments of the next K-tile's bricks.
    /// With warpgroup split-K, twice the A fragment of the consumer's one brick.
    shares: [AFragment; K_TILE_BRICKS as usize],
    /// K-iterations left, including the current one.
    iterations: u32,
    /// The stage whose MMAs may still run; `STAGES` if there is none.
    unreleased: u32,
}

impl<D: Dequantization, S: Shape, const STAGES: u32> MainLoop for StageWalk<D, S, STAGES> {
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
        let shape = S::SHAPE;
        // SAFETY: a stage is read between its acquisition and its release,
        // and it is released when its last wgmma is done; the caller guarantees the warpgroup.
        unsafe {
            let iterations = segment.k_end - segment.k_begin;
            let mut walk = Self::enter(position, iterations, block, consumer);
            // The loop has a single exit, so that warp-uniform values stay in uniform registers.
            if shape.k_tiles() == 1 && walk.iterations % 2 == 1 {
                walk.iteration(accumulator, 0);
            }
            while walk.iterations > 0 {
                walk.iteration(accumulator, 0);
                walk.iteration(accumulator, shape.k_tiles() - 1);
            }
            walk
        }
    }

    #[inline(always)]
    unsafe fn leave(self) -> Self::Position {
        // SAFETY: all wgmma groups are done after the wait.
        unsafe {
            wgmma::wait::<0>();
            self.block.shared.release(
                self.unreleased,
                self.block.cluster,
                self.consumer.thread % warp::WARP_SIZE,
            );
        }
        self.ring
    }
}

impl<D: Dequantization, S: Shape, const STAGES: u32> StageWalk<D, S, STAGES> {
    /// Waits for the segment's first K-tile and loads its A fragments.
    #[inline(always)]
    unsafe fn enter(ring: RingCursor<STAGES>, iterations: u32, block: Block<S>, consumer: Consumer) -> Self {
        let shared = block.shared;
        let place = shared.fragment_address(consumer);
        // SAFETY: the stage is acquired before it is read.
        let shares = unsafe {
            shared.acquire_full(ring.stage(), 0, ring.full_parity());
            Self::load(ring, 0, place, shared.stream())
        };
        Self {
            dequantization: PhantomData,
            block,
            consumer,
            place,
            ring,
            shares,
            iterations,
            unreleased: STAGES,
        }
    }

    /// Loads the consumer's A fragments of a K-tile of a stage.
    #[inline(always)]
    unsafe fn load(
        ring: RingCursor<STAGES>,
        k_tile: u32,
        place: FragmentAddress,
        stream: WeightStream,
    ) -> [AFragment; K_TILE_BRICKS as usize] {
        let bricks = ring.stage() * S::SHAPE.stage_bytes() + k_tile * STRIP_K_TILE_BYTES;
        // SAFETY: the caller has acquired the stage.
        unsafe {
            let first = AFragment::load(bricks, place);
            if const { S::SHAPE.warpgroup_split == 1 } {
                [first, AFragment::load_second(bricks, place, stream)]
            } else {
                [first, first]
            }
        }
    }

    /// Multiplies one K-tile of a stage.
    ///
    /// An MMA with a register operand holds its warp until it has read the operand,
    /// and so until the MMAs before it are nearly done.
    /// Everything with a latency is therefore started before the MMAs:
    /// the next K-tile's codes arrive while the MMAs hold the warp.
    #[inline(always)]
    unsafe fn iteration<A: Accumulator>(&mut self, accumulator: &mut A, k_tile: u32) {
        let (ring, shape) = (self.ring, S::SHAPE);
        let ends = k_tile + 1 == shape.k_tiles();
        let (next, next_k_tile) = if ends { (ring.next(), 0) } else { (ring, k_tile + 1) };
        // SAFETY: the barriers are initialized.
        // The test comes early, so that its result is there when it is needed.
        let next_is_full =
            unsafe { self.block.shared.is_full(next.stage(), next_k_tile, next.full_parity()) };
        // The descriptor is the same for all threads of the warp, but the compiler cannot see it.
        // The broadcast tells it, so that it keeps descriptors in uniform registers.
        let tile = warp::broadcast(self.block.shared.activation_descriptor(ring.stage()));
        let tile = tile + k_tile * wgmma::descriptor_step(shape.k_tile_bytes());
        let tile = tile + self.consumer.k_index * 2 * DESCRIPTOR_K32;
        let operands = self.operands();
        let before = self.unreleased;
        // The segment's first products replace the accumulator's contents.
        let accumulate = k_tile > 0 || before != STAGES;
        if ends {
            self.unreleased = ring.stage();
            self.ring = next;
            self.iterations -= 1;
        }
        let goes_on = !ends || self.iterations > 0;
        // SAFETY: the stages are acquired before they are read.
        // The registers of operands are not written before their wgmma group is done.
        // After the wait the preceding group is done,
        // and with the first K-tile of a stage so are all MMAs of the stage before.
        unsafe {
            if next_is_full && goes_on {
                self.shares = Self::load(next, next_k_tile, self.place, self.block.shared.stream());
            }
            wgmma::fence();
            if const { S::SHAPE.warpgroup_split == 1 } {
                accumulator.multiply_accumulate_along(operands, tile, accumulate);
            } else {
                accumulator.multiply_accumulate_along([operands[0], operands[1]], tile, accumulate);
            }
            if !A::COMMITS {
                wgmma::commit();
            }
            if !next_is_full && goes_on {
                self.block.shared.acquire_full(next.stage(), next_k_tile, next.full_parity());
                self.shares = Self::load(next, next_k_tile, self.place, self.block.shared.stream());
            }
            wgmma::wait::<1>();
            if k_tile == 0 && before != STAGES {
                self.block.shared.release(before, self.block.cluster, self.consumer.thread % warp::WARP_SIZE);
            }
        }
    }

    /// Returns the A operands of the K-tile's MMAs.
    /// With warpgroup split-K, twice the consumer's two operands.
    #[inline(always)]
    fn operands(&self) -> [[u32; 4]; 4] {
        let [first, second] = self.shares;
        let operands = [first.operand::<D, 0>(), first.operand::<D, 1>()];
        if S::SHAPE.warpgroup_split == 1 {
            [operands[0], operands[1], second.operand::<D, 0>(), second.operand::<D, 1>()]
        } else {
            [operands[0], operands[1], operands[0], operands[1]]
        }
    }
}
