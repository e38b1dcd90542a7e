//! The layer, and the custom operation that runs it.

use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Result, Shape, Tensor};
use half::bf16;
use liquidgemm::Linear;
use liquidgemm::cpu::QuantizeInput;

#[cfg(feature = "cuda")]
use crate::layer::on_gpu::OnGpu;

/// A linear layer with 4-bit weights, for bf16 tensors.
pub struct LiquidLinear {
    linear: Linear,
    #[cfg(feature = "cuda")]
    on_gpu: Option<OnGpu>,
}

impl LiquidLinear {
    /// Takes a layer for tensors on `device`.
    pub fn new(linear: Linear, device: &Device) -> Result<Self> {
        #[cfg(not(feature = "cuda"))]
        if !device.is_cpu() {
            candle_core::bail!("build with the feature `cuda` for tensors on {:?}", device.location());
        }
        Ok(Self {
            #[cfg(feature = "cuda")]
            on_gpu: match device {
                Device::Cuda(device) => Some(OnGpu::new(&linear, device)?),
                _ => None,
            },
            linear,
        })
    }

    /// Computes `[m, n]` of contiguous bf16 `[m, k]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        x.apply_op1_no_bwd(self)
    }

    /// Returns the rows of an input, and its first element.
    fn rows(&self, layout: &Layout) -> Result<(usize, usize)> {
        let (m, k) = layout.shape().dims2()?;
        if k != self.linear.k() {
            candle_core::bail!("the input has {k} columns; the layer takes {}", self.linear.k());
        }
        match layout.contiguous_offsets() {
            Some((first, _)) => Ok((m, first)),
            None => candle_core::bail!("the input is not contiguous; call .contiguous()"),
        }
    }
}

impl CustomOp1 for LiquidLinear {
    fn name(&self) -> &'static str {
        "liquidgemm-linear"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (m, first) = self.rows(layout)?;
        let CpuStorage::BF16(values) = storage else {
            candle_core::bail!("the input must be {:?}", DType::BF16)
        };
        let k = self.linear.k();
        let input = QuantizeInput::new(&values[first..first + m * k], m, k);
        let output = self.linear.forward::<bf16, bf16>(&input, None).map_err(candle_core::Error::wrap)?;
        Ok((CpuStorage::BF16(output), Shape::from((m, self.linear.n()))))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        storage: &candle_core::CudaStorage,
        layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        let (m, first) = self.rows(layout)?;
        let Some(on_gpu) = &self.on_gpu else { candle_core::bail!("the layer was made for the CPU") };
        Ok((on_gpu.forward(storage, m, first)?, Shape::from((m, self.linear.n()))))
    }
}

#[cfg(feature = "cuda")]
mod on_gpu {
    //! The layer on a GPU, in candle's context and on its stream.

    use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaStream, DevicePtr};
    use candle_core::cuda_backend::{CudaDevice, CudaStorage, WrapErr};
    use candle_core::{Error, Result};
    use half::bf16;
    use liquidgemm::gpu::{
        DeviceLinear, DeviceSpan, Gpu, LinearInput, LinearOutput, StreamHandle, Workspace,
    };
    use liquidgemm::{HalfType, Linear, OutputType};

    /// A layer's memory on the GPU, and a workspace for candle's stream.
    pub struct OnGpu {
        layer: DeviceLinear,
        workspace: Workspace,
        gpu: Gpu,
        // Last, so that it outlives what lives in its context.
        device: CudaDevice,
    }

    impl OnGpu {
        /// Uploads a layer to candle's GPU.
        pub fn new(linear: &Linear, device: &CudaDevice) -> Result<Self> {
            let context = device.cuda_stream().context().cu_ctx();
            // SAFETY: the device keeps its context, and is kept here until everything of the library is dropped.
            let gpu = unsafe { Gpu::from_context(context.cast()) }.map_err(Error::wrap)?;
            Ok(Self {
                layer: gpu.upload_linear(linear).map_err(Error::wrap)?,
                workspace: gpu.workspace().map_err(Error::wrap)?,
                gpu,
                device: device.clone(),
            })
        }

        /// Computes `m` rows of bf16 from the element `first` on. The launches wait for nothing on the host.
        pub fn forward(&self, storage: &CudaStorage, m: usize, first: usize) -> Result<CudaStorage> {
            let (n, k) = (self.layer.n(), self.layer.k());
            let stream = self.device.cuda_stream();
            let input = span(storage.as_cuda_slice::<bf16>()?, &stream);
            // SAFETY: candle's layout says that the slice has the elements of the input there.
            let input = unsafe {
                DeviceSpan::from_raw(input.address() + 2 * first as u64, input.bytes() - 2 * first)
            };
            // SAFETY: the launches below write what they read of the scratch memory, and the whole output.
            let (scratch, output) = unsafe {
                let scratch_bytes = self.layer.scratch_bytes(m).map_err(Error::wrap)?;
                (stream.alloc::<u8>(scratch_bytes.max(1)).w()?, stream.alloc::<bf16>(m * n).w()?)
            };
            let call = LinearInput::new(input, HalfType::Bf16, m, k);
            let target = LinearOutput {
                output: span(&output, &stream),
                output_stride: n,
                output_type: OutputType::Bf16,
            };
            // SAFETY: all memory lives until the launches have ended: candle frees slices in the order of the stream.
            // Candle's operations on one device share the stream, so nothing else uses the workspace meanwhile.
            unsafe {
                let handle = StreamHandle::from_raw(stream.cu_stream().cast());
                let scratch = span(&scratch, &stream);
                self.layer.forward(&self.gpu, &call, &target, scratch, &self.workspace, handle)
            }
            .map_err(Error::wrap)?;
            Ok(CudaStorage::wrap_cuda_slice(output, self.device.clone()))
        }
    }

    /// Returns the address and the length of a slice, for launches on the same stream.
    fn span<T>(slice: &CudaSlice<T>, stream: &CudaStream) -> DeviceSpan {
        let (address, _guard) = slice.device_ptr(stream);
        // SAFETY: the slice has that many bytes there. It outlives the call that uses the span.
        unsafe { DeviceSpan::from_raw(address, slice.num_bytes()) }
    }
}
