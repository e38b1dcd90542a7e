//! The kernel's tile shapes and how each lays out shared memory, so that the host asks for what the device
//! carves up.
//!
//! A thread block computes `strips` × 64 channels and `tokens` tokens of the output. Each strip has one consumer
//! warpgroup, or two that share its K: the one takes the first brick of every span, the other the second, and in the
//! end each adds up half of the tokens. Two to eight blocks can share a tile's K, too: the first takes the first steps,
//! the second, and so on, and in the end each adds up a part of the tokens (cluster split-K). A pipeline stage holds one or two spans of 128 of K: the activation tile of each,
//! then each strip's bricks. The blocks of a cluster that don't share K lie side by side along the channels and share the activation
//! tiles: each loads its part of them for all.

use crate::brick::{BRICK_BYTES, BRICK_CHANNELS, BRICK_K, CODE_BYTES};

/// Threads of a warpgroup.
pub const WARPGROUP: u32 = 128;
/// Bricks along K in one span.
pub const SPAN_BRICKS: u32 = 2;
/// K extent of a span; in int8 also the bytes of an activation row, which are those that the 128-byte swizzle permutes.
pub const SPAN_K: u32 = SPAN_BRICKS * BRICK_K as u32;
/// Bytes of one strip's codes in a span, behind which its pairs lie.
pub const STRIP_SPAN_CODE_BYTES: u32 = SPAN_BRICKS * CODE_BYTES as u32;
/// Bytes of one strip's codes and pairs in a span.
pub const STRIP_SPAN_BYTES: u32 = SPAN_BRICKS * BRICK_BYTES as u32;
/// Shared memory that a thread block may ask for on compute capability 9.0.
pub const MAX_SHARED_BYTES: u32 = 232_448;
/// The most thread blocks of a cluster. Clusters of four leave multiprocessors empty.
pub const MAX_CLUSTER: u32 = 2;
/// The most bytes of a stage of two spans: larger ones would be too few.
const MAX_TWO_SPANS_BYTES: u32 = 36 * 1024;
/// Bytes of the barriers of a consumer's exchange with another block: its sums of two rounds are there, and the other block has taken
/// those from here.
pub const SPLIT_BARRIERS_BYTES: u32 = 3 * 8;
/// The most tokens that a consumer transposes at a time.
pub const MAX_EPILOGUE_TOKENS: u32 = 32;
/// The most bytes through which the two consumers of a strip exchange sums at a time.
const MAX_EXCHANGE_BYTES: u32 = 32_768;

/// A block's tile, its consumers, and the depth of its ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TileShape {
    /// 64-channel strips.
    pub strips: u32,
    /// Tokens: the n of the wgmma instruction.
    pub tokens: u32,
    /// Consumers that share a strip's K: 1 or 2.
    pub halves: u32,
    /// Thread blocks, a cluster, that share a tile's K and exchange sums through distributed shared memory: 1 to 8.
    pub split: u32,
    /// Stages of the ring.
    pub stages: u32,
}

/// The shape with the deepest ring that fits: what the ring holds is on its way while a launch before this one ends.
const fn shape(strips: u32, tokens: u32, halves: u32, split: u32) -> TileShape {
    let flat = TileShape { strips, tokens, halves, split, stages: 0 };
    let stages = (MAX_SHARED_BYTES - flat.shared_bytes()) / flat.stage_bytes();
    TileShape { stages, ..flat }
}

/// Calls the macro `$callback` with every tile shape that has a kernel, by tokens and then by channels. This is the one list: the
/// kernels' entry points, the embedded PTX and [`TILE_SHAPES`] follow from it.
///
/// Each line is `entry: strips, tokens, consumers of a strip, blocks that share K, threads of a block, module of the kernel;`. The name
/// is `gemm_<channels>x<tokens>`, with the number of blocks that share K behind it; the module is `gemm` or, where the consumers load
/// for themselves, `wide`.
#[macro_export]
macro_rules! tile_shapes {
    ($callback:ident) => {
        $callback! {
            gemm_128x8: 2, 8, 1, 1, 320, gemm;
            gemm_64x16: 1, 16, 2, 1, 320, gemm;
            gemm_128x16: 2, 16, 1, 1, 320, gemm;
            gemm_192x16: 3, 16, 1, 1, 448, gemm;
            gemm_128x24: 2, 24, 1, 1, 320, gemm;
            gemm_64x16_split2: 1, 16, 2, 2, 320, gemm;
            gemm_64x16_split4: 1, 16, 2, 4, 320, gemm;
            gemm_64x32: 1, 32, 2, 1, 320, gemm;
            gemm_128x32: 2, 32, 1, 1, 320, gemm;
            gemm_192x32: 3, 32, 1, 1, 448, gemm;
            gemm_64x32_split2: 1, 32, 2, 2, 320, gemm;
            gemm_64x32_split4: 1, 32, 2, 4, 320, gemm;
            gemm_64x48: 1, 48, 2, 1, 320, gemm;
            gemm_128x48: 2, 48, 1, 1, 320, gemm;
            gemm_192x48: 3, 48, 1, 1, 448, gemm;
            gemm_64x64: 1, 64, 2, 1, 320, gemm;
            gemm_128x64: 2, 64, 1, 1, 320, gemm;
            gemm_192x64: 3, 64, 1, 1, 448, gemm;
            gemm_64x64_split2: 1, 64, 2, 2, 320, gemm;
            gemm_64x80: 1, 80, 2, 1, 320, gemm;
            gemm_128x80: 2, 80, 1, 1, 320, gemm;
            gemm_192x80: 3, 80, 1, 1, 448, gemm;
            gemm_64x96: 1, 96, 2, 1, 320, gemm;
            gemm_128x96: 2, 96, 1, 1, 320, gemm;
            gemm_192x96: 3, 96, 1, 1, 512, gemm;
            gemm_64x96_split2: 1, 96, 2, 2, 320, gemm;
            gemm_128x96_split2: 2, 96, 1, 2, 320, gemm;
            gemm_64x96_split4: 1, 96, 2, 4, 320, gemm;
            gemm_128x112: 2, 112, 1, 1, 320, gemm;
            gemm_192x112: 3, 112, 1, 1, 512, gemm;
            gemm_128x112_split2: 2, 112, 1, 2, 320, gemm;
            gemm_64x128: 1, 128, 2, 1, 384, gemm;
            gemm_128x128: 2, 128, 1, 1, 384, gemm;
            gemm_192x128: 3, 128, 1, 1, 512, gemm;
            gemm_64x128_split2: 1, 128, 2, 2, 384, gemm;
            gemm_128x128_split2: 2, 128, 1, 2, 384, gemm;
            gemm_192x128_split2: 3, 128, 1, 2, 512, gemm;
            gemm_128x144: 2, 144, 1, 1, 384, gemm;
            gemm_192x144: 3, 144, 1, 1, 384, wide;
            gemm_128x160: 2, 160, 1, 1, 384, gemm;
            gemm_192x160: 3, 160, 1, 1, 384, wide;
            gemm_128x176: 2, 176, 1, 1, 384, gemm;
            gemm_192x176: 3, 176, 1, 1, 384, wide;
            gemm_128x192: 2, 192, 1, 1, 384, gemm;
            gemm_192x192: 3, 192, 1, 1, 384, wide;
            gemm_128x208: 2, 208, 1, 1, 384, gemm;
            gemm_192x208: 3, 208, 1, 1, 384, wide;
            gemm_128x224: 2, 224, 1, 1, 384, gemm;
            gemm_192x224: 3, 224, 1, 1, 384, wide;
            gemm_128x240: 2, 240, 1, 1, 384, gemm;
            gemm_192x240: 3, 240, 1, 1, 384, wide;
            gemm_128x256: 2, 256, 1, 1, 384, gemm;
            gemm_192x256: 3, 256, 1, 1, 384, wide;
        }
    };
}

macro_rules! shapes {
    ($($entry:ident: $strips:literal, $tokens:literal, $halves:literal, $split:literal, $threads:literal, $module:ident;)*) => {
        /// Every tile shape that has a kernel, by tokens and then by channels.
        pub const TILE_SHAPES: [TileShape; [$($tokens),*].len()] =
            [$(shape($strips, $tokens, $halves, $split)),*];

        /// The kernels' entry points, in the order of [`TILE_SHAPES`].
        pub const TILE_ENTRIES: [&str; TILE_SHAPES.len()] = [$(stringify!($entry)),*];
    };
}
tile_shapes!(shapes);

impl TileShape {
    /// The first shape with this many tokens.
    #[must_use]
    pub const fn with_tokens(tokens: u32) -> Option<Self> {
        let mut index = 0;
        while index < TILE_SHAPES.len() {
            if TILE_SHAPES[index].tokens == tokens {
                return Some(TILE_SHAPES[index]);
            }
            index += 1;
        }
        None
    }

    /// The shape of this many strips, tokens, halves and blocks that share a tile's K.
    #[must_use]
    pub const fn find(strips: u32, tokens: u32, halves: u32, split: u32) -> Option<Self> {
        let mut index = 0;
        while index < TILE_SHAPES.len() {
            let shape = TILE_SHAPES[index];
            if shape.strips == strips
                && shape.tokens == tokens
                && shape.halves == halves
                && shape.split == split
            {
                return Some(shape);
            }
            index += 1;
        }
        None
    }

    /// Output channels of a block's tile.
    #[must_use]
    pub const fn channels(self) -> u32 {
        self.strips * BRICK_CHANNELS as u32
    }

    /// Consumer warpgroups.
    #[must_use]
    pub const fn consumers(self) -> u32 {
        self.strips * self.halves
    }

    /// Whether the producer is a whole warpgroup that gives registers to the consumers, as large accumulators
    /// need it, rather than just its two warps, or none at all.
    #[must_use]
    pub const fn moves_registers(self) -> bool {
        let most_tokens = if self.consumers() > 2 { 80 } else { 112 };
        self.tokens > most_tokens && self.has_producers()
    }

    /// Whether two warps of their own fill the ring, one with bricks and one with activations. Three consumers of more than 128 tokens leave
    /// them no registers: one of their own warps does it.
    #[must_use]
    pub const fn has_producers(self) -> bool {
        self.consumers() < 3 || self.tokens <= 128
    }

    /// Arrivals at a span's full barrier: one of each warp that fills it.
    #[must_use]
    pub const fn full_arrivals(self) -> u32 {
        if self.has_producers() { 2 } else { 1 }
    }

    /// Whether tiles can be shared among workers step by step.
    #[must_use]
    pub const fn can_stream(self) -> bool {
        self.split == 1 && self.has_producers()
    }

    /// Registers that a thread of the producer keeps where it gives some away.
    #[must_use]
    pub const fn producer_registers(self) -> u32 {
        if self.consumers() > 2 { 24 } else { 40 }
    }

    /// Registers that a thread of a consumer then has.
    #[must_use]
    pub const fn consumer_registers(self) -> u32 {
        if self.consumers() > 2 { 160 } else { 232 }
    }

    /// Whether 16-bit results leave by the copy engine where rows allow it: a small tile's stores are sooner done
    /// by the threads themselves.
    #[must_use]
    pub const fn maps_output(self) -> bool {
        self.tokens >= 128
    }

    /// Threads of a block.
    #[must_use]
    pub const fn threads(self) -> u32 {
        let producers = match (self.has_producers(), self.moves_registers()) {
            (false, _) => 0,
            (true, false) => 64,
            (true, true) => WARPGROUP,
        };
        self.consumers() * WARPGROUP + producers
    }

    /// The largest cluster: every block must load whole groups of eight tokens, which the swizzle permutes. Where blocks share a tile's K,
    /// it is the only one.
    #[must_use]
    pub const fn max_cluster(self) -> u32 {
        if self.split > 1 {
            self.split
        } else if self.tokens.is_multiple_of(8 * MAX_CLUSTER) {
            MAX_CLUSTER
        } else {
            1
        }
    }

    /// Tokens of the tile that one consumer adds up: all of its strip's, or half of them. Of a tile of eight the first half has
    /// all.
    #[must_use]
    pub const fn kept_tokens(self) -> u32 {
        if self.tokens == 8 { 8 } else { self.tokens / self.halves }
    }

    /// And those that it finishes. Where blocks share the tile's K, the kept tokens are divided among them, in whole groups of eight: some
    /// blocks may be left without.
    #[inline(always)]
    #[must_use]
    pub const fn finished_tokens(self) -> u32 {
        let groups = self.kept_tokens() / 8;
        // Without a loop, which would be left in the kernels.
        match groups.div_ceil(self.split) {
            least if groups.is_multiple_of(least) => least * 8,
            least if groups.is_multiple_of(least + 1) => (least + 1) * 8,
            _ => groups * 8,
        }
    }

    /// Blocks that finish tokens, the first ones of those that share the tile's K.
    #[inline(always)]
    #[must_use]
    pub const fn finishers(self) -> u32 {
        self.kept_tokens() / self.finished_tokens()
    }

    /// Which of a consumer's [`finishers`](Self::finishers) parts the eight tokens of its accumulator's block `j` are. A block's own part
    /// comes first.
    #[inline(always)]
    #[must_use]
    pub const fn part_of_block(self, j: u32) -> u32 {
        j * 8 % self.kept_tokens() / self.finished_tokens()
    }

    /// The block that finishes the part in this position of the accumulators of block `rank`: each begins with its own.
    #[inline(always)]
    #[must_use]
    pub const fn finisher(self, rank: u32, position: u32) -> u32 {
        let finisher = if rank < self.finishers() { position + rank } else { position };
        if finisher >= self.finishers() { finisher - self.finishers() } else { finisher }
    }

    /// Where a block that finishes tokens keeps the sums that it gets from block `rank`, another one: a slot of its `split` − 1.
    #[inline(always)]
    #[must_use]
    pub const fn slot(self, finisher: u32, rank: u32) -> u32 {
        if rank > finisher { rank - finisher - 1 } else { rank + self.split - finisher - 1 }
    }

    /// Tokens of an activation box, for clusters of so many blocks. Where blocks share activations, each loads a part of the tile's tokens
    /// for all; where they share K, each puts the tokens that it finishes first.
    #[must_use]
    pub const fn box_tokens(self, cluster: u32) -> u32 {
        if self.split > 1 { self.finished_tokens() } else { self.tokens / cluster }
    }

    /// Spans of a stage: what belongs to a stage besides multiplying costs the consumers of few tokens the more.
    #[must_use]
    pub const fn spans(self) -> u32 {
        if 2 * (self.span_bytes() + self.strips * STRIP_SPAN_BYTES) <= MAX_TWO_SPANS_BYTES { 2 } else { 1 }
    }

    /// Bricks of a strip in a stage, along K.
    #[must_use]
    pub const fn stage_bricks(self) -> u32 {
        self.spans() * SPAN_BRICKS
    }

    /// K extent of a stage.
    #[must_use]
    pub const fn stage_k(self) -> u32 {
        self.spans() * SPAN_K
    }

    /// Bytes of one strip's bricks in a stage.
    #[must_use]
    pub const fn strip_stage_bytes(self) -> u32 {
        self.spans() * STRIP_SPAN_BYTES
    }

    /// Bytes of a span's activation tile.
    #[must_use]
    pub const fn span_bytes(self) -> u32 {
        self.tokens * SPAN_K
    }

    /// Bytes of a stage's activation tiles.
    #[must_use]
    pub const fn activation_bytes(self) -> u32 {
        self.spans() * self.span_bytes()
    }

    /// Offset of a stage's bricks in it, behind the activation tiles: strip by strip.
    #[must_use]
    pub const fn bricks_offset(self) -> u32 {
        self.activation_bytes()
    }

    /// Offset of a stage's barriers in it, 8 bytes each: a full one for each span, then the empty one.
    #[must_use]
    pub const fn barriers_offset(self) -> u32 {
        self.bricks_offset() + self.strips * self.strip_stage_bytes()
    }

    /// Bytes of a stage with all that belongs to it, so that one address leads to everything. The ring lies at offset
    /// 0 of shared memory.
    #[must_use]
    pub const fn stage_bytes(self) -> u32 {
        // The activations' swizzle repeats every 1,024 bytes.
        (self.barriers_offset() + (self.spans() + 1) * 8).next_multiple_of(1024)
    }

    /// Tokens that a consumer transposes at a time in the epilogue. TMA stores whole rounds; threads may store a shorter last one.
    #[inline(always)]
    #[must_use]
    pub const fn epilogue_tokens(self) -> u32 {
        // Without a loop, which would be left in the kernels.
        match self.finished_tokens() {
            finished if !self.maps_output() && finished < MAX_EPILOGUE_TOKENS => finished,
            finished if !self.maps_output() || finished.is_multiple_of(MAX_EPILOGUE_TOKENS) => {
                MAX_EPILOGUE_TOKENS
            }
            finished if finished.is_multiple_of(24) => 24,
            finished if finished.is_multiple_of(16) => 16,
            _ => 8,
        }
    }

    /// Rounds in which a consumer transposes its results.
    #[inline(always)]
    #[must_use]
    pub const fn epilogue_rounds(self) -> u32 {
        self.finished_tokens().div_ceil(self.epilogue_tokens())
    }

    /// Tokens of a round.
    #[inline(always)]
    #[must_use]
    pub const fn round_tokens(self, round: u32) -> u32 {
        let left = self.finished_tokens() - round * self.epilogue_tokens();
        if left < self.epilogue_tokens() { left } else { self.epilogue_tokens() }
    }

    /// Where the eight tokens of an accumulator's block `j` lie among those that the consumer which finishes them does: the block's
    /// number there.
    #[inline(always)]
    const fn finished_block(self, j: u32) -> u32 {
        j % (self.kept_tokens() / 8) % (self.finished_tokens() / 8)
    }

    /// The round to which the eight tokens of an accumulator's block `j` belong, in the consumer that finishes them.
    #[inline(always)]
    #[must_use]
    pub const fn round_of_block(self, j: u32) -> u32 {
        self.finished_block(j) * 8 / self.epilogue_tokens()
    }

    /// Which of its round's blocks of eight tokens block `j` is.
    #[inline(always)]
    #[must_use]
    pub const fn block_in_round(self, j: u32) -> u32 {
        self.finished_block(j) % (self.epilogue_tokens() / 8)
    }

    /// Transposition buffers of a consumer: while one or two are stored, the next is filled.
    #[must_use]
    pub const fn epilogue_buffers(self) -> u32 {
        match self.epilogue_rounds() {
            1 => 1,
            // Shared memory has room for a third besides the deepest ring.
            _ if !self.has_producers() => 3,
            _ => 2,
        }
    }

    /// Bytes of one transposition buffer: 64 channels of 2 bytes a token.
    #[must_use]
    pub const fn epilogue_buffer_bytes(self) -> u32 {
        self.epilogue_tokens() * 128
    }

    /// Bytes of a consumer's transposition buffers.
    #[must_use]
    pub const fn epilogue_bytes(self) -> u32 {
        self.epilogue_buffers() * self.epilogue_buffer_bytes()
    }

    /// Offset of the consumers' transposition buffers.
    #[must_use]
    pub const fn epilogue_offset(self) -> u32 {
        self.stages * self.stage_bytes()
    }

    /// Bytes of one strip's sums, 64 × `tokens` int32.
    #[must_use]
    pub const fn strip_sums_bytes(self) -> u32 {
        BRICK_CHANNELS as u32 * self.tokens * 4
    }

    /// Rounds in which the two consumers of a strip exchange their sums.
    #[must_use]
    pub const fn exchange_rounds(self) -> u32 {
        self.strip_sums_bytes().div_ceil(MAX_EXCHANGE_BYTES)
    }

    /// Bytes through which the two consumers of one strip exchange the sums of a round; 0 where it has only one.
    #[must_use]
    pub const fn exchange_bytes(self) -> u32 {
        if self.halves == 1 { 0 } else { self.strip_sums_bytes() / self.exchange_rounds() }
    }

    /// Offset of the strips' exchange buffers.
    #[must_use]
    pub const fn exchange_offset(self) -> u32 {
        self.epilogue_offset() + self.consumers() * self.epilogue_bytes()
    }

    /// Bytes of the sums that a consumer gets from each other block, where blocks share a tile's K.
    #[must_use]
    pub const fn slot_bytes(self) -> u32 {
        BRICK_CHANNELS as u32 * self.finished_tokens() * 4
    }

    /// Bytes of the sums that a consumer gets from all of them.
    #[must_use]
    pub const fn split_bytes(self) -> u32 {
        (self.split - 1) * self.slot_bytes()
    }

    /// Offset of the buffers in which consumers get them.
    #[must_use]
    pub const fn split_offset(self) -> u32 {
        self.exchange_offset() + self.strips * self.exchange_bytes()
    }

    /// Offset of the consumers' token scales, `tokens` f32 each.
    #[must_use]
    pub const fn token_scales_offset(self) -> u32 {
        self.split_offset() + self.consumers() * self.split_bytes()
    }

    /// Offset of the consumers' channel scales and biases, two f32 a channel.
    #[must_use]
    pub const fn channels_offset(self) -> u32 {
        self.token_scales_offset() + self.consumers() * self.tokens * 4
    }

    /// Offset of the barriers of that exchange, [`SPLIT_BARRIERS_BYTES`] for each consumer.
    #[must_use]
    pub const fn split_barriers_offset(self) -> u32 {
        self.channels_offset() + self.consumers() * BRICK_CHANNELS as u32 * 8
    }

    /// Dynamic shared memory of a thread block.
    #[must_use]
    pub const fn shared_bytes(self) -> u32 {
        self.split_barriers_offset()
            + if self.split == 1 { 0 } else { self.consumers() * SPLIT_BARRIERS_BYTES }
    }

    /// Bytes of the int32 partial sums that a block hands to a tile's owner.
    #[must_use]
    pub const fn partial_bytes(self) -> u32 {
        self.strips * self.strip_sums_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shape_fits_shared_memory_and_keeps_its_alignments() {
        for shape in TILE_SHAPES {
            assert!(shape.shared_bytes() <= MAX_SHARED_BYTES, "{shape:?} takes {}", shape.shared_bytes());
            assert_eq!(shape.span_bytes() % 1024, 0, "128-byte swizzle repeats every 1,024 bytes");
            assert_eq!(shape.bricks_offset() % 16, 0, "bulk copies land on 16 bytes");
            assert_eq!(shape.exchange_offset() % 16, 0, "sums are exchanged 16 bytes at a time");
            assert_eq!(shape.split_offset() % 16, 0, "between blocks, too");
            assert_eq!(shape.split_barriers_offset() % 8, 0);
            assert!(shape.split == 1 || shape.epilogue_rounds() <= 2, "there are barriers for two rounds");
            assert!(shape.tokens / shape.finished_tokens() <= 16, "the producer loads up to 16 boxes");
            assert!(shape.split <= 8, "clusters of more blocks are not portable");
            assert!(shape.split.is_power_of_two(), "{shape:?}");
            assert_eq!(shape.barriers_offset() % 8, 0);
        }
    }

    #[test]
    fn rings_are_as_deep_as_shared_memory_allows() {
        for shape in TILE_SHAPES {
            assert!(shape.shared_bytes() + shape.stage_bytes() > MAX_SHARED_BYTES, "{shape:?}");
            // The widest tile has stages of 45 KB.
            let least = if shape.has_producers() { 5 } else { 4 };
            assert!(shape.stages * shape.spans() >= least, "{shape:?}");
        }
    }

    #[test]
    fn the_warpgroups_share_one_register_file() {
        for shape in TILE_SHAPES.iter().filter(|shape| shape.moves_registers()) {
            let consumers = shape.consumers() * shape.consumer_registers();
            assert!(WARPGROUP * (shape.producer_registers() + consumers) <= 65_536, "{shape:?}");
        }
    }

    #[test]
    fn the_tile_of_a_cluster_divides_into_whole_swizzle_atoms() {
        for shape in TILE_SHAPES {
            assert_eq!(shape.box_tokens(shape.max_cluster()) % 8, 0);
        }
    }

    #[test]
    fn entries_are_named_after_their_shapes() {
        for (shape, entry) in TILE_SHAPES.into_iter().zip(TILE_ENTRIES) {
            let split = if shape.split > 1 { format!("_split{}", shape.split) } else { String::new() };
            assert_eq!(entry, format!("gemm_{}x{}{split}", shape.channels(), shape.tokens));
        }
    }

    #[test]
    fn results_are_transposed_in_rounds_of_whole_blocks() {
        for shape in TILE_SHAPES {
            let rounds: Vec<u32> =
                (0..shape.epilogue_rounds()).map(|round| shape.round_tokens(round)).collect();
            assert_eq!(rounds.iter().sum::<u32>(), shape.finished_tokens(), "{shape:?}");
            for (index, &tokens) in rounds.iter().enumerate() {
                assert!((8..=MAX_EPILOGUE_TOKENS).contains(&tokens) && tokens % 8 == 0, "{shape:?}");
                let is_whole = tokens == shape.epilogue_tokens();
                assert!(is_whole || !shape.maps_output() && index + 1 == rounds.len(), "{shape:?}");
            }
            let blocks = (0..shape.finished_tokens() / 8)
                .map(|j| shape.round_of_block(j) * shape.epilogue_tokens() + shape.block_in_round(j) * 8);
            assert!(blocks.eq((0..shape.finished_tokens()).step_by(8)), "{shape:?}");
        }
    }

    #[test]
    fn every_part_of_a_tile_has_one_finisher_that_keeps_each_other_block_apart() {
        for shape in TILE_SHAPES.into_iter().filter(|shape| shape.split > 1) {
            for rank in 0..shape.split {
                let mut finishers: Vec<u32> =
                    (0..shape.finishers()).map(|position| shape.finisher(rank, position)).collect();
                assert!(rank >= shape.finishers() || finishers[0] == rank, "{shape:?}");
                finishers.sort_unstable();
                assert_eq!(finishers, (0..shape.finishers()).collect::<Vec<_>>(), "{shape:?}");
            }
            for finisher in 0..shape.finishers() {
                let others = (0..shape.split).filter(|&rank| rank != finisher);
                let mut slots: Vec<u32> = others.map(|rank| shape.slot(finisher, rank)).collect();
                slots.sort_unstable();
                assert_eq!(slots, (0..shape.split - 1).collect::<Vec<_>>(), "{shape:?}");
            }
        }
    }

    #[test]
    fn shapes_are_found_by_what_tells_them_apart() {
        for shape in TILE_SHAPES {
            assert_eq!(TileShape::find(shape.strips, shape.tokens, shape.halves, shape.split), Some(shape));
        }
        assert_eq!(TileShape::find(7, 8, 1, 1), None);
    }
}
