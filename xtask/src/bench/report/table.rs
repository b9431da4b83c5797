//! Tables in markdown whose columns also line up in a terminal.

/// Rows under a head; the first columns are left-aligned, the others right-aligned.
pub(crate) struct Table {
    left: usize,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these column heads; the first `left` columns have text, the others figures.
    pub(crate) fn new(left: usize, head: &[&str]) -> Self {
        Self { left, rows: vec![head.iter().map(|&cell| cell.to_owned()).collect()] }
    }

    /// Adds a row, of as many cells as the head.
    pub(crate) fn row(&mut self, row: Vec<String>) {
        self.rows.push(row);
    }

    /// As markdown, with an empty line after it.
    pub(crate) fn markdown(&self) -> String {
        let columns = self.rows[0].len();
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or_default().max(3)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut text = String::new();
        for (number, row) in self.rows.iter().enumerate() {
            text += &self.line(row, &widths);
            if number == 0 {
                let rule = widths.iter().enumerate().map(|(column, &width)| match column {
                    _ if column < self.left => "-".repeat(width),
                    _ => "-".repeat(width - 1) + ":",
                });
                text += &self.line(&rule.collect::<Vec<_>>(), &widths);
            }
        }
        text + "\n"
    }

    fn line(&self, row: &[String], widths: &[usize]) -> String {
        let cells = row.iter().zip(widths).enumerate().map(|(column, (cell, &width))| match column {
            _ if column < self.left => format!(" {cell:<width$} |"),
            _ => format!(" {cell:>width$} |"),
        });
        format!("|{}\n", cells.collect::<String>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let mut table = Table::new(1, &["tunnel", "µs"]);
        table.row(vec!["veth".into(), "5.00".into()]);
        assert_eq!(table.markdown(), "| tunnel |   µs |\n| ------ | ---: |\n| veth   | 5.00 |\n\n");
    }
}
