//! The report as one self-contained HTML page, from the template `page.html`.
//! It loads nothing: styles and pictures are in the file, and there is no script.

use minijinja::value::Serde;
use minijinja::{AutoEscape, Environment};
use serde::Serialize;

use crate::chart::{Chart, Series, chart};
use crate::report::{Point, Report};
use crate::table::{self, digits, mark};

/// What the template shows.
#[derive(Serialize)]
struct Page<'a> {
    name: &'a str,
    heading: [String; 2],
    names: Vec<&'a str>,
    charts: [Chart; 3],
    tables: [Table; 3],
    break_even: Vec<String>,
    accuracy: Vec<String>,
    measurements: &'a [String],
    assumptions: &'a [String],
}

/// A table of the page: a heading and rows of cells, all text.
#[derive(Serialize)]
struct Table {
    title: String,
    head: Vec<String>,
    rows: Vec<Vec<String>>,
}

/// Returns the page.
///
/// # Errors
/// If the template fails, which a test excludes.
pub fn html(report: &Report) -> anyhow::Result<String> {
    let mut environment = Environment::new();
    environment.set_auto_escape_callback(|_| AutoEscape::Html);
    environment.add_template("page", include_str!("page.html"))?;
    let names: Vec<&str> = report.schemes.iter().map(|scheme| scheme.scheme.name()).collect();
    let series = |only_fitting: bool, value: fn(&Point) -> f64| -> Vec<Series> {
        report
            .schemes
            .iter()
            .map(|scheme| {
                let mut points: Vec<&Point> =
                    scheme.points.iter().filter(|point| point.fits || !only_fitting).collect();
                points.extend(&scheme.best);
                points.sort_by_key(|point| point.batch);
                points.dedup_by_key(|point| point.batch);
                (
                    scheme.scheme.name().to_owned(),
                    points.iter().map(|point| (point.batch as f64, value(point))).collect(),
                )
            })
            .collect()
    };
    let (cost_title, cost): (_, fn(&Point) -> f64) = match report.settings.price {
        Some(price) if price > 0.0 => {
            ("Cost of a million answer tokens", |point| point.cost_per_million.unwrap_or_default())
        }
        _ => ("GPU-hours for a million answer tokens", |point| point.gpu_hours_per_million),
    };
    let usable = report.gpu.memory_gb * report.settings.memory_fraction;
    let charts = [
        chart(
            "Tokens per second",
            "Answer tokens of all sequences, prefill included, up to the largest batch that fits.",
            &series(true, |point| point.tokens_per_second),
            None,
            digits,
        ),
        chart(
            "Memory",
            "GB on each GPU: weights, KV cache and activations.",
            &series(true, |point| point.memory_gb),
            Some((usable, "usable")),
            digits,
        ),
        chart(cost_title, "Up to the largest batch that fits.", &series(true, cost), None, digits),
    ];
    let page = Page {
        name: &report.model.name,
        heading: table::heading(report),
        charts,
        tables: [summary(report), steps(report), layers(report, &names)],
        break_even: table::break_even(report),
        accuracy: table::accuracy(report),
        measurements: &report.measurements,
        assumptions: &report.assumptions,
        names,
    };
    Ok(environment.get_template("page")?.render(Serde(&page))?)
}

fn summary(report: &Report) -> Table {
    let head =
        ["", "weights GB", "KV MB a sequence", "largest batch", "from GPUs", "tokens/s there", "kernel"];
    let rows = report.schemes.iter().map(|scheme| {
        vec![
            scheme.scheme.name().to_owned(),
            digits(scheme.weights_gb),
            digits(scheme.cache_gb_per_sequence * 1e3),
            scheme.largest_batch.to_string(),
            scheme.least_gpus.map_or("–".to_owned(), |gpus| gpus.to_string()),
            scheme.best.as_ref().map_or("–".to_owned(), |best| digits(best.tokens_per_second)),
            scheme.kernel.to_owned(),
        ]
    });
    Table { title: "What fits".to_owned(), head: head.map(str::to_owned).to_vec(), rows: rows.collect() }
}

fn steps(report: &Report) -> Table {
    let head = report.schemes.iter().map(|scheme| scheme.scheme.name().to_owned());
    let rows = report.settings.batches.iter().enumerate().map(|(place, batch)| {
        let cells = report
            .schemes
            .iter()
            .map(|scheme| &scheme.points[place])
            .map(|point| if point.fits { digits(point.step.us / 1e3) } else { "–".to_owned() });
        std::iter::once(batch.to_string()).chain(cells).collect()
    });
    Table {
        title: "Decoding step, ms (– does not fit)".to_owned(),
        head: std::iter::once("batch".to_owned()).chain(head).collect(),
        rows: rows.collect(),
    }
}

fn layers(report: &Report, names: &[&str]) -> Table {
    let place = table::shown_point(report);
    let times: Vec<_> = report.schemes.iter().map(|scheme| &scheme.points[place].step.layers).collect();
    let rows = (0..times.first().map_or(0, |first| first.len())).map(|row| {
        let first = &times[0][row];
        let facts = [first.layer.name.to_owned(), format!("{}×{}", first.layer.n, first.layer.k)];
        let cells = times.iter().map(|times| {
            let time = &times[row];
            let error = time.error.map(|error| format!(" ({:+.0} %)", 100.0 * error)).unwrap_or_default();
            format!("{}{}{error}", digits(time.us), mark(time.source))
        });
        facts.into_iter().chain(cells).collect()
    });
    Table {
        title: format!(
            "Layers at batch {}, µs of one launch (~ interpolated between measurements, * predicted, else measured with the formula's error)",
            report.settings.batches[place]
        ),
        head: ["", "n×k"].iter().chain(names).map(|&cell| cell.to_owned()).collect(),
        rows: rows.collect(),
    }
}
