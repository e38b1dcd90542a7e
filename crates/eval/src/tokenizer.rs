//! Tokenizers: a tokenizer.json beside the model, or the one that is part of it.

use liquidgemm_checkpoint::SideContents;
use tokenizers::Tokenizer;

use crate::Error;
use crate::source::Source;

/// Returns the tokenizer of a model, without padding and truncation.
pub(crate) fn read(source: &Source) -> Result<Tokenizer, Error> {
    let beside = source.tokenizer_path();
    let mut tokenizer = match source.tokenizer() {
        Ok(SideContents::CopyOf(path)) => from_file(path)?,
        _ if beside.is_file() => from_file(&beside)?,
        Ok(SideContents::Bytes(bytes)) => Tokenizer::from_bytes(bytes).map_err(refused)?,
        Err(reason) => return Err(Error::NoTokenizer { path: beside, reason: reason.to_owned() }),
    };
    tokenizer.with_padding(None);
    tokenizer.with_truncation(None).map_err(refused)?;
    Ok(tokenizer)
}

fn from_file(path: &std::path::Path) -> Result<Tokenizer, Error> {
    Tokenizer::from_file(path).map_err(|error| Error::invalid(path, error))
}

fn refused(error: impl ToString) -> Error {
    Error::Tokenizer { reason: error.to_string() }
}
