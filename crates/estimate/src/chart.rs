//! A line chart as positions in an SVG: ticks, lines and dots. The template of the page draws it, so that its colours
//! follow the page's.

use serde::Serialize;

const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 360.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 16.0;
const TOP: f64 = 14.0;
const BOTTOM: f64 = 44.0;

/// A chart over batch sizes, with a logarithmic x axis.
#[derive(Debug, Serialize)]
pub(crate) struct Chart {
    pub(crate) title: String,
    pub(crate) note: String,
    width: f64,
    height: f64,
    left: f64,
    right: f64,
    top: f64,
    bottom: f64,
    x_ticks: Vec<Tick>,
    y_ticks: Vec<Tick>,
    lines: Vec<Line>,
    /// The position of a horizontal limit and its name.
    limit: Option<Tick>,
}

#[derive(Debug, Serialize)]
struct Tick {
    at: f64,
    label: String,
}

#[derive(Debug, Serialize)]
struct Line {
    name: String,
    /// The number of the colour.
    colour: usize,
    path: String,
    dots: Vec<Dot>,
}

#[derive(Debug, Serialize)]
struct Dot {
    x: f64,
    y: f64,
    label: String,
}

/// A line's name and its points (batch, value).
pub(crate) type Series = (String, Vec<(f64, f64)>);

/// A scale from values to positions.
#[derive(Clone, Copy)]
struct Scale {
    is_logarithmic: bool,
    low: f64,
    high: f64,
    from: f64,
    to: f64,
}

impl Scale {
    fn at(&self, value: f64) -> f64 {
        let map = |value: f64| if self.is_logarithmic { value.max(f64::MIN_POSITIVE).ln() } else { value };
        let [low, high] = [map(self.low), map(self.high)];
        let share = if high > low { (map(value) - low) / (high - low) } else { 0.5 };
        round(self.from + (self.to - self.from) * share)
    }
}

fn round(position: f64) -> f64 {
    (position * 10.0).round() / 10.0
}

/// 1, 2 and 5 times powers of ten between two positive values.
fn logarithmic_ticks(low: f64, high: f64) -> Vec<f64> {
    let [first, last] = [low, high].map(|value| value.log10().floor() as i32);
    let all = (first..=last).flat_map(|power| [1.0, 2.0, 5.0].map(|factor| factor * 10f64.powi(power)));
    let within: Vec<f64> = all.filter(|tick| (low * 0.999..=high * 1.001).contains(tick)).collect();
    let decades: Vec<f64> =
        within.iter().copied().filter(|tick| (tick.log10() - tick.log10().round()).abs() < 1e-9).collect();
    if within.len() > 8 && decades.len() > 1 { decades } else { within }
}

/// About five round values from 0 to `high`.
fn linear_ticks(high: f64) -> Vec<f64> {
    let rough = high / 5.0;
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|factor| factor * power).into_iter().find(|step| *step >= rough);
    let step = step.unwrap_or(10.0 * power);
    (0..=5).map(|count| f64::from(count) * step).filter(|tick| *tick <= high * 1.001).collect()
}

/// Makes a chart of `series`, whose values are positive. A linear y axis begins at 0 and has a limit's line.
pub(crate) fn chart(
    title: &str,
    note: &str,
    series: &[Series],
    limit: Option<(f64, &str)>,
    label: fn(f64) -> String,
) -> Chart {
    let points = || series.iter().flat_map(|(_, points)| points.iter().copied());
    let least = |values: &mut dyn Iterator<Item = f64>| values.min_by(f64::total_cmp).unwrap_or(1.0);
    let most = |values: &mut dyn Iterator<Item = f64>| values.max_by(f64::total_cmp).unwrap_or(1.0);
    let is_logarithmic = limit.is_none();
    let x = Scale {
        is_logarithmic: true,
        low: least(&mut points().map(|point| point.0)),
        high: most(&mut points().map(|point| point.0)),
        from: LEFT,
        to: WIDTH - RIGHT,
    };
    let highest = most(&mut points().map(|point| point.1));
    let y = Scale {
        is_logarithmic,
        low: if is_logarithmic { least(&mut points().map(|point| point.1)) * 0.9 } else { 0.0 },
        high: 1.1 * limit.map_or(highest, |(limit, _)| highest.max(limit)),
        from: HEIGHT - BOTTOM,
        to: TOP,
    };
    let mut batches: Vec<f64> = points().map(|point| point.0).collect();
    batches.sort_by(f64::total_cmp);
    batches.dedup();
    // Labels need room: show every n-th.
    let every = batches.len().div_ceil(12).max(1);
    let x_ticks =
        batches.iter().step_by(every).map(|&batch| Tick { at: x.at(batch), label: format!("{batch}") });
    let ticks = if is_logarithmic { logarithmic_ticks(y.low, y.high) } else { linear_ticks(y.high) };
    let lines = series.iter().enumerate().map(|(colour, (name, points))| {
        let places = points.iter().map(|&(batch, value)| [x.at(batch), y.at(value)]);
        let path: Vec<String> = places.map(|[x, y]| format!("{x},{y}")).collect();
        let dots = points.iter().map(|&(batch, value)| Dot {
            x: x.at(batch),
            y: y.at(value),
            label: format!("{name}, batch {batch}: {}", label(value)),
        });
        Line { name: name.clone(), colour, path: path.join(" "), dots: dots.collect() }
    });
    Chart {
        title: title.to_owned(),
        note: note.to_owned(),
        width: WIDTH,
        height: HEIGHT,
        left: LEFT,
        right: WIDTH - RIGHT,
        top: TOP,
        bottom: HEIGHT - BOTTOM,
        x_ticks: x_ticks.collect(),
        y_ticks: ticks.into_iter().map(|tick| Tick { at: y.at(tick), label: label(tick) }).collect(),
        lines: lines.collect(),
        limit: limit.map(|(limit, name)| Tick { at: y.at(limit), label: name.to_owned() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_position_is_inside_the_picture_also_with_one_point_or_none() {
        let grows = |count: i32| {
            (0..count).map(|power| (2f64.powi(power), 3f64.powi(power) * 1e-4)).collect::<Vec<_>>()
        };
        for count in [0, 1, 2, 30] {
            for limit in [None, Some((5.0, "limit"))] {
                let chart =
                    chart("t", "n", &[("a".into(), grows(count)), ("b".into(), vec![])], limit, |y| {
                        y.to_string()
                    });
                let [xs, ys]: [Vec<f64>; 2] = [
                    chart
                        .x_ticks
                        .iter()
                        .map(|tick| tick.at)
                        .chain(chart.lines[0].dots.iter().map(|dot| dot.x))
                        .collect(),
                    chart
                        .y_ticks
                        .iter()
                        .chain(&chart.limit)
                        .map(|tick| tick.at)
                        .chain(chart.lines[0].dots.iter().map(|dot| dot.y))
                        .collect(),
                ];
                assert!(xs.iter().all(|x| (LEFT..=WIDTH - RIGHT).contains(x)), "{xs:?}");
                assert!(ys.iter().all(|y| (TOP - 0.1..=HEIGHT - BOTTOM + 0.1).contains(y)), "{ys:?}");
                assert_eq!(chart.lines[0].dots.len(), count as usize);
                assert!(chart.x_ticks.len() <= 15 && (count < 2 || chart.y_ticks.len() >= 2));
            }
        }
    }

    #[test]
    fn ticks_are_round_numbers_within_the_axis() {
        assert_eq!(linear_ticks(88.0), [0.0, 20.0, 40.0, 60.0, 80.0]);
        assert_eq!(logarithmic_ticks(15.0, 250.0), [20.0, 50.0, 100.0, 200.0]);
    }
}
