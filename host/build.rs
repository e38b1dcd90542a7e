//! Compresses the kernels' PTX, which is text and nine tenths repetition, for the library to embed.

use std::fs::{self, File};
use std::io::{Error, Write};
use std::path::Path;

use flate2::{Compression, write::ZlibEncoder};

/// Where the committed PTX lies.
const PTX: &str = "ptx";

fn main() -> Result<(), Error> {
    println!("cargo::rerun-if-changed={PTX}");
    let out = std::env::var_os("OUT_DIR").ok_or_else(|| Error::other("cargo sets OUT_DIR"))?;
    for entry in fs::read_dir(PTX)? {
        let path = entry?.path();
        let Some(name) = path.file_name().filter(|_| path.extension().is_some_and(|ext| ext == "ptx")) else {
            continue;
        };
        let compressed = File::create(Path::new(&out).join(name).with_extension("ptx.zlib"))?;
        let mut encoder = ZlibEncoder::new(compressed, Compression::best());
        encoder.write_all(&fs::read(&path)?)?;
        encoder.finish()?;
    }
    Ok(())
}
