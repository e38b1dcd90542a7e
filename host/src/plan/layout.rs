//! How a launch in tiles is laid out, without what only the kernel needs: cheap enough to compare many.

use std::ops::Deref;

use liquidgemm_format::brick;
use liquidgemm_format::schedule::{MAX_WORKERS, Schedule};

use super::shapes::{SHAPES, ShapeFacts};
use super::{Cut, Tiled};
use crate::DeviceFigures;
use crate::gpu::GpuError;

/// Percent of the persistent blocks that must have a tile in a wave, on the average, for a tile of a consumer-loaded kernel to be worth
/// considering: what is left over can't be shared out.
const LEAST_OCCUPANCY: u64 = 75;
/// Channels walked together, so that a wave of 132 blocks covers a near-square piece of the output.
const GROUP_CHANNELS: u32 = 2048;

/// A shape in clusters of one size, for the tokens and K of a problem but any channels.
#[derive(Clone, Copy, Debug)]
pub(super) struct Column {
    pub(super) facts: &'static ShapeFacts,
    pub(super) cluster: u32,
    pub(super) token_tiles: u32,
    pub(super) k_steps: u32,
}

/// A problem cut into tiles of one shape.
#[derive(Clone, Copy, Debug)]
pub(super) struct Grid {
    column: Column,
    channel_tiles: u32,
    pub(super) tiles: u32,
    /// As many workers as have something to do that is worth it.
    pub(super) most_workers: u32,
}

impl Deref for Grid {
    type Target = Column;

    fn deref(&self) -> &Column {
        &self.column
    }
}

/// A grid, and who computes what of it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    pub(super) grid: Grid,
    pub(super) workers: u32,
    streamed_waves: u32,
    pub(super) streamed_tiles: u32,
}

impl Column {
    /// The column of `m` tokens and K, which have been [checked](super::check_problem).
    pub(super) fn new([m, k]: [usize; 2], facts: &'static ShapeFacts, cluster: u32) -> Self {
        let token_tiles = (m as u32).div_ceil(facts.shape.tokens);
        let k_steps = (brick::k_blocks(k) as u32).div_ceil(facts.step_bricks);
        Self { facts, cluster, token_tiles, k_steps }
    }

    /// Channels of a cluster's tile.
    pub(super) fn channels(&self) -> u32 {
        self.facts.channels * (self.cluster / self.facts.shape.split)
    }

    /// Whether the blocks of a cluster lie side by side and share their activations.
    pub(super) fn shares_activations(&self) -> bool {
        self.cluster > self.facts.shape.split
    }

    /// The grid for `n` channels.
    ///
    /// # Errors
    /// If there are more tiles than can be counted.
    pub(super) fn grid(self, n: usize) -> Result<Grid, GpuError> {
        let channel_tiles = (n as u32).div_ceil(self.channels());
        let tiles = u64::from(channel_tiles) * u64::from(self.token_tiles);
        let steps = tiles * u64::from(self.k_steps);
        if steps > u64::from(u32::MAX) {
            let limit = u32::MAX as usize / self.k_steps as usize;
            return Err(GpuError::OutOfRange { what: "the number of tiles", value: tiles as usize, limit });
        }
        let most_workers = (steps as u32).div_ceil(self.facts.least_steps).min(MAX_WORKERS);
        Ok(Grid { column: self, channel_tiles, tiles: tiles as u32, most_workers })
    }
}

impl Grid {
    /// The grid of a problem whose dimensions have been [checked](super::check_problem).
    ///
    /// # Errors
    /// As [`Column::grid`].
    pub(super) fn new(
        [m, n, k]: [usize; 3],
        facts: &'static ShapeFacts,
        cluster: u32,
    ) -> Result<Self, GpuError> {
        Column::new([m, k], facts, cluster).grid(n)
    }

    /// As many workers as whole tiles go out to evenly where `most` clusters run at a time.
    pub(super) fn even_workers(&self, most: u32) -> u32 {
        self.tiles.div_ceil(self.tiles.div_ceil(most)).min(self.most_workers)
    }

    /// The grid on so many workers, or as many as it can use.
    pub(super) fn layout(self, workers: u32, streamed_waves: u32) -> Layout {
        let streamed_waves = if self.facts.can_stream { streamed_waves } else { 0 };
        let workers = workers.clamp(1, self.most_workers);
        let streamed_tiles = match streamed_waves {
            0 => 0,
            waves => {
                let last_wave = match self.tiles % workers {
                    0 => workers,
                    partial => partial,
                };
                workers.saturating_mul(waves - 1).saturating_add(last_wave).min(self.tiles)
            }
        };
        Layout { grid: self, workers, streamed_waves, streamed_tiles }
    }

    /// The layouts that are worth considering where `most` clusters run at a time. Some may be the same.
    pub(super) fn layouts(self, most: u32) -> impl Iterator<Item = Layout> {
        let tiles = self.tiles;
        let places = u64::from(tiles.div_ceil(most)) * u64::from(most);
        let is_worth_it = self.facts.has_producers || u64::from(tiles) * 100 >= places * LEAST_OCCUPANCY;
        let streams = match self.facts.can_stream {
            false => None,
            // Every tile in the same number of equal parts.
            true if tiles < most => Some((tiles * (most / tiles), 1)),
            true => Some((most, 2)),
        };
        // The second: whole tiles, as even as can be.
        let choices = [Some((most, 1)), Some((self.even_workers(most), 0)), streams];
        choices
            .into_iter()
            .flatten()
            .filter(move |_| is_worth_it)
            .map(move |(workers, streamed_waves)| self.layout(workers, streamed_waves))
    }
}

impl Layout {
    /// The layout with all that its kernel needs.
    pub(super) fn tiled(&self) -> Tiled {
        let Self { grid, workers, streamed_waves, streamed_tiles } = *self;
        let shape = grid.facts.shape;
        let channel_group = (GROUP_CHANNELS / grid.channels()).clamp(1, grid.channel_tiles);
        let extents = [grid.channel_tiles, grid.token_tiles, grid.k_steps];
        Tiled {
            place: grid.facts.place,
            cut: Cut { shape, cluster: grid.cluster, workers, streamed_waves },
            schedule: Schedule::new(extents, workers, streamed_tiles, channel_group),
        }
    }

    /// The layout that a plan was made of.
    pub(super) fn of(tiled: &Tiled) -> Self {
        let Schedule { channel_tiles, token_tiles, k_steps, workers, streamed_tiles, .. } = tiled.schedule;
        let facts = &SHAPES[tiled.place];
        let (cluster, tiles) = (tiled.cluster(), tiled.schedule.tiles());
        let column = Column { facts, cluster, token_tiles, k_steps };
        let grid = Grid { column, channel_tiles, tiles, most_workers: workers };
        Self { grid, workers, streamed_waves: tiled.cut.streamed_waves, streamed_tiles }
    }
}

/// The sizes of clusters, at most two, that a shape can have on the GPU, each with the clusters that run at a time.
pub(super) fn sizes(
    facts: &'static ShapeFacts,
    figures: &DeviceFigures,
) -> impl Iterator<Item = (u32, u32)> + use<> {
    let figures = *figures;
    facts
        .clusters()
        .into_iter()
        .flatten()
        .map(move |cluster| (cluster, figures.resident_clusters(cluster)))
        .filter(|&(_, most)| most > 0)
}
