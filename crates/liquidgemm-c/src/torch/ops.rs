//! The ops: their arguments are checked, and the launches go to torch's current stream.
//! `python/liquidgemm/torch.py` has their schemas, and makes the same checks for CPU and fake tensors.

use std::ffi::c_void;
use std::ptr;

use liquidgemm::gpu::{
    CombineOperands, DeviceExperts, DeviceRowIndex, DeviceWeights, GroupedOperands, Operands,
    QuantizeOperands, QuantizedSpan, StreamHandle,
};

use super::Lane;
use super::tensor::{Arguments, Device, Tensor, Torch, Type, check_given, span};
use crate::arguments::*;
use crate::launch::lg_stream;
use crate::status::Failure;

/// What an op returns: one tensor, or two.
pub(super) type Outputs = [Option<Tensor>; 2];

fn refuse<T>(message: String) -> Result<T, Failure> {
    Err(Failure::argument(message))
}

fn one(tensor: Tensor) -> Result<Outputs, Failure> {
    Ok([Some(tensor), None])
}

/// # Safety
/// The stream is torch's.
unsafe fn handle_of(stream: lg_stream) -> StreamHandle {
    // SAFETY: torch's streams belong to the primary context, as the GPU does.
    unsafe { StreamHandle::from_raw(stream) }
}

/// Converts sizes of the schema.
fn sizes<const N: usize>(names: &str, values: [i64; N]) -> Result<[usize; N], Failure> {
    if values.iter().any(|&value| value < 0) {
        return refuse(format!("{names} are {values:?}; none of them may be negative"));
    }
    Ok(values.map(|value| value as usize))
}

/// The activations of an op, checked.
struct Rows {
    sizes: Vec<usize>,
    columns: usize,
    dtype: Type,
    input_type: lg_type,
    device: Device,
    data: *const c_void,
}

impl Rows {
    fn new(x: &Tensor) -> Result<Self, Failure> {
        let (dtype, sizes) = (x.dtype()?, x.sizes()?);
        let input_type = match dtype {
            Type::Bf16 => LG_TYPE_BF16,
            Type::F16 => LG_TYPE_F16,
            other => {
                return refuse(format!(
                    "the input has the type {other}; use torch.bfloat16 or torch.float16"
                ));
            }
        };
        let Some(&columns) = sizes.last() else {
            return refuse("the input has no dimensions; it must be [..., k]".to_owned());
        };
        if !x.is_contiguous()? {
            return refuse(format!("the input, {sizes:?}, is not contiguous; call .contiguous()"));
        }
        Ok(Self { columns, dtype, input_type, device: x.device()?, data: x.data()?, sizes })
    }

    /// Returns the number of rows.
    fn count(&self) -> usize {
        self.sizes.iter().rev().skip(1).product()
    }

    /// Fails unless the rows have what a layer with `k` input channels takes after an operation.
    fn check_columns(&self, k: usize, operation: lg_operation) -> Result<(), Failure> {
        let needed = match operation {
            LG_OPERATION_SILU_MUL | LG_OPERATION_GELU_TANH_MUL => k.saturating_mul(2),
            _ => k,
        };
        if self.columns == needed {
            return Ok(());
        }
        let (sizes, columns) = (&self.sizes, self.columns);
        refuse(format!("the input, {sizes:?}, has {columns} columns; with k = {k} it must have {needed}"))
    }

    /// Allocates the output of a layer with `n` output channels.
    fn output(&self, torch: &'static Torch, n: usize, dtype: Type) -> Result<Tensor, Failure> {
        let outer = &self.sizes[..self.sizes.len() - 1];
        Tensor::empty(torch, &[outer, &[n]].concat(), dtype, self.device)
    }

    /// Describes `m` rows of k elements after an operation without operands.
    fn input(&self, m: usize, k: usize, operation: lg_operation) -> lg_input {
        lg_input {
            struct_size: size_of::<lg_input>(),
            m,
            k,
            operation,
            input_type: self.input_type,
            input: self.data,
            input_stride: 0,
            residual: ptr::null_mut(),
            residual_stride: 0,
            norm_weight: ptr::null(),
            norm_bias: ptr::null(),
            epsilon: 0.0,
            gate_order: LG_GATE_HALVES,
            gather: ptr::null(),
            gather_input_rows: 0,
            smoothing: ptr::null(),
            scaling: LG_SCALING_PER_TOKEN,
            static_scale: 0.0,
            given_scales: ptr::null(),
        }
    }
}

/// Describes an output of `m` rows.
fn result(output: &Tensor, dtype: Type) -> Result<lg_output, Failure> {
    Ok(lg_output {
        struct_size: size_of::<lg_output>(),
        output: output.data()?,
        output_stride: 0,
        output_type: dtype.of_output()?,
    })
}

/// `linear(Tensor x, Tensor packed, Tensor? bias, Tensor? smoothing, int n, int k, int group, ScalarType? dtype)`.
///
/// # Safety
/// The arguments are on the stack.
pub(super) unsafe fn linear(arguments: &mut Arguments) -> Result<Outputs, Failure> {
    // SAFETY: the caller vouches for them.
    unsafe { Linear::read(arguments, false) }.forward()
}

/// `fused_linear`: the arguments of `linear` up to the group, then `int operation, Tensor? norm_weight, Tensor? norm_bias,
/// float epsilon, bool interleaved, Tensor(a!)? residual, ScalarType? dtype`.
///
/// # Safety
/// The arguments are on the stack.
pub(super) unsafe fn fused_linear(arguments: &mut Arguments) -> Result<Outputs, Failure> {
    // SAFETY: the caller vouches for them.
    unsafe { Linear::read(arguments, true) }.forward()
}

/// A call of `linear` or `fused_linear`.
struct Linear {
    torch: &'static Torch,
    x: Tensor,
    packed: Tensor,
    bias: Option<Tensor>,
    smoothing: Option<Tensor>,
    shape: [i64; 3],
    operation: i64,
    norm_weight: Option<Tensor>,
    norm_bias: Option<Tensor>,
    epsilon: f64,
    interleaved: bool,
    residual: Option<Tensor>,
    dtype: Option<Type>,
}

impl Linear {
    /// Reads the arguments of `fused_linear`, or of `linear`.
    ///
    /// # Safety
    /// They are on the stack.
    unsafe fn read(arguments: &mut Arguments, is_fused: bool) -> Self {
        // SAFETY: they have these types in this order.
        unsafe {
            let mut call = Self {
                torch: arguments.torch,
                x: arguments.tensor(),
                packed: arguments.tensor(),
                bias: arguments.optional_tensor(),
                smoothing: arguments.optional_tensor(),
                shape: [arguments.integer(), arguments.integer(), arguments.integer()],
                operation: LG_OPERATION_PLAIN.into(),
                norm_weight: None,
                norm_bias: None,
                epsilon: 0.0,
                interleaved: false,
                residual: None,
                dtype: None,
            };
            if is_fused {
                call.operation = arguments.integer();
                call.norm_weight = arguments.optional_tensor();
                call.norm_bias = arguments.optional_tensor();
                call.epsilon = arguments.float();
                call.interleaved = arguments.boolean();
                call.residual = arguments.optional_tensor();
            }
            call.dtype = arguments.optional_dtype();
            call
        }
    }

    fn forward(&self) -> Result<Outputs, Failure> {
        let rows = Rows::new(&self.x)?;
        let (m, device) = (rows.count(), rows.device);
        let [n, k, group] = sizes("n, k and group", self.shape)?;
        let operation = lg_operation::try_from(self.operation).unwrap_or(lg_operation::MAX);
        let mut input = self.input(&rows, m, k, operation)?;
        rows.check_columns(k, operation)?;
        let packed_bytes = DeviceWeights::bytes_for(n, k, group_of(group))?;
        let packed = self.packed.check("packed", Type::U8, device, packed_bytes)?;
        let bias = check_given("bias", &self.bias, Type::F32, device, n)?;
        let smoothing = check_given("smoothing", &self.smoothing, Type::F32, device, k)?;
        let dtype = self.dtype.unwrap_or(rows.dtype);
        dtype.of_output()?;
        let output = rows.output(self.torch, n, dtype)?;
        if m == 0 {
            return one(output);
        }
        input.epsilon = self.epsilon as f32;
        input.gate_order = self.interleaved.into();
        let (lane, stream) = Lane::current(self.torch, device)?;
        let scratch_bytes = QuantizedSpan::bytes(m, k)?;
        // The workspace's, until both launches of the call are on the stream,
        // or memory that torch gives to later launches on this stream only.
        let (_turn, own);
        let scratch = if scratch_bytes <= lane.workspace.scratch().bytes() {
            _turn = lane.turn.lock();
            lane.workspace.scratch()
        } else {
            own = Tensor::empty(self.torch, &[scratch_bytes], Type::U8, device)?;
            device_bytes(own.data()?.cast_const(), scratch_bytes)
        };
        // SAFETY: the tensors live until the launches are on the stream, after which torch orders what uses their
        // memory behind them. Sizes, types and devices are checked. The lane's parts live as long as the program.
        unsafe {
            let weights = lane.gpu.weights_in(device_bytes(packed, packed_bytes), [n, k], group_of(group))?;
            let linear = lane.gpu.linear_of(weights, span(bias), span(smoothing))?;
            let (source, target) = (input.on_device()?, result(&output, dtype)?.on_device(m, n)?);
            linear.forward(lane.gpu, &source, &target, scratch, lane.workspace, handle_of(stream))?;
        }
        one(output)
    }

    /// Describes the input, if the operands of the operation are there, and no others.
    fn input(&self, rows: &Rows, m: usize, k: usize, operation: lg_operation) -> Result<lg_input, Failure> {
        let mut input = rows.input(m, k, operation);
        match operation {
            LG_OPERATION_RMS_NORM | LG_OPERATION_LAYER_NORM => {
                if self.norm_weight.is_none() {
                    return refuse("a norm needs norm_weight".to_owned());
                }
                let vector = |what, tensor| check_given(what, tensor, rows.dtype, rows.device, rows.columns);
                input.norm_weight = vector("norm_weight", &self.norm_weight)?;
                input.norm_bias = vector("norm_bias", &self.norm_bias)?;
                let elements = self.x.elements()?;
                input.residual = check_given("residual", &self.residual, rows.dtype, rows.device, elements)?;
            }
            LG_OPERATION_PLAIN | LG_OPERATION_SILU_MUL | LG_OPERATION_GELU_TANH_MUL => {
                if [&self.norm_weight, &self.norm_bias, &self.residual].into_iter().any(Option::is_some) {
                    return refuse(
                        "norm_weight, norm_bias and residual go with a norm; leave them out".to_owned(),
                    );
                }
            }
            _ => {
                let found = self.operation;
                return refuse(format!("operation is {found}; use liquidgemm.torch.OPERATIONS"));
            }
        }
        Ok(input)
    }
}

/// Allocates codes, whose rows are a multiple of 64 bytes apart, and scales of `m` rows.
fn quantized(torch: &'static Torch, m: usize, k: usize, device: Device) -> Result<[Tensor; 2], Failure> {
    let codes =
        Tensor::empty(torch, &[m, k.next_multiple_of(QuantizedSpan::STRIDE_ALIGNMENT)], Type::I8, device)?;
    Ok([codes, Tensor::empty(torch, &[m], Type::F32, device)?])
}

/// Launches the quantization of what `input` describes to what [`quantized`] has allocated.
///
/// # Safety
/// The input's pointers are tensors on the lane's device.
unsafe fn launch_quantize(
    (lane, stream): (&Lane, lg_stream),
    input: &lg_input,
    [codes, scales]: &[Tensor; 2],
) -> Result<(), Failure> {
    let operands = QuantizeOperands {
        source: input.on_device()?,
        k: input.k,
        smoothing: device_or_none(input.smoothing),
        codes: device(codes.data()?.cast_const()),
        code_stride: input.k.next_multiple_of(QuantizedSpan::STRIDE_ALIGNMENT),
        scales: device(scales.data()?.cast_const()),
    };
    // SAFETY: the caller vouches for the input; codes and scales are as large as the operands need.
    unsafe { Ok(lane.gpu.quantize(&operands, handle_of(stream))?) }
}

/// `quantize(Tensor x, Tensor? smoothing) -> (Tensor, Tensor)`.
///
/// # Safety
/// The arguments are on the stack.
pub(super) unsafe fn quantize(arguments: &mut Arguments) -> Result<Outputs, Failure> {
    let torch = arguments.torch;
    // SAFETY: they have these types in this order.
    let (x, smoothing) = unsafe { (arguments.tensor(), arguments.optional_tensor()) };
    let rows = Rows::new(&x)?;
    let (m, k) = (rows.count(), rows.columns);
    let mut input = rows.input(m, k, LG_OPERATION_PLAIN);
    input.smoothing = check_given("smoothing", &smoothing, Type::F32, rows.device, k)?.cast();
    let outputs = quantized(torch, m, k, rows.device)?;
    if m > 0 {
        if !k.is_multiple_of(QuantizedSpan::STRIDE_ALIGNMENT) {
            // The kernel's own zeros behind a row may not reach the next one.
            outputs[0].zero()?;
        }
        // SAFETY: the tensors are checked, and live until the launch is on the stream.
        unsafe { launch_quantize(Lane::current(torch, rows.device)?, &input, &outputs)? };
    }
    Ok(outputs.map(Some))
}

/// `gemm(Tensor codes, Tensor scales, Tensor packed, Tensor? bias, int n, int k, int group, ScalarType dtype) -> Tensor`.
///
/// # Safety
/// The arguments are on the stack.
pub(super) unsafe fn gemm(arguments: &mut Arguments) -> Result<Outputs, Failure> {
    let torch = arguments.torch;
    // SAFETY: they have these types in this order.
    let (codes, scales, packed, bias, shape, dtype) = unsafe {
        (
            arguments.tensor(),
            arguments.tensor(),
            arguments.tensor(),
            arguments.optional_tensor(),
            [arguments.integer(), arguments.integer(), arguments.integer()],
            arguments.dtype(),
        )
    };
    let [n, k, group] = sizes("n, k and group", shape)?;
    let (device_of_codes, found) = (codes.device()?, codes.sizes()?);
    let stride = k.checked_next_multiple_of(QuantizedSpan::STRIDE_ALIGNMENT).unwrap_or(usize::MAX);
    let m = match found[..] {
        [m, columns] if columns == stride => m,
        _ => {
            return refuse(format!(
                "codes are {found:?}; they must be [m, {stride}], as quantize returns them"
            ));
        }
    };
    let code_bytes = elements("codes", [m, stride])?;
    let activations = codes.check("codes", Type::I8, device_of_codes, code_bytes)?;
    let token_scales = scales.check("scales", Type::F32, device_of_codes, m)?;
    let packed_bytes = DeviceWeights::bytes_for(n, k, group_of(group))?;
    let memory = packed.check("packed", Type::U8, device_of_codes, packed_bytes)?;
    let bias = check_given("bias", &bias, Type::F32, device_of_codes, n)?;
    dtype.of_output()?;
    let output = Tensor::empty(torch, &[m, n], dtype, device_of_codes)?;
    if m == 0 {
        return one(output);
    }
    let (lane, stream) = Lane::current(torch, device_of_codes)?;
    let target = result(&output, dtype)?.on_device(m, n)?;
    let operands = Operands {
        m,
        activations: device(activations.cast_const()),
        activation_stride: stride,
        token_scales: device(token_scales.cast_const()),
        bias: span(bias),
        output: target.output,
        output_stride: target.output_stride,
        output_type: target.output_type,
    };
    // SAFETY: as in `Linear::forward`.
    unsafe {
        let weights = lane.gpu.weights_in(device_bytes(memory, packed_bytes), [n, k], group_of(group))?;
        lane.gpu.gemm(&weights, &operands, lane.workspace, handle_of(stream))?;
    }
    one(output)
}

/// `grouped_linear(Tensor x, Tensor packed, Tensor offsets, int experts, int n, int k, int group, int operation,
/// Tensor? bias, Tensor? gather, ScalarType? dtype) -> Tensor`.
///
/// # Safety
/// The arguments are on the stack.
pub(super) unsafe fn grouped_linear(arguments: &mut Arguments) -> Result<Outputs, Failure> {
    let torch = arguments.torch;
    // SAFETY: they have these types in this order.
    let (x, packed, offsets, shape, operation, bias, gather, dtype) = unsafe {
        (
            arguments.tensor(),
            arguments.tensor(),
            arguments.tensor(),
            [arguments.integer(), arguments.integer(), arguments.integer(), arguments.integer()],
            arguments.integer(),
            arguments.optional_tensor(),
            arguments.optional_tensor(),
            arguments.optional_dtype(),
        )
    };
    let found = Rows::new(&x)?;
    let [input_rows, _] = found.sizes[..] else {
        return refuse(format!("the input is {:?}; it must be [rows, k]", found.sizes));
    };
    let [experts, n, k, group] = sizes("experts, n, k and group", shape)?;
    let operation = match lg_operation::try_from(operation) {
        Ok(known @ (LG_OPERATION_PLAIN | LG_OPERATION_SILU_MUL | LG_OPERATION_GELU_TANH_MUL)) => known,
        _ => return refuse("a grouped linear takes no norm; apply it before the rows are sorted".to_owned()),
    };
    found.check_columns(k, operation)?;
    let rows = gather.as_ref().map_or(Ok(input_rows), Tensor::elements)?;
    let packed_bytes = DeviceExperts::bytes_for(experts, [n, k], group_of(group))?;
    let memory = packed.check("packed", Type::U8, found.device, packed_bytes)?;
    let offsets = offsets.check("offsets", Type::I32, found.device, experts + 1)?;
    let bias = check_given("bias", &bias, Type::F32, found.device, elements("bias", [experts, n])?)?;
    let index = check_given("gather", &gather, Type::I32, found.device, rows)?;
    let dtype = dtype.unwrap_or(found.dtype);
    dtype.of_output()?;
    let output = Tensor::empty(torch, &[rows, n], dtype, found.device)?;
    if rows == 0 {
        return one(output);
    }
    let mut input = found.input(rows, k, operation);
    if gather.is_some() {
        (input.gather, input.gather_input_rows) = (index.cast_const().cast(), input_rows);
    }
    let activations = quantized(torch, rows, k, found.device)?;
    let (lane, stream) = Lane::current(torch, found.device)?;
    let target = result(&output, dtype)?.on_device(rows, n)?;
    let operands = GroupedOperands {
        rows,
        index: DeviceRowIndex::Offsets(device(offsets.cast_const())),
        expected_rows: None,
        activations: device(activations[0].data()?.cast_const()),
        activation_stride: k.next_multiple_of(QuantizedSpan::STRIDE_ALIGNMENT),
        token_scales: device(activations[1].data()?.cast_const()),
        bias: span(bias),
        output: target.output,
        output_stride: target.output_stride,
        output_type: target.output_type,
        status: None,
    };
    // SAFETY: as in `Linear::forward`. The offsets and the index of the rows may have any values.
    unsafe {
        let weights =
            lane.gpu.experts_in(device_bytes(memory, packed_bytes), experts, [n, k], group_of(group))?;
        launch_quantize((lane, stream), &input, &activations)?;
        lane.gpu.grouped_gemm(&weights, &operands, handle_of(stream))?;
    }
    one(output)
}

/// `combine(Tensor rows, Tensor positions, Tensor weights) -> Tensor`.
///
/// # Safety
/// The arguments are on the stack.
pub(super) unsafe fn combine(arguments: &mut Arguments) -> Result<Outputs, Failure> {
    let torch = arguments.torch;
    // SAFETY: they have these types in this order.
    let (rows, positions, weights) = unsafe { (arguments.tensor(), arguments.tensor(), arguments.tensor()) };
    let found = Rows::new(&rows)?;
    let (of_positions, of_weights) = (positions.sizes()?, weights.sizes()?);
    let ([row_count, n], [tokens, top_k]) = (&found.sizes[..], &of_positions[..]) else {
        return refuse("rows are [rows, n], positions and weights [tokens, top_k]".to_owned());
    };
    let (&row_count, &n, &tokens, &top_k) = (row_count, n, tokens, top_k);
    if of_positions != of_weights {
        return refuse("rows are [rows, n], positions and weights [tokens, top_k]".to_owned());
    }
    let choices = elements("positions", [tokens, top_k])?;
    let positions = positions.check("positions", Type::I32, found.device, choices)?;
    let weights = weights.check("weights", Type::F32, found.device, choices)?;
    let output = Tensor::empty(torch, &[tokens, n], found.dtype, found.device)?;
    if tokens == 0 {
        return one(output);
    }
    let (lane, stream) = Lane::current(torch, found.device)?;
    let operands = CombineOperands {
        tokens,
        top_k,
        row_count,
        n,
        element_type: output_type(found.input_type)?,
        rows: device(found.data),
        rows_stride: n,
        positions: device(positions.cast_const()),
        weights: device(weights.cast_const()),
        output: device(output.data()?.cast_const()),
        output_stride: n,
    };
    // SAFETY: the tensors are checked, and live until the launch is on the stream. The positions may have any values.
    unsafe { lane.gpu.combine(&operands, handle_of(stream))? };
    one(output)
}
