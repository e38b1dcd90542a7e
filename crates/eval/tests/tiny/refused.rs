//! What is refused, and how the error names it.

use std::path::Path;
use std::sync::Arc;

use liquidgemm::{Backend, Group};
use liquidgemm_eval::evaluate::Task;
use liquidgemm_eval::layers::FloatLayers;
use liquidgemm_eval::model::Network;
use liquidgemm_eval::{Calibration, Method, Model, Recipe, Smoothing};
use serde_json::json;
use tempfile::{TempDir, tempdir};

use super::fixture::{TEXT, bert_config, bert_tensors, llama_config, llama_tensors, write_folder};

fn error(path: &Path) -> String {
    Model::open(path).unwrap_err().to_string()
}

fn llama() -> TempDir {
    let folder = tempdir().unwrap();
    write_folder(folder.path(), &llama_config(false), &llama_tensors(false));
    folder
}

#[test]
fn an_unknown_architecture_is_named_with_those_that_are_supported() {
    let folder = llama();
    std::fs::write(folder.path().join("config.json"), json!({"model_type": "mamba"}).to_string()).unwrap();
    let error = error(folder.path());
    assert!(error.contains("\"mamba\"") && error.contains("bert") && error.contains("qwen2"), "{error}");
}

#[test]
fn paths_without_a_model_say_what_a_model_is() {
    let folder = tempdir().unwrap();
    assert!(error(folder.path()).contains("give a Hugging Face folder, a .safetensors file or a GGUF file"));
    assert!(error(&folder.path().join("missing")).contains("missing: cannot open"));
    let file = folder.path().join("text.gguf");
    std::fs::write(&file, "no model").unwrap();
    assert!(error(&file).contains("text.gguf: "), "{}", error(&file));
}

#[test]
fn a_missing_tokenizer_and_a_broken_one_are_named() {
    let folder = llama();
    let tokenizer = folder.path().join("tokenizer.json");
    std::fs::write(&tokenizer, "{").unwrap();
    assert!(error(folder.path()).contains("tokenizer.json: "));
    std::fs::remove_file(tokenizer).unwrap();
    let error = error(folder.path());
    assert!(error.contains("no tokenizer") && error.contains("tokenizer.json"), "{error}");
}

#[test]
fn missing_and_misshapen_tensors_are_named() {
    let folder = tempdir().unwrap();
    let mut tensors = llama_tensors(false);
    let (mut shape, values) = tensors.remove("model.norm.weight").unwrap();
    write_folder(folder.path(), &llama_config(false), &tensors);
    assert_eq!(error(folder.path()), "the model has no tensor model.norm.weight");
    shape.push(1);
    tensors.insert("model.norm.weight".into(), (shape, values));
    write_folder(folder.path(), &llama_config(false), &tensors);
    assert_eq!(error(folder.path()), "tensor model.norm.weight has shape [64, 1], expected [64]");
}

#[test]
fn settings_that_the_forward_pass_lacks_are_named() {
    for (key, value, named) in [
        ("hidden_act", json!("relu"), "hidden_act = relu"),
        ("rope_scaling", json!({"type": "yarn"}), "rope_scaling = yarn"),
        ("use_sliding_window", json!(true), "use_sliding_window = true"),
        ("num_key_value_heads", json!(3), "number of key-value heads = 3"),
        ("head_dim", json!(7), "channels of a head = 7"),
        ("hidden_size", json!(-1), "hidden_size"),
        ("hidden_size", json!(1u64 << 40), "hidden_size"),
        ("num_attention_heads", json!(0), "num_attention_heads"),
        ("vocab_size", json!("many"), "vocab_size"),
    ] {
        let folder = llama();
        let mut config = llama_config(false);
        config[key] = value;
        std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        let error = error(folder.path());
        assert!(error.contains(named), "{key}: {error}");
    }
}

#[test]
fn texts_and_tokens_that_do_not_fit_the_model_are_refused() {
    let folder = llama();
    let model = Model::open(folder.path()).unwrap();
    let task =
        |text: &str, window| Task::new(&model, text, window, None).map(|_| ()).unwrap_err().to_string();
    assert!(task("cat", 16).contains("too short"));
    assert!(task(TEXT, 41).contains("41 tokens in one piece, but the model has 40 positions"));
    let Network::Causal(causal) = &model.network else { panic!("not a language model") };
    let run = |tokens: &[u32]| {
        causal.hidden(tokens, &FloatLayers(&model.layers)).map(|_| ()).unwrap_err().to_string()
    };
    assert!(run(&[1, 12]).contains("token 12 is outside the model's vocabulary of 12"));
    assert!(run(&[1; 41]).contains("41 tokens"));
    assert!(run(&[]).contains("too short"));

    let folder = tempdir().unwrap();
    write_folder(folder.path(), &bert_config(), &bert_tensors());
    let model = Model::open(folder.path()).unwrap();
    assert!(Task::new(&model, " \n\n", 16, None).is_err());
}

#[test]
fn methods_without_their_moments_say_what_is_missing() {
    let folder = llama();
    let model = Model::open(folder.path()).unwrap();
    let backend = Arc::new(Backend::cpu());
    let without = |method, smooth, calibration: Option<&Calibration>| {
        let recipe = Recipe { method, group: Group::default(), smooth };
        recipe.layers(&model, calibration, &backend, &()).map(|_| ()).unwrap_err().to_string()
    };
    let error = without(Method::Weighted, None, None);
    assert!(error.contains("second moments of layer model.layers.0.self_attn.q_proj"), "{error}");
    assert!(without(Method::A8, Some(Smoothing::Alpha(0.5)), None).contains("second moments"));
    let task = Task::new(&model, TEXT, 16, None).unwrap();
    let calibration = liquidgemm_eval::evaluate::calibrate(&model, &task, false, &()).unwrap();
    let error = without(Method::Gptq, None, Some(&calibration));
    assert!(error.contains("the Hessian") && error.contains("--hessian"), "{error}");
}

#[test]
fn unknown_names_of_methods_and_exponents_are_refused() {
    assert!("awq".parse::<Method>().unwrap_err().contains("rtn, search"));
    assert_eq!("gptq".parse(), Ok(Method::Gptq));
    assert_eq!("auto".parse(), Ok(Smoothing::Auto));
    assert_eq!("0.5".parse(), Ok(Smoothing::Alpha(0.5)));
    for text in ["1.5", "-0.1", "NaN", "half"] {
        assert!(text.parse::<Smoothing>().unwrap_err().contains(text), "{text}");
    }
}
