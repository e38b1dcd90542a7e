//! Draws the results as SVG files.
//! No font system is involved, so the same run gives the same file everywhere.
//! Each submodule draws one kind of picture; `style` holds colours and text styles.

mod ablation;
mod activations;
mod curve;
mod latency;
mod log_axes;
mod moe;
mod peers;
mod style;

use std::path::{Path, PathBuf};

use super::ablation::Ablation;
use super::activations::Activations;
use super::matrix::{Matrix, distinct};
use super::moe::Mixtures;
use super::record::{Run, write_file};
use super::shapes::{is_shard, origin};

/// A picture file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    /// Path of the file.
    pub path: PathBuf,
    /// Description of the picture, for readers who can't see it.
    pub title: String,
}

/// The pictures of a page, by section.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pictures {
    /// The comparison with peer kernels, and time against M for every matrix that is not a shard.
    pub general: Vec<Picture>,
    /// Time against M in steps of 8.
    pub curves: Vec<Picture>,
    /// Time against M for every shard.
    pub shards: Vec<Picture>,
}

/// Writes the pictures of one or several runs into a directory.
///
/// These are the comparison with peer kernels, if the runs have points in common with them,
/// time against M for each matrix with more than one batch size,
/// and a curve for each matrix that one run has in steps of 8.
pub fn write(runs: &[Run], directory: &Path) -> anyhow::Result<Pictures> {
    let mut pictures = Pictures::default();
    let run = Run::merged(runs);
    if let Some(svg) = peers::draw(&run)? {
        let title = "Speed relative to cuBLASLt fp8, against other kernels";
        pictures.general.push(save(directory, "peers.svg".into(), title.into(), &svg)?);
    }
    for matrix in run.matrices() {
        if let Some(svg) = latency::draw(&run, matrix)? {
            let section = if is_shard(matrix) { &mut pictures.shards } else { &mut pictures.general };
            section.push(save(directory, format!("latency-{matrix}.svg"), title(matrix), &svg)?);
        }
    }
    for matrix in distinct(runs.iter().flat_map(Run::matrices)) {
        if let Some(svg) = curve::draw(runs, matrix)? {
            let title = format!("Every eighth M, {}", title(matrix));
            pictures.curves.push(save(directory, format!("curve-{matrix}.svg"), title, &svg)?);
        }
    }
    Ok(pictures)
}

/// Writes the pictures of an ablation into a directory.
/// There is one for each matrix with more than one batch size, with the speeds of all variants.
pub fn write_ablation(run: &Ablation, directory: &Path) -> anyhow::Result<Vec<Picture>> {
    let mut pictures = Vec::new();
    for matrix in run.matrices() {
        if let Some(svg) = ablation::draw(run, matrix)? {
            let title = format!("Speed relative to the baseline, {}", title(matrix));
            pictures.push(save(directory, format!("ablation-{matrix}.svg"), title, &svg)?);
        }
    }
    Ok(pictures)
}

/// Writes the picture of a run over the quantization of activations into a directory: scores by numbers of rows.
/// There is none if the run has less than two numbers of rows.
pub fn write_activations(run: &Activations, directory: &Path) -> anyhow::Result<Vec<Picture>> {
    let title = "Score against the number of rows, for each operation and length of a row";
    let svg = activations::draw(run, title)?;
    svg.map(|svg| save(directory, "activations.svg".into(), title.into(), &svg)).into_iter().collect()
}

/// Writes the pictures of runs over mixtures of experts into a directory, and returns those of each run:
/// time against tokens for every layer, in one picture.
/// There is none for a run with less than two numbers of tokens of every layer.
pub fn write_mixtures(runs: &[Mixtures], directory: &Path) -> anyhow::Result<Vec<Vec<Picture>>> {
    let mut names: Vec<String> = Vec::new();
    let mut all = Vec::new();
    for run in runs {
        let groups = run.groups();
        let title = format!("Mixtures of experts, weights with group {groups}: time against tokens");
        let name = format!("moe-{}", groups.replace(", ", "-"));
        let same = names.iter().filter(|other| **other == name).count();
        let file = if same == 0 { format!("{name}.svg") } else { format!("{name}-{}.svg", same + 1) };
        names.push(name);
        let svg = moe::draw(run, &title)?;
        all.push(
            svg.map(|svg| save(directory, file, title, &svg)).into_iter().collect::<anyhow::Result<_>>()?,
        );
    }
    Ok(all)
}

fn save(directory: &Path, name: String, title: String, svg: &str) -> anyhow::Result<Picture> {
    let path = directory.join(name);
    write_file(&path, svg.as_bytes())?;
    Ok(Picture { path, title })
}

/// The distinct points of one matrix by ascending batch size, and the range of the picture's token axis.
/// `None` if there are fewer than two batch sizes, which make no line.
fn line_across<'a, P>(
    points: impl Iterator<Item = &'a P>,
    m: impl Fn(&P) -> usize,
) -> Option<(Vec<&'a P>, std::ops::Range<f64>)> {
    let mut points: Vec<&P> = points.collect();
    points.sort_by_key(|point| m(point));
    points.dedup_by_key(|point| m(point));
    let (first, last) = (m(points.first()?), m(points.last()?));
    (first < last).then(|| (points, first as f64 / 1.15..last as f64 * 1.15))
}

/// A matrix with the layers that have it.
pub(super) fn title(matrix: Matrix) -> String {
    let Matrix { n, k } = matrix;
    match origin(matrix) {
        names if names.is_empty() => format!("N = {n}, K = {k}"),
        names => format!("N = {n}, K = {k} ({names})"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Point;
    use crate::record::tests::point;

    fn synthetic() -> Run {
        synthetic_of(&crate::shapes::peer_cases())
    }

    /// A run whose times are near a GPU's: the ideal floor plus a few microseconds.
    fn synthetic_of(cases: &[crate::shapes::Case]) -> Run {
        let mut run = Run::default();
        run.circumstances.device = "NVIDIA H100 80GB HBM3".into();
        for case in cases {
            for &m in &case.tokens {
                let (n, k) = (case.matrix.n, case.matrix.k);
                let ideal = point(m, n, k, 1.0).ideal();
                let mut point = point(m, n, k, 1.2 * ideal + 2.0);
                for (timing, us) in [
                    (point.stream.as_mut().unwrap(), ideal * if m > 256 { 0.5 } else { 1.05 } + 1.5),
                    (point.mma.as_mut().unwrap(), ideal * if m > 256 { 1.05 } else { 0.4 } + 1.5),
                ] {
                    timing.us = us;
                }
                let baseline = |timing: &mut Option<crate::statistics::Timing>, us| {
                    timing.as_mut().unwrap().us = us;
                };
                let wide = if m > 256 { 1.4 } else { 2.0 };
                baseline(&mut point.fp8, ideal * wide + 4.0);
                baseline(&mut point.int8, ideal * wide * 1.3 + 6.0);
                baseline(&mut point.bf16, ideal * wide * 1.9 + 5.0);
                run.points.push(point);
            }
        }
        run
    }

    #[test]
    fn every_matrix_gets_a_picture_and_the_peers_one() {
        let directory = tempfile::tempdir().unwrap();
        let pictures = write(&[synthetic()], directory.path()).unwrap();
        assert_eq!((pictures.general.len(), pictures.shards.len(), pictures.curves.len()), (11, 0, 0));
        for picture in &pictures.general {
            let svg = std::fs::read_to_string(&picture.path).unwrap();
            assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
            assert!(svg.contains("LiquidGEMM"), "{}", picture.path.display());
            assert!(!svg.contains("NaN") && !svg.contains("inf"));
        }
        // To view the pictures, set LIQUIDGEMM_KEEP_PLOTS to a directory.
        if let Some(keep) = std::env::var_os("LIQUIDGEMM_KEEP_PLOTS") {
            write(&[synthetic()], Path::new(&keep)).unwrap();
        }
    }

    #[test]
    fn curves_come_from_the_run_with_the_most_columns_and_shards_are_separate() {
        use crate::shapes;
        let directory = tempfile::tempdir().unwrap();
        let mut monotone = synthetic_of(&shapes::monotone_cases());
        monotone.breaks = Some(Vec::new());
        for point in &mut monotone.points {
            (point.fp8, point.stream, point.mma) = (None, None, None);
        }
        let curves = synthetic_of(&shapes::curve_cases());
        let runs = [monotone, curves, synthetic_of(&shapes::shard_cases())];
        let pictures = write(&runs, directory.path()).unwrap();
        // Some points of the curves are points of the peer kernels too.
        assert_eq!((pictures.general.len(), pictures.shards.len(), pictures.curves.len()), (1 + 4, 8, 10));
        let with_fp8 = |picture: &&Picture| {
            let svg = std::fs::read_to_string(&picture.path).unwrap();
            assert!(svg.contains("LiquidGEMM") && !svg.contains("NaN") && !svg.contains("inf"));
            assert_eq!(svg.contains("fp8"), svg.contains("floor"));
            svg.contains("fp8")
        };
        assert_eq!(pictures.curves.iter().filter(with_fp8).count(), 4);
        if let Some(keep) = std::env::var_os("LIQUIDGEMM_KEEP_PLOTS") {
            write(&runs, Path::new(&keep)).unwrap();
        }
    }

    #[test]
    fn every_matrix_of_an_ablation_gets_a_picture_with_every_variant() {
        use crate::ablation::Variant;
        use crate::ablation::tests::point;
        let mut run = Ablation::default();
        for case in crate::shapes::ablation_cases() {
            run.points.extend(case.tokens.iter().map(|&m| {
                let gain = (m as f64).log2() / 20.0;
                let speeds = [1.0, 1.1 + gain, 1.2 + gain, 1.5 + 2.0 * gain, 1.05];
                point(m, case.matrix.n, case.matrix.k, speeds)
            }));
        }
        let directory = tempfile::tempdir().unwrap();
        let pictures = write_ablation(&run, directory.path()).unwrap();
        assert_eq!(pictures.len(), 4);
        for picture in &pictures {
            let svg = std::fs::read_to_string(&picture.path).unwrap();
            assert!(
                Variant::ALL.iter().all(|variant| svg.contains(variant.name())),
                "{}",
                picture.path.display()
            );
            assert!(!svg.contains("NaN") && !svg.contains("inf"));
        }
        if let Some(keep) = std::env::var_os("LIQUIDGEMM_KEEP_PLOTS") {
            write_ablation(&run, Path::new(&keep)).unwrap();
        }
    }

    fn assert_is_picture(picture: &Picture, parts: &[&str]) {
        let svg = std::fs::read_to_string(&picture.path).unwrap();
        assert!(svg.starts_with("<svg") && !svg.contains("NaN") && !svg.contains("inf"));
        for part in parts {
            assert!(svg.contains(part), "{part:?} is missing in {}", picture.path.display());
        }
    }

    #[test]
    fn activations_get_a_picture_with_a_panel_for_each_operation() {
        use crate::activations::Measured;
        use crate::activations::tests::point;
        use crate::torch::tests::results;
        let mut run = Activations::default();
        for measured in Measured::ALL {
            run.points.extend([1, 16, 2048].map(|m| point(measured, m, 6.0 + m as f64 / 300.0)));
        }
        let directory = tempfile::tempdir().unwrap();
        let pictures = write_activations(&run, directory.path()).unwrap();
        let titles = Measured::ALL.map(|measured| measured.to_string());
        let parts: Vec<&str> = titles.iter().map(String::as_str).chain(["k = 4096", "2048"]).collect();
        assert_is_picture(&pictures[0], &parts);
        assert!(!std::fs::read_to_string(&pictures[0].path).unwrap().contains("torch"));
        let torch = results(&[Ok(30.0), Err("failed"), Ok(40.0)]);
        run.points.iter_mut().zip(torch.outcomes).for_each(|(point, torch)| point.torch = Some(torch));
        assert_is_picture(&write_activations(&run, directory.path()).unwrap()[0], &["torch.compile"]);
        run.points.retain(|point| point.m == 1);
        assert_eq!(write_activations(&run, directory.path()).unwrap(), []);
    }

    #[test]
    fn each_run_over_mixtures_gets_a_picture_with_a_panel_for_each_layer() {
        use crate::moe::tests::point;
        let run = Mixtures {
            points: crate::moe::page().points.iter().map(|page| point(page, page.us[2] * 0.9)).collect(),
            ..Mixtures::default()
        };
        let short = Mixtures { points: run.points[..1].to_vec(), ..Mixtures::default() };
        let directory = tempfile::tempdir().unwrap();
        let pictures = write_mixtures(&[run.clone(), short, run], directory.path()).unwrap();
        assert_eq!([pictures[0].len(), pictures[1].len(), pictures[2].len()], [1, 0, 1]);
        assert_ne!(pictures[0][0].path, pictures[2][0].path);
        let parts =
            ["LiquidGEMM", "ideal floor", "torch fp8", "Humming g128", "dsv3 down", "mixtral gate-up"];
        assert_is_picture(&pictures[0][0], &parts);
    }

    #[test]
    fn missing_columns_only_leave_out_their_lines() {
        let bare = |m| Point { int8: None, fp8: None, bf16: None, ..point(m, 4096, 4096, 5.0 + m as f64) };
        let directory = tempfile::tempdir().unwrap();
        let run = Run { points: vec![bare(1), bare(64)], ..Run::default() };
        let pictures = write(&[run], directory.path()).unwrap().general;
        assert_eq!(pictures.len(), 1);
        let svg = std::fs::read_to_string(&pictures[0].path).unwrap();
        assert!(!svg.contains("fp8") && svg.contains("floor"));
        let alone = |m| Point { stream: None, mma: None, ..bare(m) };
        let run = Run { points: vec![alone(1), alone(64)], ..Run::default() };
        let pictures = write(&[run], directory.path()).unwrap().general;
        let svg = std::fs::read_to_string(&pictures[0].path).unwrap();
        assert!(svg.contains("LiquidGEMM") && !svg.contains("floor"));
        // One batch size makes no line.
        let run = Run { points: vec![bare(1)], ..Run::default() };
        assert_eq!(write(&[run], directory.path()).unwrap(), Pictures::default());
    }
}
