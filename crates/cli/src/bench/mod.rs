//! `liquidgemm bench`: measures the GPU backend and records the results.
//! The measurements are in `liquidgemm-bench`; this folder has the arguments, the progress and the files.
//!
//! | file | purpose |
//! |---|---|
//! | `mod` | the arguments |
//! | `kind` | what all kinds of runs have in common: measured or read, shown, written |
//! | `dense`, `sweep`, `ablation`, `activations`, `moe` | the kinds |
//! | `screen` | rows on stdout, progress on stderr |

mod ablation;
mod activations;
mod dense;
mod kind;
mod moe;
mod screen;
mod sweep;

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::ValueEnum;
use liquidgemm::gpu::Gpu;
use liquidgemm::{Error, Group};
use liquidgemm_bench::ablation::Ablation;
use liquidgemm_bench::activations::Activations;
use liquidgemm_bench::moe::Mixtures;
use liquidgemm_bench::record::{Baseline, Run};
use liquidgemm_bench::replay::Pace;
use liquidgemm_bench::run::Options;
use liquidgemm_bench::shapes::{self, Case, Matrix};
use liquidgemm_format::tile::{TILE_SHAPES, TileShape};

use super::Report;
use kind::report;
use sweep::Sweeps;

/// Measure the GPU backend against the hardware's limits and cuBLASLt
///
/// A problem is Y[M, N] = X[M, K] · W[N, K]ᵀ: M tokens, N output channels, K elements per channel.
/// By default, the problems are the linear layers of LLaMA-2-7B, -13B, -70B, LLaMA-3-8B, -70B, Mistral-7B
/// and Yi-34B at M = 1, 2, 4 … 8192.
/// The lists --peers, --between, --shards and --curve replace them and can be combined.
///
/// cuBLASLt is measured if it is installed.
/// If the system's loader doesn't find it, set LIQUIDGEMM_CUBLASLT to the library or its directory.
/// Outputs of every point are compared with the CPU backend's; the exit code is 1 if any bit differs.
#[derive(clap::Args)]
#[command(group = clap::ArgGroup::new("problems").multiple(true))]
pub(super) struct Arguments {
    /// Twelve points that cover all batch sizes
    #[arg(long, group = "problems", conflicts_with_all = ["peers", "between", "shards", "curve", "monotone", "shapes"])]
    quick: bool,
    /// The ten matrices that other kernels ("peers") were measured on, at M = 1, 4, 8, 16 … 4096,
    /// and M = N = K = 8192
    #[arg(long, group = "problems")]
    peers: bool,
    /// The matrices of --peers at 26 batch sizes between the powers of two, 24 … 3072
    #[arg(long, group = "problems")]
    between: bool,
    /// LLaMA-3-70B's layers sharded for tensor parallelism over 4 and 8 GPUs,
    /// at M = 1, 2, 4 … 1024 and ten batch sizes between
    #[arg(long, group = "problems")]
    shards: bool,
    /// Four matrices at M = 1, 8, 16 … 512, for plots of time against M;
    /// of the baselines only fp8, unless --baselines is given
    #[arg(long, group = "problems")]
    curve: bool,
    /// Only our kernel, on the matrices of --peers at M = 1, 8, 16 … 512 and a few irregular M up to 1025;
    /// lists every M that takes over 3 % longer than a larger M, once a second measurement confirms it
    #[arg(long, group = "problems", conflicts_with_all = ["peers", "between", "shards", "curve", "baselines", "algorithms", "sweep"])]
    monotone: bool,
    /// Weight matrices as NxK, separated by commas; with the lists above, instead of the lists' matrices
    #[arg(long, value_name = "NxK", value_delimiter = ',', group = "problems")]
    shapes: Vec<Matrix>,
    /// Batch sizes, separated by commas: numbers, or a..b for the powers of two from a to b;
    /// with the lists above, instead of the lists' batch sizes [default: 1..8192]
    #[arg(long, value_name = "M", value_parser = parse_tokens)]
    m: Option<Tokens>,
    /// Types of cuBLASLt to measure: int8, fp8 and bf16, separated by commas, or none; if given, a missing cuBLASLt is an error
    /// [default: all three, if cuBLASLt is installed]
    #[arg(long, value_name = "TYPES", value_parser = parse_baselines)]
    baselines: Option<Baselines>,
    /// Leave out the probes; the points then have no floor and no score
    #[arg(long)]
    no_probes: bool,
    /// How long to measure each kernel; brief takes a third of the time
    /// [default: thorough; with --monotone, brief]
    #[arg(long)]
    pace: Option<PaceChoice>,
    /// Try this many of the algorithms that cuBLASLt's heuristics propose, and keep the fastest
    #[arg(long, value_name = "COUNT", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=64))]
    algorithms: u8,
    /// Use a kernel with this many tokens per tile for every problem, instead of the planner's choice
    #[arg(long, value_name = "TOKENS", value_parser = parse_tile)]
    tile: Option<TileShape>,
    /// Number of weights along K that share one pair (scale and offset): a multiple of 64, or "channel"
    #[arg(long, value_name = "K", default_value_t, conflicts_with = "sweep")]
    group: Group,
    /// Index of the GPU, 0 for the first [default: LIQUIDGEMM_DEVICE, or the first usable GPU]
    #[arg(long, value_name = "NUMBER")]
    device: Option<u32>,
    /// Measure every plan of each problem instead, without cuBLASLt, and report how much longer
    /// the planner's choices take than the fastest plans; with --from, judge the planner by an earlier sweep
    #[arg(long, conflicts_with_all = ["tile", "plots", "markdown", "baselines", "no_probes", "pace"])]
    sweep: bool,
    /// Measure the value of each idea of the kernel instead: the variants of figure 13 of the paper,
    /// by default on the feed-forward matrices of LLaMA-2-7B and -70B at M = 1, 2, 4 … 1024
    #[arg(long, conflicts_with_all = ["tile", "group", "device", "sweep", "quick", "peers", "between", "shards", "curve", "monotone", "algorithms", "baselines", "no_probes", "pace"])]
    ablation: bool,
    /// Measure the quantization of activations instead: alone, after RMSNorm, and after SiLU · mul,
    /// for rows of 4096, 8192 and 28672 elements and 1 to 8192 rows
    #[arg(long, group = "operations", conflicts_with_all = ["ablation", "tile", "group", "sweep", "problems", "algorithms", "baselines", "no_probes"])]
    activations: bool,
    /// Measure the grouped GEMM instead, on the layers of three mixtures of experts with random routing,
    /// beside recorded times of torch and Humming; --m takes some of its numbers of tokens
    #[arg(long, group = "operations", conflicts_with_all = ["tile", "sweep", "ablation", "quick", "peers", "between", "shards", "curve", "monotone", "shapes", "algorithms", "baselines", "no_probes"])]
    moe: bool,
    /// With --moe, measure every tile in clusters of one and of two thread blocks instead of the library's choice
    #[arg(long, requires = "moe")]
    every_plan: bool,
    /// With --moe or --activations, measure torch's kernels too, with this Python, which must have torch;
    /// it does so before our kernels, in a process of its own
    #[arg(long, value_name = "PYTHON", requires = "operations", conflicts_with = "from")]
    torch: Option<PathBuf>,
    /// Measure nothing; read the results of earlier runs from these files;
    /// separate several by commas or repeat the option
    #[arg(long, value_name = "JSON", value_delimiter = ',', conflicts_with_all = ["problems", "m", "tile", "json", "baselines", "no_probes", "pace"])]
    from: Vec<PathBuf>,
    /// Write the results to this JSON file; it is updated after every point
    #[arg(long, value_name = "PATH")]
    json: Option<PathBuf>,
    /// Draw plots of the results into this directory
    #[arg(long, value_name = "DIR")]
    plots: Option<PathBuf>,
    /// Write a Markdown page with the results, and with the plots if --plots is given
    #[arg(long, value_name = "PATH")]
    markdown: Option<PathBuf>,
}

/// Batch sizes from one argument.
#[derive(Clone)]
struct Tokens(Vec<usize>);

fn parse_tokens(text: &str) -> anyhow::Result<Tokens> {
    shapes::parse_tokens(text).map(Tokens)
}

/// Baselines from one argument.
#[derive(Clone)]
struct Baselines(Vec<Baseline>);

fn parse_baselines(text: &str) -> anyhow::Result<Baselines> {
    if text == "none" {
        return Ok(Baselines(Vec::new()));
    }
    let names: Vec<&str> = text.split(',').map(str::trim).collect();
    if let Some(unknown) = names.iter().find(|name| Baseline::ALL.iter().all(|known| known.name() != **name))
    {
        bail!("unknown baseline {unknown:?}; expected int8, fp8 and bf16, separated by commas, or none");
    }
    Ok(Baselines(Baseline::ALL.into_iter().filter(|baseline| names.contains(&baseline.name())).collect()))
}

/// The choice of how long to measure each kernel.
#[derive(Clone, Copy, ValueEnum)]
enum PaceChoice {
    /// Two turns, each after 20 ms of rest, with one warm-up replay and two timed replays
    Brief,
    /// Two turns, each after 60 ms of rest, with two warm-up replays and six timed replays
    Thorough,
}

fn parse_tile(text: &str) -> anyhow::Result<TileShape> {
    let shape = text.parse().ok().and_then(TileShape::with_tokens);
    let mut known = TILE_SHAPES.map(|shape| shape.tokens.to_string()).to_vec();
    known.dedup();
    shape.with_context(|| {
        format!("there is no kernel with this many tokens per tile; available: {}", known.join(", "))
    })
}

impl Arguments {
    fn cases(&self) -> Vec<Case> {
        type List = fn() -> Vec<Case>;
        let lists: [(bool, List); 7] = [
            (self.ablation, shapes::ablation_cases),
            (self.quick, shapes::quick_cases),
            (self.peers, shapes::peer_cases),
            (self.between, shapes::between_cases),
            (self.shards, shapes::shard_cases),
            (self.curve, shapes::curve_cases),
            (self.monotone, shapes::monotone_cases),
        ];
        let chosen: Vec<Vec<Case>> =
            lists.into_iter().filter(|(chosen, _)| *chosen).map(|(_, list)| list()).collect();
        let mut cases = if chosen.is_empty() { shapes::default_cases() } else { shapes::merged(chosen) };
        if !self.shapes.is_empty() {
            // A matrix that is in none of the lists gets the batch sizes of all of them.
            let all: Vec<usize> = cases.iter().flat_map(|case| case.tokens.clone()).collect();
            let of = |&matrix: &Matrix| {
                let listed = cases.iter().find(|case| case.matrix == matrix);
                shapes::custom_cases(&[matrix], listed.map_or(&all, |case| &case.tokens))
            };
            cases = shapes::merged(self.shapes.iter().map(of).collect::<Vec<_>>());
        }
        if let Some(Tokens(tokens)) = &self.m {
            let matrices: Vec<Matrix> = cases.iter().map(|case| case.matrix).collect();
            cases = shapes::custom_cases(&matrices, tokens);
        }
        cases
    }

    fn gpu(&self) -> Result<Gpu, Error> {
        self.device.map_or_else(Gpu::new, Gpu::with_device)
    }

    /// Calls `save` with the path of the JSON file, if there is to be one.
    fn keep(&self, save: impl FnOnce(&Path) -> anyhow::Result<()>) -> anyhow::Result<()> {
        self.json.as_deref().map_or(Ok(()), save)
    }

    /// The options of a run, with the defaults of the lists that were chosen.
    fn options(&self) -> Options {
        Options {
            cases: self.cases(),
            baselines: match &self.baselines {
                Some(Baselines(baselines)) => baselines.clone(),
                None if self.monotone => Vec::new(),
                None if self.curve => vec![Baseline::Fp8],
                None => Baseline::ALL.to_vec(),
            },
            baselines_are_required: self.baselines.is_some(),
            probes: !self.no_probes && !self.monotone,
            algorithms: self.algorithms.into(),
            pace: match self.pace {
                Some(PaceChoice::Brief) => Pace::BRIEF,
                Some(PaceChoice::Thorough) => Pace::THOROUGH,
                None if self.monotone => Pace::BRIEF,
                None => Pace::THOROUGH,
            },
            monotone: self.monotone,
            tile: self.tile,
            group: self.group,
        }
    }
}

pub(super) fn run(arguments: &Arguments) -> anyhow::Result<Report> {
    match () {
        () if arguments.sweep => report::<Sweeps>(arguments),
        () if arguments.ablation => report::<Ablation>(arguments),
        () if arguments.activations => report::<Activations>(arguments),
        () if arguments.moe => report::<Mixtures>(arguments),
        () => report::<Run>(arguments),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        arguments: Arguments,
    }

    fn parse(line: &str) -> Result<Arguments, clap::Error> {
        Command::try_parse_from(std::iter::once("bench").chain(line.split_whitespace()))
            .map(|command| command.arguments)
    }

    #[test]
    fn every_shape_is_combined_with_every_batch_size() {
        let cases = parse("--shapes 64x128,4096x4096 --m 1,8..32").unwrap().cases();
        assert_eq!(cases.len(), 2);
        assert_eq!(cases[1], Case { matrix: Matrix { n: 4096, k: 4096 }, tokens: vec![1, 8, 16, 32] });
        assert_eq!(parse("--shapes 64x128").unwrap().cases()[0].tokens.len(), 14);
        assert_eq!(parse("--peers --m 64").unwrap().cases().len(), 10);
        assert_eq!(parse("--ablation --m 1,16").unwrap().cases()[3].tokens, [1, 16]);
        assert_eq!(parse("--ablation --shapes 64x128").unwrap().cases()[0].tokens.len(), 11);
    }

    #[test]
    fn invalid_and_conflicting_arguments_are_refused() {
        for wrong in [
            "--quick --peers",
            "--shapes 1",
            "--tile 7",
            "--m 0",
            "--sweep --tile 8",
            "--from a --quick",
            "--ablation --sweep",
            "--ablation --quick",
            "--ablation --between",
            "--quick --between",
            "--quick --shapes 64x64",
            "--monotone --peers",
            "--monotone --baselines fp8",
            "--monotone --sweep",
            "--baselines fp16",
            "--baselines fp8,none",
            "--baselines ,",
            "--pace slow",
            "--sweep --pace brief",
            "--from a --no-probes",
            "--torch python3",
            "--sweep --torch python3",
            "--moe --torch python3 --from a",
        ] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
        for right in ["--moe --torch python3 --plots a", "--activations --torch python3 --plots a"] {
            assert!(parse(right).is_ok(), "{right}");
        }
        assert_eq!(parse("--tile 64").unwrap().options().tile.unwrap().tokens, 64);
    }

    #[test]
    fn lists_of_problems_can_be_combined_and_restricted() {
        let points =
            |line| -> usize { parse(line).unwrap().cases().iter().map(|case| case.tokens.len()).sum() };
        assert_eq!(points("--between"), 260);
        assert_eq!(points("--shards"), 8 * 21);
        assert_eq!(points("--between --peers"), 260 + 121);
        assert_eq!(points("--between --shapes 4096x4096,64x128"), 2 * 26);
        assert_eq!(points("--between --shards --m 17"), 18);
        assert_eq!(points("--peers --shapes 4096x4096"), 12);
        assert_eq!(points("--monotone --shapes 4096x4096"), 76);
        assert_eq!(points("--curve"), 4 * 65);
        assert_eq!(points("--shapes 64x128"), 14);
    }

    #[test]
    fn baselines_probes_and_pace_can_be_chosen() {
        let options = |line| parse(line).unwrap().options();
        assert_eq!(options("--between").baselines, Baseline::ALL);
        assert_eq!(options("--between --baselines bf16,int8").baselines, [Baseline::Int8, Baseline::Bf16]);
        assert_eq!(options("--curve").baselines, [Baseline::Fp8]);
        assert_eq!(options("--curve --baselines none").baselines, []);
        assert!(options("--peers").probes && !options("--peers --no-probes").probes);
        assert_eq!(options("--peers").pace, Pace::THOROUGH);
        assert_eq!(options("--peers --pace brief").pace, Pace::BRIEF);
        let monotone = options("--monotone");
        assert!(monotone.monotone && !monotone.probes && monotone.baselines.is_empty());
        assert_eq!(monotone.pace, Pace::BRIEF);
    }
}
