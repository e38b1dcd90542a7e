//! NVIDIA's communication library NCCL, loaded when the program first asks for it.
//! `sys` is the raw interface, this module the safe one.
//!
//! The library is searched for at [`NCCL_VARIABLE`] only, if that is set: the file or its directory,
//! such as `…/site-packages/nvidia/nccl/lib` beside torch. Otherwise the system's loader searches for it.
//! In a process in which torch has loaded its NCCL, the loader returns that one.

mod sys;

use std::ffi::{CStr, OsStr, c_int, c_void};
use std::fmt;
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::{Mutex, OnceLock, PoisonError};

use libloading::Library;

use crate::Error;
use crate::error::gpu::GpuError;
use crate::gpu::all_reduce::{AllReduce, Reduction};
use crate::gpu::{DeviceSpan, Gpu, StreamHandle};
use sys::{Functions, Handle, RawId, Status, data_type, operation};

/// The environment variable that holds NCCL's path, for installations that the loader does not find.
pub const NCCL_VARIABLE: &str = "LIQUIDGEMM_NCCL";

/// Bytes of a [`UniqueId`].
pub const UNIQUE_ID_BYTES: usize = 128;

/// File names of the library. Wheels have the first one only.
const FILE_NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];
/// The first version that adds bf16, as `ncclGetVersion` returns it.
const NEEDED: c_int = 21_000;

/// The name of a communication that is to begin. One rank makes it, and tells the others.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct UniqueId([u8; UNIQUE_ID_BYTES]);

impl UniqueId {
    /// Makes a new name.
    ///
    /// # Errors
    /// - [`GpuError::NcclNotFound`], [`GpuError::NotNccl`] or [`GpuError::NcclTooOld`] without a suitable NCCL.
    /// - [`GpuError::Nccl`] if NCCL fails.
    pub fn new() -> Result<Self, Error> {
        let functions = load()?;
        let mut id = RawId([0; UNIQUE_ID_BYTES]);
        // SAFETY: the argument is valid for a write.
        check(functions, "making NCCL's unique id", unsafe { (functions.unique_id)(&mut id) })?;
        Ok(Self(id.0))
    }

    /// Takes the bytes that [`to_bytes`](Self::to_bytes) returned on another rank.
    pub const fn from_bytes(bytes: [u8; UNIQUE_ID_BYTES]) -> Self {
        Self(bytes)
    }

    /// Returns the bytes to tell other ranks.
    pub const fn to_bytes(self) -> [u8; UNIQUE_ID_BYTES] {
        self.0
    }
}

impl fmt::Debug for UniqueId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UniqueId").finish_non_exhaustive()
    }
}

/// A rank's NCCL communicator.
///
/// A thread uses it at a time; it can move to another.
pub struct Communicator {
    functions: &'static Functions,
    handle: Handle,
    rank: usize,
    world_size: usize,
    /// Whether the caller of the library owns the communicator.
    is_borrowed: bool,
}

// SAFETY: any thread may use a communicator, one at a time.
unsafe impl Send for Communicator {}

impl fmt::Debug for Communicator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (rank, world_size) = (self.rank, self.world_size);
        f.debug_struct("Communicator").field("rank", &rank).field("world_size", &world_size).finish()
    }
}

impl Communicator {
    /// Makes the communicators of all ranks, if all are in this process: rank i is that of `gpus[i]`.
    ///
    /// The GPUs differ, and each is open in its primary context (as after [`Gpu::with_device`]),
    /// which is the one that NCCL uses.
    ///
    /// # Errors
    /// - [`GpuError::NcclNotFound`], [`GpuError::NotNccl`] or [`GpuError::NcclTooOld`] without a suitable NCCL.
    /// - [`GpuError::Nccl`] if NCCL fails, for example for the same GPU twice.
    pub fn of_process(gpus: &[&Gpu]) -> Result<Vec<Self>, Error> {
        if gpus.is_empty() {
            return Ok(Vec::new());
        }
        let id = UniqueId::new()?;
        let functions = load()?;
        let world_size = rank_number("the number of ranks", gpus.len())?;
        let mut handles = vec![ptr::null_mut(); gpus.len()];
        // SAFETY: the function takes no arguments.
        check(functions, "starting NCCL's communicators", unsafe { (functions.group_start)() })?;
        let started = gpus.iter().zip(&mut handles).enumerate().try_for_each(|(rank, (gpu, handle))| {
            let _entered = gpu.context.enter()?;
            // SAFETY: the handle's place stays where it is until the group has ended.
            let status = unsafe { (functions.init_rank)(handle, world_size, RawId(id.0), rank as c_int) };
            check(functions, "starting NCCL's communicators", status)
        });
        // SAFETY: the function takes no arguments. It ends the group even after an error.
        let ended = check(functions, "starting NCCL's communicators", unsafe { (functions.group_end)() });
        // NCCL does not say which handles it has freed after an error, so they stay as they are.
        started.and(ended)?;
        let ranks = handles.into_iter().enumerate();
        Ok(ranks
            .map(|(rank, handle)| Self {
                functions,
                handle,
                rank,
                world_size: gpus.len(),
                is_borrowed: false,
            })
            .collect())
    }

    /// Makes the communicator of one rank, and waits until all `world_size` ranks have called it.
    ///
    /// Each rank has a process, or a thread, and a GPU of its own. The caller takes the id from one rank to the others.
    ///
    /// # Errors
    /// As [`of_process`](Self::of_process), and [`GpuError::OutOfRange`] if `rank` is not below `world_size`.
    pub fn new(gpu: &Gpu, id: UniqueId, rank: usize, world_size: usize) -> Result<Self, Error> {
        if rank >= world_size {
            let limit = world_size.saturating_sub(1);
            return Err(GpuError::OutOfRange { what: "the rank", value: rank, limit }.into());
        }
        let functions = load()?;
        let (number, count) =
            (rank_number("the rank", rank)?, rank_number("the number of ranks", world_size)?);
        let _entered = gpu.context.enter()?;
        let mut handle = ptr::null_mut();
        // SAFETY: the first argument is valid for a write.
        let status = unsafe { (functions.init_rank)(&mut handle, count, RawId(id.0), number) };
        check(functions, "starting NCCL's communicator", status)?;
        Ok(Self { functions, handle, rank, world_size, is_borrowed: false })
    }

    /// Takes a communicator that someone else made, an `ncclComm_t`. It is not destroyed.
    ///
    /// # Errors
    /// As [`of_process`](Self::of_process).
    ///
    /// # Safety
    /// 1. The communicator outlives the returned value and its reductions.
    /// 2. It belongs to the NCCL that this library has found, and that is the case if the process has loaded no other.
    /// 3. Its calls wait (`blocking` of `ncclConfig_t`, the default).
    /// 4. No other thread uses it at the same time.
    pub unsafe fn from_raw(communicator: *mut c_void) -> Result<Self, Error> {
        let functions = load()?;
        let ask = |function: unsafe extern "C" fn(Handle, *mut c_int) -> Status| {
            let mut number = 0;
            // SAFETY: the caller vouches for the communicator, and the pointer is valid for a write.
            let status = unsafe { function(communicator, &mut number) };
            check(functions, "asking for a communicator's ranks", status)?;
            Ok::<_, Error>(usize::try_from(number).unwrap_or_default())
        };
        let (rank, world_size) = (ask(functions.user_rank)?, ask(functions.count)?);
        Ok(Self { functions, handle: communicator, rank, world_size, is_borrowed: true })
    }

    /// Returns the `ncclComm_t`.
    pub fn as_raw(&self) -> *mut c_void {
        self.handle
    }

    /// Returns the number of this rank, from 0.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Returns the number of ranks.
    pub fn world_size(&self) -> usize {
        self.world_size
    }

    /// Fails if a reduction that was launched has failed since, for example because another rank has ended.
    ///
    /// The streams of such a reduction may never finish. [`abort`](Self::abort) ends them.
    ///
    /// # Errors
    /// [`GpuError::Nccl`] with the reduction's error.
    pub fn check(&self) -> Result<(), Error> {
        let mut failed = 0;
        // SAFETY: the communicator is alive, and the pointer is valid for a write.
        let status = unsafe { (self.functions.async_error)(self.handle, &mut failed) };
        check(self.functions, "asking for NCCL's errors", status)?;
        check(self.functions, "a reduction", failed)
    }

    /// Ends the communicator and its reductions, which may leave anything in their buffers.
    ///
    /// # Errors
    /// [`GpuError::Nccl`] if NCCL fails.
    pub fn abort(self) -> Result<(), Error> {
        let (functions, handle) = (self.functions, self.handle);
        // NCCL frees it, so it must not be destroyed as well.
        std::mem::forget(self);
        // SAFETY: the communicator is alive, and nothing uses it any more.
        check(functions, "ending NCCL's communicator", unsafe { (functions.abort)(handle) })
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        if self.is_borrowed {
            return;
        }
        // An error cannot be handled here.
        // SAFETY: the communicator is alive, and nothing uses it any more.
        let _ = unsafe { (self.functions.destroy)(self.handle) };
    }
}

impl AllReduce for Communicator {
    fn rank(&self) -> usize {
        self.rank
    }

    unsafe fn all_reduce(
        &self,
        reduction: Reduction,
        buffer: DeviceSpan,
        stream: StreamHandle,
    ) -> Result<(), Error> {
        let (data_type, operation) = match reduction {
            Reduction::MaxI32 => (data_type::INT32, operation::MAX),
            Reduction::SumI32 => (data_type::INT32, operation::SUM),
            Reduction::SumBf16 => (data_type::BFLOAT16, operation::SUM),
            Reduction::SumF16 => (data_type::FLOAT16, operation::SUM),
        };
        let count = buffer.bytes() / reduction.element_bytes();
        let address = buffer.address() as *mut c_void;
        // SAFETY: the caller vouches for buffer and stream, and the communicator is alive.
        let status = unsafe {
            (self.functions.all_reduce)(
                address,
                address,
                count,
                data_type,
                operation,
                self.handle,
                stream.as_raw(),
            )
        };
        self.check_call("an all-reduce", status)
    }

    fn begin_group(&self) -> Result<(), Error> {
        // SAFETY: the function takes no arguments.
        self.check_call("beginning a group of all-reduces", unsafe { (self.functions.group_start)() })
    }

    fn end_group(&self) -> Result<(), Error> {
        // SAFETY: the function takes no arguments.
        self.check_call("a group of all-reduces", unsafe { (self.functions.group_end)() })
    }
}

impl Communicator {
    fn check_call(&self, action: &'static str, status: Status) -> Result<(), Error> {
        check(self.functions, action, status)
    }
}

/// Returns the version of the NCCL that this process uses, such as `2.27.5`.
///
/// # Errors
/// [`GpuError::NcclNotFound`], [`GpuError::NotNccl`] or [`GpuError::NcclTooOld`] without a suitable NCCL.
pub fn nccl_version() -> Result<String, Error> {
    Ok(version_text(version(load()?)))
}

/// Returns a number of ranks as NCCL takes it.
fn rank_number(what: &'static str, value: usize) -> Result<c_int, GpuError> {
    c_int::try_from(value).map_err(|_| GpuError::OutOfRange { what, value, limit: c_int::MAX as usize })
}

/// Returns NCCL. It is loaded once, and stays loaded.
fn load() -> Result<&'static Functions, Error> {
    static NCCL: OnceLock<Functions> = OnceLock::new();
    static LOADING: Mutex<()> = Mutex::new(());
    let _one_at_a_time = LOADING.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(functions) = NCCL.get() {
        return Ok(functions);
    }
    let functions = find(std::env::var_os(NCCL_VARIABLE).as_deref())?;
    Ok(NCCL.get_or_init(|| functions))
}

/// Opens the first of the candidates that can be loaded.
fn find(variable: Option<&OsStr>) -> Result<Functions, GpuError> {
    let mut tried = Vec::new();
    for path in candidates(variable.map(Path::new)) {
        // SAFETY: the library is NVIDIA's, which is made to be loaded like this, or one that the user named.
        match unsafe { Library::new(&path) } {
            Ok(library) => {
                let path = path.display().to_string();
                // SAFETY: as above.
                let functions = unsafe { Functions::load(library) };
                let functions =
                    functions.map_err(|function| GpuError::NotNccl { path: path.clone(), function })?;
                let found = version(&functions);
                if found < NEEDED {
                    let (found, needed) = (version_text(found), version_text(NEEDED));
                    return Err(GpuError::NcclTooOld { path, found, needed });
                }
                return Ok(functions);
            }
            Err(error) => {
                let reason = std::error::Error::source(&error).map_or(error.to_string(), ToString::to_string);
                tried.push(format!("{} ({})", path.display(), reason.replace('\n', " ")));
            }
        }
    }
    Err(GpuError::NcclNotFound { tried: tried.join(", ") })
}

/// The paths to try, in order.
fn candidates(named: Option<&Path>) -> Vec<PathBuf> {
    match named {
        Some(path) if path.is_dir() => FILE_NAMES.map(|name| path.join(name)).to_vec(),
        Some(path) => vec![path.to_owned()],
        None => FILE_NAMES.map(PathBuf::from).to_vec(),
    }
}

/// Returns the library's version number, or 0 if it does not tell.
fn version(functions: &Functions) -> c_int {
    let mut version = 0;
    // SAFETY: the argument is valid for a write.
    match unsafe { (functions.version)(&mut version) } {
        0 => version,
        _ => 0,
    }
}

/// Formats NCCL's version number: 22705 becomes `2.27.5`, and 2803 of the old scheme `2.8.3`.
fn version_text(version: c_int) -> String {
    let thousand = if version < 10_000 { 1000 } else { 10_000 };
    format!("{}.{}.{}", version / thousand, version % thousand / 100, version % 100)
}

/// Turns a status other than 0 into an error that names `action` and has NCCL's message.
fn check(functions: &Functions, action: &'static str, status: Status) -> Result<(), Error> {
    if status == 0 {
        return Ok(());
    }
    let text = |text: *const std::ffi::c_char| match text.is_null() {
        true => String::new(),
        // SAFETY: NCCL's texts end with a NUL, and live until this thread's next error.
        false => unsafe { CStr::from_ptr(text) }.to_string_lossy().trim().replace('\n', " "),
    };
    // SAFETY: the function accepts any number.
    let mut message = text(unsafe { (functions.error_string)(status) });
    if let Some(last_error) = functions.last_error {
        // SAFETY: null asks for the last error of this thread.
        let detail = text(unsafe { last_error(ptr::null_mut()) });
        if !detail.is_empty() {
            message = format!("{message}: {detail}");
        }
    }
    Err(GpuError::Nccl { action, status, message }.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_library_the_error_names_what_was_tried_and_what_to_install() {
        let directory = tempfile::tempdir().unwrap();
        let message = find(Some(directory.path().as_os_str())).err().unwrap().to_string();
        for part in ["libnccl.so.2", "libnccl.so ", "nvidia-nccl-cu12", "nvidia-nccl-cu13", NCCL_VARIABLE] {
            assert!(message.contains(part), "{part} is not in {message}");
        }
        assert!(message.contains(&directory.path().display().to_string()) && !message.contains('\n'));
    }

    #[test]
    fn a_library_that_is_not_nccl_is_refused_by_name() {
        let message = find(Some(OsStr::new("libc.so.6"))).err().unwrap().to_string();
        assert!(message.contains("libc.so.6") && message.contains("ncclGetVersion"), "{message}");
    }

    #[test]
    fn a_named_file_is_the_only_candidate_and_without_one_the_wheels_name_comes_first() {
        assert_eq!(candidates(Some(Path::new("/no/libmine.so"))), [Path::new("/no/libmine.so")]);
        assert_eq!(candidates(None)[0], Path::new("libnccl.so.2"));
    }

    #[test]
    fn version_numbers_become_dotted_text() {
        assert_eq!(version_text(22_705), "2.27.5");
        assert_eq!(version_text(21_000), "2.10.0");
        assert_eq!(version_text(2803), "2.8.3");
    }
}
