//! The schedule: which persistent cluster computes which part of which output tile.
//!
//! The host makes a [`Schedule`] for each plan (`host/src/plan/layout.rs`).
//! The kernels of `kernels-gpu/src/gemm` iterate over the [`Segments`] of their cluster.
//! A cluster may be a single thread block.
//!
//! The output is divided into tiles, and the K extent of each tile into k-iterations of one pipeline stage.
//! Whole tiles are assigned to the clusters round robin.
//! The last `stream_k_tiles` tiles are instead laid end to end as one stream of k-iterations.
//! The clusters share this stream evenly, so all of them are busy to the end even if tiles are few
//! (Osama et al., *Stream-K*, PPoPP 2023).
//!
//! A tile that several clusters share has one **owner**: the cluster with its last k-iterations.
//! The clusters with earlier k-iterations are the owner's **peers**.
//! Sums are integers, so every division of the work gives the same bits.
//!
//! Whole tiles come first.
//! All clusters are then at about the same place at the same time and share the contents of the L2 cache.
//!
//! A cluster goes through its share of the stream backwards.
//! It first computes its partial tile for another owner, and waits for its own peers last.
//! It only ever waits for clusters of lower index, which the hardware has started before it.
//! Therefore no cycle of waits can form, however many clusters run at a time.

use crate::divisor::Divisor;

/// The most clusters of a schedule, which is more than any GPU has room for.
pub const MAX_CLUSTERS: u32 = u16::MAX as u32;

/// The division of one GEMM among persistent clusters, the same on host and device.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// Tiles along the output channels.
    pub channel_tiles: u32,
    /// Tiles along the tokens.
    pub token_tiles: u32,
    /// K-iterations of each tile, at least 1.
    /// Under cluster split-K these are the k-iterations of one thread block's part.
    pub k_iterations: u32,
    /// Persistent clusters that share the tiles: at least 1, at most [`MAX_CLUSTERS`].
    pub clusters: u32,
    /// Number of tiles, the last ones, that are shared along K (stream-K).
    pub stream_k_tiles: u32,
    /// K-iterations of the stream that every cluster has (the base share).
    pub stream_share: u32,
    /// Number of clusters that have one k-iteration more than the base share.
    ///
    /// They are spread evenly among the others.
    /// If each tile has a whole number of clusters, then no cluster begins in one tile and ends in the next.
    /// If the base share is zero, the first clusters take the k-iterations instead,
    /// because an owner waits for all clusters between its tile's first one and itself.
    pub stream_longer: u32,
    /// `stream_longer` per cluster, times 2¹⁶ and rounded up.
    /// 2¹⁶ if the base share is zero.
    stream_slope: u32,
    /// Channel tiles of a group, at least 1.
    /// All token tiles of a group are visited before the next group,
    /// so that the group's weights and the activations stay in the L2 cache.
    pub channel_group: u32,
    /// Divides by `k_iterations`.
    by_k_iterations: Divisor,
    /// Divides by the number of tiles in a group.
    by_group_tiles: Divisor,
    /// Divides by `channel_group`.
    by_group_width: Divisor,
    /// Divides by the number of channel tiles in the last group, if it is smaller than the others.
    by_last_width: Divisor,
}

/// A range of k-iterations of one tile, computed by one cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The index of the tile, below [`Schedule::tiles`].
    pub tile: u32,
    /// The first k-iteration.
    pub k_begin: u32,
    /// One past the last k-iteration.
    pub k_end: u32,
}

/// The position of a tile in the output, in tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TilePosition {
    /// Position along the output channels.
    pub channel_tile: u32,
    /// Position along the tokens.
    pub token_tile: u32,
}

impl Schedule {
    /// Makes a schedule of `channel_tiles` × `token_tiles` tiles with `k_iterations` k-iterations each.
    /// The last `stream_k_tiles` of them are shared along K.
    ///
    /// Zeros are treated as ones.
    /// Too many stream-K tiles or clusters are reduced to the most possible.
    #[must_use]
    pub const fn new(
        [channel_tiles, token_tiles, k_iterations]: [u32; 3],
        clusters: u32,
        stream_k_tiles: u32,
        channel_group: u32,
    ) -> Self {
        const fn positive(value: u32) -> u32 {
            if value == 0 { 1 } else { value }
        }
        let (channel_tiles, token_tiles) = (positive(channel_tiles), positive(token_tiles));
        let (k_iterations, clusters) = (positive(k_iterations), positive(clusters));
        let tiles = channel_tiles.saturating_mul(token_tiles);
        let clusters = if clusters > MAX_CLUSTERS { MAX_CLUSTERS } else { clusters };
        let stream_k_tiles = if stream_k_tiles > tiles { tiles } else { stream_k_tiles };
        let stream = stream_k_tiles.saturating_mul(k_iterations);
        let channel_group = positive(channel_group);
        Self {
            channel_tiles,
            token_tiles,
            k_iterations,
            clusters,
            stream_k_tiles,
            stream_share: stream / clusters,
            stream_longer: stream % clusters,
            stream_slope: if stream < clusters {
                1 << 16
            } else {
                ((stream % clusters) << 16).div_ceil(clusters)
            },
            channel_group,
            by_k_iterations: Divisor::new(k_iterations),
            by_group_tiles: Divisor::new(channel_group.saturating_mul(token_tiles)),
            by_group_width: Divisor::new(channel_group),
            by_last_width: Divisor::new(channel_tiles % channel_group),
        }
    }

    /// Returns the number of output tiles.
    #[inline(always)]
    #[must_use]
    pub const fn tiles(&self) -> u32 {
        self.channel_tiles.wrapping_mul(self.token_tiles)
    }

    /// Returns the number of tiles that are not shared along K. They come first.
    #[inline(always)]
    #[must_use]
    pub const fn whole_tiles(&self) -> u32 {
        self.tiles().wrapping_sub(self.stream_k_tiles)
    }

    /// Returns the first k-iteration of the stream that belongs to `cluster`.
    /// For `cluster == clusters`, this is the length of the stream.
    #[inline(always)]
    #[must_use]
    pub const fn stream_begin(&self, cluster: u32) -> u32 {
        // The slope is rounded up, which adds less than one here, as there are fewer than 2¹⁶ clusters.
        // Therefore whole numbers stay exact.
        let spread = cluster.wrapping_mul(self.stream_slope) >> 16;
        let extra = if spread < self.stream_longer { spread } else { self.stream_longer };
        cluster.wrapping_mul(self.stream_share).wrapping_add(extra)
    }

    /// Returns the segments of `cluster`, in the order in which it must compute them.
    #[inline(always)]
    #[must_use]
    pub const fn segments(&self, cluster: u32) -> Segments {
        Segments {
            schedule: *self,
            stream_begin: self.stream_begin(cluster),
            stream_cursor: self.stream_begin(cluster.wrapping_add(1)),
            next_whole_tile: cluster,
        }
    }

    /// Returns whether `segment` ends its tile, so that its cluster writes the tile's result.
    #[inline(always)]
    #[must_use]
    pub const fn owns(&self, segment: Segment) -> bool {
        segment.k_end == self.k_iterations
    }

    /// Returns the lowest cluster that hands a partial tile to the owner of `segment`.
    ///
    /// The peers are the clusters from this one up to, but not including, the owner.
    /// There are none if the segment is the whole tile.
    #[inline(always)]
    #[must_use]
    pub const fn first_peer(&self, owner: u32, segment: Segment) -> u32 {
        if segment.k_begin == 0 {
            return owner;
        }
        let tile_begin = segment.tile.wrapping_sub(self.whole_tiles()).wrapping_mul(self.k_iterations);
        let mut first = owner;
        while first > 0 && self.stream_begin(first) > tile_begin {
            first -= 1;
        }
        first
    }

    /// Returns the position of a tile.
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

/// The segments of one cluster: its whole tiles, then its share of the stream from the end to the start.
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
            self.next_whole_tile = tile.wrapping_add(schedule.clusters);
            Some(Segment { tile, k_begin: 0, k_end: schedule.k_iterations })
        } else if self.stream_cursor > self.stream_begin {
            let stream_k_tile = schedule.by_k_iterations.quotient(self.stream_cursor - 1);
            let tile_begin = stream_k_tile.wrapping_mul(schedule.k_iterations);
            let first = if self.stream_begin > tile_begin { self.stream_begin } else { tile_begin };
            let segment = Segment {
                tile: schedule.whole_tiles().wrapping_add(stream_k_tile),
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
            |(channel_tiles, token_tiles, k_iterations, clusters, stream_k_percent, channel_group)| {
                let stream_k_tiles = channel_tiles * token_tiles * stream_k_percent / 100;
                Schedule::new(
                    [channel_tiles, token_tiles, k_iterations],
                    clusters,
                    stream_k_tiles,
                    channel_group,
                )
            },
        )
    }

    proptest! {
        #[test]
        fn every_k_iteration_of_every_tile_is_computed_once(schedule in schedules()) {
            let mut done = vec![0u32; (schedule.tiles() * schedule.k_iterations) as usize];
            for cluster in 0..schedule.clusters {
                for segment in schedule.segments(cluster) {
                    prop_assert!(segment.k_begin < segment.k_end && segment.k_end <= schedule.k_iterations);
                    for iteration in segment.k_begin..segment.k_end {
                        done[(segment.tile * schedule.k_iterations + iteration) as usize] += 1;
                    }
                }
            }
            prop_assert!(done.iter().all(|&times| times == 1));
        }

        #[test]
        fn a_cluster_hands_over_at_most_one_partial_tile_and_before_it_waits(schedule in schedules()) {
            for cluster in 0..schedule.clusters {
                let mut waits = false;
                for segment in schedule.segments(cluster) {
                    prop_assert!(schedule.owns(segment) || !waits);
                    waits |= !schedule.owns(segment) || segment.k_begin > 0;
                }
            }
        }

        #[test]
        fn an_owner_waits_for_exactly_its_peers(schedule in schedules()) {
            let mut expected: Vec<(u32, u32)> = Vec::new();
            let mut owners = vec![None; schedule.tiles() as usize];
            for cluster in 0..schedule.clusters {
                for segment in schedule.segments(cluster) {
                    if schedule.owns(segment) {
                        prop_assert!(owners[segment.tile as usize].replace(cluster).is_none());
                    } else {
                        expected.push((segment.tile, cluster));
                    }
                }
            }
            let mut waited: Vec<(u32, u32)> = Vec::new();
            for cluster in 0..schedule.clusters {
                for segment in schedule.segments(cluster).filter(|&segment| schedule.owns(segment)) {
                    for peer in schedule.first_peer(cluster, segment)..cluster {
                        waited.push((segment.tile, peer));
                    }
                }
            }
            expected.sort_unstable();
            waited.sort_unstable();
            prop_assert_eq!(expected, waited);
        }

        #[test]
        fn shares_of_the_stream_differ_by_one_k_iteration_at_most(schedule in schedules()) {
            let share = |cluster| schedule.stream_begin(cluster + 1) - schedule.stream_begin(cluster);
            let shares: Vec<u32> = (0..schedule.clusters).map(share).collect();
            prop_assert_eq!(shares.iter().sum::<u32>(), schedule.stream_k_tiles * schedule.k_iterations);
            prop_assert!(shares.iter().max().unwrap() - shares.iter().min().unwrap() <= 1);
        }

        #[test]
        fn tiles_with_a_whole_number_of_clusters_share_none(
            tiles in 1..40u32,
            parts in 1..5u32,
            k_iterations in 5..60u32,
        ) {
            let schedule = Schedule::new([tiles, 1, k_iterations], tiles * parts, tiles, 1);
            for cluster in 0..schedule.clusters {
                let segments: Vec<_> = schedule.segments(cluster).collect();
                prop_assert_eq!(segments.len(), 1);
                prop_assert_eq!(segments[0].tile, cluster / parts);
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
