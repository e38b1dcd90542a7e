//! What the planner needs of each tile shape, computed at compile time.

use liquidgemm_format::tile::{TILE_SHAPES, TileShape};

use super::cost::{ShapeCost, shape_cost};

/// The least of K that is worth a thread block of its own.
const MIN_K: u32 = 512;

/// A tile shape with what follows from it.
#[derive(Clone, Copy, Debug)]
pub(super) struct ShapeFacts {
    /// The index in [`SHAPES`].
    pub(super) place: usize,
    pub(super) shape: TileShape,
    /// Output channels of a block's tile.
    pub(super) channels: u32,
    /// The largest cluster, at least 1.
    pub(super) max_cluster: u32,
    /// Bricks along K in a step, of all blocks that share a tile's K.
    pub(super) step_bricks: u32,
    /// Spans of 128 along K in a step of one block.
    pub(super) spans: u32,
    /// The fewest steps of a worker.
    pub(super) least_steps: u32,
    /// Whether tiles can be shared among workers step by step.
    pub(super) can_stream: bool,
    /// Whether warps of their own fill the ring.
    pub(super) has_producers: bool,
    /// Bytes of a block's partial sums.
    pub(super) partial_bytes: f64,
    /// Microseconds on an H100 SXM.
    pub(super) cost: ShapeCost,
}

const fn facts(place: usize) -> ShapeFacts {
    let shape = TILE_SHAPES[place];
    ShapeFacts {
        place,
        shape,
        channels: shape.channels(),
        max_cluster: shape.max_cluster(),
        step_bricks: shape.stage_bricks() * shape.split,
        spans: shape.spans(),
        least_steps: MIN_K / shape.stage_k(),
        can_stream: shape.can_stream(),
        has_producers: shape.has_producers(),
        partial_bytes: shape.partial_bytes() as f64,
        cost: shape_cost(shape),
    }
}

/// The facts of all [`TILE_SHAPES`], in their order.
pub(super) static SHAPES: [ShapeFacts; TILE_SHAPES.len()] = {
    let mut all = [facts(0); TILE_SHAPES.len()];
    let mut index = 1;
    while index < TILE_SHAPES.len() {
        all[index] = facts(index);
        index += 1;
    }
    all
};

/// The facts of the shape with the same strips, tokens, halves and split, if there is one.
pub(super) fn find(shape: TileShape) -> Option<&'static ShapeFacts> {
    let shape = TileShape::find(shape.strips, shape.tokens, shape.halves, shape.split)?;
    SHAPES.iter().find(|facts| facts.shape == shape)
}

impl ShapeFacts {
    /// Whether a tile would be half empty: that wastes what the next smaller one doesn't. Only the smallest two are alike.
    pub(super) fn is_half_empty(&self, m: usize) -> bool {
        self.shape.tokens > 16 && m <= self.shape.tokens as usize / 2
    }

    /// The clusters that the shape can have, at most two: one block, or as many as share a tile's K, and the largest.
    pub(super) fn clusters(&self) -> [Option<u32>; 2] {
        let (least, most) = (self.shape.split, self.max_cluster);
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
