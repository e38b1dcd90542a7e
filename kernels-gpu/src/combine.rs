//! The combine of a mixture of experts: each token's weighted sum of its experts' rows.
//!
//! `out[t] = Σⱼ weight[t, j] · rows[position[t, j]]`, j ascending from an f32 sum of 0.
//! Each product and each sum is one rounded f32 operation, never a fused multiply-add.
//! The last sum is rounded once to the element type.
//! So the result has the same bits as on the CPU (`host/src/cpu/combine.rs`).
//! A thread computes eight neighbouring channels of one token. The host twin is `host/src/gpu/combine.rs`.

use cuda_std::thread;
use liquidgemm_format::arguments::{CombineArguments, output_type};
use liquidgemm_format::grouped::{COMBINE_CHANNELS, COMBINE_THREADS};
use seq_macro::seq;

use crate::ptx::grid;
use crate::ptx::hint::no_unroll;
use crate::ptx::integer::{add_bias, f16_to_f32, multiply, pack_bf16, pack_f16};
use crate::ptx::memory::{
    load_global_if, load_global_u16, load_global_x4_if, store_global_u16, store_global_x4,
};

/// Choices whose rows are loaded at a time.
const TOGETHER: u32 = 4;

/// A token's choice: the address of its row, and its weight.
#[derive(Clone, Copy)]
struct Choice {
    is_valid: bool,
    row: u64,
    weight: f32,
}

impl Choice {
    /// Loads choice `j` of `token`. It is not valid past the last choice, or if the position is out of range.
    ///
    /// # Safety
    /// The arguments are valid, and the token exists.
    #[inline(always)]
    unsafe fn load(arguments: &CombineArguments, token: u32, j: u32) -> Self {
        let exists = j < arguments.top_k;
        let offset = (token as u64 * arguments.top_k as u64 + j as u64) * 4;
        // SAFETY: the caller guarantees the arrays.
        let [position, weight] = unsafe {
            [
                load_global_if(exists, arguments.positions + offset),
                load_global_if(exists, arguments.weights + offset),
            ]
        };
        Self {
            is_valid: exists & (position < arguments.row_count),
            row: arguments.rows + position as u64 * arguments.rows_stride as u64 * 2,
            weight: f32::from_bits(weight),
        }
    }

    /// Returns `sum + weight · value`, or `sum` if the choice is not valid.
    #[inline(always)]
    fn add(self, sum: f32, value: f32) -> f32 {
        // Bias and product are added by the same rounded operation.
        let added = add_bias(sum, multiply(self.weight, value));
        if self.is_valid { added } else { sum }
    }
}

/// Computes one thread's channels: the body of the kernel.
///
/// Thread blocks have [`COMBINE_THREADS`] threads.
/// There are as many thread blocks for each token as its channels need.
///
/// # Safety
/// The arguments describe memory as their documentation says.
#[inline(always)]
pub unsafe fn combine(arguments: &CombineArguments) {
    grid::launch_dependents();
    // The preceding launch may write the rows.
    grid::wait_for_dependency();
    let block = thread::block_idx_x();
    let token = arguments.by_token_blocks.quotient(block);
    let within = block - token * arguments.by_token_blocks.divisor();
    let channel = (within * COMBINE_THREADS + thread::thread_idx_x()) * COMBINE_CHANNELS;
    if channel >= arguments.n {
        return;
    }
    let is_bf16 = arguments.element_type == output_type::BF16;
    let end = arguments.n.min(channel + COMBINE_CHANNELS);
    // SAFETY: the caller guarantees the arguments; the token and the channels exist.
    unsafe {
        if arguments.is_aligned != 0 && end == channel + COMBINE_CHANNELS {
            combine_eight(arguments, token, channel, is_bf16);
        } else {
            combine_one_by_one(arguments, token, channel, end, is_bf16);
        }
    }
}

/// Computes eight channels from `channel` on, with loads and stores of 16 bytes.
///
/// # Safety
/// As for [`combine`]; the channels exist, and every row begins at a multiple of 16 bytes.
#[inline(always)]
unsafe fn combine_eight(arguments: &CombineArguments, token: u32, channel: u32, is_bf16: bool) {
    let mut sums = [0.0f32; 8];
    let mut j = 0;
    while j < arguments.top_k {
        no_unroll();
        // SAFETY: the caller guarantees the arguments; a valid choice's row exists.
        unsafe {
            seq!(I in 0..4 {
                const _: () = assert!(TOGETHER == 4);
                let choice~I = Choice::load(arguments, token, j + I);
            });
            seq!(I in 0..4 {
                let words~I = load_global_x4_if(choice~I.is_valid, choice~I.row + channel as u64 * 2);
            });
            seq!(I in 0..4 {
                seq!(W in 0..4 {
                    let [low, high] = halves(words~I[W] as u32, is_bf16);
                    sums[2 * W] = choice~I.add(sums[2 * W], low);
                    sums[2 * W + 1] = choice~I.add(sums[2 * W + 1], high);
                });
            });
        }
        j += TOGETHER;
    }
    let pack = |low: f32, high: f32| if is_bf16 { pack_bf16(low, high) } else { pack_f16(low, high) };
    let words =
        [pack(sums[0], sums[1]), pack(sums[2], sums[3]), pack(sums[4], sums[5]), pack(sums[6], sums[7])];
    // SAFETY: the element is inside the output, and aligned as the caller guarantees.
    unsafe { store_global_x4(output(arguments, token, channel), words) };
}

/// Computes the channels from `channel` up to `end`, one at a time.
///
/// # Safety
/// As for [`combine`]; the channels exist.
#[inline(always)]
unsafe fn combine_one_by_one(
    arguments: &CombineArguments,
    token: u32,
    mut channel: u32,
    end: u32,
    is_bf16: bool,
) {
    while channel < end {
        no_unroll();
        let mut sum = 0.0;
        let mut j = 0;
        while j < arguments.top_k {
            no_unroll();
            // SAFETY: the caller guarantees the arguments; a valid choice's row exists.
            unsafe {
                let choice = Choice::load(arguments, token, j);
                if choice.is_valid {
                    let half = load_global_u16(choice.row + channel as u64 * 2);
                    let [value, _] = halves(half, is_bf16);
                    sum = choice.add(sum, value);
                }
            }
            j += 1;
        }
        let packed = if is_bf16 { pack_bf16(sum, 0.0) } else { pack_f16(sum, 0.0) };
        // SAFETY: the element is inside the output.
        unsafe { store_global_u16(output(arguments, token, channel), packed) };
        channel += 1;
    }
}

/// Returns the address of an output element.
#[inline(always)]
fn output(arguments: &CombineArguments, token: u32, channel: u32) -> u64 {
    arguments.output + (token as u64 * arguments.output_stride as u64 + channel as u64) * 2
}

/// Returns the lower and the upper half of a word as f32, which is exact.
#[inline(always)]
fn halves(word: u32, is_bf16: bool) -> [f32; 2] {
    if is_bf16 {
        [f32::from_bits(word << 16), f32::from_bits(word & 0xFFFF_0000)]
    } else {
        [f16_to_f32(word), f16_to_f32(word >> 16)]
    }
}
