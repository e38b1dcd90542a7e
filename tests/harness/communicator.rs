//! A communicator for tests: it adds on the host what ranks on any GPUs have, also on one.
//!
//! Ranks are on one thread, which calls in groups, or each on a thread of its own.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytemuck::{AnyBitPattern, NoUninit};
use cust::sys;
use half::{bf16, f16};
use liquidgemm::Error;
use liquidgemm::gpu::{AllReduce, DeviceSpan, GpuError, Reduction, StreamHandle};

/// How long a rank waits for the others. Without them the test fails.
const PATIENCE: Duration = Duration::from_secs(120);

/// A rank's handle.
pub struct HostCommunicator {
    rank: usize,
    world: Arc<World>,
}

struct World {
    size: usize,
    state: Mutex<State>,
    finished: Condvar,
}

#[derive(Default)]
struct State {
    waiting: Vec<Part>,
    is_grouped: bool,
    /// Reductions so far.
    count: usize,
    /// The outcome of the last reduction.
    failure: Option<String>,
}

/// What a rank gives to a reduction.
#[derive(Clone, Copy)]
struct Part {
    rank: usize,
    reduction: Reduction,
    buffer: DeviceSpan,
    stream: StreamHandle,
}

// SAFETY: addresses and stream handles may be used on any thread.
unsafe impl Send for Part {}

impl HostCommunicator {
    /// Makes the handles of all ranks.
    #[must_use]
    pub fn world(size: usize) -> Vec<Self> {
        let world = Arc::new(World { size, state: Mutex::new(State::default()), finished: Condvar::new() });
        (0..size).map(|rank| Self { rank, world: world.clone() }).collect()
    }

    /// Returns the number of reductions so far.
    #[must_use]
    pub fn reductions(&self) -> usize {
        self.state().count
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.world.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reduces what all ranks have given, and tells them.
    fn finish(&self, state: &mut State) -> Result<(), Error> {
        let mut parts = std::mem::take(&mut state.waiting);
        parts.sort_by_key(|part| part.rank);
        let outcome = if parts.len() == self.world.size {
            reduce(&parts)
        } else {
            Err(format!("{} of {} ranks have called", parts.len(), self.world.size))
        };
        state.count += 1;
        state.failure = outcome.err();
        self.world.finished.notify_all();
        outcome_of(state)
    }
}

fn outcome_of(state: &State) -> Result<(), Error> {
    match &state.failure {
        None => Ok(()),
        Some(reason) => Err(GpuError::AllReduce { reason: reason.clone() }.into()),
    }
}

impl AllReduce for HostCommunicator {
    fn rank(&self) -> usize {
        self.rank
    }

    unsafe fn all_reduce(
        &self,
        reduction: Reduction,
        buffer: DeviceSpan,
        stream: StreamHandle,
    ) -> Result<(), Error> {
        let mut state = self.state();
        state.waiting.push(Part { rank: self.rank, reduction, buffer, stream });
        if state.is_grouped {
            return Ok(());
        }
        if state.waiting.len() == self.world.size {
            return self.finish(&mut state);
        }
        let before = state.count;
        let (state, waited) = self
            .world
            .finished
            .wait_timeout_while(state, PATIENCE, |state| state.count == before)
            .unwrap_or_else(PoisonError::into_inner);
        if waited.timed_out() {
            return Err(GpuError::AllReduce { reason: "the other ranks do not call".into() }.into());
        }
        outcome_of(&state)
    }

    fn begin_group(&self) -> Result<(), Error> {
        self.state().is_grouped = true;
        Ok(())
    }

    fn end_group(&self) -> Result<(), Error> {
        let mut state = self.state();
        state.is_grouped = false;
        self.finish(&mut state)
    }
}

/// Reduces the parts on the host and copies the result to all of them.
fn reduce(parts: &[Part]) -> Result<(), String> {
    let first = parts[0];
    let differs =
        |part: &Part| part.reduction != first.reduction || part.buffer.bytes() != first.buffer.bytes();
    if parts.iter().any(differs) {
        return Err("the ranks call different reductions".into());
    }
    match first.reduction {
        Reduction::MaxI32 => {
            reduce_as::<i32>(parts, |values| values.iter().copied().max().unwrap_or_default())
        }
        Reduction::SumI32 => reduce_as::<i32>(parts, |values| {
            values.iter().fold(0, |sum: i32, &value| sum.wrapping_add(value))
        }),
        Reduction::SumBf16 => reduce_as::<bf16>(parts, |values| {
            bf16::from_f32(values.iter().fold(0.0, |sum, value| sum + value.to_f32()))
        }),
        Reduction::SumF16 => reduce_as::<f16>(parts, |values| {
            f16::from_f32(values.iter().fold(0.0, |sum, value| sum + value.to_f32()))
        }),
    }
}

fn reduce_as<T: NoUninit + AnyBitPattern + Default>(
    parts: &[Part],
    of: impl Fn(&[T]) -> T,
) -> Result<(), String> {
    let status = |call: &str, status: sys::CUresult| match status {
        sys::CUresult::CUDA_SUCCESS => Ok(()),
        other => Err(format!("{call}: {other:?}")),
    };
    let bytes = parts[0].buffer.bytes();
    let mut buffers = Vec::new();
    for part in parts {
        let mut values = vec![T::default(); bytes / size_of::<T>()];
        // SAFETY: the caller of `all_reduce` vouches for buffer and stream; the vector has so many bytes.
        unsafe {
            status("cuStreamSynchronize", sys::cuStreamSynchronize(part.stream.as_raw().cast()))?;
            let to = values.as_mut_ptr().cast();
            status("cuMemcpyDtoH", sys::cuMemcpyDtoH_v2(to, part.buffer.address(), bytes))?;
        }
        buffers.push(values);
    }
    let results: Vec<T> = (0..bytes / size_of::<T>())
        .map(|index| of(&buffers.iter().map(|values| values[index]).collect::<Vec<_>>()))
        .collect();
    for part in parts {
        // SAFETY: as above. Null is the default stream, which always exists.
        unsafe {
            let from = results.as_ptr().cast();
            status("cuMemcpyHtoD", sys::cuMemcpyHtoD_v2(part.buffer.address(), from, bytes))?;
            status("cuStreamSynchronize", sys::cuStreamSynchronize(std::ptr::null_mut()))?;
        }
    }
    Ok(())
}
