//! The bench: how fast the GPU backend is against the hardware's limits and against cuBLASLt, in one run.
//!
//! | file | what it does |
//! |---|---|
//! | [`shapes`], [`peers`] | which problems; what others' kernels take on them |
//! | [`replay`] | how a kernel is timed: CUDA graphs, medians |
//! | `arena`, `data` | device memory and the random numbers in it |
//! | [`cublaslt`] | the baselines' library, loaded when the program runs |
//! | [`run`] | one run over all problems; `check` compares results |
//! | [`monotone`] | whether fewer tokens ever take longer than more |
//! | [`sweep`] | every plan of a problem, to choose the planner's |
//! | [`ablation`] | the kernel without one of its ideas at a time: the paper's figure 13 |
//! | [`record`], [`statistics`], [`targets`] | results, their means, and what they are held against |
//! | [`table`], [`markdown`], [`plots`] | results for people |
//!
//! Every figure that counts is a ratio inside one run on one GPU. Besides cuBLASLt these are two probes of the
//! hardware, `stream`, which only reads as many bytes as the problem moves, and `mma`, which only does as many
//! products; the slower of the two is the problem's floor.

pub mod ablation;
mod arena;
mod check;
pub mod circumstances;
pub mod cublaslt;
mod data;
pub mod markdown;
pub mod monotone;
pub mod peers;
pub mod plots;
pub mod record;
pub mod replay;
pub mod run;
pub mod shapes;
pub mod statistics;
pub mod sweep;
pub mod table;
pub mod targets;
