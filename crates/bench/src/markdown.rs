//! Writes the results as a Markdown page: circumstances, means, targets, pictures, and every point.
//! Means and verdicts come from [`targets`](mod@super::targets), pictures from [`plots`](mod@super::plots).

use std::fmt::Write;
use std::path::{Component, Path, PathBuf};

use anyhow::Context;

use super::circumstances::Circumstances;
use super::monotone;
use super::peers::{self, Comparison};
use super::plots::{self, Picture, Pictures};
use super::record::{Baseline, Point, Run, write_file};
use super::shapes::{Matrix, is_shard};
use super::table::or_dash;
use super::targets::{self, Means, band_means};

/// Writes a page about one or several runs to `path`, with links to the pictures.
pub fn write(runs: &[Run], pictures: &Pictures, path: &Path) -> anyhow::Result<()> {
    let base = path.parent().context("a page needs a file name")?;
    let text = page(runs, pictures, base).context("a String takes all")?;
    write_file(path, text.as_bytes())
}

fn page(runs: &[Run], pictures: &Pictures, base: &Path) -> Result<String, std::fmt::Error> {
    let run = Run::merged(runs);
    let mut text = String::new();
    circumstances(runs, &mut text)?;
    means(&run, &mut text)?;
    goals(&run, &mut text)?;
    peers(&run, &mut text)?;
    if !pictures.general.is_empty() {
        text.push_str("\n## Pictures\n");
        show(&pictures.general, base, &mut text)?;
    }
    between(runs, &run, &pictures.curves, base, &mut text)?;
    shards(&run, &pictures.shards, base, &mut text)?;
    text.push_str("\n## Every point\n");
    for matrix in run.matrices() {
        writeln!(text, "\n### {}\n", plots::title(matrix))?;
        points(run.points.iter().filter(|point| point.matrix() == matrix), &mut text)?;
    }
    Ok(text)
}

fn circumstances(runs: &[Run], text: &mut String) -> std::fmt::Result {
    let mut devices: Vec<&str> = runs.iter().map(|run| run.circumstances.device_name()).collect();
    devices.dedup();
    writeln!(text, "# LiquidGEMM on {}\n", devices.join(", "))?;
    writeln!(text, "Written by `liquidgemm bench`; don't edit.")?;
    for (index, run) in runs.iter().enumerate() {
        if runs.len() > 1 {
            writeln!(text, "\n## Run {} of {}", index + 1, runs.len())?;
        }
        text.push('\n');
        circumstances_of(run, text)?;
    }
    if runs.len() > 1 {
        text.push_str("\n## Method\n");
    }
    text.push_str(METHOD);
    if runs.len() > 1 {
        text.push_str(SEVERAL_RUNS);
    }
    Ok(())
}

fn circumstances_of(run: &Run, text: &mut String) -> std::fmt::Result {
    let exact = match run.mismatches().count() {
        0 => format!(
            "all {} results are bit-identical to the CPU backend's, compared on {} tokens in total with all channels",
            run.points.len(),
            run.points.iter().map(|point| point.tokens_checked).sum::<usize>()
        ),
        wrong => format!("**{wrong} of {} results are wrong**", run.points.len()),
    };
    let none = "not installed or not requested";
    let cublaslt = if run.cublaslt.is_empty() { none } else { &run.cublaslt };
    let pace = run.pace.to_string();
    let more = [("pace", pace.as_str()), ("baseline", cublaslt), ("checked", &exact)];
    facts(&run.circumstances, &more, run.complete, text)?;
    for note in &run.notes {
        writeln!(text, "\nNote: {note}.")?;
    }
    Ok(())
}

/// Writes a table of the circumstances followed by the rows in `more`, and a line if the run was interrupted.
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

/// Writes links to the pictures, relative to the directory `base`.
pub(super) fn show(pictures: &[Picture], base: &Path, text: &mut String) -> std::fmt::Result {
    for Picture { path, title } in pictures {
        writeln!(text, "\n![{title}]({})", link(base, path))?;
    }
    Ok(())
}

/// The explanation of the method and of the figures.
const METHOD: &str = "
Launches are replayed from a CUDA graph, weights rotate through more than 200 MB, data are random, and times are medians;
± is half the distance between the quartiles. The kernels of a point are measured in turns, each after an idle rest, so that
no kernel finds a GPU that another one has heated or throttled. The pace above gives turns, rests and replays.

`stream` is a kernel that only reads as many bytes as packed weights, activations and output have; `mma` is a kernel that only
does as many multiply-adds. The slower of the two is the **floor**, and the **score** is floor / our time. The **ideal** floor is
max(bytes / 3.10 TB/s, operations / 1979 TOPS), without launch cost. Ratios are the baseline's time / our time.
cuBLASLt int8 has no scales and writes int32; fp8 is e4m3 with one scale per tensor, fast accumulation and bf16 output.
";

/// The explanation of a page about several runs.
const SEVERAL_RUNS: &str = "
Every ratio, every score and every curve comes from a single run. If a point was measured several times, the tables show the
measurement with the most columns, and the last of those. Runs of only our kernel are not in the tables.
";

/// Writes the means of each band.
/// If the run has other points too, the means are over the powers of two, without the shards.
fn means(run: &Run, text: &mut String) -> std::fmt::Result {
    let all: Vec<&Point> = run.points.iter().collect();
    let plain = |point: &&&Point| point.m.is_power_of_two() && !is_shard(point.matrix());
    let some: Vec<&Point> = all.iter().filter(plain).copied().collect();
    let (which, points) = if some.is_empty() || some.len() == all.len() {
        ("all points of a band", all)
    } else {
        ("the points of a band at powers of two, without the shards", some)
    };
    writeln!(text, "\n## Means\n\nGeometric means over {which}.\n")?;
    table_of_means("M", &band_means(&points), text)
}

fn table_of_means(first: &str, rows: &[Means], text: &mut String) -> std::fmt::Result {
    write!(text, "| {first} | points | score | time / ideal |")?;
    Baseline::ALL.iter().try_for_each(|baseline| write!(text, " × {} |", baseline.name()))?;
    text.push_str("\n|---|---|---|---|---|---|---|\n");
    for means in rows {
        write!(
            text,
            "| {} | {} | {} | {:.3} |",
            means.name,
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
        "\n## Targets\n\nTargets apply to the matrices of the peers (other kernels, see below) and to the shards. A point is ahead \
         of its best peer if our time / fp8 time here is below the peer's time / fp8 time in the peer's own run.\n\n",
    );
    writeln!(text, "| | points | {} |\n|---|---|---|---|---|---|", targets::CELLS.join(" | "))?;
    for verdict in &verdicts {
        writeln!(text, "| {} | {} | {} |", verdict.name, verdict.points, verdict.cells().join(" | "))?;
    }
    for (heading, points) in targets::misses(&verdicts) {
        writeln!(text, "\nPoints {heading}:\n")?;
        points.into_iter().try_for_each(|point| writeln!(text, "- {point}"))?;
    }
    Ok(())
}

/// Writes the speeds of our kernel and of each peer by batch size.
fn peers(run: &Run, text: &mut String) -> std::fmt::Result {
    let mut tokens: Vec<usize> = run.points.iter().map(|point| point.m).collect();
    tokens.sort_unstable();
    tokens.dedup();
    let rows: Vec<Comparison> = tokens.into_iter().filter_map(|m| peers::compare(run, m)).collect();
    if rows.is_empty() {
        return Ok(());
    }
    text.push_str(
        "\n## Peers\n\nSpeed relative to cuBLASLt fp8, which each run measures beside the other kernels. The values are geometric \
         means over the same matrices; a dash means that a peer was not measured on all of them. The peers' runs:\n",
    );
    text.push('\n');
    for page in peers::pages() {
        writeln!(text, "- {}", page.provenance)?;
    }
    let names: Vec<&str> = peers::names().into_iter().filter(|name| *name != peers::REFERENCE).collect();
    writeln!(text, "\n| M | matrices | LiquidGEMM | {} |", names.join(" | "))?;
    writeln!(text, "|---|---|---|{}", "---|".repeat(names.len()))?;
    for Comparison { m, matrices, ours, peers, .. } in rows {
        write!(text, "| {m} | {matrices} | **{ours:.2}** |")?;
        for name in &names {
            let speed = peers.iter().find(|(peer, _)| peer == name).map(|(_, speed)| *speed);
            write!(text, " {} |", or_dash(speed, 2))?;
        }
        text.push('\n');
    }
    Ok(())
}

/// Writes means and curves between the powers of two, and whether time rises with M.
fn between(runs: &[Run], run: &Run, curves: &[Picture], base: &Path, text: &mut String) -> std::fmt::Result {
    let means = targets::between_means(run);
    if means.is_empty() && curves.is_empty() && runs.iter().all(|run| run.breaks.is_none()) {
        return Ok(());
    }
    text.push_str("\n## Batch sizes between the powers of two\n");
    if !means.is_empty() {
        text.push_str("\nGeometric means over the matrices of the peers.\n\n");
        table_of_means("M", &means, text)?;
    }
    for run in runs {
        if let Some(breaks) = &run.breaks {
            writeln!(text, "\n```text\n{}```", monotone::report(breaks, &run.points))?;
        }
    }
    show(curves, base, text)
}

/// Writes the means of each shard, and the point at which it is slowest relative to cuBLASLt fp8.
fn shards(run: &Run, pictures: &[Picture], base: &Path, text: &mut String) -> std::fmt::Result {
    let matrices: Vec<Matrix> = run.matrices().into_iter().filter(|&matrix| is_shard(matrix)).collect();
    if matrices.is_empty() {
        return Ok(());
    }
    text.push_str("\n## Shards\n\nLayers sharded for tensor parallelism; geometric means over all M.\n\n");
    let of = |matrix: Matrix| -> Vec<&Point> {
        run.points.iter().filter(|point| point.matrix() == matrix).collect()
    };
    let means: Vec<Means> =
        matrices.iter().filter_map(|&matrix| Means::of(plots::title(matrix), &of(matrix))).collect();
    table_of_means("shard", &means, text)?;
    text.push('\n');
    for matrix in matrices {
        let ratios =
            of(matrix).into_iter().filter_map(|point| Some((point.speedup(Baseline::Fp8)?, point.m)));
        if let Some((least, m)) = ratios.min_by(|(a, _), (b, _)| a.total_cmp(b)) {
            writeln!(text, "- {matrix}: the least × fp8 is {least:.2}, at M = {m}")?;
        }
    }
    show(pictures, base, text)
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

/// The relative path from a directory to a file, with `/` as the separator.
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
    use crate::record::tests::point;

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
                device: "NVIDIA H100 80GB HBM3, 132 SMs".into(),
                ..Circumstances::default()
            },
            notes: vec!["no cuBLASLt columns: not found".into()],
            points: vec![point(1, 4096, 4096, 5.0), Point { fp8: None, ..point(64, 4096, 4096, 6.0) }],
            ..Run::default()
        };
        let picture = Picture { path: "docs/a.svg".into(), title: "A".into() };
        let pictures = Pictures { general: vec![picture], ..Pictures::default() };
        let text = page(&[run], &pictures, Path::new("docs")).unwrap();
        for part in [
            "# LiquidGEMM on NVIDIA H100 80GB HBM3\n",
            "![A](a.svg)",
            "interrupted",
            "Note: no cuBLASLt",
            "### N = 4096, K = 4096 (LLaMA-2-7B O, ",
            "| 64 | **6.00** |",
            "| M 16–64 | 1 | - (≥ 1.93) not measured | - |",
            "| every M | 1 | - | 2.00 (≥ 1.00) met | - | - |",
            "| pace | 2 turns, each 60 ms of rest, ",
            "| 1 | 1 | **2.00** |",
        ] {
            assert!(text.contains(part), "{part:?} is missing in\n{text}");
        }
        for part in ["## Run 1", "## Shards", "## Batch sizes between"] {
            assert!(!text.contains(part), "{part:?} is in\n{text}");
        }
        assert_tables_are_whole(&text);
    }

    #[test]
    fn page_of_several_runs_has_their_circumstances_and_a_section_for_each_list() {
        let on = |device: &str, points| Run {
            circumstances: Circumstances {
                device: format!("{device}, 132 SMs"),
                kernels: format!("hash of {device}"),
                ..Circumstances::default()
            },
            complete: true,
            points,
            ..Run::default()
        };
        let alone = |m, us| Point { fp8: None, stream: None, mma: None, ..point(m, 4096, 4096, us) };
        let broken = vec![alone(17, 9.0), alone(24, 8.0)];
        let breaks = Some(vec![crate::record::Break {
            n: 4096,
            k: 4096,
            m: 17,
            us: 9.0,
            larger_m: 24,
            larger_us: 8.0,
        }]);
        let runs = [
            on("A", vec![point(16, 4096, 4096, 5.0), point(24, 4096, 4096, 6.0)]),
            on("B", vec![point(64, 2560, 8192, 5.0), point(96, 2560, 8192, 7.0)]),
            Run { breaks, pace: crate::replay::Pace::BRIEF, ..on("B", broken) },
        ];
        let picture = |name: &str| vec![Picture { path: name.into(), title: name.into() }];
        let pictures =
            Pictures { curves: picture("curve.svg"), shards: picture("shard.svg"), ..Pictures::default() };
        let text = page(&runs, &pictures, Path::new("")).unwrap();
        for part in [
            "# LiquidGEMM on A, B\n",
            "## Run 3 of 3\n",
            "kernels from sources `hash of A`",
            "kernels from sources `hash of B`",
            "each 20 ms of rest",
            "powers of two, without the shards.",
            "| 16–64 | 1 | 0.800 |",
            "| M 24–56 | 1 | 2.00 (≥ 1.90) met |",
            "| M 24–56 | 1 | 0.800 |",
            "NOT monotone: 1 of 2 points",
            "![curve.svg](curve.svg)",
            "| N = 2560, K = 8192 (LLaMA-3-70B QKV on 4 GPUs) | 2 |",
            "- 2560x8192: the least × fp8 is 2.00, at M = 64",
            "![shard.svg](shard.svg)",
        ] {
            assert!(text.contains(part), "{part:?} is missing in\n{text}");
        }
        // The run of only our kernel has no rows.
        assert!(!text.contains("| 17 |"), "{text}");
        assert_tables_are_whole(&text);
    }

    /// Asserts that every table heading has as many cells as the line beneath it.
    pub(crate) fn assert_tables_are_whole(text: &str) {
        let tables = text.lines().filter(|line| line.starts_with('|')).collect::<Vec<_>>();
        for pair in tables.windows(2).filter(|pair| pair[1].starts_with("|---")) {
            assert_eq!(pair[0].matches('|').count(), pair[1].matches('|').count(), "{}", pair[0]);
        }
    }
}
