// SPDX-License-Identifier: GPL-2.0-only

//! Turns records of the ring into frames: headers and bodies into one scratch buffer, payloads
//! as slices of the ring, all of it sent by one writev.

use std::io::IoSlice;
use std::time::Duration;

use dtloop_abi::{Hold, raw};
use dtloop_core::mirror::is_hash_cookie;
use dtloop_proto::header::{HEADER_BYTES, HeaderError};
use dtloop_proto::record::{STATE_COMMITTED, STATE_FAILED};
use dtloop_proto::{FrameError, Header, Op, RecordBody, RecordKind, frame};

use crate::link::{Link, LinkError, Watcher};

/// Most records of a batch: two pieces each, and writev takes 1024.
pub const RECORDS_MAX: usize = 500;

/// A batch ends when its payload is beyond this: acknowledgements, and with them room in the
/// ring, come batch by batch.
pub const PAYLOAD_BYTES_MAX: usize = 1 << 20;

/// The same for records without payload.
pub const SCRATCH_BYTES_MAX: usize = 128 << 10;

/// Why records could not be shipped.
#[derive(Debug, thiserror::Error)]
pub enum ShipError {
    /// The connection.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The stream.
    #[error("The capture stream cannot be read: {0}")]
    Stream(#[from] dtloop_abi::Error),
    /// A record that cannot be understood: module and agent do not fit.
    #[error(
        "Record {seq} of the capture stream cannot be shipped: {reason}. Install matching versions."
    )]
    Record {
        /// Which.
        seq: u64,
        /// Why.
        reason: String,
    },
}

/// The form in which a record travels. The same record always has the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// With its payload, if it has one.
    Data,
    /// Its payload is all zero.
    Zeroes,
    /// As the hash of its payload.
    Hash([u8; dtloop_proto::limits::HASH_BYTES]),
}

impl Form {
    /// The form of a record with that payload.
    #[must_use]
    pub fn of(desc: &raw::Desc, body: &RecordBody, payload: &[u8]) -> Self {
        let is_sync = body.op == Op::Sync && body.is_committed();
        if is_sync && is_hash_cookie(desc.aux) {
            Self::Hash(*blake3::hash(payload).as_bytes())
        } else if is_sync && is_zero(payload) {
            Self::Zeroes
        } else {
            Self::Data
        }
    }

    /// What of the record is in the frame, and in the hash chain.
    #[must_use]
    pub fn parts<'a>(&'a self, body: &RecordBody, payload: &'a [u8]) -> (RecordKind, &'a [u8]) {
        match self {
            Self::Hash(hash) => (RecordKind::Hash, hash),
            Self::Zeroes => (RecordKind::Zeroes, &[]),
            Self::Data if body.has_payload() => (RecordKind::Data, payload),
            Self::Data => (RecordKind::Data, &[]),
        }
    }
}

/// What goes onto the wire next. Buffers are kept from batch to batch.
#[derive(Debug, Default)]
pub struct Outbox {
    scratch: Vec<u8>,
    /// End of a piece in `scratch`, and the record whose payload follows it.
    pieces: Vec<(usize, Option<u64>)>,
    payload_bytes: usize,
    /// There is a message among it that goes by itself, not in a compressed run.
    control: bool,
    /// What was copied out of the ring because the target did not take it.
    rest: Vec<u8>,
}

/// The body that a descriptor travels as.
///
/// # Errors
///
/// If it has an operation or state that cannot be shipped.
pub fn body_of(desc: &raw::Desc) -> Result<RecordBody, ShipError> {
    let refused = |reason: &str| ShipError::Record {
        seq: desc.seq,
        reason: reason.to_owned(),
    };
    let op = Op::from_number(desc.op).ok_or_else(|| refused("its operation is unknown"))?;
    let state = match desc.state {
        raw::STATE_COMMITTED => STATE_COMMITTED,
        raw::STATE_FAILED => STATE_FAILED,
        _ => return Err(refused("it is not complete")),
    };
    Ok(RecordBody {
        epoch: desc.epoch,
        start_sector: desc.start_sector,
        time_ns: desc.time_ns,
        aux: desc.aux,
        sectors: desc.sectors,
        device: desc.device,
        flags: desc.flags,
        op,
        state,
    })
}

fn is_zero(payload: &[u8]) -> bool {
    let mut chunks = payload.chunks_exact(16);
    let whole = chunks
        .by_ref()
        .all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0);
    whole && chunks.remainder().iter().all(|byte| *byte == 0)
}

impl Outbox {
    /// Whether nothing waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.scratch.is_empty()
    }

    /// Whether no more records should be added.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.pieces.len() >= RECORDS_MAX
            || self.payload_bytes >= PAYLOAD_BYTES_MAX
            || self.scratch.len() >= SCRATCH_BYTES_MAX
    }

    /// Bytes that wait.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.scratch.len() + self.payload_bytes
    }

    /// Adds a message; `seq` is the position of a marker.
    ///
    /// # Errors
    ///
    /// If it is beyond a limit.
    pub fn message(
        &mut self,
        session: u64,
        seq: u64,
        message: &dtloop_proto::Message,
    ) -> Result<(), FrameError> {
        self.control |= !matches!(message, dtloop_proto::Message::Marker(_));
        frame::encode_message(&mut self.scratch, session, seq, message)
    }

    /// Whether there is a message that the target must act on at its place, and not in a compressed run.
    #[must_use]
    pub fn has_control(&self) -> bool {
        self.control
    }

    /// Adds a record; gives the form in which it travels.
    ///
    /// # Errors
    ///
    /// If it cannot travel.
    pub fn record(
        &mut self,
        session: u64,
        desc: &raw::Desc,
        payload: &[u8],
    ) -> Result<Form, ShipError> {
        let body = body_of(desc)?;
        let refused = |error: FrameError| ShipError::Record {
            seq: desc.seq,
            reason: error.to_string(),
        };
        let form = Form::of(desc, &body, payload);
        let (kind, content) = form.parts(&body, payload);
        let out = &mut self.scratch;
        frame::encode_record(out, session, desc.seq, kind, &body, content).map_err(refused)?;
        if kind == RecordKind::Hash {
            out.extend_from_slice(content);
        } else if !content.is_empty() {
            self.pieces.push((self.scratch.len(), Some(desc.seq)));
            self.payload_bytes += content.len();
        }
        Ok(form)
    }

    /// Adds a record that was read back from the disk queue: its frame as it was written there, under this session.
    ///
    /// # Errors
    ///
    /// If it is no frame.
    pub fn stored(&mut self, session: u64, frame: &[u8]) -> Result<(), FrameError> {
        let Some((header, rest)) = frame.split_first_chunk::<HEADER_BYTES>() else {
            return Err(HeaderError::Magic([0; 4]).into());
        };
        let header = Header {
            session,
            ..Header::parse(header)?
        };
        self.scratch.extend_from_slice(&header.pack());
        self.scratch.extend_from_slice(rest);
        Ok(())
    }

    /// What was added last begins here, in bytes; see [`Outbox::header_at`].
    #[must_use]
    pub fn place(&self) -> usize {
        self.scratch.len()
    }

    /// The frame header that was added at that place.
    #[must_use]
    pub fn header_at(&self, place: usize) -> &[u8] {
        self.scratch
            .get(place..place + HEADER_BYTES)
            .unwrap_or_default()
    }

    /// Everything that waits, in order.
    ///
    /// # Errors
    ///
    /// If a payload cannot be read from the ring.
    pub fn slices<'a>(&'a self, hold: Option<&'a Hold>) -> Result<Vec<&'a [u8]>, ShipError> {
        let mut slices = Vec::with_capacity(self.pieces.len() * 2 + 1);
        let mut start = 0;
        for (end, seq) in &self.pieces {
            slices.push(&self.scratch[start..*end]);
            if let (Some(hold), Some(seq)) = (hold, seq) {
                slices.push(hold.payload(*seq)?);
            }
            start = *end;
        }
        if start < self.scratch.len() {
            slices.push(&self.scratch[start..]);
        }
        Ok(slices)
    }

    /// Copies what waits, at most so many bytes of it.
    ///
    /// # Errors
    ///
    /// If a payload cannot be read from the ring.
    pub fn gather(
        &self,
        hold: Option<&Hold>,
        bytes_max: usize,
        out: &mut Vec<u8>,
    ) -> Result<(), ShipError> {
        out.clear();
        for slice in self.slices(hold)? {
            let left = bytes_max - out.len();
            out.extend_from_slice(&slice[..slice.len().min(left)]);
        }
        Ok(())
    }

    /// Sends a compressed run in the place of what waits, unless it is beyond a limit of the wire.
    pub fn set_packed(&mut self, session: u64, packed: &dtloop_proto::Packed<'_>) {
        let mut frame = Vec::with_capacity(packed.payload.len() + 64);
        if frame::encode_packed(&mut frame, session, packed).is_ok() {
            frame.extend_from_slice(packed.payload);
            self.clear();
            self.scratch = frame;
        }
    }

    /// Sends everything. With `patience`, payload is copied out of the ring and the ring let go when the target has not
    /// taken it in that time: what a disk queue holds can be released then, however long the connection is stuck.
    ///
    /// # Errors
    ///
    /// Why it could not; the connection is of no more use then.
    pub fn send(
        &mut self,
        link: &mut Link,
        hold: Option<Hold>,
        patience: Option<Duration>,
        watcher: &mut dyn Watcher,
    ) -> Result<(), ShipError> {
        let mut rest = std::mem::take(&mut self.rest);
        let slices = self.slices(hold.as_ref())?;
        let mut slices: Vec<_> = slices.into_iter().map(IoSlice::new).collect();
        let mut left = &mut slices[..];
        let mut result = link.send_within(&mut left, patience, watcher);
        if result.is_ok() && !left.is_empty() {
            rest.clear();
            for piece in left.iter() {
                rest.extend_from_slice(piece);
            }
            drop(hold);
            result = link.send(&mut [IoSlice::new(&rest)], watcher);
        }
        self.rest = rest;
        self.clear();
        Ok(result?)
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.scratch.clear();
        self.pieces.clear();
        self.payload_bytes = 0;
        self.control = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_on_the_wire_are_those_of_the_kernel() {
        let pairs = [
            (Op::Write, raw::OP_WRITE),
            (Op::WriteZeroes, raw::OP_WRITE_ZEROES),
            (Op::Discard, raw::OP_DISCARD),
            (Op::SecureErase, raw::OP_SECURE_ERASE),
            (Op::Flush, raw::OP_FLUSH),
            (Op::Sync, raw::OP_SYNC),
            (Op::Gap, raw::OP_GAP),
            (Op::Attach, raw::OP_ATTACH),
            (Op::Detach, raw::OP_DETACH),
            (Op::Resize, raw::OP_RESIZE),
        ];
        for (op, number) in pairs {
            assert_eq!(op as u8, number);
        }
        assert_eq!(
            (STATE_COMMITTED, STATE_FAILED),
            (raw::STATE_COMMITTED, raw::STATE_FAILED)
        );
        assert_eq!(dtloop_proto::record::F_ZEROES, raw::F_ZEROES);
        assert_eq!(dtloop_proto::record::F_DEVICES, raw::F_DEVICES);
        assert_eq!(
            dtloop_proto::limits::PAYLOAD_BYTES_MAX,
            raw::RECORD_BYTES_MAX as usize
        );
        assert_eq!(dtloop_proto::limits::NAME_BYTES_MAX + 1, raw::NAME_BYTES);
    }

    #[test]
    fn zeroes_are_recognised() {
        assert!(is_zero(&[0; 512]) && is_zero(&[]));
        for at in [0, 17, 511] {
            let mut data = [0; 512];
            data[at] = 1;
            assert!(!is_zero(&data));
        }
    }
}
