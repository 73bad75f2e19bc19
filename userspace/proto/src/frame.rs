// SPDX-License-Identifier: GPL-2.0-only

//! Whole frames: encoding into a buffer, decoding from one.

use crate::body::BodyError;
use crate::header::{HEADER_BYTES, Header, HeaderError, MessageType};
use crate::message::Message;
use crate::packed::{PACKED_BODY_BYTES, Packed, PackedError};
use crate::record::{RECORD_BYTES, RecordBody, RecordError, RecordKind};
use crate::{VERSION_HANDSHAKE, VERSION_MAX};

#[expect(clippy::cast_possible_truncation, reason = "48")]
const RECORD_BODY_BYTES: u32 = RECORD_BYTES as u32;

/// Why a frame is refused. The connection it came by must be closed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The header.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// Body or payload were damaged on the way.
    #[error("Frame damaged: its body checksum is {found:08x}, the bytes give {computed:08x}")]
    Checksum {
        /// As received.
        found: u32,
        /// As computed.
        computed: u32,
    },
    /// A control message's body.
    #[error(transparent)]
    Body(#[from] BodyError),
    /// A record's body.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The description of a compressed run.
    #[error(transparent)]
    Packed(#[from] PackedError),
}

/// What a frame holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame<'a> {
    /// A record of the stream.
    Record {
        /// Its form.
        kind: RecordKind,
        /// Its body.
        body: RecordBody,
        /// Its payload, straight from the buffer.
        payload: &'a [u8],
    },
    /// A compressed run of other frames.
    Packed(Packed<'a>),
    /// Anything else.
    Message(Message),
}

/// What is at the beginning of a buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decoded<'a> {
    /// Not a whole frame; this many bytes from its beginning are needed to go on.
    Incomplete {
        /// See above. Never more than [`FRAME_BYTES_MAX`](crate::limits::FRAME_BYTES_MAX).
        needed: usize,
    },
    /// A frame.
    Complete {
        /// Its header.
        header: Header,
        /// Its content.
        frame: Frame<'a>,
        /// Its length in bytes.
        bytes: usize,
    },
}

/// Decodes the frame at the beginning of a buffer, checking all of it.
///
/// # Errors
///
/// The reason for which the bytes are no frame.
pub fn decode(buffer: &[u8]) -> Result<Decoded<'_>, FrameError> {
    let Some(header) = buffer.first_chunk::<HEADER_BYTES>() else {
        return Ok(Decoded::Incomplete {
            needed: HEADER_BYTES,
        });
    };
    let header = Header::parse(header)?;
    let bytes = header.frame_bytes();
    let Some(rest) = buffer.get(HEADER_BYTES..bytes) else {
        return Ok(Decoded::Incomplete { needed: bytes });
    };
    let computed = crc32fast::hash(rest);
    if computed != header.body_crc {
        return Err(FrameError::Checksum {
            found: header.body_crc,
            computed,
        });
    }
    let frame = decode_content(&header, rest)?;
    Ok(Decoded::Complete {
        header,
        frame,
        bytes,
    })
}

/// Decodes what follows a header whose checksums have been verified before, such as a frame that
/// waits in memory to be applied.
///
/// # Errors
///
/// The reason for which the bytes are no frame.
pub fn decode_content<'a>(header: &Header, rest: &'a [u8]) -> Result<Frame<'a>, FrameError> {
    let body_bytes = header.body_bytes as usize;
    let (body, payload) = rest
        .split_at_checked(body_bytes)
        .ok_or(BodyError::Value("body_bytes"))?;
    if let Some(kind) = RecordKind::from_message_type(header.message_type) {
        let body = RecordBody::parse(body, kind, payload.len())?;
        return Ok(Frame::Record {
            kind,
            body,
            payload,
        });
    }
    if header.message_type == MessageType::Packed {
        return Ok(Frame::Packed(Packed::parse(body, payload)?));
    }
    match Message::decode_body(header.message_type, body)? {
        Some(message) => Ok(Frame::Message(message)),
        None => Err(HeaderError::Type(header.message_type as u16).into()),
    }
}

/// Appends header and body of a record; the payload follows them on the wire.
///
/// # Errors
///
/// The reason for which the record cannot travel.
pub fn encode_record(
    out: &mut Vec<u8>,
    session: u64,
    seq: u64,
    kind: RecordKind,
    record: &RecordBody,
    payload: &[u8],
) -> Result<(), FrameError> {
    record.check(kind, payload.len())?;
    let body = record.pack();
    let mut crc = crc32fast::Hasher::new();
    crc.update(&body);
    crc.update(payload);
    let header = Header {
        body_crc: crc.finalize(),
        version: VERSION_MAX,
        message_type: kind.message_type(),
        session,
        seq,
        body_bytes: RECORD_BODY_BYTES,
        // PANIC: `check` has bounded it by `PAYLOAD_BYTES_MAX`, which the cast keeps.
        payload_bytes: u32::try_from(payload.len()).unwrap_or(u32::MAX),
    };
    Header::check_encode(&header)?;
    out.extend_from_slice(&header.pack());
    out.extend_from_slice(&body);
    Ok(())
}

/// Appends header and body of a compressed run; the payload follows them on the wire.
///
/// # Errors
///
/// The reason for which the run cannot travel.
pub fn encode_packed(
    out: &mut Vec<u8>,
    session: u64,
    packed: &Packed<'_>,
) -> Result<(), FrameError> {
    packed.check()?;
    let body = packed.pack();
    let mut crc = crc32fast::Hasher::new();
    crc.update(&body);
    crc.update(packed.payload);
    let header = Header {
        body_crc: crc.finalize(),
        version: VERSION_MAX,
        message_type: MessageType::Packed,
        session,
        seq: 0,
        body_bytes: u32::try_from(PACKED_BODY_BYTES).unwrap_or(u32::MAX),
        payload_bytes: u32::try_from(packed.payload.len()).unwrap_or(u32::MAX),
    };
    Header::check_encode(&header)?;
    out.extend_from_slice(&header.pack());
    out.extend_from_slice(&body);
    Ok(())
}

/// Appends a control message.
///
/// # Errors
///
/// The field that is beyond its limit.
pub fn encode_message(
    out: &mut Vec<u8>,
    session: u64,
    seq: u64,
    message: &Message,
) -> Result<(), FrameError> {
    let begin = out.len();
    out.resize(begin + HEADER_BYTES, 0);
    if let Err(error) = message.encode_body(out) {
        out.truncate(begin);
        return Err(error.into());
    }
    let body = &out[begin + HEADER_BYTES..];
    let message_type = message.message_type();
    let header = Header {
        body_crc: crc32fast::hash(body),
        version: if message_type.is_handshake() {
            VERSION_HANDSHAKE
        } else {
            VERSION_MAX
        },
        message_type,
        session,
        seq,
        body_bytes: u32::try_from(body.len()).unwrap_or(u32::MAX),
        payload_bytes: 0,
    };
    if let Err(error) = Header::check_encode(&header) {
        out.truncate(begin);
        return Err(error.into());
    }
    out[begin..begin + HEADER_BYTES].copy_from_slice(&header.pack());
    Ok(())
}
