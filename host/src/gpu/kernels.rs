//! The kernels' PTX, embedded in the library, and its compilation by the driver on first use.
//! The list of kernels follows from `tile_shapes!`, `skinny_shapes!` and `grouped_shapes!` of `liquidgemm_format`.

use std::ffi::CString;
use std::io::Read;
use std::sync::OnceLock;

use cust::module::Module;
use cust::sys::{self, CUfunction};
use flate2::read::ZlibDecoder;
use liquidgemm_format::activations::QUANTIZE_ENTRIES;
use liquidgemm_format::grouped::{self, GROUPED_SHAPES};
use liquidgemm_format::skinny::{SKINNY_SHAPES, SkinnyShape};
use liquidgemm_format::tile::{MAX_SHARED_BYTES, TILE_SHAPES, TileShape};
use liquidgemm_format::{grouped_shapes, quantize_kernels, skinny_shapes, tile_shapes};

use crate::Error;
use crate::error::PlanError;
use crate::error::gpu::{During, GpuError};
use crate::gpu::context::ContextHandle;

/// A kernel's entry point and its PTX module.
/// Each module has one kernel, so that the driver compiles only the kernels in use.
#[derive(Debug)]
struct KernelSource {
    entry: &'static str,
    /// The module's text, zlib-compressed by `build.rs`.
    compressed: &'static [u8],
}

impl KernelSource {
    /// Decompresses the module's text.
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
        KernelSource {
            entry: $entry,
            compressed: include_bytes!(concat!(env!("OUT_DIR"), "/", $entry, ".ptx.zlib")),
        }
    };
}
macro_rules! gemm_sources {
    ($($entry:ident: $strips:literal, $tokens:literal, $warpgroup_split:literal, $cluster_split:literal, $threads:literal, $module:ident;)*) => {
        /// The GEMM kernels, in the order of [`TILE_SHAPES`].
        const GEMM: [KernelSource; TILE_SHAPES.len()] = [$(source!(stringify!($entry))),*];
    };
}
tile_shapes!(gemm_sources);

macro_rules! skinny_sources {
    ($($entry:ident: $m16_tiles:literal, $tokens:literal, $stage_bricks:literal, $stages:literal;)*) => {
        /// The skinny kernels, in the order of [`SKINNY_SHAPES`].
        const SKINNY: [KernelSource; SKINNY_SHAPES.len()] = [$(source!(stringify!($entry))),*];
    };
}
skinny_shapes!(skinny_sources);

macro_rules! quantize_sources {
    ($($entry:ident: $operation:ident, $element:ident, $kind:ident, $blocks:literal;)*) => {
        /// The kernels that quantize activations, in the order of [`QUANTIZE_ENTRIES`].
        const QUANTIZE: [KernelSource; QUANTIZE_ENTRIES.len()] = [$(source!(stringify!($entry))),*];
    };
}
quantize_kernels!(quantize_sources);
macro_rules! grouped_sources {
    ($($entry:ident: $strips:literal, $tokens:literal, $warpgroup_split:literal, $threads:literal, $maps:literal;)*) => {
        /// The grouped kernels, in the order of [`GROUPED_SHAPES`].
        const GROUPED: [KernelSource; GROUPED_SHAPES.len()] = [$(source!(stringify!($entry))),*];
    };
}
grouped_shapes!(grouped_sources);

/// The kernel that adds up the rows of each token's experts.
const COMBINE: KernelSource = source!("combine_rows");

/// The kernel that applies the epilogue to int32 sums in memory.
const SCALE_SUMS: KernelSource = source!("scale_sums_rows");

/// A kernel that does nothing. The driver uses it to compute how many clusters run at a time.
const OCCUPANCY: KernelSource = source!("occupancy");

/// Returns the hash of the device sources that the embedded PTX was built from, or `unknown`.
///
/// The hash is part of the PTX header.
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
    /// Keeps the function alive. `None` only during drop.
    module: Option<Module>,
    context: ContextHandle,
}

// SAFETY: the function and the module are driver handles, which any thread may use.
unsafe impl Send for Kernel {}
// SAFETY: as above; the fields never change after loading.
unsafe impl Sync for Kernel {}

impl Kernel {
    /// Compiles the kernel `entry` of a PTX module for the context's device.
    ///
    /// It may use `shared_bytes` bytes of dynamic shared memory.
    pub(crate) fn load(
        context: &ContextHandle,
        ptx: Vec<u8>,
        entry: &str,
        shared_bytes: u32,
    ) -> Result<Self, GpuError> {
        let _entered = context.enter()?;
        // PTX contains no NUL. If it did, the module would be empty, and the driver would report that.
        let text = CString::new(ptx).unwrap_or_default();
        let module = Module::from_ptx_cstr(&text, &[]).during("compiling a kernel's PTX")?;
        let function = module.get_function(entry).during("looking up a kernel")?.to_raw();
        // SAFETY: the function belongs to the module that was just loaded.
        unsafe {
            sys::cuFuncSetAttribute(
                function,
                sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                shared_bytes as i32,
            )
        }
        .during("reserving a kernel's shared memory")?;
        Ok(Self { function, module: Some(module), context: context.clone() })
    }

    /// Returns the driver's handle.
    pub(crate) fn function(&self) -> CUfunction {
        self.function
    }

    /// Returns the context that the kernel was compiled in.
    pub(crate) fn context(&self) -> &ContextHandle {
        &self.context
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        // A module is unloaded in the current context. An error cannot be handled here.
        let _entered = self.context.enter_to_free();
        self.module = None;
    }
}

/// The kernels of one context, each loaded on first use.
#[derive(Debug)]
pub(crate) struct KernelCache {
    context: ContextHandle,
    gemm: [OnceLock<Kernel>; GEMM.len()],
    skinny: [OnceLock<Kernel>; SKINNY.len()],
    quantize: [OnceLock<Kernel>; QUANTIZE.len()],
    grouped: [OnceLock<Kernel>; GROUPED.len()],
    combine: OnceLock<Kernel>,
    scale_sums: OnceLock<Kernel>,
}

impl KernelCache {
    /// Creates the cache of a context, with no kernel loaded.
    pub(crate) fn new(context: ContextHandle) -> Self {
        Self {
            context,
            gemm: [const { OnceLock::new() }; GEMM.len()],
            skinny: [const { OnceLock::new() }; SKINNY.len()],
            quantize: [const { OnceLock::new() }; QUANTIZE.len()],
            grouped: [const { OnceLock::new() }; GROUPED.len()],
            combine: OnceLock::new(),
            scale_sums: OnceLock::new(),
        }
    }

    /// Returns the kernel of a tile shape.
    pub(crate) fn gemm(&self, shape: TileShape) -> Result<&Kernel, Error> {
        let index = TILE_SHAPES.iter().position(|&other| other == shape);
        let index = index.ok_or(PlanError::UnknownTile { shape })?;
        Ok(self.get_or_load(&self.gemm[index], &GEMM[index], shape.shared_bytes())?)
    }

    /// Returns the kernel of a skinny shape.
    pub(crate) fn skinny(&self, shape: SkinnyShape) -> Result<&Kernel, Error> {
        let index = SKINNY_SHAPES.iter().position(|&other| other == shape);
        let index = index.ok_or(PlanError::UnknownSkinnyShape { shape })?;
        Ok(self.get_or_load(&self.skinny[index], &SKINNY[index], shape.shared_bytes())?)
    }

    /// Returns the kernel with this index in [`QUANTIZE_ENTRIES`].
    pub(crate) fn quantize(&self, index: usize) -> Result<&Kernel, GpuError> {
        self.get_or_load(&self.quantize[index], &QUANTIZE[index], MAX_SHARED_BYTES)
    }

    /// Returns the grouped kernel of a tile shape.
    pub(crate) fn grouped(&self, shape: TileShape) -> Result<&Kernel, Error> {
        let index = GROUPED_SHAPES.iter().position(|&other| other == shape);
        let index = index.ok_or(PlanError::UnknownTile { shape })?;
        Ok(self.get_or_load(&self.grouped[index], &GROUPED[index], grouped::shared_bytes(shape))?)
    }

    /// Returns the kernel that adds up the rows of each token's experts.
    pub(crate) fn combine(&self) -> Result<&Kernel, Error> {
        Ok(self.get_or_load(&self.combine, &COMBINE, 0)?)
    }

    /// Returns the kernel that applies the epilogue to int32 sums in memory.
    pub(crate) fn scale_sums(&self) -> Result<&Kernel, GpuError> {
        self.get_or_load(&self.scale_sums, &SCALE_SUMS, 0)
    }

    /// Loads the kernel that does nothing, with the most shared memory that a thread block may have.
    pub(crate) fn occupancy(&self) -> Result<Kernel, GpuError> {
        Kernel::load(&self.context, OCCUPANCY.ptx()?, OCCUPANCY.entry, MAX_SHARED_BYTES)
    }

    /// Returns the kernel in `cell`, after loading it if necessary.
    fn get_or_load<'a>(
        &self,
        cell: &'a OnceLock<Kernel>,
        source: &KernelSource,
        shared_bytes: u32,
    ) -> Result<&'a Kernel, GpuError> {
        if let Some(kernel) = cell.get() {
            return Ok(kernel);
        }
        let kernel = Kernel::load(&self.context, source.ptx()?, source.entry, shared_bytes)?;
        Ok(cell.get_or_init(|| kernel))
    }
}
