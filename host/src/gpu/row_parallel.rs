//! Row-parallel linear layers: each GPU has a range of the input channels, and the GPUs add their sums.
//! The twin on the host is `host/src/cpu/row_parallel.rs`.
//!
//! The int32 sums of all GPUs are added before one epilogue, so the result has the bits of one GPU.
//! For that, every GPU quantizes a token with the scale of the whole token. A call is, for each rank:
//!
//! 1. quantize the rank's part of the rows, for its scales;
//! 2. all-reduce the scales by the largest: f32 `[m]`, compared as int32 (see [`SHARED_SCALES`]);
//! 3. quantize again with these scales;
//! 4. GEMM with int32 output;
//! 5. all-reduce the sums: int32 `[m, n]`;
//! 6. epilogue: scales, bias, rounding (`scale_sums.rs`).

use std::ops::RangeInclusive;

use cust::sys::{self, CUmemorytype};

use crate::check::checked_elements;
use crate::error::gpu::{During, GpuError};
use crate::gpu::all_reduce::{AllReduce, Reduction};
use crate::gpu::{
    DeviceLinear, DeviceSpan, Gpu, LinearInput, LinearOutput, Operands, QuantizedSpan, StreamHandle,
    SumsOperands, Workspace,
};
use crate::operation::{HalfType, Operation, Scaling};
use crate::{Error, OutputType};

/// The reduction that gives each token its whole row's scale.
///
/// A scale is `max|x| / 127`, rounded, so the largest scale of a row's parts is the scale of the row.
/// Scales are not negative, or the same on all ranks if the caller gives them,
/// so their bits as int32 have the same order.
/// A part with a value that is not finite has the scale NaN, whose bits are larger than all others:
/// then the whole row has it, as on one GPU. Reductions of floating-point values don't agree on NaN.
const SHARED_SCALES: Reduction = Reduction::MaxI32;

/// Parts of the scratch memory begin at multiples of this many bytes.
const PART_ALIGNMENT: usize = 256;

/// What the GPUs of a row-parallel layer add.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Partials {
    /// The int32 sums. The result has the bits of one GPU, however many take part.
    #[default]
    Int32,
    /// Products rounded to the output's type, bf16 or f16.
    ///
    /// They are half the traffic, and need no common scale, so there is one quantization and one all-reduce.
    /// **The result is not exact.** It depends on the number of GPUs and on the order
    /// in which the communication library adds, and its error is that of sums in 16 bits.
    Rounded,
}

/// A rank's part of a row-parallel linear layer, in device memory.
///
/// The shard is that of a whole layer's [`input_shard`](crate::Linear::input_shard).
/// All ranks together have k of at most 131,072, or sums could wrap.
#[derive(Debug)]
pub struct RowParallelLinear {
    shard: DeviceLinear,
    partials: Partials,
}

/// The operands of a rank's call of a row-parallel layer.
#[derive(Debug)]
pub struct RowParallelCall<'a, C> {
    /// The rank's GPU.
    pub gpu: &'a Gpu,
    /// The rank's part of the layer.
    pub layer: &'a RowParallelLinear,
    /// The rank's handle to the other ranks.
    pub communicator: &'a C,
    /// The rank's input channels of all tokens. A norm is refused: it needs the whole row.
    pub input: LinearInput,
    /// The whole layer's output, which every rank gets.
    pub output: LinearOutput,
    /// [`RowParallelLinear::scratch_bytes`] bytes at a multiple of 16 bytes.
    pub scratch: DeviceSpan,
    /// The stream's workspace.
    pub workspace: &'a Workspace,
    /// The stream of all launches.
    pub stream: StreamHandle,
}

/// The parts of the scratch memory.
struct Parts {
    quantized: QuantizedSpan,
    /// f32 `[m]`: the scales of the rank's part of the rows, then those of the whole rows.
    shared_scales: DeviceSpan,
    /// `[m, n]` of int32, or of the output's type.
    partials: DeviceSpan,
}

impl RowParallelLinear {
    /// Makes a row-parallel layer of a rank's shard.
    ///
    /// The bias, if there is one, is the whole layer's, on every rank. It is added once.
    pub fn new(shard: DeviceLinear) -> Self {
        Self { shard, partials: Partials::Int32 }
    }

    /// Chooses what the GPUs add. All ranks choose the same.
    pub fn with_partials(self, partials: Partials) -> Self {
        Self { partials, ..self }
    }

    /// Returns the rank's shard.
    pub fn shard(&self) -> &DeviceLinear {
        &self.shard
    }

    /// Returns what the GPUs add.
    pub fn partials(&self) -> Partials {
        self.partials
    }

    /// Returns the bytes of scratch memory that a call needs for `m` tokens.
    /// The memory lies at a multiple of 16 bytes.
    ///
    /// # Errors
    /// [`Error::TooLarge`] if they exceed the address space.
    pub fn scratch_bytes(&self, m: usize) -> Result<usize, Error> {
        let [_, partials, bytes] = self.offsets(m)?;
        checked_elements("partial sums", m, self.shard.n() * bytes)?
            .checked_add(partials)
            .ok_or(Error::TooLarge { what: "partial sums", rows: m, columns: self.shard.n() })
    }

    /// Returns the offsets of shared scales and partials in scratch memory, and the bytes of a partial.
    fn offsets(&self, m: usize) -> Result<[usize; 3], Error> {
        let too_large = || Error::TooLarge { what: "activation matrix", rows: m, columns: self.shard.k() };
        let next = |bytes: usize| bytes.checked_next_multiple_of(PART_ALIGNMENT).ok_or_else(too_large);
        let scales = next(QuantizedSpan::bytes(m, self.shard.k())?)?;
        let partials = next(m.checked_mul(4).and_then(|of| scales.checked_add(of)).ok_or_else(too_large)?)?;
        Ok([scales, partials, if self.partials == Partials::Int32 { 4 } else { 2 }])
    }

    /// Prepares for calls with these numbers of tokens, so that they compile nothing.
    ///
    /// The communication library may still prepare something in its first reductions of each size,
    /// so make a call of each size before a graph capture.
    ///
    /// # Errors
    /// [`Error::NormOfShard`] for a norm, and those of [`DeviceLinear::prepare`].
    pub fn prepare(
        &self,
        gpu: &Gpu,
        operation: &Operation<DeviceSpan>,
        input_type: HalfType,
        m: RangeInclusive<usize>,
    ) -> Result<(), Error> {
        if operation.is_norm() {
            return Err(Error::NormOfShard);
        }
        gpu.prepare_scale_sums()?;
        self.shard.prepare(gpu, operation, input_type, m)
    }
}

impl<C: AllReduce> RowParallelCall<'_, C> {
    /// Computes the rank's part of the layer on its stream, adds those of all ranks, and returns at once.
    ///
    /// Every rank calls it, each on a thread of its own. One thread for several ranks calls
    /// [`forward_all`](Self::forward_all) instead, or it would wait for itself.
    ///
    /// With [`Partials::Int32`] the output has the bits of [`Linear::forward`](crate::Linear::forward)
    /// of the whole layer, also for values that are not finite.
    /// With `m = 0` it only checks the operands. All ranks have the same m, so either all communicate, or none.
    /// The call allocates nothing and waits for nothing, so a CUDA graph can capture it
    /// once [`prepare`](RowParallelLinear::prepare) has compiled the kernels,
    /// if the communication library allows that. NCCL does after a first call of this size.
    ///
    /// # Errors
    /// - [`Error::NormOfShard`] for a norm.
    /// - [`GpuError::ElementType`] for [`Partials::Rounded`] with an output that does not have 16 bits.
    /// - Those of [`DeviceLinear::forward`], and of the communication library.
    ///
    /// A rank that fails does not take part in the reductions that the other ranks wait for.
    /// A server then ends the communication (`Communicator::abort`).
    ///
    /// # Safety
    /// As for [`DeviceLinear::forward`], on every rank;
    /// the scratch memory is also read and written by the communication library.
    /// All ranks call it in the same order, with the same m, operation, output type and partials.
    pub unsafe fn forward(&self) -> Result<(), Error> {
        // SAFETY: the caller upholds the same contract.
        unsafe { Self::forward_all(std::slice::from_ref(self)) }
    }

    /// Like [`forward`](Self::forward), for several ranks on one thread.
    ///
    /// The calls are those of all ranks, or of all ranks in this process; each has a GPU and a stream of its own.
    /// All operands of all ranks are checked before anything is launched.
    ///
    /// # Errors
    /// As [`forward`](Self::forward), and [`Error::ShardsDiffer`]
    /// if m, n, the output's type or the partials are not the same in all calls.
    ///
    /// # Safety
    /// As for [`forward`](Self::forward), for each call.
    pub unsafe fn forward_all(calls: &[Self]) -> Result<(), Error> {
        let Some(first) = calls.first() else { return Ok(()) };
        let parts = calls.iter().map(Self::check).collect::<Result<Vec<_>, _>>()?;
        for (shard, call) in calls.iter().enumerate() {
            let same = |what, [expected, found]: [String; 2]| match expected == found {
                true => Ok(()),
                false => Err(Error::ShardsDiffer { shard, what, expected, found }),
            };
            same("number of tokens", [first, call].map(|call| call.input.m.to_string()))?;
            same("n", [first, call].map(|call| call.layer.shard.n().to_string()))?;
            same("output type", [first, call].map(|call| call.output.output_type.to_string()))?;
            same("kind of partials", [first, call].map(|call| format!("{:?}", call.layer.partials)))?;
        }
        if first.input.m == 0 {
            return Ok(());
        }
        let ranks = || calls.iter().zip(&parts);
        // SAFETY: the operands are checked, and the caller vouches for the rest. The stream orders the launches.
        unsafe {
            match first.layer.partials {
                Partials::Int32 => {
                    ranks().try_for_each(|(call, parts)| call.quantize_for_scales(parts))?;
                    Self::reduce(calls, SHARED_SCALES, |rank| parts[rank].shared_scales)?;
                    ranks().try_for_each(|(call, parts)| call.multiply(parts))?;
                    Self::reduce(calls, Reduction::SumI32, |rank| parts[rank].partials)?;
                    ranks().try_for_each(|(call, parts)| {
                        call.gpu.scale_sums(&call.sums_operands(parts), call.stream)
                    })
                }
                Partials::Rounded => {
                    let sum = match first.output.output_type {
                        OutputType::F16 => Reduction::SumF16,
                        _ => Reduction::SumBf16,
                    };
                    ranks().try_for_each(|(call, parts)| call.multiply_rounded(parts))?;
                    Self::reduce(calls, sum, |rank| calls[rank].rounded_output(&parts[rank]).output)?;
                    ranks().try_for_each(|(call, parts)| call.copy_rounded(parts))
                }
            }
        }
    }

    /// Reduces a buffer of each rank, in a group if there are several.
    ///
    /// # Safety
    /// As for [`AllReduce::all_reduce`].
    unsafe fn reduce(
        calls: &[Self],
        reduction: Reduction,
        buffer: impl Fn(usize) -> DeviceSpan,
    ) -> Result<(), Error> {
        let reduce = |(rank, call): (usize, &Self)| {
            let _entered = call.gpu.context.enter()?;
            // SAFETY: the caller upholds the same contract.
            unsafe { call.communicator.all_reduce(reduction, buffer(rank), call.stream) }
        };
        if let [call] = calls {
            return reduce((0, call));
        }
        let group = calls[0].communicator;
        group.begin_group()?;
        let reduced = calls.iter().enumerate().try_for_each(reduce);
        // End the group even after an error, or it would hold up every later call of this thread.
        let ended = group.end_group();
        reduced.and(ended)
    }

    /// Checks all operands, and lays out the scratch memory.
    fn check(&self) -> Result<Parts, Error> {
        let (shard, m) = (&self.layer.shard, self.input.m);
        if self.input.operation.is_norm() {
            return Err(Error::NormOfShard);
        }
        let is_rounded = self.layer.partials == Partials::Rounded;
        if is_rounded && self.output.output_type.size() != 2 {
            let element_type = self.output.output_type;
            return Err(GpuError::ElementType { what: "a sum of rounded partials", element_type }.into());
        }
        let needed = self.layer.scratch_bytes(m)?;
        let [scales, partials, bytes] = self.layer.offsets(m)?;
        if m > 0 {
            self.scratch.check("scratch", needed, 16)?;
        }
        let part = |offset: usize, bytes| {
            // SAFETY: the part lies inside the scratch memory, or nothing uses it because there are no tokens.
            unsafe { DeviceSpan::from_raw(self.scratch.address() + offset as u64, bytes) }
        };
        let parts = Parts {
            quantized: QuantizedSpan::in_scratch(self.scratch, m, shard.k())?,
            shared_scales: part(scales, m * 4),
            partials: part(partials, m * shard.n() * bytes),
        };
        self.gpu.check_context("weights", shard.weights().context())?;
        shard.quantize_operands(&self.input, &parts.quantized).check()?;
        self.gpu.check_operands(
            shard.weights(),
            &shard.operands(&parts.quantized, &self.output),
            self.workspace,
        )?;
        if !is_rounded {
            self.sums_operands(&parts).check()?;
        }
        Ok(parts)
    }

    /// Returns the operands of the epilogue after the sum over all ranks.
    fn sums_operands(&self, parts: &Parts) -> SumsOperands {
        let n = self.layer.shard.n();
        SumsOperands {
            m: self.input.m,
            n,
            sums: parts.partials,
            sums_stride: n,
            channel_scales: self.layer.shard.weights().channel_scales(),
            token_scales: parts.quantized.scales(),
            bias: self.layer.shard.bias(),
            output: self.output.output,
            output_stride: self.output.output_stride,
            output_type: self.output.output_type,
        }
    }

    /// Quantizes the rank's part of the rows. Only the scales are used.
    ///
    /// # Safety
    /// As for [`forward`](Self::forward).
    unsafe fn quantize_for_scales(&self, parts: &Parts) -> Result<(), Error> {
        let to = parts.quantized.with_scales(parts.shared_scales);
        // SAFETY: the caller upholds the same contract.
        unsafe { self.layer.shard.quantize_to(self.gpu, &self.input, &to, self.stream) }
    }

    /// Quantizes with the scales of the whole rows, and computes the rank's int32 sums.
    ///
    /// # Safety
    /// As for [`forward`](Self::forward).
    unsafe fn multiply(&self, parts: &Parts) -> Result<(), Error> {
        let shard = &self.layer.shard;
        let input = LinearInput { scaling: Scaling::Given(parts.shared_scales), ..self.input };
        let output =
            LinearOutput { output: parts.partials, output_stride: shard.n(), output_type: OutputType::I32 };
        let operands = Operands { bias: None, ..shard.operands(&parts.quantized, &output) };
        // SAFETY: the caller upholds the same contract.
        unsafe {
            shard.quantize_to(self.gpu, &input, &parts.quantized, self.stream)?;
            self.gpu.gemm(shard.weights(), &operands, self.workspace, self.stream)
        }
    }

    /// Returns where rounded partials are added: in the output, or in scratch memory if the output's rows have gaps.
    fn rounded_output(&self, parts: &Parts) -> LinearOutput {
        let n = self.layer.shard.n();
        if self.output.output_stride != n {
            return LinearOutput { output: parts.partials, output_stride: n, ..self.output };
        }
        // SAFETY: the output has been checked to have so many bytes. The caller of the call vouches for them.
        let output = unsafe { DeviceSpan::from_raw(self.output.output.address(), self.input.m * n * 2) };
        LinearOutput { output, ..self.output }
    }

    /// Computes the rank's product, rounded. The first rank's has the bias.
    ///
    /// # Safety
    /// As for [`forward`](Self::forward).
    unsafe fn multiply_rounded(&self, parts: &Parts) -> Result<(), Error> {
        let shard = &self.layer.shard;
        let mut operands = shard.operands(&parts.quantized, &self.rounded_output(parts));
        if self.communicator.rank() != 0 {
            operands.bias = None;
        }
        // SAFETY: the caller upholds the same contract.
        unsafe {
            shard.quantize_to(self.gpu, &self.input, &parts.quantized, self.stream)?;
            self.gpu.gemm(shard.weights(), &operands, self.workspace, self.stream)
        }
    }

    /// Copies the sum of rounded partials to the output's rows, unless it is there.
    ///
    /// # Safety
    /// As for [`forward`](Self::forward).
    unsafe fn copy_rounded(&self, parts: &Parts) -> Result<(), Error> {
        let sum = self.rounded_output(parts);
        if sum.output.address() == self.output.output.address() {
            return Ok(());
        }
        let row = sum.output_stride * 2;
        let copy = sys::CUDA_MEMCPY2D {
            srcMemoryType: CUmemorytype::CU_MEMORYTYPE_DEVICE,
            srcDevice: sum.output.address(),
            srcPitch: row,
            dstMemoryType: CUmemorytype::CU_MEMORYTYPE_DEVICE,
            dstDevice: self.output.output.address(),
            dstPitch: self.output.output_stride * 2,
            WidthInBytes: row,
            Height: self.input.m,
            srcXInBytes: 0,
            srcY: 0,
            srcHost: std::ptr::null(),
            srcArray: std::ptr::null_mut(),
            dstXInBytes: 0,
            dstY: 0,
            dstHost: std::ptr::null_mut(),
            dstArray: std::ptr::null_mut(),
        };
        let _entered = self.gpu.context.enter()?;
        // SAFETY: both have so many rows, as `check` has found; the caller vouches for them.
        unsafe { sys::cuMemcpy2DAsync_v2(&copy, self.stream.stream()) }
            .during("copying the sums to the output")?;
        Ok(())
    }
}
