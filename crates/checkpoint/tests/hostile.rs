//! Files that are damaged or made to do harm: each is an error that names the cause, and leaves nothing behind.

mod common;

use std::fs;
use std::path::Path;

use common::{
    Tensor, bf16_tensor, contents, f32_tensor, llama, numbers, safetensors_bytes, write_json, write_llama,
};
use liquidgemm::Group;
use liquidgemm_checkpoint::{
    Checkpoint, CheckpointError, Model, OpenOptions, Plan, Problem, QuantizeOptions, open, verify,
};
use serde_json::{Value, json};

/// Tries to quantize a model. Checks that nothing is left but the model.
fn attempt(model: &Path) -> CheckpointError {
    let parent = model.parent().unwrap();
    let before = contents(parent);
    let outcome = open(model, OpenOptions::default()).and_then(|source| {
        Plan::new(source.as_ref(), &QuantizeOptions::default())?.run(&parent.join("out"), false, &())
    });
    let error = outcome.expect_err("a hostile model");
    assert!(contents(parent) == before, "something was left behind");
    error
}

fn problem(error: CheckpointError) -> Problem {
    match error {
        CheckpointError::Input { problem, .. } => problem,
        other => panic!("{other:?}"),
    }
}

/// Attempts a single file with these bytes.
fn attempt_bytes(bytes: &[u8]) -> Problem {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.safetensors");
    fs::write(&file, bytes).unwrap();
    problem(attempt(&file))
}

/// A safetensors file with this header and these bytes of data.
fn with_header(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + data, 1);
    bytes
}

/// Attempts the small LLaMA after `change` has changed its folder.
fn attempt_changed(change: impl FnOnce(&Path)) -> CheckpointError {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    write_llama(&model);
    change(&model);
    attempt(&model)
}

#[test]
fn huge_headers_are_refused_before_memory_is_reserved() {
    for length in [u64::MAX, 1 << 40, 100_000_001] {
        let problem = attempt_bytes(&length.to_le_bytes());
        assert!(matches!(problem, Problem::TooLong { bytes, .. } if bytes == length), "{problem}");
    }
    // A length within the limit, but beyond the file's end.
    assert!(matches!(attempt_bytes(&99_000_000u64.to_le_bytes()), Problem::Length { .. }));
    assert!(matches!(attempt_bytes(b"abc"), Problem::Length { .. }));
    assert!(matches!(attempt_bytes(b""), Problem::Length { .. }));
}

#[test]
fn headers_that_are_no_json_or_describe_impossible_tensors_are_refused() {
    let two = |first: &str, second: &str| {
        format!(
            r#"{{"a.weight":{{"dtype":"F32","shape":[8],"data_offsets":{first}}},
                "b.weight":{{"dtype":"F32","shape":[8],"data_offsets":{second}}}}}"#
        )
    };
    let one = |dtype: &str, shape: &str, end: &str| {
        format!(r#"{{"a.weight":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[0,{end}]}}}}"#)
    };
    let huge = "18446744073709551615";
    for (header, data) in [
        ("{".to_owned(), 0),
        ("[]".to_owned(), 0),
        ("\u{1}".to_owned(), 0),
        // Overlapping tensors, a gap, and an end before the beginning.
        (two("[0,32]", "[16,48]"), 48),
        (two("[0,32]", "[0,32]"), 32),
        (two("[0,32]", "[40,72]"), 72),
        (two("[32,0]", "[32,64]"), 64),
        // Shapes that do not fit the bytes, and whose product exceeds 2⁶⁴.
        (one("F32", "[9]", "32"), 32),
        (one("F16", "[8]", "32"), 32),
        (one("F32", "[4294967296,4294967296]", "32"), 32),
        (one("F32", "[4611686018427387904,4]", "0"), 0),
        (one("F32", &format!("[{huge},2]"), "32"), 32),
        (one("F32", "[-8]", "32"), 32),
        (one("F33", "[8]", "32"), 32),
        (one("F32", "[8]", huge), 32),
    ] {
        let problem = attempt_bytes(&with_header(&header, data));
        assert!(matches!(problem, Problem::Header { .. }), "{header}: {problem}");
    }
}

#[test]
fn empty_tensors_with_huge_sides_are_kept_at_once() {
    let header = r#"{"a.weight":{"dtype":"F32","shape":[4611686018427387904,0],"data_offsets":[0,0]},
        "b.weight":{"dtype":"F32","shape":[0,4611686018427387904,4],"data_offsets":[0,0]}}"#;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.safetensors");
    fs::write(&file, with_header(header, 0)).unwrap();
    let source = open(&file, OpenOptions::default()).unwrap();
    Plan::new(source.as_ref(), &QuantizeOptions::default())
        .unwrap()
        .run(&folder.path().join("out"), false, &())
        .unwrap();
    assert_eq!(Checkpoint::open(folder.path().join("out")).unwrap().tensors().count(), 2);
}

#[test]
fn truncated_and_extended_shards_are_refused() {
    let whole = safetensors_bytes(&llama()[0]);
    for length in [whole.len() - 1, whole.len() / 2, 100] {
        assert!(matches!(attempt_bytes(&whole[..length]), Problem::Length { .. }), "{length}");
    }
    assert!(matches!(attempt_bytes(&[&whole[..], &[0]].concat()), Problem::Length { .. }));
}

#[test]
fn an_index_that_names_missing_files_or_tensors_is_refused() {
    let index = |model: &Path, map: Value| {
        write_json(&model.join("model.safetensors.index.json"), &json!({"weight_map": map}));
    };
    let error = attempt_changed(|model| index(model, json!({"a.weight": "model-00007.safetensors"})));
    assert!(matches!(problem(error), Problem::Missing { name } if name == "model-00007.safetensors"));
    let error =
        attempt_changed(|model| index(model, json!({"a.weight": "model-00001-of-00002.safetensors"})));
    assert!(matches!(problem(error), Problem::Missing { name } if name.starts_with("a.weight")));
    for bad in [json!({}), json!([]), json!({"a": 1}), json!("x")] {
        let error = attempt_changed(|model| index(model, bad.clone()));
        assert!(matches!(problem(error), Problem::Json { .. }), "{bad}");
    }
    let error = attempt_changed(|model| fs::write(model.join("model.safetensors.index.json"), "{").unwrap());
    assert!(matches!(problem(error), Problem::Json { .. }));
}

#[test]
fn an_index_cannot_name_files_elsewhere() {
    let names = [
        "../outside.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "..",
        "",
        "config.json",
        "a\\b.safetensors",
    ];
    for name in names {
        let error = attempt_changed(|model| {
            fs::write(model.parent().unwrap().join("outside.safetensors"), safetensors_bytes(&llama()[0]))
                .unwrap();
            write_json(
                &model.join("model.safetensors.index.json"),
                &json!({"weight_map": {"a.weight": name}}),
            );
        });
        assert!(matches!(problem(error), Problem::UnsafeName { name: found } if found == name));
    }
}

#[test]
fn a_tensor_in_two_shards_is_refused() {
    let error = attempt_changed(|model| {
        fs::copy(
            model.join("model-00001-of-00002.safetensors"),
            model.join("model-00002-of-00002.safetensors"),
        )
        .unwrap();
        let mut map: serde_json::Map<String, Value> = llama()[0]
            .iter()
            .map(|tensor| (tensor.0.clone(), json!("model-00001-of-00002.safetensors")))
            .collect();
        map.insert(llama()[0][0].0.clone(), json!("model-00002-of-00002.safetensors"));
        map.insert(llama()[0][1].0.clone(), json!("model-00001-of-00002.safetensors"));
        write_json(&model.join("model.safetensors.index.json"), &json!({"weight_map": map}));
    });
    assert!(matches!(problem(error), Problem::Twice { .. }));
}

#[test]
fn names_that_collide_with_packed_tensors_are_refused() {
    let tensors = [bf16_tensor("a.weight", &[128, 128], 1), bf16_tensor("a.weight_codes", &[3], 2)];
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.safetensors");
    fs::write(&file, safetensors_bytes(&tensors)).unwrap();
    assert!(matches!(problem(attempt(&file)), Problem::Twice { name, .. } if name == "a.weight_codes"));
}

#[test]
fn scales_of_the_wrong_shape_or_type_are_refused() {
    let codes: Vec<u8> = vec![0x38; 128 * 256];
    let weight = || ("a.weight".to_owned(), safetensors::Dtype::F8_E4M3, vec![128, 256], codes.clone());
    let bad: [Tensor; 3] = [
        f32_tensor("a.weight_scale_inv", &[2, 2], &numbers(4, 1)),
        f32_tensor("a.weight_scale", &[64], &numbers(64, 1)),
        ("a.weight_scale".to_owned(), safetensors::Dtype::I32, vec![128], vec![0; 512]),
    ];
    for scales in bad {
        let problem = attempt_bytes(&safetensors_bytes(&[weight(), scales]));
        assert!(matches!(problem, Problem::Tensor { .. }), "{problem}");
    }
}

#[test]
fn folders_without_weights_or_configuration_say_what_to_give() {
    for (removed, expected) in [
        (&["config.json"][..], "no config.json"),
        (&["model.safetensors.index.json"], "no model.safetensors.index.json"),
        (
            &[
                "model.safetensors.index.json",
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
            ],
            "no .safetensors file",
        ),
    ] {
        let error = attempt_changed(|model| {
            removed.iter().for_each(|name| fs::remove_file(model.join(name)).unwrap());
        });
        assert!(error.to_string().contains(expected), "{error}");
    }
    let error = attempt_changed(|model| fs::write(model.join("config.json"), "[1]").unwrap());
    assert!(matches!(problem(error), Problem::Json { .. }));
}

#[test]
fn formats_that_cannot_be_taken_say_why() {
    for (config, expected) in [
        (json!({"quant_method": "mxfp4"}), "MXFP4"),
        (json!({"quant_method": "modelopt", "quant_algo": "NVFP4"}), "NVFP4"),
        (
            json!({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}),
            "floating-point codes",
        ),
        (json!({"quant_method": "compressed-tensors", "format": "marlin-24"}), "marlin-24"),
        (json!({"quant_method": "bitsandbytes"}), "bitsandbytes"),
        (json!({"quant_method": "gptq", "bits": 3}), "3"),
        (json!({"quant_method": "awq", "bits": 4, "version": "gemv"}), "gemv"),
        (json!({"quant_method": 7}), "7"),
    ] {
        let error = attempt_changed(|model| {
            write_json(&model.join("config.json"), &json!({"quantization_config": config}))
        });
        assert!(error.to_string().contains(expected), "{error}");
    }
}

#[test]
fn damaged_packed_checkpoints_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (model, out) = (folder.path().join("model"), folder.path().join("out"));
    write_llama(&model);
    let source = open(&model, OpenOptions::default()).unwrap();
    Plan::new(source.as_ref(), &QuantizeOptions::default()).unwrap().run(&out, false, &()).unwrap();
    let shard = out.join("model-00001-of-00002.safetensors");
    let bytes = fs::read(&shard).unwrap();
    let header = 8 + u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
    // Replaces a text in the header by another of the same length.
    let replaced = |from: &str, to: &str| {
        assert_eq!(from.len(), to.len());
        let text = std::str::from_utf8(&bytes[8..header]).unwrap();
        assert!(text.contains(from), "{from} is not in {text}");
        let mut changed = bytes.clone();
        changed[8..header].copy_from_slice(text.replace(from, to).as_bytes());
        fs::write(&shard, &changed).unwrap();
        let outcome = Checkpoint::open(&out).and_then(|checkpoint| {
            let modules: Vec<String> = checkpoint.modules().map(|module| module.name.to_owned()).collect();
            modules.iter().try_for_each(|module| checkpoint.packed(module).map(drop))
        });
        fs::write(&shard, &bytes).unwrap();
        outcome.map_err(problem)
    };
    assert!(replaced("liquidgemm", "liquidgemm").is_ok());
    assert!(matches!(replaced("version\\\":1", "version\\\":9"), Err(Problem::Json { .. })));
    assert!(matches!(
        replaced("\\\"group\\\":\\\"64\\\"", "\\\"group\\\":\\\"65\\\""),
        Err(Problem::Tensor { .. })
    ));
    assert!(matches!(replaced("\\\"k\\\":256", "\\\"k\\\":257"), Err(Problem::Tensor { .. })));
    // Padding hides a smaller k, so only the checksum shows it.
    assert!(matches!(replaced("\\\"k\\\":256", "\\\"k\\\":255"), Err(Problem::Checksum { .. })));
    assert!(matches!(replaced("\\\"n\\\":200", "\\\"n\\\":199"), Err(Problem::Tensor { .. })));
    assert!(matches!(
        replaced("0.mlp.up_proj.weight_codes", "0.mlp.up_proj.weight_c0des"),
        Err(Problem::Missing { .. })
    ));
    let config = fs::read_to_string(out.join("config.json")).unwrap();
    for (from, to) in
        [("\"format_version\": 1", "\"format_version\": 2"), ("layers.1.mlp.up_proj", "layers.1.mlp.no_proj")]
    {
        assert!(config.contains(from));
        fs::write(out.join("config.json"), config.replace(from, to)).unwrap();
        assert!(Checkpoint::open(&out).is_err(), "{to}");
    }
}

/// Saves a packed folder again as one file, as `save_pretrained` of transformers does: without the metadata.
fn saved_again(out: &Path, change: impl Fn(&str, &mut Vec<usize>, &mut Vec<u8>)) {
    let mut all = Vec::new();
    for entry in fs::read_dir(out).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            let bytes = fs::read(&path).unwrap();
            for (name, tensor) in safetensors::SafeTensors::deserialize(&bytes).unwrap().iter() {
                let (mut shape, mut data) = (tensor.shape().to_vec(), tensor.data().to_vec());
                change(name, &mut shape, &mut data);
                all.push((name.to_owned(), tensor.dtype(), shape, data));
            }
            fs::remove_file(&path).unwrap();
        }
    }
    fs::remove_file(out.join("model.safetensors.index.json")).ok();
    fs::write(out.join("model.safetensors"), safetensors_bytes(&all)).unwrap();
}

#[test]
fn a_folder_that_lost_its_checksums_is_read_and_its_structure_and_ranges_are_checked() {
    let folder = tempfile::tempdir().unwrap();
    let (model, out) = (folder.path().join("model"), folder.path().join("out"));
    write_llama(&model);
    let source = open(&model, OpenOptions::default()).unwrap();
    for group in [Group::Channel, Group::K(128), Group::K(64)] {
        let options = QuantizeOptions { group: Some(group), ..Default::default() };
        Plan::new(source.as_ref(), &options).unwrap().run(&out, true, &()).unwrap();
        let before = Checkpoint::open(&out).unwrap();
        assert_eq!(before.without_checksum(), 0);
        let modules: Vec<_> = before
            .modules()
            .map(|module| (module.name.to_owned(), module.group, before.packed(module.name).unwrap()))
            .collect();
        saved_again(&out, |_, _, _| {});
        let after = Checkpoint::open(&out).unwrap();
        let found: Vec<_> = after
            .modules()
            .map(|module| (module.name.to_owned(), module.group, after.packed(module.name).unwrap()))
            .collect();
        assert!(found == modules, "{group}");
        let verified = verify(&after, Some(&Model::open(&model).unwrap()), &()).unwrap();
        assert_eq!(verified.problems, Vec::<String>::new());
        assert_eq!(verified.without_checksum, verified.modules.len() + verified.tensors);
        // One shard alone has nothing that says what its tensors are.
        let alone = Checkpoint::open(out.join("model.safetensors")).map_err(problem);
        assert!(matches!(alone, Err(Problem::Unsupported { .. })));
    }
    // Pairs that break the invariant, and a scale that is no number.
    saved_again(&out, |name, _, data| {
        if name.ends_with("0.mlp.up_proj.weight_pairs") {
            data[..2].fill(255);
        } else if name.ends_with("1.mlp.up_proj.weight_scales") {
            data[..4].copy_from_slice(&f32::NAN.to_le_bytes());
        }
    });
    let problems = verify(&Checkpoint::open(&out).unwrap(), None, &()).unwrap().problems;
    assert!(problems.len() == 2, "{problems:?}");
    // Shapes that do not fit one another.
    for (part, shape) in [
        ("weight_codes", 0),
        ("weight_codes", 2),
        ("weight_pairs", 1),
        ("weight_pairs", 2),
        ("weight_scales", 0),
    ] {
        let copy = folder.path().join("copy");
        fs::create_dir(&copy).unwrap();
        for file in ["model.safetensors", "config.json"] {
            fs::copy(out.join(file), copy.join(file)).unwrap();
        }
        saved_again(&copy, |name, sides, data| {
            if name == format!("model.layers.0.mlp.up_proj.{part}") {
                // One more than twice as much: neither another group nor a longer K fits.
                sides[shape] = 2 * sides[shape] + 1;
                let bytes = sides.iter().product::<usize>() * if part == "weight_scales" { 4 } else { 1 };
                data.resize(bytes, 0);
            }
        });
        let outcome = Checkpoint::open(&copy).map_err(problem);
        assert!(matches!(outcome, Err(Problem::Tensor { .. })), "{part} {shape}: {outcome:?}");
        fs::remove_dir_all(&copy).unwrap();
    }
}

#[cfg(unix)]
mod unix {
    use std::os::unix::fs::symlink;
    use std::process::Command;

    use super::*;

    #[test]
    fn links_out_of_the_folder_are_refused() {
        for name in [
            "model-00001-of-00002.safetensors",
            "tokenizer.json",
            "config.json",
            "model.safetensors.index.json",
        ] {
            let error = attempt_changed(|model| {
                let outside = model.parent().unwrap().join("outside");
                fs::rename(model.join(name), &outside).unwrap();
                symlink(&outside, model.join(name)).unwrap();
            });
            assert!(matches!(problem(error), Problem::LeadsOutside { .. }), "{name}");
        }
        let error = attempt_changed(|model| symlink("/", model.join("extra")).unwrap());
        assert!(matches!(problem(error), Problem::LeadsOutside { .. }));
    }

    #[test]
    fn links_within_the_folder_and_into_the_hubs_cache_are_followed() {
        let folder = tempfile::tempdir().unwrap();
        let snapshot = folder.path().join("snapshots").join("0123abcd");
        let blobs = folder.path().join("blobs");
        fs::create_dir_all(&blobs).unwrap();
        write_llama(&snapshot);
        for (index, name) in
            ["model-00001-of-00002.safetensors", "tokenizer.json", "config.json"].iter().enumerate()
        {
            fs::rename(snapshot.join(name), blobs.join(index.to_string())).unwrap();
            symlink(format!("../../blobs/{index}"), snapshot.join(name)).unwrap();
        }
        symlink("tokenizer.json", snapshot.join("special.json")).unwrap();
        let source = open(&snapshot, OpenOptions::default()).unwrap();
        Plan::new(source.as_ref(), &QuantizeOptions::default())
            .unwrap()
            .run(&folder.path().join("out"), false, &())
            .unwrap();
        let files = contents(&folder.path().join("out"));
        assert_eq!(files["tokenizer.json"], files["special.json"]);
        assert!(
            !fs::symlink_metadata(folder.path().join("out").join("tokenizer.json")).unwrap().is_symlink()
        );
    }

    #[test]
    fn pipes_and_folders_in_the_place_of_files_are_refused_at_once() {
        let pipe = |path: &Path| assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
        for name in ["model-00001-of-00002.safetensors", "config.json", "model.safetensors.index.json"] {
            let error = attempt_pipe(name, pipe);
            assert!(matches!(problem(error), Problem::NotAFile { .. }), "{name}");
            let error = attempt_pipe(name, |path| fs::create_dir(path).unwrap());
            assert!(matches!(problem(error), Problem::NotAFile { .. }), "{name}");
        }
        let error = attempt_pipe("tokenizer.json", pipe);
        assert!(matches!(problem(error), Problem::NotAFile { .. }));
    }

    /// Attempts the small LLaMA with something else in the place of a file. Reads no pipe.
    fn attempt_pipe(name: &str, make: impl FnOnce(&Path)) -> CheckpointError {
        let folder = tempfile::tempdir().unwrap();
        let model = folder.path().join("model");
        write_llama(&model);
        fs::remove_file(model.join(name)).unwrap();
        make(&model.join(name));
        let outcome = open(&model, OpenOptions::default());
        outcome.expect_err("no regular file")
    }
}
