//! The layout of a tiled launch, without the parts that only the kernel needs.
//! It is cheap enough for the search to compare many.

use std::ops::Deref;

use liquidgemm_format::brick;
use liquidgemm_format::schedule::{MAX_CLUSTERS, Schedule};

use super::shapes::{SHAPES, ShapeFacts};
use super::{TileConfig, Tiled};
use crate::error::PlanError;
use crate::{DeviceFigures, Problem};

/// The least percentage of persistent thread blocks that have a tile in a wave, on average,
/// for the planner to consider a consumer-loaded kernel. Its tiles cannot be shared along K to fill a wave.
const LEAST_OCCUPANCY: u64 = 75;
/// Channels that are traversed together.
/// A wave of 132 thread blocks then covers a nearly square part of the output.
const GROUP_CHANNELS: u32 = 2048;

/// A shape in clusters of one size, for the tokens and K of a problem but any number of channels.
#[derive(Clone, Copy, Debug)]
pub(super) struct Column {
    pub(super) facts: &'static ShapeFacts,
    pub(super) cluster: u32,
    pub(super) token_tiles: u32,
    pub(super) k_iterations: u32,
}

/// A problem divided into tiles of one shape.
#[derive(Clone, Copy, Debug)]
pub(super) struct Grid {
    column: Column,
    channel_tiles: u32,
    pub(super) tiles: u32,
    /// The most clusters that have enough work to be worth their launch.
    pub(super) most_clusters: u32,
}

impl Deref for Grid {
    type Target = Column;

    fn deref(&self) -> &Column {
        &self.column
    }
}

/// A grid with its assignment of tiles to clusters.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    pub(super) grid: Grid,
    pub(super) clusters: u32,
    stream_k_waves: u32,
    pub(super) stream_k_tiles: u32,
}

impl Column {
    /// Makes the column for `m` and K, which the caller has [checked](super::check_problem).
    pub(super) fn new([m, k]: [usize; 2], facts: &'static ShapeFacts, cluster: u32) -> Self {
        let token_tiles = (m as u32).div_ceil(facts.shape.tokens);
        let k_iterations = (brick::k_blocks(k) as u32).div_ceil(facts.iteration_bricks);
        Self { facts, cluster, token_tiles, k_iterations }
    }

    /// Returns the number of channels in a cluster's tile.
    pub(super) fn channels(&self) -> u32 {
        self.facts.channels * (self.cluster / self.facts.shape.cluster_split)
    }

    /// Returns whether the thread blocks of a cluster lie side by side and share activation tiles.
    pub(super) fn shares_activations(&self) -> bool {
        self.cluster > self.facts.shape.cluster_split
    }

    /// Makes the grid for `n` channels.
    ///
    /// # Errors
    /// If there are too many tiles to count.
    pub(super) fn grid(self, n: usize) -> Result<Grid, PlanError> {
        let channel_tiles = (n as u32).div_ceil(self.channels());
        let tiles = u64::from(channel_tiles) * u64::from(self.token_tiles);
        let iterations = tiles * u64::from(self.k_iterations);
        if iterations > u64::from(u32::MAX) {
            let limit = u32::MAX as usize / self.k_iterations as usize;
            return Err(PlanError::OutOfRange { what: "the number of tiles", value: tiles as usize, limit });
        }
        let most_clusters = (iterations as u32).div_ceil(self.facts.least_iterations).min(MAX_CLUSTERS);
        Ok(Grid { column: self, channel_tiles, tiles: tiles as u32, most_clusters })
    }
}

impl Grid {
    /// Makes the grid of a problem, whose dimensions the caller has [checked](super::check_problem).
    ///
    /// # Errors
    /// As [`Column::grid`].
    pub(super) fn new(
        Problem { m, n, k }: Problem,
        facts: &'static ShapeFacts,
        cluster: u32,
    ) -> Result<Self, PlanError> {
        Column::new([m, k], facts, cluster).grid(n)
    }

    /// Returns the number of clusters that get whole tiles most evenly, if `most` clusters run at a time.
    pub(super) fn even_clusters(&self, most: u32) -> u32 {
        self.tiles.div_ceil(self.tiles.div_ceil(most)).min(self.most_clusters)
    }

    /// Makes the layout on `clusters` clusters, or on as many as the grid can use.
    pub(super) fn layout(self, clusters: u32, stream_k_waves: u32) -> Layout {
        let stream_k_waves = if self.facts.can_stream_k { stream_k_waves } else { 0 };
        let clusters = clusters.clamp(1, self.most_clusters);
        let stream_k_tiles = match stream_k_waves {
            0 => 0,
            waves => {
                let last_wave = match self.tiles % clusters {
                    0 => clusters,
                    partial => partial,
                };
                clusters.saturating_mul(waves - 1).saturating_add(last_wave).min(self.tiles)
            }
        };
        Layout { grid: self, clusters, stream_k_waves, stream_k_tiles }
    }

    /// Returns the layouts that are worth considering if `most` clusters run at a time. Some may be equal.
    pub(super) fn layouts(self, most: u32) -> impl Iterator<Item = Layout> {
        let tiles = self.tiles;
        let places = u64::from(tiles.div_ceil(most)) * u64::from(most);
        let is_worth_it = self.facts.has_producers || u64::from(tiles) * 100 >= places * LEAST_OCCUPANCY;
        let streams = match self.facts.can_stream_k {
            false => None,
            // Divide every tile into the same number of equal parts.
            true if tiles < most => Some((tiles * (most / tiles), 1)),
            true => Some((most, 2)),
        };
        // The second choice has whole tiles, as evenly as possible.
        let choices = [Some((most, 1)), Some((self.even_clusters(most), 0)), streams];
        choices
            .into_iter()
            .flatten()
            .filter(move |_| is_worth_it)
            .map(move |(clusters, stream_k_waves)| self.layout(clusters, stream_k_waves))
    }
}

impl Layout {
    /// Adds what the kernel needs.
    pub(super) fn tiled(&self) -> Tiled {
        let Self { grid, clusters, stream_k_waves, stream_k_tiles } = *self;
        let shape = grid.facts.shape;
        let channel_group = (GROUP_CHANNELS / grid.channels()).clamp(1, grid.channel_tiles);
        let extents = [grid.channel_tiles, grid.token_tiles, grid.k_iterations];
        Tiled {
            place: grid.facts.place,
            config: TileConfig { shape, cluster_size: grid.cluster, clusters, stream_k_waves },
            schedule: Schedule::new(extents, clusters, stream_k_tiles, channel_group),
        }
    }

    /// Returns the layout that a plan was made from.
    pub(super) fn of(tiled: &Tiled) -> Self {
        let Schedule { channel_tiles, token_tiles, k_iterations, clusters, stream_k_tiles, .. } =
            tiled.schedule;
        let facts = &SHAPES[tiled.place];
        let (cluster, tiles) = (tiled.cluster_size(), tiled.schedule.tiles());
        let column = Column { facts, cluster, token_tiles, k_iterations };
        let grid = Grid { column, channel_tiles, tiles, most_clusters: clusters };
        Self { grid, clusters, stream_k_waves: tiled.config.stream_k_waves, stream_k_tiles }
    }
}

/// Returns the cluster sizes, at most two, that a shape can have on the GPU.
///
/// Each comes with the number of clusters that run at a time.
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
