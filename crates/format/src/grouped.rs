//! The grouped GEMM: the rows of the experts, the tile shapes, and the schedule over all experts.
//!
//! A grouped GEMM multiplies the rows of each expert by that expert's weights, in one launch.
//! How many rows an expert has is known only on the device, so the kernels make the schedule there.
//! This file has its arithmetic. `kernels-gpu/src/grouped` loads the counts and applies it;
//! `host/src/plan/grouped.rs` chooses the shape and the clusters.
//!
//! An expert's rows are cut into token tiles, and its channels into channel tiles.
//! An expert's token tiles have about equally many rows, and no tile has rows of two experts.
//! The tiles are numbered expert by expert. Persistent clusters take them in waves, one tile each.

use crate::schedule::TilePosition;
use crate::tile::{K_TILE, MAX_SHARED_BYTES, TileShape};

/// The most experts of a launch.
pub const MAX_EXPERTS: u32 = 512;
/// Experts whose tiles one warp counts at a time.
pub const CHUNK_EXPERTS: u32 = 32;
/// The most chunks of experts.
pub const MAX_CHUNKS: u32 = MAX_EXPERTS / CHUNK_EXPERTS;
/// The most rows of an activation box, and so of one TMA load.
pub const MAX_BOX_ROWS: u32 = 160;
/// Rows that the 128-byte swizzle permutes together. Boxes have multiples of it.
pub const BOX_ROW_STEP: u32 = 8;
/// The rows of an expert are divided among its token tiles in units of this many rows.
///
/// It is the epilogue's round, so that only an expert's last round has rows behind it that belong to others.
pub const ROW_UNIT: u32 = 32;
/// Threads of a thread block of the combine kernel.
pub const COMBINE_THREADS: u32 = 128;
/// Channels that a thread of the combine kernel computes.
pub const COMBINE_CHANNELS: u32 = 8;
/// The values of the status word that a launch writes.
pub mod status {
    /// Every offset or count is valid.
    pub const VALID: u32 = 0;
    /// An offset or a count is out of range or out of order. The launch has limited it.
    pub const LIMITED: u32 = 1;
}

/// Where the rows of each expert lie among all rows.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowLayout {
    /// Number of experts.
    pub experts: u32,
    /// Contiguous: rows of all experts together. Masked: rows of each expert's place, the capacity.
    rows: u32,
    /// 1 if each expert has a place of its own, 0 if the experts' rows follow one another.
    is_masked: u32,
}

/// The rows of one expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertRows {
    /// The first row.
    pub begin: u32,
    /// One past the last row. It is never below `begin`, and never beyond the layout's rows.
    pub end: u32,
    /// Whether the expert's entries in the index were in range, so that nothing was limited.
    pub is_valid: bool,
}

impl RowLayout {
    /// Returns the layout of `rows` rows, sorted by expert.
    ///
    /// Its index has `experts + 1` offsets: expert e has the rows from offset e up to offset e + 1.
    #[must_use]
    pub const fn contiguous(experts: u32, rows: u32) -> Self {
        Self { experts, rows, is_masked: 0 }
    }

    /// Returns the layout with a place of `capacity` rows for each expert.
    ///
    /// Its index has a count for each expert: expert e has that many rows from row e · `capacity` on.
    #[must_use]
    pub const fn masked(experts: u32, capacity: u32) -> Self {
        Self { experts, rows: capacity, is_masked: 1 }
    }

    /// Returns whether each expert has a place of its own.
    #[inline(always)]
    #[must_use]
    pub const fn is_masked(&self) -> bool {
        self.is_masked != 0
    }

    /// Returns the most rows that one expert can have.
    #[inline(always)]
    #[must_use]
    pub const fn most_rows(&self) -> u32 {
        self.rows
    }

    /// Returns the rows of `expert` from its entries in the index.
    ///
    /// `first` is the expert's own offset or count. `second` is the next offset, and is ignored if masked.
    /// Entries that are out of range are limited:
    /// a count to 0 up to the capacity, an offset to the rows that there are,
    /// and the end of an expert's rows to no less than their beginning.
    #[inline(always)]
    #[must_use]
    pub const fn rows_of(&self, expert: u32, first: i32, second: i32) -> ExpertRows {
        const fn limit(value: i32, least: u32, most: u32) -> u32 {
            if value < 0 || (value as u32) < least {
                least
            } else if value as u32 > most {
                most
            } else {
                value as u32
            }
        }
        if self.is_masked() {
            let begin = expert.wrapping_mul(self.rows);
            let count = limit(first, 0, self.rows);
            ExpertRows { begin, end: begin.wrapping_add(count), is_valid: count as i32 == first }
        } else {
            let begin = limit(first, 0, self.rows);
            let end = limit(second, begin, self.rows);
            ExpertRows { begin, end, is_valid: begin as i32 == first && end as i32 == second }
        }
    }
}

/// The division of a grouped GEMM among persistent clusters. Only the counts are missing.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupedSchedule {
    /// The rows of the experts.
    pub layout: RowLayout,
    /// Tiles along the channels of one expert. The thread blocks of a cluster compute one together.
    pub channel_tiles: u32,
    /// Channel tiles of a group, at least 1.
    /// All token tiles of a group are visited before the next group, so that its weights stay in the L2 cache.
    pub channel_group: u32,
    /// K-iterations of each tile, at least 1.
    pub k_iterations: u32,
    /// Persistent clusters, at least 1.
    pub clusters: u32,
    /// Places by which the clusters move on from one wave to the next, below `clusters`.
    rotation: u32,
}

impl GroupedSchedule {
    /// Makes the schedule of `clusters` clusters. Zeros are treated as ones.
    #[must_use]
    pub const fn new(
        layout: RowLayout,
        [channel_tiles, k_iterations]: [u32; 2],
        clusters: u32,
        channel_group: u32,
    ) -> Self {
        const fn positive(value: u32) -> u32 {
            if value == 0 { 1 } else { value }
        }
        let clusters = positive(clusters);
        Self {
            layout,
            channel_tiles: positive(channel_tiles),
            channel_group: positive(channel_group),
            k_iterations: positive(k_iterations),
            clusters,
            rotation: rotation(clusters),
        }
    }

    /// Returns the turns of `cluster`.
    ///
    /// They have no end: the caller stops at the number of tiles that there are.
    #[inline(always)]
    #[must_use]
    pub const fn turns(&self, cluster: u32) -> Turns {
        Turns { wave: 0, place: cluster, clusters: self.clusters, rotation: self.rotation }
    }

    /// Returns the position of a tile among the tiles of its expert, which has `token_tiles` token tiles.
    ///
    /// Within a group of channels, the tiles of one token tile follow one another.
    #[inline(always)]
    #[must_use]
    pub const fn position(&self, tile: u32, token_tiles: u32) -> TilePosition {
        if token_tiles == 1 {
            return TilePosition { channel_tile: tile, token_tile: 0 };
        }
        let group_tiles = self.channel_group.wrapping_mul(token_tiles);
        let group = quotient(tile, group_tiles);
        let within = tile.wrapping_sub(group.wrapping_mul(group_tiles));
        let first = group.wrapping_mul(self.channel_group);
        let left = self.channel_tiles.wrapping_sub(first);
        let width = if left < self.channel_group { left } else { self.channel_group };
        let token_tile = quotient(within, width);
        let channel_tile = first.wrapping_add(within.wrapping_sub(token_tile.wrapping_mul(width)));
        TilePosition { channel_tile, token_tile }
    }
}

/// Returns the quotient, or 0 for a divisor of 0, without a panic.
#[inline(always)]
const fn quotient(dividend: u32, divisor: u32) -> u32 {
    match dividend.checked_div(divisor) {
        Some(quotient) => quotient,
        None => 0,
    }
}

/// Returns the token tiles of an expert with `rows` rows, in tiles of up to `tokens` tokens.
#[inline(always)]
#[must_use]
pub const fn token_tiles(rows: u32, tokens: u32) -> u32 {
    quotient(rows.wrapping_add(tokens.wrapping_sub(1)), tokens)
}

/// Returns the first row of a token tile, and one past its last row, counted from the expert's first row.
///
/// The expert has `rows` rows in `token_tiles` tiles, as many as [`token_tiles`] returns
/// for tokens that are a multiple of [`ROW_UNIT`].
/// Each tile has as many units of rows as any other, or one more. The last unit may have fewer rows.
/// So a small remainder does not need a tile of its own next to full ones, which would cost far more than its rows.
#[inline(always)]
#[must_use]
pub const fn tile_rows(rows: u32, token_tiles: u32, token_tile: u32) -> (u32, u32) {
    if token_tiles == 1 {
        return (0, rows);
    }
    let units = quotient(rows.wrapping_add(ROW_UNIT - 1), ROW_UNIT);
    let least = quotient(units, token_tiles);
    let longer = units.wrapping_sub(least.wrapping_mul(token_tiles));
    let before = if token_tile < longer { token_tile } else { longer };
    let first = least.wrapping_mul(token_tile).wrapping_add(before);
    let end = first.wrapping_add(least).wrapping_add((token_tile < longer) as u32).wrapping_mul(ROW_UNIT);
    (first.wrapping_mul(ROW_UNIT), if end < rows { end } else { rows })
}

/// Returns the places by which the clusters move on from wave to wave.
///
/// Without a rotation, a cluster would take every `clusters`-th tile.
/// If an expert has as many kinds of tiles as a divisor of that number, large ones and small ones in turn,
/// then some clusters would get only large ones.
/// The distance between a cluster's tiles is therefore the first number above `clusters`
/// that no number from 2 to 16 divides.
const fn rotation(clusters: u32) -> u32 {
    let mut rotation = 1;
    while rotation < clusters {
        let distance = clusters.saturating_add(rotation);
        let mut divisor = 2;
        while divisor <= 16 && !distance.is_multiple_of(divisor) {
            divisor += 1;
        }
        if divisor > 16 {
            return rotation;
        }
        rotation += 1;
    }
    // So few clusters that there is no such number: move on by one, or not at all if there is one cluster.
    if clusters > 1 { 1 } else { 0 }
}

/// The numbers of one cluster's tiles, ascending.
///
/// Each wave has one tile for each cluster.
#[derive(Clone, Copy, Debug)]
pub struct Turns {
    /// The first tile of the wave.
    wave: u32,
    /// The cluster's place in the wave.
    place: u32,
    clusters: u32,
    rotation: u32,
}

impl Turns {
    /// Returns the cluster's next tile. After 2³² tiles the number stays at its largest.
    #[inline(always)]
    pub const fn next(&mut self) -> u32 {
        let tile = self.wave.saturating_add(self.place);
        self.wave = self.wave.saturating_add(self.clusters);
        let place = self.place.wrapping_add(self.rotation);
        self.place = if place >= self.clusters { place.wrapping_sub(self.clusters) } else { place };
        tile
    }
}

/// Returns the first row of a tile, and the number of rows, that the thread block `rank` of a cluster loads.
///
/// The cluster has 1 or 2 thread blocks, and the tile `rows` rows.
/// Both are multiples of [`BOX_ROW_STEP`]; a few of the rows may lie behind the tile.
#[inline(always)]
#[must_use]
pub const fn loaded_part(rows: u32, blocks: u32, rank: u32) -> (u32, u32) {
    let rows = rows.wrapping_add(BOX_ROW_STEP - 1) & !(BOX_ROW_STEP - 1);
    if blocks == 1 {
        return (0, rows);
    }
    let first = (rows / 2).wrapping_add(BOX_ROW_STEP - 1) & !(BOX_ROW_STEP - 1);
    if rank == 0 { (0, first) } else { (first, rows.wrapping_sub(first)) }
}

/// Calls the macro `$callback` with every tile shape that has a grouped kernel.
///
/// Each line is `entry: strips, tokens, warpgroup_split, threads of a thread block, tensor maps;`.
/// The entry is named `grouped_<channels>x<tokens>`.
/// The tensor maps are those of the activations, one for each height of a box: 8, 16, 24, … rows.
#[macro_export]
macro_rules! grouped_shapes {
    ($callback:ident) => {
        $callback! {
            grouped_64x32: 1, 32, 2, 320, 4;
            grouped_128x64: 2, 64, 1, 320, 8;
            grouped_128x96: 2, 96, 1, 320, 12;
            grouped_128x160: 2, 160, 1, 384, 20;
            grouped_128x256: 2, 256, 1, 384, 20;
            grouped_128x320: 2, 320, 1, 384, 20;
        }
    };
}

macro_rules! shapes {
    ($($entry:ident: $strips:literal, $tokens:literal, $warpgroup_split:literal, $threads:literal, $maps:literal;)*) => {
        /// Every tile shape that has a grouped kernel, in the order of [`grouped_shapes!`](crate::grouped_shapes).
        pub const GROUPED_SHAPES: [TileShape; [$($tokens as u32),*].len()] =
            [$(shape($strips, $tokens, $warpgroup_split)),*];

        /// The names of the kernels' entry points, in the order of [`GROUPED_SHAPES`].
        pub const GROUPED_ENTRIES: [&str; GROUPED_SHAPES.len()] = [$(stringify!($entry)),*];
    };
}
grouped_shapes!(shapes);

/// Returns the shape with the deepest ring that fits beside the table of experts.
const fn shape(strips: u32, tokens: u32, warpgroup_split: u32) -> TileShape {
    let flat = TileShape { strips, tokens, warpgroup_split, cluster_split: 1, stages: 0 };
    let stages = (MAX_SHARED_BYTES - flat.shared_bytes() - TABLE_BYTES) / flat.stage_bytes();
    TileShape { stages, ..flat }
}

/// Returns the grouped shape with these strips and tokens.
#[must_use]
pub const fn find_shape(strips: u32, tokens: u32) -> Option<TileShape> {
    let mut index = 0;
    while index < GROUPED_SHAPES.len() {
        if GROUPED_SHAPES[index].strips == strips && GROUPED_SHAPES[index].tokens == tokens {
            return Some(GROUPED_SHAPES[index]);
        }
        index += 1;
    }
    None
}

/// Bytes of the table of experts in shared memory:
/// for each expert the number of token tiles up to its last one, then those of each chunk of experts.
pub const TABLE_BYTES: u32 = (MAX_EXPERTS + MAX_CHUNKS) * 4;

/// Returns the offset of the table of experts in shared memory.
#[must_use]
pub const fn table_offset(shape: TileShape) -> u32 {
    shape.shared_bytes()
}

/// Returns the dynamic shared memory of a grouped kernel's thread block.
#[must_use]
pub const fn shared_bytes(shape: TileShape) -> u32 {
    table_offset(shape) + TABLE_BYTES
}

/// Returns the tensor maps that a grouped kernel of this shape takes: one for each height of a box.
#[must_use]
pub const fn box_maps(shape: TileShape) -> u32 {
    (if shape.tokens < MAX_BOX_ROWS { shape.tokens } else { MAX_BOX_ROWS }) / BOX_ROW_STEP
}

const _: () = assert!(K_TILE == 128, "a row of a box is a row of the 128-byte swizzle");

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Returns the rows of each expert, as the kernels compute them from the index.
    fn rows(layout: RowLayout, index: &[i32]) -> Vec<ExpertRows> {
        (0..layout.experts)
            .map(|expert| {
                let at = |place: u32| index.get(place as usize).copied().unwrap_or(0);
                layout.rows_of(expert, at(expert), at(expert + 1))
            })
            .collect()
    }

    /// Computes every tile of every cluster; returns how often each (row, channel tile) is computed.
    fn covered(
        schedule: GroupedSchedule,
        tokens: u32,
        experts: &[ExpertRows],
        all_rows: usize,
    ) -> Result<Vec<u32>, TestCaseError> {
        let mut ends: Vec<u32> = Vec::new();
        for rows in experts {
            let before = ends.last().map_or(0, |&end| end);
            ends.push(before + token_tiles(rows.end - rows.begin, tokens));
        }
        let total = ends.last().map_or(0, |end| end * schedule.channel_tiles);
        let mut done = vec![0u32; all_rows * schedule.channel_tiles as usize];
        let mut of_cluster = vec![0u32; schedule.clusters as usize];
        for cluster in 0..schedule.clusters {
            let mut turns = schedule.turns(cluster);
            let mut last = None;
            loop {
                let tile = turns.next();
                prop_assert!(last.is_none_or(|last| last < tile), "turns ascend");
                last = Some(tile);
                if tile >= total {
                    break;
                }
                let end = |expert: usize| ends[expert] * schedule.channel_tiles;
                let expert = (0..experts.len()).position(|expert| tile < end(expert)).unwrap();
                let tile = tile - if expert == 0 { 0 } else { end(expert - 1) };
                let rows = experts[expert];
                let count = rows.end - rows.begin;
                let tiles = token_tiles(count, tokens);
                let position = schedule.position(tile, tiles);
                prop_assert!(position.channel_tile < schedule.channel_tiles);
                let (first, end) = tile_rows(count, tiles, position.token_tile);
                prop_assert!(first < end && end <= count && end - first <= tokens);
                for row in rows.begin + first..rows.begin + end {
                    done[(row * schedule.channel_tiles + position.channel_tile) as usize] += 1;
                }
                of_cluster[cluster as usize] += 1;
            }
        }
        let (most, least) = (of_cluster.iter().max().unwrap(), of_cluster.iter().min().unwrap());
        prop_assert!(most - least <= 1, "all clusters have equally many tiles, up to one");
        Ok(done)
    }

    fn counts() -> impl Strategy<Value = Vec<u32>> {
        let count = prop_oneof![3 => Just(0u32), 3 => 1..4u32, 2 => 1..700u32, 1 => Just(128u32)];
        proptest::collection::vec(count, 1..70)
    }

    /// Channel tiles, clusters, channel group and tokens.
    fn divisions() -> impl Strategy<Value = (u32, u32, u32, u32)> {
        (1..20u32, 1..150u32, 1..12u32, proptest::sample::select(vec![32u32, 64, 160, 256, 320]))
    }

    proptest! {
        #[test]
        fn every_tile_of_contiguous_rows_is_computed_once(counts in counts(), division in divisions()) {
            let (channel_tiles, clusters, group, tokens) = division;
            let mut offsets = vec![0i32];
            for &count in &counts {
                offsets.push(offsets.last().unwrap() + count as i32);
            }
            let all = *offsets.last().unwrap() as u32;
            let layout = RowLayout::contiguous(counts.len() as u32, all);
            let experts = rows(layout, &offsets);
            prop_assert!(experts.iter().all(|rows| rows.is_valid));
            let schedule = GroupedSchedule::new(layout, [channel_tiles, 3], clusters, group);
            let done = covered(schedule, tokens, &experts, all as usize)?;
            prop_assert!(done.iter().all(|&times| times == 1));
        }

        #[test]
        fn masked_experts_compute_their_rows_and_no_others(counts in counts(), division in divisions(), spare in 0..5u32) {
            let (channel_tiles, clusters, group, tokens) = division;
            let capacity = counts.iter().max().unwrap() + spare;
            let layout = RowLayout::masked(counts.len() as u32, capacity);
            let index: Vec<i32> = counts.iter().map(|&count| count as i32).collect();
            let experts = rows(layout, &index);
            let schedule = GroupedSchedule::new(layout, [channel_tiles, 3], clusters, group);
            let done = covered(schedule, tokens, &experts, counts.len() * capacity as usize)?;
            for (expert, &count) in counts.iter().enumerate() {
                for row in 0..capacity {
                    let place = (expert as u32 * capacity + row) * channel_tiles;
                    let times = &done[place as usize..][..channel_tiles as usize];
                    prop_assert!(times.iter().all(|&times| times == u32::from(row < count)));
                }
            }
        }

        #[test]
        fn an_expert_s_tiles_follow_one_another_and_differ_by_one_unit(
            rows in 1..2_000_000u32,
            tokens in (1..11u32).prop_map(|units| units * ROW_UNIT),
        ) {
            let tiles = token_tiles(rows, tokens);
            let mut expected = 0;
            for tile in 0..tiles {
                let (first, end) = tile_rows(rows, tiles, tile);
                prop_assert!(first == expected && first < end && end - first <= tokens);
                let (units, mean) = ((end - first).div_ceil(ROW_UNIT), rows.div_ceil(ROW_UNIT) / tiles);
                prop_assert!(units == mean || units == mean + 1);
                expected = end;
            }
            prop_assert_eq!(expected, rows);
        }

        #[test]
        fn no_index_reaches_rows_outside(index in proptest::collection::vec(any::<i32>(), 2..40), rows_or_capacity in 0..1000u32) {
            let experts = index.len() as u32 - 1;
            for layout in [
                RowLayout::contiguous(experts, rows_or_capacity),
                RowLayout::masked(experts, rows_or_capacity),
            ] {
                for (expert, rows) in rows(layout, &index).into_iter().enumerate() {
                    prop_assert!(rows.begin <= rows.end);
                    let most = if layout.is_masked() { (expert as u32 + 1) * rows_or_capacity } else { rows_or_capacity };
                    prop_assert!(rows.end <= most);
                    if layout.is_masked() {
                        prop_assert!(rows.begin == expert as u32 * rows_or_capacity);
                    }
                }
            }
        }

        #[test]
        fn every_cluster_gets_tiles_of_each_kind(
            kinds in 2..17u32,
            clusters in proptest::sample::select(vec![39u32, 57, 64, 66, 78, 114, 132, 144]),
        ) {
            // Tiles of several kinds in turn, as from experts that all have the same number of token tiles.
            let schedule = GroupedSchedule::new(RowLayout::contiguous(1, 1), [1, 1], clusters, 1);
            let waves = kinds * 16;
            for kind in 0..kinds {
                let of_kind = |cluster| {
                    let mut turns = schedule.turns(cluster);
                    (0..waves).filter(|_| turns.next() % kinds == kind).count()
                };
                let counts: Vec<usize> = (0..clusters).map(of_kind).collect();
                let (least, most) = (counts.iter().min().unwrap(), counts.iter().max().unwrap());
                prop_assert!(*least >= 8 && *most <= 28, "kind {kind} of {kinds}: {least} to {most} instead of 16");
            }
        }
    }

    #[test]
    fn invalid_entries_are_limited_and_reported() {
        let layout = RowLayout::contiguous(3, 10);
        let of = |first, second| {
            let rows = layout.rows_of(1, first, second);
            (rows.begin, rows.end, rows.is_valid)
        };
        assert_eq!(of(2, 7), (2, 7, true));
        assert_eq!(of(0, 10), (0, 10, true));
        assert_eq!(of(7, 2), (7, 7, false));
        assert_eq!(of(-1, 2), (0, 2, false));
        assert_eq!(of(4, 11), (4, 10, false));
        assert_eq!(of(i32::MAX, i32::MIN), (10, 10, false));
        let layout = RowLayout::masked(3, 10);
        let of = |count| {
            let rows = layout.rows_of(2, count, 99);
            (rows.begin, rows.end, rows.is_valid)
        };
        assert_eq!((of(0), of(10)), ((20, 20, true), (20, 30, true)));
        assert_eq!((of(11), of(-1), of(i32::MIN)), ((20, 30, false), (20, 20, false), (20, 20, false)));
    }

    #[test]
    fn the_parts_of_a_cluster_cover_the_rows_in_whole_swizzle_atoms() {
        for rows in 1..=320u32 {
            let whole = rows.next_multiple_of(8);
            assert_eq!(loaded_part(rows, 1, 0), (0, whole));
            let ((first, a), (second, b)) = (loaded_part(rows, 2, 0), loaded_part(rows, 2, 1));
            assert_eq!((first, second, a + b), (0, a, whole));
            assert!(a % 8 == 0 && b % 8 == 0 && a >= b && a - b <= 8 && a <= MAX_BOX_ROWS);
        }
    }

    #[test]
    fn every_shape_fits_shared_memory_with_its_table() {
        for shape in GROUPED_SHAPES {
            assert!(shared_bytes(shape) <= MAX_SHARED_BYTES, "{shape:?}");
            assert!(shared_bytes(shape) + shape.stage_bytes() > MAX_SHARED_BYTES, "{shape:?}");
            assert!(shape.stages * shape.k_tiles() >= 4, "{shape:?}");
            assert_eq!(shape.tokens % ROW_UNIT, 0);
            assert_eq!(table_offset(shape) % 4, 0);
            assert!(shape.tokens <= 2 * MAX_BOX_ROWS, "a tile is two boxes at the most");
            assert!(shape.has_producers());
            assert!(!shape.moves_registers() || shape.warpgroup_split == 1, "large tiles exchange no sums");
        }
    }

    #[test]
    fn entries_are_named_after_their_shapes_and_take_a_map_for_each_box() {
        macro_rules! check {
            ($($entry:ident: $strips:literal, $tokens:literal, $warpgroup_split:literal, $threads:literal, $maps:literal;)*) => {
                $(
                    let shape = find_shape($strips, $tokens).unwrap();
                    assert_eq!(stringify!($entry), format!("grouped_{}x{}", shape.channels(), shape.tokens));
                    assert_eq!((shape.threads(), box_maps(shape)), ($threads, $maps));
                )*
            };
        }
        grouped_shapes!(check);
        assert_eq!(GROUPED_ENTRIES.len(), GROUPED_SHAPES.len());
        assert_eq!(find_shape(7, 8), None);
    }
}
