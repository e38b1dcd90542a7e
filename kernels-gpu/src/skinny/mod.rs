//! The W4A8 GEMM for few tokens: thread blocks own channels over the whole K, and their warps share K.
//!
//! The design minimizes the time from the end of the preceding launch to the end of this one.
//! So there are no producers, no barriers between warps before the end of a pass,
//! and no partial sums in global memory.
//! Each warp keeps two rings of its own full: weights by its lanes' `cp.async`, activations by TMA.
//! It multiplies with `mma`, whose A operand is a lane's A fragment.
//! Weights are loaded before the preceding launch has ended, activations after it.
//! At the end of a pass the warps' sums are added through shared memory.
//!
//! `liquidgemm_format::skinny` has the shapes, each thread block's m16 tiles and the layout of shared memory.
//! The host twin is `host/src/gpu/skinny.rs`.

mod activations;
mod epilogue;
mod main_loop;
mod weights;

use activations::ActivationRing;
use cuda_std::{TensorMap, shared, thread, warp};
use epilogue::{Scales, finish};
use liquidgemm_format::arguments::SkinnyArguments;
use liquidgemm_format::skinny::{GROUP_TOKENS, SkinnyShape, WARPS};
use main_loop::multiply_k_tile;
use weights::WeightRing;

use crate::ptx::{grid, mbarrier, tma};

/// A warp's sums of a pass, for each m16 tile and each group of 8 tokens, in `mma`'s order.
type Sums<const M16_TILES: usize, const GROUPS: usize> = [[[i32; 4]; GROUPS]; M16_TILES];

/// Returns the shape of a kernel with `m16_tiles` m16 tiles and `groups` groups of 8 tokens.
///
/// # Panics
/// When the crate is compiled, if no kernel has such a shape.
const fn shape(m16_tiles: usize, groups: usize) -> SkinnyShape {
    match SkinnyShape::find(m16_tiles as u32, groups as u32 * GROUP_TOKENS) {
        Some(shape) => shape,
        None => panic!("no such shape"),
    }
}

/// Computes the thread block's m16 tiles: the body of the kernels, which each thread executes.
///
/// A pass has up to `M16_TILES` m16 tiles and `GROUPS` groups of 8 tokens.
/// The activation ring has `STAGES` stages.
/// When a warp multiplies a stage of weights, `PENDING` groups of `cp.async` may be pending:
/// two fewer than the weight ring has stages.
///
/// # Safety
/// The arguments describe memory as their documentation says.
/// `activations` is a map of int8 `[m, k]` with 128-byte swizzle
/// and boxes of [`K_TILE`](liquidgemm_format::tile::K_TILE) × m tokens.
#[inline(always)]
pub unsafe fn skinny<const M16_TILES: usize, const GROUPS: usize, const STAGES: u32, const PENDING: u32>(
    activations: *const TensorMap,
    arguments: &SkinnyArguments,
) {
    // Launch dependents now:
    // their launch latency is longer than the delay that their first weight loads cause here.
    grid::launch_dependents();
    // SAFETY: the map is a kernel parameter.
    unsafe { tma::prefetch_map(activations) };
    let shape = const { shape(M16_TILES, GROUPS) };
    let place = Place::of_thread();
    let (first_m16_tile, end_m16_tile) = arguments.runs.of_block(thread::block_idx_x());
    let k_tiles = arguments.weights.stream.k_tiles;
    // SAFETY: the caller guarantees the arguments; whole warps execute this.
    unsafe {
        let mut weights =
            WeightRing::<M16_TILES, GROUPS>::new(arguments, place, [first_m16_tile, end_m16_tile]);
        for _ in 0..shape.weight_stages() {
            weights.fill();
        }
        place.init_barriers(shape);
        // Until the preceding launch has ended, it may use activations, scales and output.
        grid::wait_for_dependency();
        let mut activations =
            ActivationRing::<GROUPS, STAGES>::new(activations, arguments, shape, place, k_tiles);
        let mut pass = first_m16_tile;
        while pass < end_m16_tile {
            let m16_tiles = arguments.runs.pass.min(end_m16_tile - pass);
            activations.begin_pass();
            let scales = Scales::fetch(arguments, shape, pass);
            let mut sums: Sums<M16_TILES, GROUPS> = [[[0; 4]; GROUPS]; M16_TILES];
            let mut k_tile = place.warp;
            while k_tile < k_tiles {
                multiply_k_tile::<M16_TILES, GROUPS, STAGES, PENDING>(
                    &mut sums,
                    &mut weights,
                    &mut activations,
                );
                k_tile += WARPS;
            }
            scales.store_scales(shape, place);
            finish::<M16_TILES, GROUPS>(&sums, arguments, place, pass, m16_tiles);
            pass += m16_tiles;
        }
    }
}

/// A thread's position in its thread block, and the thread block's shared memory.
#[derive(Clone, Copy)]
struct Place {
    shared: u32,
    warp: u32,
    lane: u32,
}

impl Place {
    /// Returns the position of the calling thread.
    #[inline(always)]
    fn of_thread() -> Self {
        let thread = thread::thread_idx_x();
        Self {
            shared: shared::dynamic_shared_mem(),
            warp: warp::broadcast(thread / warp::WARP_SIZE),
            lane: thread % warp::WARP_SIZE,
        }
    }

    /// Returns the thread's index in its thread block.
    #[inline(always)]
    fn thread(self) -> u32 {
        self.warp * warp::WARP_SIZE + self.lane
    }

    /// Returns the address of the warp's activation ring.
    #[inline(always)]
    fn activations(self, shape: SkinnyShape) -> u32 {
        self.shared + self.warp * shape.activation_ring_bytes()
    }

    /// Returns the address of the warp's weight ring.
    #[inline(always)]
    fn weights(self, shape: SkinnyShape) -> u32 {
        self.shared + shape.weights_offset() + self.warp * shape.weight_ring_bytes()
    }

    /// Returns the full barrier of a stage of the warp's activation ring.
    #[inline(always)]
    fn barrier(self, shape: SkinnyShape, stage: u32) -> u32 {
        self.shared + shape.barriers_offset() + (self.warp * shape.activation_stages + stage) * 8
    }

    /// Initializes the warp's barriers.
    ///
    /// # Safety
    /// The whole warp calls it, once.
    #[inline(always)]
    unsafe fn init_barriers(self, shape: SkinnyShape) {
        // One lane initializes them all: one lane for each would compile to a loop over the lanes.
        if self.lane == 0 {
            let mut stage = 0;
            while stage < shape.activation_stages {
                // SAFETY: the warp's barrier below orders this before every use;
                // no other warp uses these barriers.
                unsafe { mbarrier::init(self.barrier(shape, stage), 1) };
                stage += 1;
            }
            // SAFETY: this thread initialized the barriers.
            unsafe { mbarrier::fence_init() };
        }
        warp::sync_warp();
    }
}
