// SPDX-License-Identifier: GPL-2.0-only

//! Which loop number an entry with `auto` had last: it gets the same again, if that is free.
//!
//! A text file with a line for each, `NUMBER OFFSET DEVICE`. What cannot be read of it is as good as not there: an entry then
//! gets the first free number.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::{fs, io};

use super::Entry;
use super::text::{escape, unescape};

/// Where the file is unless somebody says otherwise.
pub const NUMBERS_PATH: &str = "/var/lib/dtloop/loop-numbers";

/// The numbers, by device and offset.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Numbers {
    path: PathBuf,
    of: BTreeMap<(String, u64), u32>,
}

fn key(entry: &Entry) -> (String, u64) {
    (entry.device.to_string(), entry.options.offset)
}

impl Numbers {
    /// Reads them.
    #[must_use]
    pub fn read(path: &Path) -> Self {
        let text = fs::read_to_string(path).unwrap_or_default();
        let line = |line: &str| {
            let mut fields = line.split_ascii_whitespace();
            let number = fields.next()?.parse().ok()?;
            let offset = fields.next()?.parse().ok()?;
            Some(((unescape(fields.next()?), offset), number))
        };
        Self {
            path: path.to_owned(),
            of: text.lines().filter_map(line).collect(),
        }
    }

    /// The number that an entry had last.
    #[must_use]
    pub fn of(&self, entry: &Entry) -> Option<u32> {
        self.of.get(&key(entry)).copied()
    }

    /// Notes the number that an entry has now. Nothing is written when it had it before.
    ///
    /// # Errors
    ///
    /// If the file cannot be written: the entry may get another number next time.
    pub fn note(&mut self, entry: &Entry, number: u32) -> io::Result<()> {
        if self.of.insert(key(entry), number) == Some(number) {
            return Ok(());
        }
        // The number was another entry's before.
        let own = key(entry);
        self.of.retain(|key, of| *key == own || *of != number);
        let line = |((device, offset), number): (&(String, u64), &u32)| {
            format!("{number} {offset} {}\n", escape(device))
        };
        let text: String = self.of.iter().map(line).collect();
        let part = self.path.with_extension("part");
        if let Some(dir) = self.path.parent() {
            fs::create_dir_all(dir)?;
        }
        fs::write(&part, text)?;
        fs::File::open(&part)?.sync_all()?;
        fs::rename(&part, &self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entries::text::Lines;

    fn entry(line: &str) -> Entry {
        Lines::new(line.as_bytes()).entries().0.remove(0).entry
    }

    #[test]
    fn numbers_are_remembered_and_belong_to_one_entry() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state/loop-numbers");
        let (one, two) = (entry("LABEL=a\\040b"), entry("LABEL=a\\040b - offset=1M"));
        let mut numbers = Numbers::read(&path);
        assert_eq!(numbers.of(&one), None);
        numbers.note(&one, 100).unwrap();
        numbers.note(&two, 101).unwrap();
        let mut again = Numbers::read(&path);
        assert_eq!((again.of(&one), again.of(&two)), (Some(100), Some(101)));
        again.note(&one, 101).unwrap();
        let again = Numbers::read(&path);
        assert_eq!((again.of(&one), again.of(&two)), (Some(101), None));
        fs::write(&path, "nonsense\n7\n5 0 LABEL=a\\040b\n").unwrap();
        assert_eq!(Numbers::read(&path).of(&one), Some(5));
    }
}
