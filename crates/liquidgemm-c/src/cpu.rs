//! The operations on host memory: the CPU backend, with the bits of the GPU's.

use std::ffi::c_void;

use half::{bf16, f16};
use liquidgemm::cpu::{self, Combined, RowIndex};
use liquidgemm::{ActivationsView, Half, HalfType, Output, OutputType, QuantizedActivations};

use crate::arguments::*;
use crate::launch::{lg_combine, lg_grouped};
use crate::layers::{lg_experts, lg_linear};
use crate::status::{Failure, guard, lg_status};
use crate::weights::lg_weights;

/// Calls `$body` with `$element` as the output type that `$type` names.
macro_rules! with_output {
    ($type:expr, $element:ident => $body:expr) => {
        match output_type($type)? {
            OutputType::Bf16 => {
                type $element = bf16;
                $body
            }
            OutputType::F16 => {
                type $element = f16;
                $body
            }
            OutputType::F32 => {
                type $element = f32;
                $body
            }
            OutputType::I32 => {
                type $element = i32;
                $body
            }
        }
    };
}

/// Calls `$body` with `$element` as the 16-bit type that `$type` names.
macro_rules! with_half {
    ($what:literal, $type:expr, $element:ident => $body:expr) => {
        match half_type($what, $type)? {
            HalfType::Bf16 => {
                type $element = bf16;
                $body
            }
            HalfType::F16 => {
                type $element = f16;
                $body
            }
        }
    };
}

impl lg_quantized {
    /// Borrows the activations as host memory.
    ///
    /// # Safety
    /// The pointers are valid for what the structure says.
    unsafe fn view<'a>(&self) -> Result<ActivationsView<'a>, Failure> {
        let stride = stride_of(self.code_stride, self.k);
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            let codes = host("codes", self.codes.cast_const(), spanned("codes", self.m, stride, self.k)?)?;
            let scales = host("scales", self.scales.cast_const(), self.m)?;
            Ok(ActivationsView::new(codes, stride, scales, self.m, self.k)?)
        }
    }
}

impl lg_output {
    /// Computes `[m, n]` and writes it. `compute` gets memory for the product,
    /// which holds what the caller's memory holds, and writes it or fails.
    ///
    /// # Safety
    /// The pointer is valid for what the structure says.
    unsafe fn write<T: Output>(
        &self,
        [m, n]: [usize; 2],
        compute: impl FnOnce(&mut [T]) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let stride = stride_of(self.output_stride, n);
        let length = spanned("output", m, stride, n)?;
        // SAFETY: the caller vouches for the memory.
        let output = unsafe { host_mut("output", self.output.cast::<T>(), length) }?;
        if stride == n {
            return compute(output);
        }
        let mut product: Vec<T> = Vec::with_capacity(elements("output", [m, n])?);
        product.extend(output.chunks(stride).flat_map(|row| &row[..n]));
        compute(&mut product)?;
        for (to, row) in output.chunks_mut(stride).zip(product.chunks_exact(n)) {
            to[..n].copy_from_slice(row);
        }
        Ok(())
    }
}

/// Writes quantized activations to the caller's memory.
///
/// # Safety
/// The pointers are valid for what the structure says.
unsafe fn write_quantized(from: &QuantizedActivations, to: &lg_quantized) -> Result<(), Failure> {
    let (m, k, stride) = (from.m(), from.k(), stride_of(to.code_stride, to.k));
    // SAFETY: the caller vouches for the pointers.
    unsafe {
        let codes = host_mut("codes", to.codes, spanned("codes", m, stride, k)?)?;
        let scales = host_mut("scales", to.scales, m)?;
        for (token, row) in codes.chunks_mut(stride).enumerate() {
            row[..k].copy_from_slice(from.row(token));
        }
        scales.copy_from_slice(from.scales());
    }
    Ok(())
}

/// Quantizes rows of f32 without any operation before.
///
/// # Safety
/// The pointers are valid for what the structure says.
unsafe fn quantize_f32(input: &lg_input) -> Result<QuantizedActivations, Failure> {
    let only_plain = input.operation == LG_OPERATION_PLAIN
        && input.scaling == LG_SCALING_PER_TOKEN
        && input.gather.is_null()
        && input.residual.is_null();
    let (m, k) = (input.m, input.k);
    if !only_plain || stride_of(input.input_stride, k) != k {
        return Err(Failure::argument(
            "f32 input takes no operation, residual, gathered rows, row stride or given scales; use bf16 or f16",
        ));
    }
    // SAFETY: the caller vouches for the pointers.
    unsafe {
        let values = host("input", input.input.cast::<f32>(), elements("input", [m, k])?)?;
        if input.smoothing.is_null() {
            return Ok(QuantizedActivations::quantize(values, m, k)?);
        }
        let smoothing = host("smoothing", input.smoothing, k)?;
        Ok(QuantizedActivations::with_smoothing(values, m, k, smoothing)?)
    }
}

/// Quantizes rows of activations in host memory, after an operation.
///
/// `quantized->m` and `k` are those of the input. The input may also be `LG_TYPE_F32`, of finite values,
/// if there is no operation, residual, gather or stride, and each row has its own scale.
///
/// # Safety
/// The structures have the sizes that they say, and their pointers are valid for what they say.
/// What is written overlaps nothing else.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lg_cpu_quantize(
    input: *const lg_input,
    quantized: *const lg_quantized,
) -> lg_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            let (input, quantized) = (read(input)?, read(quantized)?);
            check_shape(&input, &quantized)?;
            let stride = stride_of(quantized.code_stride, quantized.k);
            // Fail before a residual changes.
            host_mut("codes", quantized.codes, spanned("codes", input.m, stride, input.k)?)?;
            host_mut("scales", quantized.scales, input.m)?;
            let result = if input.input_type == LG_TYPE_F32 {
                quantize_f32(&input)?
            } else {
                with_half!("input_type", input.input_type, T => {
                    let (input, residual) = input.on_host::<T>()?;
                    cpu::quantize(&input, residual)?
                })
            };
            write_quantized(&result, &quantized)
        }
    })
}

/// Fails unless quantized activations have the input's shape.
pub(crate) fn check_shape(input: &lg_input, quantized: &lg_quantized) -> Result<(), Failure> {
    let (expected, found) = ([input.m, input.k], [quantized.m, quantized.k]);
    if expected == found {
        return Ok(());
    }
    Err(Failure::argument(format!(
        "the quantized activations are {found:?}, but the input is {expected:?}; they must be equal"
    )))
}

/// Computes `output[m, n] = epilogue(activations[m, k] · weights[n, k]ᵀ) + bias[n]` in host memory.
///
/// # Safety
/// `weights` is a live handle; the structures have the sizes that they say, and their pointers are valid for
/// what they say; `bias` is null or has n elements. The output overlaps nothing else.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lg_cpu_gemm(
    weights: *const lg_weights,
    activations: *const lg_quantized,
    bias: *const f32,
    output: *const lg_output,
) -> lg_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            let weights = &*handle("weights", weights)?.0;
            let (activations, output) = (read(activations)?.view()?, read(output)?);
            let n = weights.n();
            let bias = if bias.is_null() { None } else { Some(host("bias", bias, n)?) };
            with_output!(output.output_type, T => {
                output.write::<T>([activations.m(), n], |out| Ok(cpu::gemm(weights, activations, bias, out)?))
            })
        }
    })
}

/// Computes a linear layer in host memory: the operation, the quantization and the GEMM.
///
/// # Safety
/// `linear` is a live handle; the structures have the sizes that they say, and their pointers are valid for
/// what they say. Output and residual overlap nothing else.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lg_cpu_linear_forward(
    linear: *const lg_linear,
    input: *const lg_input,
    output: *const lg_output,
) -> lg_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            let linear = &handle("linear", linear)?.0;
            let (input, output) = (read(input)?, read(output)?);
            with_half!("input_type", input.input_type, I => {
                let (input, residual) = input.on_host::<I>()?;
                with_output!(output.output_type, T => {
                    output.write::<T>([input.m, linear.n()], |out| {
                        out.copy_from_slice(&linear.forward::<I, T>(&input, residual)?);
                        Ok(())
                    })
                })
            })
        }
    })
}

/// Computes a grouped GEMM in host memory: for each expert the product of its rows.
///
/// Rows that belong to no expert are left as they are. A wrong index is an error; `status` is not used.
///
/// # Safety
/// `experts` is a live handle; the structures have the sizes that they say, and their pointers are valid for
/// what they say. The output overlaps nothing else.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lg_cpu_grouped_gemm(
    experts: *const lg_experts,
    grouped: *const lg_grouped,
    activations: *const lg_quantized,
    output: *const lg_output,
) -> lg_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            let experts = &handle("experts", experts)?.0;
            let (grouped, activations, output) = (read(grouped)?, read(activations)?.view()?, read(output)?);
            let (count, n) = (experts.len(), experts[0].n());
            let index = match grouped.index()? {
                Some(offsets) => RowIndex::Offsets(host("offsets", offsets, count + 1)?),
                None => {
                    let rows = elements("rows", [count, grouped.capacity])?;
                    if rows != activations.m() {
                        return Err(Failure::argument(format!(
                            "there are {} rows, but {count} experts of {} rows each need {rows}",
                            activations.m(),
                            grouped.capacity
                        )));
                    }
                    RowIndex::Counts(host("counts", grouped.counts, count)?)
                }
            };
            let bias = match grouped.bias.is_null() {
                true => None,
                false => Some(host("bias", grouped.bias, elements("bias", [count, n])?)?),
            };
            with_output!(output.output_type, T => {
                output.write::<T>([activations.m(), n], |out| {
                    Ok(cpu::grouped_gemm(experts, activations, index, bias, out)?)
                })
            })
        }
    })
}

/// Computes `output[t] = Σⱼ weights[t, j] · rows[positions[t, j]]` in host memory, j ascending.
///
/// # Safety
/// The structure has the size that it says, and its pointers are valid for what it says.
/// The output overlaps nothing else.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lg_cpu_combine(combine: *const lg_combine) -> lg_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            let combine = read(combine)?;
            with_half!("element_type", combine.element_type, T => combine_on_host::<T>(&combine))
        }
    })
}

/// # Safety
/// The pointers are valid for what the structure says.
unsafe fn combine_on_host<T: Combined + Half>(combine: &lg_combine) -> Result<(), Failure> {
    let &lg_combine { tokens, top_k, row_count, n, .. } = combine;
    let rows_stride = stride_of(combine.rows_stride, n);
    let choices = elements("choices", [tokens, top_k])?;
    // SAFETY: the caller vouches for the pointers.
    unsafe {
        let rows = host("rows", combine.rows.cast::<T>(), spanned("rows", row_count, rows_stride, n)?)?;
        let copied: Vec<T>;
        let rows = if rows_stride == n {
            rows
        } else {
            copied = rows.chunks(rows_stride).flat_map(|row| &row[..n]).copied().collect();
            &copied
        };
        let positions = host("positions", combine.positions, choices)?;
        let weights = host("weights", combine.weights, choices)?;
        let output = lg_output {
            struct_size: size_of::<lg_output>(),
            output: combine.output.cast::<c_void>(),
            output_stride: combine.output_stride,
            output_type: combine.element_type,
        };
        output.write::<T>([tokens, n], |out| Ok(cpu::combine(rows, positions, weights, [n, top_k], out)?))
    }
}
