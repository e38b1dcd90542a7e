//! Writes a run over the quantization of activations as a Markdown page: circumstances, pictures and points.

use std::fmt::Write;
use std::path::Path;

use anyhow::Context;

use super::{Activations, Measured, Point};
use crate::markdown::{facts, show};
use crate::plots::Picture;
use crate::record::write_file;
use crate::table::or_dash;
use crate::torch::Footnotes;

/// The least score that needs no reason.
const GOOD_SCORE: f64 = 0.85;
/// Number of rows from which on the bytes are the limit, not the launch.
const MANY_ROWS: usize = 2048;

/// The explanation of the page.
const METHOD: &str = "
bf16 in, int8 out, one scale a row. GB/s counts each byte that is read or written once. `stream` is a probe that only reads as
many bytes in the same run, and the score is its time divided by ours. Launches are replayed from a CUDA graph; inputs and
outputs rotate through more than 200 MB; times are medians. Below a few hundred rows the launch is most of the time.
";

/// The explanation of torch's columns.
const TORCH: &str = "
torch is what `torch.compile` makes of the operation with quantization, with its default options and the same method of timing, in this run but in a process
of its own before ours; × is its time divided by ours. It was measured at some numbers of rows: up to 64 rows compiled for exactly this size, from there on
for any number of rows.
";

/// Writes the run to `path`, with links to the pictures.
///
/// # Errors
/// If the file can't be written.
pub fn write(run: &Activations, pictures: &[Picture], path: &Path) -> anyhow::Result<()> {
    let base = path.parent().context("a page needs a file name")?;
    write_file(path, page(run, pictures, base).context("a String takes all")?.as_bytes())
}

fn page(run: &Activations, pictures: &[Picture], base: &Path) -> Result<String, std::fmt::Error> {
    let mut text = String::new();
    writeln!(text, "# Quantization of activations, on {}\n", run.circumstances.device_name())?;
    writeln!(text, "Written by `liquidgemm bench --activations`; don't edit.\n")?;
    let exact = match run.mismatches() {
        0 => format!("rows of all {} results equal the CPU backend's bits", run.points.len()),
        wrong => format!("**{wrong} of {} results are wrong**", run.points.len()),
    };
    let torch =
        run.torch.as_ref().map(|torch| format!("torch {}, CUDA {}, in this run", torch.version, torch.cuda));
    let mut more = vec![("checked", exact.as_str())];
    more.extend(torch.as_ref().map(|torch| ("compared with", torch.as_str())));
    facts(&run.circumstances, &more, run.complete, &mut text)?;
    text.push_str(METHOD);
    if run.torch.is_some() {
        text.push_str(TORCH);
    }
    show(pictures, base, &mut text)?;
    limits(run, &mut text)?;
    let mut notes = Footnotes::default();
    for measured in Measured::ALL {
        writeln!(text, "\n## {measured}\n")?;
        text.push_str("| rows | k | µs | GB/s | stream µs | score |");
        text.push_str(if run.torch.is_some() { " torch µs | × torch |\n" } else { "\n" });
        text.push_str("|---|---|---|---|---|---|");
        text.push_str(if run.torch.is_some() { "---|---|\n" } else { "\n" });
        for point in run.points.iter().filter(|point| point.measured == measured) {
            let Point { m, k, ours, stream, .. } = point;
            let (speed, score) = (point.gigabytes_per_second(), point.score());
            write!(text, "| {m} | {k} | {:.2} | {speed:.0} | {:.2} | {score:.2} |", ours.us, stream.us)?;
            if run.torch.is_some() {
                let error = point.torch.as_ref().and_then(|torch| torch.error.as_deref());
                let mark = error.map(|error| notes.mark(error)).unwrap_or_default();
                let ratio = point.torch_us().map(|us| us / ours.us);
                write!(text, " {}{mark} | {} |", or_dash(point.torch_us(), 2), or_dash(ratio, 2))?;
            }
            text.push('\n');
        }
    }
    text.push_str(&notes.text());
    Ok(text)
}

/// Counts the points with low scores, and says where the reasons are. Reasons come from profiles, not from this run.
fn limits(run: &Activations, text: &mut String) -> std::fmt::Result {
    writeln!(text, "\n## What limits the operations\n")?;
    writeln!(
        text,
        "Scores below {GOOD_SCORE}; the reasons are in the [performance log](../performance-log.md#quantization-of-activations).\n"
    )?;
    writeln!(text, "| operation | fewer than {MANY_ROWS} rows | {MANY_ROWS} rows and more |\n|---|---|---|")?;
    for measured in Measured::ALL {
        write!(text, "| {measured} |")?;
        for many in [false, true] {
            let chosen = |point: &&Point| point.measured == measured && (point.m >= MANY_ROWS) == many;
            let points: Vec<&Point> = run.points.iter().filter(chosen).collect();
            let low: Vec<f64> =
                points.iter().map(|point| point.score()).filter(|&score| score < GOOD_SCORE).collect();
            let least = low.iter().copied().reduce(f64::min);
            let least = least.map_or(String::new(), |least| format!(", the least {least:.3}"));
            write!(text, " {} of {}{least} |", low.len(), points.len())?;
        }
        text.push('\n');
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::activations::tests::point;
    use crate::markdown::tests::assert_tables_are_whole;
    use crate::torch::tests::results;

    fn page_of(run: &Activations) -> String {
        let picture = Picture { path: "docs/a.svg".into(), title: "A".into() };
        let text = page(run, &[picture], Path::new("docs")).unwrap();
        assert_tables_are_whole(&text);
        text
    }

    #[test]
    fn page_has_every_point_and_counts_low_scores() {
        let points = vec![
            point(Measured::Plain, 1, 10.0),
            point(Measured::Plain, 2048, 10.0),
            point(Measured::SiluMul, 8192, 4.0),
        ];
        let text = page_of(&Activations { points, complete: true, ..Activations::default() });
        for part in [
            "![A](a.svg)",
            "| 2048 | 4096 | 10.00 | 2517 | 5.00 | 0.50 |\n",
            "| quantize | 1 of 1, the least 0.500 | 1 of 1, the least 0.500 |\n",
            "| SiLU · mul | 0 of 0 | 0 of 1 |\n",
            "(../performance-log.md#quantization-of-activations)",
        ] {
            assert!(text.contains(part), "{part:?} is missing in\n{text}");
        }
        assert!(!text.contains("torch"), "{text}");
    }

    #[test]
    fn page_with_torch_has_its_times_and_the_reasons_for_missing_ones() {
        let torch = results(&[Ok(30.0), Err("AssertionError: shapes")]);
        let mut points = vec![point(Measured::Plain, 1, 10.0); 3];
        points.iter_mut().zip(&torch.outcomes).for_each(|(point, torch)| point.torch = Some(torch.clone()));
        let text = page_of(&Activations { points, torch: Some(torch.torch), ..Activations::default() });
        for part in [
            "| compared with | torch 2.11.0, CUDA 13.0, in this run |",
            "| 0.50 | 30.00 | 3.00 |\n",
            "| 0.50 | -[^1] | - |\n",
            "| 0.50 | - | - |\n",
            "\n[^1]: torch: AssertionError: shapes\n",
        ] {
            assert!(text.contains(part), "{part:?} is missing in\n{text}");
        }
    }
}
