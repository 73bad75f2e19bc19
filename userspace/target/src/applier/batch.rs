// SPDX-License-Identifier: GPL-2.0-only

//! A buffer full of frames, on its way from the journal to the volumes.

use dtloop_core::sequence::{Arrival, Sequencer};
use dtloop_journal::Position;
use dtloop_proto::header::HEADER_BYTES;
use dtloop_proto::message::Marker;
use dtloop_proto::{Decoded, Frame, Message, RecordBody, RecordKind};

/// A frame of a batch.
#[derive(Clone, Copy, Debug)]
pub enum Item {
    /// A record.
    Record {
        /// Its number.
        seq: u64,
        /// Its form.
        kind: RecordKind,
        /// Its body.
        body: RecordBody,
        /// Where its payload is in the buffer.
        payload: (usize, usize),
    },
    /// A marker.
    Marker {
        /// Its position.
        position: u64,
        /// What it says.
        marker: Marker,
    },
}

/// A buffer full of frames that are durable in the journal.
#[derive(Debug, Default)]
pub struct Batch {
    /// The bytes received.
    pub buffer: Vec<u8>,
    /// The frames in it.
    pub items: Vec<Item>,
    /// The place behind it in the journal.
    pub end: Position,
    /// Bytes of the frames.
    pub bytes: u64,
}

impl Batch {
    /// A batch read from the journal that begins with the record `first_seq`. `None`: it is torn.
    #[must_use]
    pub fn parse(read: dtloop_journal::Batch, first_seq: u64) -> Option<Self> {
        let mut batch = Self {
            bytes: read.frames.len() as u64,
            buffer: read.frames,
            items: vec![],
            end: read.end,
        };
        let mut digest = crc32fast::Hasher::new();
        let mut sequence = Sequencer::new(first_seq);
        let mut at = 0;
        while at < batch.buffer.len() {
            let decoded = dtloop_proto::decode(&batch.buffer[at..]).ok()?;
            let Decoded::Complete {
                header,
                frame,
                bytes,
            } = decoded
            else {
                return None;
            };
            digest.update(&batch.buffer[at..at + HEADER_BYTES]);
            let item = match frame {
                Frame::Record {
                    kind,
                    body,
                    payload,
                } => {
                    if sequence.arrive(header.seq) != Ok(Arrival::Next) {
                        return None;
                    }
                    Item::Record {
                        seq: header.seq,
                        kind,
                        body,
                        payload: (at + bytes - payload.len(), at + bytes),
                    }
                }
                Frame::Message(Message::Marker(marker)) => Item::Marker {
                    position: header.seq,
                    marker,
                },
                Frame::Packed(_) | Frame::Message(_) => return None,
            };
            batch.items.push(item);
            at += bytes;
        }
        (digest.finalize() == read.header.digest).then_some(batch)
    }
}
