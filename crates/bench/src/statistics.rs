//! Medians with their spread, and geometric means.
//! All times of the bench are a [`Timing`], all summaries over points are a [`geometric_mean`].

use serde::{Deserialize, Serialize};

/// The times of one kernel in microseconds per launch, over several graph replays.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Timing {
    /// The median.
    pub us: f64,
    /// The fastest replay.
    pub min: f64,
    /// The lower quartile: a quarter of the replays are faster.
    pub lower_quartile: f64,
    /// The upper quartile: a quarter of the replays are slower.
    pub upper_quartile: f64,
    /// The slowest replay.
    pub max: f64,
    /// Launches per replay.
    pub launches: usize,
    /// Number of timed replays.
    pub replays: usize,
}

impl Timing {
    /// Summarizes replays, each given in microseconds per launch. `None` if there are none.
    pub fn new(mut replays: Vec<f64>, launches: usize) -> Option<Self> {
        replays.sort_by(f64::total_cmp);
        Some(Self {
            us: quantile(&replays, 0.5)?,
            min: *replays.first()?,
            lower_quartile: quantile(&replays, 0.25)?,
            upper_quartile: quantile(&replays, 0.75)?,
            max: *replays.last()?,
            launches,
            replays: replays.len(),
        })
    }

    /// Whether a launch can have taken the median: between a nanosecond and days.
    pub(super) fn is_plausible(&self) -> bool {
        (1e-3..1e12).contains(&self.us)
    }

    /// Half the distance between the quartiles, as a fraction of the median.
    pub fn spread(&self) -> f64 {
        (self.upper_quartile - self.lower_quartile) / 2.0 / self.us
    }
}

/// The quantile of a sorted slice, linearly interpolated. `None` for an empty slice.
fn quantile(sorted: &[f64], fraction: f64) -> Option<f64> {
    let position = fraction * sorted.len().checked_sub(1)? as f64;
    let (below, above) = (sorted[position.floor() as usize], sorted[position.ceil() as usize]);
    Some(below + (above - below) * position.fract())
}

/// The geometric mean. `None` if there are no values.
pub fn geometric_mean(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let (mut sum, mut count) = (0.0, 0);
    for value in values {
        sum += value.ln();
        count += 1;
    }
    (count > 0).then(|| (sum / count as f64).exp())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_and_quartiles_of_odd_and_even_counts() {
        let timing = Timing::new(vec![5.0, 1.0, 2.0, 4.0, 3.0], 7).unwrap();
        assert_eq!((timing.us, timing.min, timing.max), (3.0, 1.0, 5.0));
        assert_eq!((timing.lower_quartile, timing.upper_quartile), (2.0, 4.0));
        assert_eq!((timing.launches, timing.replays), (7, 5));
        assert!((timing.spread() - 1.0 / 3.0).abs() < 1e-12);
        assert_eq!(Timing::new(vec![1.0, 2.0], 1).unwrap().us, 1.5);
        assert_eq!(Timing::new(vec![], 1), None);
        let plausible = |us| Timing::new(vec![us], 1).unwrap().is_plausible();
        assert!(plausible(2.0) && ![0.0, -1.0, 1e300, f64::NAN].into_iter().any(plausible));
    }

    #[test]
    fn geometric_mean_of_a_ratio_and_its_inverse_is_one() {
        let mean = geometric_mean([4.0, 0.25, 2.0, 0.5]).unwrap();
        assert!((mean - 1.0).abs() < 1e-12);
        assert_eq!(geometric_mean([]), None);
    }
}
