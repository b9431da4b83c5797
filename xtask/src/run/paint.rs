//! Headings and tables for a terminal of 100 columns, or for a pipe.

use std::io::IsTerminal;

/// Width of the output in columns.
pub(super) const WIDTH: usize = 100;

fn style(code: &str, text: &str) -> String {
    if std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none() {
        format!("\x1b[{code}m{text}\x1b[0m")
    } else {
        text.to_owned()
    }
}

/// Bold text.
pub(super) fn bold(text: &str) -> String {
    style("1", text)
}

/// Dim text.
pub(super) fn faint(text: &str) -> String {
    style("2", text)
}

/// The start of a part.
pub(super) fn heading(text: &str) {
    println!("\n{}\n{}", bold(text), faint(&"─".repeat(WIDTH)));
}

/// Rows under a head; the first column is left-aligned, the others right-aligned.
pub(super) struct Table {
    widths: Vec<usize>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these column heads.
    pub(super) fn new(head: &[&str]) -> Self {
        let mut table = Self { widths: vec![0; head.len()], rows: Vec::new() };
        table.row(head.iter().map(|&text| text.to_owned()).collect());
        table
    }

    /// Adds a row.
    pub(super) fn row(&mut self, row: Vec<String>) {
        for (width, cell) in self.widths.iter_mut().zip(&row) {
            *width = (*width).max(cell.chars().count());
        }
        self.rows.push(row);
    }

    /// Prints it.
    pub(super) fn print(&self) {
        for (number, row) in self.rows.iter().enumerate() {
            let line = line(row, &self.widths);
            println!("{}", if number == 0 { faint(&line) } else { line });
        }
    }
}

/// One row of cells in columns of these widths.
pub(super) fn line(row: &[String], widths: &[usize]) -> String {
    let mut text = String::from(" ");
    for (column, (cell, &width)) in row.iter().zip(widths).enumerate() {
        text += &if column == 0 { format!(" {cell:<width$}") } else { format!("   {cell:>width$}") };
    }
    text.trim_end().to_owned()
}

/// A number with separated thousands.
pub(super) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(' ');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thousands_stand_apart() {
        assert_eq!(
            [0, 999, 1000, 1_234_567].map(grouped),
            ["0".to_owned(), "999".to_owned(), "1 000".to_owned(), "1 234 567".to_owned()]
        );
    }

    #[test]
    fn the_first_column_stands_left_and_the_others_right() {
        assert_eq!(line(&["a".to_owned(), "1".to_owned()], &[3, 4]), "  a        1");
    }
}
