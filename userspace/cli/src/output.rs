// SPDX-License-Identifier: GPL-2.0-only

//! Writing to the terminal, or to whoever reads instead of one.

use std::io::{self, Write};

use serde::Serialize;

/// Writes a text. A reader that has gone away (`| head`) is no error.
pub(crate) fn text(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    let written = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    match written {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => Ok(other?),
    }
}

/// Writes a line.
pub(crate) fn line(line: &str) -> anyhow::Result<()> {
    text(&format!("{line}\n"))
}

/// Writes a value as readable JSON.
pub(crate) fn json(value: &impl Serialize) -> anyhow::Result<()> {
    line(&serde_json::to_string_pretty(value)?)
}

/// Says something that is neither a result nor an error.
pub(crate) fn note(note: &str) {
    // Nothing to do: who closed the error output does not want to know.
    let _ = writeln!(io::stderr(), "dtloop: {note}");
}

/// Shows an error with its causes.
pub(crate) fn error(error: &anyhow::Error) {
    note(&chain(error));
}

/// An error with its causes, each once.
pub(crate) fn chain(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1) {
        let cause = cause.to_string();
        if !text.contains(&cause) {
            text = format!("{}: {cause}", text.trim_end_matches('.'));
        }
    }
    text
}

/// Lines up columns; the last one is not padded. Columns in `right` are aligned to the right.
pub(crate) fn table(rows: &[Vec<String>], right: &[usize]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (column, cell) in row.iter().enumerate() {
            let pad = " ".repeat(widths[column] - cell.chars().count());
            if column > 0 {
                line.push_str("  ");
            }
            if right.contains(&column) {
                line = line + &pad + cell;
            } else {
                line = line + cell + &pad;
            }
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// "1 record", "2 records".
pub(crate) fn count(number: u64, what: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{number} {what}{plural}")
}

/// A row of a [`table`].
pub(crate) fn row<const N: usize>(cells: [&str; N]) -> Vec<String> {
    cells.map(str::to_owned).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = [
            row(["NAME", "SIZE", "NOTE"]),
            row(["a", "10 KiB", ""]),
            row(["längst", "1", "x y"]),
        ];
        let expected = "\
NAME      SIZE  NOTE
a       10 KiB
längst       1  x y
";
        assert_eq!(table(&rows, &[1]), expected);
        assert_eq!(table(&[], &[]), "");
    }
}
