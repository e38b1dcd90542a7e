//! The float forward passes against plain loops, and one file format against the other.

use liquidgemm_eval::Model;
use liquidgemm_eval::layers::FloatLayers;
use liquidgemm_eval::model::Network;
use tempfile::tempdir;

use super::fixture::{
    BLOCKS, GGUF_TOKENS, TEXT, bert_config, bert_tensors, llama_config, llama_tensors, write_folder,
    write_gguf,
};
use super::plain;

/// Returns the logits of a language model, `[tokens][vocabulary]`.
fn logits(model: &Model, tokens: &[u32]) -> Vec<Vec<f32>> {
    let Network::Causal(causal) = &model.network else { panic!("not a language model") };
    let hidden = causal.hidden(tokens, &FloatLayers(&model.layers)).unwrap();
    causal.logits(&hidden).unwrap().to_vec2().unwrap()
}

fn check_close(found: &[f32], expected: &[f64], within: f64) {
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(expected) {
        assert!((f64::from(*found) - expected).abs() <= within, "{found} is not {expected}");
    }
}

#[test]
fn bert_embeddings_are_those_of_plain_loops() {
    let (folder, tensors) = (tempdir().unwrap(), bert_tensors());
    write_folder(folder.path(), &bert_config(), &tensors);
    let model = Model::open(folder.path()).unwrap();
    assert_eq!(model.layers.len(), 6 * BLOCKS);
    let Network::Encoder(encoder) = &model.network else { panic!("not an encoder") };
    let tokens = model.tokens(TEXT).unwrap();
    let embedding = encoder.embed(&tokens, &FloatLayers(&model.layers)).unwrap();
    check_close(&embedding, &plain::bert(&tensors, &tokens), 1e-5);
}

#[test]
fn logits_of_llama_and_qwen2_are_those_of_plain_loops() {
    for qwen2 in [false, true] {
        let (folder, tensors) = (tempdir().unwrap(), llama_tensors(qwen2));
        write_folder(folder.path(), &llama_config(qwen2), &tensors);
        let model = Model::open(folder.path()).unwrap();
        assert_eq!(model.layers.len(), 7 * BLOCKS);
        assert_eq!(
            model.layers.iter().filter(|layer| layer.bias.is_some()).count(),
            if qwen2 { 3 * BLOCKS } else { 0 }
        );
        let tokens = model.tokens(TEXT).unwrap();
        for (found, expected) in logits(&model, &tokens).iter().zip(plain::llama(&tensors, &tokens)) {
            check_close(found, &expected, 1e-4);
        }
    }
}

#[test]
fn a_gguf_file_gives_the_logits_of_the_folder_with_the_same_weights() {
    let (folder, tensors) = (tempdir().unwrap(), llama_tensors(false));
    let file = folder.path().join("tiny.gguf");
    write_gguf(&file, &tensors);
    let model = Model::open(&file).unwrap();
    assert_eq!(
        (model.name.as_str(), model.layers[0].name.as_str()),
        ("tiny", "model.layers.0.self_attn.q_proj")
    );
    let tokens = [1, 5, 3, 3, 11, 0, 7, 2];
    for (found, expected) in logits(&model, &tokens).iter().zip(plain::llama(&tensors, &tokens)) {
        check_close(found, &expected, 1e-4);
    }
    // A folder with one GGUF file is that model.
    assert_eq!(Model::open(folder.path()).unwrap().name, "tiny");
}

#[test]
fn the_tokenizer_of_a_gguf_file_merges_bytes_splits_digits_and_keeps_control_tokens_whole() {
    let folder = tempdir().unwrap();
    let file = folder.path().join("tiny.gguf");
    write_gguf(&file, &llama_tensors(false));
    let model = Model::open(&file).unwrap();
    let text = |tokens: &[u32]| tokens.iter().map(|&token| GGUF_TOKENS[token as usize]).collect::<Vec<_>>();
    assert_eq!(text(&model.tokens("cat cat 12.").unwrap()), ["cat", "Ġcat", "Ġ", "1", "2", "."]);
    assert_eq!(text(&model.tokens("sat<end>at").unwrap()), ["s", "at", "<end>", "at"]);
}

#[test]
fn a_tokenizers_own_truncation_is_ignored() {
    let folder = tempdir().unwrap();
    write_folder(folder.path(), &bert_config(), &bert_tensors());
    let model = Model::open(folder.path()).unwrap();
    assert_eq!(model.tokens(TEXT).unwrap().len(), TEXT.split(' ').count());
}

#[test]
fn layers_with_the_same_input_name_the_first_of_them() {
    let folder = tempdir().unwrap();
    write_folder(folder.path(), &llama_config(false), &llama_tensors(false));
    let model = Model::open(folder.path()).unwrap();
    let inputs: Vec<usize> = model.layers.iter().map(|layer| layer.input).collect();
    // Q, K, V; O; gate, up; down.
    assert_eq!(inputs, [0, 0, 0, 3, 4, 4, 6, 7, 7, 7, 10, 11, 11, 13]);
}
