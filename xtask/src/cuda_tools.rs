//! Runs ptxas and nvdisasm and reads their reports, without a CUDA toolkit.
//!
//! The tools come from PyPI, at pinned versions and hashes (`pypi.rs`), and are kept below the target directory.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail, ensure};

use crate::pypi::Wheel;

const PTXAS: Wheel = Wheel {
    package: "nvidia-cuda-nvcc",
    version: "13.0.88",
    // For x86-64 and 64-bit Arm.
    hashes: &[
        "56fe502eb77625a12f25172caa3cdddb4e4c8ba2c8c17dba44b164761b380f03",
        "c7ff28f86a24effdc6c034fa15230c549a273e4771b10a7fec14996f8cf3307f",
    ],
    files: ".*/bin/(ptxas)",
    folder: "",
};
const NVDISASM: Wheel = Wheel {
    package: "nvidia-cuda-nvdisasm",
    version: "13.2.51",
    hashes: &[
        "5a7acf77c55d6d2911ed6155d4d5bc156ffadf9df7a68a89b0c1155f4b13688c",
        "483c8f652c1ca006135584b4faf7ea1d2bafe4c40ec1c9ef57a04c6acfbdd57f",
    ],
    files: ".*/bin/(nvdisasm)",
    folder: "",
};

/// NVIDIA's assembler and disassembler.
pub struct CudaTools {
    ptxas: PathBuf,
    nvdisasm: PathBuf,
}

/// A kernel's resources, as ptxas reports them.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Resources {
    pub registers: u32,
    /// Bytes of stack, spill stores and spill loads.
    pub local_bytes: u32,
}

impl CudaTools {
    /// Returns the tools below `target_dir` and fetches those that are missing.
    ///
    /// # Errors
    /// Returns one if a tool cannot be fetched or stored.
    pub fn fetch(target_dir: &Path) -> anyhow::Result<Self> {
        let directory = target_dir.join("cuda-tools");
        let ptxas = fetch(&PTXAS, "ptxas", &directory)?;
        Ok(Self { ptxas, nvdisasm: fetch(&NVDISASM, "nvdisasm", &directory)? })
    }

    /// Assembles a PTX file into `cubin` and returns the kernel's resources.
    ///
    /// # Errors
    /// Returns one if ptxas fails, and for everything that it reports besides its statistics.
    /// Examples are a spill, a serialized wgmma (C7510 and similar), and an ignored `setmaxnreg` (C7508).
    pub fn assemble(&self, ptx: &Path, cubin: &Path) -> anyhow::Result<Resources> {
        let mut command = Command::new(&self.ptxas);
        command.args(["-v", "-arch=sm_90a", "--warn-on-spills", "--warn-on-local-memory-usage"]);
        let output = command.arg(ptx).arg("-o").arg(cubin).output().context("cannot start ptxas")?;
        let report = String::from_utf8_lossy(&output.stderr) + String::from_utf8_lossy(&output.stdout);
        ensure!(output.status.success(), "ptxas rejects {}:\n{report}", ptx.display());
        read_report(&report)
    }

    /// Returns the SASS of a cubin as text.
    ///
    /// # Errors
    /// Returns one if nvdisasm fails.
    pub fn disassemble(&self, cubin: &Path) -> anyhow::Result<String> {
        let output =
            Command::new(&self.nvdisasm).arg("-c").arg(cubin).output().context("cannot start nvdisasm")?;
        let report = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "nvdisasm rejects {}:\n{report}", cubin.display());
        Ok(String::from_utf8(output.stdout)?)
    }
}

/// Returns the path of a program that its wheel holds, and fetches it if it is missing.
fn fetch(wheel: &Wheel, program: &str, directory: &Path) -> anyhow::Result<PathBuf> {
    let program = wheel.fetch(directory)?.join(program);
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755))
            .with_context(|| format!("cannot make {} executable", program.display()))?;
    }
    Ok(program)
}

/// Parses the output of `ptxas -v` for a module with one kernel.
fn read_report(report: &str) -> anyhow::Result<Resources> {
    let mut resources = Resources::default();
    let mut has_registers = false;
    for line in report.lines() {
        let statement = line.trim_start_matches("ptxas info").trim_start_matches([' ', ':']).trim();
        if let Some(rest) = statement.strip_prefix("Used ") {
            resources.registers =
                number_before(rest, " registers").context("ptxas states no register count")?;
            has_registers = true;
        } else if statement.contains("bytes stack frame") {
            for part in statement.split(", ") {
                let bytes = part.split(' ').next().and_then(|number| number.parse::<u32>().ok());
                resources.local_bytes +=
                    bytes.with_context(|| format!("cannot read ptxas's `{statement}`"))?;
            }
        } else if !is_statistics(statement) {
            bail!("ptxas reports: {}", line.trim());
        }
    }
    ensure!(has_registers, "ptxas says nothing about a kernel: {report}");
    Ok(resources)
}

/// Returns whether a line of ptxas's report is only statistics, or a remark that is expected.
///
/// The main loop of a grouped kernel branches to instructions of different n.
/// They all use the same registers, so ptxas adds a fence to each branch (C7519). It serializes nothing.
fn is_statistics(statement: &str) -> bool {
    statement.is_empty()
        || statement.starts_with("(C7519)") && statement.contains("in function 'grouped_")
        || statement.contains("bytes gmem")
        || ["Compiling entry function", "Function properties for", "Compile time"]
            .iter()
            .any(|start| statement.starts_with(start))
}

/// Returns the number right before `unit`.
fn number_before(text: &str, unit: &str) -> Option<u32> {
    text.split_once(unit)?.0.rsplit(' ').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLEAN: &str = "ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'gemm_8' for 'sm_90a'
ptxas info    : Function properties for gemm_8
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers
ptxas info    : Compile time = 83.924 ms
";

    #[test]
    fn registers_and_local_memory_are_read() {
        assert_eq!(read_report(CLEAN).unwrap(), Resources { registers: 168, local_bytes: 0 });
        let spilling =
            CLEAN.replace("0 bytes stack frame, 0 bytes spill", "64 bytes stack frame, 12 bytes spill");
        assert_eq!(read_report(&spilling).unwrap(), Resources { registers: 168, local_bytes: 76 });
    }

    #[test]
    fn every_remark_is_an_error_that_quotes_it() {
        let remarks = [
            "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ...",
            "ptxas info    : (C7508) Potential Performance Loss: 'setmaxnreg' ignored to maintain minimum register requirements.",
            "ptxas warning : Registers are spilled to local memory in function 'gemm_8', 12 bytes spill stores",
        ];
        for remark in remarks {
            let error = read_report(&format!("{CLEAN}{remark}\n")).unwrap_err().to_string();
            assert!(error.contains(remark), "{error}");
        }
    }

    #[test]
    fn fences_are_expected_in_grouped_kernels_only() {
        let remark = |entry: &str| {
            format!(
                "{CLEAN}ptxas info    : (C7519) warpgroup.arrive is injected in around line 1 by compiler to allow use of registers in GMMA in function '{entry}'\n"
            )
        };
        assert!(read_report(&remark("grouped_128x256")).is_ok());
        assert!(read_report(&remark("gemm_128x256")).is_err());
    }

    #[test]
    fn a_module_without_a_kernel_is_an_error() {
        assert!(read_report("ptxas info    : 0 bytes gmem\n").is_err());
    }
}
