// SPDX-License-Identifier: GPL-2.0-only

//! The wire format between `dtagent` (source) and `dttarget` (target), without any I/O.
//!
//! Every frame is a fixed header, a body and a payload:
//!
//! ```text
//! +-----------+---------------------------+------------------------------+
//! | Header 48 | body: body_bytes, bounded | payload: payload_bytes, raw  |
//! +-----------+---------------------------+------------------------------+
//! ```
//!
//! - [`header`] packs and parses the header; a refusal says its reason.
//! - [`record`] is the body of the frames that carry the stream: fixed layout, no allocation.
//! - [`packed`] is the body of a compressed run of them; compressing is not done here.
//! - [`message`] holds the control messages, encoded by bincode in the one module [`body`].
//! - [`frame`] puts them together: bytes in, [`Frame`](frame::Frame) out, and back.
//! - [`limits`] lists every limit with its reason.
//!
//! The target writes the very frames it received into its journal, so this is a disk format too.
//! `userspace/PROTOCOL.md` describes it for people.

#![forbid(unsafe_code)]

pub mod body;
pub mod code;
pub mod frame;
pub mod header;
pub mod limits;
pub mod message;
pub mod packed;
pub mod record;
pub mod uuid;

pub use code::Code;
pub use frame::{Decoded, Frame, FrameError, decode};
pub use header::{Header, HeaderError, MessageType};
pub use message::Message;
pub use packed::{Codec, Packed};
pub use record::{Op, RecordBody, RecordKind};
pub use uuid::Uuid;

/// The newest protocol version this crate speaks.
pub const VERSION_MAX: u16 = 1;

/// The oldest protocol version this crate speaks.
pub const VERSION_MIN: u16 = 1;

/// The version in the header of handshake frames. Their encoding never changes.
pub const VERSION_HANDSHAKE: u16 = 0;

/// Chooses the version that both sides speak, the newest one.
#[must_use]
pub fn choose_version(peer_min: u16, peer_max: u16) -> Option<u16> {
    let newest = peer_max.min(VERSION_MAX);
    (newest >= peer_min.max(VERSION_MIN)).then_some(newest)
}
