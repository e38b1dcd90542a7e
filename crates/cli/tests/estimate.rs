//! `liquidgemm estimate` as a program: exit codes, JSON, and the page.

#![cfg(feature = "estimate")]

use assert_cmd::Command;
use serde_json::Value;

fn estimate(arguments: &[&str]) -> std::process::Output {
    Command::cargo_bin("liquidgemm").unwrap().arg("estimate").args(arguments).output().unwrap()
}

#[test]
fn json_and_page_of_a_model_folder_agree_with_the_built_in_model() {
    let folder = tempfile::tempdir().unwrap();
    let config = r#"{"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}"#;
    std::fs::write(folder.path().join("config.json"), config).unwrap();
    let page = folder.path().join("page.html");
    let options = ["--batch", "1,16..64", "--price", "2.5", "--json"];
    let json = |model: &[&str]| -> Value {
        let output = estimate(&[model, &options[..]].concat());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let built_in = json(&["llama-3-8b"]);
    let read = json(&[folder.path().to_str().unwrap(), "--html", page.to_str().unwrap()]);
    assert_eq!(built_in["schemes"], read["schemes"]);
    assert_eq!(read["settings"]["batches"], serde_json::json!([1, 16, 32, 64]));
    assert!(std::fs::read_to_string(page).unwrap().starts_with("<!DOCTYPE html>"));
}

#[test]
fn exit_code_is_1_for_what_cannot_be_used_and_2_for_invalid_arguments() {
    let folder = tempfile::tempdir().unwrap();
    let page = folder.path().join("page.html");
    std::fs::write(folder.path().join("config.json"), r#"{"model_type": "llama", "num_attention_heads": 0}"#)
        .unwrap();
    let path = folder.path().to_str().unwrap();
    for (arguments, code, part) in [
        (&["LLaMA-9"][..], 1, "built-in model"),
        (&[path, "--html", page.to_str().unwrap()], 1, "num_attention_heads is 0"),
        (&["Yi-34B", "--gpus", "3"], 1, "can't be divided among 3 GPUs"),
        (&["Yi-34B", "--measurements", "missing.json"], 1, "cannot read missing.json"),
        (&[], 2, "required"),
        (&["Yi-34B", "--batch", "0"], 2, "batch size"),
        (&["Yi-34B", "--batch", "99999999"], 2, "exceeds"),
        (&["Yi-34B", "--gpu", "a100"], 2, "h100-sxm"),
        (&["Yi-34B", "--gpus", "0"], 2, "1..=1024"),
        (&["Yi-34B", "--input", "0"], 2, "1.."),
        (&["Yi-34B", "--price", "nan"], 2, "a price"),
        (&["Yi-34B", "--memory", "1.1"], 2, "fraction"),
        (&["Yi-34B", "--kv-bits", "7"], 2, "4, 8 or 16"),
        (&["Yi-34B", "--list"], 2, "cannot be used with"),
        (&["--list", "--batch", "4"], 2, "cannot be used with"),
        (&["--list", "--kv-bits", "8"], 2, "cannot be used with"),
    ] {
        let output = estimate(arguments);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {stderr}");
        assert!(stderr.contains(part), "{arguments:?}: {part:?} is not in {stderr}");
        assert!(output.stdout.is_empty(), "{arguments:?}");
    }
    assert!(!page.exists());
    let list = estimate(&["--list"]);
    assert!(list.status.success());
    let text = String::from_utf8(list.stdout).unwrap();
    assert!(text.contains("DeepSeek-V3") && text.contains("gh200-144gb"));
    let list: serde_json::Value = serde_json::from_slice(&estimate(&["--list", "--json"]).stdout).unwrap();
    assert!(list["gpus"].as_array().unwrap().iter().any(|gpu| gpu["key"] == "gh200-144gb"), "{list}");
}
