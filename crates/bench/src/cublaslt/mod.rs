//! NVIDIA's cuBLASLt as a baseline, if it is installed. `sys` is the raw interface, this module the safe one.
//!
//! All three products use the layout that is fastest for cuBLASLt on Hopper, "TN":
//! weights `[n, k]` and activations `[m, k]`, both with k contiguous, and output `[m, n]` with n contiguous.
//! In cuBLASLt's column-major notation this is `Dᵀ[n, m] = Aᵀ[n, k] · B[k, m]`.
//! For int8 it is the only layout that Hopper supports.
//!
//! The library is searched for at `LIQUIDGEMM_CUBLASLT` only, if that is set.
//! It is the file or its directory, such as `…/site-packages/nvidia/cu13/lib` beside torch.
//! Otherwise the search goes through the system's loader first and `/usr/local/cuda/lib64` second.

mod sys;

use std::ffi::{CStr, OsString, c_void};
use std::path::{Path, PathBuf};
use std::ptr;

use anyhow::{bail, ensure};
use cust::memory::DeviceBuffer;
use libloading::Library;

use super::record::Baseline;
use liquidgemm::gpu::{Gpu, StreamHandle};
use sys::{Algorithm, ComputeType, DataType, Functions, Handle, HeuristicResult, MatmulAttribute, Status};

/// Environment variable that holds the library's path, for installations that the loader does not find.
pub const VARIABLE: &str = "LIQUIDGEMM_CUBLASLT";
/// File names of the library, the newest version first.
const FILE_NAMES: [&str; 3] = ["libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"];
/// Directory that CUDA's installer uses.
const USUAL_DIRECTORY: &str = "/usr/local/cuda/lib64";
/// Workspace that every algorithm may use, in bytes.
const WORKSPACE_BYTES: usize = 64 << 20;

/// The library, initialized in the context that was current when it was opened.
pub struct CublasLt {
    functions: Functions,
    handle: Handle,
    workspace: DeviceBuffer<u8>,
    /// The fp8 scale of either operand, 1.0.
    scale: DeviceBuffer<f32>,
    /// Version and path.
    description: String,
}

impl CublasLt {
    /// Finds and opens the library for a GPU, whose context it makes current.
    ///
    /// # Errors
    /// If the library can't be found, loaded or initialized; the error is one line.
    pub fn open(gpu: &Gpu) -> anyhow::Result<Self> {
        gpu.make_current()?;
        let (library, path) = find(std::env::var_os(VARIABLE))?;
        // SAFETY: the file has cuBLASLt's name, or the user named it as cuBLASLt.
        let functions = unsafe { Functions::load(library) }?;
        // SAFETY: the function takes no arguments.
        let version = unsafe { (functions.version)() };
        let description = format!("cuBLASLt {} ({path})", version_text(version));
        // SAFETY: this is scratch memory, which cuBLASLt writes before it reads.
        let workspace = unsafe { DeviceBuffer::uninitialized(WORKSPACE_BYTES) }?;
        let scale = DeviceBuffer::from_slice(&[1.0])?;
        let mut handle = ptr::null_mut();
        // SAFETY: the argument is valid for a write, and a context is current.
        check(&functions, "starting cuBLASLt", unsafe { (functions.create)(&mut handle) })?;
        Ok(Self { functions, handle, workspace, scale, description })
    }

    /// Version and path of the library.
    pub fn description(&self) -> &str {
        &self.description
    }

    /// Prepares a product `[m, n, k]` with each of the first `count` algorithms that the heuristics propose.
    /// The best proposal is the first.
    ///
    /// # Errors
    /// If the library has no algorithm for the product.
    pub fn gemm(
        &self,
        baseline: Baseline,
        m: usize,
        n: usize,
        k: usize,
        count: usize,
    ) -> anyhow::Result<Vec<Gemm<'_>>> {
        let (input, output, compute, scale) = match baseline {
            Baseline::Int8 => (DataType::I8, DataType::I32, ComputeType::I32, DataType::I32),
            Baseline::Fp8 => (DataType::E4m3, DataType::Bf16, ComputeType::F32, DataType::F32),
            Baseline::Bf16 => (DataType::Bf16, DataType::Bf16, ComputeType::F32, DataType::F32),
        };
        let algorithms = {
            let operation = self.operation(baseline, compute, scale)?;
            let layouts = self.layouts(input, output, m, n, k)?;
            self.heuristics(&operation, &layouts, count)?
        };
        algorithms
            .into_iter()
            .map(|algorithm| {
                Ok(Gemm {
                    library: self,
                    operation: self.operation(baseline, compute, scale)?,
                    layouts: self.layouts(input, output, m, n, k)?,
                    algorithm,
                    integer: matches!(baseline, Baseline::Int8),
                })
            })
            .collect()
    }

    fn operation(
        &self,
        baseline: Baseline,
        compute: ComputeType,
        scale: DataType,
    ) -> anyhow::Result<Descriptor> {
        let operation =
            Descriptor::new(self, "describing a product", self.functions.matmul_destroy, |handle| {
                // SAFETY: the argument is valid for a write.
                unsafe { (self.functions.matmul_create)(handle, compute, scale) }
            })?;
        self.set(&operation, MatmulAttribute::TransposeA, &sys::TRANSPOSE)?;
        if matches!(baseline, Baseline::Fp8) {
            let scale = self.scale.as_device_ptr().as_raw();
            self.set(&operation, MatmulAttribute::ScalePointerA, &scale)?;
            self.set(&operation, MatmulAttribute::ScalePointerB, &scale)?;
            // Of cuBLASLt's two accumulation modes this is the faster, which inference engines request too.
            self.set(&operation, MatmulAttribute::FastAccumulation, &1i8)?;
        }
        Ok(operation)
    }

    fn set<T: bytemuck::NoUninit>(
        &self,
        operation: &Descriptor,
        attribute: MatmulAttribute,
        value: &T,
    ) -> anyhow::Result<()> {
        // SAFETY: `value` is valid for a read of its size, and the library copies it.
        let status = unsafe {
            (self.functions.matmul_set)(
                operation.handle,
                attribute,
                ptr::from_ref(value).cast(),
                size_of::<T>(),
            )
        };
        check(&self.functions, "describing a product", status)
    }

    /// Creates the column-major layouts of A `[k, n]`, B `[k, m]` and D `[n, m]`.
    fn layouts(
        &self,
        input: DataType,
        output: DataType,
        m: usize,
        n: usize,
        k: usize,
    ) -> anyhow::Result<[Descriptor; 3]> {
        let layout = |kind, rows: usize, columns: usize| {
            Descriptor::new(self, "describing a matrix", self.functions.layout_destroy, |handle| {
                // SAFETY: the argument is valid for a write.
                unsafe {
                    (self.functions.layout_create)(handle, kind, rows as u64, columns as u64, rows as i64)
                }
            })
        };
        Ok([layout(input, k, n)?, layout(input, k, m)?, layout(output, n, m)?])
    }

    fn heuristics(
        &self,
        operation: &Descriptor,
        layouts: &[Descriptor; 3],
        count: usize,
    ) -> anyhow::Result<Vec<Algorithm>> {
        let preference =
            Descriptor::new(self, "asking for algorithms", self.functions.preference_destroy, |handle| {
                // SAFETY: the argument is valid for a write.
                unsafe { (self.functions.preference_create)(handle) }
            })?;
        let workspace = WORKSPACE_BYTES;
        // SAFETY: the value is valid for a read of its size, and the library copies it.
        let status = unsafe {
            (self.functions.preference_set)(
                preference.handle,
                sys::PREFERENCE_MAX_WORKSPACE,
                (&raw const workspace).cast(),
                size_of::<usize>(),
            )
        };
        check(&self.functions, "asking for algorithms", status)?;
        let mut results = vec![HeuristicResult::default(); count.max(1)];
        let mut found = 0;
        let [a, b, d] = layouts;
        // SAFETY: all handles are alive, and `results` has room for as many entries as are requested.
        let status = unsafe {
            (self.functions.heuristic)(
                self.handle,
                operation.handle,
                a.handle,
                b.handle,
                d.handle,
                d.handle,
                preference.handle,
                results.len() as i32,
                results.as_mut_ptr(),
                &mut found,
            )
        };
        check(&self.functions, "asking for algorithms", status)?;
        results.truncate(found.max(0) as usize);
        results.retain(|result| result.state == 0 && result.workspace_bytes <= WORKSPACE_BYTES);
        ensure!(!results.is_empty(), "cuBLASLt's heuristics propose no algorithm");
        Ok(results.into_iter().map(|result| result.algorithm).collect())
    }
}

impl Drop for CublasLt {
    fn drop(&mut self) {
        // SAFETY: the handle is alive, and nothing uses it any more. A failure can't be reported from here.
        unsafe { (self.functions.destroy)(self.handle) };
    }
}

/// A product with its algorithm, ready to launch.
pub struct Gemm<'l> {
    library: &'l CublasLt,
    operation: Descriptor,
    layouts: [Descriptor; 3],
    algorithm: Algorithm,
    /// Whether alpha and beta are integers.
    integer: bool,
}

impl Gemm<'_> {
    /// Launches the product and returns at once.
    ///
    /// # Errors
    /// If cuBLASLt refuses the launch.
    ///
    /// # Safety
    /// - The addresses are device memory of the product's sizes, aligned to 16 bytes.
    ///   The memory stays allocated until the launch has finished.
    /// - `stream` belongs to the library's context.
    /// - No other launch of this library runs at the same time, because all launches share one workspace.
    pub unsafe fn launch(
        &self,
        weights: u64,
        activations: u64,
        output: u64,
        stream: StreamHandle,
    ) -> anyhow::Result<()> {
        let (float, integer) = ([1f32, 0f32], [1i32, 0i32]);
        let [one, zero]: [*const c_void; 2] = if self.integer {
            [(&raw const integer[0]).cast(), (&raw const integer[1]).cast()]
        } else {
            [(&raw const float[0]).cast(), (&raw const float[1]).cast()]
        };
        let [a, b, d] = &self.layouts;
        let (functions, workspace) = (&self.library.functions, &self.library.workspace);
        let output = output as *mut c_void;
        // SAFETY: all handles are alive. The scalars have the type that the operation declares,
        // and the call reads them before it returns. The caller guarantees memory and stream.
        let status = unsafe {
            (functions.matmul)(
                self.library.handle,
                self.operation.handle,
                one,
                weights as *const c_void,
                a.handle,
                activations as *const c_void,
                b.handle,
                zero,
                output,
                d.handle,
                output,
                d.handle,
                &self.algorithm,
                workspace.as_device_ptr().as_raw() as *mut c_void,
                workspace.len(),
                stream.as_raw().cast(),
            )
        };
        check(functions, "launching cuBLASLt", status)
    }
}

/// An object of the library, such as a layout, that is destroyed when this value is dropped.
struct Descriptor {
    handle: Handle,
    destroy: unsafe extern "C" fn(Handle) -> Status,
}

impl Descriptor {
    fn new(
        library: &CublasLt,
        action: &str,
        destroy: unsafe extern "C" fn(Handle) -> Status,
        create: impl FnOnce(*mut Handle) -> Status,
    ) -> anyhow::Result<Self> {
        let mut handle = ptr::null_mut();
        check(&library.functions, action, create(&mut handle))?;
        Ok(Self { handle, destroy })
    }
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        // SAFETY: the handle came from the matching create function, and nothing else destroys it.
        // Descriptors never outlive the library.
        unsafe { (self.destroy)(self.handle) };
    }
}

/// Opens the first of the candidates that can be loaded.
fn find(variable: Option<OsString>) -> anyhow::Result<(Library, String)> {
    let mut failure = String::new();
    let candidates = candidates(variable.as_deref().map(Path::new));
    for path in &candidates {
        // SAFETY: the library is NVIDIA's, which is made to be loaded like this, or one that the user named.
        match unsafe { Library::new(path) } {
            Ok(library) => return Ok((library, path.display().to_string())),
            // Keep the first failure: it concerns the place that the user named, if there is one.
            Err(error) if failure.is_empty() => {
                failure = format!("{:#}", anyhow::Error::from(error)).replace('\n', " ");
            }
            Err(_) => {}
        }
    }
    if variable.is_some() {
        bail!("cannot load cuBLASLt from the path in {VARIABLE}: {failure}");
    }
    bail!("cuBLASLt not found; install CUDA's libcublas or set {VARIABLE} to the path of libcublasLt.so")
}

/// The paths to try, in order.
fn candidates(named: Option<&Path>) -> Vec<PathBuf> {
    let inside = |directory: &Path| FILE_NAMES.map(|name| directory.join(name));
    match named {
        Some(path) if path.is_dir() => inside(path).to_vec(),
        Some(path) => vec![path.to_owned()],
        None => FILE_NAMES.map(PathBuf::from).into_iter().chain(inside(Path::new(USUAL_DIRECTORY))).collect(),
    }
}

/// Formats cuBLASLt's version number: 130200 becomes `13.2.0`.
fn version_text(version: usize) -> String {
    format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100)
}

/// Turns a status other than 0 into an error that names `action`.
fn check(functions: &Functions, action: &str, status: Status) -> anyhow::Result<()> {
    if status == 0 {
        return Ok(());
    }
    // SAFETY: the function accepts any number and returns a static string or null.
    let name = unsafe {
        let name = (functions.status_name)(status);
        if name.is_null() { c"unknown status" } else { CStr::from_ptr(name) }
    };
    bail!("{action} failed: {} ({status})", name.to_string_lossy())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_named_path_is_the_only_candidate() {
        let directory = tempfile::tempdir().unwrap();
        let paths = candidates(Some(directory.path()));
        assert_eq!(paths.len(), FILE_NAMES.len());
        assert!(paths.iter().all(|path| path.starts_with(directory.path())));
        let file = directory.path().join("libmine.so");
        assert_eq!(candidates(Some(&file)), std::slice::from_ref(&file));
        let error = find(Some(file.into())).err().unwrap().to_string();
        assert!(error.contains(VARIABLE) && !error.contains('\n'), "{error}");
    }

    #[test]
    fn without_a_named_path_the_system_loader_comes_first() {
        let paths = candidates(None);
        assert_eq!(paths[0], Path::new("libcublasLt.so.13"));
        assert_eq!(paths.last().unwrap(), Path::new("/usr/local/cuda/lib64/libcublasLt.so"));
    }

    #[test]
    fn version_numbers_become_dotted_text() {
        assert_eq!(version_text(130_200), "13.2.0");
        assert_eq!(version_text(120_805), "12.8.5");
    }
}
