//! The device side of LiquidGEMM: the kernels that the host crate launches by name.
//!
//! [`gemm`] reads top to bottom in the order in which things happen; [`dequant`], [`pipeline`], [`partials`] and
//! [`epilogue`] are its parts; [`ablation`] has what it is compared with. [`wide`] is the same for the widest tile, [`skinny`] is the kernel for few tokens. Below them
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

use dequant::LiquidQuant;
use gemm::StageWalk;
use ptx::wgmma;

/// The shape of so many strips, tokens, halves and blocks that share K.
const fn shape(strips: u32, tokens: u32, halves: u32, split: u32) -> TileShape {
    match TileShape::find(strips, tokens, halves, split) {
        Some(shape) => shape,
        None => panic!("no such tile shape"),
    }
}

macro_rules! gemm_kernel {
    ($name:ident, $strips:literal, $accumulator:ident, $halves:literal, $split:literal, $threads:literal) => {
        #[doc = concat!("[`gemm::gemm`] for ", $strips, " strips and [`wgmma::", stringify!($accumulator), "`].")]
        ///
        /// # Safety
        /// See [`gemm::gemm`].
        #[kernel(max_threads = $threads, min_blocks = 1)]
        pub unsafe fn $name(
            #[grid_constant] activations: cuda_std::TensorMap,
            #[grid_constant] output: cuda_std::TensorMap,
            arguments: GemmArguments,
        ) {
            const TOKENS: u32 = <wgmma::$accumulator as wgmma::Accumulator>::TOKENS;
            const SHAPE: TileShape = shape($strips, TOKENS, $halves, $split);
            const _: () = assert!(SHAPE.threads() == $threads);
            // SAFETY: the launcher vouches for the arguments.
            unsafe {
                gemm::gemm::<
                    wgmma::$accumulator,
                    StageWalk<LiquidQuant, { SHAPE.stages }>,
                    $strips,
                    $halves,
                    $split,
                    { SHAPE.stages },
                >(activations, output, &arguments)
            }
        }
    };
}

gemm_kernel!(gemm_128x8, 2, Accumulator8, 1, 1, 320);
gemm_kernel!(gemm_64x16, 1, Accumulator16, 2, 1, 320);
gemm_kernel!(gemm_128x16, 2, Accumulator16, 1, 1, 320);
gemm_kernel!(gemm_192x16, 3, Accumulator16, 1, 1, 448);
gemm_kernel!(gemm_64x32, 1, Accumulator32, 2, 1, 320);
gemm_kernel!(gemm_128x32, 2, Accumulator32, 1, 1, 320);
gemm_kernel!(gemm_192x32, 3, Accumulator32, 1, 1, 448);
gemm_kernel!(gemm_64x32_split, 1, Accumulator32, 2, 2, 320);
gemm_kernel!(gemm_64x64, 1, Accumulator64, 2, 1, 320);
gemm_kernel!(gemm_128x64, 2, Accumulator64, 1, 1, 320);
gemm_kernel!(gemm_192x64, 3, Accumulator64, 1, 1, 448);
gemm_kernel!(gemm_64x64_split, 1, Accumulator64, 2, 2, 320);
gemm_kernel!(gemm_64x128, 1, Accumulator128, 2, 1, 384);
gemm_kernel!(gemm_128x128, 2, Accumulator128, 1, 1, 384);
gemm_kernel!(gemm_192x128, 3, Accumulator128, 1, 1, 512);
gemm_kernel!(gemm_64x128_split, 1, Accumulator128, 2, 2, 384);
gemm_kernel!(gemm_128x128_split, 2, Accumulator128, 1, 2, 384);
gemm_kernel!(gemm_192x128_split, 3, Accumulator128, 1, 2, 512);
gemm_kernel!(gemm_128x256, 2, Accumulator256, 1, 1, 384);

/// [`wide::gemm`] for 3 strips and [`wgmma::Accumulator256`].
///
/// # Safety
/// See there.
#[kernel(max_threads = 384, min_blocks = 1)]
pub unsafe fn gemm_192x256(
    #[grid_constant] activations: cuda_std::TensorMap,
    #[grid_constant] output: cuda_std::TensorMap,
    arguments: GemmArguments,
) {
    const SHAPE: TileShape = shape(3, 256, 1, 1);
    const _: () = assert!(SHAPE.threads() == 384);
    // SAFETY: the launcher vouches for the arguments.
    unsafe { wide::gemm::<wgmma::Accumulator256, 3, { SHAPE.stages }>(activations, output, &arguments) }
}

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
