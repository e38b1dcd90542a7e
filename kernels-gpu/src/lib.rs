//! The device side of LiquidGEMM: the kernels that the host crate launches by name.
//!
//! [`gemm`] reads top to bottom in the order in which things happen; [`dequant`], [`pipeline`], [`partials`] and
//! [`epilogue`] are its parts, [`ptx`] the instructions below them.

#![no_std]
#![feature(abi_ptx, asm_experimental_arch)]

pub mod dequant;
pub mod epilogue;
pub mod gemm;
pub mod partials;
pub mod pipeline;
pub mod probes;
pub mod ptx;

use cuda_std::kernel;
use liquidgemm_format::arguments::GemmArguments;
use liquidgemm_format::tile::TileShape;

use ptx::wgmma;

/// The ring's depth for a token tile.
const fn stages(tokens: u32) -> u32 {
    match TileShape::with_tokens(tokens) {
        Some(shape) => shape.stages,
        None => panic!("no such tile shape"),
    }
}

macro_rules! gemm_kernel {
    ($name:ident, $accumulator:ident, $threads:literal, $blocks:literal) => {
        #[doc = concat!("[`gemm::gemm`] for the token tile of [`wgmma::", stringify!($accumulator), "`].")]
        ///
        /// # Safety
        /// See [`gemm::gemm`].
        #[kernel(max_threads = $threads, min_blocks = $blocks)]
        pub unsafe fn $name(#[grid_constant] activations: cuda_std::TensorMap, arguments: GemmArguments) {
            // SAFETY: the launcher vouches for the arguments.
            unsafe {
                gemm::gemm::<
                    wgmma::$accumulator,
                    { stages(<wgmma::$accumulator as wgmma::Accumulator>::TOKENS) },
                >(activations, &arguments)
            }
        }
    };
}

gemm_kernel!(gemm_8, Accumulator8, 320, 2);
gemm_kernel!(gemm_16, Accumulator16, 320, 2);
gemm_kernel!(gemm_32, Accumulator32, 320, 2);
gemm_kernel!(gemm_64, Accumulator64, 320, 1);
gemm_kernel!(gemm_128, Accumulator128, 384, 1);
gemm_kernel!(gemm_256, Accumulator256, 384, 1);

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
