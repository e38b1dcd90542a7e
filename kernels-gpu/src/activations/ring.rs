//! The ring kernels: thread blocks that go through the rows, or have one each.
//!
//! While a row is quantized, the next ones are loaded to a ring in shared memory by TMA,
//! or other thread blocks load theirs, so that memory is never idle.
//! A stage holds a row: for each of its vectors, the 16 bytes of one array, or of two:
//! input and residual, or gates and ups.
//! Each thread takes up to two pairs of neighbouring vectors to registers. Then the stage is free for another row.
//! The codes of a pair are 16 bytes.

use cuda_std::{thread, warp};
use liquidgemm_format::activations::{
    BLOCK_REDUCTION_BYTES, HELD_PAIRS, MAX_STAGES, QuantizeArguments, RowRing, VECTOR, inverse_deviation,
    sum_of_squares, sum_of_vector, variance,
};

use super::codes::{adjust, codes};
use super::element::{Element, Vector};
use super::operation::{Device, Operation, Words, center};
use super::reduce::Reduction;
use super::row::{add, load_parameters};
use super::{largest, scale_of_row, source_of_row};
use crate::ptx::memory::{
    load_shared_x4, load_shared_x4_if, store_global, store_global_x4, store_shared_x4_if,
};
use crate::ptx::tma::Policy;
use crate::ptx::{grid, mbarrier, tma};

/// Elements of a vector.
const WHOLE: u32 = VECTOR as u32;

/// Quantizes rows: the body of the ring kernels, which each thread executes.
///
/// # Safety
/// The arguments describe memory as their documentation says, are aligned, and have no smoothing vector.
/// A row's length is a multiple of [`VECTOR`],
/// and a thread block has a thread for every [`HELD_PAIRS`] pairs of vectors.
/// The launch has the shared memory of the ring.
#[inline(always)]
pub unsafe fn quantize<O: Operation, T: Element, const BLOCKS: u32>(arguments: &QuantizeArguments) {
    const { assert!(BLOCKS == 1) };
    grid::launch_dependents();
    let row_step = thread::grid_dim_x();
    let mut reduction = Reduction::<1>::of_thread();
    let rows = Rows { arguments, shared: reduction.shared, vectors: arguments.k / WHOLE };
    // SAFETY: the caller guarantees the arguments. All threads come past the same barriers.
    unsafe {
        if reduction.warp == 0 {
            if reduction.lane == 0 {
                rows.init_barriers();
            }
            warp::sync_warp();
            if const { O::NORM } {
                rows.load_parameters::<O>();
            }
        }
        thread::sync_threads();
        grid::wait_for_dependency();
        let mut index = thread::block_idx_x();
        let mut loaded = index;
        let mut stage = 0;
        while stage < arguments.ring.stages {
            rows.load_if::<O>(reduction.warp == 0, loaded, stage);
            loaded += row_step;
            stage += 1;
        }
        if const { O::NORM } {
            mbarrier::wait(rows.parameters_barrier(), 0);
        }
        let mut place = Place { stage: 0, parity: 0 };
        while index < arguments.m {
            rows.quantize::<O, T>(index, place, reduction, loaded);
            loaded += row_step;
            place = place.next(arguments.ring.stages);
            reduction.next_row();
            index += row_step;
        }
    }
}

/// A position in the ring.
#[derive(Clone, Copy)]
struct Place {
    stage: u32,
    /// The parity of the stage's barrier.
    parity: u32,
}

impl Place {
    #[inline(always)]
    fn next(self, stages: u32) -> Self {
        if self.stage + 1 == stages {
            Self { stage: 0, parity: self.parity ^ 1 }
        } else {
            Self { stage: self.stage + 1, parity: self.parity }
        }
    }
}

/// The rows of a launch.
#[derive(Clone, Copy)]
struct Rows<'a> {
    arguments: &'a QuantizeArguments,
    /// The thread block's shared memory.
    shared: u32,
    /// Vectors of a row.
    vectors: u32,
}

impl Rows<'_> {
    #[inline(always)]
    fn barrier(self, stage: u32) -> u32 {
        self.shared + BLOCK_REDUCTION_BYTES + stage * 8
    }

    #[inline(always)]
    fn parameters_barrier(self) -> u32 {
        self.barrier(MAX_STAGES)
    }

    /// Returns the address of the norm's weights, or with `number` 1 of its biases.
    #[inline(always)]
    fn parameters(self, number: u32) -> u32 {
        self.shared + RowRing::parameters_offset() + number * self.arguments.ring.parameter_bytes
    }

    #[inline(always)]
    fn stage(self, stage: u32) -> u32 {
        let ring = self.arguments.ring;
        self.shared + ring.stages_offset() + stage * ring.stage_bytes
    }

    /// Returns the addresses in a stage of a vector's words in both arrays.
    #[inline(always)]
    fn words<O: Operation>(self, stage: u32, vector: u32) -> [u32; 2] {
        let stage = self.stage(stage);
        if O::GATED && self.arguments.interleaved != 0 {
            return [stage + vector * 32, stage + vector * 32 + 16];
        }
        [stage + vector * 16, stage + (self.vectors + vector) * 16]
    }

    /// Initializes the barriers.
    ///
    /// # Safety
    /// One thread calls it, before all others use the barriers.
    #[inline(always)]
    unsafe fn init_barriers(self) {
        // SAFETY: the barriers lie in the thread block's shared memory.
        unsafe {
            let mut stage = 0;
            while stage <= MAX_STAGES {
                mbarrier::init(self.barrier(stage), 1);
                stage += 1;
            }
            mbarrier::fence_init();
        }
    }

    /// Starts to load the norm's parameters, if shared memory has room for them.
    ///
    /// # Safety
    /// A whole warp calls it, once.
    #[inline(always)]
    unsafe fn load_parameters<O: Operation>(self) {
        let bytes = self.arguments.ring.parameter_bytes;
        let biased = O::CENTERED && self.arguments.bias != 0;
        let arrays = if biased { 2 } else { 1 };
        let barrier = self.parameters_barrier();
        // SAFETY: the caller guarantees the warp; the parameters have as many bytes as the row.
        unsafe {
            mbarrier::arrive_expect(barrier, bytes * arrays);
            if bytes > 0 {
                let policy = Policy::evict_first();
                tma::load_bulk(self.parameters(0), self.arguments.weight, bytes, barrier, policy);
                if biased {
                    tma::load_bulk(self.parameters(1), self.arguments.bias, bytes, barrier, policy);
                }
            }
        }
    }

    /// Starts to load row `index` to a stage, if `is_loader` is set and the row exists.
    ///
    /// # Safety
    /// A whole warp calls it; nobody uses the stage.
    #[inline(always)]
    unsafe fn load_if<O: Operation>(self, is_loader: bool, index: u32, stage: u32) {
        let arguments = self.arguments;
        if !(is_loader & (index < arguments.m)) {
            return;
        }
        let (barrier, bytes) = (self.barrier(stage), self.vectors * 16);
        // Rows that are not evicted first load up to 3 % faster, except where they would evict a norm's parameters.
        let keeps_parameters = O::NORM && arguments.residual == 0;
        let policy = if keeps_parameters { Policy::evict_first() } else { Policy::evict_normal() };
        let [first, second] = self.words::<O>(stage, 0);
        // SAFETY: the caller guarantees the warp and the stage, which has room for the row.
        unsafe {
            let Some(source) = source_of_row(arguments, index) else {
                // Nothing is loaded. The row's scale is NaN whatever the stage holds.
                mbarrier::arrive_expect(barrier, 0);
                return;
            };
            let input = arguments.input + source as u64 * arguments.input_stride;
            if const { O::GATED } {
                // Gates and ups lie behind one another, in either order.
                mbarrier::arrive_expect(barrier, bytes * 2);
                tma::load_bulk(first, input, bytes * 2, barrier, policy);
            } else if O::NORM && arguments.residual != 0 {
                mbarrier::arrive_expect(barrier, bytes * 2);
                tma::load_bulk(first, input, bytes, barrier, policy);
                let residual = arguments.residual + source as u64 * arguments.residual_stride;
                tma::load_bulk(second, residual, bytes, barrier, policy);
            } else {
                mbarrier::arrive_expect(barrier, bytes);
                tma::load_bulk(first, input, bytes, barrier, policy);
            }
        }
    }

    /// Returns the values of a pair in a stage, zeros for vectors from `vectors` on.
    /// The sum with a residual replaces the input there.
    #[inline(always)]
    unsafe fn pair<O: Operation, T: Element>(
        self,
        stage: u32,
        vector: u32,
        vectors: u32,
    ) -> [[f32; VECTOR]; 2] {
        let arguments = self.arguments;
        let has_residual = O::NORM && arguments.residual != 0;
        let mut words = [[[0; 4]; 2]; 2];
        let places = [self.words::<O>(stage, vector), self.words::<O>(stage, vector + 1)];
        let exist = [vector < vectors, vector + 1 < vectors];
        // SAFETY: the caller guarantees the stage. All loads start before the first is needed.
        unsafe {
            seq_macro::seq!(I in 0..2 {
                words[I][0] = load_shared_x4_if(exist[I], places[I][0]).map(i32::cast_unsigned);
                if O::GATED || has_residual {
                    words[I][1] = load_shared_x4_if(exist[I], places[I][1]).map(i32::cast_unsigned);
                }
            });
            if has_residual {
                seq_macro::seq!(I in 0..2 {
                    words[I][0] = add::<T>(words[I][0], words[I][1]);
                    store_shared_x4_if(exist[I], places[I][0], words[I][0]);
                });
            }
        }
        [O::values::<T>(arguments, words[0]), O::values::<T>(arguments, words[1])]
    }

    /// Stores the sums with the residual of row `index`, which this warp has left in a stage.
    ///
    /// Each lane stores other vectors than it has added, so that a warp stores whole lines.
    #[inline(always)]
    unsafe fn store_residual<O: Operation>(self, index: u32, stage: u32, reduction: Reduction<1>) {
        let residual = self.arguments.residual + index as u64 * self.arguments.residual_stride;
        // SAFETY: the caller guarantees the stage.
        unsafe {
            warp::sync_warp();
            seq_macro::seq!(SLOT in 0..4 {
                let first = (reduction.warp + SLOT / 2 * reduction.warps) * 2 * warp::WARP_SIZE;
                let vector = first + SLOT % 2 * warp::WARP_SIZE + reduction.lane;
                if vector < self.vectors {
                    let words = load_shared_x4(self.words::<O>(stage, vector)[0]);
                    store_global_x4(residual + vector as u64 * 16, words);
                }
            });
            // TMA refills what this warp has written.
            mbarrier::fence_async();
        }
    }

    /// Returns the words of a vector's weights and biases, zeros for a vector from `vectors` on.
    #[inline(always)]
    unsafe fn parameters_of<O: Operation>(self, vector: u32, vectors: u32, biased: bool) -> Words {
        let exists = vector < vectors;
        // SAFETY: the parameters have been loaded; the caller guarantees the arguments.
        unsafe {
            if self.arguments.ring.parameter_bytes == 0 {
                let length = if exists { WHOLE } else { 0 };
                return load_parameters::<O>(self.arguments, Vector { first: vector * WHOLE, length });
            }
            let [weights, biases] = [self.parameters(0), self.parameters(1)];
            let weights = load_shared_x4_if(exists, weights + vector * 16);
            let biases = load_shared_x4_if(exists & biased, biases + vector * 16);
            [weights.map(i32::cast_unsigned), biases.map(i32::cast_unsigned)]
        }
    }

    /// Quantizes row `index` in the stage at `place`, and refills the stage with row `next` as soon as it is free.
    ///
    /// # Safety
    /// All threads call it for the same rows.
    #[inline(always)]
    unsafe fn quantize<O: Operation, T: Element>(
        self,
        index: u32,
        place: Place,
        reduction: Reduction<1>,
        next: u32,
    ) {
        const { assert!(HELD_PAIRS == 2) };
        let arguments = self.arguments;
        let (thread, threads) = (thread::thread_idx_x(), thread::block_dim_x());
        let is_loader = reduction.warp == 0;
        // SAFETY: the stage has been loaded after the wait. The caller guarantees the arguments.
        unsafe {
            let exists = source_of_row(arguments, index).is_some();
            // The vectors of a row that does not exist are zeros.
            let vectors = if exists { self.vectors } else { 0 };
            let mut values = [[0.0; VECTOR]; 2 * HELD_PAIRS as usize];
            // The pairs that a warp takes at a time are a group.
            let groups = vectors.div_ceil(2 * warp::WARP_SIZE);
            mbarrier::wait(self.barrier(place.stage), place.parity);
            seq_macro::seq!(ROUND in 0..2 {
                if reduction.warp + ROUND * reduction.warps < groups {
                    let vector = 2 * (thread + ROUND * threads);
                    [values[2 * ROUND], values[2 * ROUND + 1]] =
                        self.pair::<O, T>(place.stage, vector, vectors);
                }
            });
            if O::NORM && arguments.residual != 0 {
                self.store_residual::<O>(index, place.stage, reduction);
            }
            let rounds = [reduction.warp < groups, reduction.warp + reduction.warps < groups];
            let of_rounds = [reduction.warp, reduction.warp + reduction.warps];
            let mut inverse = 0.0;
            if const { O::CENTERED } {
                let sums = [
                    sum_of_vector(values[0]) + sum_of_vector(values[1]),
                    sum_of_vector(values[2]) + sum_of_vector(values[3]),
                ];
                // Not both at a time, which takes more registers.
                seq_macro::seq!(ROUND in 0..2 {
                    if rounds[ROUND] {
                        reduction.give_sum(0, of_rounds[ROUND], sums[ROUND]);
                    }
                });
                let mean = reduction.sum(0, groups) * arguments.inverse_k;
                // Every thread has come past a barrier since it took its vectors.
                self.load_if::<O>(is_loader, next, place.stage);
                seq_macro::seq!(SLOT in 0..4 {
                    let vector = 2 * (thread + SLOT / 2 * threads) + SLOT % 2;
                    values[SLOT] = center(values[SLOT], if vector < vectors { WHOLE } else { 0 }, mean);
                });
            }
            let number = if const { O::CENTERED } { 1 } else { reduction.only_sum() };
            if const { O::NORM } {
                let sums = [
                    sum_of_squares::<Device>(values[0]) + sum_of_squares::<Device>(values[1]),
                    sum_of_squares::<Device>(values[2]) + sum_of_squares::<Device>(values[3]),
                ];
                if rounds[0] {
                    reduction.give_sums(number, of_rounds, rounds[1], sums);
                }
            }
            if const { O::CENTERED } {
                let squares = reduction.sum(number, groups);
                inverse =
                    inverse_deviation::<Device>(variance(squares, arguments.inverse_k, arguments.epsilon));
            }
            let biased = O::CENTERED && arguments.bias != 0;
            let mut max = 0.0;
            seq_macro::seq!(ROUND in 0..2 {
                if rounds[ROUND] {
                    if const { O::NORM } {
                        let vector = 2 * (thread + ROUND * threads);
                        seq_macro::seq!(SIDE in 0..2 {
                            let parameters = self.parameters_of::<O>(vector + SIDE, vectors, biased);
                            values[2 * ROUND + SIDE] =
                                O::finish::<T>(values[2 * ROUND + SIDE], parameters, biased, inverse);
                        });
                    }
                    max = largest(largest(max, values[2 * ROUND]), values[2 * ROUND + 1]);
                }
            });
            let max = if exists { max.to_bits() } else { f32::NAN.to_bits() };
            let (max, variance) = if O::NORM && !O::CENTERED {
                let (squares, max) = reduction.sum_and_max(number, groups, max);
                (max, Some(variance(squares, arguments.inverse_k, arguments.epsilon)))
            } else {
                (reduction.max(max), None)
            };
            if const { !O::CENTERED } {
                self.load_if::<O>(is_loader, next, place.stage);
            }
            let scale = scale_of_row(arguments, index, max, variance);
            if thread == 0 {
                store_global(arguments.scales + index as u64 * 4, scale.get().to_bits());
            }
            if scale.adjusts() {
                seq_macro::seq!(SLOT in 0..4 {
                    values[SLOT] = adjust(scale, values[SLOT]);
                });
            }
            let row = arguments.codes + index as u64 * arguments.code_stride;
            seq_macro::seq!(ROUND in 0..2 {
                let vector = 2 * (thread + ROUND * threads);
                if vector < self.vectors {
                    // The second vector of the last pair may be the codes' padding, which is zeros.
                    let [a, b] = codes(scale, values[2 * ROUND]);
                    let [c, d] = codes(scale, values[2 * ROUND + 1]);
                    store_global_x4(row + (vector * WHOLE) as u64, [a, b, c, d]);
                }
            });
        }
    }
}
