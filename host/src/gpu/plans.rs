//! The plans that a GPU has made, so that a batch size which a server meets again costs a lookup.

use papaya::HashMap;

use crate::{DeviceFigures, Error, Plan};

/// Plans that are kept. Each takes some 300 bytes; when there are more, all are forgotten and made anew when asked for.
const MOST_PLANS: usize = 16_384;

/// Plans by `[m, n, k]`. Neither lookups nor insertions wait for other threads.
#[derive(Debug, Default)]
pub(super) struct PlanCache(HashMap<[usize; 3], Plan>);

impl PlanCache {
    /// The plan of a problem, made if it is not known.
    pub(super) fn plan(&self, problem: [usize; 3], figures: &DeviceFigures) -> Result<Plan, Error> {
        let plans = self.0.pin();
        if let Some(plan) = plans.get(&problem) {
            return Ok(*plan);
        }
        let [m, n, k] = problem;
        let plan = Plan::new(m, n, k, figures)?;
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
    fn a_cached_plan_is_the_one_that_was_made_and_others_are_kept_apart() {
        let (cache, figures) = (PlanCache::default(), DeviceFigures::H100_SXM);
        for _ in 0..2 {
            for [m, n, k] in [[16, 4096, 4096], [17, 4096, 4096], [16, 4096, 8192], [4096, 16, 4096]] {
                let cached = cache.plan([m, n, k], &figures).unwrap();
                assert_eq!(cached, Plan::new(m, n, k, &figures).unwrap());
            }
        }
        assert_eq!(cache.0.len(), 4);
        assert!(cache.plan([0, 4096, 4096], &figures).is_err());
        assert_eq!(cache.0.len(), 4);
    }

    #[test]
    fn a_full_cache_begins_anew() {
        let (cache, figures) = (PlanCache::default(), DeviceFigures::H100_SXM);
        for m in 1..=MOST_PLANS + 1 {
            cache.plan([m, 64, 64], &figures).unwrap();
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
                            cache.plan([m, 1024, 512], &figures).unwrap(),
                            Plan::new(m, 1024, 512, &figures).unwrap()
                        );
                    }
                });
            }
        });
    }
}
