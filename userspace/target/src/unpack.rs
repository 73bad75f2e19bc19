// SPDX-License-Identifier: GPL-2.0-only

//! Compressed runs on their way from the connection to the journal.
//!
//! Several runs that came together are unpacked into one buffer while they fit, so that they share a journal write and
//! an fdatasync as plain frames do. Nothing is allocated: a run unpacks to at most what a buffer holds.

use dtloop_pack::{UnpackError, Unpacker};
use dtloop_proto::frame::FrameError;
use dtloop_proto::limits::PACKED_RAW_BYTES_MAX;
use dtloop_proto::{Decoded, Frame, Packed};

use crate::replica::BUFFER_BYTES;

const _: () = assert!(PACKED_RAW_BYTES_MAX <= BUFFER_BYTES);

/// Why a compressed run is refused.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The frame around it.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// Its content.
    #[error(transparent)]
    Unpack(#[from] UnpackError),
    /// It is of another session.
    #[error("a compressed run of another session has no place here")]
    Session,
}

/// What was unpacked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Runs {
    /// Bytes of the wire's buffer that are used up.
    pub used: usize,
    /// Bytes of the plain buffer that are filled.
    pub raw: usize,
}

/// Unpacks the runs at the beginning of `wire` into `plain`, as many as fit.
///
/// # Errors
///
/// If one of them is damaged; nothing in `plain` may be used then.
pub fn unpack(
    unpacker: &mut Unpacker,
    session: u64,
    wire: &[u8],
    plain: &mut [u8],
) -> Result<Runs, RunError> {
    let mut runs = Runs::default();
    loop {
        let Decoded::Complete {
            header,
            frame: Frame::Packed(packed),
            bytes,
        } = dtloop_proto::decode(&wire[runs.used..])?
        else {
            return Ok(runs);
        };
        if header.session != session {
            return Err(RunError::Session);
        }
        let Packed {
            codec,
            raw_bytes,
            payload,
        } = packed;
        let Some(out) = plain.get_mut(runs.raw..runs.raw + raw_bytes) else {
            return Ok(runs);
        };
        unpacker.unpack(codec, payload, out)?;
        runs.used += bytes;
        runs.raw += raw_bytes;
    }
}
