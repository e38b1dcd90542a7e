//! Tests of the command `liquidgemm`: output, exit codes, and that no argument makes it panic.
//! They give the same results with and without a GPU.

use assert_cmd::Command;

/// Runs the command. Returns exit code, stdout and stderr.
fn run(arguments: &[&str]) -> (i32, String, String) {
    finish(Command::cargo_bin("liquidgemm").unwrap().args(arguments))
}

fn finish(command: &mut Command) -> (i32, String, String) {
    let output = command.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().expect("not killed by a signal"), text(output.stdout), text(output.stderr))
}

/// The value that follows a label in the report.
fn field<'a>(report: &'a str, label: &str) -> &'a str {
    let line = report.lines().find_map(|line| line.trim_start().strip_prefix(label));
    line.unwrap_or_else(|| panic!("no {label:?} in:\n{report}")).trim()
}

#[test]
fn demo_multiplies_the_real_layer_exactly() {
    let (code, report, errors) = run(&["demo", "--backend", "cpu"]);
    assert_eq!((code, errors.as_str()), (0, ""), "{report}");
    assert!(report.starts_with("Y[106, 1536] = X[106, 384] · W[1536, 384]ᵀ + bias"), "{report}");
    assert!(field(&report, "problem").contains("all-MiniLM-L6-v2"));
    assert!(field(&report, "backend").starts_with("CPU, "));
    assert_eq!(field(&report, "because"), "asked for");
    assert!(field(&report, "exact").starts_with("yes: all 162816 outputs compared are bit for bit those of"));
    // 4.25 bits per weight and one scale per channel, against 16 bits per weight.
    assert!(field(&report, "memory").contains("(3.69 × less)"), "{report}");
    // The quantization error of 4-bit weights in groups of 64; a wrong scale or layout gives about 100 %.
    let percent: f64 = field(&report, "error").split(' ').next().unwrap().parse().unwrap();
    assert!((1.0..15.0).contains(&percent), "{report}");
}

#[test]
fn every_output_type_and_group_is_exact() {
    for output in ["bf16", "f16", "f32", "i32"] {
        for group in ["64", "192", "channel"] {
            let size = ["--m", "5", "--n", "67", "--k", "333", "--seed", "9"];
            let choice = ["--output", output, "--group", group, "--backend", "cpu"];
            let (code, report, errors) = run(&[&["demo"], &size[..], &choice].concat());
            assert_eq!(code, 0, "{report}{errors}");
            assert!(report.starts_with("Y[5, 67] = X[5, 333] · W[67, 333]ᵀ"), "{report}");
            assert_eq!(report.contains("+ bias"), output != "i32");
            assert!(field(&report, "exact").starts_with("yes: all 335 outputs"), "{report}");
            let percent: f64 = field(&report, "error").split(' ').next().unwrap().parse().unwrap();
            assert!((1.0..30.0).contains(&percent), "{report}");
        }
    }
}

#[test]
fn smallest_problem_works() {
    let (code, report, errors) = run(&["demo", "--m", "1", "--n", "1", "--k", "1"]);
    assert_eq!(code, 0, "{report}{errors}");
    assert!(field(&report, "exact").starts_with("yes: the one output compared is"), "{report}");
    // One weight takes a whole brick, so the report must not call that a saving.
    assert!(field(&report, "memory").contains("padded"), "{report}");
}

#[test]
fn smaller_groups_give_a_smaller_error() {
    let error = |group| {
        let (_, report, _) = run(&["demo", "--backend", "cpu", "--group", group]);
        field(&report, "error").split(' ').next().unwrap().parse::<f64>().unwrap()
    };
    assert!(error("64") < error("channel"));
}

#[test]
fn arguments_out_of_range_are_named_and_exit_with_2() {
    for (arguments, named) in [
        (["--k", "131073"], "131073"),
        (["--k", "0"], "0 is not in 1..=131072"),
        (["--m", "0"], "0 is not in 1.."),
        (["--n", "-3"], "-3"),
        (["--m", "99999999999999999999"], "99999999999999999999"),
        (["--group", "65"], "a group of 65 is not possible"),
        (["--group", "0"], "a group of 0 is not possible"),
        (["--group", "big"], "big"),
        (["--output", "f64"], "f64"),
        (["--backend", "tpu"], "tpu"),
        (["--seed", "x"], "x"),
    ] {
        let (code, report, errors) = run(&[&["demo"], &arguments[..]].concat());
        assert_eq!((code, report.as_str()), (2, ""), "{arguments:?}");
        assert!(errors.starts_with("error: ") && errors.contains(named), "{errors}");
    }
    assert_eq!(run(&[]).0, 2);
    assert_eq!(run(&["frobnicate"]).0, 2);
}

#[test]
fn problem_beyond_memory_is_refused_on_one_line() {
    let (code, report, errors) = run(&["demo", "--m", "4000000000", "--n", "4000000000", "--k", "131072"]);
    assert_eq!((code, report.as_str()), (1, ""));
    assert!(errors.starts_with("error: m = 4000000000, n = 4000000000, k = 131072 needs about "), "{errors}");
    assert_eq!(errors.lines().count(), 1);
}

/// Runs the command with a driver library that can't be opened, ahead of any real one.
#[cfg(target_os = "linux")]
fn run_with_broken_driver(arguments: &[&str]) -> (i32, String, String) {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("libcuda.so.1"), "no library").unwrap();
    let mut command = Command::cargo_bin("liquidgemm").unwrap();
    finish(command.args(arguments).env("LD_LIBRARY_PATH", folder.path()))
}

#[test]
#[cfg(target_os = "linux")]
fn without_a_working_driver_auto_gives_the_reason_and_uses_the_cpu() {
    let (code, report, errors) = run_with_broken_driver(&["demo"]);
    assert_eq!((code, errors.as_str()), (0, ""), "{report}");
    assert!(field(&report, "backend").starts_with("CPU, "));
    let reason = field(&report, "because");
    assert!(reason.contains("libcuda.so.1") && reason.ends_with("using the CPU backend"), "{reason}");
    assert!(field(&report, "exact").starts_with("yes: "));
}

#[test]
#[cfg(target_os = "linux")]
fn without_a_working_driver_the_gpu_is_an_error_on_one_line() {
    for command in ["demo", "info"] {
        let (code, report, errors) = run_with_broken_driver(&[command, "--backend", "gpu"]);
        assert_eq!((code, report.as_str()), (1, ""));
        assert!(errors.starts_with("error: ") && errors.contains("libcuda.so.1"), "{errors}");
        assert_eq!(errors.lines().count(), 1, "{errors}");
    }
}

#[test]
fn info_shows_backend_reason_and_sources() {
    let (code, report, errors) = run(&["info"]);
    assert_eq!((code, errors.as_str()), (0, ""));
    for label in ["version", "backend", "because", "driver", "GPU", "CPU", "PTX"] {
        assert!(!field(&report, label).is_empty());
    }
    assert_eq!(field(&report, "version"), env!("CARGO_PKG_VERSION"));
    assert!(field(&report, "PTX").ends_with(liquidgemm::gpu::ptx_hash()));
}

/// Runs the command with `--json`, and parses what it prints.
fn json(arguments: &[&str]) -> (i32, serde_json::Value) {
    let (code, report, errors) = run(&[arguments, &["--json"]].concat());
    assert_eq!(errors, "", "{report}");
    (code, serde_json::from_str(&report).unwrap())
}

#[test]
fn json_has_the_figures_of_the_report() {
    let size = ["demo", "--m", "3", "--n", "70", "--k", "130", "--backend", "cpu", "--group", "channel"];
    let (code, found) = json(&size);
    assert_eq!((code, &found["outputs_different"]), (0, &0.into()));
    assert_eq!((&found["outputs_compared"], &found["group"]), (&210.into(), &"channel".into()));
    let error = found["relative_error"].as_f64().unwrap();
    let (_, report, _) = run(&size);
    let percent: f64 = field(&report, "error").split(' ').next().unwrap().parse().unwrap();
    assert!((error * 100.0 / percent - 1.0).abs() < 0.01, "{error} {percent}");

    let (code, found) = json(&["info", "--backend", "cpu"]);
    assert_eq!(code, 0);
    assert_eq!(found["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(found["ptx"], liquidgemm::gpu::ptx_hash());
    assert!(found["gpu"].is_null() && !found["cpu_kernels"].as_array().unwrap().is_empty());
}

#[test]
fn every_subcommand_documents_its_exit_codes_and_writes_json() {
    let (_, help, _) = run(&["--help"]);
    let commands = help.split("Commands:").nth(1).unwrap().split("Options:").next().unwrap();
    let names: Vec<&str> = commands.lines().filter_map(|line| line.split_whitespace().next()).collect();
    assert!(names.len() > 8, "{names:?}");
    for name in names.into_iter().filter(|&name| name != "help") {
        let (code, help, _) = run(&[name, "--help"]);
        assert_eq!(code, 0);
        assert!(help.contains("xit code"), "{name}:\n{help}");
        // A completion script has no other form.
        assert!(help.contains("--json") || name == "completions", "{name}:\n{help}");
    }
}

#[test]
fn help_names_every_option() {
    let (code, help, _) = run(&["demo", "--help"]);
    assert_eq!(code, 0);
    for option in ["--m", "--n", "--k", "--group", "--seed", "--backend", "--output"] {
        assert!(help.contains(option), "{option} is not in:\n{help}");
    }
    let (code, help, _) = run(&["--help"]);
    assert_eq!(code, 0);
    assert!(help.contains("demo") && help.contains("info"));
}

#[test]
fn a_closed_stdout_causes_no_panic() {
    use std::process::Stdio;
    let program = env!("CARGO_BIN_EXE_liquidgemm");
    let mut child = std::process::Command::new(program)
        .args(["demo", "--backend", "cpu"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    assert!(output.status.success());
}

#[cfg(target_os = "linux")]
#[test]
fn a_result_that_cannot_be_written_is_a_failure() {
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let status = std::process::Command::new(assert_cmd::cargo::cargo_bin!("liquidgemm"))
        .arg("info")
        .stdout(full)
        .stderr(std::process::Stdio::null())
        .status()
        .unwrap();
    assert_eq!(status.code(), Some(1));
}
