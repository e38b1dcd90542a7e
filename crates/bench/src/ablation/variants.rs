//! The variants of the GEMM that the ablation compares; all but one lack some of the library's ideas.
//! The device twin is `kernels-gpu/src/ablation`; tile sizes are in `liquidgemm_format::ablation`.

use std::fmt;

use anyhow::{Context, ensure};
use liquidgemm::gpu::{CustomKernel, DeviceWeights, Gpu, Operands, StreamHandle, Workspace};
use liquidgemm::{Error, OutputType, PackedWeights, Plan};
use liquidgemm_format::ablation::{self, ExplicitShape, TOKENS};
use liquidgemm_format::tile::TileShape;
use serde::{Deserialize, Serialize};

use crate::lazy_kernel::LazyKernel;

/// A combination of dequantization and overlap.
/// The order is that of figure 13 of the paper, with one more variant at the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Variant {
    /// QServe's dequantization (a multiplication and a byte-wise subtraction), without overlap with the MMAs.
    Baseline,
    /// LiquidQuant's dequantization (a multiply-add and an XOR), without overlap with the MMAs.
    LiquidQuant,
    /// LiquidQuant's dequantization in warpgroups of its own (explicit coarse-grained pipeline).
    /// They pass int8 weights on through shared memory.
    Explicit,
    /// LiquidQuant's dequantization in registers while MMAs run (implicit fine-grained pipeline).
    /// This is the library's own kernel.
    Implicit,
    /// QServe's dequantization in the implicit pipeline.
    QServeImplicit,
}

impl Variant {
    /// Every variant.
    pub const ALL: [Self; 5] =
        [Self::Baseline, Self::LiquidQuant, Self::Explicit, Self::Implicit, Self::QServeImplicit];

    /// The name in tables and plots.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Baseline => "baseline",
            Self::LiquidQuant => "+LiquidQuant",
            Self::Explicit => "+ExCP",
            Self::Implicit => "ImFP",
            Self::QServeImplicit => "QServe in ImFP",
        }
    }

    /// Whether the variant subtracts, and therefore needs pairs that hold the number to subtract.
    const fn subtracts(self) -> bool {
        matches!(self, Self::Baseline | Self::QServeImplicit)
    }

    /// The variant's row in [`SOURCES`]. `None` for the library's own kernel.
    const fn row(self) -> Option<usize> {
        match self {
            Self::Baseline => Some(0),
            Self::LiquidQuant => Some(1),
            Self::Explicit => Some(2),
            Self::Implicit => None,
            Self::QServeImplicit => Some(3),
        }
    }
}

impl fmt::Display for Variant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The name of a kernel's entry point, and its PTX.
type Source = (&'static str, &'static str);

macro_rules! sources {
    ($($name:literal),*) => {
        [$([
            source!($name, "_128x16"),
            source!($name, "_128x64"),
            source!($name, "_128x128"),
        ]),*]
    };
}

macro_rules! source {
    ($name:literal, $tile:literal) => {
        (
            concat!("ablation_", $name, $tile),
            include_str!(concat!("../../ptx/ablation_", $name, $tile, ".ptx")),
        )
    };
}

/// The kernels that the library itself does not have, by variant and by tile in the order of [`TOKENS`].
const SOURCES: [[Source; TOKENS.len()]; 4] = sources!["baseline", "liquidquant", "excp", "qserve_imfp"];

/// Weights in device memory in two forms: the library's bricks and pairs, and the same with QServe's pairs.
/// The second byte of a QServe pair is the number to subtract.
#[derive(Debug)]
pub struct VariantWeights {
    adding: DeviceWeights,
    subtracting: DeviceWeights,
}

impl VariantWeights {
    /// Uploads packed weights in both forms.
    ///
    /// # Errors
    /// If memory runs out or the driver fails.
    pub fn upload(gpu: &Gpu, weights: &PackedWeights) -> Result<Self, Error> {
        let mut pairs = weights.pairs().to_vec();
        ablation::to_subtrahends(&mut pairs);
        Ok(Self { adding: gpu.upload(weights)?, subtracting: gpu.upload_with_pairs(weights, &pairs)? })
    }

    /// Output channels.
    pub fn n(&self) -> usize {
        self.adding.n()
    }

    /// Elements per channel.
    pub fn k(&self) -> usize {
        self.adding.k()
    }

    fn of(&self, variant: Variant) -> &DeviceWeights {
        if variant.subtracts() { &self.subtracting } else { &self.adding }
    }
}

/// The variants' kernels on one GPU, each compiled on its first launch.
#[derive(Debug)]
pub struct Variants<'a> {
    gpu: &'a Gpu,
    /// The kernels, in the order of [`SOURCES`].
    kernels: [[LazyKernel; TOKENS.len()]; SOURCES.len()],
}

impl<'a> Variants<'a> {
    /// Prepares the variants for a GPU without compiling anything.
    pub fn new(gpu: &'a Gpu) -> Self {
        Self { gpu, kernels: SOURCES.map(|row| row.map(|(entry, ptx)| LazyKernel::new(entry, ptx))) }
    }

    /// Launches one of the variants, like [`Gpu::gemm_with_plan`].
    ///
    /// The output must be bf16, without bias.
    /// The tile must have 128 channels, one consumer per strip, and a number of tokens that [`TOKENS`] lists.
    ///
    /// # Errors
    /// The errors of [`Gpu::gemm_with_plan`]; also another output type, a bias, or a plan with another tile.
    ///
    /// # Safety
    /// The requirements of [`Gpu::gemm_with_plan`].
    pub unsafe fn launch(
        &self,
        variant: Variant,
        weights: &VariantWeights,
        operands: &Operands,
        plan: &Plan,
        workspace: &Workspace,
        stream: impl Into<StreamHandle>,
    ) -> anyhow::Result<()> {
        ensure!(
            operands.output_type == OutputType::Bf16 && operands.bias.is_none(),
            "the ablation has no kernel for an output type other than bf16, nor for a bias"
        );
        let tile =
            plan.tiled().context("the ablation has no kernel for a plan other than a single tiled launch")?;
        let size = TOKENS.iter().position(|&tokens| ablation::tile(tokens) == Some(tile.shape()));
        let size = size.context("the ablation has no kernel for the plan's tile")?;
        let weights = weights.of(variant);
        let Some(row) = variant.row() else {
            // SAFETY: the caller upholds the requirements of `Gpu::gemm_with_plan`.
            return Ok(unsafe { self.gpu.gemm_with_plan(weights, operands, plan, workspace, stream) }?);
        };
        let kernel = self.kernel(variant, [row, size], tile.shape())?;
        // SAFETY: as above. The variants' kernels take the parameters of the library's kernel for this tile
        // and compute the same tiles.
        unsafe { self.gpu.gemm_with_kernel(kernel, weights, operands, plan, workspace, stream) }?;
        Ok(())
    }

    fn kernel(
        &self,
        variant: Variant,
        [row, size]: [usize; 2],
        tile: TileShape,
    ) -> Result<&CustomKernel, Error> {
        let (threads, shared_bytes) = match variant {
            Variant::Explicit => {
                let shape = ExplicitShape::of(tile);
                (shape.threads(), shape.shared_bytes())
            }
            _ => (tile.threads(), tile.shared_bytes()),
        };
        self.kernels[row][size].get(self.gpu, threads, shared_bytes)
    }
}
