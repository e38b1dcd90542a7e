//! `griddepcontrol`: programmatic dependent launch (PDL), the overlap of consecutive launches on a stream.
//!
//! The launch attribute that enables it is set in `host/src/gpu/launch.rs`.

use core::arch::asm;

/// Waits until the preceding launch on the stream has finished and its writes are visible.
///
/// Returns at once if this launch did not ask to overlap.
#[inline(always)]
pub fn wait_for_dependency() {
    // SAFETY: the instruction only waits.
    unsafe { asm!("griddepcontrol.wait;", options(nostack)) }
}

/// Launches dependents.
///
/// The next launch on the stream may begin once every thread block has called this or ended.
#[inline(always)]
pub fn launch_dependents() {
    // SAFETY: a hint; the next launch is responsible for what it accesses before this one has ended.
    unsafe { asm!("griddepcontrol.launch_dependents;", options(nostack)) }
}
