//! The ring of shared-memory pipeline stages that a producer fills and consumers drain.
//!
//! Each stage has a full and an empty barrier. The phase of a barrier flips once per turn of the ring.
//! Producer and consumers go through the same sequence of (stage, phase), each with its own [`RingCursor`].
//! The barriers themselves are in `kernels-gpu/src/block.rs`.

/// A position in a ring of `STAGES` stages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingCursor<const STAGES: u32> {
    stage: u32,
    phase: u32,
}

impl<const STAGES: u32> RingCursor<STAGES> {
    /// Returns the start of the ring: stage 0, phase 0.
    #[inline(always)]
    #[must_use]
    pub const fn start() -> Self {
        Self { stage: 0, phase: 0 }
    }

    /// Returns the stage to fill or drain next.
    #[inline(always)]
    #[must_use]
    pub const fn stage(self) -> u32 {
        self.stage
    }

    /// Returns the parity that a consumer waits for on the stage's full barrier.
    #[inline(always)]
    #[must_use]
    pub const fn full_parity(self) -> u32 {
        self.phase
    }

    /// Returns the parity that the producer waits for on the stage's empty barrier.
    ///
    /// A new barrier reports the phase *before* its first as complete.
    /// Therefore the producer never waits in the first turn.
    #[inline(always)]
    #[must_use]
    pub const fn empty_parity(self) -> u32 {
        self.phase ^ 1
    }

    /// Returns the cursor of the next stage.
    #[inline(always)]
    #[must_use]
    pub const fn next(self) -> Self {
        if self.stage + 1 == STAGES {
            Self { stage: 0, phase: self.phase ^ 1 }
        } else {
            Self { stage: self.stage + 1, phase: self.phase }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phase_flips_exactly_once_a_turn() {
        let mut cursor = RingCursor::<5>::start();
        for iteration in 0..100 {
            assert_eq!(cursor.stage(), iteration % 5);
            assert_eq!(cursor.full_parity(), (iteration / 5) % 2);
            assert_eq!(cursor.empty_parity(), 1 - cursor.full_parity());
            cursor = cursor.next();
        }
    }

    #[test]
    fn one_stage_is_a_ring_too() {
        let cursor = RingCursor::<1>::start();
        assert_eq!((cursor.next().stage(), cursor.next().full_parity()), (0, 1));
        assert_eq!(cursor.next().next(), cursor);
    }
}
