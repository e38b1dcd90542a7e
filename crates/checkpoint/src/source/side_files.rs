//! The files beside a model's weights: configuration, tokenizer, licence. They go to the output unchanged.

use std::path::{Path, PathBuf};

use crate::error::{Problem, Result};
use crate::files::Folder;

/// A file that goes to the output.
#[derive(Clone, Debug)]
pub struct SideFile {
    /// The path within the folder.
    pub name: PathBuf,
    /// Where its contents come from.
    pub contents: SideContents,
}

/// The contents of a [`SideFile`].
#[derive(Clone, Debug)]
pub enum SideContents {
    /// The contents of this file.
    CopyOf(PathBuf),
    /// These bytes.
    Bytes(Vec<u8>),
}

/// The depth of folders that is searched. Hugging Face folders have one level, such as `1_Pooling/config.json`.
const MOST_DEPTH: usize = 4;
/// The number of side files that are accepted.
const MOST_FILES: usize = 10_000;

/// Weights in other formats, which would contradict the packed ones.
const WEIGHTS: [&str; 13] = [
    "safetensors",
    "bin",
    "pt",
    "pth",
    "ckpt",
    "gguf",
    "ggml",
    "h5",
    "msgpack",
    "onnx",
    "ot",
    "tflite",
    "pkl",
];

/// Files beside the weights, and the names left out, each with the reason.
pub(crate) type Found = (Vec<SideFile>, Vec<(String, String)>);

/// Lists the side files of a folder whose weights are in `shards`.
/// `config.json` is not among them, because the output's differs.
pub(crate) fn list(folder: &Folder, shards: &[String]) -> Result<Found> {
    let mut found = Found::default();
    visit(folder, Path::new(""), 0, shards, &mut found)?;
    Ok(found)
}

fn visit(folder: &Folder, relative: &Path, depth: usize, shards: &[String], found: &mut Found) -> Result<()> {
    for name in folder.names(relative)? {
        let path = relative.join(&name);
        let full = folder.path().join(&path);
        let shown = path.display().to_string();
        if let Some(reason) = left_out(&name, depth, shards) {
            // The weights are in the output in another form, and git's own files are of no interest.
            if let Some(reason) = reason {
                found.1.push((shown, reason.to_owned()));
            }
            continue;
        }
        let real = folder.file(&path)?;
        if real.is_dir() {
            if depth + 1 == MOST_DEPTH {
                found.1.push((shown, format!("more than {MOST_DEPTH} folders deep")));
            } else {
                visit(folder, &path, depth + 1, shards, found)?;
            }
        } else if real.is_file() {
            found.0.push(SideFile { name: path, contents: SideContents::CopyOf(real) });
        } else {
            return Err(Problem::NotAFile { found: "a device, FIFO or socket" }.at(&full));
        }
        if found.0.len() > MOST_FILES {
            let (bytes, limit) = (found.0.len() as u64, MOST_FILES as u64);
            return Err(Problem::TooLong { what: "a list of files", bytes, limit }.at(folder.path()));
        }
    }
    Ok(())
}

/// Returns whether a name is left out, and the reason if someone could miss the file.
fn left_out(name: &str, depth: usize, shards: &[String]) -> Option<Option<&'static str>> {
    let is_top = depth == 0;
    if name.starts_with('.') || (is_top && name == "config.json") {
        return Some(None);
    }
    if name.ends_with(".index.json") {
        return Some(None);
    }
    let extension = Path::new(name).extension().and_then(|extension| extension.to_str())?;
    if is_top && shards.iter().any(|shard| shard == name) {
        return Some(None);
    }
    WEIGHTS.contains(&extension).then_some(Some("weights that the model does not name, or in another format"))
}
