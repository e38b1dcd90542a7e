//! Compresses the kernels' PTX, which `src/gpu/kernels.rs` embeds in the library.
//! PTX is text, and about nine tenths of it is repetition.
//! Without the feature `gpu` there is nothing to do.

#[cfg(not(feature = "gpu"))]
fn main() {}

#[cfg(feature = "gpu")]
fn main() -> Result<(), std::io::Error> {
    compress::ptx()
}

#[cfg(feature = "gpu")]
mod compress {
    use std::fs::{self, File};
    use std::io::{Error, Write};
    use std::path::Path;

    use flate2::{Compression, write::ZlibEncoder};

    /// Folder of the committed PTX, relative to the package's root.
    const PTX: &str = "ptx";

    pub fn ptx() -> Result<(), Error> {
        println!("cargo::rerun-if-changed={PTX}");
        let out = std::env::var_os("OUT_DIR").ok_or_else(|| Error::other("cargo sets OUT_DIR"))?;
        for entry in fs::read_dir(PTX)? {
            let path = entry?.path();
            let Some(name) = path.file_name().filter(|_| path.extension().is_some_and(|ext| ext == "ptx"))
            else {
                continue;
            };
            let compressed = File::create(Path::new(&out).join(name).with_extension("ptx.zlib"))?;
            let mut encoder = ZlibEncoder::new(compressed, Compression::best());
            encoder.write_all(&fs::read(&path)?)?;
            encoder.finish()?;
        }
        Ok(())
    }
}
