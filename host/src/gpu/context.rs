//! The context that everything on a device lives in, and which context is a thread's current one.

use std::marker::PhantomData;
use std::ptr;
use std::sync::Arc;

use cust::sys::{self, CUcontext, CUdevice};

use crate::gpu::error::{During, GpuError};

/// A driver context, shared by all that lives in it: a primary context stays for as long as one of its handles.
#[derive(Clone, Debug)]
pub(crate) struct ContextHandle(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    context: CUcontext,
    /// The device whose primary context it is, retained once; `None` for a context that the caller keeps alive.
    primary_of: Option<CUdevice>,
}

// SAFETY: the driver lets any thread use a context.
unsafe impl Send for Inner {}
// SAFETY: as above; nothing here changes.
unsafe impl Sync for Inner {}

impl ContextHandle {
    /// A device's primary context, which the CUDA runtime and other frameworks share.
    pub(crate) fn primary(device: CUdevice) -> Result<Self, GpuError> {
        let mut context = ptr::null_mut();
        // SAFETY: the first argument is valid for a write.
        unsafe { sys::cuDevicePrimaryCtxRetain(&mut context, device) }
            .during("retaining the GPU's primary context")?;
        Ok(Self(Arc::new(Inner { context, primary_of: Some(device) })))
    }

    /// A context that someone else made.
    ///
    /// # Safety
    /// It outlives the handle and its clones.
    pub(crate) unsafe fn foreign(context: CUcontext) -> Self {
        Self(Arc::new(Inner { context, primary_of: None }))
    }

    /// The current context of this thread, null for none.
    pub(crate) fn current() -> Result<CUcontext, GpuError> {
        let mut context = ptr::null_mut();
        // SAFETY: the argument is valid for a write.
        unsafe { sys::cuCtxGetCurrent(&mut context) }.during("asking for the current context")?;
        Ok(context)
    }

    /// Makes the context current on this thread for as long as the result lives; then what was current before is so again.
    pub(crate) fn enter(&self) -> Result<Entered, GpuError> {
        self.enter_from(Self::current()?)
    }

    /// As [`enter`](Self::enter), for freeing, which is worth losing what was current before.
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

    /// Whether both are the same context.
    pub(crate) fn is(&self, other: &Self) -> bool {
        self.0.context == other.0.context
    }

    /// The driver's handle.
    pub(crate) fn as_raw(&self) -> CUcontext {
        self.0.context
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let Some(device) = self.primary_of else { return };
        let mut current = ptr::null_mut();
        let (mut flags, mut is_active) = (0, 1);
        // Failures can't be helped here.
        // SAFETY: the context was retained once; the arguments are valid for writes; null is no context.
        unsafe {
            let _ = sys::cuDevicePrimaryCtxRelease_v2(device);
            // The last release destroys it. A thread must not be left with a dead context.
            let _ = sys::cuDevicePrimaryCtxGetState(device, &mut flags, &mut is_active);
            let _ = sys::cuCtxGetCurrent(&mut current);
            if is_active == 0 && current == self.context {
                let _ = sys::cuCtxSetCurrent(ptr::null_mut());
            }
        }
    }
}

/// A thread inside of a context.
#[must_use = "the context is current only as long as this lives"]
#[derive(Debug)]
pub(crate) struct Entered {
    /// What to make current again; `None` if that is the context itself.
    previous: Option<CUcontext>,
    /// What is current belongs to a thread.
    not_send: PhantomData<*mut ()>,
}

impl Drop for Entered {
    fn drop(&mut self) {
        if let Some(previous) = self.previous {
            // A failure can't be helped here.
            // SAFETY: it was current before, or is null.
            let _ = unsafe { sys::cuCtxSetCurrent(previous) };
        }
    }
}
