//! NVIDIA's cuBLASLt as a baseline, where it is installed: `sys` is the raw interface, this the safe one.
//!
//! All three products are laid out as cuBLASLt likes them best on Hopper, "TN": weights `[n, k]` and activations
//! `[m, k]`, both with k contiguous, output `[m, n]` with n contiguous. In its column-major terms that is
//! `Dᵀ[n, m] = Aᵀ[n, k] · B[k, m]`. For int8 it is the only layout that Hopper has.
//!
//! The library is looked for at `LIQUIDGEMM_CUBLASLT` (the file or its directory, such as
//! `…/site-packages/nvidia/cu13/lib` beside torch), then where the system's loader looks, then in
//! `/usr/local/cuda/lib64`.

mod sys;

use std::ffi::{CStr, OsString, c_void};
use std::path::{Path, PathBuf};
use std::ptr;

use anyhow::{bail, ensure};
use cust::memory::DeviceBuffer;
use libloading::Library;

use super::record::Baseline;
use crate::gpu::StreamHandle;
use sys::{Algorithm, ComputeType, DataType, Functions, Handle, HeuristicResult, MatmulAttribute, Status};

/// Names the library, for installations that the loader doesn't know.
pub const VARIABLE: &str = "LIQUIDGEMM_CUBLASLT";
/// Newest first.
const FILE_NAMES: [&str; 3] = ["libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"];
/// Where CUDA's own installer puts it.
const USUAL_DIRECTORY: &str = "/usr/local/cuda/lib64";
/// What every algorithm may use.
const WORKSPACE_BYTES: usize = 64 << 20;

/// The library, ready to multiply in the context that was current when it was opened.
pub struct CublasLt {
    functions: Functions,
    handle: Handle,
    workspace: DeviceBuffer<u8>,
    /// The fp8 scale of either operand, 1.0.
    scale: DeviceBuffer<f32>,
    /// Where it was found, and its version.
    description: String,
}

impl CublasLt {
    /// Finds and opens the library. A CUDA context must be current.
    ///
    /// # Errors
    /// One line that says what is missing.
    pub fn open() -> anyhow::Result<Self> {
        let (library, path) = find(std::env::var_os(VARIABLE))?;
        // SAFETY: the file has cuBLASLt's name, or the user said that it is one.
        let functions = unsafe { Functions::load(library) }?;
        // SAFETY: it takes no arguments.
        let version = unsafe { (functions.version)() };
        let description = format!("cuBLASLt {} ({path})", version_text(version));
        // SAFETY: scratch memory, which cuBLASLt writes before it reads.
        let workspace = unsafe { DeviceBuffer::uninitialized(WORKSPACE_BYTES) }?;
        let scale = DeviceBuffer::from_slice(&[1.0])?;
        let mut handle = ptr::null_mut();
        // SAFETY: the argument is valid for a write, and a context is current.
        check(&functions, "starting cuBLASLt", unsafe { (functions.create)(&mut handle) })?;
        Ok(Self { functions, handle, workspace, scale, description })
    }

    /// Where the library was found, and its version.
    pub fn description(&self) -> &str {
        &self.description
    }

    /// Prepares a product, with the first `count` algorithms that the library's heuristics propose, best first.
    ///
    /// # Errors
    /// If the library has no algorithm for it.
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
            // The faster of its two accumulations, as inference engines ask for it.
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

    /// Of A, B and D, column-major.
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
        // SAFETY: all handles are alive, and `results` has room for as many as are asked for.
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
        // SAFETY: the handle is alive, and nothing uses it any more. A failure here can't be helped.
        unsafe { (self.functions.destroy)(self.handle) };
    }
}

/// A product with its algorithm.
pub struct Gemm<'l> {
    library: &'l CublasLt,
    operation: Descriptor,
    layouts: [Descriptor; 3],
    algorithm: Algorithm,
    /// Whether the scalars of the call are integers.
    integer: bool,
}

impl Gemm<'_> {
    /// Launches the product and returns at once.
    ///
    /// # Errors
    /// Whatever cuBLASLt says.
    ///
    /// # Safety
    /// The addresses are device memory of the product's sizes, aligned to 16 bytes and alive until the launch has
    /// finished; `stream` belongs to the library's context; no other launch runs at the same time, because all
    /// share a workspace.
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
        // SAFETY: all handles are alive, the scalars are of the type that the operation declares and read before
        // the call returns; the caller vouches for the memory and the stream.
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

/// A description that the library keeps, destroyed with this value.
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
        // SAFETY: the handle came from the matching function, and nothing else destroys it; what is dropped here
        // never outlives the library.
        unsafe { (self.destroy)(self.handle) };
    }
}

/// Opens the first library that there is.
fn find(variable: Option<OsString>) -> anyhow::Result<(Library, String)> {
    let mut failure = String::new();
    let candidates = candidates(variable.as_deref().map(Path::new));
    for path in &candidates {
        // SAFETY: it is NVIDIA's library, made to be opened like this, or one that the user named.
        match unsafe { Library::new(path) } {
            Ok(library) => return Ok((library, path.display().to_string())),
            // The first failure is about the place that the user named, if there is one.
            Err(error) if failure.is_empty() => failure = error.to_string().replace('\n', " "),
            Err(_) => {}
        }
    }
    if variable.is_some() {
        bail!("cuBLASLt not found where {VARIABLE} points: {failure}");
    }
    bail!("cuBLASLt not found; install CUDA's libcublas or point {VARIABLE} at libcublasLt.so")
}

/// Where to look, in order.
fn candidates(named: Option<&Path>) -> Vec<PathBuf> {
    let inside = |directory: &Path| FILE_NAMES.map(|name| directory.join(name));
    match named {
        Some(path) if path.is_dir() => inside(path).to_vec(),
        Some(path) => vec![path.to_owned()],
        None => FILE_NAMES.map(PathBuf::from).into_iter().chain(inside(Path::new(USUAL_DIRECTORY))).collect(),
    }
}

/// 130200 → 13.2.0.
fn version_text(version: usize) -> String {
    format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100)
}

/// A status other than 0 is an error.
fn check(functions: &Functions, action: &str, status: Status) -> anyhow::Result<()> {
    if status == 0 {
        return Ok(());
    }
    // SAFETY: the library takes any number; it answers with a string of its own, or null.
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
    fn named_place_is_the_only_one_that_is_looked_at() {
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
    fn without_a_name_the_loader_is_asked_first() {
        let paths = candidates(None);
        assert_eq!(paths[0], Path::new("libcublasLt.so.13"));
        assert_eq!(paths.last().unwrap(), Path::new("/usr/local/cuda/lib64/libcublasLt.so"));
    }

    #[test]
    fn versions_read_as_they_are_spoken_of() {
        assert_eq!(version_text(130_200), "13.2.0");
        assert_eq!(version_text(120_805), "12.8.5");
    }
}
