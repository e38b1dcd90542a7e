//! Launches the ablation's kernels: GEMMs that do without one of the library's ideas each. The device twin is
//! `kernels-gpu/src/ablation`.

use std::fmt;
use std::sync::OnceLock;

use liquidgemm_format::ablation::{self, ExplicitShape};
use liquidgemm_format::tile::TileShape;
use serde::{Deserialize, Serialize};

use crate::gpu::error::GpuError;
use crate::gpu::gemm::Block;
use crate::gpu::kernels::{Kernel, KernelSource, get_or_load, source};
use crate::gpu::{DeviceWeights, Gpu, Operands, StreamHandle, Workspace};
use crate::{Error, Method, OutputType, PackedWeights, Plan};

/// A way to dequantize and to overlap, in the order of the paper's figure 13 with one more at the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Arm {
    /// QServe's dequantization, a multiplication and a byte-wise subtraction, in turn with the products.
    Baseline,
    /// LiquidQuant's dequantization, a multiply-add and an XOR, in turn with the products.
    LiquidQuant,
    /// LiquidQuant's, in warpgroups of its own that hand int8 weights over through shared memory (explicit coarse-grained
    /// pipeline).
    Explicit,
    /// LiquidQuant's, in registers while products run (implicit fine-grained pipeline): the library's own kernel.
    Implicit,
    /// QServe's, in the implicit pipeline.
    QServeImplicit,
}

impl Arm {
    /// Every arm.
    pub const ALL: [Arm; 5] =
        [Arm::Baseline, Arm::LiquidQuant, Arm::Explicit, Arm::Implicit, Arm::QServeImplicit];

    /// What tables and pictures call it.
    pub const fn name(self) -> &'static str {
        match self {
            Arm::Baseline => "baseline",
            Arm::LiquidQuant => "+LiquidQuant",
            Arm::Explicit => "+ExCP",
            Arm::Implicit => "ImFP",
            Arm::QServeImplicit => "QServe in ImFP",
        }
    }

    /// Whether the arm subtracts, and so takes weights whose pairs hold what is subtracted.
    const fn subtracts(self) -> bool {
        matches!(self, Arm::Baseline | Arm::QServeImplicit)
    }
}

impl fmt::Display for Arm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

const SIZES: usize = ablation::TOKENS.len();

/// The kernels of the arms that the library has no kernel for, by arm and by tile in the order of [`ablation::TOKENS`].
const SOURCES: [[KernelSource; SIZES]; 4] = [
    [
        source!("ablation_baseline_128x16"),
        source!("ablation_baseline_128x64"),
        source!("ablation_baseline_128x128"),
    ],
    [
        source!("ablation_liquidquant_128x16"),
        source!("ablation_liquidquant_128x64"),
        source!("ablation_liquidquant_128x128"),
    ],
    [source!("ablation_excp_128x16"), source!("ablation_excp_128x64"), source!("ablation_excp_128x128")],
    [
        source!("ablation_qserve_imfp_128x16"),
        source!("ablation_qserve_imfp_128x64"),
        source!("ablation_qserve_imfp_128x128"),
    ],
];

/// The kernels of one context, loaded when first asked for, in the order of [`SOURCES`].
#[derive(Debug, Default)]
pub(super) struct Kernels([[OnceLock<Kernel>; SIZES]; SOURCES.len()]);

/// Weights in device memory as every arm wants them: the library's bricks, and the same with QServe's pairs, whose second
/// byte is what is subtracted.
#[derive(Debug)]
pub struct ArmWeights {
    adding: DeviceWeights,
    subtracting: DeviceWeights,
}

impl ArmWeights {
    /// Output channels.
    pub fn n(&self) -> usize {
        self.adding.n()
    }

    /// Elements a channel.
    pub fn k(&self) -> usize {
        self.adding.k()
    }

    fn of(&self, arm: Arm) -> &DeviceWeights {
        if arm.subtracts() { &self.subtracting } else { &self.adding }
    }
}

impl Gpu {
    /// Copies packed weights to the GPU in both of the forms that the arms take.
    ///
    /// # Errors
    /// If memory runs out or the driver fails.
    pub fn upload_for_ablation(&self, weights: &PackedWeights) -> Result<ArmWeights, Error> {
        let mut pairs = weights.pairs().to_vec();
        ablation::to_subtrahends(&mut pairs);
        Ok(ArmWeights {
            adding: DeviceWeights::upload(&self.context, weights)?,
            subtracting: DeviceWeights::upload_as(&self.context, weights, &pairs)?,
        })
    }

    /// As [`Gpu::gemm_with_plan`], in the way of `arm`: bf16 output without bias, and tiles of 128 channels with one consumer a strip
    /// and as many tokens as [`liquidgemm_format::ablation::TOKENS`] lists.
    ///
    /// # Errors
    /// As [`Gpu::gemm_with_plan`]; another output, a bias, and a plan with another tile.
    ///
    /// # Safety
    /// As for [`Gpu::gemm_with_plan`].
    pub unsafe fn ablation(
        &self,
        arm: Arm,
        weights: &ArmWeights,
        operands: &Operands,
        plan: &Plan,
        workspace: &Workspace,
        stream: impl Into<StreamHandle>,
    ) -> Result<(), Error> {
        let weights = weights.of(arm);
        if operands.output_type != OutputType::Bf16 || operands.bias.is_some() {
            return Err(GpuError::NotInAblation { what: "an output other than bf16 without bias" }.into());
        }
        let _entered = self.check_gemm(weights, operands, plan, workspace)?;
        let Method::Tiled(tiled) = plan.method() else {
            return Err(GpuError::NotInAblation { what: "a plan that isn't one launch in tiles" }.into());
        };
        let block = self.ablation_block(arm, tiled.shape())?;
        let launch = self.prepare_tiled(block, weights, operands, 0..weights.n(), tiled, workspace)?;
        // SAFETY: everything is checked; the caller vouches for the memory.
        unsafe { self.launch_tiled(launch, stream.into()) }?;
        Ok(())
    }

    fn ablation_block(&self, arm: Arm, tile: TileShape) -> Result<Block, GpuError> {
        let size = ablation::TOKENS.iter().position(|&tokens| ablation::tile(tokens) == Some(tile));
        let size = size.ok_or(GpuError::NotInAblation { what: "the plan's tile" })?;
        let (index, threads, shared_bytes) = match arm {
            Arm::Implicit => {
                let function = self.kernels.gemm(tile)?.function();
                return Ok(Block { function, threads: tile.threads(), shared_bytes: tile.shared_bytes() });
            }
            Arm::Baseline => (0, tile.threads(), tile.shared_bytes()),
            Arm::LiquidQuant => (1, tile.threads(), tile.shared_bytes()),
            Arm::Explicit => {
                let shape = ExplicitShape::of(tile);
                (2, shape.threads(), shape.shared_bytes())
            }
            Arm::QServeImplicit => (3, tile.threads(), tile.shared_bytes()),
        };
        let kernel = get_or_load(&self.kernels.ablation.0[index][size], &SOURCES[index][size], shared_bytes)?;
        Ok(Block { function: kernel.function(), threads, shared_bytes })
    }
}
