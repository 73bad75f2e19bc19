// SPDX-License-Identifier: GPL-2.0-only

//! Reading a journal.

use std::io::{self, IoSlice};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use dtloop_disk::{Disk, DiskFile};
use dtloop_proto::header::HEADER_BYTES;
use dtloop_proto::record::RECORD_BYTES;
use dtloop_proto::{Decoded, Uuid, decode};

use crate::layout::{
    BATCH_HEADER_BYTES, BatchHeader, SEGMENT_HEADER_BYTES, SegmentHeader, batch_bytes,
};
use crate::{Position, segment_numbers, segment_path};

/// A batch read back.
pub struct Batch {
    /// Its header.
    pub header: BatchHeader,
    /// Its frames.
    pub frames: Vec<u8>,
    /// The place behind it.
    pub end: Position,
}

impl Batch {
    /// Whether its frames are those that were appended: each is whole, and the digest is right. The last batch before a
    /// crash may be torn.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        let (mut at, mut digest) = (0, crc32fast::Hasher::new());
        while at < self.frames.len() {
            let Ok(Decoded::Complete { bytes, .. }) = decode(&self.frames[at..]) else {
                return false;
            };
            digest.update(&self.frames[at..at + HEADER_BYTES]);
            at += bytes;
        }
        digest.finalize() == self.header.digest
    }
}

/// Bytes of the first frame that a [`Glimpse`] holds: header and body of a record.
const GLIMPSE_BYTES: usize = HEADER_BYTES + RECORD_BYTES;

/// A batch of which only the beginning was read; whether it is whole is not known.
pub struct Glimpse {
    /// Its header.
    pub header: BatchHeader,
    /// The beginning of its frames: header and body of the first record.
    pub beginning: Vec<u8>,
    /// The place at which it begins.
    pub at: Position,
    /// The place behind it.
    pub end: Position,
}

/// Reads batches from a place on, across segments, up to the end or to the first one whose header does not count.
///
/// Whoever reads checks what is in a batch ([`Batch::is_whole`], or in its own decoding), and that it begins with the record
/// that it expects: behind a torn batch there can be nothing that was ever acknowledged.
pub struct Reader {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    owner: Uuid,
    at: Position,
    file: Option<(Arc<dyn DiskFile>, SegmentHeader)>,
}

impl Reader {
    /// Begins at a place that was once the end of a batch, or at [`Position::default`] with the first segment there is.
    #[must_use]
    pub fn new(disk: Arc<dyn Disk>, dir: &Path, owner: Uuid, from: Position) -> Self {
        Self {
            disk,
            dir: dir.to_owned(),
            owner,
            at: from,
            file: None,
        }
    }

    /// The place behind the last batch that was given.
    #[must_use]
    pub fn position(&self) -> Position {
        self.at
    }

    /// The next batch whose header is right. `None`: there is none yet; it may be asked again when one was appended.
    ///
    /// # Errors
    ///
    /// Those of the file system.
    pub fn next_batch(&mut self) -> io::Result<Option<Batch>> {
        let batch = self.next(read_batch)?;
        if let Some(batch) = &batch {
            self.at = batch.end;
        }
        Ok(batch)
    }

    /// As [`Reader::next_batch`], but of the frames only the beginning is read.
    ///
    /// # Errors
    ///
    /// Those of the file system.
    pub fn next_glimpse(&mut self) -> io::Result<Option<Glimpse>> {
        let glimpse = self.next(read_glimpse)?;
        if let Some(glimpse) = &glimpse {
            self.at = glimpse.end;
        }
        Ok(glimpse)
    }

    /// Writes everything again that is to be read from here on, as it is, and makes it durable.
    ///
    /// What a program reads that was just started may be in memory only: the one before it was killed before it had made it
    /// durable, or had failed to, after which the kernel takes for clean what the disk does not have. Nothing may be done that
    /// relies on it before this: after a power cut it would be gone, and what was done would stay.
    ///
    /// # Errors
    ///
    /// Those of the file system.
    pub fn harden(mut self) -> io::Result<()> {
        let mut written: Option<(u64, Arc<dyn DiskFile>)> = None;
        while let Some(batch) = self.next_glimpse()? {
            let Some((file, segment)) = &self.file else {
                break;
            };
            if written
                .as_ref()
                .is_none_or(|(number, _)| *number != segment.number)
            {
                if let Some((_, former)) = written.replace((segment.number, Arc::clone(file))) {
                    former.sync()?;
                }
                write_again(&**file, 0, SEGMENT_HEADER_BYTES as u64)?;
            }
            write_again(&**file, batch.at.offset, batch.end.offset - batch.at.offset)?;
        }
        if let Some((_, file)) = written {
            file.sync()?;
            self.disk.sync_dir(&self.dir)?;
        }
        Ok(())
    }

    fn next<T>(&mut self, read: ReadAt<T>) -> io::Result<Option<T>> {
        let mut at = self.at;
        loop {
            if at.segment > 0 && self.open(at.segment)? {
                if let Some((file, segment)) = &self.file {
                    if let Some(found) = read(&**file, segment, at.offset)? {
                        return Ok(Some(found));
                    }
                }
            }
            let numbers = segment_numbers(&*self.disk, &self.dir)?;
            let Some(segment) = numbers.into_iter().find(|number| *number > at.segment) else {
                return Ok(None);
            };
            let offset = SEGMENT_HEADER_BYTES as u64;
            at = Position { segment, offset };
        }
    }

    /// Opens a segment, if it is not. False: it is none of this journal.
    fn open(&mut self, number: u64) -> io::Result<bool> {
        if matches!(&self.file, Some((_, segment)) if segment.number == number) {
            return Ok(true);
        }
        self.file = None;
        let path = segment_path(&self.dir, number);
        let file = match self.disk.open(&path, false) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error),
        };
        let mut header = [0; SEGMENT_HEADER_BYTES];
        let parsed = if read(&*file, &mut header, 0)? {
            SegmentHeader::parse(&header).map_err(|error| error.to_string())
        } else {
            Err("it is cut short".to_owned())
        };
        match parsed {
            Ok(header) if header.number == number && header.owner == self.owner => {
                self.file = Some((file, header));
                Ok(true)
            }
            Ok(_) => Ok(false),
            Err(reason) => {
                let path = path.display();
                tracing::warn!("Journal segment {path} was not begun: {reason}.");
                Ok(false)
            }
        }
    }
}

/// False: the file is shorter, as a crash may leave it before its length was durable.
fn read(file: &dyn DiskFile, data: &mut [u8], offset: u64) -> io::Result<bool> {
    match file.read_at(data, offset) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

fn write_again(file: &dyn DiskFile, offset: u64, bytes: u64) -> io::Result<()> {
    let mut data = vec![0; usize::try_from(bytes).map_err(io::Error::other)?];
    // The last one may lack the padding behind it.
    if read(file, &mut data, offset)? {
        file.write_at(&mut [IoSlice::new(&data)], offset)?;
    }
    Ok(())
}

/// Reads what is at an offset of a segment; `None` if there is nothing that counts.
type ReadAt<T> = fn(&dyn DiskFile, &SegmentHeader, u64) -> io::Result<Option<T>>;

/// The header of a batch and the offset behind it.
fn read_header(
    file: &dyn DiskFile,
    segment: &SegmentHeader,
    offset: u64,
) -> io::Result<Option<(BatchHeader, u64)>> {
    let fits = |bytes: u64| {
        let end = offset.checked_add(bytes);
        end.is_some_and(|end| end <= segment.bytes)
    };
    let mut header = [0; BATCH_HEADER_BYTES];
    if !fits(BATCH_HEADER_BYTES as u64) || !read(file, &mut header, offset)? {
        return Ok(None);
    }
    let Some(header) = BatchHeader::parse(&header, segment, offset) else {
        return Ok(None);
    };
    let total = batch_bytes(u64::from(header.bytes));
    Ok(fits(total).then_some((header, offset + total)))
}

fn read_glimpse(
    file: &dyn DiskFile,
    segment: &SegmentHeader,
    offset: u64,
) -> io::Result<Option<Glimpse>> {
    let Some((header, end)) = read_header(file, segment, offset)? else {
        return Ok(None);
    };
    let mut beginning = vec![0; GLIMPSE_BYTES.min(header.bytes as usize)];
    if !read(file, &mut beginning, offset + BATCH_HEADER_BYTES as u64)? {
        return Ok(None);
    }
    let place = |offset| Position {
        segment: segment.number,
        offset,
    };
    Ok(Some(Glimpse {
        header,
        beginning,
        at: place(offset),
        end: place(end),
    }))
}

fn read_batch(
    file: &dyn DiskFile,
    segment: &SegmentHeader,
    offset: u64,
) -> io::Result<Option<Batch>> {
    let Some((header, end)) = read_header(file, segment, offset)? else {
        return Ok(None);
    };
    let mut frames = vec![0; header.bytes as usize];
    if !read(file, &mut frames, offset + BATCH_HEADER_BYTES as u64)? {
        return Ok(None);
    }
    let end = Position {
        segment: segment.number,
        offset: end,
    };
    Ok(Some(Batch {
        header,
        frames,
        end,
    }))
}
