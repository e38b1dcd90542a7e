//! Checks and launches GEMMs. The device twin of tiled launches is `kernels-gpu/src/gemm/mod.rs`.
//! Skinny launches continue in `skinny.rs`.

use std::ffi::c_void;
use std::ops::Range;

use cust::stream::Stream;
use cust::sys::{CUfunction, CUstream};
use liquidgemm_format::arguments::{GemmArguments, output_type};
use liquidgemm_format::brick::BRICK_CHANNELS;
use liquidgemm_format::tile::K_TILE;

use crate::error::gpu::{During, GpuError};
use crate::gpu::Gpu;
use crate::gpu::context::Entered;
use crate::gpu::launch::Launch;
use crate::gpu::memory::{DeviceSpan, DeviceWeights, Workspace};
use crate::gpu::tensor_map::{Boxes, TensorMap};
use crate::{Algorithm, Error, OutputType, Plan, Problem, Tiled};

/// The operands of a GEMM in device memory, besides the weights.
#[derive(Clone, Copy, Debug)]
pub struct Operands {
    /// Tokens. May be 0.
    pub m: usize,
    /// int8 `[m, k]`, row-major. The address is a multiple of 16.
    pub activations: DeviceSpan,
    /// Bytes from one row of the activations to the next: at least k, and a multiple of 16.
    /// Multiples of 64 are read up to 1.4 times as fast.
    pub activation_stride: usize,
    /// f32 `[m]`, the scale of each token. The address is a multiple of 4.
    pub token_scales: DeviceSpan,
    /// f32 `[n]`, added to every row. The address is a multiple of 4. Not allowed with [`OutputType::I32`].
    pub bias: Option<DeviceSpan>,
    /// `[m, n]` of `output_type`, row-major. The address is a multiple of the element's size.
    pub output: DeviceSpan,
    /// Elements from one row of the output to the next: at least n. A multiple of 8 makes 16-bit stores fast.
    pub output_stride: usize,
    /// The output's element type.
    pub output_type: OutputType,
}

/// A stream to launch on, made from a `cust` stream or from the raw handle of another framework.
#[derive(Clone, Copy, Debug)]
pub struct StreamHandle(CUstream);

impl StreamHandle {
    /// Wraps a raw `CUstream`. Null is the default stream.
    ///
    /// # Safety
    /// The stream belongs to the context of the [`Gpu`] that uses it, and outlives the launches on it.
    pub const unsafe fn from_raw(stream: *mut c_void) -> Self {
        Self(stream.cast())
    }

    /// Returns the raw `CUstream`.
    pub const fn as_raw(self) -> *mut c_void {
        self.0.cast()
    }

    /// Returns the handle with the type that `cust` declares.
    pub(super) const fn stream(self) -> CUstream {
        self.0
    }
}

impl From<&Stream> for StreamHandle {
    fn from(stream: &Stream) -> Self {
        Self(stream.as_inner())
    }
}

impl Operands {
    /// Returns whether TMA can store the output.
    ///
    /// TMA stores take 16-bit elements, in rows that begin on 16 bytes.
    /// Rows must also end on 16 bytes, because TMA would write beyond other ends.
    pub(super) fn output_has_16_byte_rows(&self, n: usize) -> bool {
        let size = self.output_type.size();
        size == 2
            && (n * size).is_multiple_of(16)
            && (self.output_stride * size).is_multiple_of(16)
            && self.output.address().is_multiple_of(16)
    }

    /// Fails unless the operands fit weights `[n, k]`.
    pub(super) fn check(&self, [n, k]: [usize; 2]) -> Result<(), Error> {
        let m = self.m;
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
        // The last row needs no padding after it.
        let spanned_bytes = |stride: usize, row: usize, size: usize| {
            (m - 1)
                .checked_mul(stride)
                .and_then(|rows| rows.checked_add(row)?.checked_mul(size))
                .unwrap_or(usize::MAX)
        };
        let size = self.output_type.size();
        self.activations.check("activations", spanned_bytes(self.activation_stride, k, 1), 16)?;
        self.token_scales.check("token scales", m.saturating_mul(4), 4)?;
        self.output.check("output", spanned_bytes(self.output_stride, n, size), size as u64)?;
        if let Some(bias) = self.bias {
            bias.check("bias", n * 4, 4)?;
        }
        Ok(())
    }
}

/// A compiled kernel with the size of its thread blocks.
#[derive(Clone, Copy)]
pub(super) struct Block {
    pub(super) function: CUfunction,
    pub(super) threads: u32,
    /// Bytes of dynamic shared memory.
    pub(super) shared_bytes: u32,
}

/// A tiled launch with all kernel arguments.
pub(super) struct TiledLaunch {
    block: Block,
    blocks: u32,
    cluster: u32,
    activations: [TensorMap; 2],
    output: TensorMap,
    arguments: GemmArguments,
}

impl Gpu {
    /// Launches `output = epilogue(activations · weightsᵀ)` on `stream` and returns at once.
    ///
    /// It uses the plan that [`Gpu::plan`] returns for the problem. With `m = 0` it only checks the operands.
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
        let plan = self.plan(Problem::new(operands.m, weights.n(), weights.k()))?;
        // SAFETY: the caller upholds the same contract.
        unsafe { self.gemm_with_plan(weights, operands, &plan, workspace, stream) }
    }

    /// Like [`Gpu::gemm`], with a plan of the caller's choice.
    ///
    /// The call allocates nothing and waits for nothing, so a CUDA graph can capture it.
    /// Only the first call with each tile shape cannot be captured, because it compiles the kernel.
    /// [`Gpu::prepare`] compiles kernels ahead of time.
    /// A [two-launch](crate::TwoLaunches) plan launches twice.
    ///
    /// # Errors
    /// - [`Error::StrideTooShort`] or [`GpuError::OutputStrideTooShort`] if a stride is shorter than a row.
    /// - [`GpuError::Misaligned`] or [`GpuError::BufferTooSmall`] for an unsuitable operand or workspace.
    /// - [`GpuError::OutOfRange`] if the output's row stride exceeds 2³² − 1.
    /// - [`Error::BiasWithRawOutput`] for a bias with [`OutputType::I32`].
    /// - [`GpuError::OtherContext`] for weights or a workspace of another context.
    /// - [`GpuError::PlanMismatch`] for the plan of another problem.
    /// - [`GpuError::Cuda`] if the driver fails.
    ///
    /// Nothing is launched after an error, with one exception:
    /// the driver may refuse the second launch of a two-launch plan while the first is already running.
    /// After that error, all operands must stay valid until the stream has been synchronized.
    ///
    /// # Safety
    /// Until the launch has finished on `stream`:
    /// 1. the operands' spans, the weights and the workspace stay allocated;
    /// 2. nothing else writes to memory that the GEMM reads, and nothing else reads or writes its output;
    /// 3. no other launch uses `workspace`, except later ones on the same stream.
    ///
    /// The operands and the stream belong to this GPU's context.
    ///
    /// While the previous launch on the stream still runs, this one may already begin to read the weights,
    /// but nothing else (programmatic dependent launch).
    /// The caller need not take care of that:
    /// only [`Gpu::upload`] writes [`DeviceWeights`], and it waits for the copy.
    pub unsafe fn gemm_with_plan(
        &self,
        weights: &DeviceWeights,
        operands: &Operands,
        plan: &Plan,
        workspace: &Workspace,
        stream: impl Into<StreamHandle>,
    ) -> Result<(), Error> {
        let Some(_entered) = self.check_gemm(weights, operands, plan, workspace)? else { return Ok(()) };
        let stream = stream.into();
        if let Algorithm::Skinny(skinny) = plan.algorithm() {
            // SAFETY: the operands and the plan are checked; the caller vouches for the rest.
            unsafe { self.launch_skinny(weights, operands, skinny, stream) }?;
            return Ok(());
        }
        // Prepare all launches before the first one starts, so that an error leaves nothing running.
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
            // SAFETY: as above; the kernel is that of the plan's tile shape.
            unsafe { self.launch_tiled(launch, stream) }?;
        }
        Ok(())
    }

    /// Fails unless the operands fit the weights, and everything belongs to this GPU's context.
    pub(super) fn check_operands(
        &self,
        weights: &DeviceWeights,
        operands: &Operands,
        workspace: &Workspace,
    ) -> Result<(), Error> {
        self.check_context("weights", weights.context())?;
        self.check_context("workspace's partial sums", workspace.context())?;
        operands.check([weights.n(), weights.k()])
    }

    /// Fails unless weights, operands, plan and workspace fit together. Enters the context.
    /// Returns `None` for `m = 0`, which needs no plan and no launch.
    pub(super) fn check_gemm(
        &self,
        weights: &DeviceWeights,
        operands: &Operands,
        plan: &Plan,
        workspace: &Workspace,
    ) -> Result<Option<Entered>, Error> {
        self.check_operands(weights, operands, workspace)?;
        if operands.m == 0 {
            return Ok(None);
        }
        let problem = Problem::new(operands.m, weights.n(), weights.k());
        if plan.problem() != problem {
            return Err(GpuError::PlanMismatch {
                plan: plan.problem().to_string(),
                call: problem.to_string(),
            }
            .into());
        }
        workspace.check(plan)?;
        Ok(Some(self.context.enter()?))
    }

    /// Encodes the tensor maps of the activations, for boxes of `box_rows` tokens × `box_columns` along K.
    ///
    /// The first map is for whole boxes, and the second for the last box with the remaining tokens.
    /// Both are the same if all boxes have the same size.
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

    /// Prepares the launch of a kernel with a tiled GEMM's parameters, for a range of channels.
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
            self.activation_maps(weights, operands, [shape.box_tokens(plan.cluster_size()), K_TILE])?;
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
            cluster: plan.cluster_size(),
            activations,
            output,
            arguments,
        })
    }

    /// Launches a prepared kernel.
    ///
    /// # Safety
    /// As for [`Gpu::gemm_with_plan`], and:
    /// 1. [`check_gemm`](Self::check_gemm) has passed;
    /// 2. the kernel computes the tiles of the plan;
    /// 3. the launch's channels are channels of the problem, and begin with a strip.
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
            stream: stream.stream(),
        };
        // SAFETY: the parameters are the kernel's four, and the caller vouches for the memory behind them.
        // Until the previous launch has ended, the kernel reads only the weights, which nobody writes.
        unsafe { launch.overlapping_previous(self.launch_kernel, &mut parameters) }
            .during("launching the GEMM")
    }
}

/// Returns the output type's code in the kernels' arguments.
pub(super) const fn output_code(output_type: OutputType) -> u32 {
    match output_type {
        OutputType::Bf16 => output_type::BF16,
        OutputType::F16 => output_type::F16,
        OutputType::F32 => output_type::F32,
        OutputType::I32 => output_type::I32,
    }
}
