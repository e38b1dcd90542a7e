//! Measures the GPU backend against the hardware's limits and against cuBLASLt, all in one run.
//! The kernels under test are those of `liquidgemm`; the bench's own kernels are the PTX files in `ptx/`.
//!
//! | file | purpose |
//! |---|---|
//! | [`shapes`], [`matrix`], [`peers`] | the problems to measure; recorded times of other projects' kernels |
//! | [`replay`] | how a kernel is timed: CUDA graphs, medians |
//! | `arena`, `data`, `driver` | the device memory of a run, its random contents, driver errors |
//! | [`cublaslt`] | cuBLASLt, the baseline, loaded at run time |
//! | [`probes`] | kernels that only read memory, or only multiply |
//! | [`run`], `check` | one run over all problems; comparison of its results with a reference |
//! | [`monotone`] | search for batch sizes that take longer than a larger one |
//! | [`moe`] | the grouped GEMM on mixtures of experts, beside other projects' |
//! | [`activations`] | the quantization of activations |
//! | [`torch`] | torch's kernels in the same run, where torch is installed |
//! | [`sweep`] | the time of every plan of a problem, to judge the planner |
//! | [`ablation`] | the kernel without one of its ideas at a time: figure 13 of the paper |
//! | [`record`], [`circumstances`] | the results, and the GPU, driver and date that belong to them |
//! | [`statistics`], [`targets`] | medians and means, and the targets for them |
//! | [`table`], [`markdown`], [`plots`] | the results as text, as a page and as pictures |
//!
//! Only ratios between times of the same run on the same GPU are meaningful, because times differ by machine.
//! Besides cuBLASLt, each run measures two probes of the hardware:
//! `stream` only reads as many bytes as the problem moves, and `mma` only does as many multiply-adds.
//! The slower of the two is the problem's floor.

pub mod ablation;
pub mod activations;
mod arena;
mod check;
pub mod circumstances;
pub mod cublaslt;
mod data;
mod driver;
mod lazy_kernel;
pub mod markdown;
pub mod matrix;
pub mod moe;
pub mod monotone;
pub mod peers;
pub mod plots;
pub mod probes;
pub mod record;
pub mod replay;
pub mod run;
pub mod shapes;
pub mod statistics;
pub mod sweep;
pub mod table;
pub mod targets;
pub mod torch;
