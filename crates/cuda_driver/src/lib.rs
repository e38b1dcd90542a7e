//! The CUDA driver's entry points, resolved from `libcuda.so.1` (`nvcuda.dll`) when the program runs.
//!
//! `cust` calls the driver through symbols that are normally linked from `libcuda`.
//! This crate defines those symbols itself (`entry_points.rs`).
//! A program that uses `cust` therefore builds without a CUDA toolkit and starts without a driver:
//!
//! - Before [`load`] succeeds, driver calls return `CUDA_ERROR_STUB_LIBRARY` (34).
//! - Afterwards, each call goes straight to the driver's function, through one indirect jump.
//!
//! ```no_run
//! let driver = cuda_driver::load()?;
//! println!("CUDA driver {}", driver.version());
//! // From here on, cust works. Functions that cust lacks are looked up by name.
//! let encode = driver.lookup("cuTensorMapEncodeTiled");
//! # Ok::<(), cuda_driver::LoadError>(())
//! ```
//!
//! A crate that only uses `cust` must still name this crate (`use cuda_driver as _;`),
//! so that the linker sees its symbols.

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

/// The reasons why no driver could be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The system's loader did not find the library.
    #[error(
        "no NVIDIA driver: {library} not found (on a host install NVIDIA's driver; in a container \
         start it with the NVIDIA Container Toolkit)"
    )]
    NotFound {
        /// The library's name or path.
        library: String,
        /// The loader's error.
        source: libloading::Error,
    },
    /// The library exists but is not a working driver.
    #[error("{library} is not a working NVIDIA driver: {reason}")]
    NotADriver {
        /// The library's name or path.
        library: String,
        /// The problem with it.
        reason: String,
    },
}

/// The newest CUDA version that a driver supports, such as 13.0 for the 580 series.
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

/// The loaded driver. It stays loaded until the process ends.
#[derive(Debug)]
pub struct Driver {
    library: Library,
    version: CudaVersion,
    missing: Vec<&'static str>,
}

static DRIVER: OnceLock<Driver> = OnceLock::new();

/// Loads the driver and connects the entry points to it.
///
/// Once this has succeeded, later calls return the same driver at once.
///
/// # Errors
/// [`LoadError`] if the machine has no working driver. The entry points then still return 34.
pub fn load() -> Result<&'static Driver, LoadError> {
    // SAFETY: this name belongs to NVIDIA's driver library, which is made to be loaded like this
    // and whose functions have the driver's signatures.
    unsafe { load_from(LIBRARY) }
}

/// Loads the driver from a given library: for a driver outside the loader's search path, and for tests.
///
/// If a driver is already loaded, returns that one and does not open `library`.
///
/// # Safety
/// It must be sound to run the library's initialisers in this process.
/// Functions that it exports under the names of driver functions must have those functions' signatures.
///
/// # Errors
/// As [`load`].
pub unsafe fn load_from(library: impl AsRef<OsStr>) -> Result<&'static Driver, LoadError> {
    static LOADING: Mutex<()> = Mutex::new(());
    let _one_at_a_time = LOADING.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(driver) = DRIVER.get() {
        return Ok(driver);
    }
    // SAFETY: the caller guarantees what `Driver::open` requires.
    let driver = unsafe { Driver::open(library.as_ref()) }?;
    Ok(DRIVER.get_or_init(|| driver.connect()))
}

/// Returns the driver's description of a status in one line,
/// or `None` if the driver does not know the status.
///
/// Unlike `cust`'s error type, this accepts any number, including those of newer drivers.
pub fn describe_status(status: c_int) -> Option<Cow<'static, str>> {
    entry_points::error_string(status).map(CStr::to_string_lossy)
}

/// Returns what the system's loader says, which is the source of the error if it has one.
fn loader_message(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}

impl Driver {
    /// Opens a library and checks that it is a working driver.
    ///
    /// # Safety
    /// As [`load_from`].
    unsafe fn open(path: &OsStr) -> Result<Self, LoadError> {
        let name = || path.to_string_lossy().into_owned();
        let not_a_driver = |reason: String| LoadError::NotADriver { library: name(), reason };
        // SAFETY: the caller guarantees that the library may be opened.
        let library = unsafe { Library::new(path) }.map_err(|source| {
            // Distinguish a missing file from one that does not open,
            // for example one of another architecture.
            let reason = loader_message(&source);
            if cfg!(windows) || reason.to_ascii_lowercase().contains("no such file") {
                LoadError::NotFound { library: name(), source }
            } else {
                not_a_driver(reason)
            }
        })?;

        type GetVersion = unsafe extern "C" fn(*mut c_int) -> c_int;
        let mut driver = Self { library, version: CudaVersion { major: 0, minor: 0 }, missing: Vec::new() };
        // SAFETY: `cuDriverGetVersion` has this signature in every CUDA release.
        let get_version = unsafe { driver.symbol::<GetVersion>("cuDriverGetVersion") }
            .ok_or_else(|| not_a_driver("it has no cuDriverGetVersion".into()))?;
        let mut version = 0;
        // SAFETY: the pointer is valid for a write, and this function needs no `cuInit`.
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

    /// Connects every entry point to this driver. Those that the driver lacks stay as they are.
    fn connect(mut self) -> Self {
        for entry in ENTRY_POINTS {
            match self.lookup(entry.name) {
                Some(function) => entry.slot.store(function.cast_mut(), Ordering::Release),
                None => self.missing.push(entry.name),
            }
        }
        self
    }

    /// Returns the driver's CUDA version, as `cuDriverGetVersion` reports it.
    pub fn version(&self) -> CudaVersion {
        self.version
    }

    /// Returns the entry points of this crate that the driver lacks. Calls to them return 34.
    pub fn missing(&self) -> &[&'static str] {
        &self.missing
    }

    /// Returns the address of an exported function, or `None` if the driver has none of this name.
    pub fn lookup(&self, name: &str) -> Option<*const c_void> {
        // SAFETY: any symbol may be read as a plain address, whatever its type.
        unsafe { self.symbol::<*const c_void>(name) }.filter(|address| !address.is_null())
    }

    /// Returns an exported function as a function pointer, or `None` if the driver has none of this name.
    ///
    /// # Safety
    /// `T` must be a function pointer type, or a pointer type, that matches the driver's symbol `name`.
    pub unsafe fn symbol<T: Copy>(&self, name: &str) -> Option<T> {
        // SAFETY: the caller guarantees the type. A driver that callers can reach is never unloaded,
        // so the pointer stays valid.
        unsafe { self.library.get::<T>(name.as_bytes()) }.ok().map(|symbol| *symbol)
    }
}
