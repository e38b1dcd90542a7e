//! The report as text for a terminal.

use std::fmt::Write;

use crate::measurements::Source;
use crate::report::{Point, Report};

/// Returns the report as text.
pub fn text(report: &Report) -> String {
    let mut text = String::new();
    write_all(report, &mut text).expect("a String takes all");
    text
}

/// Formats a number with three significant digits, without an exponent.
pub fn digits(value: f64) -> String {
    let decimals = match value.abs() {
        0.0 => 0,
        ..0.1 => 4,
        ..1.0 => 3,
        ..10.0 => 2,
        ..100.0 => 1,
        _ => 0,
    };
    format!("{value:.decimals$}")
}

/// Formats a fraction as a percentage.
pub fn percent(fraction: f64) -> String {
    format!("{} %", digits(100.0 * fraction))
}

/// The point whose layers are shown: the middle of the list.
pub fn shown_point(report: &Report) -> usize {
    (report.settings.batches.len() - 1) / 2
}

/// The mark behind a time: measured times have none.
pub const fn mark(source: Source) -> &'static str {
    match source {
        Source::Measured => "",
        Source::Interpolated => "~",
        Source::Predicted => "*",
    }
}

/// Describes the model, the GPUs and the settings in two lines.
pub fn heading(report: &Report) -> [String; 2] {
    let model = &report.model;
    let settings = &report.settings;
    let giga = |count: f64| digits(count / 1e9);
    let active = if model.active_parameters < model.parameters {
        format!(", {} of them active", giga(model.active_parameters))
    } else {
        String::new()
    };
    let price = settings.price.map(|price| format!("; {price} a GPU-hour")).unwrap_or_default();
    [
        format!(
            "{} ({}): {} billion parameters{active}, {} quantized; {} blocks",
            model.name,
            model.model_type,
            giga(model.parameters),
            giga(model.quantized_parameters),
            model.blocks
        ),
        format!(
            "{} × {}; prompts of {} tokens, answers of {}; KV cache of {} bits; {} of memory used{price}",
            settings.gpus,
            report.gpu.name,
            settings.input,
            settings.output,
            settings.cache_bits,
            percent(settings.memory_fraction)
        ),
    ]
}

/// Says for each other format what W4A8 gains against it.
pub fn break_even(report: &Report) -> Vec<String> {
    let one = |one: &crate::report::BreakEven| {
        let batch = match one.overtaken_at_batch {
            Some(batch) => format!("at batch {batch} it has at least as many tokens/s"),
            None => "at no listed batch that fits it, it has as many tokens/s".to_owned(),
        };
        let best = match (one.best_ratio, one.break_even_price) {
            (Some(ratio), Some(price)) => format!(
                "best against best W4A8 has {} × as many, and pays up to a price of {} a GPU-hour",
                digits(ratio),
                digits(price)
            ),
            (Some(ratio), None) => format!(
                "best against best W4A8 has {} × as many, and pays where its GPU-hour costs less than {} × as much",
                digits(ratio),
                digits(ratio)
            ),
            (None, _) => "one of the two does not fit".to_owned(),
        };
        format!("{}: {batch}; {best}", one.scheme.name())
    };
    report.break_even.iter().map(one).collect()
}

/// Says how well the formulas predict each kind of record.
pub fn accuracy(report: &Report) -> Vec<String> {
    let one = |one: &crate::report::Accuracy| {
        format!(
            "{}{}: median {}, nine tenths below {}, {} points",
            one.scheme.name(),
            if one.is_grouped { ", experts" } else { "" },
            percent(one.median_error),
            percent(one.error_of_nine_tenths),
            one.points
        )
    };
    report.accuracy.iter().map(one).collect()
}

fn write_all(report: &Report, text: &mut String) -> std::fmt::Result {
    for line in heading(report) {
        writeln!(text, "{line}")?;
    }
    writeln!(
        text,
        "\n{:<7} {:>10} {:>15} {:>13} {:>9} {:>14} {:>12}",
        "", "weights GB", "KV MB/sequence", "largest batch", "from GPUs", "tokens/s there", "step there"
    )?;
    for scheme in &report.schemes {
        let [speed, step] = match &scheme.best {
            Some(best) => [digits(best.tokens_per_second), format!("{} ms", digits(best.step.us / 1e3))],
            None => ["-".to_owned(), "-".to_owned()],
        };
        writeln!(
            text,
            "{:<7} {:>10} {:>15} {:>13} {:>9} {speed:>14} {step:>12}",
            scheme.scheme.name(),
            digits(scheme.weights_gb),
            digits(scheme.cache_gb_per_sequence * 1e3),
            scheme.largest_batch,
            scheme.least_gpus.map_or("-".to_owned(), |gpus| gpus.to_string()),
        )?;
    }
    let cost = |point: &Point| digits(point.cost_per_million.unwrap_or(point.gpu_hours_per_million));
    let cost_title = match report.settings.price {
        Some(_) => "Cost of a million answer tokens",
        None => "GPU-hours for a million answer tokens",
    };
    by_batch(report, text, "Answer tokens per second, prefill included", |point| {
        digits(point.tokens_per_second)
    })?;
    by_batch(report, text, "Decoding step, ms", |point| digits(point.step.us / 1e3))?;
    by_batch(report, text, cost_title, cost)?;
    layers(report, text)?;
    writeln!(text, "\nW4A8 against")?;
    break_even(report).iter().try_for_each(|line| writeln!(text, "  {line}"))?;
    writeln!(text, "\nError of the formulas on the records ({})", report.measurements.join(", "))?;
    accuracy(report).iter().try_for_each(|line| writeln!(text, "  {line}"))?;
    writeln!(text, "\nFormulas and assumptions")?;
    report.assumptions.iter().try_for_each(|line| writeln!(text, "  {line}"))
}

fn by_batch(
    report: &Report,
    text: &mut String,
    title: &str,
    cell: impl Fn(&Point) -> String,
) -> std::fmt::Result {
    write!(text, "\n{title} (- does not fit)\n{:>7}", "batch")?;
    report.schemes.iter().try_for_each(|scheme| write!(text, " {:>9}", scheme.scheme.name()))?;
    text.push('\n');
    for (place, batch) in report.settings.batches.iter().enumerate() {
        write!(text, "{batch:>7}")?;
        for scheme in &report.schemes {
            let point = &scheme.points[place];
            write!(text, " {:>9}", if point.fits { cell(point) } else { "-".to_owned() })?;
        }
        text.push('\n');
    }
    Ok(())
}

fn layers(report: &Report, text: &mut String) -> std::fmt::Result {
    let place = shown_point(report);
    writeln!(
        text,
        "\nLayers at batch {}, µs of one launch (~ interpolated between measurements, * predicted, else measured, \
         with the formula's error)",
        report.settings.batches[place]
    )?;
    write!(text, "{:<17} {:>6} {:>13}", "", "blocks", "n x k")?;
    report.schemes.iter().try_for_each(|scheme| write!(text, " {:>16}", scheme.scheme.name()))?;
    text.push('\n');
    let Some(first) = report.schemes.first() else { return Ok(()) };
    for (row, time) in first.points[place].step.layers.iter().enumerate() {
        let layer = &time.layer;
        write!(text, "{:<17} {:>6} {:>13}", layer.name, time.blocks, format!("{}x{}", layer.n, layer.k))?;
        for scheme in &report.schemes {
            let time = &scheme.points[place].step.layers[row];
            let error = time.error.map(|error| format!(" ({:+.0} %)", 100.0 * error)).unwrap_or_default();
            write!(text, " {:>16}", format!("{}{}{error}", digits(time.us), mark(time.source)))?;
        }
        text.push('\n');
    }
    let blocks = report.model.blocks as f64;
    for (name, part) in [
        ("attention", (|point, blocks| point.step.attention_us / blocks) as fn(&Point, f64) -> f64),
        ("operations", |point, blocks| point.step.operations_us / blocks),
        ("all-reduces", |point, blocks| point.step.all_reduces_us / blocks),
        ("a block, in all", |point, _| point.step.block_us),
    ] {
        write!(text, "{name:<17} {:>6} {:>13}", report.model.blocks, "")?;
        for scheme in &report.schemes {
            write!(text, " {:>16}", digits(part(&scheme.points[place], blocks)))?;
        }
        text.push('\n');
    }
    Ok(())
}
