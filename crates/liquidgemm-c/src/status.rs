//! Status codes, the message of a thread's last error, and the guard around every function.

use std::cell::RefCell;
use std::ffi::{CString, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};

use liquidgemm::Error;
use liquidgemm::gpu::GpuError;

/// The outcome of a call: `LG_OK` or one of the `LG_ERROR_…` codes.
pub type lg_status = i32;

/// The call succeeded.
pub const LG_OK: lg_status = 0;
/// An argument is wrong: a null pointer, a shape, a type, a value, an alignment, a buffer's size.
pub const LG_ERROR_INVALID_ARGUMENT: lg_status = 1;
/// A file cannot be read or written, or does not contain packed weights.
pub const LG_ERROR_FILE: lg_status = 2;
/// There is no driver or no GPU that the library can use.
pub const LG_ERROR_NO_GPU: lg_status = 3;
/// The GPU's memory ran out.
pub const LG_ERROR_OUT_OF_MEMORY: lg_status = 4;
/// The driver returned an error.
pub const LG_ERROR_DRIVER: lg_status = 5;
/// The library has a defect. Its state is unchanged; please report the message.
pub const LG_ERROR_INTERNAL: lg_status = 6;

/// `CUDA_ERROR_OUT_OF_MEMORY`.
const CUDA_OUT_OF_MEMORY: u32 = 2;

/// Why a call failed.
#[derive(Debug)]
pub(crate) struct Failure {
    status: lg_status,
    message: String,
}

impl Failure {
    /// Makes the failure of a wrong argument.
    pub(crate) fn argument(message: impl Into<String>) -> Self {
        Self { status: LG_ERROR_INVALID_ARGUMENT, message: message.into() }
    }
}

impl<E: Into<Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        let error = error.into();
        let status = match &error {
            Error::File { .. } => LG_ERROR_FILE,
            Error::Gpu(gpu) => match gpu {
                GpuError::NoDriver(_)
                | GpuError::DriverTooOld { .. }
                | GpuError::NoDevice
                | GpuError::NoSuchDevice { .. }
                | GpuError::WrongDevice { .. }
                | GpuError::MissingFunction { .. } => LG_ERROR_NO_GPU,
                GpuError::Cuda { status, .. } if status.0 == CUDA_OUT_OF_MEMORY => LG_ERROR_OUT_OF_MEMORY,
                GpuError::Cuda { .. } => LG_ERROR_DRIVER,
                GpuError::DamagedKernel { .. } => LG_ERROR_INTERNAL,
                _ => LG_ERROR_INVALID_ARGUMENT,
            },
            _ => LG_ERROR_INVALID_ARGUMENT,
        };
        Self { status, message: error.to_string() }
    }
}

thread_local! {
    /// The message of this thread's last error.
    static MESSAGE: RefCell<CString> = RefCell::default();
}

/// Runs the body of a function. Errors and panics become a status with a message.
pub(crate) fn guard(body: impl FnOnce() -> Result<(), Failure>) -> lg_status {
    let failure = match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => return LG_OK,
        Ok(Err(failure)) => failure,
        Err(panic) => {
            let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
            let text = text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
            Failure { status: LG_ERROR_INTERNAL, message: format!("a defect of liquidgemm: {text}") }
        }
    };
    // No message has a zero byte; if one had, it would end there.
    let message = failure.message.split('\0').next().unwrap_or_default();
    MESSAGE.with_borrow_mut(|last| *last = CString::new(message).unwrap_or_default());
    failure.status
}

/// Returns the message of the last call that failed on this thread, in UTF-8, or an empty text.
///
/// Calls that succeed leave it as it is. It is valid until the next call of this thread that fails.
#[unsafe(no_mangle)]
pub extern "C" fn lg_last_error_message() -> *const c_char {
    MESSAGE.with_borrow(|message| message.as_ptr())
}

#[cfg(test)]
mod tests {
    use std::ffi::CStr;
    use std::thread;

    use super::*;

    fn last() -> String {
        // SAFETY: the message is a text that lives until the next failure of this thread.
        unsafe { CStr::from_ptr(lg_last_error_message()) }.to_str().unwrap().to_owned()
    }

    #[test]
    fn a_panic_becomes_a_status_with_its_message() {
        assert_eq!(guard(|| panic!("one {}", 2)), LG_ERROR_INTERNAL);
        assert_eq!(last(), "a defect of liquidgemm: one 2");
    }

    #[test]
    fn each_thread_has_its_own_message_and_success_leaves_it() {
        assert_eq!(guard(|| Err(Failure::argument("here"))), LG_ERROR_INVALID_ARGUMENT);
        thread::spawn(|| {
            assert_eq!(last(), "");
            assert_eq!(guard(|| Err(Failure::argument("there"))), LG_ERROR_INVALID_ARGUMENT);
            assert_eq!(last(), "there");
        })
        .join()
        .unwrap();
        assert_eq!(guard(|| Ok(())), LG_OK);
        assert_eq!(last(), "here");
    }
}
