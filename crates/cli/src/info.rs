//! `liquidgemm info`: shows the machine's driver, GPU and CPU kernels, and the backend that would be used.
//! Everything shown comes from the library and from `cuda_driver`.

use std::fmt::Write;

use liquidgemm::Backend;
use liquidgemm::cpu::Kernel;
use serde_json::{Value, json};

use super::models::{EXIT_CODES, json_report};
use super::{Place, Report};

/// Show the backend that would be used and why, driver, GPU, CPU kernels, and the hash of the kernel sources
#[derive(clap::Args)]
#[command(after_help = EXIT_CODES)]
pub(super) struct Arguments {
    #[command(flatten)]
    place: Place,

    /// Write the result as JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(arguments: &Arguments) -> anyhow::Result<Report> {
    let backend = arguments.place.open()?;
    if arguments.json {
        return Ok(json_report(&described(&backend), true));
    }
    let mut text = String::new();
    let mut line =
        |what: &str, value: String| writeln!(text, "{what:<9} {value}").expect("a String takes all");
    line("version", env!("CARGO_PKG_VERSION").into());
    line("backend", backend.to_string());
    line("because", backend.reason().into());
    line(
        "driver",
        match cuda_driver::load() {
            Ok(driver) => format!("supports CUDA {}", driver.version()),
            Err(error) => error.to_string(),
        },
    );
    line(
        "GPU",
        match backend.as_gpu() {
            Some(gpu) => gpu.description(),
            None => "none in use".into(),
        },
    );
    if let Some(gpu) = backend.as_gpu() {
        let figures = gpu.figures();
        line(
            "figures",
            format!(
                "{:.2} TB/s, {:.2} GHz, {:?} resident clusters of 1, 2, 4 and 8 thread blocks",
                figures.memory_bytes_per_second as f64 / 1e12,
                figures.clock_hz as f64 / 1e9,
                figures.clusters,
            ),
        );
    }
    line("CPU", format!("{}, kernels: {}", std::env::consts::ARCH, kernels(true).join(", ")));
    let unusable = kernels(false);
    if !unusable.is_empty() {
        line("unusable", format!("CPU kernels whose instructions this CPU lacks: {}", unusable.join(", ")));
    }
    line("PTX", format!("built from sources {}", liquidgemm::gpu::ptx_hash()));
    Ok(Report { text, success: true })
}

/// Returns the names of the CPU kernels that this CPU can or can't run.
fn kernels(are_available: bool) -> Vec<String> {
    let of_them = Kernel::ALL.iter().filter(|kernel| kernel.is_available() == are_available);
    of_them.map(ToString::to_string).collect()
}

/// Returns what the command shows as JSON.
fn described(backend: &Backend) -> Value {
    let driver = match cuda_driver::load() {
        Ok(driver) => json!({"cuda": driver.version().to_string()}),
        Err(error) => json!({"error": error.to_string()}),
    };
    let gpu = backend.as_gpu().map(|gpu| {
        let figures = gpu.figures();
        json!({
            "description": gpu.description(), "memory_bytes_per_second": figures.memory_bytes_per_second,
            "clock_hz": figures.clock_hz, "resident_clusters": figures.clusters,
        })
    });
    json!({
        "version": env!("CARGO_PKG_VERSION"), "backend": backend.to_string(), "because": backend.reason(),
        "driver": driver, "gpu": gpu, "cpu": std::env::consts::ARCH, "cpu_kernels": kernels(true),
        "unusable_cpu_kernels": kernels(false), "ptx": liquidgemm::gpu::ptx_hash(),
    })
}
