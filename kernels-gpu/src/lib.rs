//! The device side of LiquidGEMM: the kernels that the host crate launches by name.
//!
//! [`gemm`] reads top to bottom in the order in which things happen; [`dequant`], [`pipeline`], [`partials`] and
//! [`epilogue`] are its parts; [`ablation`] has what it is compared with. [`wide`] is the same for the widest tiles, [`skinny`] is the kernel for few tokens. Below them
//! lie the instructions, [`ptx`].

#![no_std]
#![feature(abi_ptx, asm_experimental_arch)]

pub mod ablation;
pub mod dequant;
pub mod epilogue;
pub mod gemm;
pub mod halves;
pub mod partials;
pub mod pipeline;
pub mod probes;
pub mod ptx;
pub mod skinny;
pub mod split;
pub mod wide;

use cuda_std::kernel;
use liquidgemm_format::arguments::{GemmArguments, SkinnyArguments};
use liquidgemm_format::skinny::{GROUP_TOKENS, SkinnyShape, THREADS};
use liquidgemm_format::tile::TileShape;
use liquidgemm_format::tile_shapes;

use dequant::LiquidQuant;
use gemm::{StageWalk, TokenBoxes};
use ptx::wgmma;

/// The shape of so many strips, tokens, halves and blocks that share K.
const fn shape(strips: u32, tokens: u32, halves: u32, split: u32) -> TileShape {
    match TileShape::find(strips, tokens, halves, split) {
        Some(shape) => shape,
        None => panic!("no such tile shape"),
    }
}

/// The accumulator of a tile of so many tokens.
type AccumulatorOf<const TOKENS: u32> = <wgmma::Tokens<TOKENS> as wgmma::HasAccumulator>::Accumulator;

macro_rules! gemm_kernels {
    ($($name:ident: $strips:literal, $tokens:literal, $halves:literal, $split:literal, $threads:literal, $module:ident;)*) => {
        $(
            #[doc = concat!("[`", stringify!($module), "::gemm`] for ", $strips, " strips and ", $tokens, " tokens.")]
            ///
            /// # Safety
            /// See there.
            #[kernel(max_threads = $threads, min_blocks = 1)]
            pub unsafe fn $name(
                #[grid_constant] activations: cuda_std::TensorMap,
                #[grid_constant] last_activations: cuda_std::TensorMap,
                #[grid_constant] output: cuda_std::TensorMap,
                arguments: GemmArguments,
            ) {
                const SHAPE: TileShape = shape($strips, $tokens, $halves, $split);
                const _: () = assert!(SHAPE.threads() == $threads);
                let activations = TokenBoxes { whole: activations, last: last_activations };
                // SAFETY: the launcher vouches for the arguments.
                unsafe { gemm_kernels!(@$module SHAPE, $strips, $tokens, $halves, $split)(activations, output, &arguments) }
            }
        )*
    };
    (@gemm $shape:ident, $strips:literal, $tokens:literal, $halves:literal, $split:literal) => {
        gemm::gemm::<
            AccumulatorOf<$tokens>,
            StageWalk<LiquidQuant, { $shape.stages }>,
            $strips,
            $halves,
            $split,
            { $shape.stages },
        >
    };
    (@wide $shape:ident, $strips:literal, $tokens:literal, $halves:literal, $split:literal) => {
        wide::gemm::<AccumulatorOf<$tokens>, $strips, { $shape.stages }>
    };
}
tile_shapes!(gemm_kernels);

/// The shape for few tokens of so many units and groups of 8 tokens.
const fn skinny_shape(units: u32, groups: u32) -> SkinnyShape {
    match SkinnyShape::find(units, groups * GROUP_TOKENS) {
        Some(shape) => shape,
        None => panic!("no such shape"),
    }
}

macro_rules! skinny_kernel {
    ($name:ident, $units:literal, $groups:literal) => {
        #[doc = concat!("[`skinny::skinny`] for ", $units, " units and ", $groups, " x 8 tokens.")]
        ///
        /// # Safety
        /// See [`skinny::skinny`].
        #[kernel(max_threads = 256, min_blocks = 2)]
        pub unsafe fn $name(#[grid_constant] activations: cuda_std::TensorMap, arguments: SkinnyArguments) {
            const SHAPE: SkinnyShape = skinny_shape($units, $groups);
            const _: () = assert!(THREADS == 256);
            // SAFETY: the launcher vouches for the arguments.
            unsafe {
                skinny::skinny::<$units, $groups, { SHAPE.activation_stages }, { SHAPE.weight_stages() - 2 }>(
                    activations,
                    &arguments,
                )
            }
        }
    };
}

skinny_kernel!(skinny_32x8, 2, 1);
skinny_kernel!(skinny_64x8, 4, 1);
skinny_kernel!(skinny_96x8, 6, 1);
skinny_kernel!(skinny_32x16, 2, 2);
skinny_kernel!(skinny_64x16, 4, 2);
skinny_kernel!(skinny_96x16, 6, 2);
skinny_kernel!(skinny_32x32, 2, 4);

/// [`probes::stream`].
///
/// # Safety
/// See there.
#[kernel(max_threads = 32, min_blocks = 1)]
pub unsafe fn probe_stream(source: u64, pieces: u32) {
    // SAFETY: the launcher vouches for the arguments.
    unsafe { probes::stream(source, pieces) }
}

/// [`probes::mma`].
///
/// # Safety
/// See there.
#[kernel(max_threads = 256, min_blocks = 1)]
pub unsafe fn probe_mma(sink: u64, rounds: u32) {
    // SAFETY: the launcher vouches for the arguments.
    unsafe { probes::mma(sink, rounds) }
}
