//! The ablation: variants of the GEMM that each lack one of the library's ideas (the paper's figure 13).
//!
//! Tiles, schedules, producers, reductions and epilogues are the library's,
//! and so are the results, bit for bit.
//! `liquidgemm_format::ablation` has the tiles that have kernels.
//! The host twin, which measures the variants, is `crates/bench/src/ablation`.
//!
//! | kernel | dequantization | overlap |
//! |---|---|---|
//! | `ablation_baseline` | QServe's: multiply, then subtract byte by byte | none: [`InTurn`] |
//! | `ablation_liquidquant` | [`LiquidQuant`] | none |
//! | `ablation_excp` | [`LiquidQuant`] | warpgroups that dequantize, others that multiply: [`explicit`] |
//! | `ablation_qserve_imfp` | QServe's | the library's own: [`StageWalk`] |
//!
//! The last variant, [`LiquidQuant`] with the library's overlap, is the library's own kernel.
//! All kernels write bf16 without bias.

pub mod explicit;
pub mod in_turn;

use cuda_std::kernel;
use liquidgemm_format::ablation::{self, ExplicitShape};
use liquidgemm_format::arguments::{GemmArguments, output_type};
use liquidgemm_format::tile::TileShape;

use crate::dequant::{Dequantization, LiquidQuant};
use crate::gemm::gemm;
use crate::gemm::main_loop::StageWalk;
use crate::gemm::producer::TokenBoxes;
use crate::ptx::integer::multiply_subtract_bytes;
use crate::ptx::wgmma::{Accumulator, Accumulator16, Accumulator64, Accumulator128};
use crate::shape::Shape;
use in_turn::InTurn;

/// QServe's dequantization, `q · s − z`. The pair's second byte is z.
#[derive(Clone, Copy)]
pub struct QServe;

impl Dequantization for QServe {
    #[inline(always)]
    fn four_weights(codes: u32, scale: u32, second: u32) -> u32 {
        multiply_subtract_bytes(codes, scale, second)
    }
}

/// Returns the tile of the ablation's kernels with this many tokens.
///
/// # Panics
/// When the crate is compiled, if the ablation has no such tile.
const fn tile(tokens: u32) -> TileShape {
    match ablation::tile(tokens) {
        Some(tile) => tile,
        None => panic!("the ablation has no such tile"),
    }
}

/// Returns the arguments with output type and bias as constants.
///
/// The compiler then drops the code for other types and for a bias.
#[inline(always)]
fn bf16_without_bias(arguments: GemmArguments) -> GemmArguments {
    GemmArguments { output_type: output_type::BF16, bias: 0, ..arguments }
}

/// Defines a kernel of [`gemm()`] with a main loop, a dequantization and an accumulator.
macro_rules! ablation_kernel {
    ($name:ident, $accumulator:ident, $threads:literal, $main_loop:ident<$dequantization:ident>) => {
        #[doc = concat!("[`gemm()`] with [`", stringify!($main_loop), "`] and [`", stringify!($dequantization), "`].")]
        ///
        /// # Safety
        /// See [`gemm()`]; the output is bf16 without bias.
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
                const SHAPE: TileShape = tile($accumulator::TOKENS);
            }
            const STAGES: u32 = Tile::SHAPE.stages;
            const _: () = assert!(Tile::SHAPE.threads() == $threads);
            let arguments = bf16_without_bias(arguments);
            let activations = TokenBoxes { whole: activations, last: last_activations };
            // SAFETY: the launcher guarantees that the arguments are valid.
            unsafe {
                gemm::<$accumulator, $main_loop<$dequantization, Tile, STAGES>, STAGES>(activations, output, &arguments)
            }
        }
    };
}

ablation_kernel!(ablation_baseline_128x16, Accumulator16, 320, InTurn<QServe>);
ablation_kernel!(ablation_baseline_128x64, Accumulator64, 320, InTurn<QServe>);
ablation_kernel!(ablation_baseline_128x128, Accumulator128, 384, InTurn<QServe>);
ablation_kernel!(ablation_liquidquant_128x16, Accumulator16, 320, InTurn<LiquidQuant>);
ablation_kernel!(ablation_liquidquant_128x64, Accumulator64, 320, InTurn<LiquidQuant>);
ablation_kernel!(ablation_liquidquant_128x128, Accumulator128, 384, InTurn<LiquidQuant>);
ablation_kernel!(ablation_qserve_imfp_128x16, Accumulator16, 320, StageWalk<QServe>);
ablation_kernel!(ablation_qserve_imfp_128x64, Accumulator64, 320, StageWalk<QServe>);
ablation_kernel!(ablation_qserve_imfp_128x128, Accumulator128, 384, StageWalk<QServe>);

/// Defines a kernel of the explicit pipeline with an accumulator.
macro_rules! explicit_kernel {
    ($name:ident, $accumulator:ident, $threads:literal) => {
        /// [`explicit::gemm`] with [`LiquidQuant`].
        ///
        /// # Safety
        /// See [`explicit::gemm`]; the output is bf16 without bias.
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
                const SHAPE: TileShape = EXPLICIT.tile;
            }
            const EXPLICIT: ExplicitShape = ExplicitShape::of(tile($accumulator::TOKENS));
            const _: () = assert!(EXPLICIT.threads() == $threads);
            let arguments = bf16_without_bias(arguments);
            let activations = TokenBoxes { whole: activations, last: last_activations };
            // SAFETY: the launcher guarantees that the arguments are valid.
            unsafe {
                explicit::gemm::<
                    $accumulator,
                    LiquidQuant,
                    Tile,
                    { EXPLICIT.tile.stages },
                    { EXPLICIT.buffers },
                >(activations, output, &arguments)
            }
        }
    };
}

explicit_kernel!(ablation_excp_128x16, Accumulator16, 576);
explicit_kernel!(ablation_excp_128x64, Accumulator64, 576);
explicit_kernel!(ablation_excp_128x128, Accumulator128, 640);
