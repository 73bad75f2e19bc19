// SPDX-License-Identifier: GPL-2.0-only

//! A log of bounded size for people and programs: one JSON object a line, two files.
//!
//! Lines are only ever appended. A file that has grown to the limit becomes `<name>.1`, in place of the one before it; so
//! between one and two limits of the newest lines are there. What was being written at a power cut may be a torn line,
//! which is passed over when the log is read.

use std::io::{self, IoSlice};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use dtloop_disk::{Disk, DiskFile};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Largest size of a file in bytes.
pub const LOG_BYTES_MAX: u64 = 4 << 20;

/// An open log.
pub struct Log {
    disk: Arc<dyn Disk>,
    path: PathBuf,
    file: Arc<dyn DiskFile>,
    bytes: u64,
    bytes_max: u64,
}

impl std::fmt::Debug for Log {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Log")
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}

fn former(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".1");
    name.into()
}

impl Log {
    /// Opens a log, or begins it.
    ///
    /// # Errors
    ///
    /// Those of the file system.
    pub fn open(disk: Arc<dyn Disk>, path: &Path, bytes_max: u64) -> io::Result<Self> {
        let file = disk.open(path, true)?;
        disk.sync_dir(path.parent().unwrap_or(Path::new(".")))?;
        let bytes = file.bytes()?;
        let mut log = Self {
            disk,
            path: path.to_owned(),
            file,
            bytes,
            bytes_max,
        };
        log.end_torn_line()?;
        Ok(log)
    }

    /// A line that was torn gets its end, so that the next one is a line of its own.
    fn end_torn_line(&mut self) -> io::Result<()> {
        let mut last = [b'\n'];
        if self.bytes > 0 {
            self.file.read_at(&mut last, self.bytes - 1)?;
        }
        if last == *b"\n" {
            Ok(())
        } else {
            self.append(b"\n")
        }
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_at(&mut [IoSlice::new(bytes)], self.bytes)?;
        self.bytes += bytes.len() as u64;
        Ok(())
    }

    /// Appends lines. They are durable after [`Log::sync`].
    ///
    /// # Errors
    ///
    /// Those of the file system.
    pub fn write<T: Serialize>(&mut self, lines: &[T]) -> io::Result<()> {
        if self.bytes >= self.bytes_max {
            self.rotate()?;
        }
        let mut text = vec![];
        for line in lines {
            serde_json::to_writer(&mut text, line)?;
            text.push(b'\n');
        }
        self.append(&text)
    }

    fn rotate(&mut self) -> io::Result<()> {
        self.file.sync()?;
        self.disk.rename(&self.path, &former(&self.path))?;
        self.file = self.disk.open(&self.path, true)?;
        self.bytes = 0;
        self.disk
            .sync_dir(self.path.parent().unwrap_or(Path::new(".")))
    }

    /// Makes what was written durable.
    ///
    /// # Errors
    ///
    /// Those of the file system.
    pub fn sync(&self) -> io::Result<()> {
        self.file.sync()
    }

    /// The newest `most` lines of a log, oldest first. A log that does not exist is empty.
    ///
    /// # Errors
    ///
    /// Those of the file system.
    pub fn read<T: DeserializeOwned>(
        disk: &dyn Disk,
        path: &Path,
        most: usize,
    ) -> io::Result<Vec<T>> {
        let mut lines = vec![];
        for path in [former(path), path.to_owned()] {
            let file = match disk.open(&path, false) {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            let mut text = vec![0; usize::try_from(file.bytes()?).map_err(io::Error::other)?];
            file.read_at(&mut text, 0)?;
            let sound = text
                .split(|byte| *byte == b'\n')
                .filter_map(|line| serde_json::from_slice(line).ok());
            lines.extend(sound);
        }
        lines.drain(..lines.len().saturating_sub(most));
        Ok(lines)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dtloop_disk::RealDisk;

    fn open(path: &Path, bytes_max: u64) -> Log {
        Log::open(Arc::new(RealDisk), path, bytes_max).unwrap()
    }

    fn read(path: &Path) -> Vec<u64> {
        Log::read(&RealDisk, path, 1000).unwrap()
    }

    #[test]
    fn the_newest_lines_are_there_and_the_size_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        assert!(read(&path).is_empty());
        let mut log = open(&path, 100);
        for line in 1000..1200_u64 {
            log.write(&[line]).unwrap();
        }
        log.sync().unwrap();
        let lines = read(&path);
        assert!(lines.len() >= 20 && lines.len() <= 41, "{}", lines.len());
        assert_eq!(lines.last(), Some(&1199));
        assert!(lines.windows(2).all(|pair| pair[0] + 1 == pair[1]));
        assert_eq!(
            Log::read::<u64>(&RealDisk, &path, 3).unwrap(),
            [1197, 1198, 1199]
        );
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[test]
    fn a_torn_line_is_passed_over() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        open(&path, 1000).write(&[7]).unwrap();
        let mut text = std::fs::read(&path).unwrap();
        text.extend_from_slice(b"[8, ");
        std::fs::write(&path, text).unwrap();
        let mut log = open(&path, 1000);
        log.write(&[9]).unwrap();
        assert_eq!(read(&path), [7, 9]);
    }
}
