//! CUDA graphs: capturing a stream's work and replaying it.
//!
//! Calls the driver through `cust::sys`, because `cust` has no safe graph calls.

use std::ptr;

use cust::stream::Stream;
use cust::sys::{self, CUgraph, CUgraphExec, CUresult, CUstreamCaptureMode_enum};
use libtest_mimic::Failed;

/// Converts a driver's status into a result.
///
/// # Errors
/// Returns one for every status except success.
pub fn driver(call: &str, status: CUresult) -> Result<(), Failed> {
    if status == CUresult::CUDA_SUCCESS { Ok(()) } else { Err(format!("{call}: {status:?}").into()) }
}

/// A captured and instantiated graph.
pub struct Graph(CUgraphExec);

impl Graph {
    /// Captures the work that `enqueue` puts on the stream, without running it.
    ///
    /// During the capture, the driver refuses allocations and waits on this thread.
    ///
    /// # Errors
    /// Those of `enqueue` and of the driver.
    pub fn capture(stream: &Stream, enqueue: impl FnOnce() -> Result<(), Failed>) -> Result<Self, Failed> {
        let mode = CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        let mut graph: CUgraph = ptr::null_mut();
        let mut executable: CUgraphExec = ptr::null_mut();
        // SAFETY: the stream is alive, the pointers are valid for writes,
        // and the graph comes from the capture.
        unsafe {
            driver("cuStreamBeginCapture", sys::cuStreamBeginCapture_v2(stream.as_inner(), mode))?;
            let enqueued = enqueue();
            // End the capture even if `enqueue` failed; otherwise the stream stays unusable.
            let ended = sys::cuStreamEndCapture(stream.as_inner(), &mut graph);
            enqueued?;
            driver("cuStreamEndCapture", ended)?;
            let instantiated = sys::cuGraphInstantiateWithFlags(&mut executable, graph, 0);
            driver("cuGraphDestroy", sys::cuGraphDestroy(graph))?;
            driver("cuGraphInstantiate", instantiated)?;
        }
        Ok(Self(executable))
    }

    /// Replays the graph on a stream and waits for it.
    ///
    /// # Safety
    /// All memory that the captured work uses must still be alive.
    ///
    /// # Errors
    /// Those of the driver.
    pub unsafe fn replay(&self, stream: &Stream) -> Result<(), Failed> {
        // SAFETY: graph and stream are alive; the caller guarantees the rest.
        driver("cuGraphLaunch", unsafe { sys::cuGraphLaunch(self.0, stream.as_inner()) })?;
        Ok(stream.synchronize()?)
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: this value owns the graph, so nothing else destroys it.
        unsafe { sys::cuGraphExecDestroy(self.0) };
    }
}
