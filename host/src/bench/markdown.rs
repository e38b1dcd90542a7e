//! The results as a page: circumstances, means, targets, pictures, and every point.

use std::fmt::Write;
use std::path::{Component, Path, PathBuf};

use anyhow::Context;

use super::circumstances::Circumstances;
use super::plots::{self, Picture};
use super::record::{Baseline, Point, Run, write_atomically};
use super::table::or_dash;
use super::targets::{self, band_means};

/// Writes the page to `path`, with links to the pictures.
///
/// # Errors
/// If the file can't be written.
pub fn write(run: &Run, pictures: &[Picture], path: &Path) -> anyhow::Result<()> {
    let base = path.parent().context("a page needs a file name")?;
    let text = page(run, pictures, base).context("a String takes all")?;
    write_atomically(path, text.as_bytes())
}

fn page(run: &Run, pictures: &[Picture], base: &Path) -> Result<String, std::fmt::Error> {
    let mut text = String::new();
    circumstances(run, &mut text)?;
    means(run, &mut text)?;
    goals(run, &mut text)?;
    show(pictures, base, &mut text)?;
    text.push_str("\n## Every point\n");
    for matrix in run.matrices() {
        writeln!(text, "\n### {}\n", plots::title(matrix))?;
        points(run.points.iter().filter(|point| point.matrix() == matrix), &mut text)?;
    }
    Ok(text)
}

fn circumstances(run: &Run, text: &mut String) -> std::fmt::Result {
    writeln!(text, "# LiquidGEMM on {}\n", run.circumstances.device_name())?;
    writeln!(text, "Written by `liquidgemm bench`; don't edit.\n")?;
    let exact = match run.mismatches().count() {
        0 => format!(
            "all {} results bit for bit those of the CPU backend, on {} tokens with every channel of them",
            run.points.len(),
            run.points.iter().map(|point| point.tokens_checked).sum::<usize>()
        ),
        wrong => format!("**{wrong} of {} results are wrong**", run.points.len()),
    };
    let none = "not installed or not asked for";
    let cublaslt = if run.cublaslt.is_empty() { none } else { &run.cublaslt };
    facts(&run.circumstances, &[("baseline", cublaslt), ("checked", &exact)], run.complete, text)?;
    for note in &run.notes {
        writeln!(text, "\nNote: {note}.")?;
    }
    text.push_str(METHOD);
    Ok(())
}

/// A table of what a run's figures are to be seen with, `more` behind the circumstances, and a word if it was interrupted.
pub(super) fn facts(
    circumstances: &Circumstances,
    more: &[(&str, &str)],
    complete: bool,
    text: &mut String,
) -> std::fmt::Result {
    let Circumstances { device, driver, date, version, kernels, command } = circumstances;
    writeln!(text, "| | |\n|---|---|")?;
    let rows = [
        ("device", device.as_str()),
        ("driver", driver),
        ("date", date),
        ("command", &format!("`{command}`")),
        ("version", &format!("{version}, kernels from sources `{kernels}`")),
    ];
    for (what, value) in rows.iter().chain(more) {
        writeln!(text, "| {what} | {} |", value.replace('|', "\\|"))?;
    }
    if !complete {
        writeln!(text, "\n**The run was interrupted; points are missing.**")?;
    }
    Ok(())
}

/// A section of pictures, if there are any, linked from a page in the directory `base`.
pub(super) fn show(pictures: &[Picture], base: &Path, text: &mut String) -> std::fmt::Result {
    if !pictures.is_empty() {
        text.push_str("\n## Pictures\n");
    }
    for Picture { path, title } in pictures {
        writeln!(text, "\n![{title}]({})", link(base, path))?;
    }
    Ok(())
}

/// How to read the figures.
const METHOD: &str = "
Launches replay from a CUDA graph, weights rotate through more than 200 MB, data are random, times are medians;
± is half the distance between the quartiles. All contenders of a point are measured one after the other, twice,
each after an idle rest of 60 ms, so that none finds a GPU which the one before it has heated or throttled.
`stream` only reads the bytes of packed weights, activations and output, `mma` only does as many products: the slower
of the two is the **floor**, and the **score** is floor / time. The **ideal** floor is
max(bytes / 3.10 TB/s, operations / 1979 TOPS), without launch cost. Ratios are the baseline's time over ours.
cuBLASLt int8 has no scales and writes int32; fp8 is e4m3 with one scale a tensor, fast accumulation and bf16 output.
";

fn means(run: &Run, text: &mut String) -> std::fmt::Result {
    text.push_str(
        "\n## Means\n\nGeometric means over all points of a band.\n\n| M | points | score | time / ideal |",
    );
    Baseline::ALL.iter().try_for_each(|baseline| write!(text, " × {} |", baseline.name()))?;
    text.push_str("\n|---|---|---|---|---|---|---|\n");
    for means in band_means(run) {
        write!(
            text,
            "| {} | {} | {} | {:.3} |",
            means.band,
            means.points,
            or_dash(means.score, 3),
            means.over_ideal
        )?;
        means.speedups.iter().try_for_each(|speedup| write!(text, " {} |", or_dash(*speedup, 2)))?;
        text.push('\n');
    }
    Ok(())
}

fn goals(run: &Run, text: &mut String) -> std::fmt::Result {
    let verdicts = targets::judge(run);
    if verdicts.is_empty() {
        return Ok(());
    }
    text.push_str(
        "\n## Targets\n\nOn the peers' matrices. A point is ahead of its best peer if ours / fp8 here is below the peer's / fp8 \
         on the peers' own page.\n\n| | points | × fp8 | time / ideal | ahead of best peer |\n|---|---|---|---|---|\n",
    );
    for verdict in &verdicts {
        let [first, second, ahead] = verdict.cells();
        writeln!(text, "| {} | {} | {first} | {second} | {ahead} |", verdict.name, verdict.points)?;
    }
    let mut behind = verdicts.iter().flat_map(|verdict| &verdict.behind_peer).peekable();
    if behind.peek().is_some() {
        text.push_str("\nBehind their best peer:\n\n");
    }
    behind.try_for_each(|point| writeln!(text, "- {point}"))
}

fn points<'a>(points: impl Iterator<Item = &'a Point>, text: &mut String) -> std::fmt::Result {
    text.push_str("| M | ours µs | ± | TOPS | weights GB/s | stream µs | mma µs | score | time / ideal |");
    for baseline in Baseline::ALL {
        write!(text, " {} µs | ratio |", baseline.name())?;
    }
    text.push_str("\n|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|\n");
    for point in points {
        write!(
            text,
            "| {} | **{:.2}** | {:.1} % | {:.0} | {:.0} | {} | {} | {} | {:.3} |",
            point.m,
            point.ours.us,
            100.0 * point.ours.spread(),
            point.tops(),
            point.weight_gigabytes_per_second(),
            or_dash(point.stream.map(|timing| timing.us), 2),
            or_dash(point.mma.map(|timing| timing.us), 2),
            or_dash(point.score(), 3),
            point.over_ideal()
        )?;
        for baseline in Baseline::ALL {
            let us = point.baseline(baseline).map(|timing| timing.us);
            write!(text, " {} | {} |", or_dash(us, 2), or_dash(point.speedup(baseline), 2))?;
        }
        text.push_str(if point.mismatch.is_some() { " **wrong result**\n" } else { "\n" });
    }
    Ok(())
}

/// The way from a directory to a file, with `/` between.
fn link(base: &Path, target: &Path) -> String {
    let clean = |path: &Path| -> PathBuf { path.components().filter(|c| *c != Component::CurDir).collect() };
    let (base, target) = (clean(base), clean(target));
    let common = base.components().zip(target.components()).take_while(|(a, b)| a == b).count();
    let up = std::iter::repeat_n("..".to_owned(), base.components().count() - common);
    let down = target.components().skip(common).map(|part| part.as_os_str().to_string_lossy().into_owned());
    up.chain(down).collect::<Vec<_>>().join("/")
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::bench::record::tests::point;

    #[test]
    fn links_lead_from_the_page_to_the_picture() {
        let from = |base: &str, target: &str| link(Path::new(base), Path::new(target));
        assert_eq!(from("docs/benchmarks", "docs/benchmarks/h100/a.svg"), "h100/a.svg");
        assert_eq!(from("docs/benchmarks", "./docs/plots/a.svg"), "../plots/a.svg");
        assert_eq!(from("", "plots/a.svg"), "plots/a.svg");
    }

    #[test]
    fn page_has_all_points_and_says_what_is_missing() {
        let run = Run {
            circumstances: Circumstances {
                device: "NVIDIA H100 80GB HBM3, 132 multiprocessors".into(),
                ..Circumstances::default()
            },
            notes: vec!["no cuBLASLt columns: not found".into()],
            points: vec![point(1, 4096, 4096, 5.0), Point { fp8: None, ..point(64, 4096, 4096, 6.0) }],
            ..Run::default()
        };
        let pictures = [Picture { path: "docs/a.svg".into(), title: "A".into() }];
        let text = page(&run, &pictures, Path::new("docs")).unwrap();
        for part in [
            "# LiquidGEMM on NVIDIA H100 80GB HBM3\n",
            "![A](a.svg)",
            "interrupted",
            "Note: no cuBLASLt",
            "### N = 4096, K = 4096 (LLaMA-2-7B O, ",
            "| 64 | **6.00** |",
            "| M 16–64 | 1 | - (≥ 1.85) not measured |",
        ] {
            assert!(text.contains(part), "{part:?} is missing in\n{text}");
        }
        assert_tables_are_whole(&text);
    }

    /// Every heading of a table has as many cells as the line beneath it.
    pub(crate) fn assert_tables_are_whole(text: &str) {
        let tables = text.lines().filter(|line| line.starts_with('|')).collect::<Vec<_>>();
        for pair in tables.windows(2).filter(|pair| pair[1].starts_with("|---")) {
            assert_eq!(pair[0].matches('|').count(), pair[1].matches('|').count(), "{}", pair[0]);
        }
    }
}
