//! Tests of the command `liquidgemm bench` that need no GPU: reading earlier runs, refusing bad arguments.
//! The runs that they read are made up here, except for the recorded run in `docs/benchmarks`.
#![cfg(feature = "bench")]

use assert_cmd::Command;
use liquidgemm::Group;
use liquidgemm_bench::circumstances::Circumstances;
use liquidgemm_bench::record::{Point, Run};
use liquidgemm_bench::statistics::Timing;

/// Runs `liquidgemm bench`. Returns exit code, stdout and stderr.
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
        group: Group::default(),
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
    for part in ["a GPU", "0.833", "M 1–8", "M 16–64", "1.50 (≥ 1.93) MISSED"] {
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
fn several_runs_become_one_page() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name| directory.path().join(name).to_str().unwrap().to_owned();
    let (first, second, page) = (path("first.json"), path("second.json"), path("page.md"));
    run(None).save(first.as_ref()).unwrap();
    let mut other = run(None);
    other.circumstances.device = "another GPU".into();
    other.points.iter_mut().for_each(|point| point.m *= 24);
    other.save(second.as_ref()).unwrap();
    let listed = format!("{first},{second}");
    for arguments in [&["--from", &first, "--from", &second] as &[&str], &["--from", &listed]] {
        let (code, out, errors) = bench(&[arguments, &["--markdown", &page]].concat());
        assert_eq!((code, errors.as_str()), (0, ""), "{out}");
        let page = std::fs::read_to_string(&page).unwrap();
        for part in [
            "# LiquidGEMM on a GPU, another GPU\n",
            "| M 24–56 | 1 |",
            "| 1536 | **6.00** |",
            "| 64 | **6.00** |",
        ] {
            assert!(page.contains(part), "{part:?} is missing in\n{page}");
        }
    }
}

#[test]
fn recorded_run_of_the_repository_can_still_be_read() {
    let json = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/benchmarks/h100.json");
    let directory = tempfile::tempdir().unwrap();
    let plots = directory.path().to_str().unwrap();
    let (code, out, errors) = bench(&["--from", json, "--plots", plots]);
    assert_eq!((code, errors.as_str()), (0, ""), "{out}");
    assert!(out.contains("\nM 1–8 ") && out.contains("\nM = N = K = 8192 "), "{out}");
}

#[test]
fn recorded_runs_of_activations_and_mixtures_become_their_pages_and_plots() {
    let recorded = |name| format!("{}/../../docs/benchmarks/{name}", env!("CARGO_MANIFEST_DIR"));
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    for (kind, from, plots) in [
        ("--activations", vec!["activations.json"], vec!["activations.svg"]),
        (
            "--moe",
            vec!["moe.json", "moe-128.json", "moe-channel.json"],
            vec!["moe-64.svg", "moe-128.svg", "moe-channel.svg"],
        ),
    ] {
        let from = from.into_iter().map(recorded).collect::<Vec<_>>().join(",");
        let page = path("plots/page.md");
        let (code, out, errors) =
            bench(&[kind, "--from", &from, "--plots", &path("plots"), "--markdown", &page]);
        assert_eq!((code, errors.as_str()), (0, ""), "{out}");
        let page = std::fs::read_to_string(page).unwrap();
        for plot in plots {
            assert!(page.contains(&format!("]({plot})")), "{plot} is missing in\n{page}");
            assert!(std::fs::read_to_string(path(&format!("plots/{plot}"))).unwrap().starts_with("<svg"));
        }
    }
}

#[test]
fn files_that_cannot_be_read_are_refused_with_the_reason() {
    let (code, _, errors) = bench(&["--from", "/no/such/file"]);
    assert_eq!(code, 1);
    assert!(errors.starts_with("error: cannot read /no/such/file: No such file or directory"), "{errors}");
    // A time of 0 can't be drawn on a logarithmic axis.
    let directory = tempfile::tempdir().unwrap();
    let path = |name| directory.path().join(name).to_str().unwrap().to_owned();
    let mut zero = run(None);
    zero.points[0].fp8 = Some(timing(0.0));
    zero.save(path("zero.json").as_ref()).unwrap();
    let (code, _, errors) = bench(&["--from", &path("zero.json"), "--plots", &path("plots")]);
    assert_eq!(code, 1);
    assert!(errors.contains("zero.json has a dimension of 0 or an impossible time"), "{errors}");
}

#[test]
fn invalid_arguments_are_refused_in_one_line_or_with_the_usage() {
    for (arguments, expected) in [
        (&["--from", "/no/such/file"] as &[&str], 1),
        (&["--ablation", "--from", "a,b"], 1),
        (&["--activations", "--from", "a,b"], 1),
        (&["--torch", "python3"], 2),
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
