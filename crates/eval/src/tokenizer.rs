//! Tokenizers: tokenizer.json, or the byte-level BPE that a GGUF file carries in its metadata.

use candle_core::quantized::gguf_file::Value;
use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::NFC;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior, Tokenizer};

use crate::Error;
use crate::source::Source;

/// The patterns that split text before BPE. They are part of the models' definitions.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// GGUF's number for control tokens.
const CONTROL: u64 = 3;

/// Returns the tokenizer of a model, without padding and truncation.
pub(crate) fn read(source: &Source) -> Result<Tokenizer, Error> {
    let path = source.tokenizer_path();
    let mut tokenizer = if path.is_file() {
        Tokenizer::from_file(&path).map_err(|error| Error::invalid(&path, error))?
    } else {
        of_gguf(source)?
    };
    tokenizer.with_padding(None);
    tokenizer.with_truncation(None).map_err(refused)?;
    Ok(tokenizer)
}

fn of_gguf(source: &Source) -> Result<Tokenizer, Error> {
    let none = |reason: String| Error::NoTokenizer { path: source.tokenizer_path(), reason };
    if matches!(source, Source::Folder { .. }) {
        return Err(none("a folder has it in that file only".into()));
    }
    let model = source.gguf_text("tokenizer.ggml.model")?;
    if model != "gpt2" {
        return Err(none(format!(
            "its tokenizer is of type {model:?}; only gpt2, byte-level BPE, can be read"
        )));
    }
    let split = source.gguf_text("tokenizer.ggml.pre").unwrap_or("default");
    let pre_tokenizer = pre_tokenizer(split)
        .ok_or_else(|| {
            none(format!("its text is split by {split:?}; known are {}", KNOWN_SPLITS.join(", ")))
        })?
        .map_err(refused)?;

    let tokens = texts(source, "tokenizer.ggml.tokens")?;
    let merges = texts(source, "tokenizer.ggml.merges")?;
    let merges: Option<Vec<(String, String)>> = merges
        .iter()
        .map(|merge| merge.split_once(' ').map(|(first, second)| (first.to_owned(), second.to_owned())))
        .collect();
    let merges = merges.ok_or_else(|| none("a BPE merge is not two tokens".into()))?;
    let vocabulary = tokens.iter().zip(0u32..).map(|(token, id)| ((*token).to_owned(), id));
    let bpe = BPE::builder().vocab_and_merges(vocabulary.collect::<tokenizers::models::bpe::Vocab>(), merges);
    let mut tokenizer = Tokenizer::new(bpe.build().map_err(refused)?);
    tokenizer.with_pre_tokenizer(Some(pre_tokenizer));
    if split == "qwen2" {
        tokenizer.with_normalizer(Some(NFC)).map_err(refused)?;
    }
    let control = source
        .gguf_list("tokenizer.ggml.token_type")
        .unwrap_or_default()
        .iter()
        .zip(&tokens)
        .filter(|(kind, _)| number(kind) == Some(CONTROL))
        .map(|(_, token)| AddedToken::from(*token, true));
    tokenizer.add_special_tokens(control).map_err(refused)?;
    Ok(tokenizer)
}

/// The values of `tokenizer.ggml.pre` that [`pre_tokenizer`] knows.
const KNOWN_SPLITS: [&str; 5] = ["default", "gpt-2", "smollm", "qwen2", "llama-bpe"];

/// Returns what splits the text before BPE, or `None` for an unknown name.
fn pre_tokenizer(name: &str) -> Option<tokenizers::Result<PreTokenizerWrapper>> {
    let bytes = |use_regex| ByteLevel::new(false, true, use_regex).into();
    let then_bytes = |first: PreTokenizerWrapper, use_regex| {
        PreTokenizerWrapper::from(Sequence::new(vec![first, bytes(use_regex)]))
    };
    let by_pattern = |pattern: &str| {
        let pattern = SplitPattern::Regex(pattern.to_owned());
        Split::new(pattern, SplitDelimiterBehavior::Isolated, false)
            .map(|split| then_bytes(split.into(), false))
    };
    match name {
        "default" | "gpt-2" => Some(Ok(bytes(true))),
        "smollm" => Some(Ok(then_bytes(Digits::new(true).into(), true))),
        "qwen2" => Some(by_pattern(QWEN2)),
        "llama-bpe" => Some(by_pattern(LLAMA3)),
        _ => None,
    }
}

/// Returns a list of texts of the metadata.
fn texts<'a>(source: &'a Source, key: &str) -> Result<Vec<&'a str>, Error> {
    let list = source.gguf_list(key)?;
    let texts: Option<Vec<&str>> =
        list.iter().map(|value| value.to_string().ok().map(String::as_str)).collect();
    texts.ok_or_else(|| Error::MissingSetting { key: key.to_owned() })
}

fn number(value: &Value) -> Option<u64> {
    value.to_u64().ok().or_else(|| value.to_i32().ok().and_then(|value| value.try_into().ok()))
}

fn refused(error: impl ToString) -> Error {
    Error::Tokenizer { reason: error.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_known_split_has_a_pre_tokenizer_and_others_have_none() {
        for name in KNOWN_SPLITS {
            assert!(pre_tokenizer(name).unwrap().is_ok(), "{name}");
        }
        assert!(pre_tokenizer("deepseek-coder").is_none());
    }
}
