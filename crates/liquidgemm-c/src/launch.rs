//! The operations on device memory. They launch on the caller's stream, allocate nothing and wait for nothing,
//! so a CUDA graph can capture them once the kernels are prepared.

use std::ffi::c_void;

use liquidgemm::gpu::{
    CombineOperands, DeviceLinear, DeviceRowIndex, DeviceSpan, Gpu, GroupedOperands, LinearOutput, Operands,
    QuantizeOperands, QuantizedSpan, StreamHandle,
};

use crate::arguments::*;
use crate::cpu::check_shape;
use crate::gpu::{lg_gpu, lg_gpu_experts, lg_gpu_linear, lg_gpu_weights, lg_gpu_workspace, lg_plan};
use crate::status::{Failure, guard, lg_status};

/// A stream: a `CUstream`, which is a `cudaStream_t` too. Null is the default stream.
pub type lg_stream = *mut c_void;

/// Which rows are whose in a grouped GEMM, and what goes with the rows.
///
/// The pointers are host memory in `lg_cpu_grouped_gemm`, and device memory in `lg_gpu_grouped_gemm`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct lg_grouped {
    /// `sizeof(lg_grouped)`.
    pub struct_size: usize,
    /// i32 `[experts + 1]`: expert e has the rows from offset e up to offset e + 1. Null if there are counts.
    pub offsets: *const i32,
    /// i32 `[experts]`: expert e has count e rows, from row e · capacity on. Null if there are offsets.
    pub counts: *const i32,
    /// The rows that each expert has a place for, with counts.
    pub capacity: usize,
    /// The rows that the experts probably have together, or 0 if that is unknown. It decides speed only.
    pub expected_rows: usize,
    /// f32 `[experts, n]`, or null.
    pub bias: *const f32,
    /// On the GPU a u32 that the launch writes, or null: 0 if the index is valid, 1 if it is not.
    pub status: *mut u32,
}

// SAFETY: numbers and pointers, the size first.
unsafe impl Versioned for lg_grouped {
    const NAME: &str = "lg_grouped";
}

impl lg_grouped {
    /// Returns the offsets, or `None` if there are counts.
    pub(crate) fn index(&self) -> Result<Option<*const i32>, Failure> {
        match (self.offsets.is_null(), self.counts.is_null()) {
            (false, true) => Ok(Some(self.offsets)),
            (true, false) => Ok(None),
            _ => Err(Failure::argument("give either offsets or counts, and leave the other one null")),
        }
    }
}

/// The weighted sum of each token's rows.
///
/// The pointers are host memory in `lg_cpu_combine`, and device memory in `lg_gpu_combine`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct lg_combine {
    /// `sizeof(lg_combine)`.
    pub struct_size: usize,
    /// Tokens. May be 0.
    pub tokens: usize,
    /// Choices of each token.
    pub top_k: usize,
    /// Number of rows to choose from. May be 0.
    pub row_count: usize,
    /// Elements of a row.
    pub n: usize,
    /// The element type of rows and output: `LG_TYPE_BF16` or `LG_TYPE_F16`.
    pub element_type: lg_type,
    /// `[row_count, n]`, row-major.
    pub rows: *const c_void,
    /// Elements from one row to the next. 0 stands for n.
    pub rows_stride: usize,
    /// i32 `[tokens, top_k]`: the row of each choice. −1 and other values outside the rows are skipped.
    pub positions: *const i32,
    /// f32 `[tokens, top_k]`: the weight of each choice.
    pub weights: *const f32,
    /// `[tokens, n]`, row-major.
    pub output: *mut c_void,
    /// Elements from one row of the output to the next. 0 stands for n.
    pub output_stride: usize,
}

// SAFETY: numbers and pointers, the size first.
unsafe impl Versioned for lg_combine {
    const NAME: &str = "lg_combine";
}

/// # Safety
/// The stream belongs to the context of the GPU that uses it.
unsafe fn stream_of(stream: lg_stream) -> StreamHandle {
    // SAFETY: the caller vouches for the stream.
    unsafe { StreamHandle::from_raw(stream) }
}

impl lg_quantized {
    /// Returns the operands of a GEMM that reads these activations.
    fn operands(&self, bias: *const f32, output: LinearOutput) -> Result<Operands, Failure> {
        Ok(Operands {
            m: self.m,
            activations: device_rows("codes", self.codes.cast_const(), self.m)?,
            activation_stride: stride_of(self.code_stride, self.k),
            token_scales: device_rows("scales", self.scales.cast_const(), self.m)?,
            bias: device_or_none(bias),
            output: output.output,
            output_stride: output.output_stride,
            output_type: output.output_type,
        })
    }

    /// Fails unless the activations have k elements each.
    fn check_k(&self, k: usize) -> Result<(), Failure> {
        if self.k == k {
            return Ok(());
        }
        Err(liquidgemm::Error::KMismatch { weights: k, activations: self.k }.into())
    }
}

/// Quantizes rows of activations on a stream, after an operation, and returns at once.
///
/// # Safety
/// `gpu` is a live handle; the structures have the sizes that they say.
/// Until the launch has finished, their pointers are valid device memory for what they say, and nothing else
/// writes what is read, or accesses what is written. What is written overlaps nothing else.
/// The launch ahead of it on the stream does not write the norm's weight. The stream belongs to the GPU's context.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lg_gpu_quantize(
    gpu: *const lg_gpu,
    input: *const lg_input,
    quantized: *const lg_quantized,
    stream: lg_stream,
) -> lg_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers and the launch.
        unsafe {
            let gpu = &handle("gpu", gpu)?.gpu;
            let (input, quantized) = (read(input)?, read(quantized)?);
            check_shape(&input, &quantized)?;
            let operands = QuantizeOperands {
                source: input.on_device()?,
                k: input.k,
                smoothing: device_or_none(input.smoothing),
                codes: device_rows("codes", quantized.codes.cast_const(), input.m)?,
                code_stride: stride_of(quantized.code_stride, quantized.k),
                scales: device_rows("scales", quantized.scales.cast_const(), input.m)?,
            };
            Ok(gpu.quantize(&operands, stream_of(stream))?)
        }
    })
}

/// Launches `output[m, n] = epilogue(activations[m, k] · weights[n, k]ᵀ) + bias[n]` on a stream, and returns at once.
///
/// `plan` is null for the GPU's own choice.
///
/// # Safety
/// The handles are live; the structures have the sizes that they say.
/// Until the launch has finished, everything stays allocated, nothing else writes what is read, or accesses the output,
/// and no launch on another stream uses the workspace. The stream belongs to the GPU's context.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lg_gpu_gemm(
    gpu: *const lg_gpu,
    weights: *const lg_gpu_weights,
    activations: *const lg_quantized,
    bias: *const f32,
    output: *const lg_output,
    plan: *const lg_plan,
    workspace: *const lg_gpu_workspace,
    stream: lg_stream,
) -> lg_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers and the launch.
        unsafe {
            let (gpu, weights) = (&handle("gpu", gpu)?.gpu, &handle("weights", weights)?.0);
            let (activations, workspace) = (read(activations)?, &handle("workspace", workspace)?.0);
            activations.check_k(weights.k())?;
            let output = read(output)?.on_device(activations.m, weights.n())?;
            let operands = activations.operands(bias, output)?;
            match plan.as_ref() {
                None => gpu.gemm(weights, &operands, workspace, stream_of(stream))?,
                Some(plan) => {
                    gpu.gemm_with_plan(weights, &operands, &plan.plan, workspace, stream_of(stream))?;
                }
            }
            Ok(())
        }
    })
}

/// Writes the bytes of scratch memory that `lg_gpu_linear_forward` needs for m rows of k elements.
///
/// # Safety
/// `bytes` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lg_linear_scratch_size(m: usize, k: usize, bytes: *mut usize) -> lg_status {
    guard(|| {
        let needed = QuantizedSpan::bytes(m, k)?;
        // SAFETY: the caller vouches for the pointer.
        unsafe { put("bytes", bytes, needed) }
    })
}

/// Computes a linear layer on a stream, and returns at once: the operation, the quantization and the GEMM.
///
/// The scratch memory has `lg_linear_scratch_size` bytes, at a multiple of 16 bytes.
///
/// # Safety
/// As for `lg_gpu_quantize` and `lg_gpu_gemm`; nothing else uses the scratch memory until the launches have finished.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lg_gpu_linear_forward(
    gpu: *const lg_gpu,
    linear: *const lg_gpu_linear,
    input: *const lg_input,
    output: *const lg_output,
    scratch: *mut c_void,
    scratch_bytes: usize,
    workspace: *const lg_gpu_workspace,
    stream: lg_stream,
) -> lg_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers and the launch.
        unsafe {
            let (gpu, linear) = (&handle("gpu", gpu)?.gpu, &handle("linear", linear)?.0);
            forward(
                gpu,
                linear,
                input,
                output,
                device_bytes(scratch.cast_const(), scratch_bytes),
                workspace,
                stream,
            )
        }
    })
}

/// A linear layer in device memory of the caller, for `lg_gpu_linear_forward_in`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct lg_linear_memory {
    /// `sizeof(lg_linear_memory)`.
    pub struct_size: usize,
    /// Weights as `lg_weights_device_bytes` writes them, at a multiple of 256 bytes.
    pub memory: *const c_void,
    /// Bytes of the memory.
    pub memory_bytes: usize,
    /// Output channels.
    pub n: usize,
    /// Input channels.
    pub k: usize,
    /// Weights of a channel that share a pair: a multiple of 64, or `LG_GROUP_CHANNEL`.
    pub group: usize,
    /// f32 `[n]`, or null.
    pub bias: *const f32,
    /// f32 `[k]`, or null.
    pub smoothing: *const f32,
}

// SAFETY: numbers and pointers, the size first.
unsafe impl Versioned for lg_linear_memory {
    const NAME: &str = "lg_linear_memory";
}

/// Like `lg_gpu_linear_in` followed by `lg_gpu_linear_forward`, in one call and without a handle to keep.
///
/// # Safety
/// As for both.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lg_gpu_linear_forward_in(
    gpu: *const lg_gpu,
    linear: *const lg_linear_memory,
    input: *const lg_input,
    output: *const lg_output,
    scratch: *mut c_void,
    scratch_bytes: usize,
    workspace: *const lg_gpu_workspace,
    stream: lg_stream,
) -> lg_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers and the launch.
        unsafe {
            let (gpu, linear) = (&handle("gpu", gpu)?.gpu, read(linear)?);
            check_pointer("memory", linear.memory)?;
            let memory = device_bytes(linear.memory, linear.memory_bytes);
            let weights = gpu.weights_in(memory, [linear.n, linear.k], group_of(linear.group))?;
            let (bias, smoothing) = (device_or_none(linear.bias), device_or_none(linear.smoothing));
            let linear = gpu.linear_of(weights, bias, smoothing)?;
            forward(
                gpu,
                &linear,
                input,
                output,
                device_bytes(scratch.cast_const(), scratch_bytes),
                workspace,
                stream,
            )
        }
    })
}

/// # Safety
/// As for `lg_gpu_linear_forward`.
unsafe fn forward(
    gpu: &Gpu,
    linear: &DeviceLinear,
    input: *const lg_input,
    output: *const lg_output,
    scratch: DeviceSpan,
    workspace: *const lg_gpu_workspace,
    stream: lg_stream,
) -> Result<(), Failure> {
    // SAFETY: the caller vouches for the pointers and the launch.
    unsafe {
        let (input, workspace) = (read(input)?, &handle("workspace", workspace)?.0);
        if input.k != linear.k() {
            return Err(liquidgemm::Error::KMismatch { weights: linear.k(), activations: input.k }.into());
        }
        if !input.smoothing.is_null() {
            return Err(liquidgemm::Error::SmoothingTwice.into());
        }
        let output = read(output)?.on_device(input.m, linear.n())?;
        Ok(linear.forward(gpu, &input.on_device()?, &output, scratch, workspace, stream_of(stream))?)
    }
}

/// Launches a grouped GEMM on a stream, and returns at once: for each expert the product of its rows.
///
/// With counts, `activations->m` is experts · capacity. Rows that belong to no expert are left as they are.
///
/// # Safety
/// As for `lg_gpu_gemm`. The index may hold any values.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lg_gpu_grouped_gemm(
    gpu: *const lg_gpu,
    experts: *const lg_gpu_experts,
    grouped: *const lg_grouped,
    activations: *const lg_quantized,
    output: *const lg_output,
    stream: lg_stream,
) -> lg_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers and the launch.
        unsafe {
            let (gpu, experts) = (&handle("gpu", gpu)?.gpu, &handle("experts", experts)?.0);
            let (grouped, activations) = (read(grouped)?, read(activations)?);
            activations.check_k(experts.k())?;
            let output = read(output)?.on_device(activations.m, experts.n())?;
            let Operands { activations: codes, activation_stride, token_scales, bias, .. } =
                activations.operands(grouped.bias, output)?;
            let operands = GroupedOperands {
                rows: activations.m,
                index: match grouped.index()? {
                    Some(offsets) => DeviceRowIndex::Offsets(device(offsets)),
                    None => {
                        DeviceRowIndex::Counts { counts: device(grouped.counts), capacity: grouped.capacity }
                    }
                },
                expected_rows: (grouped.expected_rows > 0).then_some(grouped.expected_rows),
                activations: codes,
                activation_stride,
                token_scales,
                bias,
                output: output.output,
                output_stride: output.output_stride,
                output_type: output.output_type,
                status: device_or_none(grouped.status.cast_const()),
            };
            Ok(gpu.grouped_gemm(experts, &operands, stream_of(stream))?)
        }
    })
}

/// Launches `output[t] = Σⱼ weights[t, j] · rows[positions[t, j]]` on a stream, j ascending, and returns at once.
///
/// # Safety
/// `gpu` is a live handle; the structure has the size that it says.
/// Until the launch has finished, its pointers are valid device memory for what it says, nothing else writes what is
/// read, or accesses the output. The stream belongs to the GPU's context. The positions may hold any values.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lg_gpu_combine(
    gpu: *const lg_gpu,
    combine: *const lg_combine,
    stream: lg_stream,
) -> lg_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers and the launch.
        unsafe {
            let (gpu, combine) = (&handle("gpu", gpu)?.gpu, read(combine)?);
            let choices = elements("choices", [combine.tokens, combine.top_k])?;
            half_type("element_type", combine.element_type)?;
            let operands = CombineOperands {
                tokens: combine.tokens,
                top_k: combine.top_k,
                row_count: combine.row_count,
                n: combine.n,
                element_type: output_type(combine.element_type)?,
                rows: device_rows("rows", combine.rows, combine.row_count)?,
                rows_stride: stride_of(combine.rows_stride, combine.n),
                positions: device_rows("positions", combine.positions, choices)?,
                weights: device_rows("weights", combine.weights, choices)?,
                output: device_rows("output", combine.output.cast_const(), combine.tokens)?,
                output_stride: stride_of(combine.output_stride, combine.n),
            };
            Ok(gpu.combine(&operands, stream_of(stream))?)
        }
    })
}
