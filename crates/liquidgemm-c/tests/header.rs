//! The committed header is the one that cbindgen makes of the sources.
//!
//! `cargo xtask header` runs this test with `LIQUIDGEMM_WRITE_HEADER`, which writes the header instead of comparing it.

use std::path::Path;

#[test]
fn the_committed_header_is_that_of_the_sources() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = cbindgen::Config::from_file(root.join("cbindgen.toml")).unwrap();
    let mut generated = Vec::new();
    cbindgen::Builder::new()
        .with_crate(root)
        .with_config(config)
        .generate()
        .expect("cbindgen reads the sources")
        .write(&mut generated);
    // Rust's heading for what the caller of an unsafe function sees to.
    let generated =
        String::from_utf8(generated).unwrap().replace(" # Safety\n", " The caller sees to this:\n");
    let path = root.join("include/liquidgemm.h");
    if std::env::var_os("LIQUIDGEMM_WRITE_HEADER").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, &generated).unwrap();
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(committed == generated, "include/liquidgemm.h is out of date; run cargo xtask header");
}
