//! Sizes of the speed-of-light probes, which measure the GPU's memory and tensor cores alone.
//!
//! The kernels are in `kernels-gpu/src/probes.rs`, their launcher in `crates/bench/src/probes.rs`.

/// Bytes per bulk copy of the `stream` probe.
pub const STREAM_PIECE_BYTES: u32 = 16384;
/// Bulk copies that the `stream` probe keeps in flight on an SM.
pub const STREAM_STAGES: u32 = 8;
/// Dynamic shared memory of the `stream` probe: one piece and one barrier per stage.
pub const STREAM_SHARED_BYTES: u32 = STREAM_STAGES * (STREAM_PIECE_BYTES + 8);
/// Bytes of the B tile that the `mma` probe reads repeatedly. This is also its dynamic shared memory.
pub const MMA_TILE_BYTES: u32 = 256 * 128;
/// Warpgroups per thread block of the `mma` probe.
pub const MMA_WARPGROUPS: u32 = 2;
/// Multiply-adds per round and thread block of the `mma` probe: four m64n256k32 per warpgroup.
pub const MMA_ROUND_PRODUCTS: u64 = MMA_WARPGROUPS as u64 * 4 * 64 * 256 * 32;
