// SPDX-License-Identifier: GPL-2.0-only

//! Logs of the device-mapper target `log-writes`, as the kernel's documentation describes them: every write of a device,
//! in the order in which it could be relied on, with the flushes between them.
//!
//! ```text
//!   sector 0   magic u64, version u64, number of entries u64, sector size u32
//!   then       sector u64, number of sectors u64, flags u64, bytes of inline data u64; the inline data (a mark's name)
//!              in the same sector; the data written, unless it is a discard, in the sectors behind it
//! ```

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::direct::{Aligned, open_read};

const MAGIC: u64 = 0x006a_7366_7773_6872;
const VERSION: u64 = 1;
const ENTRY_BYTES: usize = 32;

/// Longest entry that is read at once.
const DATA_BYTES_MAX: usize = 32 << 20;

/// Sector sizes there are.
const SECTOR_BYTES: std::ops::RangeInclusive<usize> = 512..=4096;

const FLUSH: u64 = 1;
const FUA: u64 = 2;
const DISCARD: u64 = 4;
const MARK: u64 = 8;

/// A write, a flush, or a mark.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// First byte of the device.
    pub start: u64,
    /// Length in bytes; of a discard, what it discarded.
    pub bytes: u64,
    /// A flush came before it.
    pub flush: bool,
    /// It was durable when it ended.
    pub fua: bool,
    /// It has no data.
    pub discard: bool,
    /// Name of a mark that a person set.
    pub mark: Option<String>,
}

/// An open log.
#[derive(Debug)]
pub struct WriteLog {
    file: File,
    sector_bytes: usize,
    entries: u64,
    read: u64,
    at: u64,
    buffer: Aligned,
}

fn number(bytes: &[u8], index: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[index * 8..index * 8 + 8]);
    u64::from_le_bytes(word)
}

impl WriteLog {
    /// Opens a log. The kernel writes the number of entries at marks, and at the removal of the device: what came later is
    /// not seen.
    ///
    /// # Errors
    ///
    /// If it cannot be read or is none.
    pub fn open(path: &Path) -> Result<Self> {
        let file = open_read(path)?;
        let mut buffer = Aligned::new(DATA_BYTES_MAX, 4096);
        file.read_exact_at(&mut buffer[..4096], 0)?;
        let head = &buffer[..ENTRY_BYTES];
        ensure!(
            number(head, 0) == MAGIC && number(head, 1) == VERSION,
            "{} is no log of writes",
            path.display()
        );
        let sector_bytes = usize::try_from(number(head, 3) & u64::from(u32::MAX))?;
        ensure!(
            SECTOR_BYTES.contains(&sector_bytes),
            "sectors of {sector_bytes} bytes"
        );
        Ok(Self {
            entries: number(head, 2),
            read: 0,
            at: sector_bytes as u64,
            file,
            sector_bytes,
            buffer,
        })
    }

    /// The next entry with its data.
    ///
    /// # Errors
    ///
    /// If the log cannot be read, or an entry is none.
    pub fn next_entry(&mut self) -> Result<Option<(Entry, &[u8])>> {
        if self.read == self.entries {
            return Ok(None);
        }
        let sector = self.sector_bytes;
        let what = format!("entry {} at {}", self.read, self.at);
        self.file
            .read_exact_at(&mut self.buffer[..sector], self.at)
            .with_context(|| what.clone())?;
        let (entry, data_bytes) = parse(&self.buffer[..sector]).with_context(|| what.clone())?;
        self.read += 1;
        self.at += sector as u64;
        ensure!(
            data_bytes <= DATA_BYTES_MAX,
            "{what} is of {data_bytes} bytes"
        );
        self.file
            .read_exact_at(&mut self.buffer[..data_bytes], self.at)
            .context(what)?;
        self.at += data_bytes as u64;
        Ok(Some((entry, &self.buffer[..data_bytes])))
    }
}

/// Reads the sector of an entry; gives how many bytes of data come behind it, too.
fn parse(sector: &[u8]) -> Result<(Entry, usize)> {
    let sector_bytes = sector.len() as u64;
    let (start, sectors, flags) = (number(sector, 0), number(sector, 1), number(sector, 2));
    let inline = usize::try_from(number(sector, 3))?;
    let bytes = sectors
        .checked_mul(sector_bytes)
        .context("too many sectors")?;
    let mark = if flags & MARK == 0 {
        None
    } else {
        let name = sector.get(ENTRY_BYTES..ENTRY_BYTES + inline);
        Some(String::from_utf8_lossy(name.context("a mark of several sectors")?).into_owned())
    };
    let entry = Entry {
        start: start.checked_mul(sector_bytes).context("too far")?,
        bytes,
        flush: flags & FLUSH != 0,
        fua: flags & FUA != 0,
        discard: flags & DISCARD != 0,
        mark,
    };
    let data = if entry.discard { 0 } else { bytes };
    Ok((entry, usize::try_from(data)?))
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn sector(words: [u64; 4], inline: &[u8]) -> Vec<u8> {
        let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        bytes.extend(inline);
        bytes.resize(512, 0);
        bytes
    }

    #[test]
    fn a_log_is_read() {
        let mut bytes = sector([MAGIC, 1, 4, 512], &[]);
        bytes.extend(sector([8, 2, FUA, 0], &[]));
        bytes.extend([7; 1024]);
        bytes.extend(sector([0, 0, FLUSH, 0], &[]));
        bytes.extend(sector([16, 8, DISCARD, 0], &[]));
        bytes.extend(sector([0, 0, MARK, 4], b"here"));
        bytes.resize(8192, 0);
        let path = std::env::temp_dir().join(format!("dtlog-{}", std::process::id()));
        File::create(&path).unwrap().write_all(&bytes).unwrap();
        let mut log = WriteLog::open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let (entry, data) = log.next_entry().unwrap().unwrap();
        assert!(entry.fua && !entry.flush && entry.start == 4096 && entry.bytes == 1024);
        assert_eq!(data, [7; 1024]);
        let (entry, data) = log.next_entry().unwrap().unwrap();
        assert!(entry.flush && data.is_empty());
        let (entry, data) = log.next_entry().unwrap().unwrap();
        assert!(entry.discard && entry.bytes == 4096 && data.is_empty());
        let (entry, _) = log.next_entry().unwrap().unwrap();
        assert_eq!(entry.mark.as_deref(), Some("here"));
        assert!(log.next_entry().unwrap().is_none());
    }
}
