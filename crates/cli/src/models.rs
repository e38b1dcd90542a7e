//! What the commands on whole models share: tables, safe names and progress over bytes.

use std::fmt::Write;

use serde_json::Value;

use super::Report;

/// The exit codes, for the help of the commands.
pub(super) const EXIT_CODES: &str =
    "Exit codes: 0 success; 1 an error, or a check that failed; 2 invalid arguments.
Results go to stdout, progress and errors to stderr.";

/// Makes a report of JSON.
pub(super) fn json_report(value: &Value, success: bool) -> Report {
    Report { text: format!("{value:#}\n"), success }
}

/// Returns a name that can be shown: names come from files, and control characters would reach the terminal.
pub(super) fn printable(name: &str) -> String {
    if name.chars().any(char::is_control) { name.escape_debug().to_string() } else { name.to_owned() }
}

/// A table with aligned columns, which are separated by two spaces.
pub(super) struct Table {
    rows: Vec<Vec<String>>,
    /// Whether each column is aligned to the right.
    right: &'static [bool],
}

impl Table {
    /// Starts a table with its head. `right` says for each column whether it is aligned to the right.
    pub(super) fn new(head: &[&str], right: &'static [bool]) -> Self {
        Self { rows: vec![head.iter().map(|&cell| cell.to_owned()).collect()], right }
    }

    pub(super) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().map(|cell| printable(&cell)).collect());
    }

    pub(super) fn render(&self) -> String {
        let widths: Vec<usize> = (0..self.right.len())
            .map(|column| {
                let cells = self.rows.iter().filter_map(|row| row.get(column));
                cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
            })
            .collect();
        let mut text = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for ((cell, &width), &right) in row.iter().zip(&widths).zip(self.right) {
                let written =
                    if right { write!(line, "{cell:>width$}  ") } else { write!(line, "{cell:<width$}  ") };
                written.expect("a String takes all");
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

/// Formats a shape, such as `4096×4096`.
pub(super) fn shape(sides: &[usize]) -> String {
    if sides.is_empty() {
        return "scalar".to_owned();
    }
    sides.iter().map(ToString::to_string).collect::<Vec<_>>().join("×")
}

/// Formats a ratio in percent with three significant digits.
pub(super) fn percent(ratio: f64) -> String {
    format!("{} %", super::units::digits(ratio * 100.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_control_characters_are_escaped() {
        let mut table = Table::new(&["name", "bytes"], &[false, true]);
        table.row(["a\u{1b}[2J".to_owned(), "7".to_owned()]);
        table.row(["long name of a layer".to_owned(), "12345".to_owned()]);
        let text = table.render();
        assert_eq!(
            text.lines().collect::<Vec<_>>(),
            ["name                  bytes", "a\\u{1b}[2J                7", "long name of a layer  12345"]
        );
    }
}
