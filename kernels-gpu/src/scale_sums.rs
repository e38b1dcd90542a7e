//! The epilogue of int32 sums in memory: scales, adds the bias, rounds and stores.
//!
//! A row-parallel layer needs it after the sums of all GPUs have been added.
//! The operations and their order are those of the GEMM's epilogue, so the results have the same bits.
//! A thread computes eight neighbouring channels of one token.
//! The host twin is `host/src/gpu/scale_sums.rs`, and the arithmetic's is `host/src/output.rs`.

use cuda_std::thread;
use liquidgemm_format::arguments::output_type;
use liquidgemm_format::sums::{SCALE_SUMS_CHANNELS, SCALE_SUMS_THREADS, ScaleSumsArguments};
use seq_macro::seq;

use crate::epilogue::{NO_BIAS, element};
use crate::ptx::grid;
use crate::ptx::hint::no_unroll;
use crate::ptx::integer::{add_bias, pack_bf16, pack_f16, scale};
use crate::ptx::memory::{
    load_constant_x4_if, load_global, load_once_x4_if, store_global, store_global_u16, store_global_x4,
};

/// Four channels' scales and biases.
#[derive(Clone, Copy)]
struct Channels {
    scales: [u32; 4],
    biases: [u32; 4],
}

impl Channels {
    /// Loads those of four channels from `channel` on.
    ///
    /// # Safety
    /// The arguments are valid and aligned, and the channels exist.
    #[inline(always)]
    unsafe fn load(arguments: &ScaleSumsArguments, channel: u32) -> Self {
        let offset = channel as u64 * 4;
        let has_bias = arguments.bias != 0;
        // SAFETY: the caller guarantees the arrays. No launch writes them while this one may run.
        let (scales, biases) = unsafe {
            (
                load_constant_x4_if(true, arguments.channel_scales + offset),
                load_constant_x4_if(has_bias, arguments.bias + offset),
            )
        };
        let biases = if has_bias { biases } else { [NO_BIAS.to_bits(); 4] };
        Self { scales, biases }
    }
}

/// Computes one thread's channels: the body of the kernel.
///
/// Thread blocks have [`SCALE_SUMS_THREADS`] threads, and there are as many as the pieces need.
///
/// # Safety
/// The arguments describe memory as their documentation says.
#[inline(always)]
pub unsafe fn scale_sums(arguments: &ScaleSumsArguments) {
    grid::launch_dependents();
    // The preceding launch may write the sums and the token scales.
    grid::wait_for_dependency();
    let piece = thread::block_idx_x() * SCALE_SUMS_THREADS + thread::thread_idx_x();
    if piece >= arguments.pieces {
        return;
    }
    let token = arguments.by_token_pieces.quotient(piece);
    let channel = (piece - token * arguments.by_token_pieces.divisor()) * SCALE_SUMS_CHANNELS;
    let end = arguments.n.min(channel + SCALE_SUMS_CHANNELS);
    // SAFETY: the caller guarantees the arguments; the token and the channels exist.
    unsafe {
        let token_scale = f32::from_bits(load_global(arguments.token_scales + token as u64 * 4));
        if arguments.is_aligned != 0 && end == channel + SCALE_SUMS_CHANNELS {
            scale_eight(arguments, token, channel, token_scale);
        } else {
            scale_one_by_one(arguments, token, channel, end, token_scale);
        }
    }
}

/// Computes eight channels from `channel` on, with loads and stores of 16 bytes.
///
/// # Safety
/// As for [`scale_sums`]; the channels exist, and the arguments are aligned.
#[inline(always)]
unsafe fn scale_eight(arguments: &ScaleSumsArguments, token: u32, channel: u32, token_scale: f32) {
    let address = sum_address(arguments, token, channel);
    let mut results = [0u32; 8];
    // SAFETY: the caller guarantees the arguments.
    unsafe {
        let low = load_once_x4_if(true, address);
        let high = load_once_x4_if(true, address + 16);
        if arguments.output_type == output_type::I32 {
            store_global_x4(output_address(arguments, token, channel, 4), low);
            store_global_x4(output_address(arguments, token, channel, 4) + 16, high);
            return;
        }
        let first = Channels::load(arguments, channel);
        let second = Channels::load(arguments, channel + 4);
        seq!(I in 0..4 {
            results[I] = result(low[I], first.scales[I], token_scale, first.biases[I]).to_bits();
            results[I + 4] = result(high[I], second.scales[I], token_scale, second.biases[I]).to_bits();
        });
        let [a, b, c, d, e, f, g, h] = results;
        if arguments.output_type == output_type::F32 {
            store_global_x4(output_address(arguments, token, channel, 4), [a, b, c, d]);
            store_global_x4(output_address(arguments, token, channel, 4) + 16, [e, f, g, h]);
            return;
        }
        let is_bf16 = arguments.output_type == output_type::BF16;
        let pack = |low: u32, high: u32| pack(is_bf16, f32::from_bits(low), f32::from_bits(high));
        store_global_x4(
            output_address(arguments, token, channel, 2),
            [pack(a, b), pack(c, d), pack(e, f), pack(g, h)],
        );
    }
}

/// Computes the channels from `channel` up to `end`, one at a time.
///
/// # Safety
/// As for [`scale_sums`]; the channels exist.
#[inline(always)]
unsafe fn scale_one_by_one(
    arguments: &ScaleSumsArguments,
    token: u32,
    mut channel: u32,
    end: u32,
    token_scale: f32,
) {
    while channel < end {
        no_unroll();
        // SAFETY: the caller guarantees the arguments; the channel exists.
        unsafe {
            let sum = load_global(sum_address(arguments, token, channel));
            let channel_scale = element(arguments.channel_scales, channel, arguments.n, 0.0);
            let bias = element(arguments.bias, channel, arguments.n, NO_BIAS);
            let scaled = result(sum, channel_scale.to_bits(), token_scale, bias.to_bits());
            match arguments.output_type {
                output_type::I32 => store_global(output_address(arguments, token, channel, 4), sum),
                output_type::F32 => {
                    store_global(output_address(arguments, token, channel, 4), scaled.to_bits())
                }
                of_half => {
                    let packed = pack(of_half == output_type::BF16, scaled, 0.0);
                    store_global_u16(output_address(arguments, token, channel, 2), packed);
                }
            }
        }
        channel += 1;
    }
}

/// Returns a sum's result before the last rounding. The GEMM's epilogue does the same.
#[inline(always)]
fn result(sum: u32, channel_scale: u32, token_scale: f32, bias: u32) -> f32 {
    add_bias(scale(sum as i32, f32::from_bits(channel_scale), token_scale), f32::from_bits(bias))
}

/// Returns two f32 rounded to bf16 or f16, `low` in the lower half.
#[inline(always)]
fn pack(is_bf16: bool, low: f32, high: f32) -> u32 {
    if is_bf16 { pack_bf16(low, high) } else { pack_f16(low, high) }
}

/// Returns the address of a sum.
#[inline(always)]
fn sum_address(arguments: &ScaleSumsArguments, token: u32, channel: u32) -> u64 {
    arguments.sums + (token as u64 * arguments.sums_stride + channel as u64) * 4
}

/// Returns the address of an output element of `size` bytes.
#[inline(always)]
fn output_address(arguments: &ScaleSumsArguments, token: u32, channel: u32, size: u64) -> u64 {
    arguments.output + (token as u64 * arguments.output_stride + channel as u64) * size
}
