//! The times of peer kernels on an H100. A peer kernel, or peer, is a GEMM kernel of another project.
//!
//! The times were measured once and are kept in `peers.json` and `peers_humming.json`, one page each.
//! The `provenance` of a page says where and how.
//! Times differ between machines, so the bench uses them only as ratios to cuBLASLt fp8 on the same page.

use std::sync::LazyLock;

use serde::Deserialize;

use super::matrix::Matrix;
use super::record::{Baseline, Point, Run};
use super::statistics::geometric_mean;

/// The times of some peers at a list of points.
#[derive(Debug, Deserialize)]
pub struct Page {
    /// Device, driver, date, versions and method of the measurement.
    pub provenance: String,
    /// The peers' names, in the order of each point's times.
    columns: Vec<String>,
    /// The points, one matrix and batch size each. A point that was measured twice appears twice.
    pub points: Vec<PeerPoint>,
}

/// The times of a page's peers at one point.
#[derive(Debug, Deserialize)]
pub struct PeerPoint {
    n: usize,
    k: usize,
    /// Tokens.
    pub m: usize,
    /// Microseconds, in the order of the page's columns.
    us: Vec<f64>,
}

impl PeerPoint {
    /// The size of the weight matrix.
    pub fn matrix(&self) -> Matrix {
        Matrix { n: self.n, k: self.k }
    }
}

/// The kernel that every page and every run contains; all comparisons are relative to it.
pub const REFERENCE: &str = "cuBLASLt fp8";

/// The pages, parsed on first use. The first page has every matrix at powers of two.
pub fn pages() -> &'static [Page; 2] {
    static PAGES: LazyLock<[Page; 2]> = LazyLock::new(|| {
        [include_str!("peers.json"), include_str!("peers_humming.json")]
            .map(|text| serde_json::from_str(text).expect("a page of peers is valid"))
    });
    &PAGES
}

/// The distinct names of the peers.
pub fn names() -> Vec<&'static str> {
    let mut names: Vec<&str> = Vec::new();
    for name in pages().iter().flat_map(|page| &page.columns) {
        if !names.contains(&name.as_str()) {
            names.push(name);
        }
    }
    names
}

/// A peer's time at one point divided by that of cuBLASLt fp8 on the same page.
/// The least ratio counts if there are several measurements. `None` if the peer was not measured there.
pub fn relative(name: &str, m: usize, n: usize, k: usize) -> Option<f64> {
    let mut least: Option<f64> = None;
    for page in pages() {
        let column = |name| page.columns.iter().position(|column| column == name);
        let (Some(peer), Some(reference)) = (column(name), column(REFERENCE)) else { continue };
        for point in page.points.iter().filter(|point| (point.m, point.n, point.k) == (m, n, k)) {
            let time = point.us[peer] / point.us[reference];
            least = Some(least.map_or(time, |least| least.min(time)));
        }
    }
    least
}

/// The fastest peer at one point: its name, and its time divided by that of cuBLASLt fp8.
/// `None` if no peer was measured there.
pub fn best(m: usize, n: usize, k: usize) -> Option<(&'static str, f64)> {
    let times = names().into_iter().filter_map(|name| Some((name, relative(name, m, n, k)?)));
    times.min_by(|(_, a), (_, b)| a.total_cmp(b))
}

/// The speeds of our kernel and of the peers at one batch size, relative to cuBLASLt fp8.
/// All are geometric means over the same matrices.
#[derive(Clone, Debug, PartialEq)]
pub struct Comparison {
    /// Tokens.
    pub m: usize,
    /// Number of matrices.
    pub matrices: usize,
    /// Speed of our kernel in the run.
    pub ours: f64,
    /// Speed of each peer that was measured on all of these matrices.
    pub peers: Vec<(&'static str, f64)>,
    /// Speed of a kernel that takes exactly the ideal floor.
    pub limit: f64,
}

/// Compares a run with the peers at one batch size, on the matrices that both have. `None` if there are none.
pub fn compare(run: &Run, m: usize) -> Option<Comparison> {
    let with_peers = |point: &&Point| point.m == m && relative(REFERENCE, m, point.n, point.k).is_some();
    let points: Vec<(&Point, f64)> = run
        .points
        .iter()
        .filter(with_peers)
        .filter_map(|point| Some((point, point.speedup(Baseline::Fp8)?)))
        .collect();
    let speed = |name| -> Option<f64> {
        let times: Option<Vec<f64>> =
            points.iter().map(|(point, _)| relative(name, m, point.n, point.k)).collect();
        geometric_mean(times?.into_iter().map(|time| 1.0 / time))
    };
    Some(Comparison {
        m,
        matrices: points.len(),
        ours: geometric_mean(points.iter().map(|(_, speed)| *speed))?,
        peers: names().into_iter().filter_map(|name| Some((name, speed(name)?))).collect(),
        limit: geometric_mean(points.iter().map(|(point, speed)| speed * point.over_ideal()))?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::tests::point;

    #[test]
    fn pages_are_complete_and_positive() {
        assert_eq!(pages().each_ref().map(|page| page.points.len()), [120, 142]);
        for page in pages() {
            assert!(page.columns.iter().any(|name| name == REFERENCE));
            for point in &page.points {
                assert_eq!(point.us.len(), page.columns.len());
                assert!(point.us.iter().all(|us| us.is_finite() && *us > 0.0));
                let (_, time) = best(point.m, point.n, point.k).unwrap();
                assert!(time <= 1.0, "the reference counts as a peer, so the best ratio is at most 1");
            }
        }
        assert_eq!(names().len(), pages()[0].columns.len() + 2);
    }

    #[test]
    fn best_peer_at_known_points_matches_the_pages() {
        let (name, ratio) = best(8, 57344, 8192).unwrap();
        assert_eq!(name, "Marlin W4A16 per channel");
        assert!((ratio - 97.7 / 170.4).abs() < 1e-3, "{ratio}");
        assert_eq!(best(256, 12288, 4096).unwrap().0, "CUTLASS int4 x fp8");
        // Measured twice: 49.22 / 29.57 and 51.6 / 30.0.
        let (name, ratio) = best(96, 28672, 4096).unwrap();
        assert_eq!(name, "Humming W4A8 per channel");
        assert!((1.0 / ratio - 1.72).abs() < 5e-3, "{ratio}");
        assert!(best(2, 12288, 4096).is_none());
    }

    #[test]
    fn peers_are_compared_over_the_matrices_that_all_have() {
        let run = |points| Run { points, ..Run::default() };
        let both = run(vec![point(24, 4096, 4096, 5.0), point(24, 8192, 8192, 5.0)]);
        // No peer was measured on 8192×8192 at 24 tokens; only Humming's page has 4096×4096.
        let comparison = compare(&both, 24).unwrap();
        let names: Vec<&str> = comparison.peers.iter().map(|(name, _)| *name).collect();
        assert_eq!(comparison.matrices, 1);
        assert_eq!(names, [REFERENCE, "Humming W4A8 per channel", "Humming W4A8 g128"]);
        assert!((comparison.ours - 2.0).abs() < 1e-12);
        assert_eq!(
            compare(&run(vec![point(64, 4096, 4096, 5.0)]), 64).unwrap().peers.len(),
            super::names().len()
        );
        assert!(compare(&both, 64).is_none());
    }
}
