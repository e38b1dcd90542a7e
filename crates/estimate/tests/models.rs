//! Models: published sizes, and configurations that are wrong.

use liquidgemm_estimate::architecture::Model;
use liquidgemm_estimate::gpus::{GPUS, Gpu};
use liquidgemm_estimate::measurements::Measurements;
use liquidgemm_estimate::{models, page, report, table};
use proptest::prelude::*;
use serde_json::{Value, json};

#[test]
fn built_in_models_have_their_published_number_of_parameters() {
    let published = [6.74, 13.0, 69.0, 8.03, 70.6, 7.24, 46.7, 7.62, 32.8, 72.7, 34.4, 671.0];
    assert_eq!(models::built_in().len(), published.len());
    for (model, billions) in models::built_in().iter().zip(published) {
        assert!((model.published_parameters / (billions * 1e9) - 1.0).abs() < 1e-12, "{}", model.name);
        let counted = model.model().unwrap().parameters() as f64;
        let error = counted / model.published_parameters - 1.0;
        assert!(error.abs() < 0.01, "{}: {counted} instead of {}", model.name, model.published_parameters);
    }
}

#[test]
fn active_parameters_of_mixtures_are_the_published_ones() {
    let active = |name| models::find(name).unwrap().active_parameters() as f64 / 1e9;
    assert!((active("Mixtral-8x7B") / 12.9 - 1.0).abs() < 0.01);
    assert!((active("DeepSeek-V3") / 37.0 - 1.0).abs() < 0.02);
    assert!((active("LLaMA-3-8B") / 8.03 - 1.0).abs() < 0.01);
}

fn llama() -> Value {
    json!({"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000})
}

fn qwen3_moe() -> Value {
    json!({"model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936,
        "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "decoder_sparse_step": 1,
        "mlp_only_layers": [], "tie_word_embeddings": false})
}

fn deepseek() -> Value {
    json!({"model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 61,
        "num_attention_heads": 128, "vocab_size": 129280, "q_lora_rank": null, "kv_lora_rank": 512,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 256,
        "n_shared_experts": 1, "num_experts_per_tok": 8, "moe_intermediate_size": 2048, "first_k_dense_replace": 3})
}

fn with(mut config: Value, key: &str, value: Value) -> Value {
    config[key] = value;
    config
}

fn refused(config: &Value) -> String {
    format!("{:#}", Model::from_config("m", config).expect_err("must be refused"))
}

#[test]
fn other_types_are_read_with_their_own_keys() {
    let qwen = Model::from_config("Qwen3-30B-A3B", &qwen3_moe()).unwrap();
    assert!((qwen.parameters() as f64 / 30.5e9 - 1.0).abs() < 0.01, "{}", qwen.parameters());
    assert!((qwen.active_parameters() as f64 / 3.3e9 - 1.0).abs() < 0.03, "{}", qwen.active_parameters());
    let half = Model::from_config("m", &with(qwen3_moe(), "mlp_only_layers", json!([0, 1, 2]))).unwrap();
    assert_eq!(half.blocks_by_kind(), [3, 45]);
    let stepped = Model::from_config("m", &with(qwen3_moe(), "decoder_sparse_step", json!(2))).unwrap();
    assert_eq!(stepped.blocks_by_kind(), [24, 24]);
    assert_eq!(Model::from_config("m", &deepseek()).unwrap().blocks_by_kind(), [3, 58]);
    // Qwen3-8B has heads of a width of their own and is 8.19 billion.
    let qwen3 = json!({"model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936});
    assert!((Model::from_config("m", &qwen3).unwrap().parameters() as f64 / 8.19e9 - 1.0).abs() < 0.01);
    // Qwen2.5-0.5B shares its embeddings and is 0.494 billion.
    let tied = json!({"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": true});
    assert!((Model::from_config("m", &tied).unwrap().parameters() as f64 / 0.494e9 - 1.0).abs() < 0.01);
}

#[test]
fn missing_keys_are_named() {
    for (config, keys) in [
        (
            llama(),
            &[
                "model_type",
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "vocab_size",
            ][..],
        ),
        (qwen3_moe(), &["num_experts", "num_experts_per_tok", "moe_intermediate_size"]),
        (
            deepseek(),
            &[
                "kv_lora_rank",
                "qk_nope_head_dim",
                "qk_rope_head_dim",
                "v_head_dim",
                "n_routed_experts",
                "moe_intermediate_size",
            ],
        ),
    ] {
        Model::from_config("m", &config).unwrap();
        for key in keys {
            let mut config = config.clone();
            config.as_object_mut().unwrap().remove(*key);
            let error = refused(&config);
            assert!(error.contains(key) && error.contains("missing"), "{key}: {error}");
        }
    }
}

#[test]
fn nonsense_numbers_are_refused_with_their_key_and_value() {
    for config in [llama(), qwen3_moe(), deepseek()] {
        let keys: Vec<String> = config.as_object().unwrap().keys().cloned().collect();
        for key in keys.iter().filter(|key| config[key.as_str()].is_u64()) {
            for wrong in [
                json!(-1),
                json!(1.5),
                json!("7"),
                json!(u64::MAX),
                json!(1e300),
                json!([1]),
                json!({}),
                json!(true),
            ] {
                let error = refused(&with(config.clone(), key, wrong.clone()));
                assert!(error.contains(key.as_str()), "{key} = {wrong}: {error}");
            }
            // Only a number of dense layers or of shared experts may be 0.
            let zero = Model::from_config("m", &with(config.clone(), key, json!(0)));
            assert_eq!(
                zero.is_ok(),
                ["first_k_dense_replace", "n_shared_experts"].contains(&key.as_str()),
                "{key} = 0"
            );
        }
    }
}

#[test]
fn contradictions_are_refused() {
    for (config, part) in [
        (with(llama(), "num_key_value_heads", json!(5)), "no multiple of num_key_value_heads, 5"),
        (with(llama(), "num_attention_heads", json!(24)), "hidden_size is 4096, which is no multiple"),
        (with(qwen3_moe(), "num_experts_per_tok", json!(129)), "there are 128 experts"),
        (with(qwen3_moe(), "mlp_only_layers", json!([-1])), "mlp_only_layers is [-1]"),
        (with(deepseek(), "first_k_dense_replace", json!(62)), "more than the 61"),
        (with(llama(), "tie_word_embeddings", json!("no")), "must be true or false"),
        (with(llama(), "model_type", json!("gpt2")), "\"gpt2\"; known are llama"),
        (with(llama(), "model_type", json!(3)), "must be a string"),
        (with(llama(), "vocab_size", json!("x".repeat(1000))), "…"),
        (json!([1]), "not a JSON object"),
        (json!(null), "not a JSON object"),
    ] {
        let error = refused(&config);
        assert!(error.contains(part), "{part:?} is not in {error:?}");
        assert!(error.len() < 300, "{error}");
    }
}

#[test]
fn folders_and_files_that_hold_no_model_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_str().unwrap();
    let refused = |path: &str| format!("{:#}", models::find(path).expect_err("must be refused"));
    assert!(refused("LLaMA-9").contains("Yi-34B"));
    assert!(refused(path).contains("cannot read"));
    let file = folder.path().join("config.json");
    std::fs::create_dir(&file).unwrap();
    assert!(refused(path).contains("not a file"));
    std::fs::remove_dir(&file).unwrap();
    for wrong in [&b"{"[..], b"", b"\xff\xfe", "[".repeat(100_000).as_bytes()] {
        std::fs::write(&file, wrong).unwrap();
        assert!(refused(path).contains("cannot read"));
    }
    std::fs::write(&file, llama().to_string()).unwrap();
    assert_eq!(models::find(path).unwrap().blocks, 32);
    assert_eq!(models::find(file.to_str().unwrap()).unwrap(), models::find(path).unwrap());
    std::fs::File::options().write(true).open(&file).unwrap().set_len((16 << 20) + 1).unwrap();
    assert!(refused(path).contains("16 MiB"));
}

#[test]
fn largest_numbers_that_are_accepted_give_finite_estimates() {
    let most: u64 = 1 << 16;
    let config = json!({"model_type": "qwen3_moe", "hidden_size": 1 << 24, "intermediate_size": 1 << 24,
        "num_hidden_layers": most, "num_attention_heads": most, "num_key_value_heads": most, "head_dim": most,
        "vocab_size": 1u64 << 31, "num_experts": most, "num_experts_per_tok": most, "moe_intermediate_size": 1 << 24});
    let least = json!({"model_type": "llama", "hidden_size": 1, "intermediate_size": 1, "num_hidden_layers": 1,
        "num_attention_heads": 1, "vocab_size": 1});
    for config in [config, least] {
        let model = Model::from_config("<script>alert(1)</script>", &config).unwrap();
        for gpu in &GPUS {
            let settings = report::Settings {
                batches: vec![1, 1 << 20],
                input: 1 << 24,
                output: 1,
                price: Some(1e6),
                ..report::Settings::default()
            };
            let report = report::report(&model, gpu, &settings, &Measurements::default()).unwrap();
            for point in report.schemes.iter().flat_map(|scheme| scheme.points.iter().chain(&scheme.best)) {
                for value in
                    [point.memory_gb, point.step.us, point.tokens_per_second, point.cost_per_million.unwrap()]
                {
                    assert!(value.is_finite() && value > 0.0, "{value}");
                }
            }
            assert!(!page::html(&report).unwrap().contains("<script"));
            assert!(table::text(&report).lines().count() > 20);
        }
    }
}

#[test]
fn divisions_among_gpus_that_are_impossible_are_refused() {
    let model = models::find("Yi-34B").unwrap();
    for (gpus, fits) in
        [(1, true), (2, true), (8, true), (3, false), (16, false), (0, false), (u64::MAX, false)]
    {
        assert_eq!(model.check_gpus(gpus).is_ok(), fits, "{gpus}");
    }
    // More GPUs than heads of keys and values: they are copied.
    let qwen = models::find("Qwen2.5-7B").unwrap();
    assert!(qwen.check_gpus(4).is_ok() && qwen.check_gpus(7).is_err());
    let llama = models::find("LLaMA-3-70B").unwrap();
    assert_eq!(llama.cached_elements_on_each(16), llama.cached_elements_on_each(8));
}

#[test]
fn settings_out_of_range_are_refused() {
    let model = models::find("LLaMA-3-8B").unwrap();
    let gpu = Gpu::find("H200").unwrap();
    let good = report::Settings::default();
    for (wrong, part) in [
        (report::Settings { batches: vec![], ..good.clone() }, "no batch size"),
        (report::Settings { batches: vec![1, 0], ..good.clone() }, "batch size 0"),
        (report::Settings { batches: vec![usize::MAX], ..good.clone() }, "batch size 1844"),
        (report::Settings { input: 0, ..good.clone() }, "0 tokens of the prompt"),
        (report::Settings { output: u64::MAX, ..good.clone() }, "of the answer"),
        (report::Settings { gpus: 0, ..good.clone() }, "0 GPUs"),
        (report::Settings { price: Some(-1.0), ..good.clone() }, "price -1"),
        (report::Settings { price: Some(f64::NAN), ..good.clone() }, "price NaN"),
        (report::Settings { memory_fraction: 1.5, ..good.clone() }, "1.5"),
        (report::Settings { memory_fraction: f64::NAN, ..good.clone() }, "NaN"),
        (report::Settings { cache_bits: 3, ..good.clone() }, "not 3"),
    ] {
        let error =
            report::report(&model, gpu, &wrong, &Measurements::default()).expect_err("must be refused");
        assert!(error.to_string().contains(part), "{part:?} is not in {error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    /// Whatever stands in a configuration, reading it and estimating return.
    #[test]
    fn no_configuration_makes_the_reader_panic(
        kind in 0usize..3,
        changes in proptest::collection::vec((0usize..20, prop_oneof![
            Just(json!(null)), any::<i64>().prop_map(|number| json!(number)), (0u64..40).prop_map(|number| json!(number)),
            (0u32..63).prop_map(|power| json!(1u64 << power)), any::<f64>().prop_map(|number| json!(number)),
            ".{0,8}".prop_map(|text| json!(text)), any::<bool>().prop_map(|flag| json!(flag)),
        ]), 0..4),
    ) {
        let mut config = [llama(), qwen3_moe(), deepseek()][kind].clone();
        let keys: Vec<String> = config.as_object().unwrap().keys().cloned().collect();
        for (place, value) in changes {
            config[keys[place % keys.len()].as_str()] = value;
        }
        if let Ok(model) = Model::from_config("m", &config) {
            prop_assert!(model.active_parameters() <= model.parameters());
            prop_assert!(model.quantized_parameters() <= model.parameters());
            let settings = report::Settings { batches: vec![3], ..report::Settings::default() };
            let report = report::report(&model, &GPUS[0], &settings, &Measurements::default()).unwrap();
            prop_assert!(report.schemes.iter().all(|scheme| scheme.points[0].tokens_per_second > 0.0));
        }
    }
}
