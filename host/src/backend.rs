//! Selects where a product is computed: on the GPU or on the CPU, with the same bits.
//!
//! [`Backend`] is for callers with host slices.
//! Callers with data on the device, or with a stream of their own, use [`Gpu`] directly.

use std::fmt;

use crate::check::checked_elements;
#[cfg(feature = "gpu")]
use crate::gpu::Gpu;
use crate::{Error, Output, PackedWeights, QuantizedActivations, cpu};

/// A device for products, the GPU or the CPU, and the reason why it was chosen.
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
    #[cfg(feature = "gpu")]
    Gpu(Box<Gpu>),
}

impl Backend {
    /// Takes the GPU that `Gpu::new` finds, or the CPU if no GPU is usable.
    ///
    /// [`reason`](Self::reason) then says why there is no GPU.
    pub fn auto() -> Self {
        #[cfg(not(feature = "gpu"))]
        return Self { device: Device::Cpu, reason: "built without the feature \"gpu\"".into() };
        #[cfg(feature = "gpu")]
        match Gpu::new() {
            Ok(gpu) => Self { device: Device::Gpu(Box::new(gpu)), reason: "it can be used".into() },
            Err(error) => Self {
                device: Device::Cpu,
                reason: format!("{error}; using the CPU backend").replace('\n', " "),
            },
        }
    }

    /// Takes the GPU that [`Gpu::new`] finds.
    ///
    /// # Errors
    /// As [`Gpu::new`].
    #[cfg(feature = "gpu")]
    pub fn gpu() -> Result<Self, Error> {
        Ok(Self::asked_for(Device::Gpu(Box::new(Gpu::new()?))))
    }

    /// Takes the GPU with this number, counted from 0.
    ///
    /// # Errors
    /// As [`Gpu::with_device`].
    #[cfg(feature = "gpu")]
    pub fn with_device(ordinal: u32) -> Result<Self, Error> {
        Ok(Self::asked_for(Device::Gpu(Box::new(Gpu::with_device(ordinal)?))))
    }

    /// Takes the CPU.
    pub fn cpu() -> Self {
        Self::asked_for(Device::Cpu)
    }

    fn asked_for(device: Device) -> Self {
        Self { device, reason: "asked for".into() }
    }

    /// Returns the GPU, or `None` for the CPU.
    #[cfg(feature = "gpu")]
    pub fn as_gpu(&self) -> Option<&Gpu> {
        match &self.device {
            Device::Cpu => None,
            #[cfg(feature = "gpu")]
            Device::Gpu(gpu) => Some(gpu),
        }
    }

    /// Returns the reason for the choice of this backend, on one line.
    pub fn reason(&self) -> &str {
        &self.reason
    }

    /// Computes `Y[m, n] = X[m, k] · W[n, k]ᵀ`, plus `bias[n]` in each row, and returns it row-major.
    ///
    /// The call waits for the result. The GPU backend copies all operands to the device each time.
    ///
    /// # Errors
    /// - [`Error::KMismatch`] if weights and activations differ in K.
    /// - [`Error::ShapeMismatch`] for a bias that is not `[n]`,
    ///   [`Error::NonFiniteParameter`] for one that is not finite.
    /// - [`Error::BiasWithRawOutput`] for a bias with `i32` output.
    /// - [`Error::TooLarge`] if the product exceeds the address space.
    /// - On the GPU also `Error::Gpu`, if the driver fails or device memory runs out.
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
            #[cfg(feature = "gpu")]
            Device::Gpu(gpu) => gpu.multiply(weights, activations, bias),
        }
    }
}

/// Writes `CPU, 16 threads, AVX2 kernel`, or the GPU's name, size and driver.
impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.device {
            Device::Cpu => {
                let threads = rayon::current_num_threads();
                let s = if threads == 1 { "" } else { "s" };
                write!(f, "CPU, {threads} thread{s}, {} kernel", cpu::Kernel::best())
            }
            #[cfg(feature = "gpu")]
            Device::Gpu(gpu) => f.write_str(&gpu.description()),
        }
    }
}
