//! LiquidGEMM's device crate: the kernels that the host launches by name.
//!
//! It relies on `liquidgemm_format` for everything that host and device must agree on:
//! layouts, tile shapes, schedules and kernel arguments.
//! `cargo xtask ptx` compiles it to PTX. `host/src/gpu/kernels.rs` embeds the library's kernels,
//! and `crates/bench` embeds the probes and the ablation.
//! A kernel and its launcher have the same name:
//! [`gemm`] and `host/src/gpu/gemm.rs`, [`skinny`] and `host/src/gpu/skinny.rs`,
//! [`probes`] and `crates/bench/src/probes.rs`, [`ablation`] and `crates/bench/src/ablation`.
//!
//! | module | contents |
//! |---|---|
//! | [`gemm`] | the tiled GEMM: kernel, producer, main loop, consumer; the consumer-loaded kernel |
//! | [`reduce`] | reduction of a tile's partial sums: warpgroup split-K, cluster split-K, stream-K |
//! | [`epilogue`] | from the int32 sums to the output |
//! | [`skinny`] | the GEMM for few tokens |
//! | [`activations`] | quantization of activations, with norms and gated activation functions |
//! | [`grouped`](mod@grouped) | the GEMM of a mixture of experts |
//! | [`combine`](mod@combine) | the weighted sum of the experts' rows of each token |
//! | [`scale_sums`](mod@scale_sums) | the epilogue of int32 sums in memory |
//! | [`ablation`], [`probes`] | kernels that the bench compares with the library's |
//! | [`dequant`] | dequantization of 4-bit codes to int8 weights |
//! | [`block`] | a thread block's place in its cluster, its shared memory and its pipeline barriers |
//! | [`shape`] | a kernel's tile shape as a type |
//! | [`ptx`] | one function for each PTX instruction |

#![no_std]
#![feature(abi_ptx, asm_experimental_arch)]

pub mod ablation;
pub mod activations;
pub mod block;
pub mod combine;
pub mod dequant;
pub mod epilogue;
pub mod gemm;
pub mod grouped;
pub mod probes;
pub mod ptx;
pub mod reduce;
pub mod scale_sums;
pub mod shape;
pub mod skinny;

use cuda_std::kernel;
use liquidgemm_format::activations::QuantizeArguments;
use liquidgemm_format::arguments::{CombineArguments, GemmArguments, GroupedArguments, SkinnyArguments};
use liquidgemm_format::grouped::{COMBINE_THREADS, box_maps, find_shape};
use liquidgemm_format::skinny::{GROUP_TOKENS, SkinnyShape, THREADS};
use liquidgemm_format::sums::{SCALE_SUMS_THREADS, ScaleSumsArguments};
use liquidgemm_format::tile::TileShape;
use liquidgemm_format::{grouped_shapes, quantize_kernels, skinny_shapes, tile_shapes};

use dequant::LiquidQuant;
use gemm::main_loop::StageWalk;
use gemm::producer::TokenBoxes;
use ptx::wgmma;
use shape::Shape;

/// Returns the tile shape with these strips and tokens that has a kernel.
///
/// `warpgroup_split` is the number of consumers per strip,
/// `cluster_split` the number of thread blocks that share a tile's K.
///
/// # Panics
/// When the crate is compiled, if no kernel has such a shape.
const fn shape(strips: u32, tokens: u32, warpgroup_split: u32, cluster_split: u32) -> TileShape {
    match TileShape::find(strips, tokens, warpgroup_split, cluster_split) {
        Some(shape) => shape,
        None => panic!("no such tile shape"),
    }
}

/// The accumulator of a strip and `TOKENS` tokens.
type AccumulatorOf<const TOKENS: u32> = <wgmma::Tokens<TOKENS> as wgmma::HasAccumulator>::Accumulator;

/// Defines a kernel for each tile shape in the list of [`tile_shapes!`].
macro_rules! gemm_kernels {
    ($($name:ident: $strips:literal, $tokens:literal, $warpgroup_split:literal, $cluster_split:literal, $threads:literal, $module:ident;)*) => {
        $(
            #[doc = concat!("[`", stringify!($module), "::gemm`] for ", $strips, " strips and ", $tokens, " tokens.")]
            ///
            /// # Safety
            /// See the function that it calls.
            #[kernel(max_threads = $threads, min_blocks = 1)]
            pub unsafe fn $name(
                #[grid_constant] activations: cuda_std::TensorMap,
                #[grid_constant] last_activations: cuda_std::TensorMap,
                #[grid_constant] output: cuda_std::TensorMap,
                arguments: GemmArguments,
            ) {
                #[derive(Clone, Copy)]
                struct Tile;
                impl Shape for Tile {
                    const SHAPE: TileShape = shape($strips, $tokens, $warpgroup_split, $cluster_split);
                }
                const _: () = assert!(Tile::SHAPE.threads() == $threads);
                let activations = TokenBoxes { whole: activations, last: last_activations };
                // SAFETY: the launcher guarantees that the arguments are valid.
                unsafe { gemm_kernels!(@$module Tile, $tokens)(activations, output, &arguments) }
            }
        )*
    };
    (@gemm $tile:ident, $tokens:literal) => {
        gemm::gemm::<
            AccumulatorOf<$tokens>,
            StageWalk<LiquidQuant, $tile, { $tile::SHAPE.stages }>,
            { $tile::SHAPE.stages },
        >
    };
    (@consumer_loaded $tile:ident, $tokens:literal) => {
        gemm::consumer_loaded::gemm::<AccumulatorOf<$tokens>, $tile, { $tile::SHAPE.stages }>
    };
}
tile_shapes!(gemm_kernels);

/// Defines a kernel for each shape in the list of [`skinny_shapes!`].
macro_rules! skinny_kernels {
    ($($name:ident: $m16_tiles:literal, $tokens:literal, $stage_bricks:literal, $stages:literal;)*) => {
        $(
            #[doc = concat!("[`skinny::skinny`] for ", $m16_tiles, " m16 tiles and ", $tokens, " tokens.")]
            ///
            /// # Safety
            /// See [`skinny::skinny`].
            #[kernel(max_threads = 256, min_blocks = 2)]
            pub unsafe fn $name(#[grid_constant] activations: cuda_std::TensorMap, arguments: SkinnyArguments) {
                const SHAPE: SkinnyShape = match SkinnyShape::find($m16_tiles, $tokens) {
                    Some(shape) => shape,
                    None => panic!("no such shape"),
                };
                const _: () = assert!(THREADS == 256);
                // SAFETY: the launcher guarantees that the arguments are valid.
                unsafe {
                    skinny::skinny::<
                        $m16_tiles,
                        { ($tokens / GROUP_TOKENS) as usize },
                        { SHAPE.activation_stages },
                        { SHAPE.weight_stages() - 2 },
                    >(activations, &arguments)
                }
            }
        )*
    };
}
skinny_shapes!(skinny_kernels);

/// Defines a kernel for each line in the list of [`quantize_kernels!`].
macro_rules! define_quantize_kernels {
    ($($name:ident: $operation:ident, $element:ident, $kind:ident, $blocks:literal;)*) => {
        $(
            #[doc = concat!("[`activations::", stringify!($kind), "::quantize`]: ", stringify!($operation), ", ", stringify!($element), ", ", $blocks, " thread blocks a row.")]
            ///
            /// # Safety
            /// See the function that it calls.
            #[kernel(max_threads = 1024, min_blocks = 1)]
            pub unsafe fn $name(arguments: QuantizeArguments) {
                // SAFETY: the launcher guarantees that the arguments are valid.
                unsafe {
                    activations::$kind::quantize::<
                        activations::operation::$operation,
                        activations::element::$element,
                        $blocks,
                    >(&arguments)
                }
            }
        )*
    };
}
quantize_kernels!(define_quantize_kernels);

/// Defines a kernel for each shape in the list of [`grouped_shapes!`].
macro_rules! grouped_kernels {
    ($($name:ident: $strips:literal, $tokens:literal, $warpgroup_split:literal, $threads:literal, $maps:literal;)*) => {
        $(
            #[doc = concat!("[`grouped::grouped`] for ", $strips, " strips and ", $tokens, " tokens.")]
            ///
            /// # Safety
            /// See [`grouped::grouped`].
            #[kernel(max_threads = $threads, min_blocks = 1)]
            pub unsafe fn $name(
                #[grid_constant] boxes: [cuda_std::TensorMap; $maps],
                #[grid_constant] output: cuda_std::TensorMap,
                arguments: GroupedArguments,
            ) {
                #[derive(Clone, Copy)]
                struct Tile;
                impl Shape for Tile {
                    const SHAPE: TileShape = match find_shape($strips, $tokens) {
                        Some(shape) => shape,
                        None => panic!("no such shape"),
                    };
                    const SKIPS_ROUNDS: bool = true;
                }
                const _: () = assert!(Tile::SHAPE.threads() == $threads && box_maps(Tile::SHAPE) == $maps);
                // SAFETY: the launcher guarantees that the arguments are valid.
                unsafe {
                    grouped::grouped::<AccumulatorOf<$tokens>, Tile, { Tile::SHAPE.stages }>(boxes, output, &arguments)
                }
            }
        )*
    };
}
grouped_shapes!(grouped_kernels);

/// Adds up the rows of each token's experts: [`combine::combine`].
///
/// # Safety
/// See [`combine::combine`].
#[kernel(max_threads = 128, min_blocks = 1)]
pub unsafe fn combine_rows(arguments: CombineArguments) {
    const _: () = assert!(COMBINE_THREADS == 128);
    // SAFETY: the launcher guarantees that the arguments are valid.
    unsafe { combine::combine(&arguments) }
}

/// Applies the epilogue to int32 sums in memory: [`scale_sums::scale_sums`].
///
/// # Safety
/// See [`scale_sums::scale_sums`].
#[kernel(max_threads = 128, min_blocks = 1)]
pub unsafe fn scale_sums_rows(arguments: ScaleSumsArguments) {
    const _: () = assert!(SCALE_SUMS_THREADS == 128);
    // SAFETY: the launcher guarantees that the arguments are valid.
    unsafe { scale_sums::scale_sums(&arguments) }
}

/// Reads memory as fast as it can: [`probes::stream`].
///
/// # Safety
/// See [`probes::stream`].
#[kernel(max_threads = 32, min_blocks = 1)]
pub unsafe fn probe_stream(source: u64, pieces: u32) {
    // SAFETY: the launcher guarantees that the arguments are valid.
    unsafe { probes::stream(source, pieces) }
}

/// Issues wgmmas as fast as it can: [`probes::mma`].
///
/// # Safety
/// See [`probes::mma`].
#[kernel(max_threads = 256, min_blocks = 1)]
pub unsafe fn probe_mma(sink: u64, rounds: u32) {
    // SAFETY: the launcher guarantees that the arguments are valid.
    unsafe { probes::mma(sink, rounds) }
}

/// Does nothing.
///
/// The host asks the driver how many clusters of this kernel can be resident at a time,
/// if each thread block takes all the shared memory that it can.
///
/// # Safety
/// No requirements.
#[kernel(max_threads = 32, min_blocks = 1)]
pub unsafe fn occupancy() {}
