//! The epilogue of 32-bit results, which threads store straight from registers.
//!
//! It relies on [`Scaling`] for the scaled results.

use super::Scaling;
use crate::ptx::memory::store_global;
use crate::ptx::wgmma::FragmentVisitor;
use crate::shape::Shape;

/// Visitor that stores 32-bit results: f32, or the int32 sums themselves.
///
/// One visitor for both types takes less code, at the cost of an instruction per result.
pub(super) struct Direct<'a, 'b, S> {
    pub(super) scaling: Scaling<'a, 'b, S, true>,
    /// The thread's index in its warpgroup.
    pub(super) thread: u32,
    pub(super) is_scaled: bool,
}

impl<S: Shape> FragmentVisitor for Direct<'_, '_, S> {
    #[inline(always)]
    fn fragment(&mut self, j: u32, sums: &mut [i32; 4]) {
        let epilogue = self.scaling.epilogue;
        if !self.scaling.writes(j) {
            return;
        }
        let lane = self.thread % 32;
        let token = epilogue.first_token + 8 * j + lane % 4 * 2;
        let channel = epilogue.first_channel + self.thread / 32 * 16 + lane / 4;
        let [a, b, c, d] = self.scaling.scaled(j, sums);
        let value = |scaled: f32, sum: i32| if self.is_scaled { scaled.to_bits() } else { sum as u32 };
        let values = [value(a, sums[0]), value(b, sums[1]), value(c, sums[2]), value(d, sums[3])];
        let store = |token: u32, channel: u32, value: u32| {
            if token < epilogue.arguments.m && channel < epilogue.arguments.n {
                // SAFETY: the element is inside the output.
                unsafe { store_global(epilogue.output(token, channel, 4), value) };
            }
        };
        store(token, channel, values[0]);
        store(token + 1, channel, values[1]);
        store(token, channel + 8, values[2]);
        store(token + 1, channel + 8, values[3]);
    }
}
