//! Properties of the tile shapes that the planner needs, computed at compile time.

use liquidgemm_format::tile::{TILE_SHAPES, TileShape};

use super::cost::{ShapeCost, shape_cost};

/// The least K that is worth a thread block of its own.
const MIN_K: u32 = 512;

/// A tile shape with its derived properties.
#[derive(Clone, Copy, Debug)]
pub(super) struct ShapeFacts {
    /// The index in [`SHAPES`].
    pub(super) place: usize,
    pub(super) shape: TileShape,
    /// Output channels of a thread block's tile.
    pub(super) channels: u32,
    /// Thread blocks of the largest cluster, at least 1.
    pub(super) max_cluster: u32,
    /// Bricks along K in a k-iteration, over all thread blocks that share a tile's K.
    pub(super) iteration_bricks: u32,
    /// K-tiles in a k-iteration of one thread block.
    pub(super) k_tiles: u32,
    /// The fewest k-iterations that are worth a cluster.
    pub(super) least_iterations: u32,
    /// Whether stream-K can share tiles among clusters.
    pub(super) can_stream_k: bool,
    /// Whether the kernel has producer warps.
    pub(super) has_producers: bool,
    /// Bytes of a thread block's partial sums.
    pub(super) partial_bytes: f64,
    /// The cost on an H100 SXM.
    pub(super) cost: ShapeCost,
}

const fn facts(place: usize) -> ShapeFacts {
    let shape = TILE_SHAPES[place];
    ShapeFacts {
        place,
        shape,
        channels: shape.channels(),
        max_cluster: shape.max_cluster(),
        iteration_bricks: shape.stage_bricks() * shape.cluster_split,
        k_tiles: shape.k_tiles(),
        least_iterations: MIN_K / shape.stage_k(),
        can_stream_k: shape.can_stream_k(),
        has_producers: shape.has_producers(),
        partial_bytes: shape.partial_bytes() as f64,
        cost: shape_cost(shape),
    }
}

/// The properties of all [`TILE_SHAPES`], in their order.
pub(super) static SHAPES: [ShapeFacts; TILE_SHAPES.len()] = {
    let mut all = [facts(0); TILE_SHAPES.len()];
    let mut index = 1;
    while index < TILE_SHAPES.len() {
        all[index] = facts(index);
        index += 1;
    }
    all
};

/// Returns the properties of the shape with the same strips, tokens, warpgroup split and cluster split.
pub(super) fn find(shape: TileShape) -> Option<&'static ShapeFacts> {
    let shape = TileShape::find(shape.strips, shape.tokens, shape.warpgroup_split, shape.cluster_split)?;
    SHAPES.iter().find(|facts| facts.shape == shape)
}

impl ShapeFacts {
    /// Returns whether half of a tile or more would be empty, which the next smaller tile avoids.
    ///
    /// Tiles of up to 16 tokens are always considered, because the two smallest take about the same time.
    pub(super) fn is_half_empty(&self, m: usize) -> bool {
        self.shape.tokens > 16 && m <= self.shape.tokens as usize / 2
    }

    /// Returns the cluster sizes of the shape, at most two: the smallest and the largest.
    ///
    /// The smallest is one thread block, or with cluster split-K the blocks that share a tile's K.
    pub(super) fn clusters(&self) -> [Option<u32>; 2] {
        let (least, most) = (self.shape.cluster_split, self.max_cluster);
        [Some(least), (most > least).then_some(most)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shape_is_found_and_no_other() {
        for (index, shape) in TILE_SHAPES.into_iter().enumerate() {
            assert_eq!(SHAPES[index].shape, shape);
            let found = find(TileShape { stages: 0, ..shape }).map(|facts| facts.shape);
            assert_eq!(found, Some(shape));
        }
        assert!(find(TileShape { tokens: 7, ..TILE_SHAPES[0] }).is_none());
    }
}
