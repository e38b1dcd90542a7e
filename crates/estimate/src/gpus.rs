//! The GPUs that estimates exist for: one table of their data sheets' figures.
//! SMs, memory speed and clock are those of the library's planner, [`DeviceFigures`].

use liquidgemm::DeviceFigures;
use serde::{Serialize, Serializer};

/// A GPU. Tensor throughputs are dense, without sparsity.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Gpu {
    /// The name on the command line.
    pub key: &'static str,
    /// The name.
    pub name: &'static str,
    /// SMs, memory speed and clock.
    #[serde(serialize_with = "figures_as_map")]
    pub figures: DeviceFigures,
    /// Memory in GB (10⁹ bytes).
    pub memory_gb: f64,
    /// int8 throughput in tera-operations per second.
    pub int8_tops: f64,
    /// fp8 throughput in teraflops per second.
    pub fp8_tflops: f64,
    /// bf16 and f16 throughput in teraflops per second.
    pub bf16_tflops: f64,
    /// Speed to other GPUs in GB/s, one direction.
    pub link_gb_per_second: f64,
    /// How the driver's name of the GPU begins in records of the bench. `None` if there are no records.
    #[serde(skip)]
    pub recorded_as: Option<&'static str>,
    /// Where the figures come from.
    pub source: &'static str,
}

fn figures_as_map<S: Serializer>(figures: &DeviceFigures, serializer: S) -> Result<S::Ok, S::Error> {
    #[derive(Serialize)]
    struct Figures {
        multiprocessors: u32,
        memory_gb_per_second: f64,
        clock_ghz: f64,
    }
    Figures {
        multiprocessors: figures.multiprocessors,
        memory_gb_per_second: figures.memory_bytes_per_second as f64 / 1e9,
        clock_ghz: figures.clock_hz as f64 / 1e9,
    }
    .serialize(serializer)
}

const HOPPER: Gpu = Gpu {
    key: "h100-sxm",
    name: "H100 SXM 80 GB",
    figures: DeviceFigures::H100_SXM,
    memory_gb: 80.0,
    int8_tops: 1979.0,
    fp8_tflops: 1979.0,
    bf16_tflops: 989.5,
    link_gb_per_second: 450.0,
    recorded_as: Some("NVIDIA H100 80GB HBM3"),
    source: "NVIDIA H100 data sheet",
};

/// Every GPU.
pub static GPUS: [Gpu; 7] = [
    HOPPER,
    Gpu {
        key: "h100-pcie",
        name: "H100 PCIe 80 GB",
        figures: DeviceFigures::H100_PCIE,
        int8_tops: 1513.0,
        fp8_tflops: 1513.0,
        bf16_tflops: 756.5,
        link_gb_per_second: 64.0,
        recorded_as: None,
        source: "NVIDIA H100 data sheet and product brief PB-11133; PCIe 5.0 between GPUs",
        ..HOPPER
    },
    Gpu {
        key: "h200",
        name: "H200 SXM 141 GB",
        figures: DeviceFigures::H200,
        memory_gb: 141.0,
        recorded_as: None,
        source: "NVIDIA H200 data sheet",
        ..HOPPER
    },
    Gpu {
        key: "h800",
        name: "H800 SXM 80 GB",
        figures: DeviceFigures::H800,
        link_gb_per_second: 200.0,
        recorded_as: None,
        source: "server vendors; NVIDIA publishes no data sheet",
        ..HOPPER
    },
    Gpu {
        key: "h20",
        name: "H20 96 GB",
        figures: DeviceFigures::H20,
        memory_gb: 96.0,
        int8_tops: 296.0,
        fp8_tflops: 296.0,
        bf16_tflops: 148.0,
        recorded_as: None,
        source: "server vendors; NVIDIA publishes no data sheet",
        ..HOPPER
    },
    Gpu {
        key: "gh200",
        name: "GH200 96 GB",
        figures: DeviceFigures::GH200,
        memory_gb: 96.0,
        recorded_as: None,
        source: "NVIDIA GH200 data sheet, HBM3",
        ..HOPPER
    },
    Gpu {
        key: "gh200-144gb",
        name: "GH200 144 GB",
        figures: DeviceFigures::GH200_HBM3E,
        memory_gb: 144.0,
        recorded_as: None,
        source: "NVIDIA GH200 data sheet, HBM3e",
        ..HOPPER
    },
];

impl Gpu {
    /// Finds a GPU by the name on the command line.
    pub fn find(key: &str) -> Option<&'static Self> {
        GPUS.iter().find(|gpu| gpu.key.eq_ignore_ascii_case(key))
    }

    /// Returns bytes per microsecond of memory.
    pub fn memory_speed(&self) -> f64 {
        self.figures.memory_bytes_per_second as f64 / 1e6
    }
}
