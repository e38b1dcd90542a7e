//! The context of everything on a device, and switching a thread's current context.
//! Driver calls that allocate, copy or free enter the context first and restore the caller's afterwards.

use std::marker::PhantomData;
use std::ptr;
use std::sync::Arc;

use cust::sys::{self, CUcontext, CUdevice};

use crate::error::gpu::{During, GpuError};

/// A driver context, shared by everything in it. A primary context stays alive as long as one of its handles.
#[derive(Clone, Debug)]
pub(crate) struct ContextHandle(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    context: CUcontext,
    /// The device of a primary context, which is retained once.
    /// `None` for a context that the caller keeps alive.
    primary_of: Option<CUdevice>,
}

// SAFETY: any thread may use a driver context.
unsafe impl Send for Inner {}
// SAFETY: as above; the fields never change.
unsafe impl Sync for Inner {}

impl ContextHandle {
    /// Retains a device's primary context, which the CUDA runtime and other frameworks share.
    pub(crate) fn primary(device: CUdevice) -> Result<Self, GpuError> {
        let mut context = ptr::null_mut();
        // SAFETY: the first argument is valid for a write.
        unsafe { sys::cuDevicePrimaryCtxRetain(&mut context, device) }
            .during("retaining the GPU's primary context")?;
        Ok(Self(Arc::new(Inner { context, primary_of: Some(device) })))
    }

    /// Wraps a context that someone else created.
    ///
    /// # Safety
    /// The context outlives the handle and its clones.
    pub(crate) unsafe fn foreign(context: CUcontext) -> Self {
        Self(Arc::new(Inner { context, primary_of: None }))
    }

    /// Returns this thread's current context, or null.
    pub(crate) fn current() -> Result<CUcontext, GpuError> {
        let mut context = ptr::null_mut();
        // SAFETY: the argument is valid for a write.
        unsafe { sys::cuCtxGetCurrent(&mut context) }.during("asking for the current context")?;
        Ok(context)
    }

    /// Makes the context current on this thread. Dropping the result restores the previous one.
    pub(crate) fn enter(&self) -> Result<Entered, GpuError> {
        self.enter_from(Self::current()?)
    }

    /// Like [`enter`](Self::enter), but continues if the driver does not tell the previous context.
    ///
    /// Freeing memory matters more than restoring that context.
    pub(crate) fn enter_to_free(&self) -> Result<Entered, GpuError> {
        self.enter_from(Self::current().unwrap_or(ptr::null_mut()))
    }

    fn enter_from(&self, previous: CUcontext) -> Result<Entered, GpuError> {
        if previous == self.0.context {
            return Ok(Entered { previous: None, not_send: PhantomData });
        }
        self.make_current()?;
        Ok(Entered { previous: Some(previous), not_send: PhantomData })
    }

    /// Makes the context current on this thread.
    pub(crate) fn make_current(&self) -> Result<(), GpuError> {
        // SAFETY: the context lives as long as this handle.
        unsafe { sys::cuCtxSetCurrent(self.0.context) }.during("making the GPU's context current")
    }

    /// Returns whether both are the same context.
    pub(crate) fn is(&self, other: &Self) -> bool {
        self.0.context == other.0.context
    }

    /// Returns the driver's handle.
    pub(crate) fn as_raw(&self) -> CUcontext {
        self.0.context
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let Some(device) = self.primary_of else { return };
        let mut current = ptr::null_mut();
        let (mut flags, mut is_active) = (0, 1);
        // Errors cannot be handled here.
        // SAFETY: the context was retained once; the arguments are valid for writes; null means no context.
        unsafe {
            let _ = sys::cuDevicePrimaryCtxRelease_v2(device);
            // The last release destroys the context, so it must not stay current on this thread.
            let _ = sys::cuDevicePrimaryCtxGetState(device, &mut flags, &mut is_active);
            let _ = sys::cuCtxGetCurrent(&mut current);
            if is_active == 0 && current == self.context {
                let _ = sys::cuCtxSetCurrent(ptr::null_mut());
            }
        }
    }
}

/// A thread whose current context was changed.
#[must_use = "the context is current only as long as this lives"]
#[derive(Debug)]
pub(crate) struct Entered {
    /// The context to restore. `None` if the current one did not change.
    previous: Option<CUcontext>,
    /// Not `Send`, because the current context belongs to a thread.
    not_send: PhantomData<*mut ()>,
}

impl Drop for Entered {
    fn drop(&mut self) {
        if let Some(previous) = self.previous {
            // An error cannot be handled here.
            // SAFETY: the context was current before, or is null.
            let _ = unsafe { sys::cuCtxSetCurrent(previous) };
        }
    }
}
