//! Tests of `liquidgemm eval` and `liquidgemm calibrate`, on a tiny sentence encoder that the tests write.
#![cfg(feature = "eval")]

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use assert_cmd::Command;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use tempfile::tempdir;

const HIDDEN: usize = 64;
const WORDS: [&str; 6] = ["<unk>", "the", "cat", "dog", "sleeps", "barks"];
const TEXT: &str = "the cat sleeps\nthe dog barks\n\nthe cat barks the dog\n";

/// Runs the command. Returns exit code, stdout and stderr.
fn run(arguments: &[&str], folder: &Path) -> (i32, String, String) {
    let output =
        Command::cargo_bin("liquidgemm").unwrap().args(arguments).current_dir(folder).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().expect("not killed by a signal"), text(output.stdout), text(output.stderr))
}

/// Writes an encoder with one block into `folder/model`, and a text into `folder/text.txt`.
fn write_model(folder: &Path) {
    let model = folder.join("model");
    fs::create_dir(&model).unwrap();
    let config = json!({
        "model_type": "bert", "hidden_size": HIDDEN, "intermediate_size": HIDDEN, "num_attention_heads": 4,
        "num_hidden_layers": 1, "vocab_size": WORDS.len(), "max_position_embeddings": 16, "type_vocab_size": 1,
    });
    let vocabulary: HashMap<&str, usize> = WORDS.iter().zip(0..).map(|(word, id)| (*word, id)).collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    });
    let mut tensors: Vec<(String, Vec<usize>)> = Vec::new();
    for (name, rows) in [("word", WORDS.len()), ("position", 16), ("token_type", 1)] {
        tensors.push((format!("embeddings.{name}_embeddings.weight"), vec![rows, HIDDEN]));
    }
    for norm in ["embeddings", "encoder.layer.0.attention.output", "encoder.layer.0.output"] {
        tensors.push((format!("{norm}.LayerNorm.weight"), vec![HIDDEN]));
        tensors.push((format!("{norm}.LayerNorm.bias"), vec![HIDDEN]));
    }
    for layer in [
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    ] {
        tensors.push((format!("encoder.layer.0.{layer}.weight"), vec![HIDDEN, HIDDEN]));
        tensors.push((format!("encoder.layer.0.{layer}.bias"), vec![HIDDEN]));
    }
    let data: Vec<Vec<u8>> = tensors
        .iter()
        .zip(1u32..)
        .map(|((_, shape), seed)| {
            let count: usize = shape.iter().product();
            // Differs from tensor to tensor and has no period within one.
            let value = |i: usize| ((i as f32 + 1.0) * (0.7 + seed as f32 * 0.013)).sin() * 0.3;
            (0..count).flat_map(|i| value(i).to_le_bytes()).collect()
        })
        .collect();
    let views = tensors.iter().zip(&data).map(|((name, shape), data)| {
        (name.as_str(), TensorView::new(Dtype::F32, shape.clone(), data).unwrap())
    });
    safetensors::serialize_to_file(views, None, &model.join("model.safetensors")).unwrap();
    fs::write(model.join("config.json"), config.to_string()).unwrap();
    fs::write(model.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    fs::write(folder.join("text.txt"), TEXT).unwrap();
}

#[test]
fn eval_reports_the_cosine_of_every_method_and_group() {
    let folder = tempdir().unwrap();
    write_model(folder.path());
    let arguments = ["eval", "model", "--text", "text.txt", "--backend", "cpu", "--layers", "2"];
    let choice = ["--method", "a8,rtn,gptq", "--group", "64,channel"];
    let (code, table, errors) = run(&[&arguments[..], &choice].concat(), folder.path());
    assert_eq!((code, errors.as_str()), (0, ""), "{table}");
    assert!(table.starts_with("model, 11 tokens of text.txt in 3 passes\n"), "{table}");
    let (code, json, _) = run(&[&arguments[..], &choice, &["--json"]].concat(), folder.path());
    assert_eq!(code, 0);
    let json: Value = serde_json::from_str(&json).unwrap();
    let rows = json[0]["rows"].as_array().unwrap();
    let names: Vec<(&str, Option<&str>)> =
        rows.iter().map(|row| (row["method"].as_str().unwrap(), row["group"].as_str())).collect();
    let expected = [("rtn", "64"), ("rtn", "channel"), ("gptq", "64"), ("gptq", "channel")];
    assert_eq!(names[0], ("a8", None));
    assert_eq!(names[1..], expected.map(|(method, group)| (method, Some(group))));
    for row in rows {
        let cosine = row["score"]["cosine"].as_f64().unwrap();
        assert!(cosine > 0.9 && cosine < 1.0, "{row}");
        assert!(table.contains(&format!("cosine {cosine:.4}")), "{table}");
        assert_eq!(row["layers"].as_array().unwrap().len(), 2);
    }
}

#[test]
fn calibrate_writes_what_eval_takes() {
    let folder = tempdir().unwrap();
    write_model(folder.path());
    let calibrate = ["calibrate", "model", "-o", "moments.safetensors", "--text", "text.txt"];
    let (code, report, errors) = run(&[&calibrate[..], &["--hessian"]].concat(), folder.path());
    assert_eq!((code, errors.as_str()), (0, ""));
    assert_eq!(report, "moments.safetensors: second moments and Hessians of 6 layers over 11 tokens\n");
    let eval =
        ["eval", "model", "--text", "text.txt", "--calibration", "moments.safetensors", "--backend", "cpu"];
    let (code, table, errors) =
        run(&[&eval[..], &["--method", "gptq", "--smooth", "0.5"]].concat(), folder.path());
    assert_eq!(code, 0, "{errors}");
    assert!(table.contains("calibrated with moments.safetensors"), "{table}");

    // Without Hessians, gptq says what is missing, but the weighted search has enough.
    let (code, _, _) = run(&calibrate, folder.path());
    assert_eq!(code, 0);
    let (code, _, errors) = run(&[&eval[..], &["--method", "gptq"]].concat(), folder.path());
    assert_eq!(code, 1);
    assert!(errors.contains("gptq") && errors.contains("--hessian"), "{errors}");
    assert_eq!(run(&[&eval[..], &["--method", "weighted"]].concat(), folder.path()).0, 0);
    let (code, _, errors) = run(&[&eval[..], &["--method", "search"]].concat(), folder.path());
    assert_eq!(code, 1);
    assert!(errors.contains("no method needs --calibration"), "{errors}");
}

#[test]
fn quantize_takes_what_calibrate_writes() {
    let folder = tempdir().unwrap();
    write_model(folder.path());
    let calibrate =
        ["calibrate", "model", "-o", "moments.safetensors", "--text", "text.txt", "--hessian", "--json"];
    let (code, report, errors) = run(&calibrate, folder.path());
    assert_eq!(code, 0, "{errors}");
    let calibrated: Value = serde_json::from_str(&report).unwrap();
    let quantize =
        ["quantize", "model", "-o", "packed", "--method", "gptq", "--calibration", "moments.safetensors"];
    let (code, _, errors) = run(&quantize, folder.path());
    assert_eq!(code, 0, "{errors}");
    let config = fs::read_to_string(folder.path().join("packed/config.json")).unwrap();
    let config: Value = serde_json::from_str(&config).unwrap();
    assert_eq!(config["quantization_config"]["method"], "gptq");
    let (code, inspected, errors) = run(&["inspect", "packed", "--json"], folder.path());
    assert_eq!(code, 0, "{errors}");
    let inspected: Value = serde_json::from_str(&inspected).unwrap();
    let packed = inspected["entries"].as_array().unwrap().iter().filter(|entry| !entry["group"].is_null());
    assert_eq!(json!(packed.count()), calibrated["layers"]);
}

#[test]
fn the_table_has_a_page_and_a_json_file_with_the_same_figures() {
    let folder = tempdir().unwrap();
    write_model(folder.path());
    let arguments = ["eval", "model", "--text", "text.txt", "--table", "accuracy", "--backend", "cpu"];
    let (code, _, errors) = run(&arguments, folder.path());
    assert_eq!((code, errors.as_str()), (0, ""));
    let page = fs::read_to_string(folder.path().join("accuracy.md")).unwrap();
    let json: Value =
        serde_json::from_str(&fs::read_to_string(folder.path().join("accuracy.json")).unwrap()).unwrap();
    for row in json[0]["rows"].as_array().unwrap() {
        let cosine = row["score"]["cosine"].as_f64().unwrap();
        assert!(page.contains(&format!("{cosine:.4}")), "{row}");
    }
}

#[test]
fn captured_inputs_become_moments_without_a_model() {
    let folder = tempdir().unwrap();
    let data: Vec<u8> = [1.0f32, 2.0, 3.0, 4.0].iter().flat_map(|value| value.to_le_bytes()).collect();
    let view = TensorView::new(Dtype::F32, vec![2, 2], &data).unwrap();
    safetensors::serialize_to_file([("layer", view)], None, &folder.path().join("inputs.safetensors"))
        .unwrap();
    let arguments = ["calibrate", "--inputs", "inputs.safetensors", "-o", "moments.safetensors", "--json"];
    let (code, report, errors) = run(&arguments, folder.path());
    assert_eq!((code, errors.as_str()), (0, ""));
    let report: Value = serde_json::from_str(&report).unwrap();
    assert_eq!((&report["layers"], &report["tokens"]), (&json!(1), &json!(2)));
}

#[test]
fn bad_models_and_texts_are_named_and_exit_with_1() {
    let folder = tempdir().unwrap();
    write_model(folder.path());
    for (arguments, named) in [
        (&["eval", "missing"][..], "missing"),
        (&["eval", "model", "--text", "none.txt"], "none.txt"),
        (&["eval", "text.txt"], "text.txt: "),
        (&["calibrate", "model", "-o", "no/such/folder", "--text", "text.txt"], "no/such/folder"),
        (&["eval", "model", "--calibration", "text.txt", "--method", "gptq"], "text.txt: "),
    ] {
        let (code, output, errors) = run(arguments, folder.path());
        assert_eq!((code, output.as_str()), (1, ""), "{arguments:?}");
        assert!(
            errors.starts_with("error: ") && errors.lines().count() == 1 && errors.contains(named),
            "{errors}"
        );
    }
}

#[test]
fn bad_arguments_are_named_and_exit_with_2() {
    let folder = tempdir().unwrap();
    for (arguments, named) in [
        (&["eval"][..], "MODEL"),
        (&["eval", "m", "--method", "awq"], "unknown method \"awq\""),
        (&["eval", "m", "--group", "63"], "63"),
        (&["eval", "m", "--smooth", "2"], "from 0 to 1"),
        (&["eval", "m", "--window", "1"], "1 is not in 2.."),
        (&["eval", "m", "--table", "t", "--method", "rtn"], "--table"),
        (&["calibrate", "m"], "--output"),
        (&["calibrate", "-o", "x"], "MODEL"),
        (&["calibrate", "m", "-o", "x", "--inputs", "y"], "--inputs"),
    ] {
        let (code, _, errors) = run(arguments, folder.path());
        assert_eq!(code, 2, "{arguments:?}: {errors}");
        assert!(errors.contains(named), "{arguments:?}: {errors}");
    }
}
