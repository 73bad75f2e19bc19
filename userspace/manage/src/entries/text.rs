// SPDX-License-Identifier: GPL-2.0-only

//! The lines of the file. Pure.
//!
//! A line has two or three fields with blanks between them; `#` begins a comment where a field would begin. Blanks and the
//! like inside of a field are written as in fstab: `\040`. What cannot be read is kept as it is.

use super::name::DeviceName;
use super::options::Options;
use super::{Entry, Finding, Severity};
use crate::attach::LoopNumber;

/// The longest file that is taken, in bytes: some thousand entries.
pub const BYTES_MAX: usize = 1 << 20;

/// The file, line by line.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lines {
    /// Each with its end, if it has one.
    lines: Vec<Vec<u8>>,
}

/// An entry, and where it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placed {
    /// Line, from 1 up.
    pub line: usize,
    /// Where each field begins, in characters from 1 up; 1 for one that is not there.
    pub columns: [usize; 3],
    /// It.
    pub entry: Entry,
}

impl Placed {
    /// A finding about one of the fields.
    #[must_use]
    pub fn finding(&self, field: usize, severity: Severity, message: String) -> Finding {
        Finding {
            line: self.line,
            column: self.columns.get(field).copied().unwrap_or(1),
            severity,
            message,
        }
    }
}

impl Lines {
    /// Takes a file apart.
    #[must_use]
    pub fn new(bytes: &[u8]) -> Self {
        Self {
            lines: bytes
                .split_inclusive(|byte| *byte == b'\n')
                .map(<[u8]>::to_vec)
                .collect(),
        }
    }

    /// And together.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        self.lines.concat()
    }

    /// The entries, and what is wrong with the lines that should be some.
    #[must_use]
    pub fn entries(&self) -> (Vec<Placed>, Vec<Finding>) {
        let (mut entries, mut findings) = (Vec::new(), Vec::new());
        for (nth, bytes) in self.lines.iter().enumerate() {
            match parse(nth + 1, bytes) {
                Ok(entry) => entries.extend(entry),
                Err(found) => findings.extend(found),
            }
        }
        (entries, findings)
    }

    /// Number of lines.
    #[must_use]
    pub fn count(&self) -> usize {
        self.lines.len()
    }

    /// Adds an entry at the end.
    pub fn add(&mut self, entry: &Entry) {
        if let Some(last) = self.lines.last_mut() {
            if !last.ends_with(b"\n") {
                last.push(b'\n');
            }
        }
        self.lines.push(format!("{entry}\n").into_bytes());
    }

    /// Removes a line, counted from 1 up.
    pub fn remove(&mut self, line: usize) {
        if (1..=self.lines.len()).contains(&line) {
            self.lines.remove(line - 1);
        }
    }

    /// Writes an entry over a line, counted from 1 up. A comment behind it stays.
    pub fn replace(&mut self, line: usize, entry: &Entry) {
        let Some(bytes) = line.checked_sub(1).and_then(|nth| self.lines.get_mut(nth)) else {
            return;
        };
        let text = String::from_utf8_lossy(bytes).into_owned();
        let comment = fields(&text).1.map(|at| text[at..].trim_end());
        let end = if text.ends_with('\n') { "\n" } else { "" };
        *bytes = match comment {
            Some(comment) => format!("{entry}\t{comment}{end}"),
            None => format!("{entry}{end}"),
        }
        .into_bytes();
    }
}

/// Where the fields of a line are, in bytes; and the comment behind them.
fn fields(line: &str) -> (Vec<std::ops::Range<usize>>, Option<usize>) {
    let (mut found, mut begin) = (Vec::new(), None);
    for (at, c) in line.char_indices() {
        match (c.is_ascii_whitespace(), begin) {
            (false, None) if c == '#' => return (found, Some(at)),
            (false, None) => begin = Some(at),
            (true, Some(from)) => {
                found.push(from..at);
                begin = None;
            }
            _ => {}
        }
    }
    found.extend(begin.map(|from| from..line.len()));
    (found, None)
}

fn parse(line: usize, bytes: &[u8]) -> Result<Option<Placed>, Vec<Finding>> {
    let error = |column: usize, message: String| Finding {
        line,
        column,
        severity: Severity::Error,
        message,
    };
    let text = match std::str::from_utf8(bytes) {
        Ok(text) => text,
        // In a comment it does not matter.
        Err(_) if bytes.trim_ascii_start().starts_with(b"#") => return Ok(None),
        Err(bad) => {
            let good = String::from_utf8_lossy(&bytes[..bad.valid_up_to()]);
            let message = "it is no UTF-8 text; write such a byte as \\ and three octal digits";
            return Err(vec![error(good.chars().count() + 1, message.into())]);
        }
    };
    if let Some(at) = text.find('\0') {
        return Err(vec![error(column(text, at), "there is a zero byte".into())]);
    }
    let (places, _) = fields(text);
    let [device, rest @ ..] = places.as_slice() else {
        return Ok(None);
    };
    let mut findings = Vec::new();
    let name = DeviceName::parse(&unescape(&text[device.clone()]))
        .map_err(|reason| findings.push(error(column(text, device.start), reason)));
    let number = match rest.first() {
        None => Ok(LoopNumber::Auto),
        Some(place) if &text[place.clone()] == "-" => Ok(LoopNumber::Auto),
        Some(place) => text[place.clone()].parse().map_err(|reason| {
            let field = &text[place.clone()];
            let hint = if field.contains('=') {
                "; options come third, behind the loop device"
            } else {
                ""
            };
            let message = format!("{field:?} is no loop device: {reason}{hint}");
            findings.push(error(column(text, place.start), message));
        }),
    };
    let options = match rest.get(1) {
        None => Ok(Options::default()),
        Some(place) => Options::parse(&unescape(&text[place.clone()])).map_err(|bad| {
            for bad in bad {
                let at = (place.start + bad.at).min(place.end);
                findings.push(error(column(text, at), bad.reason));
            }
        }),
    };
    if let Some(extra) = rest.get(2) {
        let message = "there are more than three fields; options have commas between them and no blanks, and a blank inside of a \
             field is written \\040";
        findings.push(error(column(text, extra.start), message.into()));
    }
    match (name, number, options) {
        (Ok(device), Ok(number), Ok(options)) if findings.is_empty() => {
            let at = |nth: usize| places.get(nth).map_or(1, |place| column(text, place.start));
            Ok(Some(Placed {
                line,
                columns: [at(0), at(1), at(2)],
                entry: Entry {
                    device,
                    number,
                    options,
                },
            }))
        }
        _ => Err(findings),
    }
}

/// The character, from 1 up, that a byte of the line belongs to.
fn column(line: &str, at: usize) -> usize {
    line.char_indices()
        .take_while(|(begin, _)| *begin < at)
        .count()
        + 1
}

/// Undoes `\040` for blanks and the like.
#[must_use]
pub fn unescape(text: &str) -> String {
    crate::system::unescape(text)
}

/// Writes what would end a field, begin a comment or an escape in octal digits.
#[must_use]
pub fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for (at, c) in text.char_indices() {
        let is_special = c.is_ascii_whitespace() || c.is_control() || c == '\\';
        if c.is_ascii() && (is_special || (at == 0 && c == '#')) {
            escaped += &format!("\\{:03o}", u32::from(c));
        } else {
            escaped.push(c);
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const FILE: &str = "\
# devices of the database
/dev/vdb\t/dev/loop1\tset=db,volume=pgdata  # the data

UUID=0f-1 auto
  LABEL=my\\040disk  7   offset=1M
/dev/vdc
";

    fn findings(text: &str) -> Vec<String> {
        let found = Lines::new(text.as_bytes()).entries().1;
        found.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn entries_are_read_with_their_places() {
        let lines = Lines::new(FILE.as_bytes());
        let (entries, findings) = lines.entries();
        assert_eq!(findings, []);
        let places: Vec<_> = entries.iter().map(|e| (e.line, e.columns)).collect();
        assert_eq!(
            places,
            [
                (2, [1, 10, 21]),
                (4, [1, 11, 1]),
                (5, [3, 21, 25]),
                (6, [1, 1, 1])
            ]
        );
        assert_eq!(entries[0].entry.number, LoopNumber::Pinned(1));
        assert_eq!(entries[2].entry.device.to_string(), "LABEL=my disk");
        assert_eq!(entries[2].entry.options.offset, 1 << 20);
        assert_eq!(entries[3].entry.number, LoopNumber::Auto);
    }

    #[test]
    fn an_edit_leaves_everything_else_as_it_is() {
        let mut lines = Lines::new(FILE.as_bytes());
        let (entries, _) = lines.entries();
        lines.add(&entries[2].entry);
        let added = format!("{FILE}LABEL=my\\040disk\t/dev/loop7\toffset=1M\n");
        assert_eq!(lines.bytes(), added.as_bytes());
        lines.remove(7);
        assert_eq!(lines.bytes(), FILE.as_bytes());
        lines.remove(4);
        lines.remove(99);
        assert_eq!(
            lines.bytes(),
            FILE.replace("UUID=0f-1 auto\n", "").as_bytes()
        );
        let mut entry = entries[0].entry.clone();
        entry.options.read_only = true;
        lines.replace(2, &entry);
        let text = String::from_utf8(lines.bytes()).unwrap();
        assert!(text.contains("/dev/vdb\t/dev/loop1\tset=db,volume=pgdata,ro\t# the data\n"));
        let mut open = Lines::new(b"# no end");
        open.add(&entry);
        assert!(open.bytes().starts_with(b"# no end\n/dev/vdb"));
    }

    #[test]
    fn what_is_wrong_is_said_with_line_and_column() {
        let told = findings("\n/dev/vdb loop one,two\n");
        assert_eq!(told.len(), 3);
        assert!(told[0].starts_with("2:10: \"loop\" is no loop device: give a number"));
        assert!(told[1].starts_with("2:15: the option \"one\" is unknown"));
        assert!(told[2].starts_with("2:19: the option \"two\""));
        let told = findings("/dev/vdb offset=1M");
        assert!(told[0].contains("options come third"), "{told:?}");
        let told = findings("/dev/vdb auto ro x");
        assert!(told[0].starts_with("1:18: there are more than three"));
        let told = findings("vdb");
        assert!(told[0].starts_with("1:1: "), "{told:?}");
        let (_, told) = Lines::new(b"/dev/\xff").entries();
        assert_eq!(told[0].column, 6);
        let (entries, told) = Lines::new(b"# caf\xe9\n/dev/vdb\0\n").entries();
        assert!(entries.is_empty() && told.len() == 1 && told[0].line == 2);
    }

    proptest! {
        #[test]
        fn bytes_come_back_and_nothing_panics(bytes: Vec<u8>) {
            let lines = Lines::new(&bytes);
            prop_assert_eq!(lines.bytes(), bytes);
            let _ = lines.entries();
        }

        #[test]
        fn what_is_written_is_read(text in "[ -~äöü\t]{1,30}") {
            let escaped = escape(&text);
            prop_assert!(!escaped.contains([' ', '\t']) && !escaped.starts_with('#'));
            prop_assert_eq!(unescape(&escaped), text);
        }
    }
}
