//! `liquidgemm demo`: quantizes, packs and multiplies a layer, and reports time, memory, error and exactness.
//! The operands come from `layer`, the time from `timing`, and the comparison with an oracle from `check`.

use std::fmt::Write;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use half::{bf16, f16};
use liquidgemm::{Backend, Group, Output, OutputType, PackedWeights, Plan, Problem, QuantizedActivations};
use serde_json::{Value, json};

use super::check::{self, Accuracy, Exactness};
use super::layer::{self, Layer};
use super::models::{EXIT_CODES, json_report};
use super::progress::Progress;
use super::timing::{self, Timing};
use super::units::{bytes, digits, duration};
use super::{Place, Report};

/// Multiply a real or a generated layer, and show time, memory, error and exactness
///
/// Without --m, --n and --k, the weights are a feed-forward matrix of all-MiniLM-L6-v2 (1536×384),
/// and the activations are the inputs of this matrix for five sentences (106 tokens).
/// With any of the three options, a problem of that size is generated.
/// The exit code is 1 if any compared output differs in any bit from the oracle's.
#[derive(clap::Args)]
#[command(after_help = EXIT_CODES)]
pub(super) struct Arguments {
    /// Generate a problem with this many tokens [default if --n or --k is given: 16]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..), value_name = "TOKENS")]
    m: Option<u32>,

    /// Generate a problem with this many output channels [default if --m or --k is given: 4096]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..), value_name = "CHANNELS")]
    n: Option<u32>,

    /// Generate a problem with this many elements per channel, at most 131072
    /// [default if --m or --n is given: 4096]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=131_072), value_name = "ELEMENTS")]
    k: Option<u32>,

    /// Number of weights along K that share one pair (scale and offset): a multiple of 64, or "channel"
    #[arg(long, default_value_t)]
    group: Group,

    /// Seed of the generated numbers
    #[arg(long, default_value_t = 0)]
    seed: u64,

    #[command(flatten)]
    place: Place,

    /// Type of the outputs; i32 is the raw accumulator, without scales and bias
    #[arg(long, value_enum, default_value = "bf16")]
    output: OutputChoice,

    /// Write the result as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum OutputChoice {
    Bf16,
    F16,
    F32,
    I32,
}

pub(super) fn run(arguments: &Arguments) -> anyhow::Result<Report> {
    match arguments.output {
        OutputChoice::Bf16 => run_as::<bf16>(arguments, |y, _| y.to_f32()),
        OutputChoice::F16 => run_as::<f16>(arguments, |y, _| y.to_f32()),
        OutputChoice::F32 => run_as::<f32>(arguments, |y, _| y),
        OutputChoice::I32 => {
            run_as::<i32>(arguments, |acc, scales| f32::from_accumulator(acc, scales[0], scales[1], None))
        }
    }
}

/// The figures of the report.
struct Figures {
    problem: Layer,
    backend: Backend,
    group: Group,
    output: OutputType,
    with_bias: bool,
    quantize: Duration,
    /// The plan of the GPU. `None` on the CPU.
    plan: Option<Plan>,
    multiply: Timing,
    accuracy: Accuracy,
    exactness: Exactness,
    packed_bytes: usize,
}

/// Runs the demo with outputs of type `T`.
/// `value` converts an output to the number that it stands for, given its channel's and its token's scale.
fn run_as<T: Output>(arguments: &Arguments, value: fn(T, [f32; 2]) -> f32) -> anyhow::Result<Report> {
    let backend = arguments.place.open()?;
    let problem = problem(arguments)?;
    let Layer { m, n, k, .. } = problem;

    let start = Instant::now();
    let weights = {
        let _progress = Progress::spinner("quantizing");
        PackedWeights::quantize(&problem.weights, n, k, arguments.group)?
    };
    let quantize = start.elapsed();
    let activations = QuantizedActivations::quantize(&problem.activations, m, k)?;

    let with_bias = T::TYPE != OutputType::I32;
    let bias = with_bias.then_some(&problem.bias[..]);
    let result = backend.multiply::<T>(&weights, &activations, bias)?;
    let multiply = timing::time::<T>(&backend, &weights, &activations, bias)?;

    let plan = backend.as_gpu().map(|gpu| gpu.plan(Problem { m, n, k })).transpose()?;
    let exactness = check::exactness(&backend, &result, &weights, &activations, bias)?;
    let accuracy = check::accuracy(&problem, with_bias, |token, channel| {
        value(result[token * n + channel], [weights.channel_scales()[channel], activations.scales()[token]])
    });
    let figures = Figures {
        problem,
        backend,
        group: arguments.group,
        output: T::TYPE,
        with_bias,
        quantize,
        plan,
        multiply,
        accuracy,
        exactness,
        packed_bytes: weights.bytes(),
    };
    let success = figures.exactness.different == 0;
    if arguments.json {
        return Ok(json_report(&figures.json(), success));
    }
    Ok(Report { success, text: figures.render() })
}

fn problem(arguments: &Arguments) -> anyhow::Result<Layer> {
    let Arguments { m, n, k, seed, .. } = *arguments;
    if m.is_none() && n.is_none() && k.is_none() {
        return Layer::minilm();
    }
    let [m, n, k] = [(m, 16), (n, 4096), (k, 4096)].map(|(given, default)| given.unwrap_or(default) as usize);
    layer::check_memory(m, n, k)?;
    Ok(Layer::generate(m, n, k, seed))
}

impl Figures {
    fn json(&self) -> Value {
        let Layer { m, n, k, ref description, .. } = self.problem;
        json!({
            "m": m, "n": n, "k": k, "problem": description, "with_bias": self.with_bias, "output": self.output.to_string(),
            "backend": self.backend.to_string(), "because": self.backend.reason(), "group": self.group.to_string(),
            "quantize_seconds": self.quantize.as_secs_f64(), "plan": self.plan.map(|plan| plan.to_string()),
            "multiply_seconds": self.multiply.median.as_secs_f64(), "median_of": self.multiply.runs,
            "packed_bytes": self.packed_bytes, "f16_bytes": n * k * size_of::<f16>(),
            "relative_error": self.accuracy.relative_frobenius, "signal_to_noise_db": self.accuracy.decibels(),
            "largest_error": self.accuracy.largest, "tokens_compared": self.accuracy.tokens,
            "oracle": self.exactness.oracle, "outputs_compared": self.exactness.compared,
            "outputs_different": self.exactness.different,
        })
    }

    fn render(&self) -> String {
        let Layer { m, n, k, ref description, .. } = self.problem;
        let bias = if self.with_bias { " + bias" } else { "" };
        let mut text =
            format!("Y[{m}, {n}] = X[{m}, {k}] · W[{n}, {k}]ᵀ{bias}, W4A8, {} output\n\n", self.output);
        let mut line =
            |what: &str, value: String| writeln!(text, "  {what:<9} {value}").expect("a String takes all");

        line("problem", description.clone());
        line("backend", self.backend.to_string());
        line("because", self.backend.reason().into());
        let group = match self.group {
            Group::K(group) => format!("groups of {group}"),
            Group::Channel => "one group per channel".into(),
        };
        line("quantize", format!("{} for the weights, {group}", duration(self.quantize)));

        if let Some(plan) = self.plan {
            line("plan", plan.to_string());
        }
        let operations = 2.0 * m as f64 * n as f64 * k as f64;
        let tera = operations / self.multiply.median.as_secs_f64() / 1e12;
        let median = duration(self.multiply.median);
        line("multiply", format!("{median}, median of {} ({} TOPS)", self.multiply.runs, digits(tera)));

        let f16_bytes = n * k * size_of::<f16>();
        let ratio = f16_bytes as f64 / self.packed_bytes as f64;
        let [packed, plain] = [self.packed_bytes, f16_bytes].map(|size| bytes(size as f64));
        let comparison = if ratio >= 1.0 {
            format!("{} × less", digits(ratio))
        } else {
            "more, because n and k are padded to multiples of 64".into()
        };
        line("memory", format!("{packed} of weights, against {plain} in f16 ({comparison})"));

        let Accuracy { relative_frobenius, largest, tokens } = self.accuracy;
        let some = if tokens < m { format!(", over {tokens} of {m} tokens") } else { String::new() };
        line(
            "error",
            format!(
                "{} % of the f32 product (relative Frobenius; SNR {:.1} dB), at most {} absolute{some}",
                digits(relative_frobenius * 100.0),
                self.accuracy.decibels(),
                digits(largest),
            ),
        );

        let Exactness { oracle, compared, different } = self.exactness;
        let total = m * n;
        let which = if compared < total {
            format!("{compared} of {total}")
        } else if total == 1 {
            "the one".into()
        } else {
            format!("all {total}")
        };
        let verdict = if different == 0 {
            let outputs = if total == 1 {
                "output compared is bit for bit that"
            } else {
                "outputs compared are bit for bit those"
            };
            format!("yes: {which} {outputs} of {oracle}")
        } else {
            format!("NO: {different} of {compared} outputs compared differ from those of {oracle}")
        };
        line("exact", verdict);
        text
    }
}
