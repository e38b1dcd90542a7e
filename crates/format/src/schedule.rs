//! Which worker computes which part of which output tile.
//!
//! The output is cut into tiles, each tile's K extent into steps of one pipeline stage. Whole tiles go round
//! robin to the workers (thread blocks); the last `streamed_tiles` are instead laid end to end as one stream of
//! steps that the workers share evenly, so that every worker is busy to the end however few tiles there are
//! (Osama et al., *Stream-K*, PPoPP 2023). A tile that the cut divides has one **owner**, the worker with its
//! last steps; the workers with earlier steps are its **contributors**. Sums are integers: any cut gives the
//! same bits.
//!
//! Whole tiles come first, while all workers are at the same place at the same time and share what the L2 cache holds.
//! A worker goes through its share of the stream backwards. Thus what it contributes to another worker's tile
//! comes first and what it waits for comes last, and it only ever waits for workers of lower index, which the
//! hardware has started before it: there is no cycle, whatever number of workers runs at once.

use crate::divisor::Divisor;

/// The most workers of a schedule, more than any GPU has room for.
pub const MAX_WORKERS: u32 = u16::MAX as u32;

/// The cut of one GEMM, the same on host and device.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// Tiles along the output channels.
    pub channel_tiles: u32,
    /// Tiles along the tokens.
    pub token_tiles: u32,
    /// Pipeline steps along K in each tile; at least 1. Of one block's part, where blocks share a tile's K.
    pub k_steps: u32,
    /// Workers that share the tiles; at least 1, at most [`MAX_WORKERS`].
    pub workers: u32,
    /// How many tiles, the last ones, are shared out step by step.
    pub streamed_tiles: u32,
    /// Steps of the stream that every worker has.
    pub stream_share: u32,
    /// Workers that have one step more. They are spread evenly, so that where a tile has a whole number of workers, no worker
    /// begins in one tile and ends in the next. Where the others have none they are the first ones: an owner waits for all workers
    /// between its tile's first and itself.
    pub stream_longer: u32,
    /// How many of them there are for each worker, on the average, times 2¹⁶ and rounded up; 2¹⁶ where the others have none.
    stream_slope: u32,
    /// Channel tiles that are walked together before the next such group: within one group all token tiles
    /// are visited, so that its weights and the activations stay in the L2 cache. At least 1.
    pub channel_group: u32,
    /// Divides by `k_steps`.
    by_k_steps: Divisor,
    /// Divides by the tiles of a group.
    by_group_tiles: Divisor,
    /// Divides by `channel_group`.
    by_group_width: Divisor,
    /// Divides by the channel tiles of the last group, if it has fewer.
    by_last_width: Divisor,
}

/// A run of K steps of one tile, done by one worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The tile's index, below [`Schedule::tiles`].
    pub tile: u32,
    /// The first step.
    pub k_begin: u32,
    /// One past the last step.
    pub k_end: u32,
}

/// Where a tile lies in the output, in tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TilePosition {
    /// Along the output channels.
    pub channel_tile: u32,
    /// Along the tokens.
    pub token_tile: u32,
}

impl Schedule {
    /// A schedule of `channel_tiles` × `token_tiles` tiles of `k_steps` steps each, the last `streamed_tiles` of
    /// them shared out step by step. Zeros are taken for ones, and too many streamed tiles or workers for as many as there can
    /// be.
    #[must_use]
    pub const fn new(
        [channel_tiles, token_tiles, k_steps]: [u32; 3],
        workers: u32,
        streamed_tiles: u32,
        channel_group: u32,
    ) -> Self {
        const fn positive(value: u32) -> u32 {
            if value == 0 { 1 } else { value }
        }
        let (channel_tiles, token_tiles) = (positive(channel_tiles), positive(token_tiles));
        let (k_steps, workers) = (positive(k_steps), positive(workers));
        let tiles = channel_tiles.saturating_mul(token_tiles);
        let workers = if workers > MAX_WORKERS { MAX_WORKERS } else { workers };
        let streamed_tiles = if streamed_tiles > tiles { tiles } else { streamed_tiles };
        let stream = streamed_tiles.saturating_mul(k_steps);
        let channel_group = positive(channel_group);
        Self {
            channel_tiles,
            token_tiles,
            k_steps,
            workers,
            streamed_tiles,
            stream_share: stream / workers,
            stream_longer: stream % workers,
            stream_slope: if stream < workers {
                1 << 16
            } else {
                ((stream % workers) << 16).div_ceil(workers)
            },
            channel_group,
            by_k_steps: Divisor::new(k_steps),
            by_group_tiles: Divisor::new(channel_group.saturating_mul(token_tiles)),
            by_group_width: Divisor::new(channel_group),
            by_last_width: Divisor::new(channel_tiles % channel_group),
        }
    }

    /// The number of output tiles.
    #[inline(always)]
    #[must_use]
    pub const fn tiles(&self) -> u32 {
        self.channel_tiles.wrapping_mul(self.token_tiles)
    }

    /// The tiles that are not streamed: they come first.
    #[inline(always)]
    #[must_use]
    pub const fn whole_tiles(&self) -> u32 {
        self.tiles().wrapping_sub(self.streamed_tiles)
    }

    /// The first step of the stream that belongs to `worker`. For `worker == workers`, the stream's length.
    #[inline(always)]
    #[must_use]
    pub const fn stream_begin(&self, worker: u32) -> u32 {
        // Rounding up adds less than one, as there are fewer than 2¹⁶ workers; so what is whole stays so.
        let spread = worker.wrapping_mul(self.stream_slope) >> 16;
        let extra = if spread < self.stream_longer { spread } else { self.stream_longer };
        worker.wrapping_mul(self.stream_share).wrapping_add(extra)
    }

    /// The segments of `worker`, in the order in which it must compute them.
    #[inline(always)]
    #[must_use]
    pub const fn segments(&self, worker: u32) -> Segments {
        Segments {
            schedule: *self,
            stream_begin: self.stream_begin(worker),
            stream_cursor: self.stream_begin(worker.wrapping_add(1)),
            next_whole_tile: worker,
        }
    }

    /// Whether `segment` ends its tile, so that its worker writes the tile's result.
    #[inline(always)]
    #[must_use]
    pub const fn owns(&self, segment: Segment) -> bool {
        segment.k_end == self.k_steps
    }

    /// The lowest worker that contributes to the tile of an owner's `segment`. The contributors are this one
    /// up to, not including, the owner; none where the segment is the whole tile.
    #[inline(always)]
    #[must_use]
    pub const fn first_contributor(&self, owner: u32, segment: Segment) -> u32 {
        if segment.k_begin == 0 {
            return owner;
        }
        let tile_begin = segment.tile.wrapping_sub(self.whole_tiles()).wrapping_mul(self.k_steps);
        let mut first = owner;
        while first > 0 && self.stream_begin(first) > tile_begin {
            first -= 1;
        }
        first
    }

    /// Where a tile lies.
    #[inline(always)]
    #[must_use]
    pub const fn position(&self, tile: u32) -> TilePosition {
        let group = self.by_group_tiles.quotient(tile);
        let first_channel_tile = group.wrapping_mul(self.channel_group);
        let within = tile.wrapping_sub(group.wrapping_mul(self.by_group_tiles.divisor()));
        let remaining = self.channel_tiles.wrapping_sub(first_channel_tile);
        let by_width = if remaining < self.channel_group { self.by_last_width } else { self.by_group_width };
        let width = by_width.divisor();
        let token_tile = by_width.quotient(within);
        let channel_tile =
            first_channel_tile.wrapping_add(within.wrapping_sub(token_tile.wrapping_mul(width)));
        TilePosition { channel_tile, token_tile }
    }
}

/// The segments of one worker: its whole tiles, then its share of the stream from the back to the front.
#[derive(Clone, Debug)]
pub struct Segments {
    schedule: Schedule,
    stream_begin: u32,
    stream_cursor: u32,
    next_whole_tile: u32,
}

impl Iterator for Segments {
    type Item = Segment;

    #[inline(always)]
    fn next(&mut self) -> Option<Segment> {
        let schedule = &self.schedule;
        if self.next_whole_tile < schedule.whole_tiles() {
            let tile = self.next_whole_tile;
            self.next_whole_tile = tile.wrapping_add(schedule.workers);
            Some(Segment { tile, k_begin: 0, k_end: schedule.k_steps })
        } else if self.stream_cursor > self.stream_begin {
            let streamed_tile = schedule.by_k_steps.quotient(self.stream_cursor - 1);
            let tile_begin = streamed_tile.wrapping_mul(schedule.k_steps);
            let first = if self.stream_begin > tile_begin { self.stream_begin } else { tile_begin };
            let segment = Segment {
                tile: schedule.whole_tiles().wrapping_add(streamed_tile),
                k_begin: first.wrapping_sub(tile_begin),
                k_end: self.stream_cursor.wrapping_sub(tile_begin),
            };
            self.stream_cursor = first;
            Some(segment)
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn schedules() -> impl Strategy<Value = Schedule> {
        (1..40u32, 1..12u32, 1..40u32, 1..150u32, 0..=100u32, 1..20u32).prop_map(
            |(channel_tiles, token_tiles, k_steps, workers, streamed_percent, channel_group)| {
                let streamed_tiles = channel_tiles * token_tiles * streamed_percent / 100;
                Schedule::new([channel_tiles, token_tiles, k_steps], workers, streamed_tiles, channel_group)
            },
        )
    }

    proptest! {
        #[test]
        fn every_step_of_every_tile_is_done_once(schedule in schedules()) {
            let mut done = vec![0u32; (schedule.tiles() * schedule.k_steps) as usize];
            for worker in 0..schedule.workers {
                for segment in schedule.segments(worker) {
                    prop_assert!(segment.k_begin < segment.k_end && segment.k_end <= schedule.k_steps);
                    for step in segment.k_begin..segment.k_end {
                        done[(segment.tile * schedule.k_steps + step) as usize] += 1;
                    }
                }
            }
            prop_assert!(done.iter().all(|&times| times == 1));
        }

        #[test]
        fn a_worker_contributes_at_most_once_and_before_it_waits(schedule in schedules()) {
            for worker in 0..schedule.workers {
                let mut waits = false;
                for segment in schedule.segments(worker) {
                    prop_assert!(schedule.owns(segment) || !waits);
                    waits |= !schedule.owns(segment) || segment.k_begin > 0;
                }
            }
        }

        #[test]
        fn an_owner_waits_for_exactly_the_workers_that_contribute(schedule in schedules()) {
            let mut expected: Vec<(u32, u32)> = Vec::new();
            let mut owners = vec![None; schedule.tiles() as usize];
            for worker in 0..schedule.workers {
                for segment in schedule.segments(worker) {
                    if schedule.owns(segment) {
                        prop_assert!(owners[segment.tile as usize].replace(worker).is_none());
                    } else {
                        expected.push((segment.tile, worker));
                    }
                }
            }
            let mut waited: Vec<(u32, u32)> = Vec::new();
            for worker in 0..schedule.workers {
                for segment in schedule.segments(worker).filter(|&segment| schedule.owns(segment)) {
                    for contributor in schedule.first_contributor(worker, segment)..worker {
                        waited.push((segment.tile, contributor));
                    }
                }
            }
            expected.sort_unstable();
            waited.sort_unstable();
            prop_assert_eq!(expected, waited);
        }

        #[test]
        fn streamed_shares_differ_by_one_step_at_most(schedule in schedules()) {
            let share = |worker| schedule.stream_begin(worker + 1) - schedule.stream_begin(worker);
            let shares: Vec<u32> = (0..schedule.workers).map(share).collect();
            prop_assert_eq!(shares.iter().sum::<u32>(), schedule.streamed_tiles * schedule.k_steps);
            prop_assert!(shares.iter().max().unwrap() - shares.iter().min().unwrap() <= 1);
        }

        #[test]
        fn tiles_with_a_whole_number_of_workers_share_none(
            tiles in 1..40u32,
            parts in 1..5u32,
            k_steps in 5..60u32,
        ) {
            let schedule = Schedule::new([tiles, 1, k_steps], tiles * parts, tiles, 1);
            for worker in 0..schedule.workers {
                let segments: Vec<_> = schedule.segments(worker).collect();
                prop_assert_eq!(segments.len(), 1);
                prop_assert_eq!(segments[0].tile, worker / parts);
            }
        }

        #[test]
        fn positions_cover_the_output_once(schedule in schedules()) {
            let mut seen = vec![false; schedule.tiles() as usize];
            for tile in 0..schedule.tiles() {
                let position = schedule.position(tile);
                prop_assert!(position.channel_tile < schedule.channel_tiles);
                prop_assert!(position.token_tile < schedule.token_tiles);
                let index = position.token_tile * schedule.channel_tiles + position.channel_tile;
                prop_assert!(!std::mem::replace(&mut seen[index as usize], true));
            }
        }
    }
}
