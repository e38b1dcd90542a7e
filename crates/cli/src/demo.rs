//! `liquidgemm demo`: quantize, pack, multiply, and show what that costs and what it is worth.

use std::fmt::Write;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use half::{bf16, f16};
use liquidgemm::{Backend, Group, Output, OutputType, PackedWeights, Plan, QuantizedActivations};

use super::check::{self, Accuracy, Exactness};
use super::problem::{self, Problem};
use super::progress::Progress;
use super::timing::{self, Timing};
use super::{Place, Report};

/// Multiply a real layer (or a generated one), and show time, error, memory and exactness
///
/// Without --m, --n and --k the weights are one feed-forward matrix of all-MiniLM-L6-v2 (1536×384), and the
/// activations are what enters it while the model reads five sentences. With any of the three, a problem of
/// that size is generated. The exit code is 1 if one output differs from the oracle in one bit.
#[derive(clap::Args)]
pub(super) struct Arguments {
    /// Generate a problem with this many tokens [default then: 16]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..), value_name = "TOKENS")]
    m: Option<u32>,

    /// Generate a problem with this many output channels [default then: 4096]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..), value_name = "CHANNELS")]
    n: Option<u32>,

    /// Generate a problem with this many elements in a channel, at most 131072 [default then: 4096]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=131_072), value_name = "ELEMENTS")]
    k: Option<u32>,

    /// How many weights of a channel share one 4-bit scale: a multiple of 64, or "channel"
    #[arg(long, default_value_t)]
    group: Group,

    /// What the generated numbers start from
    #[arg(long, default_value_t = 0)]
    seed: u64,

    #[command(flatten)]
    place: Place,

    /// Type of the outputs; i32 is the raw accumulator, without scales and bias
    #[arg(long, value_enum, default_value = "bf16")]
    output: OutputChoice,
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

/// Everything that the report shows.
struct Figures {
    problem: Problem,
    backend: Backend,
    group: Group,
    output: OutputType,
    with_bias: bool,
    quantize: Duration,
    /// How the GPU cuts the problem.
    plan: Option<Plan>,
    multiply: Timing,
    accuracy: Accuracy,
    exactness: Exactness,
    packed_bytes: usize,
}

/// Runs the demo with outputs of type `T`; `value` turns one of them, with its channel's and its token's scale,
/// into the number that it stands for.
fn run_as<T: Output>(arguments: &Arguments, value: fn(T, [f32; 2]) -> f32) -> anyhow::Result<Report> {
    let backend = arguments.place.open()?;
    let problem = problem(arguments)?;
    let Problem { m, n, k, .. } = problem;

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

    let plan = backend.as_gpu().map(|gpu| gpu.plan(m, n, k)).transpose()?;
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
    Ok(Report { success: figures.exactness.different == 0, text: figures.render() })
}

fn problem(arguments: &Arguments) -> anyhow::Result<Problem> {
    let Arguments { m, n, k, seed, .. } = *arguments;
    if m.is_none() && n.is_none() && k.is_none() {
        return Problem::minilm();
    }
    let [m, n, k] = [(m, 16), (n, 4096), (k, 4096)].map(|(given, default)| given.unwrap_or(default) as usize);
    problem::check_memory(m, n, k)?;
    Ok(Problem::generate(m, n, k, seed))
}

impl Figures {
    fn render(&self) -> String {
        let Problem { m, n, k, ref description, .. } = self.problem;
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
            Group::Channel => "one group a channel".into(),
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

/// A number with three significant digits.
fn digits(value: f64) -> String {
    if value == 0.0 || !value.is_finite() {
        return value.to_string();
    }
    let scientific = format!("{value:.2e}");
    let (_, exponent) = scientific.split_once('e').expect("the format has an exponent");
    match 2 - exponent.parse::<i32>().expect("an exponent is a number") {
        decimals @ 0..=8 => format!("{value:.*}", decimals as usize),
        ..0 => format!("{value:.0}"),
        _ => scientific,
    }
}

fn duration(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    match seconds {
        1.0.. => format!("{} s", digits(seconds)),
        1e-3.. => format!("{} ms", digits(seconds * 1e3)),
        _ => format!("{} µs", digits(seconds * 1e6)),
    }
}

/// A size in memory, in binary units.
pub(super) fn bytes(size: f64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut size = size;
    let mut unit = 0;
    while size >= 1024.0 && unit + 1 < units.len() {
        size /= 1024.0;
        unit += 1;
    }
    format!("{} {}", digits(size), units[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_keep_three_digits_whatever_their_size() {
        let shown = [0.0, 0.012345, 0.99951, 1.0, 9.996, 12.345, 999.4, 123_456.0, 1.5e-12].map(digits);
        assert_eq!(shown, ["0", "0.0123", "1.00", "1.00", "10.0", "12.3", "999", "123456", "1.50e-12"]);
    }

    #[test]
    fn times_and_sizes_take_the_unit_that_fits() {
        assert_eq!(duration(Duration::from_nanos(1_500)), "1.50 µs");
        assert_eq!(duration(Duration::from_micros(1_500)), "1.50 ms");
        assert_eq!(duration(Duration::from_millis(61_500)), "61.5 s");
        assert_eq!(bytes(1023.0), "1023 B");
        assert_eq!(bytes(1024.0 * 1024.0), "1.00 MiB");
        assert_eq!(bytes(2.5 * 1024.0_f64.powi(5)), "2560 TiB");
    }
}
