//! The ablation: kernels that do without one of the library's ideas each, to be measured beside it (the paper's figure
//! 13). Tiles, schedules, producers, partial sums and epilogues are the library's, and so are the results, bit for bit.
//!
//! | kernel | dequantization | overlap |
//! |---|---|---|
//! | `ablation_baseline` | QServe's: multiply, then subtract byte by byte | none: [`InTurn`] |
//! | `ablation_liquidquant` | [`LiquidQuant`] | none |
//! | `ablation_excp` | [`LiquidQuant`] | warpgroups that dequantize and warpgroups that multiply: [`explicit`] |
//! | `ablation_qserve_imfp` | QServe's | the library's own |
//!
//! The last arm, [`LiquidQuant`] with the library's overlap, is the library's kernel. All write bf16 without bias. The
//! host twin is `host/src/gpu/ablation.rs`.

pub mod explicit;
pub mod in_turn;

use cuda_std::kernel;
use liquidgemm_format::ablation::{self, ExplicitShape};
use liquidgemm_format::arguments::{GemmArguments, output_type};
use liquidgemm_format::tile::TileShape;

use crate::dequant::{Dequantization, LiquidQuant};
use crate::gemm::{StageWalk, TokenBoxes, gemm};
use crate::ptx::integer::multiply_subtract_bytes;
use crate::ptx::wgmma::{Accumulator, Accumulator16, Accumulator64, Accumulator128};
use in_turn::InTurn;

/// `q · s − z`, as QServe dequantizes. The pair's second byte is z.
#[derive(Clone, Copy)]
pub struct QServe;

impl Dequantization for QServe {
    #[inline(always)]
    fn four_weights(codes: u32, scale: u32, second: u32) -> u32 {
        multiply_subtract_bytes(codes, scale, second)
    }
}

/// The tile of so many tokens.
const fn tile(tokens: u32) -> TileShape {
    match ablation::tile(tokens) {
        Some(tile) => tile,
        None => panic!("the ablation has no such tile"),
    }
}

/// The arguments, with what is constant in these kernels as constants, so that they hold no code for anything else.
#[inline(always)]
fn bf16_without_bias(arguments: GemmArguments) -> GemmArguments {
    GemmArguments { output_type: output_type::BF16, bias: 0, ..arguments }
}

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
            const SHAPE: TileShape = tile($accumulator::TOKENS);
            const _: () = assert!(SHAPE.threads() == $threads);
            let arguments = bf16_without_bias(arguments);
            let activations = TokenBoxes { whole: activations, last: last_activations };
            // SAFETY: the launcher vouches for the arguments.
            unsafe {
                gemm::<
                    $accumulator,
                    $main_loop<$dequantization, { SHAPE.stages }>,
                    { SHAPE.strips },
                    { SHAPE.halves },
                    { SHAPE.split },
                    { SHAPE.stages },
                >(activations, output, &arguments)
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

macro_rules! explicit_kernel {
    ($name:ident, $accumulator:ident, $threads:literal) => {
        /// [`explicit::gemm`] with [`LiquidQuant`].
        ///
        /// # Safety
        /// See there; the output is bf16 without bias.
        #[kernel(max_threads = $threads, min_blocks = 1)]
        pub unsafe fn $name(
            #[grid_constant] activations: cuda_std::TensorMap,
            #[grid_constant] last_activations: cuda_std::TensorMap,
            #[grid_constant] output: cuda_std::TensorMap,
            arguments: GemmArguments,
        ) {
            const SHAPE: ExplicitShape = ExplicitShape::of(tile($accumulator::TOKENS));
            const _: () = assert!(SHAPE.threads() == $threads);
            let arguments = bf16_without_bias(arguments);
            let activations = TokenBoxes { whole: activations, last: last_activations };
            // SAFETY: the launcher vouches for the arguments.
            unsafe {
                explicit::gemm::<$accumulator, LiquidQuant, { SHAPE.tile.stages }, { SHAPE.buffers }>(
                    activations,
                    output,
                    &arguments,
                )
            }
        }
    };
}

explicit_kernel!(ablation_excp_128x16, Accumulator16, 576);
explicit_kernel!(ablation_excp_128x64, Accumulator64, 576);
explicit_kernel!(ablation_excp_128x128, Accumulator128, 640);
