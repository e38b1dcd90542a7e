//! Sizes of the speed-of-light probes, shared by the kernels and their launcher.

/// Bytes of one bulk copy of the `stream` probe.
pub const STREAM_PIECE_BYTES: u32 = 16384;
/// Copies that the `stream` probe keeps in flight on a multiprocessor.
pub const STREAM_STAGES: u32 = 8;
/// Dynamic shared memory of the `stream` probe: the pieces and a barrier each.
pub const STREAM_SHARED_BYTES: u32 = STREAM_STAGES * (STREAM_PIECE_BYTES + 8);
/// Bytes of the B tile that the `mma` probe reads again and again; also its dynamic shared memory.
pub const MMA_TILE_BYTES: u32 = 256 * 128;
/// Warpgroups of the `mma` probe's blocks.
pub const MMA_WARPGROUPS: u32 = 2;
/// Multiply-adds of one round of one block of the `mma` probe: four m64n256k32 a warpgroup.
pub const MMA_ROUND_PRODUCTS: u64 = MMA_WARPGROUPS as u64 * 4 * 64 * 256 * 32;
