//! The kernels that this crate carries as PTX, and their loading on first use.

use std::ffi::CString;
use std::sync::OnceLock;

use cust::module::Module;
use cust::sys::{self, CUfunction};
use liquidgemm_format::probe::{MMA_TILE_BYTES, STREAM_SHARED_BYTES};
use liquidgemm_format::skinny::{SKINNY_SHAPES, SkinnyShape};
use liquidgemm_format::tile::{TILE_SHAPES, TileShape};

use crate::gpu::error::{During, GpuError};

/// A kernel's entry point and the PTX module that holds it, one kernel a module so that only what is used is
/// compiled.
#[derive(Debug)]
pub(crate) struct KernelSource {
    pub(crate) entry: &'static str,
    pub(super) ptx: &'static str,
}

macro_rules! source {
    ($entry:literal) => {
        $crate::gpu::kernels::KernelSource {
            entry: $entry,
            ptx: include_str!(concat!("../../ptx/", $entry, ".ptx")),
        }
    };
}
#[cfg(feature = "bench")]
pub(super) use source;

/// The GEMM kernels, in the order of [`TILE_SHAPES`].
const GEMM: [KernelSource; TILE_SHAPES.len()] = [
    source!("gemm_128x8"),
    source!("gemm_64x16"),
    source!("gemm_128x16"),
    source!("gemm_192x16"),
    source!("gemm_64x32"),
    source!("gemm_128x32"),
    source!("gemm_192x32"),
    source!("gemm_64x32_split"),
    source!("gemm_64x64"),
    source!("gemm_128x64"),
    source!("gemm_192x64"),
    source!("gemm_64x64_split"),
    source!("gemm_64x128"),
    source!("gemm_128x128"),
    source!("gemm_192x128"),
    source!("gemm_64x128_split"),
    source!("gemm_128x128_split"),
    source!("gemm_192x128_split"),
    source!("gemm_128x256"),
    source!("gemm_192x256"),
];

/// The kernels for few tokens, in the order of [`SKINNY_SHAPES`].
const SKINNY: [KernelSource; SKINNY_SHAPES.len()] = [
    source!("skinny_32x8"),
    source!("skinny_64x8"),
    source!("skinny_96x8"),
    source!("skinny_32x16"),
    source!("skinny_64x16"),
    source!("skinny_96x16"),
    source!("skinny_32x32"),
];

/// Pulls memory and does nothing else.
const PROBE_STREAM: KernelSource = source!("probe_stream");
/// Issues wgmmas and does nothing else.
const PROBE_MMA: KernelSource = source!("probe_mma");

/// The hash of the device sources that the embedded PTX was built from, as its header states it.
pub fn ptx_hash() -> &'static str {
    const KEY: &str = "// sources: ";
    let line = GEMM[0].ptx.lines().find_map(|line| line.strip_prefix(KEY));
    line.unwrap_or("unknown").trim()
}

/// A kernel that the driver has compiled.
#[derive(Debug)]
pub(crate) struct Kernel {
    function: CUfunction,
    /// Keeps the function alive.
    _module: Module,
}

// SAFETY: both are handles that the driver lets any thread use.
unsafe impl Send for Kernel {}
// SAFETY: as above; nothing here changes after loading.
unsafe impl Sync for Kernel {}

impl Kernel {
    /// Compiles a kernel for the current context's device, with room for `shared_bytes` of dynamic shared memory.
    pub(crate) fn load(source: &KernelSource, shared_bytes: u32) -> Result<Self, GpuError> {
        // A NUL can't occur in PTX text; were there one, the driver would say what it misses.
        let text = CString::new(source.ptx).unwrap_or_default();
        let module = Module::from_ptx_cstr(&text, &[]).during("compiling a kernel's PTX")?;
        let function = module.get_function(source.entry).during("looking up a kernel")?.to_raw();
        // SAFETY: the function belongs to the module just loaded.
        unsafe {
            sys::cuFuncSetAttribute(
                function,
                sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                shared_bytes as i32,
            )
        }
        .during("reserving a kernel's shared memory")?;
        Ok(Self { function, _module: module })
    }

    /// The driver's handle.
    pub(crate) fn function(&self) -> CUfunction {
        self.function
    }
}

/// The kernels of one context, loaded when first asked for.
#[derive(Debug, Default)]
pub(crate) struct KernelCache {
    gemm: [OnceLock<Kernel>; GEMM.len()],
    skinny: [OnceLock<Kernel>; SKINNY.len()],
    probe_stream: OnceLock<Kernel>,
    probe_mma: OnceLock<Kernel>,
    #[cfg(feature = "bench")]
    pub(super) ablation: super::ablation::Kernels,
}

/// The kernel in `cell`, loaded if this is the first time that it is asked for.
pub(super) fn get_or_load<'a>(
    cell: &'a OnceLock<Kernel>,
    source: &KernelSource,
    shared_bytes: u32,
) -> Result<&'a Kernel, GpuError> {
    if let Some(kernel) = cell.get() {
        return Ok(kernel);
    }
    let kernel = Kernel::load(source, shared_bytes)?;
    Ok(cell.get_or_init(|| kernel))
}

impl KernelCache {
    /// The GEMM kernel of a tile shape.
    pub(crate) fn gemm(&self, shape: TileShape) -> Result<&Kernel, GpuError> {
        let index = TILE_SHAPES.iter().position(|&other| other == shape);
        let index = index.ok_or_else(|| GpuError::PlanMismatch {
            plan: format!("a tile of {} tokens and {} stages", shape.tokens, shape.stages),
            call: "a GPU without such a kernel".into(),
        })?;
        get_or_load(&self.gemm[index], &GEMM[index], shape.shared_bytes())
    }

    /// The kernel for few tokens of a shape.
    pub(crate) fn skinny(&self, shape: SkinnyShape) -> Result<&Kernel, GpuError> {
        let index = SKINNY_SHAPES.iter().position(|&other| other == shape);
        let index = index.ok_or(GpuError::UnknownSkinnyShape { shape })?;
        get_or_load(&self.skinny[index], &SKINNY[index], shape.shared_bytes())
    }

    /// The memory probe.
    pub(crate) fn probe_stream(&self) -> Result<&Kernel, GpuError> {
        get_or_load(&self.probe_stream, &PROBE_STREAM, STREAM_SHARED_BYTES)
    }

    /// The tensor-core probe.
    pub(crate) fn probe_mma(&self) -> Result<&Kernel, GpuError> {
        get_or_load(&self.probe_mma, &PROBE_MMA, MMA_TILE_BYTES)
    }
}
