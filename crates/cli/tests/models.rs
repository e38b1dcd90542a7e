//! Tests of the commands on whole models: output, JSON, exit codes, completions and man pages.

use std::fs;
use std::path::Path;

use assert_cmd::Command;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::Value;

/// Runs the command in a folder. Returns exit code, stdout and stderr.
fn run(folder: &Path, arguments: &[&str]) -> (i32, String, String) {
    let output =
        Command::cargo_bin("liquidgemm").unwrap().args(arguments).current_dir(folder).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().expect("not killed by a signal"), text(output.stdout), text(output.stderr))
}

/// Runs the command with `--json`, and parses what it prints.
fn json(folder: &Path, arguments: &[&str]) -> (i32, Value) {
    let (code, report, errors) = run(folder, &[arguments, &["--json"]].concat());
    assert_eq!(errors, "", "{report}");
    (code, serde_json::from_str(&report).unwrap())
}

/// Writes a model of one layer and a norm to the folder `model`.
fn write_model(folder: &Path) {
    let model = folder.join("model");
    fs::create_dir(&model).unwrap();
    fs::write(model.join("config.json"), r#"{"model_type": "llama"}"#).unwrap();
    let weights: Vec<u8> = (0..128 * 192).flat_map(|i| (i as f32 * 0.37).sin().to_le_bytes()).collect();
    let norm = [0u8; 4 * 192];
    let tensors = [
        ("a.up_proj.weight", TensorView::new(Dtype::F32, vec![128, 192], &weights).unwrap()),
        ("a.norm.weight", TensorView::new(Dtype::F32, vec![192], &norm).unwrap()),
    ];
    let bytes = safetensors::serialize(tensors, None).unwrap();
    fs::write(model.join("model.safetensors"), bytes).unwrap();
}

#[test]
fn a_model_is_planned_quantized_inspected_verified_and_compared() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    write_model(folder);
    let (code, report, errors) = run(folder, &["quantize", "model", "--dry-run"]);
    assert_eq!((code, errors.as_str()), (0, ""));
    assert!(report.contains("128×192") && report.contains("packed, group 64"), "{report}");
    assert_eq!(fs::read_dir(folder).unwrap().count(), 1);

    let (code, report, errors) = run(folder, &["quantize", "model", "-o", "out", "--method", "rtn"]);
    assert_eq!((code, errors.as_str()), (0, ""), "{report}");
    assert!(report.contains("1 modules, 4.417 bits a weight"), "{report}");

    let (code, found) = json(folder, &["inspect", "out"]);
    assert_eq!(code, 0);
    assert_eq!(found["entries"][0]["name"], "a.up_proj");
    assert_eq!(found["entries"][0]["shape"], serde_json::json!([128, 192]));
    assert_eq!(found["entries"][0]["group"], "64");
    assert_eq!(found["quantization_config"]["quant_method"], "liquidgemm");

    let (code, report, _) = run(folder, &["inspect", "model"]);
    assert_eq!(code, 0);
    assert!(report.contains("a.norm.weight") && report.contains("32.000"), "{report}");

    let (code, found) = json(folder, &["verify", "out", "--against", "model"]);
    assert_eq!((code, &found["sound"]), (0, &Value::Bool(true)));
    let error = found["modules"][0]["relative_error"].as_f64().unwrap();
    assert!((0.01..0.2).contains(&error), "{error}");

    let (code, found) = json(folder, &["compare", "model", "out"]);
    assert_eq!(code, 0);
    assert_eq!(found["modules"][0]["relative_difference"], error);
}

#[test]
fn a_folder_without_checksums_is_verified_as_far_as_it_can_be() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    write_model(folder);
    assert_eq!(run(folder, &["quantize", "model", "-o", "out", "--method", "rtn"]).0, 0);
    let (_, found) = json(folder, &["verify", "out"]);
    assert_eq!(found["without_checksum"], 0);
    let shard = folder.join("out").join("model.safetensors");
    let bytes = fs::read(&shard).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    fs::write(&shard, safetensors::serialize(tensors.iter(), None).unwrap()).unwrap();
    let (code, report, errors) = run(folder, &["verify", "out", "--against", "model"]);
    assert_eq!((code, errors.as_str()), (0, ""), "{report}");
    assert!(report.contains("no checksums: 2 of them"), "{report}");
    let (code, found) = json(folder, &["verify", "out"]);
    assert_eq!((code, &found["without_checksum"], &found["sound"]), (0, &2.into(), &Value::Bool(true)));
}

#[test]
fn smoothing_and_rotation_name_what_they_lack() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    write_model(folder);
    let (code, _, errors) = run(folder, &["quantize", "model", "-o", "x", "--smooth", "auto"]);
    assert_eq!(code, 1);
    assert!(errors.contains("calibration"), "{errors}");
    let (code, _, errors) = run(folder, &["quantize", "model", "-o", "x", "--rotate"]);
    assert_eq!(code, 1);
    assert!(errors.contains("model.embed_tokens.weight"), "{errors}");
    for arguments in [&["--smooth", "2"][..], &["--smooth", "best"], &["--smooth", "auto", "--rotate"]] {
        assert_eq!(run(folder, &[&["quantize", "model", "-o", "x"], arguments].concat()).0, 2);
    }
    assert_eq!(fs::read_dir(folder).unwrap().count(), 1);
}

#[test]
fn every_json_result_names_what_the_text_names() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    write_model(folder);
    let (code, found) = json(folder, &["quantize", "model", "--output", "out", "--exclude", "*up_proj"]);
    assert_eq!(code, 0);
    assert_eq!(found["layers"].as_array().unwrap().len(), 2);
    assert!(found["layers"].as_array().unwrap().iter().all(|layer| layer["fate"] == "kept"));
    assert_eq!(found["bytes_before"], found["bytes_after"]);
    assert_eq!(found["output"], "out");
}

#[test]
fn damage_is_listed_and_exits_with_1() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    write_model(folder);
    assert_eq!(run(folder, &["quantize", "model", "-o", "out", "--method", "rtn"]).0, 0);
    let shard = folder.join("out").join("model.safetensors");
    let mut bytes = fs::read(&shard).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&shard, bytes).unwrap();
    let (code, report, errors) = run(folder, &["verify", "out"]);
    assert_eq!((code, errors.as_str()), (1, ""));
    assert!(report.contains("checksum") && report.contains("DAMAGED"), "{report}");
    let (code, found) = json(folder, &["verify", "out"]);
    assert_eq!((code, &found["sound"]), (1, &Value::Bool(false)));
    assert_eq!(found["problems"].as_array().unwrap().len(), 1);
}

#[test]
fn errors_are_one_line_with_the_remedy_and_invalid_arguments_exit_with_2() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    write_model(folder);
    assert_eq!(run(folder, &["quantize", "model", "-o", "out", "--method", "rtn"]).0, 0);
    for (arguments, named) in [
        (&["quantize", "model", "-o", "out"][..], "--force"),
        (&["quantize", "out", "-o", "again"], "packed already"),
        (&["quantize", "nothing", "-o", "x"], "nothing"),
        (&["quantize", "model", "-o", "x", "--include", "lm_haed"], "lm_haed"),
        (&["quantize", "model", "-o", "x", "--method", "gptq"], "calibration"),
        (&["verify", "model"], "quantize"),
        (&["inspect", "model/config.json"], "of another kind"),
    ] {
        let (code, report, errors) = run(folder, arguments);
        assert_eq!((code, report.as_str()), (1, ""), "{arguments:?}");
        assert!(errors.starts_with("error: ") && errors.contains(named), "{arguments:?}: {errors}");
        assert_eq!(errors.lines().count(), 1, "{errors}");
    }
    for arguments in [
        &["quantize", "model"][..],
        &["quantize", "model", "-o", "x", "--group", "65"],
        &["quantize", "model", "-o", "x", "--method", "best"],
        &["quantize", "model", "-o", "x", "--dequantized", "f8"],
        &["verify"],
        &["compare", "model"],
        &["completions", "cmd"],
    ] {
        let (code, report, errors) = run(folder, arguments);
        assert_eq!((code, report.as_str()), (2, ""), "{arguments:?}");
        assert!(errors.starts_with("error: "), "{errors}");
    }
    assert_eq!(fs::read_dir(folder).unwrap().count(), 2);
}

#[test]
fn completions_and_man_pages_know_every_subcommand() {
    let folder = tempfile::tempdir().unwrap();
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let (code, script, errors) = run(folder.path(), &["completions", shell]);
        assert_eq!((code, errors.as_str()), (0, ""));
        assert!(script.contains("liquidgemm") && !script.contains("liquidgemm-cli"), "{shell}");
        for subcommand in ["quantize", "inspect", "verify", "compare"] {
            assert!(script.contains(subcommand), "{shell}: {subcommand}");
        }
    }
    assert_eq!(run(folder.path(), &["man", "."]).0, 0);
    let quantize = fs::read_to_string(folder.path().join("liquidgemm-quantize.1")).unwrap();
    assert!(quantize.contains("exclude") && quantize.contains("Exit codes"), "{quantize}");
    assert!(folder.path().join("liquidgemm.1").exists());
    let (code, _, errors) = run(folder.path(), &["man", "no/such/folder"]);
    assert_eq!(code, 1);
    assert!(errors.contains("no/such/folder"), "{errors}");
}
