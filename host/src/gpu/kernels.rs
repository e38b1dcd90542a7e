//! The kernels that this crate carries as PTX, and their loading on first use.

use std::ffi::CString;
use std::io::Read;
use std::sync::OnceLock;

use cust::module::Module;
use cust::sys::{self, CUfunction};
use flate2::read::ZlibDecoder;
use liquidgemm_format::probe::MMA_TILE_BYTES;
use liquidgemm_format::skinny::{SKINNY_SHAPES, SkinnyShape};
use liquidgemm_format::tile::{MAX_SHARED_BYTES, TILE_SHAPES, TileShape};
use liquidgemm_format::tile_shapes;

use crate::gpu::error::{During, GpuError};

/// A kernel's entry point and the PTX module that holds it, one kernel a module so that only what is used is
/// compiled.
#[derive(Debug)]
pub(crate) struct KernelSource {
    pub(crate) entry: &'static str,
    /// The module's text, compressed by the build script.
    pub(super) compressed: &'static [u8],
}

impl KernelSource {
    /// The module's text.
    fn ptx(&self) -> Result<Vec<u8>, GpuError> {
        let mut text = Vec::new();
        match ZlibDecoder::new(self.compressed).read_to_end(&mut text) {
            Ok(_) => Ok(text),
            Err(_) => Err(GpuError::DamagedKernel { entry: self.entry }),
        }
    }
}

macro_rules! source {
    ($entry:expr) => {
        $crate::gpu::kernels::KernelSource {
            entry: $entry,
            compressed: include_bytes!(concat!(env!("OUT_DIR"), "/", $entry, ".ptx.zlib")),
        }
    };
}
#[cfg(feature = "bench")]
pub(super) use source;

macro_rules! gemm_sources {
    ($($entry:ident: $strips:literal, $tokens:literal, $halves:literal, $split:literal, $threads:literal, $module:ident;)*) => {
        /// The GEMM kernels, in the order of [`TILE_SHAPES`].
        const GEMM: [KernelSource; TILE_SHAPES.len()] = [$(source!(stringify!($entry))),*];
    };
}
tile_shapes!(gemm_sources);

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
    static HASH: OnceLock<String> = OnceLock::new();
    HASH.get_or_init(|| {
        let text = GEMM[0].ptx().unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        text.lines().find_map(|line| line.strip_prefix(KEY)).unwrap_or("unknown").trim().to_owned()
    })
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
        let text = CString::new(source.ptx()?).unwrap_or_default();
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
#[derive(Debug)]
pub(crate) struct KernelCache {
    gemm: [OnceLock<Kernel>; GEMM.len()],
    skinny: [OnceLock<Kernel>; SKINNY.len()],
    probe_stream: OnceLock<Kernel>,
    probe_mma: OnceLock<Kernel>,
    #[cfg(feature = "bench")]
    pub(super) ablation: super::ablation::Kernels,
}

impl Default for KernelCache {
    fn default() -> Self {
        Self {
            gemm: [const { OnceLock::new() }; GEMM.len()],
            skinny: [const { OnceLock::new() }; SKINNY.len()],
            probe_stream: OnceLock::new(),
            probe_mma: OnceLock::new(),
            #[cfg(feature = "bench")]
            ablation: super::ablation::Kernels::default(),
        }
    }
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
        // More than it needs, for the question how many blocks with so much fit.
        get_or_load(&self.probe_stream, &PROBE_STREAM, MAX_SHARED_BYTES)
    }

    /// The tensor-core probe.
    pub(crate) fn probe_mma(&self) -> Result<&Kernel, GpuError> {
        get_or_load(&self.probe_mma, &PROBE_MMA, MMA_TILE_BYTES)
    }
}
