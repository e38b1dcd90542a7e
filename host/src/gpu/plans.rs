//! A cache of the plans that a GPU has made, so that a repeated problem costs only a lookup.

use papaya::HashMap;

use crate::{DeviceFigures, Error, Plan, Problem};

/// The most plans that are kept. Each takes about 300 bytes. When the cache is full, it is cleared.
const MOST_PLANS: usize = 16_384;

/// Plans by problem. Neither lookups nor insertions wait for other threads.
#[derive(Debug, Default)]
pub(super) struct PlanCache(HashMap<Problem, Plan>);

impl PlanCache {
    /// Returns the plan of a problem, and makes it if it is not in the cache.
    pub(super) fn plan(&self, problem: Problem, figures: &DeviceFigures) -> Result<Plan, Error> {
        let plans = self.0.pin();
        if let Some(plan) = plans.get(&problem) {
            return Ok(*plan);
        }
        let plan = Plan::new(problem, figures)?;
        if plans.len() >= MOST_PLANS {
            plans.clear();
        }
        plans.insert(problem, plan);
        Ok(plan)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cached_plans_equal_new_ones_for_every_problem() {
        let (cache, figures) = (PlanCache::default(), DeviceFigures::H100_SXM);
        for _ in 0..2 {
            for [m, n, k] in [[16, 4096, 4096], [17, 4096, 4096], [16, 4096, 8192], [4096, 16, 4096]] {
                let cached = cache.plan(Problem { m, n, k }, &figures).unwrap();
                assert_eq!(cached, Plan::new(Problem { m, n, k }, &figures).unwrap());
            }
        }
        assert_eq!(cache.0.len(), 4);
        assert!(cache.plan(Problem::new(0, 4096, 4096), &figures).is_err());
        assert_eq!(cache.0.len(), 4);
    }

    #[test]
    fn a_full_cache_is_cleared() {
        let (cache, figures) = (PlanCache::default(), DeviceFigures::H100_SXM);
        for m in 1..=MOST_PLANS + 1 {
            cache.plan(Problem::new(m, 64, 64), &figures).unwrap();
        }
        assert_eq!(cache.0.len(), 1);
    }

    #[test]
    fn threads_get_the_same_plans() {
        let (cache, figures) = (PlanCache::default(), DeviceFigures::H100_SXM);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for m in 1..200 {
                        assert_eq!(
                            cache.plan(Problem::new(m, 1024, 512), &figures).unwrap(),
                            Plan::new(Problem::new(m, 1024, 512), &figures).unwrap()
                        );
                    }
                });
            }
        });
    }
}
