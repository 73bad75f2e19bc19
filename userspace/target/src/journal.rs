// SPDX-License-Identifier: GPL-2.0-only

//! The journal of a set: segment files, written in batches. Layout: `dtloop_core::journal`.
//!
//! Segments whose records are all durable in the volumes are used again under a new number; a
//! journal that has reached its size waits for that, and meanwhile nothing is read from the
//! source. Sealed segments with an index, kept for recovery to any point in time, will be taken
//! out of this circulation.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{self, IoSlice};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use dtloop_core::journal::{
    BATCH_HEADER_BYTES, BLOCK_BYTES, BatchHeader, SEGMENT_HEADER_BYTES, SegmentHeader, batch_bytes,
};
use dtloop_proto::Uuid;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::uio::pwritev;
use serde::{Deserialize, Serialize};

use crate::config::JournalConfig;
use dtloop_store::sync_dir;

/// Most pieces of one write; the kernel's limit is 1024.
const PIECES_MAX: usize = 1000;

/// What fills the last block of a batch.
static PADDING: [u8; 4096] = [0; 4096];
const _: () = assert!(PADDING.len() as u64 == BLOCK_BYTES);

/// A place in the journal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Position {
    /// Segment number; 0: before the first.
    pub segment: u64,
    /// Offset in the segment.
    pub offset: u64,
}

/// Why nothing could be appended.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The file system.
    #[error("Journal {} cannot be written", dir.display())]
    Io {
        /// Where.
        dir: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The program ends while it waited for room.
    #[error("The program ends")]
    Stopped,
}

/// How far the volumes are, shared with the applier.
#[derive(Debug, Default)]
pub struct Horizon {
    inner: Mutex<HorizonState>,
    moved: Condvar,
}

#[derive(Debug, Default)]
struct HorizonState {
    checkpoint: Position,
    wanted: bool,
    stopped: bool,
}

impl Horizon {
    fn lock(&self) -> MutexGuard<'_, HorizonState> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Everything before this place is durable in the volumes.
    pub fn advance(&self, checkpoint: Position) {
        let mut state = self.lock();
        state.checkpoint = checkpoint;
        state.wanted = false;
        self.moved.notify_all();
    }

    /// Whether the journal waits for a checkpoint.
    #[must_use]
    pub fn is_wanted(&self) -> bool {
        self.lock().wanted
    }

    /// Nobody shall wait any longer.
    pub fn stop(&self) {
        self.lock().stopped = true;
        self.moved.notify_all();
    }

    fn checkpoint(&self) -> Position {
        self.lock().checkpoint
    }

    fn wait_beyond(&self, segment: u64) -> Result<Position, JournalError> {
        let mut state = self.lock();
        while state.checkpoint.segment <= segment {
            if state.stopped {
                return Err(JournalError::Stopped);
            }
            state.wanted = true;
            state = self
                .moved
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        Ok(state.checkpoint)
    }
}

/// What belongs to a batch besides its frames.
#[derive(Clone, Copy, Debug)]
pub struct BatchInfo {
    /// Number of frames.
    pub frames: u32,
    /// CRC-32 of their headers.
    pub digest: u32,
    /// Record expected before.
    pub first_seq: u64,
    /// Record expected behind.
    pub next_seq: u64,
}

struct Segment {
    file: File,
    number: u64,
    offset: u64,
}

/// The journal of a set, to be appended to.
pub struct Journal {
    dir: PathBuf,
    config: JournalConfig,
    source_id: Uuid,
    horizon: Arc<Horizon>,
    current: Option<Segment>,
    last_number: u64,
    /// Segments in use, oldest first.
    live: VecDeque<u64>,
    /// Files to be used again.
    spare: Vec<PathBuf>,
}

fn segment_path(dir: &Path, number: u64) -> PathBuf {
    dir.join(format!("{number:016}.seg"))
}

/// Numbers of the segment files in a directory, ascending.
fn segment_numbers(dir: &Path) -> io::Result<Vec<u64>> {
    let mut numbers = vec![];
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name();
        let number = name
            .to_str()
            .and_then(|name| name.strip_suffix(".seg"))
            .and_then(|name| name.parse::<u64>().ok());
        numbers.extend(number);
    }
    numbers.sort_unstable();
    Ok(numbers)
}

fn write_all_vectored_at(
    file: &File,
    mut pieces: &mut [IoSlice<'_>],
    mut offset: u64,
) -> io::Result<()> {
    while !pieces.is_empty() {
        let count = pieces.len().min(PIECES_MAX);
        let at = i64::try_from(offset).map_err(io::Error::other)?;
        match pwritev(file, &pieces[..count], at) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => {
                offset += written as u64;
                IoSlice::advance_slices(&mut pieces, written);
            }
            Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

impl Journal {
    /// Opens a journal whose content has all been replayed: every file in it can be used again.
    ///
    /// # Errors
    ///
    /// Those of the file system.
    pub fn open(
        dir: &Path,
        config: JournalConfig,
        source_id: Uuid,
        horizon: Arc<Horizon>,
    ) -> io::Result<Self> {
        let numbers = segment_numbers(dir)?;
        let last_number = numbers
            .last()
            .copied()
            .unwrap_or(0)
            .max(horizon.checkpoint().segment);
        let spare = numbers
            .into_iter()
            .map(|number| segment_path(dir, number))
            .collect();
        let (live, current) = (VecDeque::new(), None);
        Ok(Self {
            dir: dir.to_owned(),
            config,
            source_id,
            horizon,
            current,
            last_number,
            live,
            spare,
        })
    }

    /// Appends frames as one batch and makes it durable. Returns the place behind it.
    ///
    /// # Errors
    ///
    /// Those of the file system; the batch counts as not written then.
    pub fn append(
        &mut self,
        frames: &[&[u8]],
        info: BatchInfo,
        stream_uuid: Uuid,
    ) -> Result<Position, JournalError> {
        let bytes: usize = frames.iter().map(|frames| frames.len()).sum();
        let total = batch_bytes(bytes as u64);
        let room = |segment: &Segment| segment.offset + total <= self.config.segment_size.0;
        if !self.current.as_ref().is_some_and(room) {
            self.next_segment(info.first_seq, stream_uuid)?;
        }
        let dir = &self.dir;
        let failed = |source| JournalError::Io {
            dir: dir.clone(),
            source,
        };
        let Some(segment) = &mut self.current else {
            return Err(failed(io::ErrorKind::NotFound.into()));
        };
        let header = BatchHeader {
            segment: segment.number,
            offset: segment.offset,
            bytes: u32::try_from(bytes).map_err(|error| failed(io::Error::other(error)))?,
            frames: info.frames,
            digest: info.digest,
            first_seq: info.first_seq,
            next_seq: info.next_seq,
        }
        .pack();
        let padding = usize::try_from(total).unwrap_or(usize::MAX) - BATCH_HEADER_BYTES - bytes;
        let mut pieces = Vec::with_capacity(frames.len() + 2);
        pieces.push(IoSlice::new(&header));
        pieces.extend(frames.iter().map(|frames| IoSlice::new(frames)));
        pieces.push(IoSlice::new(&PADDING[..padding]));
        write_all_vectored_at(&segment.file, &mut pieces, segment.offset).map_err(failed)?;
        segment.file.sync_data().map_err(failed)?;
        segment.offset += total;
        Ok(Position {
            segment: segment.number,
            offset: segment.offset,
        })
    }

    /// Bytes in use.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.live.len() as u64 * self.config.segment_size.0
    }

    fn next_segment(&mut self, first_seq: u64, stream_uuid: Uuid) -> Result<(), JournalError> {
        self.free(self.horizon.checkpoint());
        let most = (self.config.size.0 / self.config.segment_size.0).max(2);
        if self.live.len() as u64 >= most {
            tracing::info!(
                "Journal {} is full; it waits for the volumes.",
                self.dir.display()
            );
            let oldest = self.live.front().copied().unwrap_or(0);
            let checkpoint = self.horizon.wait_beyond(oldest)?;
            self.free(checkpoint);
        }
        let (dir, number) = (self.dir.clone(), self.last_number + 1);
        self.make_segment(number, first_seq, stream_uuid)
            .map_err(|source| JournalError::Io { dir, source })?;
        self.last_number = number;
        self.live.push_back(number);
        Ok(())
    }

    fn free(&mut self, checkpoint: Position) {
        while self
            .live
            .front()
            .is_some_and(|number| *number < checkpoint.segment)
        {
            if let Some(number) = self.live.pop_front() {
                self.spare.push(segment_path(&self.dir, number));
            }
        }
    }

    fn make_segment(&mut self, number: u64, first_seq: u64, stream_uuid: Uuid) -> io::Result<()> {
        let path = segment_path(&self.dir, number);
        let bytes = self.config.segment_size.0;
        if let Some(spare) = self.spare.pop() {
            fs::rename(spare, &path)?;
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)?;
        if file.metadata()?.len() != bytes {
            file.set_len(bytes)?;
            let length = i64::try_from(bytes).map_err(io::Error::other)?;
            // Where the file system cannot preallocate, space is taken as it is written.
            let _ = fallocate(&file, FallocateFlags::empty(), 0, length);
        }
        let source_id = self.source_id;
        let header = SegmentHeader {
            number,
            bytes,
            source_id,
            stream_uuid,
            first_seq,
            index_offset: 0,
        };
        file.write_all_at(&header.pack()[..], 0)?;
        file.sync_all()?;
        sync_dir(&self.dir)?;
        self.current = Some(Segment {
            file,
            number,
            offset: SEGMENT_HEADER_BYTES as u64,
        });
        Ok(())
    }
}

/// A batch read back.
pub struct Replayed {
    /// Its header.
    pub header: BatchHeader,
    /// Its frames.
    pub frames: Vec<u8>,
    /// The place behind it.
    pub end: Position,
}

/// Reads batches from a place on, up to the end or to the first torn one.
pub struct Replay {
    dir: PathBuf,
    numbers: VecDeque<u64>,
    source_id: Uuid,
    offset: u64,
    file: Option<(File, u64, u64)>,
}

impl Replay {
    /// Begins at a place.
    ///
    /// # Errors
    ///
    /// Those of the file system.
    pub fn new(dir: &Path, source_id: Uuid, from: Position) -> io::Result<Self> {
        let mut numbers = segment_numbers(dir)?;
        numbers.retain(|number| *number >= from.segment);
        let within = numbers.first() == Some(&from.segment) && from.segment != 0;
        let offset = if within {
            from.offset
        } else {
            SEGMENT_HEADER_BYTES as u64
        };
        let numbers = numbers.into();
        Ok(Self {
            dir: dir.to_owned(),
            numbers,
            source_id,
            offset,
            file: None,
        })
    }

    /// The next batch whose header and digest are right; its frames are still to be checked.
    ///
    /// # Errors
    ///
    /// Those of the file system.
    pub fn next_batch(&mut self) -> io::Result<Option<Replayed>> {
        loop {
            if self.file.is_none() && !self.open_next()? {
                return Ok(None);
            }
            let Some((file, number, bytes)) = &self.file else {
                return Ok(None);
            };
            if let Some(batch) = read_batch(file, *number, self.offset, *bytes)? {
                self.offset = batch.end.offset;
                return Ok(Some(batch));
            }
            self.file = None;
            self.offset = SEGMENT_HEADER_BYTES as u64;
        }
    }

    fn open_next(&mut self) -> io::Result<bool> {
        let Some(number) = self.numbers.pop_front() else {
            return Ok(false);
        };
        let path = segment_path(&self.dir, number);
        let file = File::open(&path)?;
        let mut header = [0; SEGMENT_HEADER_BYTES];
        let parsed = match file.read_exact_at(&mut header, 0) {
            Ok(()) => SegmentHeader::parse(&header).map_err(|error| error.to_string()),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                Err("it is cut short".to_owned())
            }
            Err(error) => return Err(error),
        };
        match parsed {
            Ok(header) if header.number == number && header.source_id == self.source_id => {
                self.file = Some((file, number, header.bytes));
                Ok(true)
            }
            Ok(_) => Ok(false),
            Err(reason) => {
                tracing::warn!(
                    "Journal segment {} was not begun: {reason}.",
                    path.display()
                );
                Ok(false)
            }
        }
    }
}

fn read_batch(file: &File, segment: u64, offset: u64, bytes: u64) -> io::Result<Option<Replayed>> {
    let mut header = [0; BATCH_HEADER_BYTES];
    if offset + BATCH_HEADER_BYTES as u64 > bytes {
        return Ok(None);
    }
    file.read_exact_at(&mut header, offset)?;
    let Some(header) = BatchHeader::parse(&header, segment, offset) else {
        return Ok(None);
    };
    let total = batch_bytes(u64::from(header.bytes));
    if offset + total > bytes {
        return Ok(None);
    }
    let mut frames = vec![0; header.bytes as usize];
    file.read_exact_at(&mut frames, offset + BATCH_HEADER_BYTES as u64)?;
    Ok(Some(Replayed {
        header,
        frames,
        end: Position {
            segment,
            offset: offset + total,
        },
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Size;

    const SOURCE: Uuid = Uuid([1; 16]);

    fn config() -> JournalConfig {
        JournalConfig {
            size: Size(256 << 10),
            segment_size: Size(64 << 10),
        }
    }

    fn info(first_seq: u64) -> BatchInfo {
        BatchInfo {
            frames: 1,
            digest: 0,
            first_seq,
            next_seq: first_seq + 1,
        }
    }

    fn open(dir: &Path, horizon: &Arc<Horizon>) -> Journal {
        Journal::open(dir, config(), SOURCE, Arc::clone(horizon)).unwrap()
    }

    fn sequence(dir: &Path, from: Position) -> Vec<u64> {
        let mut replay = Replay::new(dir, SOURCE, from).unwrap();
        std::iter::from_fn(|| replay.next_batch().unwrap())
            .map(|batch| batch.header.first_seq)
            .collect()
    }

    #[test]
    fn batches_come_back_in_order_across_segments() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = open(dir.path(), &Arc::default());
        let mut places = vec![];
        for seq in 1..=9 {
            places.push(
                journal
                    .append(&[&[7; 9000], &[8; 9000]], info(seq), Uuid::NONE)
                    .unwrap(),
            );
        }
        assert_eq!(places[8].segment, 3);
        assert_eq!(
            sequence(dir.path(), Position::default()),
            (1..=9).collect::<Vec<_>>()
        );
        assert_eq!(sequence(dir.path(), places[4]), (6..=9).collect::<Vec<_>>());
    }

    #[test]
    fn files_used_again_show_nothing_of_their_past() {
        let dir = tempfile::tempdir().unwrap();
        let horizon = Arc::default();
        let mut journal = open(dir.path(), &horizon);
        let mut place = Position::default();
        for seq in 1..=40 {
            place = journal
                .append(&[&[7; 9000], &[8; 9000]], info(seq), Uuid::NONE)
                .unwrap();
            horizon.advance(place);
        }
        assert!(fs::read_dir(dir.path()).unwrap().count() <= 3);
        assert!(sequence(dir.path(), place).is_empty());
        let mut journal = open(dir.path(), &horizon);
        let reopened = journal.append(&[&[1; 100]], info(41), Uuid::NONE).unwrap();
        assert!(reopened.segment > place.segment);
        assert_eq!(sequence(dir.path(), place), [41]);
    }

    #[test]
    fn a_full_journal_waits_for_the_volumes() {
        let dir = tempfile::tempdir().unwrap();
        let horizon = Arc::<Horizon>::default();
        let mut journal = open(dir.path(), &horizon);
        let other = Arc::clone(&horizon);
        let waiter = std::thread::spawn(move || {
            for seq in 1..=13 {
                journal.append(&[&[7; 18000]], info(seq), Uuid::NONE)?;
            }
            Ok::<_, JournalError>(journal)
        });
        while !other.is_wanted() {
            std::thread::yield_now();
        }
        horizon.advance(Position {
            segment: 3,
            offset: 4096,
        });
        let mut journal = waiter.join().unwrap().unwrap();
        horizon.stop();
        let mut append = || journal.append(&[&[7; 60000]], info(14), Uuid::NONE);
        assert!(append().is_ok(), "segment 2 was free as well");
        assert!(matches!(append(), Err(JournalError::Stopped)));
    }
}
