//! A warp's ring of weights, which its lanes fill by `cp.async`.
//!
//! `liquidgemm_format::skinny` lays out the stages, `liquidgemm_format::stream` the weights in device memory.

use liquidgemm_format::arguments::SkinnyArguments;
use liquidgemm_format::brick::CODE_BYTES;
use liquidgemm_format::skinny::{M16_CODE_BYTES, M16_PAIR_BYTES, STRIP_M16_TILES, SkinnyShape, WARPS};
use liquidgemm_format::tile::{K_TILE_BRICKS, STRIP_K_TILE_CODE_BYTES};
use seq_macro::seq;

use super::{Place, shape};
use crate::ptx::copy;

/// A warp's ring of weights, and the source of the next load.
///
/// The sequence of stages continues from one pass to the next.
pub(super) struct WeightRing<'a, const M16_TILES: usize, const GROUPS: usize> {
    arguments: &'a SkinnyArguments,
    pub(super) place: Place,
    end_m16_tile: u32,
    /// Whether a stage has been multiplied already.
    is_running: bool,
    /// Address of the stage to fill next, which is also the stage that was multiplied last.
    fill: u32,
    /// Address of the stage to multiply next.
    pub(super) full: u32,
    /// The pass of the stage to load next: its first m16 tile, and its number of m16 tiles.
    /// The number is 0 after the last pass.
    first_m16_tile: u32,
    m16_tiles: u32,
    /// Index along K of that stage's first brick.
    brick: u32,
    /// Address of that brick in the pass's first strip.
    source: u64,
    /// Offsets from `source` of this lane's copies:
    /// of each m16 tile's codes in the first brick, and of the pairs.
    codes: [u32; M16_TILES],
    pairs: i32,
}

impl<'a, const M16_TILES: usize, const GROUPS: usize> WeightRing<'a, M16_TILES, GROUPS> {
    /// The kernel's shape.
    const SHAPE: SkinnyShape = shape(M16_TILES, GROUPS);

    /// Returns an empty ring for the thread block's m16 tiles, from `first_m16_tile` up to `end_m16_tile`.
    #[inline(always)]
    pub(super) fn new(
        arguments: &'a SkinnyArguments,
        place: Place,
        [first_m16_tile, end_m16_tile]: [u32; 2],
    ) -> Self {
        let start = place.weights(Self::SHAPE);
        let mut ring = Self {
            arguments,
            place,
            end_m16_tile,
            is_running: false,
            fill: start,
            full: start,
            first_m16_tile,
            m16_tiles: 0,
            brick: 0,
            source: 0,
            codes: [0; M16_TILES],
            pairs: 0,
        };
        ring.begin_pass();
        ring
    }

    /// Sets the source to the start of the pass that begins with `first_m16_tile`.
    #[inline(always)]
    pub(super) fn begin_pass(&mut self) {
        let weights = &self.arguments.weights;
        let stream = weights.stream;
        let strip_bytes = stream.strip_bytes;
        let strip = self.first_m16_tile / STRIP_M16_TILES;
        let offset = |m16_tile: u32| {
            let m16_tile = self.first_m16_tile + m16_tile;
            (m16_tile / STRIP_M16_TILES - strip) * strip_bytes + m16_tile % STRIP_M16_TILES * M16_CODE_BYTES
        };
        let lane = self.place.lane;
        seq!(M16_TILE in 0..8 {
            if M16_TILE < M16_TILES {
                self.codes[M16_TILE] = offset(M16_TILE) + lane * 16;
            }
        });
        self.brick = self.place.warp * K_TILE_BRICKS;
        // With fewer K-tiles than warps, some warps have nothing to multiply.
        self.m16_tiles = if self.place.warp < stream.k_tiles {
            self.arguments.runs.pass.min(self.end_m16_tile - self.first_m16_tile)
        } else {
            0
        };
        let first = stream.channel_pairs + self.place.warp * stream.k_tile_bytes;
        self.source = weights.strips + strip as u64 * strip_bytes as u64 + first as u64;
        // Two lanes copy the pairs of each m16 tile of each brick.
        let (m16_tile, brick) =
            (self.first_m16_tile + lane / 2 % M16_TILES as u32, lane / 2 / M16_TILES as u32);
        let in_strip = if stream.channel_pairs > 0 {
            0u32.wrapping_sub(first)
        } else {
            STRIP_K_TILE_CODE_BYTES + brick * stream.second_pairs
        };
        self.pairs = ((m16_tile / STRIP_M16_TILES - strip) * strip_bytes
            + m16_tile % STRIP_M16_TILES * M16_PAIR_BYTES
            + lane % 2 * 16)
            .wrapping_add(in_strip)
            .cast_signed();
    }

    /// Loads the next stage into the place of the one multiplied last, as one group of copies.
    ///
    /// A warp calls it before it multiplies a stage.
    /// The first time no stage has been multiplied, and the group is empty.
    ///
    /// # Safety
    /// As for [`fill`](Self::fill).
    #[inline(always)]
    pub(super) unsafe fn refill(&mut self) {
        if self.is_running {
            // SAFETY: the caller guarantees that the stage is free.
            unsafe { self.fill() };
        } else {
            self.is_running = true;
            copy::end_group();
        }
    }

    /// Loads the next stage, as one group of copies. After the last stage the group is empty.
    ///
    /// # Safety
    /// No lane still reads the stage that is overwritten.
    #[inline(always)]
    pub(super) unsafe fn fill(&mut self) {
        let shape = Self::SHAPE;
        let lane = self.place.lane;
        let stream = self.arguments.weights.stream;
        let m16_tiles = self.m16_tiles;
        // SAFETY: the stage has room for all copies; the m16 tiles and the bricks exist.
        unsafe {
            let to = self.fill + lane * 16;
            seq!(M16_TILE in 0..8 {
                if M16_TILE < M16_TILES {
                    copy::copy_16_if(
                        M16_TILE < m16_tiles,
                        to + M16_TILE * M16_CODE_BYTES,
                        self.source + self.codes[M16_TILE] as u64,
                    );
                }
            });
            if shape.stage_bricks == 2 {
                seq!(M16_TILE in 0..8 {
                    if M16_TILE < M16_TILES {
                        copy::copy_16_if(
                            M16_TILE < m16_tiles,
                            to + (M16_TILE + M16_TILES as u32) * M16_CODE_BYTES,
                            self.source + self.codes[M16_TILE] as u64 + CODE_BYTES as u64,
                        );
                    }
                });
            }
            let (m16_tile, brick) = (lane / 2 % M16_TILES as u32, lane / 2 / M16_TILES as u32);
            let has_pairs = brick < shape.stage_bricks && m16_tile < m16_tiles;
            let pairs = self.source.wrapping_add_signed(self.pairs as i64);
            copy::copy_16_if(has_pairs, to + shape.pairs_offset(), pairs);
        }
        copy::end_group();
        self.fill = self.next(self.fill);
        // Advance to the warp's next K-tile, or to the second brick of this one.
        let next_k_tile = WARPS * stream.k_tile_bytes;
        let (bricks, bytes, pairs) = if shape.stage_bricks == K_TILE_BRICKS {
            (WARPS * K_TILE_BRICKS, next_k_tile, 0)
        } else if self.brick.is_multiple_of(K_TILE_BRICKS) {
            (1, CODE_BYTES as u32, stream.second_pairs.cast_signed() - CODE_BYTES as i32)
        } else {
            let pairs = CODE_BYTES as i32 - stream.second_pairs.cast_signed();
            ((WARPS - 1) * K_TILE_BRICKS + 1, next_k_tile - CODE_BYTES as u32, pairs)
        };
        self.brick += bricks;
        self.source += bytes as u64;
        self.pairs += if stream.channel_pairs > 0 { -bytes.cast_signed() } else { pairs };
        let is_over = self.brick >= stream.k_tiles * K_TILE_BRICKS;
        if is_over && self.m16_tiles > 0 {
            self.first_m16_tile += self.m16_tiles;
            self.begin_pass();
        }
    }

    /// Returns the address of the stage behind the one at `stage`.
    #[inline(always)]
    pub(super) fn next(&self, stage: u32) -> u32 {
        let next = stage + Self::SHAPE.weight_stage_bytes();
        let start = self.place.weights(Self::SHAPE);
        if next == start + Self::SHAPE.weight_ring_bytes() { start } else { next }
    }
}
