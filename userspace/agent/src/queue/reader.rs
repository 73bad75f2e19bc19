// SPDX-License-Identifier: GPL-2.0-only

//! Reading the disk queue back, beside the thread that writes it.

use std::sync::Arc;

use dtloop_core::spool::Batch;
use dtloop_journal::{Position, Reader};
use dtloop_proto::{Decoded, Frame, RecordBody, RecordKind, decode};

use super::Home;

/// Reads batches back.
pub struct QueueReader {
    home: Home,
    reader: Option<Reader>,
    /// What was read last, by place and first record: a batch may be sent in parts.
    last: Option<(Position, u64, Arc<Vec<u8>>)>,
}

/// A record of the queue, checked.
pub struct Stored<'a> {
    /// Its number.
    pub seq: u64,
    /// The form in which it travels.
    pub kind: RecordKind,
    /// Its body.
    pub body: RecordBody,
    /// Its payload, in that form.
    pub payload: &'a [u8],
    /// Its frame, whose session is 0.
    pub frame: &'a [u8],
}

impl QueueReader {
    /// For the queue that is kept there.
    #[must_use]
    pub fn new(home: Home) -> Self {
        Self {
            home,
            reader: None,
            last: None,
        }
    }

    /// Lets the files go: the space of one that was removed is given back only then.
    pub fn let_go(&mut self) {
        (self.reader, self.last) = (None, None);
    }

    /// Reads a batch. Its frames are still to be checked, see [`stored`].
    ///
    /// # Errors
    ///
    /// Why it cannot be read.
    pub fn read(&mut self, batch: &Batch<Position>) -> Result<Arc<Vec<u8>>, String> {
        if let Some((place, first, frames)) = &self.last {
            if (*place, *first) == (batch.place, batch.first) {
                return Ok(Arc::clone(frames));
            }
        }
        self.last = None;
        let frames = Arc::new(self.read_anew(batch)?);
        self.last = Some((batch.place, batch.first, Arc::clone(&frames)));
        Ok(frames)
    }

    fn read_anew(&mut self, batch: &Batch<Position>) -> Result<Vec<u8>, String> {
        let going_on = self
            .reader
            .take()
            .filter(|reader| reader.position() == batch.place);
        // What fails once may be read when the file is opened again.
        let first = going_on.map(|reader| self.attempt(reader, batch));
        match first {
            Some(Ok(frames)) => Ok(frames),
            _ => self.attempt(self.home.reader(batch.place), batch),
        }
    }

    fn attempt(&mut self, mut reader: Reader, batch: &Batch<Position>) -> Result<Vec<u8>, String> {
        let read = reader.next_batch().map_err(|error| error.to_string())?;
        let place = |end: Position| end.segment == batch.place.segment;
        let fits = read.filter(|read| place(read.end) && read.header.first_seq == batch.first);
        let found = fits.ok_or_else(|| "it is damaged".to_owned())?;
        self.reader = Some(reader);
        Ok(found.frames)
    }
}

/// The record at the beginning of some frames, and its length in bytes.
///
/// # Errors
///
/// Why it is damaged.
pub fn stored(frames: &[u8]) -> Result<(Stored<'_>, usize), String> {
    match decode(frames) {
        Ok(Decoded::Complete {
            header,
            frame:
                Frame::Record {
                    kind,
                    body,
                    payload,
                },
            bytes,
        }) => {
            let stored = Stored {
                seq: header.seq,
                kind,
                body,
                payload,
                frame: &frames[..bytes],
            };
            Ok((stored, bytes))
        }
        Ok(_) => Err("it is no record".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}
