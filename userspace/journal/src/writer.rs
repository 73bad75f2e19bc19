// SPDX-License-Identifier: GPL-2.0-only

//! Appending to a journal.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use dtloop_disk::{Disk, DiskFile};
use dtloop_proto::Uuid;

use crate::layout::{
    BATCH_HEADER_BYTES, BLOCK_BYTES, BatchHeader, SEGMENT_HEADER_BYTES, SegmentHeader, batch_bytes,
};
use crate::{AppendError, BatchInfo, Options, Position, segment_numbers, segment_path};

/// What fills the last block of a batch.
static PADDING: [u8; 4096] = [0; 4096];
const _: () = assert!(PADDING.len() as u64 == BLOCK_BYTES);

/// The segment that is appended to.
struct Segment {
    file: Arc<dyn DiskFile>,
    number: u64,
    salt: u64,
    /// Length of the file in bytes.
    bytes: u64,
    /// Where the next batch begins.
    end: u64,
    /// Everything before it is durable. It is `end` when nothing is to be synced.
    durable: u64,
    /// Behind `durable` there may be something that was never appended, as far as anybody was told.
    spoilt: bool,
}

/// A journal to be appended to. See the documentation of the crate.
pub struct Journal {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    options: Options,
    current: Option<Segment>,
    last_number: u64,
    /// Segments in use, oldest first.
    live: VecDeque<u64>,
    /// Files to be used again.
    spare: Vec<PathBuf>,
}

impl Segment {
    /// Makes everything behind `durable` zero, so that nothing there can be taken for a batch.
    fn cut(&mut self) -> io::Result<()> {
        self.spoilt = true;
        self.end = self.durable;
        let rest = self.bytes.saturating_sub(self.durable);
        self.file.zero(self.durable, rest)?;
        self.file.allocate(self.durable, rest)?;
        self.file.sync()?;
        self.spoilt = false;
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        if self.spoilt {
            return self.cut();
        }
        if self.durable == self.end {
            return Ok(());
        }
        if let Err(error) = self.file.sync() {
            self.spoilt = true;
            self.end = self.durable;
            return Err(error);
        }
        self.durable = self.end;
        Ok(())
    }

    fn write(
        &mut self,
        header: &[u8],
        frames: &[&[u8]],
        padding: usize,
        total: u64,
    ) -> io::Result<()> {
        let mut pieces = Vec::with_capacity(frames.len() + 2);
        pieces.push(IoSlice::new(header));
        pieces.extend(frames.iter().map(|frames| IoSlice::new(frames)));
        pieces.push(IoSlice::new(&PADDING[..padding]));
        if let Err(error) = self.file.write_at(&mut pieces, self.end) {
            self.spoilt = true;
            self.end = self.durable;
            return Err(error);
        }
        self.end += total;
        Ok(())
    }

    fn place(&self, offset: u64) -> Position {
        Position {
            segment: self.number,
            offset,
        }
    }
}

/// Writes a range as it is. What was read may be in memory only, and after an fdatasync that failed another one does
/// nothing for it: the kernel takes pages that it could not write for clean. Only the last segment needs this, the others
/// were made durable when they were left.
fn write_again(file: &dyn DiskFile, start: u64, end: u64) -> io::Result<()> {
    let mut at = start;
    while at < end {
        let length = (end - at).min(1 << 20);
        let mut data = vec![0; usize::try_from(length).unwrap_or(1 << 20)];
        file.read_at(&mut data, at)?;
        file.write_at(&mut [IoSlice::new(&data)], at)?;
        at += length;
    }
    Ok(())
}

impl Journal {
    /// Opens the journal in that directory, which is made if there is none. What is between `from` and `end` stays;
    /// what is before may be used again, and what is behind is cut off for good. `end` is where the last whole batch ended
    /// that a [`Reader`](crate::Reader) gave.
    ///
    /// # Errors
    ///
    /// Those of the file system.
    pub fn open(
        disk: Arc<dyn Disk>,
        dir: &Path,
        options: Options,
        from: Position,
        end: Position,
    ) -> io::Result<Self> {
        disk.make_dir(dir)?;
        let numbers = segment_numbers(&*disk, dir)?;
        let last_number = numbers.last().copied().unwrap_or(0).max(end.segment);
        let (mut live, mut spare) = (VecDeque::new(), vec![]);
        for number in numbers {
            let path = segment_path(dir, number);
            if number > end.segment {
                // A torn batch in it would be found before what is appended from now on.
                disk.remove(&path)?;
            } else if number >= from.segment {
                live.push_back(number);
            } else {
                spare.push(path);
            }
        }
        disk.sync_dir(dir)?;
        let mut journal = Self {
            spare,
            dir: dir.to_owned(),
            disk,
            options,
            current: None,
            last_number,
            live,
        };
        journal.remove_surplus()?;
        for number in journal.live.clone() {
            if number == end.segment {
                let file = journal.disk.open(&segment_path(dir, number), false)?;
                let within = number == from.segment;
                let start = if within { from.offset } else { 0 };
                write_again(&*file, start, end.offset)?;
                journal.go_on_in(file, number, end.offset)?;
            }
        }
        Ok(journal)
    }

    /// Goes on behind `end` in a segment that was begun in an earlier life.
    fn go_on_in(&mut self, file: Arc<dyn DiskFile>, number: u64, end: u64) -> io::Result<()> {
        let mut header = [0; SEGMENT_HEADER_BYTES];
        file.read_at(&mut header, 0)?;
        let Ok(header) = SegmentHeader::parse(&header) else {
            return Ok(());
        };
        let mut segment = Segment {
            file,
            number,
            salt: header.salt,
            bytes: header.bytes,
            end,
            durable: end,
            spoilt: true,
        };
        segment.cut()?;
        self.current = Some(segment);
        Ok(())
    }

    /// A journal that was configured smaller gives back what it no longer uses.
    fn remove_surplus(&mut self) -> io::Result<()> {
        while (self.live.len() + self.spare.len()) as u64 > self.segments_max() {
            let Some(path) = self.spare.pop() else { break };
            self.disk.remove(&path)?;
        }
        Ok(())
    }

    fn segments_max(&self) -> u64 {
        (self.options.bytes / self.options.segment_bytes).max(2)
    }

    /// Appends frames as one batch. Returns the place behind it. It is not durable yet.
    ///
    /// # Errors
    ///
    /// See [`AppendError`], and the documentation of the crate.
    pub fn append(
        &mut self,
        frames: &[&[u8]],
        info: BatchInfo,
        stream_uuid: Uuid,
    ) -> Result<Position, AppendError> {
        let bytes: usize = frames.iter().map(|frames| frames.len()).sum();
        let total = batch_bytes(bytes as u64);
        self.make_room(total, info.first_seq, stream_uuid)?;
        let dir = &self.dir;
        let failed = |source| AppendError::Io {
            dir: dir.clone(),
            source,
        };
        let Some(segment) = &mut self.current else {
            return Err(failed(io::ErrorKind::NotFound.into()));
        };
        let header = BatchHeader {
            segment: segment.number,
            offset: segment.end,
            bytes: u32::try_from(bytes).map_err(|error| failed(io::Error::other(error)))?,
            frames: info.frames,
            digest: info.digest,
            first_seq: info.first_seq,
            next_seq: info.next_seq,
            salt: segment.salt,
        }
        .pack();
        let padding = usize::try_from(total).unwrap_or(usize::MAX) - BATCH_HEADER_BYTES - bytes;
        segment
            .write(&header, frames, padding, total)
            .map_err(failed)?;
        Ok(segment.place(segment.end))
    }

    /// Makes everything appended durable. After an error, it is durable with this that what counts as not written is not
    /// there.
    ///
    /// # Errors
    ///
    /// [`AppendError::Io`]; see the documentation of the crate.
    pub fn sync(&mut self) -> Result<(), AppendError> {
        let Some(segment) = &mut self.current else {
            return Ok(());
        };
        segment.sync().map_err(|source| AppendError::Io {
            dir: self.dir.clone(),
            source,
        })
    }

    /// Everything before this place is needed no more.
    pub fn release(&mut self, place: Position) {
        while let Some(&number) = self.live.front() {
            if number >= place.segment {
                break;
            }
            self.live.pop_front();
            self.spare.push(segment_path(&self.dir, number));
        }
    }

    /// The place behind the last batch; the default if nothing was appended and there was nothing to go on behind.
    #[must_use]
    pub fn end(&self) -> Position {
        let segment = self.current.as_ref();
        segment.map_or_else(Position::default, |segment| segment.place(segment.end))
    }

    /// The place behind the last durable batch.
    #[must_use]
    pub fn durable(&self) -> Position {
        let segment = self.current.as_ref();
        segment.map_or_else(Position::default, |segment| segment.place(segment.durable))
    }

    /// Bytes of all segments in use.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.live.len() as u64 * self.options.segment_bytes
    }

    /// The segment that has to be released before one more can be made; `None` while there is room.
    #[must_use]
    pub fn waits_for(&self) -> Option<u64> {
        let full = self.live.len() as u64 >= self.segments_max();
        self.live.front().copied().filter(|_| full)
    }

    /// Sees to it that the current segment has room.
    fn make_room(
        &mut self,
        total: u64,
        first_seq: u64,
        stream_uuid: Uuid,
    ) -> Result<(), AppendError> {
        let (dir, bytes) = (self.dir.clone(), self.bytes());
        let failed = |source| AppendError::Io {
            dir: dir.clone(),
            source,
        };
        if SEGMENT_HEADER_BYTES as u64 + total > self.options.segment_bytes {
            let text = format!("a batch of {total} bytes does not fit into a segment");
            return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, text)));
        }
        if let Some(segment) = &mut self.current {
            if segment.spoilt {
                segment.cut().map_err(failed)?;
            }
            if segment.end + total <= segment.bytes {
                return Ok(());
            }
            // A segment that was left is durable to its end: only the current one is ever cut.
            segment.sync().map_err(failed)?;
        }
        if self.waits_for().is_some() {
            return Err(AppendError::Full { dir, bytes });
        }
        if self.spare.is_empty() {
            let (min_free, needed) = (self.options.min_free, self.options.segment_bytes);
            let free = self.disk.space(&self.dir).map_err(failed)?.free;
            if min_free > 0 && free < min_free.saturating_add(needed) {
                let dir = dir.clone();
                return Err(AppendError::Space {
                    dir,
                    free,
                    min_free,
                });
            }
        }
        let number = self.last_number + 1;
        let made = self.make_segment(number, first_seq, stream_uuid);
        self.current = Some(made.map_err(failed)?);
        self.last_number = number;
        self.live.push_back(number);
        Ok(())
    }

    fn make_segment(
        &mut self,
        number: u64,
        first_seq: u64,
        stream_uuid: Uuid,
    ) -> io::Result<Segment> {
        let path = segment_path(&self.dir, number);
        // A file that was begun under this number before is a spare one, too, and the one to be taken.
        if let Some(begun) = self.spare.iter().position(|spare| *spare == path) {
            self.spare.remove(begun);
        } else if let Some(spare) = self.spare.last() {
            self.disk.rename(spare, &path)?;
            self.spare.pop();
        }
        let made = self.begin_segment(&path, number, first_seq, stream_uuid);
        if made.is_err() && self.disk.open(&path, false).is_ok() {
            // It is tried again with the same file, which has the same number then.
            self.spare.push(path);
        }
        made
    }

    fn begin_segment(
        &self,
        path: &Path,
        number: u64,
        first_seq: u64,
        stream_uuid: Uuid,
    ) -> io::Result<Segment> {
        let file = self.disk.open(path, true)?;
        let bytes = self.options.segment_bytes;
        file.allocate(0, bytes)?;
        if file.bytes()? != bytes {
            file.set_bytes(bytes)?;
        }
        let header = SegmentHeader {
            number,
            bytes,
            owner: self.options.owner,
            stream_uuid,
            first_seq,
            index_offset: 0,
            salt: self.options.salt,
        };
        file.write_at(&mut [IoSlice::new(&header.pack()[..])], 0)?;
        file.sync()?;
        self.disk.sync_dir(&self.dir)?;
        let end = SEGMENT_HEADER_BYTES as u64;
        Ok(Segment {
            file,
            number,
            salt: self.options.salt,
            bytes,
            end,
            durable: end,
            spoilt: false,
        })
    }
}
