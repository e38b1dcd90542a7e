//! Compares the formulas with the committed records.

use liquidgemm_estimate::gemm::{Efficiency, Terms};
use liquidgemm_estimate::gpus::Gpu;
use liquidgemm_estimate::measurements::{Check, Measurements};
use liquidgemm_estimate::report;
use liquidgemm_estimate::scheme::Scheme;

/// The most that a format's median error may be.
const MOST_MEDIAN_ERROR: f64 = 0.15;

fn checks() -> Vec<Check> {
    Measurements::committed().unwrap().checks()
}

#[test]
fn median_error_is_below_fifteen_percent_for_every_recorded_kernel() {
    let checks = checks();
    let accuracy = report::accuracy(&checks);
    for one in &accuracy {
        println!("{one:?}");
        assert!(one.median_error < MOST_MEDIAN_ERROR, "{one:?}");
    }
    let points = |scheme, is_grouped| {
        accuracy
            .iter()
            .filter(|one| (one.scheme, one.is_grouped) == (scheme, is_grouped))
            .map(|one| one.points)
            .sum::<usize>()
    };
    // Every list of the bench's problems is there: none was skipped while reading.
    assert!(points(Scheme::W4A8, false) >= 600 && points(Scheme::Fp8, false) >= 600);
    for scheme in [Scheme::W8A8, Scheme::W4A16, Scheme::Bf16] {
        assert!(points(scheme, false) >= 100, "{scheme:?}");
    }
    for scheme in [Scheme::W4A8, Scheme::Fp8, Scheme::Bf16] {
        assert_eq!(points(scheme, true), 42, "{scheme:?}");
    }
}

#[test]
fn planner_predicts_our_kernel_better_than_the_closed_formula() {
    let gpu = Gpu::find("h100-sxm").unwrap();
    let ours: Vec<Check> = checks()
        .into_iter()
        .filter(|check| check.scheme == Scheme::W4A8 && !check.product.is_grouped)
        .collect();
    let closed: Vec<Check> = ours
        .iter()
        .map(|check| Check { predicted: Terms::of(&check.product, check.scheme, gpu).total(), ..*check })
        .collect();
    let median = |checks: &[Check]| report::accuracy(checks)[0].median_error;
    println!("planner {}, closed formula {}", median(&ours), median(&closed));
    assert!(median(&ours) < median(&closed), "planner {}, closed formula {}", median(&ours), median(&closed));
}

/// Mean of |ln(predicted / measured)|, by the closed formula with these factors.
fn deviation(checks: &[Check], efficiency: &Efficiency) -> f64 {
    let gpu = Gpu::find("h100-sxm").unwrap();
    let one = |check: &Check| {
        let predicted = Terms::with(efficiency, &check.product, check.scheme, gpu).total();
        (predicted / check.measured).ln().abs()
    };
    checks.iter().map(one).sum::<f64>() / checks.len() as f64
}

#[test]
fn fitted_factors_are_those_with_the_least_deviation_from_the_records() {
    let all = checks();
    for is_grouped in [false, true] {
        for scheme in Scheme::ALL {
            let fitted = if is_grouped { Efficiency::grouped(scheme) } else { Efficiency::dense(scheme) };
            let of_kind: Vec<Check> = all
                .iter()
                .filter(|check| (check.scheme, check.product.is_grouped) == (scheme, is_grouped))
                .copied()
                .collect();
            assert_eq!(of_kind.is_empty(), !fitted.is_fitted, "{scheme:?}");
            if !fitted.is_fitted {
                continue;
            }
            // No factor can be changed by a twentieth without a larger deviation, but for a flat minimum.
            let least = deviation(&of_kind, &fitted);
            for change in [0.95, 1.05] {
                for other in [
                    Efficiency { launch_us: fitted.launch_us * change, ..fitted },
                    Efficiency { load: (fitted.load * change).min(1.0), ..fitted },
                    Efficiency { mma: (fitted.mma * change).min(1.0), ..fitted },
                ] {
                    let changed = deviation(&of_kind, &other);
                    assert!(
                        changed > least - 0.0005,
                        "{scheme:?} {is_grouped}: {other:?} {changed}, {fitted:?} {least}"
                    );
                }
            }
        }
    }
}
