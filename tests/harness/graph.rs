//! CUDA graphs, which `cust` has no safe calls for.

use std::ptr;

use cust::stream::Stream;
use cust::sys::{self, CUgraph, CUgraphExec, CUresult, CUstreamCaptureMode_enum};
use libtest_mimic::Failed;

/// Turns a driver's status into a result.
///
/// # Errors
/// Any status but success.
pub fn driver(call: &str, status: CUresult) -> Result<(), Failed> {
    if status == CUresult::CUDA_SUCCESS { Ok(()) } else { Err(format!("{call}: {status:?}").into()) }
}

/// A captured graph, ready to be replayed.
pub struct Graph(CUgraphExec);

impl Graph {
    /// Captures what `enqueue` puts on the stream. Nothing of it runs yet.
    ///
    /// The driver refuses allocations by this thread meanwhile, and whatever would wait.
    ///
    /// # Errors
    /// Those of `enqueue` and of the driver.
    pub fn capture(stream: &Stream, enqueue: impl FnOnce() -> Result<(), Failed>) -> Result<Self, Failed> {
        let mode = CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        let mut graph: CUgraph = ptr::null_mut();
        let mut executable: CUgraphExec = ptr::null_mut();
        // SAFETY: the stream is alive, the pointers are valid for writes, and the graph came from the capture.
        unsafe {
            driver("cuStreamBeginCapture", sys::cuStreamBeginCapture_v2(stream.as_inner(), mode))?;
            let enqueued = enqueue();
            // Ended also after a failure, or the stream could not be used again.
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
    /// What was captured must still be sound: all memory in it is alive.
    ///
    /// # Errors
    /// Those of the driver.
    pub unsafe fn replay(&self, stream: &Stream) -> Result<(), Failed> {
        // SAFETY: both are alive; the caller vouches for the rest.
        driver("cuGraphLaunch", unsafe { sys::cuGraphLaunch(self.0, stream.as_inner()) })?;
        Ok(stream.synchronize()?)
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: nothing else destroys it.
        unsafe { sys::cuGraphExecDestroy(self.0) };
    }
}
