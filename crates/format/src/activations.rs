//! The arithmetic of activation quantization, and the kernels that do it.
//!
//! A row of activations goes through an operation (none, a norm, or a gated activation function)
//! and becomes int8 codes with one f32 scale.
//! `host/src/cpu/activations.rs` and `kernels-gpu/src/activations` compute the same bits.
//! Both do what this page says, operation by operation.
//! Each is one correctly rounded f32 operation, a fused multiply-add only where it is written.
//!
//! RMSNorm is `(x · weight) / √(variance + epsilon)`. A row's values have the divisor in common,
//! so it does not change their codes: they are those of `x · weight`, and the divisor goes into the scale
//! ([`RowScale`]). Sum of squares and largest magnitude need one pass.
//!
//! Sums over a row are formed in a fixed order.
//! The row is divided into vectors of [`VECTOR`] elements. Behind the row's end, elements are zero.
//! 1. [`sum_of_vector`] adds up each vector.
//! 2. Vector `v` belongs to lane `v mod LANES`, which adds the sums of its vectors to 0 in the order of `v`.
//! 3. The lanes are added in pairs, neighbours first: lanes 2i and 2i + 1, then the results in the same way.
//!
//! There are two kinds of kernels. The **row** kernels give each row a thread block, or a cluster,
//! in which each thread holds a vector. They start fast, and take any address and length.
//! The **ring** kernels load rows to shared memory by TMA, and suit many rows.
//! Where several rows fit an SM, each has a thread block; longer ones go through persistent thread blocks,
//! which load the next rows meanwhile. Divisions by a smoothing vector would take too many of their registers.
//!
//! If a cluster has a row, its vectors come in **pieces** of [`PIECE`], which go round robin to the thread blocks.

use crate::rounding::{ROUNDING_SHIFT, scale_of};

/// Elements of a vector: 16 bytes of bf16 or f16.
pub const VECTOR: usize = 8;
/// The lanes of a row's sum.
pub const LANES: usize = 4096;
/// Vectors of a piece.
pub const PIECE: u32 = 256;
/// Thread blocks of a cluster that share a row.
pub const CLUSTER: u32 = 8;
/// The most threads of a thread block.
pub const MAX_THREADS: u32 = 1024;
/// The most groups of vectors whose sums a thread block adds up: each warp gives the sum of a group.
pub const MAX_GROUPS: u32 = 64;
/// Shared memory for the sums of a row's groups: two arrays with a word for each group.
pub const GROUP_SUMS_BYTES: u32 = 2 * MAX_GROUPS * 4;
/// Shared memory for the largest magnitudes of the warps, for two rows in turn.
pub const WARP_MAXIMA_BYTES: u32 = 2 * (MAX_THREADS / 32) * 4;
/// Shared memory for what thread blocks of a cluster tell each other: for two rows in turn,
/// three arrays with a word for each piece.
pub const EXCHANGE_BYTES: u32 = 2 * 3 * (LANES as u32 / PIECE) * 4;
/// Shared memory that reductions of a thread block take.
pub const BLOCK_REDUCTION_BYTES: u32 = GROUP_SUMS_BYTES + WARP_MAXIMA_BYTES;
/// Shared memory that reductions of a cluster take.
pub const REDUCTION_BYTES: u32 = BLOCK_REDUCTION_BYTES + EXCHANGE_BYTES;
/// The most pairs of neighbouring vectors that a thread of a ring kernel holds.
pub const HELD_PAIRS: u32 = 2;
/// The most stages of a ring.
pub const MAX_STAGES: u32 = 4;
/// Shared memory for a ring's barriers: one for each stage, and one for the norm's parameters.
pub const RING_BARRIERS_BYTES: u32 = 8 * 16;
/// The largest magnitude of an activation's code.
pub const CODE_LIMIT: f32 = 127.0;
/// Rows of codes are padded with zeros to a multiple of this many bytes, the alignment that TMA needs.
pub const CODE_ALIGNMENT: u32 = 16;
/// The largest magnitude for which [`exp`] is defined.
pub const EXP_LIMIT: f32 = 87.0;

/// Calls the macro `$callback` with every kernel that quantizes activations.
///
/// This is the only list of them.
/// Each line is `entry: operation, element type, kind, thread blocks of a row;`.
/// The entry is `quantize_<operation>_<type>_<kind><thread blocks>`.
/// The names of operations, types and kinds are those of `kernels-gpu/src/activations`.
#[macro_export]
macro_rules! quantize_kernels {
    ($callback:ident) => {
        $callback! {
            quantize_plain_bf16_row1: Plain, Bf16, row, 1;
            quantize_plain_bf16_row8: Plain, Bf16, row, 8;
            quantize_plain_bf16_ring1: Plain, Bf16, ring, 1;
            quantize_plain_f16_row1: Plain, F16, row, 1;
            quantize_plain_f16_row8: Plain, F16, row, 8;
            quantize_plain_f16_ring1: Plain, F16, ring, 1;
            quantize_rms_norm_bf16_row1: RmsNorm, Bf16, row, 1;
            quantize_rms_norm_bf16_row8: RmsNorm, Bf16, row, 8;
            quantize_rms_norm_bf16_ring1: RmsNorm, Bf16, ring, 1;
            quantize_rms_norm_f16_row1: RmsNorm, F16, row, 1;
            quantize_rms_norm_f16_row8: RmsNorm, F16, row, 8;
            quantize_rms_norm_f16_ring1: RmsNorm, F16, ring, 1;
            quantize_layer_norm_bf16_row1: LayerNorm, Bf16, row, 1;
            quantize_layer_norm_bf16_row8: LayerNorm, Bf16, row, 8;
            quantize_layer_norm_bf16_ring1: LayerNorm, Bf16, ring, 1;
            quantize_layer_norm_f16_row1: LayerNorm, F16, row, 1;
            quantize_layer_norm_f16_row8: LayerNorm, F16, row, 8;
            quantize_layer_norm_f16_ring1: LayerNorm, F16, ring, 1;
            quantize_silu_bf16_row1: Silu, Bf16, row, 1;
            quantize_silu_bf16_row8: Silu, Bf16, row, 8;
            quantize_silu_bf16_ring1: Silu, Bf16, ring, 1;
            quantize_silu_f16_row1: Silu, F16, row, 1;
            quantize_silu_f16_row8: Silu, F16, row, 8;
            quantize_silu_f16_ring1: Silu, F16, ring, 1;
            quantize_gelu_tanh_bf16_row1: GeluTanh, Bf16, row, 1;
            quantize_gelu_tanh_bf16_row8: GeluTanh, Bf16, row, 8;
            quantize_gelu_tanh_bf16_ring1: GeluTanh, Bf16, ring, 1;
            quantize_gelu_tanh_f16_row1: GeluTanh, F16, row, 1;
            quantize_gelu_tanh_f16_row8: GeluTanh, F16, row, 8;
            quantize_gelu_tanh_f16_ring1: GeluTanh, F16, ring, 1;
        }
    };
}

/// An operation on a row, as the list of kernels names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowOperation {
    /// None.
    Plain,
    /// RMSNorm, after the addition of a residual if there is one.
    RmsNorm,
    /// LayerNorm, after the addition of a residual if there is one.
    LayerNorm,
    /// SiLU of a gate, times an up.
    Silu,
    /// GELU of a gate in the tanh form, times an up.
    GeluTanh,
}

/// The element type of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ElementType {
    /// bfloat16.
    Bf16,
    /// IEEE half precision.
    F16,
}

macro_rules! entries {
    ($($entry:ident: $operation:ident, $element:ident, $kind:ident, $blocks:literal;)*) => {
        /// The names of all entry points, in the order of [`QuantizeLaunch::kernel`].
        pub const QUANTIZE_ENTRIES: [&str; [$($blocks),*].len()] = [$(stringify!($entry)),*];
    };
}
quantize_kernels!(entries);

/// The stages of a ring and the shared memory of its kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowRing {
    /// Stages, each with a row.
    pub stages: u32,
    /// Bytes of a stage.
    pub stage_bytes: u32,
    /// Bytes of each of the norm's parameters; 0 if shared memory has no room for them.
    pub parameter_bytes: u32,
    /// The norm's parameters: its weight, and its bias if it has one.
    pub parameters: u32,
}

impl RowRing {
    /// Returns the offset of the norm's parameters in shared memory.
    #[inline(always)]
    #[must_use]
    pub const fn parameters_offset() -> u32 {
        BLOCK_REDUCTION_BYTES + RING_BARRIERS_BYTES
    }

    /// Returns the offset of the first stage in shared memory.
    #[inline(always)]
    #[must_use]
    pub const fn stages_offset(self) -> u32 {
        Self::parameters_offset() + self.parameters * self.parameter_bytes
    }

    /// Returns the shared memory of a thread block.
    #[must_use]
    pub const fn shared_bytes(self) -> u32 {
        self.stages_offset() + self.stages * self.stage_bytes
    }
}

/// The launch of a kernel that quantizes rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QuantizeLaunch {
    /// The kernel's index in [`QUANTIZE_ENTRIES`].
    pub kernel: usize,
    /// Thread blocks of a row: 1, or [`CLUSTER`].
    pub row_blocks: u32,
    /// Thread blocks of the grid.
    pub blocks: u32,
    /// Threads of a thread block.
    pub threads: u32,
    /// Dynamic shared memory of a thread block.
    pub shared_bytes: u32,
    /// The ring; without stages for a row kernel.
    pub ring: RowRing,
}

/// Rows to quantize, as the choice of their kernel depends on them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rows {
    /// What happens to a row.
    pub operation: RowOperation,
    /// The element type.
    pub element: ElementType,
    /// Rows, at most 2²⁸.
    pub m: u32,
    /// Elements of a row of the result.
    pub k: u32,
    /// Whether the input is added to a residual.
    pub has_residual: bool,
    /// Whether rows, parameters and strides are multiples of 16 bytes.
    pub aligned: bool,
    /// Whether there is a smoothing vector.
    pub smooths: bool,
}

impl Rows {
    /// Kernels with the same operation and element type, one after another in the list.
    const KINDS: usize = 3;

    /// Returns the index of the kernel of a kind, 0 for row and 2 for ring kernels.
    const fn kernel(self, kind: usize, row_blocks: u32) -> usize {
        let of_blocks = if row_blocks == 1 { 0 } else { 1 };
        (self.operation as usize * 2 + self.element as usize) * Self::KINDS + kind + of_blocks
    }

    /// Returns the launch on a GPU with this many SMs.
    #[must_use]
    pub const fn launch(self, multiprocessors: u32) -> QuantizeLaunch {
        match self.ring(multiprocessors) {
            Some(launch) => launch,
            None => self.row(),
        }
    }

    /// Returns the vectors of a row, with those of the codes' padding.
    const fn vectors(self) -> u32 {
        self.k.div_ceil(CODE_ALIGNMENT) * CODE_ALIGNMENT / VECTOR as u32
    }

    /// Returns the launch of a row kernel.
    #[must_use]
    pub const fn row(self) -> QuantizeLaunch {
        let vectors = self.vectors();
        let row_blocks = if vectors > MAX_THREADS { CLUSTER } else { 1 };
        let threads = if row_blocks > 1 { LANES as u32 / CLUSTER } else { vectors.div_ceil(32) * 32 };
        QuantizeLaunch {
            kernel: self.kernel(0, row_blocks),
            row_blocks,
            blocks: self.m * row_blocks,
            threads,
            shared_bytes: REDUCTION_BYTES,
            ring: RowRing { stages: 0, stage_bytes: 0, parameter_bytes: 0, parameters: 0 },
        }
    }

    /// Returns whether row kernels are the faster ones: for as many rows as run at a time, or nearly so.
    const fn are_few(self, multiprocessors: u32) -> bool {
        let row = self.row();
        if row.row_blocks == 1 {
            return row.blocks.saturating_mul(row.threads) <= 2 * multiprocessors * MAX_THREADS;
        }
        // Two thread blocks fit an SM, but whole clusters leave some places empty.
        let wave = multiprocessors * 7 / 4;
        let most = match self.operation {
            // A ring's thread blocks start sooner than clusters, which counts where there is little else to do.
            RowOperation::Plain if self.k <= 16_384 => multiprocessors,
            // With fewer rows than SMs, a ring's thread block computes a whole row, and others nothing.
            RowOperation::Silu | RowOperation::GeluTanh if self.k >= 14_336 => 2 * wave,
            RowOperation::RmsNorm | RowOperation::LayerNorm if self.has_residual && self.k >= 16_384 => {
                2 * wave
            }
            _ => wave,
        };
        row.blocks <= most
    }

    /// Returns the launch of a ring kernel, if there is one and it should be faster.
    #[must_use]
    pub const fn ring(self, multiprocessors: u32) -> Option<QuantizeLaunch> {
        if !self.aligned
            || self.smooths
            || !self.k.is_multiple_of(VECTOR as u32)
            || self.are_few(multiprocessors)
        {
            return None;
        }
        if let Some(launch) = self.block_for_each_row() {
            return Some(launch);
        }
        // Half of an SM leaves room for the thread blocks of the next launch, which start meanwhile.
        // Gates take the most instructions, so with few thread blocks the more threads share a row's.
        // Without a norm there is little to start with, and a residual needs all memory for its loads.
        let candidates: &[(Part, u32)] = match self.operation {
            RowOperation::Silu | RowOperation::GeluTanh => {
                &[(Part::Half, 1), (Part::Half, 2), (Part::Whole, 1)]
            }
            RowOperation::Plain => &[],
            _ if self.has_residual => &[],
            _ => &[(Part::Half, 2)],
        };
        let mut index = 0;
        while index < candidates.len() {
            let (part, held) = candidates[index];
            if let Some(launch) = self.persistent_ring(part, held, multiprocessors)
                && launch.ring.stages > 1
            {
                return Some(launch);
            }
            index += 1;
        }
        self.persistent_ring(Part::Whole, HELD_PAIRS, multiprocessors)
    }

    /// Returns the ring without stages, for threads that hold up to `held` pairs of vectors, and their number.
    const fn empty_ring(self, held: u32) -> (RowRing, u32) {
        let vectors = self.k / VECTOR as u32;
        let (vector_bytes, parameters) = match self.operation {
            RowOperation::Plain => (16, 0),
            RowOperation::Silu | RowOperation::GeluTanh => (32, 0),
            RowOperation::RmsNorm => (if self.has_residual { 32 } else { 16 }, 1),
            RowOperation::LayerNorm => (if self.has_residual { 32 } else { 16 }, 2),
        };
        let ring = RowRing {
            stages: 0,
            stage_bytes: vectors * vector_bytes,
            parameter_bytes: vectors * 16,
            parameters,
        };
        (ring, vectors.div_ceil(2 * held).next_multiple_of(32))
    }

    const fn ring_launch(self, ring: RowRing, blocks: u32, threads: u32) -> QuantizeLaunch {
        QuantizeLaunch {
            kernel: self.kernel(2, 1),
            row_blocks: 1,
            blocks: if self.m < blocks { self.m } else { blocks },
            threads,
            shared_bytes: ring.shared_bytes(),
            ring,
        }
    }

    /// Returns the launch with a thread block for each row, and a ring of one stage,
    /// if enough of them are resident to keep the memory busy while others compute.
    ///
    /// Each thread block loads the norm's parameters anew, which costs more the longer they are.
    const fn block_for_each_row(self) -> Option<QuantizeLaunch> {
        const LEAST_THREADS: u32 = 64;
        /// Of the threads that an SM can have.
        const LEAST_RESIDENT_THREADS: u32 = 864;

        let (ring, threads) = self.empty_ring(HELD_PAIRS);
        let ring = RowRing { stages: 1, ..ring };
        let threads = if threads < LEAST_THREADS { LEAST_THREADS } else { threads };
        let resident = RING_THREADS / threads;
        let least_resident = if ring.parameters > 0 && !self.has_residual { 4 } else { 2 };
        if resident < least_resident
            || resident * threads < LEAST_RESIDENT_THREADS
            || ring.shared_bytes() + SYSTEM_SHARED_BYTES > SM_SHARED_BYTES / resident
        {
            return None;
        }
        Some(self.ring_launch(ring, self.m, threads))
    }

    /// Returns the launch of persistent thread blocks whose threads hold up to `held` pairs of vectors,
    /// and which take this part of each SM. The ring has at least two stages if possible.
    const fn persistent_ring(self, part: Part, held: u32, multiprocessors: u32) -> Option<QuantizeLaunch> {
        /// With fewer threads a row takes too long.
        const LEAST_THREADS: u32 = 128;

        let parts = match part {
            Part::Whole => 1,
            Part::Half => 2,
        };
        let (mut ring, threads) = self.empty_ring(held);
        let threads = if threads < LEAST_THREADS { LEAST_THREADS } else { threads };
        let mut resident = RING_THREADS / parts / threads;
        while ring.stages < 2 && resident > 0 {
            let room = SM_SHARED_BYTES / parts / resident - SYSTEM_SHARED_BYTES;
            if resident == 1 && ring.stages_offset() + 2 * ring.stage_bytes > room {
                ring.parameter_bytes = 0;
            }
            ring.stages = room.saturating_sub(ring.stages_offset()) / ring.stage_bytes;
            resident -= 1;
        }
        if ring.stages == 0 {
            return None;
        }
        if ring.stages > MAX_STAGES {
            ring.stages = MAX_STAGES;
        }
        Some(self.ring_launch(ring, multiprocessors * (resident + 1), threads))
    }
}

/// Shared memory of an SM.
const SM_SHARED_BYTES: u32 = 233_472;
/// What the system takes of it for each thread block.
const SYSTEM_SHARED_BYTES: u32 = 1024;
/// Threads of an SM with the registers that the ring kernels need.
const RING_THREADS: u32 = 1024;

/// The part of an SM that a launch's thread blocks take.
#[derive(Clone, Copy)]
enum Part {
    Whole,
    Half,
}

/// Arguments of the kernels that quantize activations. Pointers are device addresses.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct QuantizeArguments {
    /// The input's rows, of bf16 or f16.
    pub input: u64,
    /// Bytes from one row of the input to the next.
    pub input_stride: u64,
    /// u32 `[m]`: the row of the input from which each row of the output is made, or 0 for all rows in order.
    pub rows: u64,
    /// `[m, k]` of the input's type, added to the input and overwritten with the sum, or 0. Norms only.
    pub residual: u64,
    /// Bytes from one row of the residual to the next.
    pub residual_stride: u64,
    /// The norm's weight, `[k]` of the input's type.
    pub weight: u64,
    /// The LayerNorm's bias, `[k]` of the input's type, or 0.
    pub bias: u64,
    /// f32 `[k]`, by which values are divided before they are quantized, or 0.
    pub smoothing: u64,
    /// f32 `[m]`: scales to quantize with, or 0.
    pub given_scales: u64,
    /// int8 `[m, k]`. Rows start at multiples of 16 bytes.
    pub codes: u64,
    /// Bytes from one row of the codes to the next, a multiple of 16.
    pub code_stride: u64,
    /// f32 `[m]`.
    pub scales: u64,
    /// Rows of the output.
    pub m: u32,
    /// Elements of a row of the output.
    pub k: u32,
    /// Rows of the input, if `rows` is not 0.
    pub input_rows: u32,
    /// Nonzero if gate and up elements alternate. Otherwise a row has all gates and then all ups.
    pub interleaved: u32,
    /// Nonzero if all rows of input and residual, the norm's parameters and the smoothing vector
    /// lie at multiples of 16 bytes.
    pub aligned: u32,
    /// 1 / k, rounded.
    pub inverse_k: f32,
    /// Added to the variance by norms.
    pub epsilon: f32,
    /// The scale of all rows. If it is negative, each row has its own.
    pub static_scale: f32,
    /// The ring; without stages for a row kernel.
    pub ring: RowRing,
}

/// The activation function of a gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Gate {
    /// SiLU: x · σ(x), where σ(x) = 1 / (1 + e⁻ˣ).
    ///
    /// |x| is taken as at most 87 in e⁻ˣ, so σ is at least 1.6 · 10⁻³⁸.
    Silu,
    /// GELU in the tanh form, which is x · σ(√(8/π) · (x + 0.044715 · x³)).
    GeluTanh,
}

impl Gate {
    /// Both functions.
    pub const ALL: [Gate; 2] = [Gate::Silu, Gate::GeluTanh];
}

/// Correctly rounded operations on f32 that `core` lacks, or that one side can do in a faster way.
pub trait Arithmetic {
    /// Returns `rn(a · b + c)`.
    fn multiply_add(a: f32, b: f32, c: f32) -> f32;

    /// Returns `rn(√x)`.
    fn square_root(x: f32) -> f32;

    /// Returns `rn(1 / x)` for x from 2⁻⁷⁰ to 2¹²⁶.
    fn reciprocal(x: f32) -> f32;
}

/// Returns `rn(max / 127)`, the scale of a row with the largest magnitude `max`, without a division.
///
/// `max` is from 2⁻⁹⁰ to the largest f32.
/// The quotient is rounded correctly: an approximate one, and a correction by the exact remainder
/// (P. Markstein, IBM J. Res. Dev. 34, 1990).
#[inline(always)]
#[must_use]
pub fn scale_of_max<A: Arithmetic>(max: f32) -> f32 {
    const INVERSE: f32 = 1.0 / CODE_LIMIT;
    let near = max * INVERSE;
    A::multiply_add(A::multiply_add(-CODE_LIMIT, near, max), INVERSE, near)
}

/// How the values of a row become codes, and the scale of the codes.
///
/// A value v gets the code `clamp(rne(v · r), −127, 127)`, where r is the rounded reciprocal of the row's **step**,
/// and `rne` rounds the exact product to nearest, ties to even.
/// The step is `max|v| / 127`.
/// What the codes represent is v divided by the row's **deviation**, `√(variance + epsilon)` after RMSNorm, else 1.
/// So the scale is `step / deviation`.
/// With a given scale, the step is `scale · deviation`.
///
/// A row with a value, deviation, step or scale that is not finite has the scale NaN and codes 0,
/// and so has one with the deviation 0. A step of 0 gives codes 0.
#[derive(Clone, Copy, Debug)]
pub struct RowScale {
    scale: f32,
    /// 1 / (step · factor).
    reciprocal: f32,
    /// The power of two by which values are multiplied, so that the reciprocal is far from the limits of f32.
    factor: f32,
    /// The magnitude to which values are clipped; infinite if they need not even be multiplied.
    most: f32,
}

impl RowScale {
    /// Returns how the values of a row become codes, with the row's own scale or the `given` one.
    ///
    /// `max` has the bits of the largest magnitude, more than those of infinity if a value is NaN.
    /// `variance` is the square of the deviation, if that is not 1.
    #[inline(always)]
    #[must_use]
    pub fn new<A: Arithmetic>(max: u32, variance: Option<f32>, given: Option<f32>) -> Self {
        // With a step from 2⁻⁵⁷ to 2⁵⁷ and a deviation from 2⁻⁵⁰ to 2⁵⁰ nothing can overflow, underflow or be clipped.
        const LEAST: u32 = f32::to_bits(1.0 / (1u128 << 50) as f32);
        const MOST: u32 = f32::to_bits((1u128 << 64) as f32);
        const BOUND: f32 = (1u128 << 100) as f32;
        let is_usual = match variance {
            Some(variance) => (1.0 / BOUND..=BOUND).contains(&variance),
            None => true,
        };
        if given.is_some() | !is_usual | (max.wrapping_sub(LEAST) > MOST - LEAST) {
            return Self::of_any::<A>(max, variance, given);
        }
        let step = scale_of_max::<A>(f32::from_bits(max));
        let scale = match variance {
            Some(variance) => step / A::square_root(variance),
            None => step,
        };
        Self { scale, reciprocal: A::reciprocal(step), factor: 1.0, most: f32::INFINITY }
    }

    /// [`new`](Self::new) for values of any magnitude.
    #[inline(always)]
    fn of_any<A: Arithmetic>(max: u32, variance: Option<f32>, given: Option<f32>) -> Self {
        /// 2⁸⁰, by which a step outside of 2^±64 is multiplied or divided.
        const FAR: f32 = (1u128 << 80) as f32;
        const RANGE: f32 = (1u128 << 64) as f32;

        let deviation = variance.map_or(1.0, A::square_root);
        let (step, scale) = match given {
            Some(scale) => (scale * deviation, scale),
            None => {
                let step = scale_of(f32::from_bits(max), CODE_LIMIT);
                (step, step / deviation)
            }
        };
        let is_finite = max < f32::INFINITY.to_bits()
            && scale.is_finite()
            && step.is_finite()
            && deviation > 0.0
            && deviation < f32::INFINITY;
        if !is_finite || step == 0.0 {
            let scale = if is_finite { scale } else { f32::NAN };
            return Self { scale, reciprocal: 1.0, factor: 1.0, most: 0.0 };
        }
        let magnitude = step.abs();
        let factor = if magnitude < 1.0 / RANGE {
            FAR
        } else if magnitude > RANGE {
            1.0 / FAR
        } else {
            1.0
        };
        // Between the largest code and where rounding would leave it.
        let most = (magnitude * (CODE_LIMIT + 0.25)).min(f32::MAX);
        Self { scale, reciprocal: A::reciprocal(step * factor), factor, most }
    }

    /// Returns the scale.
    #[inline(always)]
    #[must_use]
    pub fn get(self) -> f32 {
        self.scale
    }

    /// Returns whether values must be [adjusted](Self::adjust) before they are [rounded](Self::round).
    #[inline(always)]
    #[must_use]
    pub fn adjusts(self) -> bool {
        self.most < f32::INFINITY
    }

    /// Clips a value to the codes' range, or to 0 if all codes are 0, and multiplies it by the power of two.
    ///
    /// The multiplication is exact, except for values whose codes are 0.
    #[inline(always)]
    #[must_use]
    pub fn adjust(self, value: f32) -> f32 {
        value.max(-self.most).min(self.most) * self.factor
    }

    /// Returns a value's code in the low 8 bits.
    #[inline(always)]
    #[must_use]
    pub fn round<A: Arithmetic>(self, value: f32) -> u32 {
        A::multiply_add(value, self.reciprocal, ROUNDING_SHIFT).to_bits()
    }
}

/// Returns the sum of a vector: neighbours first, in pairs.
#[inline(always)]
#[must_use]
pub fn sum_of_vector(values: [f32; VECTOR]) -> f32 {
    let [a, b, c, d, e, f, g, h] = values;
    ((a + b) + (c + d)) + ((e + f) + (g + h))
}

/// Returns the sum of a vector's squares: those of the even elements, and those of the odd ones,
/// each by fused multiply-adds in order.
#[inline(always)]
#[must_use]
pub fn sum_of_squares<A: Arithmetic>(values: [f32; VECTOR]) -> f32 {
    let [a, b, c, d, e, f, g, h] = values;
    let add = |sum, x| A::multiply_add(x, x, sum);
    add(add(add(a * a, c), e), g) + add(add(add(b * b, d), f), h)
}

/// Returns eˣ for x from −[`EXP_LIMIT`] to [`EXP_LIMIT`], with a relative error of at most 2⁻²¹ for |x| < 16.
///
/// With t = x · log₂ e and n = rn(t), it is 2ⁿ · 2^(t − n).
/// The polynomial for the second factor was fitted for the least relative error, 2⁻²³·¹.
/// That of log₂ e in f32 adds |x| · 2⁻²⁵·⁷.
#[inline(always)]
#[must_use]
pub fn exp<A: Arithmetic>(x: f32) -> f32 {
    const LOG2_E: f32 = core::f32::consts::LOG2_E;
    let shifted = A::multiply_add(x, LOG2_E, ROUNDING_SHIFT);
    let n = shifted - ROUNDING_SHIFT;
    let f = A::multiply_add(x, LOG2_E, -n);
    let p = A::multiply_add(1.330_060_5e-3, f, 9.669_691e-3);
    let p = A::multiply_add(p, f, 5.550_558_5e-2);
    let p = A::multiply_add(p, f, 0.240_222_83);
    let p = A::multiply_add(p, f, core::f32::consts::LN_2);
    let power = A::multiply_add(p, f, 1.0);
    // The low bits of `shifted` are n. Adding n to the exponent multiplies by 2ⁿ.
    f32::from_bits(power.to_bits().wrapping_add(shifted.to_bits() << 23))
}

/// Returns the activation function of a gate, `x · σ(z)`, where z depends on the function (see [`Gate`]).
///
/// `−z` is clamped to ±[`EXP_LIMIT`], so σ is at least 1.6 · 10⁻³⁸.
/// The operations are `e = exp(−z)`, `1 + e`, the reciprocal, and the product with x.
/// The result is not finite exactly if x is not.
#[inline(always)]
#[must_use]
pub fn activate<A: Arithmetic>(gate: Gate, x: f32) -> f32 {
    // √(8/π) and its product with 0.044715.
    const LINEAR: f32 = 1.595_769_2;
    const CUBIC: f32 = 0.071_354_814;
    let minus_z = match gate {
        Gate::Silu => -x,
        Gate::GeluTanh => -(x * A::multiply_add(x * x, CUBIC, LINEAR)),
    };
    // Not `clamp`, which takes more instructions because it keeps NaN. Here x keeps it.
    #[expect(clippy::manual_clamp)]
    let e = exp::<A>(minus_z.max(-EXP_LIMIT).min(EXP_LIMIT));
    x * A::reciprocal(1.0 + e)
}

/// Returns a norm's variance with epsilon, of the sum of squares and the rounded `1 / k`.
#[inline(always)]
#[must_use]
pub fn variance(sum: f32, inverse_k: f32, epsilon: f32) -> f32 {
    sum * inverse_k + epsilon
}

/// Returns `1 / √variance`, each operation rounded; NaN if the sum has overflowed.
#[inline(always)]
#[must_use]
pub fn inverse_deviation<A: Arithmetic>(variance: f32) -> f32 {
    if variance.is_infinite() {
        return f32::NAN;
    }
    1.0 / A::square_root(variance)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Exact;

    impl Arithmetic for Exact {
        fn multiply_add(a: f32, b: f32, c: f32) -> f32 {
            a.mul_add(b, c)
        }

        fn square_root(x: f32) -> f32 {
            x.sqrt()
        }

        fn reciprocal(x: f32) -> f32 {
            1.0 / x
        }
    }

    #[test]
    fn scales_need_no_division() {
        for exponent in [-90, 0, 127] {
            for mantissa in 0..1 << 23 {
                let max = f32::from_bits(((exponent + 127) as u32) << 23 | mantissa);
                assert_eq!(scale_of_max::<Exact>(max), max / CODE_LIMIT, "{max}");
            }
        }
    }

    #[test]
    fn exp_is_as_accurate_as_stated() {
        let steps = 1 << 20;
        for step in -steps..=steps {
            let x = EXP_LIMIT * step as f32 / steps as f32;
            let exact = f64::from(x).exp();
            let error = ((f64::from(exp::<Exact>(x)) - exact) / exact).abs();
            let limit = if x.abs() < 16.0 { 2f64.powi(-21) } else { 2f64.powi(-18) };
            assert!(error <= limit, "exp({x}) is off by {error}");
        }
        assert_eq!(exp::<Exact>(0.0), 1.0);
    }

    /// Returns the code of a value.
    fn code(scale: RowScale, value: f32) -> i8 {
        let value = if scale.adjusts() { scale.adjust(value) } else { value };
        scale.round::<Exact>(value) as i8
    }

    #[test]
    fn codes_are_the_nearest_and_the_largest_magnitude_gets_the_largest_code() {
        for exponent in -149..128 {
            for mantissa in [0u32, 1, 0x2A_AAAA, 0x7F_FFFF] {
                let max = 2f64.powi(exponent) * (1.0 + f64::from(mantissa) / 8_388_608.0);
                let max = max.min(f32::MAX.into()) as f32;
                let scale = RowScale::new::<Exact>(max.to_bits(), None, None);
                // Below, the step itself is rounded to few bits.
                if exponent > -110 {
                    assert_eq!((code(scale, max), code(scale, -max)), (127, -127), "{max}");
                }
                let step = f64::from(scale.get());
                for part in [0.0, 0.003, 0.3, 0.5, 0.777] {
                    let value = (f64::from(max) * part) as f32;
                    let quotient = f64::from(value) / step;
                    let off = (f64::from(code(scale, value)) - quotient).abs();
                    assert!(off <= 0.5 + 1e-4, "{value} / {step} became {}", code(scale, value));
                }
            }
        }
    }

    #[test]
    fn usual_rows_are_scaled_like_any_others() {
        let maxima = (0..40).map(|i| 2f32.powi(3 * i - 52) * 1.37);
        for max in maxima {
            for variance in
                [None, Some(2f32.powi(-101)), Some(1e-20), Some(0.3), Some(1e29), Some(2f32.powi(101))]
            {
                let scale = RowScale::new::<Exact>(max.to_bits(), variance, None);
                let any = RowScale::of_any::<Exact>(max.to_bits(), variance, None);
                assert_eq!(scale.get().to_bits(), any.get().to_bits());
                for i in 0..=1000 {
                    let value = max * (i as f32 / 500.0 - 1.0);
                    assert_eq!(code(scale, value), code(any, value), "{value} of {max}");
                }
            }
        }
    }

    #[test]
    fn given_scales_clip_and_rows_that_are_not_finite_have_codes_of_zero() {
        let max = 3f32.to_bits();
        let given = RowScale::new::<Exact>(max, None, Some(0.01));
        assert_eq!((given.get(), code(given, 3.0), code(given, -0.4)), (0.01, 127, -40));
        // Values of 3 with the deviation 2 are 1.5 after the norm.
        let norm = RowScale::new::<Exact>(max, Some(4.0), Some(0.1));
        assert_eq!((norm.get(), code(norm, 3.0)), (0.1, 15));
        let own = RowScale::new::<Exact>(max, Some(4.0), None);
        assert_eq!((own.get(), code(own, 3.0)), (3.0 / 127.0 / 2.0, 127));
        let zero = RowScale::new::<Exact>(0, None, None);
        assert_eq!((zero.get(), code(zero, 0.0)), (0.0, 0));
        for (max, variance, given) in [
            (f32::INFINITY.to_bits(), None, None),
            (f32::NAN.to_bits(), None, Some(1.0)),
            (max, Some(f32::INFINITY), None),
            (max, Some(f32::NAN), Some(1.0)),
            (0, Some(0.0), None),
            (max, Some(0.0), Some(1.0)),
            (max, None, Some(f32::INFINITY)),
        ] {
            let scale = RowScale::new::<Exact>(max, variance, given);
            assert!(scale.get().is_nan(), "{max:x} {variance:?} {given:?}");
            assert_eq!((code(scale, 3.0), code(scale, f32::NAN)), (0, 0));
        }
    }

    #[test]
    fn gates_are_close_to_their_functions() {
        for bits in (0..=u32::MAX).step_by(0x8001) {
            let x = f32::from_bits(bits);
            if !x.is_finite() {
                continue;
            }
            let wide = f64::from(x);
            let silu = wide / (1.0 + (-wide).exp());
            let z = (8.0 / std::f64::consts::PI).sqrt() * (wide + 0.044_715 * wide.powi(3));
            let gelu = wide / (1.0 + (-z).exp());
            // The rounded log₂ e, and the rounded argument of GELU, change e^z by a factor that grows with z.
            let size = |z: f64| z.abs().min(f64::from(EXP_LIMIT));
            let of_silu = 4e-7 + 2e-8 * size(wide);
            let of_gelu = 4e-7 + 2.2e-7 * size(z);
            for (gate, exact, relative) in [(Gate::Silu, silu, of_silu), (Gate::GeluTanh, gelu, of_gelu)] {
                let value = f64::from(activate::<Exact>(gate, x));
                // Where σ is clamped, the exact value is nearly 0.
                let allowed = relative * exact.abs() + 1.7e-38 * wide.abs() + 1e-44;
                assert!((value - exact).abs() <= allowed, "{gate:?} of {x} is {value}, not {exact}");
            }
        }
    }

    #[test]
    fn gates_of_non_finite_values_are_not_finite() {
        for gate in [Gate::Silu, Gate::GeluTanh] {
            for x in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                assert!(!activate::<Exact>(gate, x).is_finite(), "{gate:?} of {x}");
            }
            assert_eq!(activate::<Exact>(gate, f32::MAX), f32::MAX);
            assert!(activate::<Exact>(gate, f32::MIN).is_finite());
        }
    }

    #[test]
    fn every_launch_fits_its_kernel_and_shared_memory() {
        let operations = [
            RowOperation::Plain,
            RowOperation::RmsNorm,
            RowOperation::LayerNorm,
            RowOperation::Silu,
            RowOperation::GeluTanh,
        ];
        let mut rings = 0;
        for operation in operations {
            for (element, name) in [(ElementType::Bf16, "_bf16_"), (ElementType::F16, "_f16_")] {
                for (k, m) in (1..140_000).step_by(97).flat_map(|k| [(k, 1), (k, 300), (k * 8, 5000)]) {
                    let has_residual = matches!(operation, RowOperation::RmsNorm) && k % 2 == 0;
                    let rows = Rows { operation, element, m, k, has_residual, aligned: true, smooths: false };
                    let launch = rows.launch(132);
                    let entry = QUANTIZE_ENTRIES[launch.kernel];
                    let is_ring = launch.ring.stages > 0;
                    rings += u32::from(is_ring);
                    assert!(entry.contains(name) && entry.contains("_ring") == is_ring, "{entry}");
                    assert!(entry.ends_with(&launch.row_blocks.to_string()), "{entry}");
                    assert!(launch.blocks.is_multiple_of(launch.row_blocks) && launch.blocks > 0);
                    assert!(launch.threads.is_multiple_of(32) && launch.threads > 0);
                    assert!(launch.shared_bytes <= crate::tile::MAX_SHARED_BYTES, "{launch:?}");
                    if is_ring {
                        assert!(
                            (1..=MAX_STAGES).contains(&launch.ring.stages) && launch.threads <= MAX_THREADS
                        );
                        assert!(launch.threads * HELD_PAIRS >= k.div_ceil(CODE_ALIGNMENT));
                        let row = k * if has_residual || operation as u32 > 2 { 4 } else { 2 };
                        assert!(launch.ring.stage_bytes >= row);
                        assert!(launch.ring.stages_offset().is_multiple_of(16));
                    } else {
                        let held = launch.row_blocks * launch.threads;
                        assert!(launch.threads <= MAX_THREADS);
                        assert!(rows.vectors() <= held || held == LANES as u32, "{launch:?}");
                    }
                }
            }
        }
        assert!(rings > 500, "{rings}");
        assert_eq!(QUANTIZE_ENTRIES.len(), operations.len() * 2 * Rows::KINDS);
    }
}
