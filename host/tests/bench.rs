//! `liquidgemm bench` from outside, as far as it needs no GPU: reading an earlier run, and what it refuses.
#![cfg(all(feature = "cli", feature = "bench"))]

use assert_cmd::Command;
use liquidgemm::bench::circumstances::Circumstances;
use liquidgemm::bench::record::{Point, Run};
use liquidgemm::bench::statistics::Timing;

/// Exit code, stdout and stderr.
fn bench(arguments: &[&str]) -> (i32, String, String) {
    let mut command = Command::cargo_bin("liquidgemm").unwrap();
    let output = command.arg("bench").args(arguments).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().expect("not killed by a signal"), text(output.stdout), text(output.stderr))
}

fn timing(us: f64) -> Timing {
    Timing::new(vec![us; 3], 20).unwrap()
}

fn run(mismatch: Option<String>) -> Run {
    let point = |m| Point {
        m,
        n: 4096,
        k: 4096,
        plan: "a plan".into(),
        ours: timing(6.0),
        stream: Some(timing(5.0)),
        mma: Some(timing(2.0)),
        int8: None,
        fp8: Some(timing(9.0)),
        bf16: Some(timing(18.0)),
        tokens_checked: 1,
        mismatch: mismatch.clone(),
    };
    let circumstances = Circumstances { device: "a GPU".into(), ..Circumstances::default() };
    Run { circumstances, complete: true, points: vec![point(1), point(64)], ..Run::default() }
}

#[test]
fn earlier_run_becomes_tables_pictures_and_a_page() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name| directory.path().join(name).to_str().unwrap().to_owned();
    let (json, plots, page) = (path("run.json"), path("plots"), path("page.md"));
    run(None).save(json.as_ref()).unwrap();
    let (code, out, errors) = bench(&["--from", &json, "--plots", &plots, "--markdown", &page]);
    assert_eq!((code, errors.as_str()), (0, ""), "{out}");
    for part in ["a GPU", "0.833", "M 1–8", "M 16–64", "1.50 (≥ 1.85) MISSED"] {
        assert!(out.contains(part), "{part:?} is missing in\n{out}");
    }
    let page = std::fs::read_to_string(page).unwrap();
    assert!(page.contains("](plots/latency-4096x4096.svg)"), "{page}");
    assert!(std::fs::read_to_string(path("plots/peers.svg")).unwrap().starts_with("<svg"));
}

#[test]
fn wrong_results_fail_the_command() {
    let directory = tempfile::tempdir().unwrap();
    let json = directory.path().join("run.json");
    run(Some("token 0 differs".into())).save(&json).unwrap();
    let (code, out, _) = bench(&["--from", json.to_str().unwrap()]);
    assert_eq!(code, 1);
    assert!(out.contains("WRONG: token 0 differs") && out.contains("2 of 2 results differ"), "{out}");
}

#[test]
fn nonsense_is_refused_in_one_line_or_with_the_usage() {
    for (arguments, expected) in [
        (&["--from", "/no/such/file"] as &[&str], 1),
        (&["--shapes", "4096"], 2),
        (&["--quick", "--peers"], 2),
        (&["--tile", "3"], 2),
        (&["--m", "0"], 2),
    ] {
        let (code, out, errors) = bench(arguments);
        assert_eq!((code, out.as_str()), (expected, ""), "{arguments:?}: {errors}");
        assert!(errors.starts_with("error: ") && (code == 2 || errors.lines().count() == 1), "{errors}");
    }
}
