//! `liquidgemm info`: shows the machine's driver, GPU and CPU kernels, and the backend that would be used.
//! Everything shown comes from the library and from `cuda_driver`.

use std::fmt::Write;

use liquidgemm::cpu::Kernel;

use super::{Place, Report};

/// Show the backend that would be used and why, driver, GPU, CPU kernels, and the hash of the kernel sources
#[derive(clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    place: Place,
}

pub(super) fn run(arguments: &Arguments) -> anyhow::Result<Report> {
    let backend = arguments.place.open()?;
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
    let kernels = |are_available| {
        let of_them = Kernel::ALL.iter().filter(|kernel| kernel.is_available() == are_available);
        of_them.map(ToString::to_string).collect::<Vec<_>>().join(", ")
    };
    line("CPU", format!("{}, kernels: {}", std::env::consts::ARCH, kernels(true)));
    if !kernels(false).is_empty() {
        line("unusable", format!("CPU kernels whose instructions this CPU lacks: {}", kernels(false)));
    }
    line("PTX", format!("built from sources {}", liquidgemm::gpu::ptx_hash()));
    Ok(Report { text, success: true })
}
