//! `griddepcontrol`: how a launch overlaps the one before it and the one after.

use core::arch::asm;

/// Waits until the launch before this one on the stream has finished and its writes are visible.
///
/// Returns at once where the launch did not ask to overlap.
#[inline(always)]
pub fn await_previous() {
    // SAFETY: a barrier.
    unsafe { asm!("griddepcontrol.wait;", options(nostack)) }
}

/// Lets the next launch on the stream begin, once every block has called this or ended.
#[inline(always)]
pub fn admit_next() {
    // SAFETY: a hint; what the next launch may touch before this one has ended is for that launch to know.
    unsafe { asm!("griddepcontrol.launch_dependents;", options(nostack)) }
}
