//! Calls of [`Gpu::gemm`](liquidgemm::gpu::Gpu::gemm) that must be refused before anything is launched, each with the error that it
//! must give. The test on a GPU and the test on a fake driver go through the same list.

use liquidgemm::gpu::{DeviceSpan, GpuError, Operands};
use liquidgemm::{Error, OutputType, Plan};

/// A call with one thing wrong.
pub struct RefusedCall {
    /// What is wrong.
    pub wrong: &'static str,
    /// The call's operands.
    pub operands: Operands,
    /// The call's plan.
    pub plan: Plan,
    /// Whether this is the right error.
    pub is_expected: fn(&Error) -> bool,
    /// What its message must contain: the value that was met, or what to do.
    pub says: &'static str,
}

/// `span` at an address this many bytes higher.
fn moved(span: DeviceSpan, bytes: u64) -> DeviceSpan {
    // SAFETY: nothing is launched that would follow the address.
    unsafe { DeviceSpan::from_raw(span.address() + bytes, span.bytes()) }
}

/// `span` with another length.
fn resized(span: DeviceSpan, bytes: usize) -> DeviceSpan {
    // SAFETY: nothing is launched that would follow the address.
    unsafe { DeviceSpan::from_raw(span.address(), bytes) }
}

/// The shape of the calls: `[m, n, k]`.
pub const REFUSED_SHAPE: [usize; 3] = [5, 200, 201];

/// Every wrong variation of a good call of the shape [`REFUSED_SHAPE`] with bf16 output, a bias, and rows of the output
/// side by side.
pub fn refused_calls(good: Operands) -> Result<Vec<RefusedCall>, Error> {
    let [m, n, k] = REFUSED_SHAPE;
    let stride = good.activation_stride;
    let good_plan = Plan::new(m, n, k, &liquidgemm::DeviceFigures::H100_SXM)?;
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
            "activations at no multiple of 16",
            Operands { activations: moved(good.activations, 8), ..good },
            is_gpu!(GpuError::Misaligned { what: "activations", multiple: 16, .. }),
            "copy it to an aligned one",
        ),
        operands(
            "token scales at no multiple of 4",
            Operands { token_scales: moved(good.token_scales, 2), ..good },
            is_gpu!(GpuError::Misaligned { what: "token scales", multiple: 4, .. }),
            "copy it to an aligned one",
        ),
        operands(
            "an output at no multiple of its elements",
            Operands { output: moved(good.output, 1), ..good },
            is_gpu!(GpuError::Misaligned { what: "output", multiple: 2, .. }),
            "copy it to an aligned one",
        ),
        operands(
            "a bias at no multiple of 4",
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
            "more tokens than any memory has",
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
            Plan::new(m - 1, n, k, &liquidgemm::DeviceFigures::H100_SXM)?,
            is_gpu!(GpuError::PlanMismatch { .. }),
            "[4, 200, 201]",
        ),
        plan(
            "a plan for more channels",
            Plan::new(m, n + 1, k, &liquidgemm::DeviceFigures::H100_SXM)?,
            is_gpu!(GpuError::PlanMismatch { .. }),
            "[5, 201, 201]",
        ),
        plan(
            "a plan for another k",
            Plan::new(m, n, 192, &liquidgemm::DeviceFigures::H100_SXM)?,
            is_gpu!(GpuError::PlanMismatch { .. }),
            "[5, 200, 192]",
        ),
    ])
}
