//! Formats numbers, times and sizes for reports.
//! All have three significant digits and a unit that fits.

use std::time::Duration;

/// Formats a number with three significant digits.
pub(super) fn digits(value: f64) -> String {
    if value == 0.0 || !value.is_finite() {
        return value.to_string();
    }
    let scientific = format!("{value:.2e}");
    let (_, exponent) = scientific.split_once('e').expect("the format has an exponent");
    match 2 - exponent.parse::<i32>().expect("an exponent is a number") {
        decimals @ 0..=8 => format!("{value:.*}", decimals as usize),
        ..0 => format!("{value:.0}"),
        _ => scientific,
    }
}

/// Formats a time in µs, ms or s.
pub(super) fn duration(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    match seconds {
        1.0.. => format!("{} s", digits(seconds)),
        1e-3.. => format!("{} ms", digits(seconds * 1e3)),
        _ => format!("{} µs", digits(seconds * 1e6)),
    }
}

/// Formats a size in bytes, with binary units.
pub(super) fn bytes(size: f64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut size = size;
    let mut unit = 0;
    while size >= 1024.0 && unit + 1 < units.len() {
        size /= 1024.0;
        unit += 1;
    }
    format!("{} {}", digits(size), units[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_significant_digits_at_every_size() {
        let shown = [0.0, 0.012345, 0.99951, 1.0, 9.996, 12.345, 999.4, 123_456.0, 1.5e-12].map(digits);
        assert_eq!(shown, ["0", "0.0123", "1.00", "1.00", "10.0", "12.3", "999", "123456", "1.50e-12"]);
    }

    #[test]
    fn times_and_sizes_use_the_unit_that_fits() {
        assert_eq!(duration(Duration::from_nanos(1_500)), "1.50 µs");
        assert_eq!(duration(Duration::from_micros(1_500)), "1.50 ms");
        assert_eq!(duration(Duration::from_millis(61_500)), "61.5 s");
        assert_eq!(bytes(1023.0), "1023 B");
        assert_eq!(bytes(1024.0 * 1024.0), "1.00 MiB");
        assert_eq!(bytes(2.5 * 1024.0_f64.powi(5)), "2560 TiB");
    }
}
