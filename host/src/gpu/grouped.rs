//! Checks and launches grouped GEMMs. The device twin is `kernels-gpu/src/grouped/mod.rs`.

use std::borrow::Borrow;
use std::ffi::c_void;

use liquidgemm_format::arguments::GroupedArguments;
use liquidgemm_format::brick::BRICK_CHANNELS;
use liquidgemm_format::grouped::{self, BOX_ROW_STEP};
use liquidgemm_format::tile::K_TILE;

use crate::error::gpu::{During, GpuError};
use crate::gpu::Gpu;
use crate::gpu::experts::DeviceExperts;
use crate::gpu::gemm::{Operands, StreamHandle, output_code};
use crate::gpu::launch::Launch;
use crate::gpu::memory::DeviceSpan;
use crate::gpu::tensor_map::{Boxes, TensorMap};
use crate::{Error, Group, GroupedPlan, GroupedProblem, OutputType, PackedWeights};

/// Where the rows of each expert lie. The host never reads it: it may be written by an earlier launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceRowIndex {
    /// i32 `[experts + 1]`: expert e has the rows from offset e up to offset e + 1 (contiguous).
    ///
    /// Rows before the first offset or behind the last belong to no expert.
    Offsets(DeviceSpan),
    /// i32 `[experts]`: expert e has count e rows, from row e · `capacity` on (masked).
    Counts {
        /// The counts. The address is a multiple of 4.
        counts: DeviceSpan,
        /// The rows that each expert has a place for.
        capacity: usize,
    },
}

/// The operands of a grouped GEMM in device memory, besides the weights.
#[derive(Clone, Copy, Debug)]
pub struct GroupedOperands {
    /// Rows of the activations and of the output, of all experts together.
    /// If they are masked, these are `experts · capacity`. May be 0.
    pub rows: usize,
    /// Which rows are whose.
    pub index: DeviceRowIndex,
    /// The rows that the experts probably have together. It decides speed only.
    /// `None` stands for all rows, which is far too many for masked rows.
    pub expected_rows: Option<usize>,
    /// int8 `[rows, k]`, row-major. The address is a multiple of 16.
    pub activations: DeviceSpan,
    /// Bytes from one row of the activations to the next: at least k, and a multiple of 16.
    pub activation_stride: usize,
    /// f32 `[rows]`, the scale of each row. The address is a multiple of 4.
    pub token_scales: DeviceSpan,
    /// f32 `[experts, n]`, added to every row of the expert. The address is a multiple of 4.
    /// Not allowed with [`OutputType::I32`].
    pub bias: Option<DeviceSpan>,
    /// `[rows, n]` of `output_type`, row-major. The address is a multiple of the element's size.
    /// Rows that belong to no expert are left as they are.
    pub output: DeviceSpan,
    /// Elements from one row of the output to the next: at least n. A multiple of 8 makes 16-bit stores fast.
    pub output_stride: usize,
    /// The output's element type.
    pub output_type: OutputType,
    /// A u32 that the launch writes: 0 if the index is valid,
    /// 1 if an offset or a count is out of range or out of order. The address is a multiple of 4.
    ///
    /// The launch then limits the entry: a count to 0 up to the capacity, an offset to 0 up to the rows,
    /// the end of an expert's rows to no less than their beginning. It accesses nothing outside the operands.
    pub status: Option<DeviceSpan>,
}

impl GroupedOperands {
    /// Returns the problem that the operands and the experts describe.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] if the rows are masked, and are not `experts · capacity`.
    pub fn problem(&self, experts: &DeviceExperts) -> Result<GroupedProblem, Error> {
        let (count, n, k) = (experts.experts(), experts.n(), experts.k());
        match self.index {
            DeviceRowIndex::Offsets(_) => Ok(GroupedProblem::contiguous(count, [self.rows, n, k])),
            DeviceRowIndex::Counts { capacity, .. } => {
                let problem = GroupedProblem::masked(count, [capacity, n, k]);
                crate::check::check_length("rows", "experts · capacity", problem.rows, self.rows)?;
                Ok(problem)
            }
        }
    }

    /// Returns the operands of a GEMM of all rows, as far as it has the same ones.
    fn of_all_rows(&self) -> Operands {
        Operands {
            m: self.rows,
            activations: self.activations,
            activation_stride: self.activation_stride,
            token_scales: self.token_scales,
            bias: None,
            output: self.output,
            output_stride: self.output_stride,
            output_type: self.output_type,
        }
    }

    /// Fails unless the operands fit the experts.
    fn check(&self, experts: &DeviceExperts) -> Result<(), Error> {
        self.of_all_rows().check([experts.n(), experts.k()])?;
        let (index, entries) = match self.index {
            DeviceRowIndex::Offsets(offsets) => (offsets, experts.experts() + 1),
            DeviceRowIndex::Counts { counts, .. } => (counts, experts.experts()),
        };
        index.check("row index", entries * 4, 4)?;
        if let Some(bias) = self.bias {
            if self.output_type == OutputType::I32 {
                return Err(Error::BiasWithRawOutput);
            }
            bias.check("bias", experts.experts() * experts.n() * 4, 4)?;
        }
        if let Some(status) = self.status {
            status.check("status", 4, 4)?;
        }
        Ok(())
    }
}

impl Gpu {
    /// Copies the packed weights of experts to the GPU, one behind the other, and waits for the copies.
    ///
    /// All experts have the same `[n, k]` and the same group.
    ///
    /// # Errors
    /// - [`Error::NoExperts`] without experts, [`Error::ExpertsDiffer`] if one differs from the first.
    /// - [`GpuError::Cuda`] if device memory runs out or the driver fails.
    pub fn upload_experts<E: Borrow<PackedWeights>>(&self, experts: &[E]) -> Result<DeviceExperts, Error> {
        DeviceExperts::upload(&self.context, experts)
    }

    /// Takes experts `[experts, n, k]` that are in device memory already, as [`DeviceExperts::device_bytes`] returns them.
    ///
    /// The memory has [`DeviceExperts::bytes_for`] bytes, at a multiple of 256 bytes.
    ///
    /// # Errors
    /// - As [`DeviceExperts::bytes_for`] for impossible experts.
    /// - [`GpuError::BufferTooSmall`] or [`GpuError::Misaligned`] for unsuitable memory.
    ///
    /// # Safety
    /// The memory holds such bytes of experts with this shape and group.
    /// It stays allocated, and nobody writes it, as long as the experts and their launches live.
    pub unsafe fn experts_in(
        &self,
        memory: DeviceSpan,
        experts: usize,
        [n, k]: [usize; 2],
        group: Group,
    ) -> Result<DeviceExperts, Error> {
        DeviceExperts::borrowed(&self.context, memory, experts, [n, k], group)
    }

    /// Returns the plan for a grouped problem on this GPU.
    ///
    /// # Errors
    /// As [`GroupedPlan::new`].
    pub fn grouped_plan(&self, problem: GroupedProblem, expected_rows: usize) -> Result<GroupedPlan, Error> {
        GroupedPlan::new(problem, expected_rows, &self.figures)
    }

    /// Compiles the grouped kernels and the combine, unless they are compiled already.
    ///
    /// The driver needs half a second for each one that it compiles for the first time.
    /// [`Gpu::grouped_gemm`] and [`Gpu::combine`] then compile nothing, also in a graph capture.
    ///
    /// # Errors
    /// [`GpuError::Cuda`] if the driver fails.
    pub fn prepare_grouped(&self) -> Result<(), Error> {
        let _entered = self.context.enter()?;
        for shape in grouped::GROUPED_SHAPES {
            self.kernels.grouped(shape)?;
        }
        self.kernels.combine()?;
        Ok(())
    }

    /// Launches, for each expert, `output = epilogue(activations · weightsᵀ)` of its rows, and returns at once.
    ///
    /// It is one launch for all experts. The rows of each expert are known only on the device.
    /// The result of each expert has the bits of [`Gpu::gemm`] of its rows.
    /// With `rows = 0` it only checks the operands, and writes no status.
    ///
    /// # Errors
    /// As [`Gpu::grouped_gemm_with_plan`] and [`GroupedPlan::new`].
    ///
    /// # Safety
    /// As for [`Gpu::grouped_gemm_with_plan`].
    pub unsafe fn grouped_gemm(
        &self,
        experts: &DeviceExperts,
        operands: &GroupedOperands,
        stream: impl Into<StreamHandle>,
    ) -> Result<(), Error> {
        let problem = operands.problem(experts)?;
        let plan = self.grouped_plan(problem, operands.expected_rows.unwrap_or(operands.rows))?;
        // SAFETY: the caller upholds the same contract.
        unsafe { self.grouped_gemm_with_plan(experts, operands, &plan, stream) }
    }

    /// Like [`Gpu::grouped_gemm`], with a plan of the caller's choice.
    ///
    /// The call allocates nothing and waits for nothing, so a CUDA graph can capture it.
    /// A replay uses the index that the device memory holds by then.
    /// Only the first call with each tile shape cannot be captured, because it compiles the kernel;
    /// [`Gpu::prepare_grouped`] compiles them ahead of time.
    ///
    /// # Errors
    /// - [`Error::StrideTooShort`] or [`GpuError::OutputStrideTooShort`] if a stride is shorter than a row.
    /// - [`Error::ShapeMismatch`] if the rows are masked, and are not `experts · capacity`.
    /// - [`GpuError::Misaligned`] or [`GpuError::BufferTooSmall`] for an unsuitable operand.
    /// - [`GpuError::OutOfRange`] if the output's row stride exceeds 2³² − 1.
    /// - [`Error::BiasWithRawOutput`] for a bias with [`OutputType::I32`].
    /// - [`GpuError::OtherContext`] for experts of another context.
    /// - [`GpuError::PlanMismatch`] for the plan of another problem.
    /// - [`GpuError::Cuda`] if the driver fails.
    ///
    /// Nothing is launched after an error.
    ///
    /// # Safety
    /// Until the launch has finished on `stream`:
    /// 1. the operands' spans and the experts stay allocated;
    /// 2. nothing else writes to memory that the GEMM reads, and nothing else reads or writes its output
    ///    and its status.
    ///
    /// The operands and the stream belong to this GPU's context.
    /// The index may hold any values, also invalid ones.
    pub unsafe fn grouped_gemm_with_plan(
        &self,
        experts: &DeviceExperts,
        operands: &GroupedOperands,
        plan: &GroupedPlan,
        stream: impl Into<StreamHandle>,
    ) -> Result<(), Error> {
        self.check_context("experts", experts.context())?;
        let problem = operands.problem(experts)?;
        operands.check(experts)?;
        if plan.problem() != problem {
            return Err(GpuError::PlanMismatch {
                plan: plan.problem().to_string(),
                call: problem.to_string(),
            }
            .into());
        }
        if operands.rows == 0 {
            return Ok(());
        }
        let _entered = self.context.enter()?;
        let shape = plan.shape();
        let (n, size) = (experts.n(), operands.output_type.size());
        let mut boxes = Vec::with_capacity(grouped::box_maps(shape) as usize);
        for index in 0..grouped::box_maps(shape) {
            let boxed = Boxes {
                address: operands.activations.address(),
                rows: operands.rows,
                columns: experts.k(),
                stride_bytes: operands.activation_stride,
                box_rows: (index + 1) * BOX_ROW_STEP,
                box_columns: K_TILE,
            };
            boxes.push(TensorMap::of_bytes(self.encode_tensor_map, boxed)?);
        }
        let is_mapped = shape.maps_output() && operands.of_all_rows().output_has_16_byte_rows(n);
        let mut output = if is_mapped {
            TensorMap::of_halves(
                self.encode_tensor_map,
                Boxes {
                    address: operands.output.address(),
                    rows: operands.rows,
                    columns: n,
                    stride_bytes: operands.output_stride * size,
                    box_rows: shape.epilogue_tokens(),
                    box_columns: BRICK_CHANNELS as u32,
                },
            )?
        } else {
            boxes[0]
        };
        let index = match operands.index {
            DeviceRowIndex::Offsets(offsets) => offsets,
            DeviceRowIndex::Counts { counts, .. } => counts,
        };
        let mut arguments = GroupedArguments {
            weights: experts.arguments(),
            expert_bytes: experts.expert_bytes(),
            index: index.address(),
            status: operands.status.map_or(0, DeviceSpan::address),
            token_scales: operands.token_scales.address(),
            bias: operands.bias.map_or(0, DeviceSpan::address),
            output: operands.output.address(),
            n: n as u32,
            first_turn_cycles: shape.strips * shape.strip_stage_bytes() * plan.blocks()
                / self.figures.first_turn_bytes(),
            output_stride: operands.output_stride as u32,
            output_type: output_code(operands.output_type),
            output_is_mapped: is_mapped.into(),
            schedule: *plan.schedule(),
        };
        let mut parameters: [*mut c_void; 3] =
            [boxes.as_mut_ptr().cast(), output.as_argument(), (&raw mut arguments).cast()];
        let launch = Launch {
            function: self.kernels.grouped(shape)?.function(),
            blocks: plan.blocks(),
            cluster: plan.cluster_size(),
            threads: shape.threads(),
            shared_bytes: grouped::shared_bytes(shape),
            stream: stream.into().stream(),
        };
        // SAFETY: the parameters are the kernel's three: as many maps as its shape has boxes, the output's map
        // and the arguments. The caller vouches for the memory behind them.
        // The kernel waits for the previous launch before it reads the index, and everything else later.
        unsafe { launch.overlapping_previous(self.launch_kernel, &mut parameters) }
            .during("launching the grouped GEMM")?;
        Ok(())
    }
}
