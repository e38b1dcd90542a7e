//! Times a product: the median of repeated runs.
//!
//! A run on the CPU is one call.
//! A run on the GPU is a series of launches, timed by CUDA events.
//! As in a server, all operands are on the device already.

use std::time::{Duration, Instant};

use cust::event::{Event, EventFlags};
use cust::memory::DeviceBuffer;
use cust::stream::{Stream, StreamFlags};
use liquidgemm::gpu::{DeviceSpan, Gpu, Operands};
use liquidgemm::{Backend, Output, PackedWeights, Problem, QuantizedActivations};

use super::progress::Progress;

/// Runs are repeated for about this long.
const ENOUGH: Duration = Duration::from_millis(500);
/// Least number of runs.
const FEWEST: usize = 3;
/// Greatest number of runs.
const MOST: usize = 200;

/// Launches per run on the GPU.
/// Several launches back to back share the cost of the events and the delay of the first launch.
const LAUNCHES: u32 = 20;

/// The median of several runs.
pub(super) struct Timing {
    pub(super) median: Duration,
    /// What the median is over, as text, such as `200 calls`.
    pub(super) runs: String,
}

/// Times `activations · weightsᵀ + bias` on a backend.
pub(super) fn time<T: Output>(
    backend: &Backend,
    weights: &PackedWeights,
    activations: &QuantizedActivations,
    bias: Option<&[f32]>,
) -> anyhow::Result<Timing> {
    let _progress = Progress::spinner("multiplying");
    match backend.as_gpu() {
        Some(gpu) => time_on_gpu::<T>(gpu, weights, activations, bias),
        None => {
            let (median, runs) = repeat(|| {
                let start = Instant::now();
                std::hint::black_box(backend.multiply::<T>(weights, activations, bias)?);
                Ok(start.elapsed())
            })?;
            Ok(Timing { median, runs: format!("{runs} calls") })
        }
    }
}

fn time_on_gpu<T: Output>(
    gpu: &Gpu,
    weights: &PackedWeights,
    activations: &QuantizedActivations,
    bias: Option<&[f32]>,
) -> anyhow::Result<Timing> {
    let (m, n) = (activations.m(), weights.n());
    let plan = gpu.plan(Problem::new(m, n, weights.k()))?;
    // The stream, the events and the buffers below are created in the current context.
    gpu.make_current()?;
    let device_weights = gpu.upload(weights)?;
    let workspace = gpu.workspace()?;
    let stream = Stream::new(StreamFlags::NON_BLOCKING, None)?;
    let codes = DeviceBuffer::from_slice(activations.data())?;
    let scales = DeviceBuffer::from_slice(activations.scales())?;
    let bias = bias.map(DeviceBuffer::from_slice).transpose()?;
    let output = DeviceBuffer::<u8>::zeroed(m * n * size_of::<T>())?;
    let operands = Operands {
        m,
        activations: (&codes).into(),
        activation_stride: activations.stride(),
        token_scales: (&scales).into(),
        bias: bias.as_ref().map(DeviceSpan::from),
        output: (&output).into(),
        output_stride: n,
        output_type: T::TYPE,
    };
    let [start, end] = [Event::new(EventFlags::DEFAULT)?, Event::new(EventFlags::DEFAULT)?];
    let launch = || {
        start.record(&stream)?;
        for _ in 0..LAUNCHES {
            // SAFETY: buffers, weights and workspace live until the synchronization below.
            // Nothing else uses them.
            unsafe { gpu.gemm_with_plan(&device_weights, &operands, &plan, &workspace, &stream) }?;
        }
        end.record(&stream)?;
        end.synchronize()?;
        Ok(Duration::from_secs_f64(f64::from(end.elapsed_time_f32(&start)?) / 1e3) / LAUNCHES)
    };
    // The first launch compiles the kernel.
    launch()?;
    let (median, runs) = repeat(launch)?;
    Ok(Timing { median, runs: format!("{runs} series of {LAUNCHES} launches, data on the device") })
}

/// Calls `run` repeatedly. Returns the median of the times that it returns, and the number of calls.
fn repeat(mut run: impl FnMut() -> anyhow::Result<Duration>) -> anyhow::Result<(Duration, usize)> {
    let mut times = Vec::new();
    let start = Instant::now();
    while times.len() < FEWEST || times.len() < MOST && start.elapsed() < ENOUGH {
        times.push(run()?);
    }
    times.sort_unstable();
    Ok((times[times.len() / 2], times.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_is_over_the_times_that_the_runs_return() {
        let mut reported = [9, 1, 5].into_iter().cycle().map(Duration::from_micros);
        let (median, runs) = repeat(|| Ok(reported.next().unwrap())).unwrap();
        assert_eq!(median, Duration::from_micros(5));
        assert_eq!(runs, MOST);
    }

    #[test]
    fn slow_work_runs_only_a_few_times() {
        let timing = repeat(|| {
            std::thread::sleep(ENOUGH);
            Ok(ENOUGH)
        });
        assert_eq!(timing.unwrap(), (ENOUGH, FEWEST));
    }
}
