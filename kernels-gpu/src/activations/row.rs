//! The row kernels: each row has a thread block, or a cluster of eight, and each thread a vector.
//!
//! The code is short, and each thread runs it once, so that few rows are done soon after the launch.
//! Rows of more than 32,768 elements have several vectors for each thread, and are read again for each pass.

use cuda_std::{cluster, thread};
use liquidgemm_format::activations::{
    CLUSTER, CODE_ALIGNMENT, LANES, PIECE, QuantizeArguments, RowScale, VECTOR, inverse_deviation,
    sum_of_squares, sum_of_vector, variance,
};

use super::codes::{adjust, codes};
use super::element::{Element, Vector, each, pack, unpack};
use super::operation::{Device, Operation, Words, center};
use super::reduce::Reduction;
use super::{largest, scale_of_row, smooth, source_of_row};
use crate::ptx::grid;
use crate::ptx::memory::{store_global, store_global_x2};

/// Quantizes a row: the body of the row kernels, which each thread executes.
///
/// # Safety
/// The arguments describe memory as their documentation says.
/// The launch has `BLOCKS` thread blocks for each row.
/// They have a thread for each vector of the row, or `BLOCKS` is 8 and they have 512 threads each.
#[inline(always)]
pub unsafe fn quantize<O: Operation, T: Element, const BLOCKS: u32>(arguments: &QuantizeArguments) {
    grid::launch_dependents();
    let thread = thread::thread_idx_x();
    let (index, first) = if const { BLOCKS == 1 } {
        (thread::block_idx_x(), thread)
    } else {
        let piece = thread / PIECE * BLOCKS + cluster::block_rank();
        (cluster::cluster_idx_x(), piece * PIECE + thread % PIECE)
    };
    let reduction = Reduction::<BLOCKS>::of_thread();
    // SAFETY: the caller guarantees the arguments. All threads of the cluster come past the same barriers.
    unsafe {
        let parameters = load_parameters::<O>(arguments, Vector::new(first, arguments.k));
        if const { BLOCKS > 1 } {
            // The thread blocks of the cluster write to one another's shared memory later.
            cluster::arrive_relaxed();
        }
        grid::wait_for_dependency();
        let source = source_of_row(arguments, index);
        let row = Row::<BLOCKS> {
            arguments,
            first,
            // A row that does not exist is a row of length 0 whose scale is NaN.
            k: if source.is_some() { arguments.k } else { 0 },
            source: source.unwrap_or(0),
        };
        if const { BLOCKS > 1 } {
            cluster::wait();
        }
        row.quantize::<O, T>(index, reduction, parameters, source.is_some());
    }
}

/// Loads the norm's weights and biases of a vector; zeros if there are none.
#[inline(always)]
pub(super) unsafe fn load_parameters<O: Operation>(arguments: &QuantizeArguments, vector: Vector) -> Words {
    let aligned = arguments.aligned != 0;
    let mut parameters = [[0; 4]; 2];
    // SAFETY: the caller guarantees the arguments.
    unsafe {
        if const { O::NORM } {
            parameters[0] = vector.load_constant(arguments.weight, aligned);
        }
        if const { O::CENTERED } {
            if arguments.bias != 0 {
                parameters[1] = vector.load_constant(arguments.bias, aligned);
            }
        }
    }
    parameters
}

/// The two numbers by which LayerNorm changes a row.
#[derive(Clone, Copy)]
struct Statistics {
    mean: f32,
    /// 1 / √(variance + epsilon).
    inverse: f32,
}

/// A thread's part of a row.
#[derive(Clone, Copy)]
struct Row<'a, const BLOCKS: u32> {
    arguments: &'a QuantizeArguments,
    /// The thread's first vector.
    first: u32,
    /// Elements of the row.
    k: u32,
    /// The row's index in the input.
    source: u32,
}

impl<const BLOCKS: u32> Row<'_, BLOCKS> {
    /// Returns the vectors of each thread, at least 1.
    #[inline(always)]
    fn rounds(self) -> u32 {
        if const { BLOCKS == CLUSTER } { self.k.div_ceil(LANES as u32 * VECTOR as u32).max(1) } else { 1 }
    }

    /// Returns the thread's vector of a round.
    #[inline(always)]
    fn vector(self, round: u32) -> Vector {
        Vector::new(self.first + round * LANES as u32, self.k)
    }

    /// Loads the values of a vector. `again` says that this has been done before.
    #[inline(always)]
    unsafe fn load<O: Operation, T: Element>(self, vector: Vector, again: bool) -> [f32; VECTOR] {
        let arguments = self.arguments;
        let aligned = arguments.aligned != 0;
        let input = arguments.input + self.source as u64 * arguments.input_stride;
        // SAFETY: the caller guarantees the row.
        unsafe {
            if const { O::GATED } {
                let words = if arguments.interleaved == 0 {
                    [vector.load(input, aligned), vector.load(input + arguments.k as u64 * 2, aligned)]
                } else {
                    let (first, length, half) = (vector.first * 2, vector.length * 2, VECTOR as u32);
                    let low = Vector { first, length: length.min(half) };
                    let high = Vector { first: first + half, length: length.saturating_sub(half) };
                    [low.load(input, aligned), high.load(input, aligned)]
                };
                return O::values::<T>(arguments, words);
            }
            if const { O::NORM } {
                if arguments.residual != 0 {
                    let residual = arguments.residual + self.source as u64 * arguments.residual_stride;
                    let mut words = vector.load(residual, aligned);
                    if !again {
                        words = add::<T>(vector.load(input, aligned), words);
                        vector.store(residual, aligned, words);
                    }
                    return unpack::<T>(words);
                }
            }
            O::values::<T>(arguments, [vector.load(input, aligned), [0; 4]])
        }
    }

    /// Returns the sum of the row's elements, or with a mean, of the squares of their differences from it.
    ///
    /// `values` are those of the only round, if there is only one. Otherwise they are loaded,
    /// for the first time unless `again` is set.
    #[inline(always)]
    unsafe fn sum<O: Operation, T: Element>(
        self,
        reduction: Reduction<BLOCKS>,
        values: [f32; VECTOR],
        squares_of: Option<f32>,
        again: bool,
    ) -> f32 {
        let rounds = self.rounds();
        let mut sum = 0.0;
        // SAFETY: the caller guarantees the row; the cluster's threads call this together.
        unsafe {
            if rounds == 1 {
                sum += self.part_of_sum(values, self.vector(0), squares_of);
            } else {
                let mut round = 0;
                while round < rounds {
                    let vector = self.vector(round);
                    sum += self.part_of_sum(self.load::<O, T>(vector, again), vector, squares_of);
                    round += 1;
                }
            }
            let number = squares_of.is_some() as u32;
            reduction.give_sum(number, reduction.warp, sum);
            reduction.sum(number, reduction.warps)
        }
    }

    /// Returns a vector's part of a sum.
    #[inline(always)]
    fn part_of_sum(self, values: [f32; VECTOR], vector: Vector, squares_of: Option<f32>) -> f32 {
        match squares_of {
            None => sum_of_vector(values),
            Some(mean) => sum_of_squares::<Device>(center(values, vector.length, mean)),
        }
    }

    /// Applies norm and smoothing to a vector's values.
    #[inline(always)]
    unsafe fn finish<O: Operation, T: Element>(
        self,
        vector: Vector,
        values: [f32; VECTOR],
        parameters: Words,
        statistics: Statistics,
    ) -> [f32; VECTOR] {
        let biased = self.arguments.bias != 0;
        let values =
            if const { O::CENTERED } { center(values, vector.length, statistics.mean) } else { values };
        let values = O::finish::<T>(values, parameters, biased, statistics.inverse);
        // SAFETY: the caller guarantees the arguments.
        unsafe { smooth(self.arguments, vector, values) }
    }

    /// Returns the finished values of a round, loaded once more.
    #[inline(always)]
    unsafe fn reload<O: Operation, T: Element>(self, round: u32, statistics: Statistics) -> [f32; VECTOR] {
        let vector = self.vector(round);
        // SAFETY: the caller guarantees the row.
        unsafe {
            let values = self.load::<O, T>(vector, O::NORM);
            self.finish::<O, T>(vector, values, load_parameters::<O>(self.arguments, vector), statistics)
        }
    }

    /// Stores a vector's codes, unless it lies behind the row's end.
    #[inline(always)]
    unsafe fn store(self, row: u64, round: u32, scale: RowScale, values: [f32; VECTOR]) {
        let vector = self.vector(round);
        if vector.length > 0 {
            let values = if scale.adjusts() { adjust(scale, values) } else { values };
            // SAFETY: the caller guarantees the row, which is 16-byte aligned.
            unsafe { store_global_x2(row + vector.first as u64, codes(scale, values)) };
        }
    }

    /// Quantizes the row and stores it as row `index` of the output.
    #[inline(always)]
    unsafe fn quantize<O: Operation, T: Element>(
        self,
        index: u32,
        reduction: Reduction<BLOCKS>,
        parameters: Words,
        exists: bool,
    ) {
        let arguments = self.arguments;
        let rounds = self.rounds();
        // SAFETY: the caller guarantees the arguments; the cluster's threads call this together.
        unsafe {
            let mut values = [0.0; VECTOR];
            if rounds == 1 {
                values = self.load::<O, T>(self.vector(0), false);
            }
            let mut statistics = Statistics { mean: 0.0, inverse: 0.0 };
            if const { O::CENTERED } {
                statistics.mean = self.sum::<O, T>(reduction, values, None, false) * arguments.inverse_k;
                let squares = self.sum::<O, T>(reduction, values, Some(statistics.mean), true);
                statistics.inverse =
                    inverse_deviation::<Device>(variance(squares, arguments.inverse_k, arguments.epsilon));
            }
            let (mut max, mut squares) = (0.0, 0.0);
            if rounds == 1 {
                if const { O::NORM } {
                    squares += sum_of_squares::<Device>(values);
                }
                values = self.finish::<O, T>(self.vector(0), values, parameters, statistics);
                max = largest(max, values);
            } else {
                let mut round = 0;
                while round < rounds {
                    let vector = self.vector(round);
                    let values = self.load::<O, T>(vector, O::CENTERED);
                    if const { O::NORM } {
                        squares += sum_of_squares::<Device>(values);
                    }
                    let parameters = load_parameters::<O>(arguments, vector);
                    max = largest(max, self.finish::<O, T>(vector, values, parameters, statistics));
                    round += 1;
                }
            }
            let (max, variance) = if O::NORM && !O::CENTERED {
                reduction.give_sum(0, reduction.warp, squares);
                let (squares, max) = reduction.sum_and_max(0, reduction.warps, max.to_bits());
                (max, Some(variance(squares, arguments.inverse_k, arguments.epsilon)))
            } else {
                (reduction.max(max.to_bits()), None)
            };
            let max = if exists { max } else { f32::NAN.to_bits() };
            let scale = scale_of_row(arguments, index, max, variance);
            if self.first == 0 {
                store_global(arguments.scales + index as u64 * 4, scale.get().to_bits());
            }
            // A row that does not exist has codes all the same. Behind a row's end there are zeros.
            let padded = Row { k: arguments.k.next_multiple_of(CODE_ALIGNMENT), ..self };
            let codes = arguments.codes + index as u64 * arguments.code_stride;
            if rounds == 1 {
                padded.store(codes, 0, scale, values);
            }
            let mut round = if rounds == 1 { 1 } else { 0 };
            while round < padded.rounds() {
                let values = if exists { self.reload::<O, T>(round, statistics) } else { [0.0; VECTOR] };
                padded.store(codes, round, scale, values);
                round += 1;
            }
        }
    }
}

/// Returns the rounded sums of two vectors' elements.
#[inline(always)]
pub(super) fn add<T: Element>(input: [u32; 4], residual: [u32; 4]) -> [u32; 4] {
    let (input, residual) = (unpack::<T>(input), unpack::<T>(residual));
    pack::<T>(each(|i| input[i] + residual[i]))
}
