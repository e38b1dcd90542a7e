//! Tests of whole quantizations: what is packed and kept, what the folder holds, and that runs can be resumed.

mod common;

use std::fs;
use std::path::Path;

use common::{
    Tensor, bf16_values, contents, f32_tensor, llama, numbers, safetensors_bytes, write_json, write_llama,
};
use liquidgemm::{Group, PackedWeights, cpu};
use liquidgemm_checkpoint::{
    Axis, Checkpoint, CheckpointError, Method, Model, OpenOptions, Patterns, Plan, Problem, QuantizeOptions,
    Summary, compare, open, verify,
};
use safetensors::tensor::Dtype;
use serde_json::{Value, json};

fn quantize(model: &Path, output: &Path, options: &QuantizeOptions) -> Result<Summary, CheckpointError> {
    let source = open(model, OpenOptions::default())?;
    Plan::new(source.as_ref(), options)?.run(output, false, &())
}

fn options(method: Method, group: Option<Group>) -> QuantizeOptions {
    QuantizeOptions { method, group, ..Default::default() }
}

/// A quantized small LLaMA in a temporary folder.
struct Fixture {
    folder: tempfile::TempDir,
    checkpoint: Checkpoint,
}

fn fixture(options: &QuantizeOptions) -> Fixture {
    let folder = tempfile::tempdir().unwrap();
    write_llama(&folder.path().join("model"));
    quantize(&folder.path().join("model"), &folder.path().join("out"), options).unwrap();
    let checkpoint = Checkpoint::open(folder.path().join("out")).unwrap();
    Fixture { folder, checkpoint }
}

fn original(name: &str) -> Tensor {
    llama().into_iter().flatten().find(|tensor| tensor.0 == name).unwrap()
}

const MODULES: [(&str, usize, usize); 6] = [
    ("model.layers.0.mlp.down_proj", 192, 256),
    ("model.layers.0.mlp.up_proj", 200, 192),
    ("model.layers.0.self_attn.q_proj", 128, 192),
    ("model.layers.1.mlp.down_proj", 192, 256),
    ("model.layers.1.mlp.up_proj", 200, 192),
    ("model.layers.1.self_attn.q_proj", 128, 192),
];

#[test]
fn linear_layers_are_packed_as_the_library_packs_them_and_all_else_is_kept() {
    for (method, library) in
        [(Method::Rtn, liquidgemm::Method::Rtn), (Method::Search, liquidgemm::Method::Search)]
    {
        for group in [Group::K(64), Group::K(128), Group::Channel] {
            let Fixture { checkpoint, .. } = fixture(&options(method, Some(group)));
            let found: Vec<_> =
                checkpoint.modules().map(|module| (module.name.to_owned(), module.n, module.k)).collect();
            let expected: Vec<_> = MODULES.iter().map(|&(name, n, k)| (name.to_owned(), n, k)).collect();
            assert_eq!(found, expected);
            for (name, n, k) in MODULES {
                let weights = bf16_values(&original(&format!("{name}.weight")));
                let options = liquidgemm::QuantizeOptions { method: library, group, second_moments: None };
                let packed = PackedWeights::quantize_with(&weights, n, k, &options).unwrap();
                assert!(checkpoint.packed(name).unwrap() == packed, "{name}, {method}, {group}");
            }
            let kept = llama().into_iter().flatten();
            let kept: Vec<Tensor> = kept
                .filter(|tensor| !MODULES.iter().any(|(name, ..)| tensor.0 == format!("{name}.weight")))
                .collect();
            assert_eq!(checkpoint.tensors().count(), kept.len());
            for (name, dtype, shape, bytes) in kept {
                let tensor = checkpoint.tensor(&name).unwrap();
                assert_eq!((tensor.dtype, tensor.shape, tensor.bytes), (dtype, shape, bytes), "{name}");
            }
        }
    }
}

#[test]
fn the_folder_is_complete() {
    let Fixture { folder, checkpoint } = fixture(&options(Method::Rtn, Some(Group::K(128))));
    let files = contents(&folder.path().join("out"));
    let names: Vec<&str> = files.keys().map(String::as_str).collect();
    let expected = [
        "1_Pooling/config.json",
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    ];
    assert_eq!(names, expected);
    assert_eq!(files["tokenizer.json"], b"{\"tokens\": true}");
    assert_eq!(checkpoint.config()["hidden_size"], 192);
    let own = &checkpoint.config()["quantization_config"];
    for (key, value) in [
        ("quant_method", json!("liquidgemm")),
        ("format_version", json!(1)),
        ("quantizer_version", json!(env!("CARGO_PKG_VERSION"))),
        ("bits", json!(4)),
        ("activation_bits", json!(8)),
        ("method", json!("rtn")),
        ("group", json!("128")),
    ] {
        assert_eq!(own[key], value, "{key}");
    }
    assert_eq!(own["quantized_modules"].as_array().unwrap().len(), MODULES.len());
    let kept = json!(["model.layers.0.mlp.gate", "model.layers.1.mlp.gate", "lm_head"]);
    let sorted = |list: &Value| {
        let mut list: Vec<String> = list.as_array().unwrap().iter().map(Value::to_string).collect();
        list.sort();
        list
    };
    assert_eq!(sorted(&own["modules_to_not_convert"]), sorted(&kept));

    // The index names the file of every tensor, and any reader of safetensors can open them.
    let index: Value = serde_json::from_slice(&files["model.safetensors.index.json"]).unwrap();
    let mut total = 0;
    for (tensor, file) in index["weight_map"].as_object().unwrap() {
        let shard = safetensors::SafeTensors::deserialize(&files[file.as_str().unwrap()]).unwrap();
        total += shard.tensor(tensor).unwrap().data().len();
    }
    assert_eq!(index["metadata"]["total_size"], total);
}

#[test]
fn patterns_choose_and_a_pattern_that_fits_nothing_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    write_llama(folder.path());
    let source = open(folder.path(), OpenOptions::default()).unwrap();
    let packed = |include: &[&str], exclude: &[&str]| {
        let list = |patterns: &[&str]| patterns.iter().map(|&pattern| pattern.to_owned()).collect();
        let patterns = Patterns { include: list(include), exclude: list(exclude) };
        let plan = Plan::new(source.as_ref(), &QuantizeOptions { patterns, ..Default::default() })?;
        let packed = plan
            .layers()
            .iter()
            .filter(|layer| matches!(layer.fate, liquidgemm_checkpoint::Fate::Packed { .. }));
        Ok::<_, CheckpointError>(packed.map(|layer| layer.name.clone()).collect::<Vec<_>>())
    };
    assert_eq!(packed(&[], &[]).unwrap().len(), 6);
    assert!(packed(&["lm_head"], &[]).unwrap().contains(&"lm_head.weight".to_owned()));
    assert_eq!(packed(&["*.gate"], &["model.layers.0.*"]).unwrap().len(), 4);
    assert_eq!(packed(&["lm_head"], &["*"]).unwrap(), Vec::<String>::new());
    for (include, exclude) in [(&["lm_haed"][..], &[][..]), (&[], &["layers.7.*"]), (&["model.norm"], &[])] {
        assert!(matches!(packed(include, exclude), Err(CheckpointError::Pattern { .. })));
    }
    assert!(matches!(packed(&["[a"], &[]), Err(CheckpointError::Pattern { .. })));
}

#[test]
fn ranks_have_the_parts_of_the_whole_by_plain_slicing() {
    for group in [Group::K(64), Group::K(128), Group::Channel] {
        let Fixture { checkpoint, .. } = fixture(&options(Method::Rtn, Some(group)));
        for (name, n, k) in MODULES {
            let whole = checkpoint.packed(name).unwrap();
            for world in [1, 2, 4] {
                for rank in 0..world {
                    let part = n / world;
                    let shard = checkpoint.packed_shard(name, Axis::N, rank, world).unwrap();
                    assert!(shard == whole.channel_shard(part * rank..part * (rank + 1)).unwrap());
                }
            }
            let step = if group == Group::K(128) { 128 } else { 64 };
            for world in [1, 2, 3] {
                for rank in 0..world {
                    let shard = checkpoint.packed_shard(name, Axis::K, rank, world);
                    let part = k / world;
                    if k % world == 0 && (part % step == 0 || world == 1) {
                        assert!(shard.unwrap() == whole.input_shard(part * rank..part * (rank + 1)).unwrap());
                    } else {
                        assert!(
                            matches!(shard, Err(CheckpointError::BadShard { .. })),
                            "{name} {world} {group}"
                        );
                    }
                }
            }
            assert!(matches!(
                checkpoint.packed_shard(name, Axis::N, 2, 2),
                Err(CheckpointError::BadShard { .. })
            ));
        }
        assert!(matches!(checkpoint.packed("lm_head"), Err(CheckpointError::NoModule { .. })));
    }
}

#[test]
fn a_linear_layer_has_its_bias() {
    let Fixture { checkpoint, .. } = fixture(&options(Method::Rtn, None));
    let layer = checkpoint.linear("model.layers.0.self_attn.q_proj").unwrap();
    let bias = bf16_values(&original("model.layers.0.self_attn.q_proj.bias"));
    assert_eq!(layer.bias().unwrap(), bias);
    assert!(checkpoint.linear("model.layers.0.mlp.up_proj").unwrap().bias().is_none());
    let input: Vec<half::bf16> = numbers(3 * 192, 9).into_iter().map(half::bf16::from_f32).collect();
    let output: Vec<half::bf16> = layer.forward(&cpu::QuantizeInput::new(&input, 3, 192), None).unwrap();
    assert_eq!(output.len(), 3 * 128);
}

#[test]
fn the_same_model_gives_the_same_bytes_for_any_number_of_threads() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    write_llama(&model);
    let outputs: Vec<_> = [1, 2, 5]
        .into_iter()
        .map(|threads| {
            let output = folder.path().join(threads.to_string());
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| quantize(&model, &output, &QuantizeOptions::default()).unwrap());
            contents(&output)
        })
        .collect();
    assert!(outputs[0] == outputs[1] && outputs[0] == outputs[2]);
}

#[test]
fn a_single_file_becomes_a_folder() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("layer.safetensors");
    let weights = numbers(128 * 64, 1);
    fs::write(&file, safetensors_bytes(&[f32_tensor("fc.weight", &[128, 64], &weights)])).unwrap();
    quantize(&file, &folder.path().join("out"), &options(Method::Rtn, None)).unwrap();
    let checkpoint = Checkpoint::open(folder.path().join("out")).unwrap();
    let rtn = liquidgemm::QuantizeOptions { method: liquidgemm::Method::Rtn, ..Default::default() };
    assert!(
        checkpoint.packed("fc").unwrap() == PackedWeights::quantize_with(&weights, 128, 64, &rtn).unwrap()
    );
    // A shard alone can be opened as well.
    let shard = Checkpoint::open(folder.path().join("out").join("model.safetensors")).unwrap();
    assert!(shard.packed("fc").unwrap() == checkpoint.packed("fc").unwrap());
}

#[test]
fn fp8_weights_are_multiplied_by_their_scales_and_the_scales_are_dropped() {
    let (n, k) = (200, 192);
    let codes: Vec<u8> = numbers(n * k, 3).iter().map(|x| (x.to_bits() >> 13) as u8 & 0xBF).collect();
    let value = |code: u8| {
        let (e, m) = ((code >> 3 & 15) as i32, (code & 7) as f32);
        let magnitude = if e == 0 { m / 512.0 } else { (1.0 + m / 8.0) * 2f32.powi(e - 7) };
        if code & 0x80 == 0 { magnitude } else { -magnitude }
    };
    let cases: [(&str, Vec<usize>, [usize; 2]); 4] = [
        ("weight_scale_inv", vec![2, 2], [128, 128]),
        ("weight_scale", vec![n, 1], [1, k]),
        ("weight_scale", vec![n], [1, k]),
        ("weight_scale", vec![], [n, k]),
    ];
    for (suffix, shape, block) in cases {
        let scales = numbers(shape.iter().product::<usize>().max(1), 4);
        let folder = tempfile::tempdir().unwrap();
        let model = folder.path().join("model");
        fs::create_dir(&model).unwrap();
        let config = json!({"model_type": "x", "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}});
        write_json(&model.join("config.json"), &config);
        let tensors = [
            ("a.weight".to_owned(), Dtype::F8_E4M3, vec![n, k], codes.clone()),
            f32_tensor(&format!("a.{suffix}"), &shape, &scales),
            ("lm_head.weight".to_owned(), Dtype::F8_E4M3, vec![n, k], codes.clone()),
            f32_tensor(&format!("lm_head.{suffix}"), &shape, &scales),
        ];
        fs::write(model.join("model.safetensors"), safetensors_bytes(&tensors)).unwrap();
        quantize(&model, &folder.path().join("out"), &options(Method::Rtn, None)).unwrap();
        let checkpoint = Checkpoint::open(folder.path().join("out")).unwrap();
        let columns = k.div_ceil(block[1]);
        let weights: Vec<f32> = (0..n * k)
            .map(|i| value(codes[i]) * scales[i / k / block[0] * columns + i % k / block[1]])
            .collect();
        let rtn = liquidgemm::QuantizeOptions { method: liquidgemm::Method::Rtn, ..Default::default() };
        assert!(
            checkpoint.packed("a").unwrap() == PackedWeights::quantize_with(&weights, n, k, &rtn).unwrap(),
            "{suffix} {shape:?}"
        );
        let kept: Vec<&str> = checkpoint.tensors().map(|tensor| tensor.0).collect();
        assert_eq!(kept, ["lm_head.weight", &format!("lm_head.{suffix}")]);
        let own = &checkpoint.config()["quantization_config"];
        assert_eq!(own["source_quantization_config"]["quant_method"], "fp8");
    }
}

#[test]
fn an_existing_output_is_kept_without_force_and_only_a_packed_one_is_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let (model, output) = (folder.path().join("model"), folder.path().join("out"));
    write_llama(&model);
    let source = open(&model, OpenOptions::default()).unwrap();
    let run = |group: usize, force| {
        let options = options(Method::Rtn, Some(Group::K(group)));
        Plan::new(source.as_ref(), &options).unwrap().run(&output, force, &())
    };
    run(64, false).unwrap();
    let before = contents(&output);
    assert!(matches!(run(128, false), Err(CheckpointError::OutputExists { .. })));
    assert!(contents(&output) == before);
    run(128, true).unwrap();
    assert!(contents(&output) != before);
    run(64, true).unwrap();
    assert!(contents(&output) == before);

    let other = folder.path().join("photos");
    fs::create_dir(&other).unwrap();
    fs::write(other.join("a.jpg"), "x").unwrap();
    let plan = Plan::new(source.as_ref(), &QuantizeOptions::default()).unwrap();
    assert!(matches!(plan.run(&other, true, &()), Err(CheckpointError::Options { .. })));
    assert_eq!(contents(&other).len(), 1);
    for place in [model.join("out"), model.clone()] {
        let outcome = plan.run(&place, true, &());
        assert!(matches!(outcome, Err(CheckpointError::Options { .. })), "{outcome:?}");
    }
    // Nothing is left beside the outputs.
    let mut names: Vec<_> =
        fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["model", "out", "photos"]);
}

#[test]
fn a_weight_that_is_not_finite_is_an_error_with_its_place_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("layer.safetensors");
    let mut weights = numbers(256 * 64, 1);
    weights[200 * 64 + 5] = f32::NAN;
    fs::write(&file, safetensors_bytes(&[f32_tensor("fc.weight", &[256, 64], &weights)])).unwrap();
    match quantize(&file, &folder.path().join("out"), &QuantizeOptions::default()) {
        Err(CheckpointError::Weights {
            module,
            error: liquidgemm::Error::NonFiniteWeight { channel: 200, k: 5, .. },
        }) => {
            assert_eq!(module, "fc");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn verify_finds_every_changed_byte_and_measures_the_error() {
    let Fixture { folder, checkpoint } = fixture(&options(Method::Rtn, None));
    let original = Model::open(folder.path().join("model")).unwrap();
    let found = verify(&checkpoint, Some(&original), &()).unwrap();
    assert_eq!(found.problems, Vec::<String>::new());
    assert_eq!(found.modules.len(), MODULES.len());
    for (name, difference) in &found.modules {
        let &(_, n, k) = MODULES.iter().find(|module| module.0 == name).unwrap();
        let weights = bf16_values(&self::original(&format!("{name}.weight")));
        let back = checkpoint.packed(name).unwrap().dequantize();
        let sum = |f: &dyn Fn(usize) -> f64| (0..n * k).map(f).sum::<f64>();
        let error = sum(&|i| (f64::from(back[i]) - f64::from(weights[i])).powi(2));
        let expected = (error / sum(&|i| f64::from(weights[i]).powi(2))).sqrt();
        assert!((difference.unwrap().relative / expected - 1.0).abs() < 1e-9);
        assert!((0.02..0.2).contains(&expected), "{expected}");
    }

    // A changed byte anywhere in the data, and a changed weight of the original.
    let shard = folder.path().join("out").join("model-00002-of-00002.safetensors");
    let bytes = fs::read(&shard).unwrap();
    let header = 8 + u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
    for at in [header, header + 1000, (header + bytes.len()) / 2, bytes.len() - 1] {
        let mut changed = bytes.clone();
        changed[at] ^= 16;
        fs::write(&shard, &changed).unwrap();
        let checkpoint = Checkpoint::open(folder.path().join("out")).unwrap();
        assert_eq!(verify(&checkpoint, None, &()).unwrap().problems.len(), 1, "byte {at}");
    }
    fs::write(&shard, &bytes).unwrap();
    let other = folder.path().join("model").join("model-00001-of-00002.safetensors");
    let mut changed = fs::read(&other).unwrap();
    // The first tensor by name is the embedding, which is kept.
    let header = 8 + u64::from_le_bytes(*changed.first_chunk().unwrap()) as usize;
    changed[header] ^= 1;
    fs::write(&other, changed).unwrap();
    let original = Model::open(folder.path().join("model")).unwrap();
    assert_eq!(verify(&checkpoint, Some(&original), &()).unwrap().problems.len(), 1);
}

#[test]
fn compare_measures_packed_and_original_models_alike() {
    let Fixture { folder, checkpoint } = fixture(&options(Method::Rtn, None));
    let [model, packed] = ["model", "out"].map(|name| Model::open(folder.path().join(name)).unwrap());
    let found = compare(&model, &packed, &()).unwrap();
    let verified = verify(&checkpoint, Some(&model), &()).unwrap();
    let verified: Vec<_> =
        verified.modules.into_iter().map(|(name, difference)| (name, difference.unwrap())).collect();
    assert_eq!(found.modules, verified);
    assert_eq!(found.only_in_second, Vec::<String>::new());
    assert_eq!(found.only_in_first.len(), 4);
    assert!(compare(&model, &model, &()).unwrap().modules.iter().all(|module| module.1.relative == 0.0));
}

#[test]
fn a_packed_model_is_not_quantized_again() {
    let Fixture { folder, .. } = fixture(&options(Method::Rtn, None));
    match open(folder.path().join("out"), OpenOptions::default()) {
        Err(CheckpointError::Input { problem: Problem::Unsupported { what, .. }, .. }) => {
            assert!(what.contains("packed already"), "{what}");
        }
        other => panic!("{other:?}"),
    }
}

#[cfg(unix)]
mod killed {
    use std::process::{Command, Stdio};
    use std::time::Duration;

    use liquidgemm_checkpoint::Progress;

    use super::*;

    /// The environment variable with the folder that the killed process works in.
    const VICTIM: &str = "LIQUIDGEMM_TEST_QUANTIZES_IN";

    /// Stops for good within the second shard.
    struct Stuck;

    impl Progress for Stuck {
        fn item(&self, name: &str) {
            if name == "model.layers.1.mlp.up_proj.weight" {
                std::thread::sleep(Duration::from_secs(600));
            }
        }
    }

    #[test]
    #[ignore = "works until it is killed, for the test below"]
    fn quantizes_until_it_is_killed() {
        let folder = std::env::var_os(VICTIM).expect("started by the test below");
        let folder = Path::new(&folder);
        let source = open(folder.join("model"), OpenOptions::default()).unwrap();
        let plan = Plan::new(source.as_ref(), &options(Method::Rtn, None)).unwrap();
        plan.run(&folder.join("out"), false, &Stuck).unwrap();
    }

    #[test]
    fn a_killed_run_is_resumed_with_the_same_bytes_and_only_by_the_same_plan() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        write_llama(&path("model"));
        quantize(&path("model"), &path("whole"), &options(Method::Rtn, None)).unwrap();

        let mut victim = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "killed::quantizes_until_it_is_killed"])
            .env(VICTIM, folder.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let partial = path("out.partial");
        let has = |prefix: &str| {
            let mut names = fs::read_dir(&partial).into_iter().flatten().flatten();
            names.any(|entry| entry.file_name().to_string_lossy().starts_with(prefix))
        };
        while !(has("model-00001") && has(".liquidgemm-shard-")) {
            assert!(victim.try_wait().unwrap().is_none(), "it ended by itself");
            std::thread::sleep(Duration::from_millis(5));
        }
        // It works there still.
        let busy = quantize(&path("model"), &path("out"), &options(Method::Rtn, None));
        assert!(matches!(busy, Err(CheckpointError::Busy { .. })), "{busy:?}");
        victim.kill().unwrap();
        assert!(!victim.wait().unwrap().success());
        assert!(!path("out").exists());

        let other = quantize(&path("model"), &path("out"), &options(Method::Rtn, Some(Group::K(128))));
        assert!(matches!(other, Err(CheckpointError::OtherRun { .. })), "{other:?}");
        let summary = quantize(&path("model"), &path("out"), &options(Method::Rtn, None)).unwrap();
        assert_eq!(summary.resumed_shards, 1);
        assert!(contents(&path("out")) == contents(&path("whole")));
        assert!(!partial.exists());
    }

    #[test]
    fn force_discards_the_unfinished_run_of_another_plan() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        write_llama(&path("model"));
        fs::create_dir(path("out.partial")).unwrap();
        fs::write(path("out.partial").join(".liquidgemm-lock"), "").unwrap();
        fs::write(path("out.partial").join(".liquidgemm-job.json"), "{\"plan\": \"0\"}").unwrap();
        fs::write(path("out.partial").join("model-00001-of-00002.safetensors"), "old").unwrap();
        let source = open(path("model"), OpenOptions::default()).unwrap();
        let plan = Plan::new(source.as_ref(), &options(Method::Rtn, None)).unwrap();
        assert!(matches!(plan.run(&path("out"), false, &()), Err(CheckpointError::OtherRun { .. })));
        assert_eq!(plan.run(&path("out"), true, &()).unwrap().resumed_shards, 0);
        assert!(verify(&Checkpoint::open(path("out")).unwrap(), None, &()).unwrap().problems.is_empty());
        // A folder that this program did not make is never touched.
        fs::create_dir(path("more.partial")).unwrap();
        fs::write(path("more.partial").join("diary.txt"), "dear").unwrap();
        assert!(matches!(plan.run(&path("more"), true, &()), Err(CheckpointError::Options { .. })));
        assert!(path("more.partial").join("diary.txt").exists());
    }
}
