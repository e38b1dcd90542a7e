//! The ablation as a page: circumstances, how the arms differ, means, pictures, and every point.

use std::fmt::Write;
use std::path::Path;

use anyhow::Context;

use super::{Ablation, Point};
use crate::bench::markdown::{facts, show};
use crate::bench::plots::{self, Picture};
use crate::bench::record::write_atomically;
use crate::bench::statistics::geometric_mean;
use crate::gpu::ablation::Arm;

/// Writes the page to `path`, with links to the pictures.
///
/// # Errors
/// If the file can't be written.
pub fn write(run: &Ablation, pictures: &[Picture], path: &Path) -> anyhow::Result<()> {
    let base = path.parent().context("a page needs a file name")?;
    let text = page(run, pictures, base).context("a String takes all")?;
    write_atomically(path, text.as_bytes())
}

/// How to read the figures.
const METHOD: &str = "
| arm | dequantization of four weights | overlap |
|---|---|---|
| baseline | as QServe: multiply, then subtract byte by byte (`vsub4`, five instructions in all) | none: a consumer loads \
 its codes of 128 along K, dequantizes them in registers, multiplies, waits, and goes on to the next |
| +LiquidQuant | multiply-add and XOR, two instructions | none |
| +ExCP | LiquidQuant | explicit: for each strip of 64 channels one warpgroup dequantizes into int8 buffers in shared memory, \
 another multiplies from there |
| ImFP | LiquidQuant | implicit: the library's own kernel, which dequantizes in registers while the products before run |
| QServe in ImFP | as QServe | implicit |

Every arm of a point has the same tile (128 channels × the tokens given), the same schedule, the same producers, partial sums
and epilogue, and gives the same bits. The schedule is the one that the planner takes for the fastest with the library's kernel at that
tile; the library itself chooses among more tiles than these. In all arms copies run ahead of the consumers, and the two consumers of a
block, one a strip, overlap each other; without overlap means that a consumer's own dequantization and products take turns. QServe's arms
get pairs that hold what is subtracted, so that finding it costs them nothing. ExCP has fewer stages, as its buffers take their room.

Launches replay from a CUDA graph, weights rotate through more than 200 MB, data are random, times are medians. All arms of a point
are measured one after the other, twice, each after an idle rest of 60 ms. × is the speed relative to the baseline.
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
        Arm::ALL.iter().try_for_each(|arm| write!(text, " {arm} µs | × |"))?;
        text.push_str("\n|---|---|---|---|---|---|---|---|---|---|---|---|\n");
        for point in run.points.iter().filter(|point| point.matrix() == matrix) {
            row(point, &mut text)?;
        }
    }
    Ok(text)
}

fn circumstances(run: &Ablation, text: &mut String) -> std::fmt::Result {
    writeln!(text, "# What each idea is worth, on {}\n", run.circumstances.device_name())?;
    writeln!(text, "Written by `liquidgemm bench --ablation`; don't edit.\n")?;
    let results = run.points.iter().map(|point| point.arms.len()).sum::<usize>();
    let exact = match run.mismatches() {
        0 => format!(
            "all {results} results bit for bit those of the CPU backend, each on {} tokens at the most with every channel of them",
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
    Arm::ALL.iter().try_for_each(|arm| write!(text, " {arm} |"))?;
    text.push_str("\n|---|---|---|---|---|---|---|\n");
    let mut tokens: Vec<(usize, u32)> = run.points.iter().map(|point| (point.m, point.tile)).collect();
    tokens.sort_unstable();
    tokens.dedup();
    for (m, tile) in tokens {
        write!(text, "| {m} | {tile} |")?;
        for arm in Arm::ALL {
            let points = run.points.iter().filter(|point| point.m == m);
            let mean = geometric_mean(points.filter_map(|point| point.speedup(arm)));
            write!(text, " {:.2} |", mean.unwrap_or(f64::NAN))?;
        }
        text.push('\n');
    }
    Ok(())
}

fn row(point: &Point, text: &mut String) -> std::fmt::Result {
    write!(text, "| {} | {} |", point.m, point.tile)?;
    for time in &point.arms {
        let speedup = point.speedup(time.arm).unwrap_or(f64::NAN);
        let wrong = if time.mismatch.is_some() { " **wrong**" } else { "" };
        write!(text, " {:.2}{wrong} | {speedup:.2} |", time.timing.us)?;
    }
    text.push('\n');
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::ablation::tests::point;
    use crate::bench::circumstances::Circumstances;
    use crate::bench::markdown::tests::assert_tables_are_whole;

    #[test]
    fn page_has_every_arm_of_every_point_and_whole_tables() {
        let speeds = [1.0, 1.2, 1.5, 2.0, 1.1];
        let run = Ablation {
            circumstances: Circumstances {
                device: "NVIDIA H100 80GB HBM3, 132 multiprocessors".into(),
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
