//! Reductions of a tile's partial sums, which several consumers have computed along K.
//!
//! | module | consumers | exchange through |
//! |---|---|---|
//! | [`warpgroup`] | the two warpgroups of a strip | shared memory |
//! | [`cluster`] | the thread blocks of a cluster | distributed shared memory |
//! | [`stream_k`] | persistent clusters | global memory |
//!
//! The sums are int32, so the order of additions does not change the result.
//! Which consumer finishes which tokens follows from `liquidgemm_format::tile`,
//! which part of K it has from `liquidgemm_format::schedule`.

pub mod cluster;
pub mod stream_k;
pub mod warpgroup;
