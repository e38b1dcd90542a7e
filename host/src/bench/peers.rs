//! What others' kernels take on an H100, measured once and kept in `peers.json`, whose first entry says where and
//! how. Times move from machine to machine, so they are only ever used as ratios to cuBLASLt fp8 on the same page.

use std::sync::LazyLock;

use serde::Deserialize;

use super::shapes::Matrix;

/// The page: every peer at every point.
#[derive(Debug, Deserialize)]
pub struct Page {
    /// Device, driver, date, versions and method.
    pub provenance: String,
    /// The peers' names, in the order of each point's times.
    pub columns: Vec<String>,
    /// One matrix and batch size each.
    pub points: Vec<PeerPoint>,
}

/// Every peer at one point.
#[derive(Debug, Deserialize)]
pub struct PeerPoint {
    /// Output channels.
    pub n: usize,
    /// Elements a channel.
    pub k: usize,
    /// Tokens.
    pub m: usize,
    /// Microseconds, one a peer.
    us: Vec<f64>,
}

/// The peer that everything is compared through.
const REFERENCE: &str = "cuBLASLt fp8";

/// The page, read on first use.
pub fn page() -> &'static Page {
    static PAGE: LazyLock<Page> =
        LazyLock::new(|| serde_json::from_str(include_str!("peers.json")).expect("peers.json is valid"));
    &PAGE
}

impl Page {
    /// The peers at one point, if they were measured there.
    pub fn at(&self, m: usize, n: usize, k: usize) -> Option<&PeerPoint> {
        self.points.iter().find(|point| (point.m, point.n, point.k) == (m, n, k))
    }
}

impl PeerPoint {
    /// The weights.
    pub fn matrix(&self) -> Matrix {
        Matrix { n: self.n, k: self.k }
    }

    /// Name and time relative to cuBLASLt fp8 on the page, for every peer in the page's order.
    pub fn relative(&self) -> impl Iterator<Item = (&'static str, f64)> {
        let columns = &page().columns;
        let reference = columns.iter().zip(&self.us).find(|(name, _)| *name == REFERENCE);
        let reference = *reference.expect("peers.json has the reference").1;
        columns.iter().map(String::as_str).zip(self.us.iter().map(move |us| us / reference))
    }

    /// The fastest peer: its name, and its time relative to cuBLASLt fp8.
    pub fn best(&self) -> (&'static str, f64) {
        self.relative().min_by(|(_, a), (_, b)| a.total_cmp(b)).expect("peers.json has peers")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_is_complete_and_positive() {
        let page = page();
        assert_eq!(page.points.len(), 120);
        for point in &page.points {
            assert_eq!(point.us.len(), page.columns.len());
            assert!(point.us.iter().all(|us| us.is_finite() && *us > 0.0));
            assert!(point.best().1 <= 1.0, "the reference is a peer too");
        }
    }

    #[test]
    fn best_peer_of_known_points() {
        let best = |m, n, k| page().at(m, n, k).unwrap().best();
        let (name, ratio) = best(8, 57344, 8192);
        assert_eq!(name, "Marlin W4A16 per channel");
        assert!((ratio - 97.7 / 170.4).abs() < 1e-3, "{ratio}");
        assert_eq!(best(256, 12288, 4096).0, "CUTLASS int4 x fp8");
        assert!(page().at(2, 12288, 4096).is_none());
    }
}
