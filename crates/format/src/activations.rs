//! The arithmetic of activation quantization, and the kernels that do it.
//!
//! A row of activations goes through an operation (none, a norm, or a gated activation function)
//! and becomes int8 codes with one f32 scale.
//! `host/src/cpu/activations.rs` and `kernels-gpu/src/activations` compute the same bits.
//! Both do what this page says, operation by operation.
//! Each is one correctly rounded f32 operation.
//! Only [`exp`] and the argument of GELU use fused multiply-add, where it is written.
//!
//! Sums over a row are formed in a fixed order.
//! The row is divided into vectors of [`VECTOR`] elements. Behind the row's end, elements are zero.
//! 1. [`sum_of_vector`] adds up each vector.
//! 2. Vector `v` belongs to lane `v mod LANES`, which adds the sums of its vectors to 0 in the order of `v`.
//! 3. The lanes are added in pairs, neighbours first: lanes 2i and 2i + 1, then the results in the same way.
//!
//! There are two kinds of kernels. The **row** kernels give each row a thread block, or a cluster,
//! in which each thread holds a vector. They start fast, and take any address and length.
//! The **ring** kernels are persistent, and load the next rows to shared memory by TMA meanwhile.
//! They suit many rows. Divisions by a smoothing vector would take too many of their registers.
//!
//! If a cluster has a row, its vectors come in **pieces** of [`PIECE`], which go round robin to the thread blocks.

use crate::rounding::ROUNDING_SHIFT;

/// Elements of a vector: 16 bytes of bf16 or f16.
pub const VECTOR: usize = 8;
/// The lanes of a row's sum.
pub const LANES: usize = 4096;
/// Vectors of a piece.
pub const PIECE: u32 = 256;
/// Thread blocks of a cluster that share a row.
pub const CLUSTER: u32 = 4;
/// The most threads of a thread block, and the number in row kernels for long rows.
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
/// Shared memory that reductions take.
pub const REDUCTION_BYTES: u32 = GROUP_SUMS_BYTES + WARP_MAXIMA_BYTES + EXCHANGE_BYTES;
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
            quantize_plain_bf16_row4: Plain, Bf16, row, 4;
            quantize_plain_bf16_ring1: Plain, Bf16, ring, 1;
            quantize_plain_f16_row1: Plain, F16, row, 1;
            quantize_plain_f16_row4: Plain, F16, row, 4;
            quantize_plain_f16_ring1: Plain, F16, ring, 1;
            quantize_rms_norm_bf16_row1: RmsNorm, Bf16, row, 1;
            quantize_rms_norm_bf16_row4: RmsNorm, Bf16, row, 4;
            quantize_rms_norm_bf16_ring1: RmsNorm, Bf16, ring, 1;
            quantize_rms_norm_f16_row1: RmsNorm, F16, row, 1;
            quantize_rms_norm_f16_row4: RmsNorm, F16, row, 4;
            quantize_rms_norm_f16_ring1: RmsNorm, F16, ring, 1;
            quantize_layer_norm_bf16_row1: LayerNorm, Bf16, row, 1;
            quantize_layer_norm_bf16_row4: LayerNorm, Bf16, row, 4;
            quantize_layer_norm_bf16_ring1: LayerNorm, Bf16, ring, 1;
            quantize_layer_norm_f16_row1: LayerNorm, F16, row, 1;
            quantize_layer_norm_f16_row4: LayerNorm, F16, row, 4;
            quantize_layer_norm_f16_ring1: LayerNorm, F16, ring, 1;
            quantize_silu_bf16_row1: Silu, Bf16, row, 1;
            quantize_silu_bf16_row4: Silu, Bf16, row, 4;
            quantize_silu_bf16_ring1: Silu, Bf16, ring, 1;
            quantize_silu_f16_row1: Silu, F16, row, 1;
            quantize_silu_f16_row4: Silu, F16, row, 4;
            quantize_silu_f16_ring1: Silu, F16, ring, 1;
            quantize_gelu_tanh_bf16_row1: GeluTanh, Bf16, row, 1;
            quantize_gelu_tanh_bf16_row4: GeluTanh, Bf16, row, 4;
            quantize_gelu_tanh_bf16_ring1: GeluTanh, Bf16, ring, 1;
            quantize_gelu_tanh_f16_row1: GeluTanh, F16, row, 1;
            quantize_gelu_tanh_f16_row4: GeluTanh, F16, row, 4;
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
        REDUCTION_BYTES + RING_BARRIERS_BYTES
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
        let threads = if row_blocks > 1 { MAX_THREADS } else { vectors.div_ceil(32) * 32 };
        QuantizeLaunch {
            kernel: self.kernel(0, row_blocks),
            row_blocks,
            blocks: self.m * row_blocks,
            threads,
            shared_bytes: REDUCTION_BYTES,
            ring: RowRing { stages: 0, stage_bytes: 0, parameter_bytes: 0, parameters: 0 },
        }
    }

    /// Returns the launch of a ring kernel, if there is one and it should be faster.
    #[must_use]
    pub const fn ring(self, multiprocessors: u32) -> Option<QuantizeLaunch> {
        /// Shared memory of an SM, and what the system takes of it for each thread block.
        const SHARED: u32 = 233_472;
        const SYSTEM: u32 = 1024;
        /// Threads of an SM with the registers that the kernels need.
        const THREADS: u32 = 1024;

        let vectors = self.k / VECTOR as u32;
        let pairs = vectors.div_ceil(2);
        if !self.aligned
            || self.smooths
            || !self.k.is_multiple_of(VECTOR as u32)
            || pairs > THREADS * HELD_PAIRS
        {
            return None;
        }
        let (vector_bytes, parameters) = match self.operation {
            RowOperation::Plain => (16, 0),
            RowOperation::Silu | RowOperation::GeluTanh => (32, 0),
            RowOperation::RmsNorm => (if self.has_residual { 32 } else { 16 }, 1),
            RowOperation::LayerNorm => (if self.has_residual { 32 } else { 16 }, 2),
        };
        let mut threads = 128;
        while threads * HELD_PAIRS < pairs {
            threads *= 2;
        }
        // If all rows run at a time, or nearly so, row kernels are faster.
        let row = self.row();
        if row.blocks.saturating_mul(row.threads) <= 2 * multiprocessors * MAX_THREADS {
            return None;
        }
        let mut ring = RowRing {
            stages: 0,
            stage_bytes: vectors * vector_bytes,
            parameter_bytes: vectors * 16,
            parameters,
        };
        let mut resident = THREADS / threads;
        while ring.stages < 2 && resident > 0 {
            let room = SHARED / resident - SYSTEM;
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
        let most = multiprocessors * (resident + 1);
        Some(QuantizeLaunch {
            kernel: self.kernel(2, 1),
            row_blocks: 1,
            blocks: if self.m < most { self.m } else { most },
            threads,
            shared_bytes: ring.shared_bytes(),
            ring,
        })
    }
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
    /// e⁻ˣ has an error of at most 1 ulp. |x| is taken as at most 87 there, so σ is at least 1.6 · 10⁻³⁸.
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
/// `max` is from 2⁻⁹⁰ to the largest f32. The method is Markstein's, as for [`Arithmetic::reciprocal`].
#[inline(always)]
#[must_use]
pub fn scale_of_max<A: Arithmetic>(max: f32) -> f32 {
    const INVERSE: f32 = 1.0 / CODE_LIMIT;
    let near = max * INVERSE;
    A::multiply_add(A::multiply_add(-CODE_LIMIT, near, max), INVERSE, near)
}

/// Returns the sum of a vector: neighbours first, in pairs.
#[inline(always)]
#[must_use]
pub fn sum_of_vector(values: [f32; VECTOR]) -> f32 {
    let [a, b, c, d, e, f, g, h] = values;
    ((a + b) + (c + d)) + ((e + f) + (g + h))
}

/// Returns eˣ for x from −[`EXP_LIMIT`] to [`EXP_LIMIT`], within 1 ulp.
///
/// With n = rn(x / ln 2), it is 2ⁿ · e^(x − n · ln 2).
/// The polynomial is that of `expf` in the Cephes library (S. Moshier).
#[inline(always)]
#[must_use]
pub fn exp<A: Arithmetic>(x: f32) -> f32 {
    const LN_2_LOW: f32 = -1.904_654_3e-9;
    let shifted = A::multiply_add(x, core::f32::consts::LOG2_E, ROUNDING_SHIFT);
    let n = shifted - ROUNDING_SHIFT;
    let f = A::multiply_add(n, -core::f32::consts::LN_2, x);
    let f = A::multiply_add(n, -LN_2_LOW, f);
    let p = A::multiply_add(1.987_569_1e-4, f, 1.398_2e-3);
    let p = A::multiply_add(p, f, 8.333_452e-3);
    let p = A::multiply_add(p, f, 4.166_579_6e-2);
    let p = A::multiply_add(p, f, 1.666_666_5e-1);
    let p = A::multiply_add(p, f, 0.5);
    let power = A::multiply_add(p, f * f, f) + 1.0;
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

/// Returns `1 / √(sum / k + epsilon)`, each operation rounded; NaN if the sum has overflowed.
#[inline(always)]
#[must_use]
pub fn inverse_deviation<A: Arithmetic>(sum: f32, k: u32, epsilon: f32) -> f32 {
    if sum.is_infinite() {
        return f32::NAN;
    }
    1.0 / A::square_root(sum / k as f32 + epsilon)
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

    /// Returns the distance in units of the last place of the correctly rounded `expected`.
    fn ulps(actual: f32, expected: f64) -> f64 {
        let ulp = f64::from((expected as f32).abs().next_up()) - f64::from((expected as f32).abs());
        (f64::from(actual) - expected).abs() / ulp
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
    fn exp_is_within_one_ulp() {
        let steps = 1 << 20;
        for step in -steps..=steps {
            let x = EXP_LIMIT * step as f32 / steps as f32;
            let error = ulps(exp::<Exact>(x), f64::from(x).exp());
            assert!(error <= 1.0, "exp({x}) is off by {error} ulps");
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
            // The rounded argument of GELU changes e^z by a factor that grows with z.
            let of_argument = 2e-7 * z.abs().min(f64::from(EXP_LIMIT));
            for (gate, exact, relative) in
                [(Gate::Silu, silu, 3e-7), (Gate::GeluTanh, gelu, 3e-7 + of_argument)]
            {
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
