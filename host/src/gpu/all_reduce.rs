//! What row-parallel layers ask of a communication library: reductions over the buffers of all GPUs.

use crate::Error;
use crate::gpu::{DeviceSpan, StreamHandle};

/// A reduction of the elements at the same place in the buffers of all ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reduction {
    /// The largest int32.
    MaxI32,
    /// The sum of int32, which wraps.
    SumI32,
    /// The sum of bf16, rounded in any way.
    SumBf16,
    /// The sum of f16, rounded in any way.
    SumF16,
}

impl Reduction {
    /// Returns the bytes of an element.
    pub const fn element_bytes(self) -> usize {
        match self {
            Reduction::MaxI32 | Reduction::SumI32 => 4,
            Reduction::SumBf16 | Reduction::SumF16 => 2,
        }
    }
}

/// A rank's handle to the communication among GPUs, for [`RowParallelCall`](super::RowParallelCall).
///
/// `Communicator` implements it with NCCL (feature `nccl`).
/// A server with reductions of its own can implement it instead.
pub trait AllReduce {
    /// Returns the number of this rank, from 0.
    fn rank(&self) -> usize;

    /// Reduces `buffer` over all ranks, in place, on `stream`, and returns at once.
    ///
    /// Afterwards the buffers of all ranks hold the same bits.
    /// Every rank calls it with the same reduction and the same number of bytes, in the same order.
    /// Inside of a group the call may only note the reduction.
    /// The context of the GPU is current on this thread.
    ///
    /// # Errors
    /// Those of the communication library. An implementation outside of this crate returns
    /// [`GpuError::AllReduce`](super::GpuError::AllReduce).
    ///
    /// # Safety
    /// Until the reduction has finished on `stream`, the buffer stays allocated, and nothing else uses it.
    /// It holds whole elements. Buffer and stream belong to the GPU of this rank.
    unsafe fn all_reduce(
        &self,
        reduction: Reduction,
        buffer: DeviceSpan,
        stream: StreamHandle,
    ) -> Result<(), Error>;

    /// Begins a group: reductions that one thread calls for several ranks before [`end_group`](Self::end_group).
    ///
    /// # Errors
    /// Those of the communication library.
    fn begin_group(&self) -> Result<(), Error>;

    /// Ends the group, and enqueues its reductions.
    ///
    /// # Errors
    /// Those of the communication library.
    fn end_group(&self) -> Result<(), Error>;
}
