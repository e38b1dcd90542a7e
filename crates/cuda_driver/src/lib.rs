//! The CUDA driver's entry points, resolved from `libcuda.so.1` (`nvcuda.dll`) when the program runs.
//!
//! `cust` calls the driver through symbols that are normally linked from `libcuda`. This crate defines those
//! symbols itself, so a program that uses `cust` builds without a CUDA toolkit and starts without a driver:
//!
//! - before [`load`] succeeds, every driver call returns `CUDA_ERROR_STUB_LIBRARY` (34);
//! - afterwards each goes straight to the driver's function, through one indirect jump.
//!
//! ```no_run
//! let driver = cuda_driver::load()?;
//! println!("CUDA driver {}", driver.version());
//! // From here on, cust works; what cust lacks is found by name.
//! let encode = driver.lookup("cuTensorMapEncodeTiled");
//! # Ok::<(), cuda_driver::LoadError>(())
//! ```
//!
//! A crate that only uses `cust`'s types must still name this one (`use cuda_driver as _;`), or the linker never sees
//! its symbols.

mod entry_points;

use std::borrow::Cow;
use std::ffi::{CStr, OsStr, c_int, c_void};
use std::fmt;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, OnceLock, PoisonError};

use libloading::Library;

use entry_points::ENTRY_POINTS;

/// The driver library's file name, as the system's loader looks it up.
pub const LIBRARY: &str = if cfg!(windows) { "nvcuda.dll" } else { "libcuda.so.1" };

/// Why there is no driver to call.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The system's loader does not know the library.
    #[error(
        "no NVIDIA driver: {library} not found (on a host install NVIDIA's driver; in a container \
         start it with the NVIDIA Container Toolkit)"
    )]
    NotFound {
        /// The library that was looked for.
        library: String,
        /// What the loader said.
        source: libloading::Error,
    },
    /// The library opened but is not a working driver.
    #[error("{library} is not a working NVIDIA driver: {reason}")]
    NotADriver {
        /// The library that was opened.
        library: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// The newest CUDA version that the driver supports: 13.0 for the 580 series, for example.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct CudaVersion {
    /// The number before the dot.
    pub major: u32,
    /// The number after the dot.
    pub minor: u32,
}

impl fmt::Display for CudaVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// The loaded driver. It stays loaded for as long as the process lives.
#[derive(Debug)]
pub struct Driver {
    library: Library,
    version: CudaVersion,
    missing: Vec<&'static str>,
}

static DRIVER: OnceLock<Driver> = OnceLock::new();

/// Opens the driver and connects the entry points to it; once that has succeeded, later calls return the same
/// driver at once.
///
/// # Errors
/// [`LoadError`] where the machine has no driver. The entry points then go on returning 34.
pub fn load() -> Result<&'static Driver, LoadError> {
    // SAFETY: this is NVIDIA's own library under its own name, made to be opened like this.
    unsafe { load_from(LIBRARY) }
}

/// As [`load`], from a given library: for a driver outside the loader's search path, and for tests. If a driver is already
/// loaded, that one is returned and `library` is left alone.
///
/// # Safety
/// `library` runs its initialisers in this process, and the functions that it exports under the names of
/// driver functions must have those functions' signatures.
///
/// # Errors
/// As [`load`].
pub unsafe fn load_from(library: impl AsRef<OsStr>) -> Result<&'static Driver, LoadError> {
    static LOADING: Mutex<()> = Mutex::new(());
    let _one_at_a_time = LOADING.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(driver) = DRIVER.get() {
        return Ok(driver);
    }
    // SAFETY: handed on to the caller.
    let driver = unsafe { Driver::open(library.as_ref()) }?;
    Ok(DRIVER.get_or_init(|| driver.connect()))
}

/// What the driver says about a status that one of its functions returned: a line of text, or nothing where it does not
/// know the number. Unlike `cust`'s error type this takes any number, also one of a newer driver.
pub fn describe_status(status: c_int) -> Option<Cow<'static, str>> {
    entry_points::error_string(status).map(CStr::to_string_lossy)
}

impl Driver {
    /// # Safety
    /// As [`load_from`].
    unsafe fn open(path: &OsStr) -> Result<Self, LoadError> {
        let name = || path.to_string_lossy().into_owned();
        let not_a_driver = |reason: String| LoadError::NotADriver { library: name(), reason };
        // SAFETY: handed on to the caller.
        let library = unsafe { Library::new(path) }.map_err(|source| {
            // A file that is there but does not open (the wrong architecture, say) is another problem than none.
            if cfg!(windows) || source.to_string().to_ascii_lowercase().contains("no such file") {
                LoadError::NotFound { library: name(), source }
            } else {
                not_a_driver(source.to_string())
            }
        })?;

        type GetVersion = unsafe extern "C" fn(*mut c_int) -> c_int;
        let mut driver = Self { library, version: CudaVersion { major: 0, minor: 0 }, missing: Vec::new() };
        // SAFETY: that is the signature of `cuDriverGetVersion` in every CUDA release.
        let get_version = unsafe { driver.symbol::<GetVersion>("cuDriverGetVersion") }
            .ok_or_else(|| not_a_driver("it has no cuDriverGetVersion".into()))?;
        let mut version = 0;
        // SAFETY: the one argument is valid for a write; this function needs no `cuInit`.
        let status = unsafe { get_version(&mut version) };
        if status != 0 || version <= 0 {
            return Err(not_a_driver(format!(
                "cuDriverGetVersion returned status {status}, version {version}"
            )));
        }
        let version = version.unsigned_abs();
        driver.version = CudaVersion { major: version / 1000, minor: version % 1000 / 10 };
        Ok(driver)
    }

    /// Points every entry point at this driver. Those that the driver lacks keep what they had.
    fn connect(mut self) -> Self {
        for entry in ENTRY_POINTS {
            match self.lookup(entry.name) {
                Some(function) => entry.slot.store(function.cast_mut(), Ordering::Release),
                None => self.missing.push(entry.name),
            }
        }
        self
    }

    /// The CUDA version of the driver, as `cuDriverGetVersion` gives it.
    pub fn version(&self) -> CudaVersion {
        self.version
    }

    /// The entry points known to this crate that the driver lacks; calling them returns 34.
    pub fn missing(&self) -> &[&'static str] {
        &self.missing
    }

    /// The address of an exported function, `None` if the driver has none of that name.
    pub fn lookup(&self, name: &str) -> Option<*const c_void> {
        // SAFETY: a symbol may be read as a plain address whatever its type.
        unsafe { self.symbol::<*const c_void>(name) }.filter(|address| !address.is_null())
    }

    /// An exported function as a function pointer, `None` if the driver has none of that name.
    ///
    /// # Safety
    /// `T` must be a function pointer type (or a pointer) that fits what `name` is in the driver.
    pub unsafe fn symbol<T: Copy>(&self, name: &str) -> Option<T> {
        // SAFETY: the caller vouches for the type; the library is never closed once it is public.
        unsafe { self.library.get::<T>(name.as_bytes()) }.ok().map(|symbol| *symbol)
    }
}
