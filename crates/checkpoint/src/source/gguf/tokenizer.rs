//! `tokenizer.json` and its companions, derived from the vocabulary of a GGUF file.
//!
//! Byte-level BPE vocabularies (`tokenizer.ggml.model` = `gpt2`) with a known pre-tokenizer are derived. SentencePiece ones
//! (`llama`) are not: their normalizer is not in the file.

use serde_json::{Map, Value as Json, json};

use super::config::Reader;
use super::container::Value;

/// Token types of GGUF: tokens that no text is split into.
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;

/// The regular expressions by which text is split, as their models publish them.
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const LLAMA_3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Files of a tokenizer: names and contents. Or the reason why there are none.
pub(crate) type Derived = Result<Vec<(&'static str, Json)>, String>;

pub(crate) fn derive(reader: &Reader<'_>) -> Derived {
    let metadata = |key: &str| reader.container.metadata.get(&format!("tokenizer.ggml.{key}"));
    let text = |key: &str| metadata(key).and_then(Value::as_text).unwrap_or("(none)");
    let take = "take the tokenizer's files from the original model";
    if text("model") != "gpt2" {
        return Err(format!("the vocabulary is of the kind {:?}, not byte-level BPE; {take}", text("model")));
    }
    let split = |pattern: &str| {
        json!({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        ]})
    };
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let (normalizer, pre_tokenizer, ignore_merges) = match text("pre") {
        "gpt-2" => (Json::Null, byte_level, false),
        "smollm" => {
            let digits = json!({"type": "Digits", "individual_digits": true});
            (Json::Null, json!({"type": "Sequence", "pretokenizers": [digits, byte_level]}), false)
        }
        "qwen2" => (json!({"type": "NFC"}), split(QWEN2), false),
        "llama-bpe" => (Json::Null, split(LLAMA_3), true),
        other => return Err(format!("the pre-tokenizer {other:?} is not known; {take}")),
    };
    let texts =
        |key: &str| -> Option<Vec<&str>> { metadata(key)?.as_array()?.iter().map(Value::as_text).collect() };
    let (Some(tokens), Some(merges)) = (texts("tokens"), texts("merges")) else {
        return Err(format!("its tokens or merges are missing; {take}"));
    };
    let types = metadata("token_type").and_then(Value::as_array).unwrap_or_default();
    let mut vocabulary = Map::new();
    let mut added = Vec::new();
    for (id, token) in tokens.iter().enumerate() {
        if vocabulary.insert((*token).to_owned(), json!(id)).is_some() {
            return Err(format!("token {token:?} appears twice; {take}"));
        }
        let kind = types.get(id).and_then(Value::as_u64).unwrap_or(1);
        if kind == CONTROL || kind == USER_DEFINED {
            added.push(json!({
                "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": kind == CONTROL,
            }));
        }
    }
    let decoder =
        json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "post_processor": post_processor(reader, &tokens), "decoder": decoder,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": ignore_merges,
            "vocab": vocabulary, "merges": merges,
        },
    });
    let mut config = Map::new();
    config.insert("tokenizer_class".into(), json!("PreTrainedTokenizerFast"));
    for (key, from) in
        [("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding")]
    {
        let token = reader.token_id(from).and_then(|id| tokens.get(usize::try_from(id).ok()?));
        if let Some(token) = token {
            config.insert(key.into(), json!(token));
        }
    }
    let template = reader.container.metadata.get("tokenizer.chat_template").and_then(Value::as_text);
    if let Some(template) = template {
        config.insert("chat_template".into(), json!(template));
    }
    Ok(vec![("tokenizer.json", tokenizer), ("tokenizer_config.json", Json::Object(config))])
}

/// Puts the token that begins a text in front, if the file asks for it.
fn post_processor(reader: &Reader<'_>, tokens: &[&str]) -> Json {
    let add = reader.container.metadata.get("tokenizer.ggml.add_bos_token");
    let bos = reader.token_id("bos").and_then(|id| Some((id, *tokens.get(usize::try_from(id).ok()?)?)));
    let (Some(Value::Bool(true)), Some((id, token))) = (add, bos) else { return Json::Null };
    let special = json!({"SpecialToken": {"id": token, "type_id": 0}});
    let text = |name: &str, kind: u32| json!({"Sequence": {"id": name, "type_id": kind}});
    let mut known = Map::new();
    known.insert(token.to_owned(), json!({"id": token, "ids": [id], "tokens": [token]}));
    json!({
        "type": "TemplateProcessing", "single": [special, text("A", 0)],
        "pair": [special, text("A", 0), special, text("B", 1)], "special_tokens": known,
    })
}
