//! `cargo xtask ptx`: builds the device crate to PTX, and checks the committed PTX. Neither needs a GPU.
//!
//! The PTX files are committed, so that the library builds with stable Rust alone.
//! The check compares the files' source hash with the sources,
//! and examines the machine code that ptxas makes.
//! The build is `crates/cuda_builder`; `cuda_tools.rs` runs ptxas, and `sass.rs` reads the machine code.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use cuda_builder::{CudaBuilder, NvvmArch, SOURCES_KEY};
use flate2::{Compression, write::ZlibEncoder};

use crate::cuda_tools::CudaTools;
use crate::sass::{Form, Kernel};

/// The folders that the crates embed PTX from, and the prefixes of the kernels in each.
///
/// The bench embeds the kernels with its prefixes, the library all others.
const COMMITTED: [(&str, &[&str]); 2] = [("crates/bench/ptx", &["ablation_", "probe_"]), ("host/ptx", &[""])];
/// The most bytes that all compressed PTX may have.
const MOST_BYTES: usize = 3_000_000;
/// The prefixes of the kernels that dequantize, and the tensor-core instruction of each.
const MULTIPLY: [(&str, &str); 4] =
    [("gemm", "IGMMA"), ("grouped", "IGMMA"), ("ablation", "IGMMA"), ("skinny", "IMMA")];
/// The prefixes of the kernels that use QServe's dequantization.
const SUBTRACTING: [&str; 2] = ["ablation_baseline", "ablation_qserve"];

/// Returns how a kernel dequantizes:
/// the form, the number of instructions for four weights, and the tensor-core instruction.
///
/// Four weights take two instructions (IMAD and XOR) or five (IMAD and the four instructions of `vsub4`).
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
    /// Build nothing; check that the committed PTX belongs to the sources, and check its machine code
    #[arg(long)]
    check: bool,
}

/// Runs the subcommand in the workspace's root.
///
/// # Errors
/// Returns one if the build or a check fails.
pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    if arguments.check { check() } else { build() }
}

/// Builds the kernels into the crates that embed them, and lists the kernels.
fn build() -> anyhow::Result<()> {
    let copying = COMMITTED
        .iter()
        .fold(builder(), |builder, (directory, prefixes)| builder.copy_matching_to(prefixes, *directory));
    for kernel in copying.build()? {
        println!("{:<28} {:>9} bytes", kernel.entry, kernel.text.len());
    }
    Ok(())
}

/// Builds the kernels from source, compares them with the committed PTX, and checks the committed PTX.
///
/// # Errors
/// Returns one if the build fails, the two differ, or a check fails.
pub fn build_and_check() -> anyhow::Result<()> {
    let built = builder().deny_warnings(true).build()?;
    check()?;
    let mut same_compiler = true;
    for kernel in &built {
        let path = Path::new(directory_of(&kernel.entry)).join(format!("{}.ptx", kernel.entry));
        let committed = fs::read_to_string(&path)
            .with_context(|| format!("{} is not committed: run `cargo xtask ptx`", kernel.entry))?;
        let committed = committed.replace('\r', "");
        same_compiler &= committed.lines().next() == kernel.text.lines().next();
        // Two builds of one rustc version may use different LLVMs,
        // which write different PTX for the same kernel.
        ensure!(
            !same_compiler || committed == kernel.text,
            "{} differs from the PTX that its sources give: run `cargo xtask ptx`",
            path.display()
        );
    }
    let names =
        if same_compiler { "the same text" } else { "kernels of the same names, by another compiler" };
    println!("built from source: {} kernels, {names} as committed", built.len());
    Ok(())
}

/// Returns the directory that a kernel's PTX is committed in, by the rule of [`CudaBuilder::copy_matching_to`].
fn directory_of(entry: &str) -> &'static str {
    let takes = |(_, prefixes): &&(_, &[&str])| prefixes.iter().any(|prefix| entry.starts_with(prefix));
    COMMITTED.iter().find(takes).map_or("", |(directory, _)| directory)
}

/// Returns the builder for this workspace's kernels.
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
    let files = ptx_files()?;
    let hash = builder().sources_hash()?;
    let mut bytes = 0;
    for path in &files {
        let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        bytes += compressed_bytes(&text)?;
        let built_from =
            text.lines().find_map(|line| line.strip_prefix(SOURCES_KEY)).unwrap_or("without a hash");
        ensure!(
            built_from.trim() == hash,
            "{} was built from sources {built_from}, but those here are {hash}: run `cargo xtask ptx`",
            path.display()
        );
    }

    let tools = CudaTools::fetch(Path::new("target"))?;
    let cubins = tempfile::tempdir()?;
    // ptxas takes seconds for the largest kernels, so check each kernel in a thread of its own.
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
    ensure!(bytes <= MOST_BYTES, "the embedded PTX has {bytes} bytes compressed; the limit is {MOST_BYTES}");
    Ok(())
}

/// Returns a kernel's size in bytes, compressed as the library's build script compresses it.
fn compressed_bytes(text: &str) -> anyhow::Result<usize> {
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(text.as_bytes())?;
    Ok(encoder.finish()?.len())
}

/// Returns the committed PTX files, sorted by path.
fn ptx_files() -> anyhow::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for (directory, _) in COMMITTED {
        let entries = fs::read_dir(directory)
            .with_context(|| format!("cannot list {directory}: run `cargo xtask ptx`"))?;
        let before = files.len();
        for entry in entries {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "ptx") {
                files.push(path);
            }
        }
        ensure!(files.len() > before, "{directory} has no PTX: run `cargo xtask ptx`");
    }
    files.sort();
    Ok(files)
}

/// Checks one kernel's machine code and returns one line about it.
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
        bail!("the main loop is compiled for divergent lanes, which is slower: `{instruction}`");
    }
    // ptxas writes an empty group of multiplications as a dummy HGMMA; no kernel uses that instruction.
    // A wait for one group then waits for the multiplications that it should overlap with.
    if let Some(instruction) = kernel.find(&["HGMMA"]) {
        bail!("a group of multiplications is empty: `{instruction}`");
    }
    let mut line = format!("{entry}: {} registers, 0 spills", resources.registers);
    if let Some((form, instructions_per_word, multiply)) = dequantization(entry) {
        let cost = kernel.dequantization(form, multiply)?;
        ensure!(cost.multiplies > 0, "no {multiply} in a loop: the kernel does not use the tensor cores");
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
