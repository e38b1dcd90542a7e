//! `cargo xtask ptx`: builds the device crate to PTX, and checks the PTX that the host crate embeds.
//!
//! The built files are committed, so that the library itself builds with stable Rust alone. The check ties them to
//! their sources and looks at what ptxas makes of them; neither needs a GPU.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use cuda_builder::{CudaBuilder, NvvmArch, SOURCES_KEY};
use flate2::{Compression, write::ZlibEncoder};

use crate::cuda_tools::CudaTools;
use crate::sass::{Form, Kernel};

/// Where the host crate embeds the PTX from.
const COMMITTED: &str = "host/ptx";
/// The most that all PTX, compressed, may add to the library.
const MOST_BYTES: usize = 3_000_000;
/// How the names of the kernels that dequantize start, and the instruction with which each multiplies.
const MULTIPLY: [(&str, &str); 3] = [("gemm", "IGMMA"), ("ablation", "IGMMA"), ("skinny", "IMMA")];
/// How the names of those start that dequantize as QServe does.
const SUBTRACTING: [&str; 2] = ["ablation_baseline", "ablation_qserve"];

/// How a kernel dequantizes, how many instructions four weights take it (IMAD and XOR, or IMAD and the four that `vsub4`
/// becomes), and with which instruction it multiplies.
fn dequantization(entry: &str) -> Option<(Form, usize, &'static str)> {
    let (_, multiply) = MULTIPLY.iter().find(|(prefix, _)| entry.starts_with(prefix))?;
    let (form, instructions) = if SUBTRACTING.iter().any(|name| entry.starts_with(name)) {
        (Form::MultiplySubtract, 5)
    } else {
        (Form::MultiplyAddFlip, 2)
    };
    Some((form, instructions, multiply))
}

/// Build the kernels to PTX, or check the PTX that is committed
#[derive(clap::Args)]
pub struct Arguments {
    /// Build nothing; check that host/ptx belongs to the sources, and what ptxas makes of it
    #[arg(long)]
    check: bool,
}

/// Runs the subcommand, from the workspace's root.
pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    if arguments.check { check() } else { build() }
}

/// Builds into the host crate and lists the kernels.
fn build() -> anyhow::Result<()> {
    for kernel in builder().copy_to(COMMITTED).build()? {
        println!("{:<28} {:>9} bytes", kernel.entry, kernel.text.len());
    }
    Ok(())
}

/// Builds from source beside the committed PTX, compares the two, and checks the latter.
pub fn build_and_check() -> anyhow::Result<()> {
    let built = builder().deny_warnings(true).build()?;
    check()?;
    let mut same_compiler = true;
    for kernel in &built {
        let committed = fs::read_to_string(Path::new(COMMITTED).join(format!("{}.ptx", kernel.entry)))
            .with_context(|| format!("{} is not committed: run `cargo xtask ptx`", kernel.entry))?;
        let committed = committed.replace('\r', "");
        same_compiler &= committed.lines().next() == kernel.text.lines().next();
        // Two builds of one rustc version may have different LLVMs, and word the same kernel differently.
        ensure!(
            !same_compiler || committed == kernel.text,
            "{COMMITTED}/{}.ptx is not what its sources give: run `cargo xtask ptx`",
            kernel.entry
        );
    }
    let names =
        if same_compiler { "the same text" } else { "kernels of the same names, by another compiler" };
    println!("built from source: {} kernels, {names} as committed", built.len());
    Ok(())
}

/// The builder of this workspace's kernels.
fn builder() -> CudaBuilder {
    CudaBuilder::new("kernels-gpu")
        .path_dependency("crates/format")
        .path_dependency("crates/cuda_std")
        .path_dependency("crates/cuda_std_macros")
        .arch(NvvmArch::Compute90a)
        .target_dir("target")
}

/// Checks the committed PTX and prints a line for each kernel.
fn check() -> anyhow::Result<()> {
    let files = ptx_files(Path::new(COMMITTED))?;
    ensure!(!files.is_empty(), "{COMMITTED} has no PTX: run `cargo xtask ptx`");
    let hash = builder().sources_hash()?;
    let mut bytes = 0;
    for path in &files {
        let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        bytes += compressed_bytes(&text)?;
        let built_from =
            text.lines().find_map(|line| line.strip_prefix(SOURCES_KEY)).unwrap_or("nothing known");
        ensure!(
            built_from.trim() == hash,
            "{} was built from sources {built_from}, but those here are {hash}: run `cargo xtask ptx`",
            path.display()
        );
    }

    let tools = CudaTools::fetch(Path::new("target"))?;
    let cubins = tempfile::tempdir()?;
    // ptxas takes seconds for the largest kernels: one thread each.
    let reports: Vec<anyhow::Result<String>> = std::thread::scope(|scope| {
        let (tools, cubins) = (&tools, cubins.path());
        let checks: Vec<_> =
            files.iter().map(|path| scope.spawn(move || check_kernel(tools, path, cubins))).collect();
        checks.into_iter().map(|check| check.join().unwrap_or_else(|_| bail!("a check panicked"))).collect()
    });
    let mut failed = 0;
    for report in reports {
        match report {
            Ok(line) => println!("{line}"),
            Err(error) => {
                println!("{error:#}");
                failed += 1;
            }
        }
    }
    ensure!(failed == 0, "{failed} of {} kernels failed their check", files.len());
    println!("{} kernels, {bytes} bytes embedded compressed, sources {hash}", files.len());
    ensure!(
        bytes <= MOST_BYTES,
        "the embedded PTX has {bytes} bytes compressed; the library allows itself {MOST_BYTES}"
    );
    Ok(())
}

/// Bytes of a kernel's text as the library's build script compresses it.
fn compressed_bytes(text: &str) -> anyhow::Result<usize> {
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(text.as_bytes())?;
    Ok(encoder.finish()?.len())
}

/// The PTX files of a directory, sorted.
fn ptx_files(directory: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let entries = fs::read_dir(directory)
        .with_context(|| format!("cannot list {}: run `cargo xtask ptx`", directory.display()))?;
    let mut files = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "ptx") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// Checks one kernel's machine code; says what it found in a line.
fn check_kernel(tools: &CudaTools, ptx: &Path, cubins: &Path) -> anyhow::Result<String> {
    let entry = ptx.file_stem().unwrap_or_default().to_string_lossy();
    describe_kernel(tools, ptx, &entry, &cubins.join(format!("{entry}.cubin")))
        .with_context(|| entry.to_string())
}

fn describe_kernel(tools: &CudaTools, ptx: &Path, entry: &str, cubin: &Path) -> anyhow::Result<String> {
    let resources = tools.assemble(ptx, cubin)?;
    ensure!(resources.local_bytes == 0, "{} bytes of local memory", resources.local_bytes);
    let kernel = Kernel::parse(&tools.disassemble(cubin)?)?;
    if let Some(instruction) = kernel.find(&["LDL", "STL"]) {
        bail!("the machine code uses local memory: `{instruction}`");
    }
    if let Some(instruction) = kernel.parted("IGMMA") {
        bail!("the main loop is compiled as if a warp's lanes could part: `{instruction}`");
    }
    let mut line = format!("{entry}: {} registers, 0 spills", resources.registers);
    if let Some((form, instructions_per_word, multiply)) = dequantization(entry) {
        let cost = kernel.dequantization(form, multiply)?;
        ensure!(cost.multiplies > 0, "no {multiply} in a loop: where are the tensor cores?");
        ensure!(cost.words > 0, "no weights are dequantized in a loop");
        let per_word = |count: usize| count as f64 / cost.words as f64;
        ensure!(
            cost.arithmetic == instructions_per_word * cost.words,
            "{:.2} arithmetic instructions per 4 weights instead of {instructions_per_word}",
            per_word(cost.arithmetic)
        );
        line += &format!(
            ", {} {multiply} in the loop, {:.2} arithmetic instructions per 4 weights ({} words traced; {:.2} to unpack)",
            cost.multiplies,
            per_word(cost.arithmetic),
            cost.words,
            per_word(cost.unpacking)
        );
    }
    Ok(line)
}
