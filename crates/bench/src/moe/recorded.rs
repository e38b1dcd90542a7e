//! The layers, the numbers of tokens and the recorded times of other projects: one page, `recorded.json`.
//! Its `provenance` says where and how they were measured.

use std::sync::LazyLock;

use rand::SeedableRng;
use rand::seq::index;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::record::weight_bytes;
use liquidgemm::Group;

/// Bytes of experts that a point's routings read together, if there are enough experts.
const ROTATED_BYTES: usize = 400_000_000;
/// The most routings of a point.
const MOST_ROUTINGS: usize = 16;
/// Bytes per second and operations per second of the ideal floor.
const IDEAL: (f64, f64) = (3.10e12, 1979e12);
/// The column that is measured in the same run where torch is installed.
pub(super) const TORCH_FP8: &str = "torch fp8";

/// Recorded times of other projects' grouped GEMMs.
#[derive(Debug, Deserialize)]
pub struct Page {
    /// Device, driver, date, versions and method of the measurement.
    pub provenance: String,
    /// The names of the kernels, in the order of each point's times.
    pub columns: Vec<String>,
    /// The points.
    pub points: Vec<PagePoint>,
}

/// The recorded times of one layer and number of tokens.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct PagePoint {
    /// The model and the layer.
    pub layer: String,
    /// Number of experts.
    pub experts: usize,
    /// Output channels of each expert.
    pub n: usize,
    /// Input channels of each expert.
    pub k: usize,
    /// Number of tokens.
    pub tokens: usize,
    /// Rows of all experts: the tokens times the experts of each.
    pub rows: usize,
    /// Experts that have rows.
    pub active: usize,
    /// Microseconds, in the order of the page's columns.
    pub us: Vec<f64>,
}

/// The page, parsed on first use.
pub fn page() -> &'static Page {
    static PAGE: LazyLock<Page> =
        LazyLock::new(|| serde_json::from_str(include_str!("recorded.json")).expect("the page is valid"));
    &PAGE
}

impl PagePoint {
    /// Returns the ideal floor in microseconds: the bytes of the active experts, the activations and the output
    /// at 3.10 TB/s, or the operations at 1979 TOPS.
    pub(super) fn ideal_us(&self, group: Group) -> f64 {
        let bytes = self.active * weight_bytes(self.n, self.k, group) + self.rows * (self.k + 2 * self.n);
        let operations = 2.0 * self.rows as f64 * self.n as f64 * self.k as f64;
        1e6 * (bytes as f64 / IDEAL.0).max(operations / IDEAL.1)
    }

    /// Returns the recorded time of the kernel with this name.
    pub(super) fn recorded(&self, name: &str) -> Option<f64> {
        let column = page().columns.iter().position(|column| column == name)?;
        self.us.get(column).copied()
    }

    /// Returns the offsets of the random routings that launches rotate through, one more than experts each.
    pub(super) fn routings(&self, group: Group) -> Vec<Vec<i32>> {
        let bytes = self.active * weight_bytes(self.n, self.k, group);
        let routings = ROTATED_BYTES.div_ceil(bytes).clamp(1, MOST_ROUTINGS);
        (0..routings).map(|number| self.routing(number)).collect()
    }

    /// Returns the offsets of a random routing in which as many experts get rows as on the page, if one is found.
    fn routing(&self, number: usize) -> Vec<i32> {
        const MOST_TRIES: usize = 5_000;
        let mut rng = ChaCha8Rng::seed_from_u64((self.tokens * MOST_ROUTINGS + number) as u64);
        let top_k = self.rows / self.tokens;
        let mut counts = vec![0; self.experts];
        for _ in 0..MOST_TRIES {
            counts.fill(0);
            for _ in 0..self.tokens {
                index::sample(&mut rng, self.experts, top_k)
                    .into_iter()
                    .for_each(|expert| counts[expert] += 1);
            }
            if counts.iter().filter(|&&count| count > 0).count() == self.active {
                break;
            }
        }
        let mut offsets = vec![0];
        for count in counts {
            offsets.push(offsets[offsets.len() - 1] + count);
        }
        offsets
    }
}

/// Returns the points of the page with these numbers of tokens, or all if there are none given.
pub fn points(tokens: Option<&[usize]>) -> Vec<&'static PagePoint> {
    let chosen = |point: &&PagePoint| tokens.is_none_or(|tokens| tokens.contains(&point.tokens));
    page().points.iter().filter(chosen).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_page_has_every_layer_at_every_number_of_tokens() {
        let page = page();
        let layers: BTreeSet<&str> = page.points.iter().map(|point| point.layer.as_str()).collect();
        assert_eq!((layers.len(), page.points.len()), (6, 42));
        for point in &page.points {
            assert_eq!(point.us.len(), page.columns.len());
            assert!(point.recorded(TORCH_FP8).is_some());
            assert_eq!(point.rows % point.tokens, 0);
            assert!(point.active <= point.experts.min(point.rows));
        }
        assert_eq!(points(Some(&[1, 8])).len(), 12);
    }

    #[test]
    fn routings_have_all_rows_and_the_page_s_active_experts() {
        for point in points(Some(&[1, 8, 128])) {
            for number in 0..2 {
                let offsets = point.routing(number);
                assert_eq!((offsets.len(), offsets[point.experts]), (point.experts + 1, point.rows as i32));
                let active = offsets.windows(2).filter(|pair| pair[0] < pair[1]).count();
                assert!(active.abs_diff(point.active) <= 3, "{point:?}: {active}");
                let most = offsets.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap();
                assert!(most as usize <= point.tokens, "a token goes to an expert once");
            }
        }
    }

    #[test]
    fn ideal_floors_are_those_of_the_page() {
        let ideal = |layer: &str, tokens| {
            let point = page().points.iter().find(|point| point.layer == layer && point.tokens == tokens);
            point.unwrap().ideal_us(Group::default())
        };
        for (layer, tokens, expected) in
            [("mixtral gate-up", 1, 40.3), ("dsv3 down", 128, 636.9), ("qwen3-30b gate-up", 8192, 208.3)]
        {
            assert!(
                (ideal(layer, tokens) / expected - 1.0).abs() < 0.01,
                "{layer}: {}",
                ideal(layer, tokens)
            );
        }
    }
}
