//! Writes runs over mixtures of experts as one Markdown page: circumstances, means, pictures and points.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::Path;

use anyhow::Context;

use super::recorded::TORCH_FP8;
use super::{Mixtures, PagePoint, Point, page, summary};
use crate::markdown::{facts, show};
use crate::plots::Picture;
use crate::record::write_file;
use crate::table::or_dash;
use crate::torch::Footnotes;

/// Writes several runs to `path`, with links to the pictures of each.
///
/// # Errors
/// If the file can't be written.
pub fn write(runs: &[Mixtures], pictures: &[Vec<Picture>], path: &Path) -> anyhow::Result<()> {
    let base = path.parent().context("a page needs a file name")?;
    write_file(path, markdown(runs, pictures, base).context("a String takes all")?.as_bytes())
}

/// The explanation of the page.
const METHOD: &str = "
One launch multiplies the rows of all experts, which are sorted by expert; offsets are in device memory. Each point rotates through several random
routings, so that few experts do not stay in the L2 cache. The ideal floor is the larger of two times: the bytes of the active experts, the activations
and the output at 3.10 TB/s, and the operations at 1979 TOPS, which power does not allow for long. The score is the floor divided by our time.
";

/// The explanation of the other kernels' times, before the provenance of the recorded ones.
const RECORDED: &str = "\
× is another kernel's recorded time divided by ours. Those times are of another run, on the same kind of GPU:
";

/// The same if torch was measured in one of the runs.
const THROUGH_TORCH: &str = "\
× is another kernel's time divided by ours. Where a run has measured torch, torch fp8 is `torch._scaled_grouped_mm` in that run: on the same routings and with
the same method of timing, in a process of its own before ours. The other kernels are then compared through it: their × is recorded time / recorded time of
torch fp8, times torch fp8's time in the run / ours. In runs without torch, × is the recorded time divided by ours. The recorded times are of another run, on
the same kind of GPU:
";

/// Where the reasons are.
const LIMITS: &str = "
What limits is in the [performance log](../performance-log.md#mixtures-of-experts).
";

fn markdown(runs: &[Mixtures], pictures: &[Vec<Picture>], base: &Path) -> Result<String, std::fmt::Error> {
    let mut text = String::new();
    let device = runs.first().map_or("no GPU", |run| run.circumstances.device_name());
    writeln!(text, "# Mixtures of experts, on {device}\n")?;
    writeln!(text, "Written by `liquidgemm bench --moe`; don't edit.")?;
    let others = if runs.iter().any(|run| run.torch.is_some()) { THROUGH_TORCH } else { RECORDED };
    write!(text, "{METHOD}{others}\n> {}\n{LIMITS}", page().provenance)?;
    // The footnotes of all sections are at the end of the page.
    let mut notes = Footnotes::default();
    for (index, run) in runs.iter().enumerate() {
        section(run, &mut notes, &mut text, |text| {
            pictures.get(index).map_or(Ok(()), |pictures| show(pictures, base, text))
        })?;
    }
    text.push_str(&notes.text());
    Ok(text)
}

fn section(
    run: &Mixtures,
    notes: &mut Footnotes,
    text: &mut String,
    show: impl Fn(&mut String) -> std::fmt::Result,
) -> std::fmt::Result {
    writeln!(text, "\n## Weights with group {}\n", run.groups())?;
    let exact = match run.mismatches() {
        0 => format!("rows of all {} results equal the CPU backend's bits", run.points.len()),
        wrong => format!("**{wrong} of {} results are wrong**", run.points.len()),
    };
    let others = match &run.torch {
        Some(torch) => format!(
            "{TORCH_FP8} of this run (torch {}, CUDA {}), and the others through it",
            torch.version, torch.cuda
        ),
        None => "recorded times of another run".into(),
    };
    facts(&run.circumstances, &[("compared with", &others), ("checked", &exact)], run.complete, text)?;
    writeln!(text, "\n{}", summary(&run.points).trim_end())?;
    show(text)?;
    text.push_str("\n| layer | tokens | rows | active | µs | ideal µs | score |");
    let columns = &page().columns;
    let with_torch = run.torch.is_some();
    if with_torch {
        write!(text, " {TORCH_FP8} µs |")?;
    }
    columns.iter().try_for_each(|column| write!(text, " × {column} |"))?;
    text.push_str("\n|---|---|---|---|---|---|---|");
    text.push_str(&"---|".repeat(columns.len() + usize::from(with_torch)));
    text.push('\n');
    for point in &run.points {
        let Point { page: PagePoint { layer, tokens, rows, active, .. }, .. } = point;
        let (ours, ideal, score) = (point.ours.us, point.ideal_us, point.score());
        write!(text, "| {layer} | {tokens} | {rows} | {active} | {ours:.2} | {ideal:.2} | {score:.2} |")?;
        if with_torch {
            let torch = point.torch_fp8.as_ref();
            let mark = torch.and_then(|torch| torch.error.as_deref()).map(|error| notes.mark(error));
            let us = torch.and_then(|torch| torch.timing).map(|timing| timing.us);
            write!(text, " {}{} |", or_dash(us, 2), mark.unwrap_or_default())?;
        }
        point.others().iter().try_for_each(|us| write!(text, " {} |", or_dash(us.map(|us| us / ours), 2)))?;
        text.push('\n');
    }
    Ok(())
}

impl Mixtures {
    /// Returns the groups of the run's weights; ordinarily it is one.
    pub fn groups(&self) -> String {
        let groups: BTreeSet<&str> = self.points.iter().map(|point| point.group.as_str()).collect();
        groups.into_iter().collect::<Vec<_>>().join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::markdown::tests::assert_tables_are_whole;
    use crate::moe::points;
    use crate::moe::tests::point;
    use crate::torch::tests::results;

    fn page_of(runs: &[Mixtures]) -> String {
        let picture = Picture { path: "docs/a.svg".into(), title: "A".into() };
        let text = markdown(runs, &[vec![picture]], Path::new("docs")).unwrap();
        assert_tables_are_whole(&text);
        text
    }

    #[test]
    fn a_page_of_recorded_times_says_so_and_has_whole_tables() {
        let mut run = Mixtures {
            points: vec![point(points(Some(&[1]))[0], 10.0)],
            complete: true,
            ..Mixtures::default()
        };
        let text = page_of(&[run.clone(), run.clone()]);
        for part in [
            "| 10.00 | 5.00 | 0.50 |",
            "| compared with | recorded times",
            "![A](a.svg)",
            "another kernel's recorded time",
        ] {
            assert!(text.contains(part), "{part:?} is missing in\n{text}");
        }
        assert!(!text.contains("fp8 µs"), "{text}");
        run.points[0].mismatch = Some("row 3".into());
        assert!(page_of(&[run]).contains("**1 of 1 results are wrong**"));
    }

    #[test]
    fn a_page_with_torch_has_its_times_and_the_reasons_for_missing_ones() {
        let recorded = points(Some(&[1]))[0];
        let then = recorded.recorded(TORCH_FP8).unwrap();
        let torch = results(&[Ok(3.0 * then), Err("OutOfMemoryError: 9 GB"), Err("OutOfMemoryError: 9 GB")]);
        let of = |outcome: &crate::torch::Outcome| Point {
            torch_fp8: Some(outcome.clone()),
            ..point(recorded, 10.0)
        };
        let run = Mixtures {
            points: torch.outcomes.iter().map(of).collect(),
            torch: Some(torch.torch),
            ..Mixtures::default()
        };
        let text = page_of(&[run]);
        let ratios: String = recorded.us.iter().map(|us| format!(" {:.2} |", 3.0 * us / 10.0)).collect();
        for part in [
            "| torch fp8 µs |",
            "torch 2.11.0, CUDA 13.0",
            &format!("| 0.50 | {:.2} |{ratios}\n", 3.0 * then),
            "| -[^1] | - | - | - | - |\n",
            "\n[^1]: torch: OutOfMemoryError: 9 GB\n",
        ] {
            assert!(text.contains(part), "{part:?} is missing in\n{text}");
        }
        assert_eq!(text.matches("[^1]:").count(), 1);
    }
}
