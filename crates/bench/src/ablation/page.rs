//! Writes the ablation as a Markdown page: circumstances, variants, means, pictures and points.
//! Tables and links use the helpers of [`markdown`](crate::markdown).

use std::fmt::Write;
use std::path::Path;

use anyhow::Context;

use super::{Ablation, Point};
use crate::ablation::Variant;
use crate::markdown::{facts, show};
use crate::plots::{self, Picture};
use crate::record::write_file;
use crate::statistics::geometric_mean;

/// Writes the page to `path`, with links to the pictures.
///
/// # Errors
/// If the file can't be written.
pub fn write(run: &Ablation, pictures: &[Picture], path: &Path) -> anyhow::Result<()> {
    let base = path.parent().context("a page needs a file name")?;
    let text = page(run, pictures, base).context("a String takes all")?;
    write_file(path, text.as_bytes())
}

/// The explanation of the variants and of the method.
const METHOD: &str = "
| variant | dequantization of four weights | overlap |
|---|---|---|
| baseline | as in QServe: multiply, then subtract byte by byte (`vsub4`, five instructions in all) | none: for each \
 K-tile of 128, a consumer loads its codes, dequantizes them in registers, issues the MMAs and waits for them |
| +LiquidQuant | multiply-add and XOR, two instructions | none |
| +ExCP | LiquidQuant | explicit: for each strip of 64 channels, one warpgroup dequantizes into int8 buffers in shared \
 memory and another multiplies from there |
| ImFP | LiquidQuant | implicit: the library's own kernel, which dequantizes in registers while earlier MMAs run |
| QServe in ImFP | as in QServe | implicit |

All variants of a point use the same tile (128 channels × the given number of tokens), the same schedule, and the same producers,
partial sums and epilogue. Their results are bit-identical. The schedule is the one that the planner expects to be the fastest for
the library's kernel with this tile; outside the ablation, the library chooses among more tiles.

In all variants, copies run ahead of the consumers. A thread block has two consumers, one per strip, whose work overlaps. Where
the table says none, the dequantization of a consumer does not overlap its own MMAs. The QServe variants read pairs that already
hold the number to subtract, so computing it costs them nothing. ExCP has fewer pipeline stages, because its buffers take shared
memory.

Launches are replayed from a CUDA graph, weights rotate through more than 200 MB, data are random, and times are medians. All
variants of a point are measured in two turns, each after an idle rest of 60 ms. × is the speed relative to the baseline.
";

fn page(run: &Ablation, pictures: &[Picture], base: &Path) -> Result<String, std::fmt::Error> {
    let mut text = String::new();
    circumstances(run, &mut text)?;
    text.push_str(METHOD);
    means(run, &mut text)?;
    if !pictures.is_empty() {
        text.push_str("\n## Pictures\n");
        show(pictures, base, &mut text)?;
    }
    text.push_str("\n## Every point\n");
    for matrix in run.matrices() {
        writeln!(text, "\n### {}\n", plots::title(matrix))?;
        text.push_str("| M | tile |");
        Variant::ALL.iter().try_for_each(|variant| write!(text, " {variant} µs | × |"))?;
        text.push_str("\n|---|---|---|---|---|---|---|---|---|---|---|---|\n");
        for point in run.points.iter().filter(|point| point.matrix() == matrix) {
            row(point, &mut text)?;
        }
    }
    Ok(text)
}

fn circumstances(run: &Ablation, text: &mut String) -> std::fmt::Result {
    writeln!(text, "# Ablation: the value of each idea, on {}\n", run.circumstances.device_name())?;
    writeln!(text, "Written by `liquidgemm bench --ablation`; don't edit.\n")?;
    let results = run.points.iter().map(|point| point.variants.len()).sum::<usize>();
    let exact = match run.mismatches() {
        0 => format!(
            "all {results} results are bit-identical to the CPU backend's, compared on up to {} tokens with all channels",
            run.points.iter().map(|point| point.tokens_checked).max().unwrap_or(0)
        ),
        wrong => format!("**{wrong} of {results} results are wrong**"),
    };
    facts(&run.circumstances, &[("checked", &exact)], run.complete, text)
}

fn means(run: &Ablation, text: &mut String) -> std::fmt::Result {
    text.push_str(
        "\n## Means\n\nSpeed relative to the baseline, geometric means over the matrices.\n\n| M | tile |",
    );
    Variant::ALL.iter().try_for_each(|variant| write!(text, " {variant} |"))?;
    text.push_str("\n|---|---|---|---|---|---|---|\n");
    let mut tokens: Vec<(usize, u32)> = run.points.iter().map(|point| (point.m, point.tile)).collect();
    tokens.sort_unstable();
    tokens.dedup();
    for (m, tile) in tokens {
        write!(text, "| {m} | {tile} |")?;
        for variant in Variant::ALL {
            let points = run.points.iter().filter(|point| point.m == m);
            let mean = geometric_mean(points.filter_map(|point| point.speedup(variant)));
            write!(text, " {:.2} |", mean.unwrap_or(f64::NAN))?;
        }
        text.push('\n');
    }
    Ok(())
}

fn row(point: &Point, text: &mut String) -> std::fmt::Result {
    write!(text, "| {} | {} |", point.m, point.tile)?;
    for time in &point.variants {
        let speedup = point.speedup(time.variant).unwrap_or(f64::NAN);
        let wrong = if time.mismatch.is_some() { " **wrong**" } else { "" };
        write!(text, " {:.2}{wrong} | {speedup:.2} |", time.timing.us)?;
    }
    text.push('\n');
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ablation::tests::point;
    use crate::circumstances::Circumstances;
    use crate::markdown::tests::assert_tables_are_whole;

    #[test]
    fn page_has_every_variant_of_every_point_and_complete_tables() {
        let speeds = [1.0, 1.2, 1.5, 2.0, 1.1];
        let run = Ablation {
            circumstances: Circumstances {
                device: "NVIDIA H100 80GB HBM3, 132 SMs".into(),
                ..Circumstances::default()
            },
            points: vec![point(1, 22016, 4096, speeds), point(64, 22016, 4096, speeds)],
            ..Ablation::default()
        };
        let pictures = [Picture { path: "docs/a.svg".into(), title: "A".into() }];
        let text = page(&run, &pictures, Path::new("docs")).unwrap();
        for part in [
            "on NVIDIA H100 80GB HBM3\n",
            "![A](a.svg)",
            "interrupted",
            "all 10 results",
            "| 64 | 16 | 1.00 | 1.20 | 1.50 | 2.00 | 1.10 |",
            "| 1 | 16 | 100.00 | 1.00 | 83.33 | 1.20 |",
        ] {
            assert!(text.contains(part), "{part:?} is missing in\n{text}");
        }
        assert_tables_are_whole(&text);
    }
}
