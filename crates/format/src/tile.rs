//! The tile shapes of the kernels, and the shared-memory layout of each.
//!
//! The host requests the size that these functions compute (`host/src/plan`, `host/src/gpu/gemm.rs`).
//! `kernels-gpu/src/block.rs` carves up the memory by the same functions.
//!
//! A thread block computes `strips` × 64 channels and `tokens` tokens of the output.
//! Each strip has one consumer warpgroup, or two that share its K (warpgroup split-K).
//! Of two consumers, one takes the first brick of every K-tile and the other takes the second.
//! At the end each of them adds up half of the tokens.
//!
//! Two to eight thread blocks of a cluster can share a tile's K as well (cluster split-K).
//! The first takes the first k-iterations, the second the next ones, and so on.
//! At the end each of them adds up a part of the tokens.
//!
//! Other clusters place their thread blocks side by side along the channels.
//! These share the activation tiles: each thread block loads a part of them for the whole cluster.
//!
//! A pipeline stage holds one or two K-tiles: the activation tile of each, then the bricks of each strip.

use crate::brick::{BRICK_BYTES, BRICK_CHANNELS, BRICK_K, CODE_BYTES};

/// Threads per warpgroup.
pub const WARPGROUP: u32 = 128;
/// Bricks along K in one K-tile.
pub const K_TILE_BRICKS: u32 = 2;
/// K extent of a K-tile.
/// This is also the size in bytes of an int8 activation row, which the 128-byte swizzle permutes.
pub const K_TILE: u32 = K_TILE_BRICKS * BRICK_K as u32;
/// Bytes of one strip's codes in a K-tile. The pairs follow them.
pub const STRIP_K_TILE_CODE_BYTES: u32 = K_TILE_BRICKS * CODE_BYTES as u32;
/// Bytes of one strip's codes and pairs in a K-tile.
pub const STRIP_K_TILE_BYTES: u32 = K_TILE_BRICKS * BRICK_BYTES as u32;
/// The most shared memory that a thread block may request on compute capability 9.0.
pub const MAX_SHARED_BYTES: u32 = 232_448;
/// The most thread blocks of a cluster that share activation tiles.
/// Clusters of four would leave SMs empty.
pub const MAX_CLUSTER: u32 = 2;
/// The most bytes of a stage with two K-tiles.
/// With larger stages the ring would have too few of them.
const MAX_TWO_K_TILES_BYTES: u32 = 36 * 1024;
/// The most thread blocks that share a tile's K (cluster split-K).
pub const MAX_CLUSTER_SPLIT: u32 = 4;
/// The most rounds in which a consumer receives another thread block's sums (cluster split-K).
pub const MAX_SPLIT_ROUNDS: u32 = 2;
/// Bytes of one consumer's barriers for the exchange of cluster split-K.
/// One barrier per round signals that the sums of that round have arrived here.
/// One more signals that the other thread blocks have taken the sums sent from here.
pub const SPLIT_BARRIERS_BYTES: u32 = (MAX_SPLIT_ROUNDS + 1) * 8;
/// The most tokens of one wgmma instruction. Larger tiles multiply by two instructions.
pub const MAX_WGMMA_TOKENS: u32 = 256;
/// The most tokens that a consumer transposes at a time.
pub const MAX_EPILOGUE_TOKENS: u32 = 32;
/// The most bytes through which the two consumers of a strip exchange sums at a time.
const MAX_EXCHANGE_BYTES: u32 = 32_768;

/// The tile of a thread block, its consumers, and the depth of its ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TileShape {
    /// 64-channel strips.
    pub strips: u32,
    /// Tokens, which are the n of the wgmma instruction, or of two instructions together.
    pub tokens: u32,
    /// Consumers that share a strip's K (warpgroup split-K): 1 or 2.
    pub warpgroup_split: u32,
    /// Thread blocks of a cluster that share a tile's K (cluster split-K): 1 to 8.
    /// They exchange sums through distributed shared memory.
    pub cluster_split: u32,
    /// Stages of the ring.
    pub stages: u32,
}

/// Returns the shape with the deepest ring that fits.
/// A deep ring lets a kernel load more while the previous launch ends.
const fn shape(strips: u32, tokens: u32, warpgroup_split: u32, cluster_split: u32) -> TileShape {
    let flat = TileShape { strips, tokens, warpgroup_split, cluster_split, stages: 0 };
    let stages = (MAX_SHARED_BYTES - flat.shared_bytes()) / flat.stage_bytes();
    TileShape { stages, ..flat }
}

/// Calls the macro `$callback` with every tile shape that has a kernel.
///
/// This is the only list of shapes.
/// The kernels' entry points, the embedded PTX and [`TILE_SHAPES`](crate::tile::TILE_SHAPES) follow from it.
///
/// Each line is `entry: strips, tokens, warpgroup_split, cluster_split, threads of a thread block, module;`.
/// The entry is named `gemm_<channels>x<tokens>`.
/// Under cluster split-K, `_split` and the number of thread blocks that share K follow.
/// The module is `gemm`, or `consumer_loaded` if the consumers fill the ring themselves.
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
            gemm_192x144: 3, 144, 1, 1, 384, consumer_loaded;
            gemm_128x160: 2, 160, 1, 1, 384, gemm;
            gemm_192x160: 3, 160, 1, 1, 384, consumer_loaded;
            gemm_128x160_split2: 2, 160, 1, 2, 384, gemm;
            gemm_128x176: 2, 176, 1, 1, 384, gemm;
            gemm_192x176: 3, 176, 1, 1, 384, consumer_loaded;
            gemm_128x176_split2: 2, 176, 1, 2, 384, gemm;
            gemm_128x192: 2, 192, 1, 1, 384, gemm;
            gemm_192x192: 3, 192, 1, 1, 384, consumer_loaded;
            gemm_128x208: 2, 208, 1, 1, 384, gemm;
            gemm_192x208: 3, 208, 1, 1, 384, consumer_loaded;
            gemm_128x224: 2, 224, 1, 1, 384, gemm;
            gemm_192x224: 3, 224, 1, 1, 384, consumer_loaded;
            gemm_128x240: 2, 240, 1, 1, 384, gemm;
            gemm_192x240: 3, 240, 1, 1, 384, consumer_loaded;
            gemm_128x256: 2, 256, 1, 1, 384, gemm;
            gemm_192x256: 3, 256, 1, 1, 384, consumer_loaded;
        }
    };
}

macro_rules! shapes {
    ($($entry:ident: $strips:literal, $tokens:literal, $warpgroup_split:literal, $cluster_split:literal, $threads:literal, $module:ident;)*) => {
        /// Every tile shape that has a kernel, in the order of [`tile_shapes!`](crate::tile_shapes).
        pub const TILE_SHAPES: [TileShape; [$($tokens),*].len()] =
            [$(shape($strips, $tokens, $warpgroup_split, $cluster_split)),*];

        /// The names of the kernels' entry points, in the order of [`TILE_SHAPES`].
        pub const TILE_ENTRIES: [&str; TILE_SHAPES.len()] = [$(stringify!($entry)),*];
    };
}
tile_shapes!(shapes);

impl TileShape {
    /// Returns the first shape with this many tokens.
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

    /// Returns the shape with these numbers of strips, tokens, consumers per strip
    /// and thread blocks that share a tile's K.
    #[must_use]
    pub const fn find(strips: u32, tokens: u32, warpgroup_split: u32, cluster_split: u32) -> Option<Self> {
        let mut index = 0;
        while index < TILE_SHAPES.len() {
            let shape = TILE_SHAPES[index];
            if shape.strips == strips
                && shape.tokens == tokens
                && shape.warpgroup_split == warpgroup_split
                && shape.cluster_split == cluster_split
            {
                return Some(shape);
            }
            index += 1;
        }
        None
    }

    /// Returns the output channels of a thread block's tile.
    #[must_use]
    pub const fn channels(self) -> u32 {
        self.strips * BRICK_CHANNELS as u32
    }

    /// Returns the number of consumer warpgroups.
    #[must_use]
    pub const fn consumers(self) -> u32 {
        self.strips * self.warpgroup_split
    }

    /// Returns whether the producer is a whole warpgroup that gives registers to the consumers.
    /// Large accumulators need this. Otherwise the producer is only two warps, or there is none.
    #[must_use]
    pub const fn moves_registers(self) -> bool {
        let most_tokens = if self.consumers() > 2 { 80 } else { 112 };
        self.tokens > most_tokens && self.has_producers()
    }

    /// Returns whether two producer warps fill the ring, one with bricks and one with activations.
    ///
    /// Three consumers with more than 128 tokens leave no registers for producers.
    /// One of the consumers' warps then fills the ring (consumer-loaded kernel).
    #[must_use]
    pub const fn has_producers(self) -> bool {
        self.consumers() < 3 || self.tokens <= 128
    }

    /// Returns the arrivals at a K-tile's full barrier: one from each warp that fills the K-tile.
    #[must_use]
    pub const fn full_arrivals(self) -> u32 {
        if self.has_producers() { 2 } else { 1 }
    }

    /// Returns whether several clusters may share a tile along K (stream-K).
    #[must_use]
    pub const fn can_stream_k(self) -> bool {
        self.cluster_split == 1 && self.has_producers()
    }

    /// Returns the registers that each producer thread keeps if the producer gives registers away.
    #[must_use]
    pub const fn producer_registers(self) -> u32 {
        if self.consumers() > 2 || self.tokens > MAX_WGMMA_TOKENS { 24 } else { 40 }
    }

    /// Returns the registers that each consumer thread has if the producer gives registers away.
    #[must_use]
    pub const fn consumer_registers(self) -> u32 {
        match self.consumers() {
            3.. => 160,
            _ if self.tokens > MAX_WGMMA_TOKENS => 240,
            _ => 232,
        }
    }

    /// Returns whether TMA stores 16-bit results if the output's rows start at multiples of 16 bytes.
    ///
    /// For small tiles, stores by the threads finish sooner.
    /// Under cluster split-K, TMA stores only whole rounds of [`MAX_EPILOGUE_TOKENS`], never fewer tokens.
    #[inline(always)]
    #[must_use]
    pub const fn maps_output(self) -> bool {
        let finished = self.tokens / (self.warpgroup_split * self.cluster_split);
        self.tokens >= 128 && (self.cluster_split == 1 || finished.is_multiple_of(MAX_EPILOGUE_TOKENS))
    }

    /// Returns the threads of a thread block.
    #[must_use]
    pub const fn threads(self) -> u32 {
        let producers = match (self.has_producers(), self.moves_registers()) {
            (false, _) => 0,
            (true, false) => 64,
            (true, true) => WARPGROUP,
        };
        self.consumers() * WARPGROUP + producers
    }

    /// Returns the size of the largest cluster.
    ///
    /// Each thread block must load whole groups of eight tokens, because the swizzle permutes such groups.
    /// Under cluster split-K, this size is the only one.
    #[must_use]
    pub const fn max_cluster(self) -> u32 {
        if self.cluster_split > 1 {
            self.cluster_split
        } else if self.tokens.is_multiple_of(8 * MAX_CLUSTER) {
            MAX_CLUSTER
        } else {
            1
        }
    }

    /// Returns the tokens of the tile that one consumer keeps and adds up.
    ///
    /// These are all tokens, or half of them under warpgroup split-K.
    /// In a tile of eight tokens, the first consumer of a strip keeps all of them.
    #[must_use]
    pub const fn kept_tokens(self) -> u32 {
        if self.tokens == 8 { 8 } else { self.tokens / self.warpgroup_split }
    }

    /// Returns the tokens that one consumer finishes.
    ///
    /// Under cluster split-K, the thread blocks divide the kept tokens among themselves,
    /// in whole groups of eight.
    /// Some thread blocks may finish none.
    #[inline(always)]
    #[must_use]
    pub const fn finished_tokens(self) -> u32 {
        let groups = self.kept_tokens() / 8;
        // Not a loop, because the compiler would leave it in the kernels.
        match groups.div_ceil(self.cluster_split) {
            least if groups.is_multiple_of(least) => least * 8,
            least if groups.is_multiple_of(least + 1) => (least + 1) * 8,
            _ => groups * 8,
        }
    }

    /// Returns the number of thread blocks that finish tokens.
    /// They are the first of those that share the tile's K.
    #[inline(always)]
    #[must_use]
    pub const fn finishers(self) -> u32 {
        self.kept_tokens() / self.finished_tokens()
    }

    /// Returns the part to which accumulator fragment `j` (the sums of eight tokens) belongs.
    ///
    /// A consumer's accumulator has [`finishers`](Self::finishers) parts.
    /// The part that the thread block itself finishes comes first.
    #[inline(always)]
    #[must_use]
    pub const fn part_of_fragment(self, j: u32) -> u32 {
        j * 8 % self.kept_tokens() / self.finished_tokens()
    }

    /// Returns the thread block that finishes a part of the tokens:
    /// the part at `position` in the accumulators of thread block `rank`.
    /// The accumulators of each finisher begin with its own part.
    #[inline(always)]
    #[must_use]
    pub const fn finisher(self, rank: u32, position: u32) -> u32 {
        let finisher = if rank < self.finishers() { position + rank } else { position };
        if finisher >= self.finishers() { finisher - self.finishers() } else { finisher }
    }

    /// Returns the slot in which thread block `finisher` receives the sums of another thread block, `rank`.
    /// There are `cluster_split` − 1 slots.
    #[inline(always)]
    #[must_use]
    pub const fn slot(self, finisher: u32, rank: u32) -> u32 {
        if rank > finisher { rank - finisher - 1 } else { rank + self.cluster_split - finisher - 1 }
    }

    /// Returns the tokens of an activation box, for clusters of `cluster` thread blocks.
    ///
    /// Thread blocks that share activations each load a part of the tile's tokens for the whole cluster.
    /// Under cluster split-K, each thread block puts the tokens that it finishes first,
    /// so a box holds the tokens that one consumer finishes.
    #[must_use]
    pub const fn box_tokens(self, cluster: u32) -> u32 {
        if self.cluster_split > 1 { self.finished_tokens() } else { self.tokens / cluster }
    }

    /// Returns the K-tiles of a stage: 1 or 2.
    /// Small token tiles use two, which halves the barrier overhead.
    #[must_use]
    pub const fn k_tiles(self) -> u32 {
        if 2 * (self.k_tile_bytes() + self.strips * STRIP_K_TILE_BYTES) <= MAX_TWO_K_TILES_BYTES {
            2
        } else {
            1
        }
    }

    /// Returns the bricks of one strip in a stage, along K.
    #[must_use]
    pub const fn stage_bricks(self) -> u32 {
        self.k_tiles() * K_TILE_BRICKS
    }

    /// Returns the K extent of a stage.
    #[must_use]
    pub const fn stage_k(self) -> u32 {
        self.k_tiles() * K_TILE
    }

    /// Returns the bytes of one strip's bricks in a stage.
    #[must_use]
    pub const fn strip_stage_bytes(self) -> u32 {
        self.k_tiles() * STRIP_K_TILE_BYTES
    }

    /// Returns the bytes of the activation tile of one K-tile.
    #[must_use]
    pub const fn k_tile_bytes(self) -> u32 {
        self.tokens * K_TILE
    }

    /// Returns the bytes of a stage's activation tiles.
    #[must_use]
    pub const fn activation_bytes(self) -> u32 {
        self.k_tiles() * self.k_tile_bytes()
    }

    /// Returns the offset of the bricks within a stage.
    /// They lie strip by strip behind the activation tiles.
    #[must_use]
    pub const fn bricks_offset(self) -> u32 {
        self.activation_bytes()
    }

    /// Returns the offset of the barriers within a stage, 8 bytes each.
    /// A full barrier for each K-tile comes first, then the empty barrier.
    #[must_use]
    pub const fn barriers_offset(self) -> u32 {
        self.bricks_offset() + self.strips * self.strip_stage_bytes()
    }

    /// Returns the bytes of a stage: activation tiles, bricks and barriers.
    ///
    /// They lie together so that one address leads to all of them.
    /// The ring starts at offset 0 of shared memory.
    #[must_use]
    pub const fn stage_bytes(self) -> u32 {
        // The swizzle of the activations repeats every 1,024 bytes.
        (self.barriers_offset() + (self.k_tiles() + 1) * 8).next_multiple_of(1024)
    }

    /// Returns the tokens that a consumer transposes in one round of the epilogue.
    /// TMA stores only whole rounds. Threads may store a shorter last round.
    #[inline(always)]
    #[must_use]
    pub const fn epilogue_tokens(self) -> u32 {
        // Not a loop, because the compiler would leave it in the kernels.
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

    /// Returns the rounds in which a consumer transposes its results.
    #[inline(always)]
    #[must_use]
    pub const fn epilogue_rounds(self) -> u32 {
        self.finished_tokens().div_ceil(self.epilogue_tokens())
    }

    /// Returns the tokens of an epilogue round.
    #[inline(always)]
    #[must_use]
    pub const fn round_tokens(self, round: u32) -> u32 {
        let left = self.finished_tokens() - round * self.epilogue_tokens();
        if left < self.epilogue_tokens() { left } else { self.epilogue_tokens() }
    }

    /// Returns the index of accumulator fragment `j` among the fragments of the consumer that finishes it.
    #[inline(always)]
    const fn finished_fragment(self, j: u32) -> u32 {
        j % (self.kept_tokens() / 8) % (self.finished_tokens() / 8)
    }

    /// Returns the epilogue round of accumulator fragment `j`, in the consumer that finishes it.
    #[inline(always)]
    #[must_use]
    pub const fn round_of_fragment(self, j: u32) -> u32 {
        self.finished_fragment(j) * 8 / self.epilogue_tokens()
    }

    /// Returns the epilogue rounds whose sums a consumer waits for at a time, under cluster split-K.
    #[inline(always)]
    const fn epilogue_rounds_per_split_round(self) -> u32 {
        self.epilogue_rounds().div_ceil(MAX_SPLIT_ROUNDS)
    }

    /// Returns the rounds in which a consumer receives the sums of the other thread blocks.
    /// It finishes one round while the next one arrives.
    #[inline(always)]
    #[must_use]
    pub const fn split_rounds(self) -> u32 {
        self.epilogue_rounds().div_ceil(self.epilogue_rounds_per_split_round())
    }

    /// Returns the round in which the sums of accumulator fragment `j` arrive.
    /// It is below [`split_rounds`](Self::split_rounds).
    #[inline(always)]
    #[must_use]
    pub const fn split_round_of_fragment(self, j: u32) -> u32 {
        self.round_of_fragment(j) / self.epilogue_rounds_per_split_round()
    }

    /// Returns the tokens whose sums arrive in a round of [`split_rounds`](Self::split_rounds).
    #[inline(always)]
    #[must_use]
    pub const fn split_round_tokens(self, round: u32) -> u32 {
        let each = self.epilogue_rounds_per_split_round() * self.epilogue_tokens();
        let left = self.finished_tokens() - round * each;
        if left < each { left } else { each }
    }

    /// Returns the index of accumulator fragment `j` within its epilogue round.
    #[inline(always)]
    #[must_use]
    pub const fn fragment_in_round(self, j: u32) -> u32 {
        self.finished_fragment(j) % (self.epilogue_tokens() / 8)
    }

    /// Returns the transposition buffers of a consumer.
    /// While one or two of them are being stored, the consumer fills the next.
    #[must_use]
    pub const fn epilogue_buffers(self) -> u32 {
        match self.epilogue_rounds() {
            1 => 1,
            // Here shared memory has room for a third buffer besides the deepest ring.
            _ if !self.has_producers() => 3,
            _ => 2,
        }
    }

    /// Returns the bytes of one transposition buffer: 64 channels of 2 bytes per token.
    #[must_use]
    pub const fn epilogue_buffer_bytes(self) -> u32 {
        self.epilogue_tokens() * 128
    }

    /// Returns the bytes of a consumer's transposition buffers.
    #[must_use]
    pub const fn epilogue_bytes(self) -> u32 {
        self.epilogue_buffers() * self.epilogue_buffer_bytes()
    }

    /// Returns the offset of the consumers' transposition buffers.
    #[must_use]
    pub const fn epilogue_offset(self) -> u32 {
        self.stages * self.stage_bytes()
    }

    /// Returns the bytes of one strip's sums: 64 × `tokens` int32.
    #[must_use]
    pub const fn strip_sums_bytes(self) -> u32 {
        BRICK_CHANNELS as u32 * self.tokens * 4
    }

    /// Returns the rounds in which the two consumers of a strip exchange their sums (warpgroup split-K).
    #[must_use]
    pub const fn exchange_rounds(self) -> u32 {
        self.strip_sums_bytes().div_ceil(MAX_EXCHANGE_BYTES)
    }

    /// Returns the bytes through which the two consumers of one strip exchange the sums of a round.
    /// 0 if a strip has only one consumer.
    #[must_use]
    pub const fn exchange_bytes(self) -> u32 {
        if self.warpgroup_split == 1 { 0 } else { self.strip_sums_bytes() / self.exchange_rounds() }
    }

    /// Returns the offset of the strips' exchange buffers.
    #[must_use]
    pub const fn exchange_offset(self) -> u32 {
        self.epilogue_offset() + self.consumers() * self.epilogue_bytes()
    }

    /// Returns the bytes of the sums that a consumer receives from each other thread block (cluster split-K).
    #[must_use]
    pub const fn slot_bytes(self) -> u32 {
        BRICK_CHANNELS as u32 * self.finished_tokens() * 4
    }

    /// Returns the bytes of the sums that a consumer receives from all other thread blocks (cluster split-K).
    #[must_use]
    pub const fn split_bytes(self) -> u32 {
        (self.cluster_split - 1) * self.slot_bytes()
    }

    /// Returns the offset of the buffers in which the consumers receive the sums of cluster split-K.
    #[must_use]
    pub const fn split_offset(self) -> u32 {
        self.exchange_offset() + self.strips * self.exchange_bytes()
    }

    /// Returns the offset of the consumers' token scales: `tokens` f32 for each consumer.
    #[must_use]
    pub const fn token_scales_offset(self) -> u32 {
        self.split_offset() + self.consumers() * self.split_bytes()
    }

    /// Returns the offset of the consumers' channel scales and biases: two f32 per channel.
    #[must_use]
    pub const fn channels_offset(self) -> u32 {
        self.token_scales_offset() + self.consumers() * self.tokens * 4
    }

    /// Returns the offset of the barriers of cluster split-K: [`SPLIT_BARRIERS_BYTES`] for each consumer.
    #[must_use]
    pub const fn split_barriers_offset(self) -> u32 {
        self.channels_offset() + self.consumers() * BRICK_CHANNELS as u32 * 8
    }

    /// Returns the dynamic shared memory of a thread block.
    #[must_use]
    pub const fn shared_bytes(self) -> u32 {
        self.split_barriers_offset()
            + if self.cluster_split == 1 { 0 } else { self.consumers() * SPLIT_BARRIERS_BYTES }
    }

    /// Returns the bytes of the int32 partial tile that a thread block hands to the tile's owner (stream-K).
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
            assert_eq!(shape.k_tile_bytes() % 1024, 0, "128-byte swizzle repeats every 1,024 bytes");
            assert_eq!(shape.bricks_offset() % 16, 0, "bulk copies land on 16 bytes");
            assert_eq!(shape.exchange_offset() % 16, 0, "sums are exchanged 16 bytes at a time");
            assert_eq!(shape.split_offset() % 16, 0, "between blocks, too");
            assert_eq!(shape.split_barriers_offset() % 8, 0);
            assert!(shape.split_rounds() <= MAX_SPLIT_ROUNDS, "{shape:?}");
            assert!(shape.tokens / shape.finished_tokens() <= 16, "the producer loads up to 16 boxes");
            assert!(shape.cluster_split <= MAX_CLUSTER_SPLIT, "clusters of more blocks are not portable");
            assert!(shape.cluster_split.is_power_of_two(), "{shape:?}");
            assert_eq!(shape.barriers_offset() % 8, 0);
        }
    }

    #[test]
    fn rings_are_as_deep_as_shared_memory_allows() {
        for shape in TILE_SHAPES {
            assert!(shape.shared_bytes() + shape.stage_bytes() > MAX_SHARED_BYTES, "{shape:?}");
            // The largest tile has stages of 45 KiB.
            let least = if shape.has_producers() { 5 } else { 4 };
            assert!(shape.stages * shape.k_tiles() >= least, "{shape:?}");
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
            let cluster_split = if shape.cluster_split > 1 {
                format!("_split{}", shape.cluster_split)
            } else {
                String::new()
            };
            assert_eq!(entry, format!("gemm_{}x{}{cluster_split}", shape.channels(), shape.tokens));
        }
    }

    #[test]
    fn results_are_transposed_in_rounds_of_whole_accumulator_fragments() {
        for shape in TILE_SHAPES {
            let rounds: Vec<u32> =
                (0..shape.epilogue_rounds()).map(|round| shape.round_tokens(round)).collect();
            assert_eq!(rounds.iter().sum::<u32>(), shape.finished_tokens(), "{shape:?}");
            for (index, &tokens) in rounds.iter().enumerate() {
                assert!((8..=MAX_EPILOGUE_TOKENS).contains(&tokens) && tokens % 8 == 0, "{shape:?}");
                let is_whole = tokens == shape.epilogue_tokens();
                assert!(is_whole || !shape.maps_output() && index + 1 == rounds.len(), "{shape:?}");
            }
            let in_round = |round| {
                (0..shape.finished_tokens() / 8)
                    .filter(move |&j| shape.split_round_of_fragment(j) == round)
                    .count()
            };
            let split_rounds = (0..shape.split_rounds()).map(in_round);
            assert!(
                split_rounds
                    .eq((0..shape.split_rounds()).map(|round| shape.split_round_tokens(round) as usize / 8))
            );
            let blocks = (0..shape.finished_tokens() / 8).map(|j| {
                shape.round_of_fragment(j) * shape.epilogue_tokens() + shape.fragment_in_round(j) * 8
            });
            assert!(blocks.eq((0..shape.finished_tokens()).step_by(8)), "{shape:?}");
        }
    }

    #[test]
    fn every_part_of_a_tile_has_one_finisher_with_a_slot_for_each_other_thread_block() {
        for shape in TILE_SHAPES.into_iter().filter(|shape| shape.cluster_split > 1) {
            for rank in 0..shape.cluster_split {
                let mut finishers: Vec<u32> =
                    (0..shape.finishers()).map(|position| shape.finisher(rank, position)).collect();
                assert!(rank >= shape.finishers() || finishers[0] == rank, "{shape:?}");
                finishers.sort_unstable();
                assert_eq!(finishers, (0..shape.finishers()).collect::<Vec<_>>(), "{shape:?}");
            }
            for finisher in 0..shape.finishers() {
                let others = (0..shape.cluster_split).filter(|&rank| rank != finisher);
                let mut slots: Vec<u32> = others.map(|rank| shape.slot(finisher, rank)).collect();
                slots.sort_unstable();
                assert_eq!(slots, (0..shape.cluster_split - 1).collect::<Vec<_>>(), "{shape:?}");
            }
        }
    }

    #[test]
    fn every_shape_is_found_by_its_extents_and_its_splits() {
        for shape in TILE_SHAPES {
            assert_eq!(
                TileShape::find(shape.strips, shape.tokens, shape.warpgroup_split, shape.cluster_split),
                Some(shape)
            );
        }
        assert_eq!(TileShape::find(7, 8, 1, 1), None);
    }
}
