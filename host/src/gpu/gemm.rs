//! Checks and launches one GEMM. The device twin is `kernels-gpu/src/gemm.rs`.

use std::ffi::c_void;
use std::ops::Range;

use cust::stream::Stream;
use cust::sys::{CUfunction, CUstream};
use liquidgemm_format::arguments::{GemmArguments, output_type};
use liquidgemm_format::brick::BRICK_CHANNELS;
use liquidgemm_format::tile::SPAN_K;

use crate::gpu::Gpu;
use crate::gpu::context::Entered;
use crate::gpu::error::{During, GpuError};
use crate::gpu::launch::Launch;
use crate::gpu::memory::{DeviceSpan, DeviceWeights, Workspace};
use crate::gpu::tensor_map::{Boxes, TensorMap};
use crate::{Error, Method, OutputType, Plan, Tiled};

/// What a GEMM reads and writes in device memory, besides the weights.
#[derive(Clone, Copy, Debug)]
pub struct Operands {
    /// Tokens.
    pub m: usize,
    /// int8 `[m, k]`, row-major; 16-byte aligned.
    pub activations: DeviceSpan,
    /// Bytes from one row of the activations to the next: at least k, a multiple of 16. A multiple of 64 is read up to 1.4 times as fast.
    pub activation_stride: usize,
    /// f32 `[m]`, the scale of each token.
    pub token_scales: DeviceSpan,
    /// f32 `[n]`, added to every row. Not with [`OutputType::I32`].
    pub bias: Option<DeviceSpan>,
    /// `[m, n]` of `output_type`, row-major.
    pub output: DeviceSpan,
    /// Elements from one row of the output to the next: at least n. A multiple of 8 makes 16-bit stores fast.
    pub output_stride: usize,
    /// The output's type.
    pub output_type: OutputType,
}

/// A stream to launch on: `cust`'s, or a raw one that another framework made.
#[derive(Clone, Copy, Debug)]
pub struct StreamHandle(CUstream);

impl StreamHandle {
    /// A raw `CUstream`. Null is the default stream.
    ///
    /// # Safety
    /// The stream belongs to the context of the [`Gpu`] that it is used with, and outlives the launches on it.
    pub const unsafe fn from_raw(stream: CUstream) -> Self {
        Self(stream)
    }

    /// The raw handle.
    pub const fn as_raw(self) -> CUstream {
        self.0
    }
}

impl From<&Stream> for StreamHandle {
    fn from(stream: &Stream) -> Self {
        Self(stream.as_inner())
    }
}

impl Operands {
    /// Whether the copy engine can write the output: it takes 16-bit elements in rows that start and, lest it write
    /// beyond their end, stop on 16 bytes.
    fn output_has_16_byte_rows(&self, n: usize) -> bool {
        let size = self.output_type.size();
        size == 2
            && (n * size).is_multiple_of(16)
            && (self.output_stride * size).is_multiple_of(16)
            && self.output.address().is_multiple_of(16)
    }

    fn check(&self, weights: &DeviceWeights) -> Result<(), Error> {
        let (m, n, k) = (self.m, weights.n(), weights.k());
        if self.activation_stride < k {
            return Err(Error::StrideTooShort { stride: self.activation_stride, k });
        }
        if !self.activation_stride.is_multiple_of(16) {
            return Err(GpuError::Misaligned {
                what: "activations' row stride",
                value: self.activation_stride as u64,
                multiple: 16,
                fix: "pad each row, as QuantizedActivations does",
            }
            .into());
        }
        if self.output_stride < n {
            return Err(GpuError::OutputStrideTooShort { stride: self.output_stride, n }.into());
        }
        if self.bias.is_some() && self.output_type == OutputType::I32 {
            return Err(Error::BiasWithRawOutput);
        }
        let limit = u32::MAX as usize;
        if self.output_stride > limit {
            return Err(GpuError::OutOfRange {
                what: "the output's row stride",
                value: self.output_stride,
                limit,
            }
            .into());
        }
        if m == 0 {
            return Ok(());
        }
        // The last row needs no padding behind it.
        let span = |stride: usize, row: usize, size: usize| {
            (m - 1)
                .checked_mul(stride)
                .and_then(|rows| rows.checked_add(row)?.checked_mul(size))
                .unwrap_or(usize::MAX)
        };
        let size = self.output_type.size();
        self.activations.check("activations", span(self.activation_stride, k, 1), 16)?;
        self.token_scales.check("token scales", m.saturating_mul(4), 4)?;
        self.output.check("output", span(self.output_stride, n, size), size as u64)?;
        if let Some(bias) = self.bias {
            bias.check("bias", n * 4, 4)?;
        }
        Ok(())
    }
}

/// A compiled kernel and what each of its thread blocks needs.
#[derive(Clone, Copy)]
pub(super) struct Block {
    pub(super) function: CUfunction,
    pub(super) threads: u32,
    /// Dynamic shared memory.
    pub(super) shared_bytes: u32,
}

/// A launch with all that its kernel is given.
pub(super) struct TiledLaunch {
    block: Block,
    blocks: u32,
    cluster: u32,
    activations: [TensorMap; 2],
    output: TensorMap,
    arguments: GemmArguments,
}

impl Gpu {
    /// Launches `output = epilogue(activations · weightsᵀ)` on `stream` and returns at once; with `m = 0` it does nothing. It takes the plan that [`Gpu::plan`] keeps for the
    /// problem.
    ///
    /// # Errors
    /// As [`Gpu::gemm_with_plan`].
    ///
    /// # Safety
    /// As for [`Gpu::gemm_with_plan`].
    pub unsafe fn gemm(
        &self,
        weights: &DeviceWeights,
        operands: &Operands,
        workspace: &Workspace,
        stream: impl Into<StreamHandle>,
    ) -> Result<(), Error> {
        if operands.m == 0 {
            return self.check_operands(weights, operands, workspace);
        }
        let plan = self.plan(operands.m, weights.n(), weights.k())?;
        // SAFETY: the caller vouches for what this asks for.
        unsafe { self.gemm_with_plan(weights, operands, &plan, workspace, stream) }
    }

    /// As [`Gpu::gemm`], with a plan of the caller's choice.
    ///
    /// Nothing is allocated and nothing waits, so the call can be captured in a CUDA graph (after the first call
    /// with each tile shape, which compiles its kernel). A [divided](crate::Divided) plan launches twice.
    ///
    /// # Errors
    /// Shapes, strides, sizes and alignments that don't fit together, a plan for another problem, or the driver's
    /// own errors. Nothing is launched then, unless it is the second launch of a divided plan that the driver refuses: the first may run
    /// by then, so what it uses must stay until the stream has been waited for.
    ///
    /// # Safety
    /// Until the launch has finished on `stream`:
    /// 1. the operands' spans, the weights and the workspace stay allocated;
    /// 2. nothing else writes to what the GEMM reads, and nothing reads or writes its output;
    /// 3. no other launch uses `workspace`, except later ones on the same stream.
    ///
    /// The launch begins to read the weights, and nothing else, while the one before it on the stream may still run. As
    /// [`DeviceWeights`] are written only by [`Gpu::upload`], which waits, nothing needs to be done about it.
    ///
    /// The operands and the stream belong to this GPU's context.
    pub unsafe fn gemm_with_plan(
        &self,
        weights: &DeviceWeights,
        operands: &Operands,
        plan: &Plan,
        workspace: &Workspace,
        stream: impl Into<StreamHandle>,
    ) -> Result<(), Error> {
        if operands.m == 0 {
            return self.check_operands(weights, operands, workspace);
        }
        let _entered = self.check_gemm(weights, operands, plan, workspace)?;
        let stream = stream.into();
        if let Method::Skinny(skinny) = plan.method() {
            // SAFETY: the operands and the plan are checked; the caller vouches for the rest.
            unsafe { self.launch_skinny(weights, operands, skinny, stream) }?;
            return Ok(());
        }
        // Nothing is launched before all launches are known to be possible.
        let mut launches = [None, None];
        for (launch, (channels, tiled)) in launches.iter_mut().zip(plan.tiled_launches()) {
            let shape = tiled.shape();
            let block = Block {
                function: self.kernels.gemm(shape)?.function(),
                threads: shape.threads(),
                shared_bytes: shape.shared_bytes(),
            };
            *launch = Some(self.prepare_tiled(block, weights, operands, channels, &tiled, workspace)?);
        }
        for launch in launches.into_iter().flatten() {
            // SAFETY: as above; the kernel is that of the plan's tile.
            unsafe { self.launch_tiled(launch, stream) }?;
        }
        Ok(())
    }

    /// Fails unless the operands fit the weights, and everything is this GPU's.
    fn check_operands(
        &self,
        weights: &DeviceWeights,
        operands: &Operands,
        workspace: &Workspace,
    ) -> Result<(), Error> {
        self.check_context("weights", weights.context())?;
        self.check_context("workspace's partial sums", workspace.context())?;
        operands.check(weights)
    }

    /// Fails unless everything fits together; enters the context.
    pub(super) fn check_gemm(
        &self,
        weights: &DeviceWeights,
        operands: &Operands,
        plan: &Plan,
        workspace: &Workspace,
    ) -> Result<Entered, Error> {
        self.check_operands(weights, operands, workspace)?;
        let problem = [operands.m, weights.n(), weights.k()];
        if plan.problem() != problem {
            return Err(GpuError::PlanMismatch {
                plan: format!("[m, n, k] = {:?}", plan.problem()),
                call: format!("{problem:?}"),
            }
            .into());
        }
        workspace.check(plan)?;
        Ok(self.context.enter()?)
    }

    /// The maps of a GEMM's activations, read in boxes of so many tokens × elements along K: of whole boxes, and of the last one, with
    /// the tokens that are left. Where there is only one kind, both are its map.
    pub(super) fn activation_maps(
        &self,
        weights: &DeviceWeights,
        operands: &Operands,
        [box_rows, box_columns]: [u32; 2],
    ) -> Result<[TensorMap; 2], GpuError> {
        let map = |box_rows: u32| {
            let boxes = Boxes {
                address: operands.activations.address(),
                rows: operands.m,
                columns: weights.k(),
                stride_bytes: operands.activation_stride,
                box_rows,
                box_columns,
            };
            TensorMap::of_bytes(self.encode_tensor_map, boxes)
        };
        let rest = operands.m as u32 % box_rows;
        Ok(match rest {
            0 => [map(box_rows)?; 2],
            _ if rest == operands.m as u32 => [map(rest)?; 2],
            _ => [map(box_rows)?, map(rest)?],
        })
    }

    /// The launch of a kernel that takes a tiled GEMM's parameters, for some of its channels.
    pub(super) fn prepare_tiled(
        &self,
        block: Block,
        weights: &DeviceWeights,
        operands: &Operands,
        channels: Range<usize>,
        plan: &Tiled,
        workspace: &Workspace,
    ) -> Result<TiledLaunch, GpuError> {
        let shape = plan.shape();
        let size = operands.output_type.size();
        let activations =
            self.activation_maps(weights, operands, [shape.box_tokens(plan.cluster()), SPAN_K])?;
        let output_address = operands.output.address() + (channels.start * size) as u64;
        let is_mapped = shape.maps_output() && operands.output_has_16_byte_rows(weights.n());
        let output = if is_mapped {
            TensorMap::of_halves(
                self.encode_tensor_map,
                Boxes {
                    address: output_address,
                    rows: operands.m,
                    columns: channels.len(),
                    stride_bytes: operands.output_stride * size,
                    box_rows: shape.epilogue_tokens(),
                    box_columns: BRICK_CHANNELS as u32,
                },
            )?
        } else {
            activations[0]
        };
        let first_f32 = (channels.start * size_of::<f32>()) as u64;
        let arguments = GemmArguments {
            weights: weights.arguments_from(channels.start / BRICK_CHANNELS),
            token_scales: operands.token_scales.address(),
            bias: operands.bias.map_or(0, |bias| bias.address() + first_f32),
            output: output_address,
            partials: workspace.partials(),
            flags: workspace.flags(),
            m: operands.m as u32,
            n: channels.len() as u32,
            output_stride: operands.output_stride as u32,
            output_type: output_code(operands.output_type),
            output_is_mapped: is_mapped.into(),
            first_turn_cycles: shape.strips * shape.strip_stage_bytes() * plan.blocks()
                / self.figures.first_turn_bytes(),
            schedule: *plan.schedule(),
        };
        Ok(TiledLaunch {
            block,
            blocks: plan.blocks(),
            cluster: plan.cluster(),
            activations,
            output,
            arguments,
        })
    }

    /// Launches what has been prepared.
    ///
    /// # Safety
    /// As for [`Gpu::gemm_with_plan`]; [`check_gemm`](Self::check_gemm) has passed, the kernel computes the plan's tile, and the launch's channels
    /// are the problem's, from a strip's first on.
    pub(super) unsafe fn launch_tiled(
        &self,
        mut prepared: TiledLaunch,
        stream: StreamHandle,
    ) -> Result<(), GpuError> {
        let [activations, last_activations] = &mut prepared.activations;
        let mut parameters: [*mut c_void; 4] = [
            activations.as_argument(),
            last_activations.as_argument(),
            prepared.output.as_argument(),
            (&raw mut prepared.arguments).cast(),
        ];
        let launch = Launch {
            function: prepared.block.function,
            blocks: prepared.blocks,
            cluster: prepared.cluster,
            threads: prepared.block.threads,
            shared_bytes: prepared.block.shared_bytes,
            stream: stream.as_raw(),
        };
        // SAFETY: the parameters are the kernel's four; the caller vouches for the memory behind them. The kernel reads
        // nothing but the weights, which nobody writes, before the launch ahead of it has ended.
        unsafe { launch.overlapping_previous(self.launch_kernel, &mut parameters) }
            .during("launching the GEMM")
    }
}

/// The type as the kernels' arguments say it.
pub(super) const fn output_code(output_type: OutputType) -> u32 {
    match output_type {
        OutputType::Bf16 => output_type::BF16,
        OutputType::F16 => output_type::F16,
        OutputType::F32 => output_type::F32,
        OutputType::I32 => output_type::I32,
    }
}
