//! Calls of [`Gpu::gemm`](liquidgemm::gpu::Gpu::gemm) that must be refused before anything is launched,
//! each with the error that it must return.
//!
//! `errors.rs` makes these calls on a GPU, `driver.rs` on a fake driver.

use liquidgemm::gpu::{DeviceSpan, GpuError, Operands};
use liquidgemm::{Error, OutputType, Plan, Problem};

/// A call with one thing wrong.
pub struct RefusedCall {
    /// What is wrong.
    pub wrong: &'static str,
    /// The call's operands.
    pub operands: Operands,
    /// The call's plan.
    pub plan: Plan,
    /// Returns whether this is the expected error.
    pub is_expected: fn(&Error) -> bool,
    /// A text that the error's message must contain: the bad value, or what to do about it.
    pub says: &'static str,
}

/// Returns `span` moved up by `bytes` bytes.
fn moved(span: DeviceSpan, bytes: u64) -> DeviceSpan {
    // SAFETY: the call is refused, so nothing dereferences the address.
    unsafe { DeviceSpan::from_raw(span.address() + bytes, span.bytes()) }
}

/// Returns `span` with a length of `bytes` bytes.
fn resized(span: DeviceSpan, bytes: usize) -> DeviceSpan {
    // SAFETY: the call is refused, so nothing dereferences the address.
    unsafe { DeviceSpan::from_raw(span.address(), bytes) }
}

/// The shape of all calls, as `[m, n, k]`.
pub const REFUSED_SHAPE: [usize; 3] = [5, 200, 201];

/// Returns variations of a good call, each with one thing wrong.
///
/// `good` has the shape [`REFUSED_SHAPE`], bf16 output with contiguous rows, and a bias.
///
/// # Errors
/// Those of [`Plan::new`].
pub fn refused_calls(good: Operands) -> Result<Vec<RefusedCall>, Error> {
    let [m, n, k] = REFUSED_SHAPE;
    let stride = good.activation_stride;
    let good_plan = Plan::new(Problem { m, n, k }, &liquidgemm::DeviceFigures::H100_SXM)?;
    let operands = |wrong, operands, is_expected: fn(&Error) -> bool, says| RefusedCall {
        wrong,
        operands,
        plan: good_plan,
        is_expected,
        says,
    };
    let plan = |wrong, plan, is_expected: fn(&Error) -> bool, says| RefusedCall {
        wrong,
        operands: good,
        plan,
        is_expected,
        says,
    };
    macro_rules! is {
        ($pattern:pat) => {
            |error| matches!(error, $pattern)
        };
    }
    macro_rules! is_gpu {
        ($pattern:pat) => {
            |error| matches!(error, Error::Gpu($pattern))
        };
    }
    Ok(vec![
        operands(
            "an activation stride that is no multiple of 16",
            Operands { activation_stride: k, ..good },
            is_gpu!(GpuError::Misaligned { what: "activations' row stride", value: 201, multiple: 16, .. }),
            "pad each row",
        ),
        operands(
            "an activation stride shorter than a row",
            Operands { activation_stride: 192, ..good },
            is!(Error::StrideTooShort { stride: 192, k: 201 }),
            "at least k",
        ),
        operands(
            "activations at an address that is no multiple of 16",
            Operands { activations: moved(good.activations, 8), ..good },
            is_gpu!(GpuError::Misaligned { what: "activations", multiple: 16, .. }),
            "copy it to an aligned one",
        ),
        operands(
            "token scales at an address that is no multiple of 4",
            Operands { token_scales: moved(good.token_scales, 2), ..good },
            is_gpu!(GpuError::Misaligned { what: "token scales", multiple: 4, .. }),
            "copy it to an aligned one",
        ),
        operands(
            "an output at an address that is no multiple of its element size",
            Operands { output: moved(good.output, 1), ..good },
            is_gpu!(GpuError::Misaligned { what: "output", multiple: 2, .. }),
            "copy it to an aligned one",
        ),
        operands(
            "a bias at an address that is no multiple of 4",
            Operands { bias: good.bias.map(|bias| moved(bias, 1)), ..good },
            is_gpu!(GpuError::Misaligned { what: "bias", multiple: 4, .. }),
            "copy it to an aligned one",
        ),
        operands(
            "activations a byte too short",
            Operands { activations: resized(good.activations, (m - 1) * stride + k - 1), ..good },
            is_gpu!(GpuError::BufferTooSmall { what: "activations", .. }),
            "are needed",
        ),
        operands(
            "token scales a byte too short",
            Operands { token_scales: resized(good.token_scales, m * 4 - 1), ..good },
            is_gpu!(GpuError::BufferTooSmall { what: "token scales", needed: 20, actual: 19 }),
            "has 19 bytes, but 20 are needed",
        ),
        operands(
            "an output a byte too short",
            Operands { output: resized(good.output, m * n * 2 - 1), ..good },
            is_gpu!(GpuError::BufferTooSmall { what: "output", needed: 2000, actual: 1999 }),
            "has 1999 bytes, but 2000 are needed",
        ),
        operands(
            "a bias a byte too short",
            Operands { bias: good.bias.map(|bias| resized(bias, n * 4 - 1)), ..good },
            is_gpu!(GpuError::BufferTooSmall { what: "bias", needed: 800, actual: 799 }),
            "has 799 bytes, but 800 are needed",
        ),
        operands(
            "more tokens than fit in any memory",
            Operands { m: usize::MAX, ..good },
            is_gpu!(GpuError::BufferTooSmall { what: "activations", .. }),
            "are needed",
        ),
        operands(
            "an output stride shorter than a row",
            Operands { output_stride: n - 1, ..good },
            is_gpu!(GpuError::OutputStrideTooShort { stride: 199, n: 200 }),
            "at least n",
        ),
        operands(
            "an output stride beyond 32 bits",
            Operands { output_stride: 1 << 32, ..good },
            is_gpu!(GpuError::OutOfRange { what: "the output's row stride", .. }),
            "at most 4294967295",
        ),
        operands(
            "a bias with the raw accumulator",
            Operands { output_type: OutputType::I32, ..good },
            is!(Error::BiasWithRawOutput),
            "leave the bias out",
        ),
        plan(
            "a plan for fewer tokens",
            Plan::new(Problem::new(m - 1, n, k), &liquidgemm::DeviceFigures::H100_SXM)?,
            is_gpu!(GpuError::PlanMismatch { .. }),
            "m = 4, n = 200, k = 201",
        ),
        plan(
            "a plan for more channels",
            Plan::new(Problem::new(m, n + 1, k), &liquidgemm::DeviceFigures::H100_SXM)?,
            is_gpu!(GpuError::PlanMismatch { .. }),
            "m = 5, n = 201, k = 201",
        ),
        plan(
            "a plan for another k",
            Plan::new(Problem::new(m, n, 192), &liquidgemm::DeviceFigures::H100_SXM)?,
            is_gpu!(GpuError::PlanMismatch { .. }),
            "m = 5, n = 200, k = 192",
        ),
    ])
}
