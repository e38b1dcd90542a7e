//! Where a product is computed: on the GPU or on the CPU, with the same result bit for bit.
//!
//! [`Backend`] is for callers who have host slices and want a product. Those who keep their data on the device,
//! or have a stream of their own, use [`Gpu`] directly.

use std::fmt;

use crate::error::checked_elements;
use crate::gpu::Gpu;
use crate::{Error, Output, PackedWeights, QuantizedActivations, cpu};

/// A place to compute, and why it was chosen.
///
/// ```
/// use liquidgemm::{Backend, Group, PackedWeights, QuantizedActivations};
///
/// let (m, n, k) = (2, 3, 100);
/// let weights: Vec<f32> = (0..n * k).map(|i| (i as f32).sin()).collect();
/// let activations: Vec<f32> = (0..m * k).map(|i| (i as f32).cos()).collect();
///
/// let weights = PackedWeights::quantize(&weights, n, k, Group::default())?;
/// let activations = QuantizedActivations::quantize(&activations, m, k)?;
/// let y = Backend::auto().multiply::<f32>(&weights, &activations, None)?;
/// assert_eq!(y.len(), m * n);
/// # Ok::<(), liquidgemm::Error>(())
/// ```
#[derive(Debug)]
pub struct Backend {
    device: Device,
    reason: String,
}

#[derive(Debug)]
enum Device {
    Cpu,
    Gpu(Box<Gpu>),
}

impl Backend {
    /// The GPU that [`Gpu::new`] takes, if one can be used, otherwise the CPU; [`reason`](Self::reason) then says what was missing.
    pub fn auto() -> Self {
        match Gpu::new() {
            Ok(gpu) => Self { device: Device::Gpu(Box::new(gpu)), reason: "it can be used".into() },
            Err(error) => Self {
                device: Device::Cpu,
                reason: format!("{error}; using the CPU backend").replace('\n', " "),
            },
        }
    }

    /// The GPU that [`Gpu::new`] takes, because the caller says so.
    ///
    /// # Errors
    /// What [`Gpu::new`] says where none can be used.
    pub fn gpu() -> Result<Self, Error> {
        Ok(Self::asked_for(Device::Gpu(Box::new(Gpu::new()?))))
    }

    /// The GPU of this number, because the caller says so.
    ///
    /// # Errors
    /// What [`Gpu::with_device`] says where it can't be used.
    pub fn with_device(ordinal: u32) -> Result<Self, Error> {
        Ok(Self::asked_for(Device::Gpu(Box::new(Gpu::with_device(ordinal)?))))
    }

    /// The CPU, because the caller says so.
    pub fn cpu() -> Self {
        Self::asked_for(Device::Cpu)
    }

    fn asked_for(device: Device) -> Self {
        Self { device, reason: "asked for".into() }
    }

    /// The GPU that products are computed on, if it is one.
    pub fn as_gpu(&self) -> Option<&Gpu> {
        match &self.device {
            Device::Cpu => None,
            Device::Gpu(gpu) => Some(gpu),
        }
    }

    /// Why this backend was chosen, on one line.
    pub fn reason(&self) -> &str {
        &self.reason
    }

    /// The product `[m, n]` of activations `[m, k]` and weights `[n, k]`, row-major, plus `bias[n]`.
    ///
    /// # Errors
    /// K of weights and activations that differ, a bias of another length than `n` or not finite, a bias with
    /// `i32` output, a product that no memory could hold; on the GPU also whatever its driver says.
    pub fn multiply<T: Output>(
        &self,
        weights: &PackedWeights,
        activations: &QuantizedActivations,
        bias: Option<&[f32]>,
    ) -> Result<Vec<T>, Error> {
        match &self.device {
            Device::Cpu => {
                let elements = checked_elements("product", activations.m(), weights.n())?;
                let mut product = vec![T::zeroed(); elements];
                cpu::gemm(weights, activations, bias, &mut product)?;
                Ok(product)
            }
            Device::Gpu(gpu) => gpu.multiply(weights, activations, bias),
        }
    }
}

/// What it is: `CPU, 16 threads, AVX2 kernel`, or the GPU's name, size and driver.
impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.device {
            Device::Cpu => {
                let threads = rayon::current_num_threads();
                let s = if threads == 1 { "" } else { "s" };
                write!(f, "CPU, {threads} thread{s}, {} kernel", cpu::Kernel::best())
            }
            Device::Gpu(gpu) => f.write_str(&gpu.description()),
        }
    }
}
